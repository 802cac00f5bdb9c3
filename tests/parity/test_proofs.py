"""`scripts/prove_bounds`: every number of the bound is answered for, and no other would do."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from script import module_at

from smoothl1_deploy._floats import Array
from smoothl1_deploy.parity import _bounds
from smoothl1_deploy.reference._oracle import CHUNK

PROVE = Path(__file__).parents[2] / "proofs" / "prove.py"
needs_gappa = pytest.mark.skipif(shutil.which("gappa") is None, reason="gappa is not installed")


@pytest.fixture(scope="module")
def prove() -> Any:
    return module_at(PROVE)


def test_without_gappa_it_says_what_to_install(
    prove: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert prove.main() == 3 and "apt-get install gappa" in capsys.readouterr().err


@needs_gappa
def test_every_constant_is_proved_and_a_nearby_one_is_not(
    prove: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prove.main() == 0, capsys.readouterr().out


@needs_gappa
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("_SIGMA", 7, "sigma.g: NOT PROVED"),
        ("_ELEMENT", 5, "_ELEMENT: 4.5 WOULD DO"),
        ("_BACK", 3, "gradient.g: NOT PROVED"),
        ("_SPLIT_LIMIT", 1 << 27, "limit.g: NOT PROVED"),
    ],
)
def test_a_constant_that_is_changed_turns_red(
    prove: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: int,
    says: str,
) -> None:
    monkeypatch.setattr(_bounds, name, value)
    assert prove.main() == 1
    assert says in capsys.readouterr().out


def test_every_number_of_the_bound_is_listed(prove: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prove.unlisted() == []
    source = inspect.getsource(_bounds)
    changed = source.replace("steps + _NEAREST\n", "steps + 1.5\n") + "\n_NEW = 7\n"
    monkeypatch.setattr(prove.inspect, "getsource", lambda module: changed)
    assert prove.unlisted() == ["1.5 in bound", "_NEW"]


def pairwise(terms: Array) -> tuple[np.longdouble, int]:
    """The sum as numpy adds up, and how many additions an element passes through at most."""
    count = len(terms)
    if count > 128:
        middle = count // 2 - count // 2 % 8
        (left, a), (right, b) = pairwise(terms[:middle]), pairwise(terms[middle:])
        return left + right, 1 + max(a, b)
    lanes = terms[: count - count % 8].reshape(-1, 8)
    r = np.add.accumulate(lanes)[-1]
    total = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]))
    for term in terms[count - count % 8 :]:
        total = total + term
    return total, len(lanes) - 1 + 3 + count % 8


def test_the_oracle_adds_up_no_deeper_than_the_bound_allows() -> None:
    """numpy adds up pairwise; what it casts, in blocks of 8192 that it adds up one by one.

    What else the oracle rounds, 5 times an element and once a mean, has room too.
    """
    for dtype in (np.float64, np.longdouble):
        terms = np.random.default_rng(0).random(CHUNK - 5).astype(dtype)
        wide = terms.astype(np.longdouble)
        blocks = [pairwise(wide[i : i + 8192]) for i in range(0, len(wide), 8192)]
        in_turn = np.add.accumulate(np.array([total for total, _ in blocks]))[-1]
        whole, depth = pairwise(wide)
        found = terms[None].sum(axis=1, dtype=np.longdouble)[0]
        assert found in (whole, in_turn) and found != np.add.accumulate(wide)[-1]
        deepest = max(depth, len(blocks) + max(depth for _, depth in blocks))
        assert deepest + 6 <= _bounds._ORACLE_DEPTH
