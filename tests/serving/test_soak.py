"""A short soak with every kind of fault; and that it sees a wrong answer."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from smoothl1_deploy.serving._embedded import Triton

PATH = Path(__file__).parents[2] / "bench" / "soak.py"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # its dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


def test_no_wrong_answer_under_faults(
    soak: ModuleType, triton: Triton, capsys: pytest.CaptureFixture[str]
) -> None:
    code = soak.main(["--seconds", "6", "--clients", "4", "--kill-every", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0, found
    assert found["wrong"] == 0 and found["must_not_happen"] == []
    assert found["requests"] > 100 and found["recoveries_s"]
    words = " ".join(found["faults"])
    assert "killed none" in words and "loaded version 2 of mean" in words


def test_a_wrong_answer_is_seen(
    soak: ModuleType,
    triton: Triton,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The server computes as it should; what is held to be right is another loss.
    monkeypatch.setattr(soak, "BETAS", {version: 7.0 for version in soak.BETAS})
    assert soak.main(["--seconds", "1", "--clients", "4", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["wrong"] > 0 and "mean" in found["must_not_happen"][0]


def test_what_counts_as_right(soak: ModuleType) -> None:
    exact = np.array([1.0, np.nan, np.inf], "f4")
    assert soak.is_right(exact.copy(), exact)
    assert not soak.is_right(np.array([1.0, 0.0, np.inf], "f4"), exact)
    assert not soak.is_right(np.array([1.00001, np.nan, np.inf], "f4"), exact)
    assert not soak.is_right(exact.astype("f8"), exact)
    assert not soak.is_right(exact[:2], exact)
