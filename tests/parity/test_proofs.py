"""`scripts/prove_bounds`: the bound of an element is Gappa's too, and no other number would be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from script import module_at

PROVE = Path(__file__).parents[2] / "proofs" / "prove.py"


@pytest.fixture(scope="module")
def prove() -> Any:
    return module_at(PROVE)


def test_without_gappa_it_says_what_to_install(
    prove: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert prove.main() == 3 and "apt-get install gappa" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("gappa") is None, reason="gappa is not installed")
@pytest.mark.parametrize(("roundings", "code"), [(3, 1), (4, 0), (5, 1)])
def test_a_constant_that_is_too_small_or_too_large_turns_red(
    prove: Any, capsys: pytest.CaptureFixture[str], roundings: int, code: int
) -> None:
    assert prove.main(roundings) == code
    assert ("NOT PROVED" in capsys.readouterr().out) == (roundings < 4)
