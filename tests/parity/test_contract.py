"""The contract at its edges: computed, and each kind of answer recognised."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from smoothl1_deploy._floats import Array
from smoothl1_deploy.errors import SpecError
from smoothl1_deploy.parity import _contract as module
from smoothl1_deploy.parity._contract import KINDS, PLAIN, PYTORCH, Answer, Contract, probe_contract

#: What the plain graph says otherwise, which it is asked for here: each takes an export.
DIFFERS = {
    "mean of nothing": "0.0",
    "negative beta": "1.0",
    "float16, beta = 0": "[0.5, 3.0] as float32[2]",
    "float64, beta = 0.1": "ULP off)",
    "beta = 1e-8": "ULP off)",
    "integers": "2",
}


@pytest.fixture(scope="module")
def progress() -> list[int]:
    return []


@pytest.fixture(scope="module")
def contract(progress: list[int]) -> Contract:
    asked = module._plain

    def plain(sessions: dict[str, Any], probe: module._Probe) -> Array:
        return asked(sessions, probe) if probe.name in DIFFERS else np.zeros(1, np.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_plain", plain)
        return probe_contract(
            ("ort-cpu", "onnx-reference"), progress=lambda done, total: progress.append(done)
        )


def answer(contract: Contract, edge: str, column: str) -> Answer:
    (row,) = (e for e in contract.edges if e.name == edge)
    (found,) = (a for a in row.answers if a.column == column)
    return found


def test_the_table_is_whole(contract: Contract, progress: list[int]) -> None:
    assert contract.columns == (PYTORCH, "ort-cpu", "onnx-reference", PLAIN)
    assert progress == list(range(len(contract.edges) + 1))
    for edge in contract.edges:
        assert tuple(a.column for a in edge.answers) == contract.columns
        assert {a.kind for a in edge.answers} <= set(KINDS)
        assert edge.answers[0].kind == "reference" and all(a.text for a in edge.answers)


def test_ours_never_differs(contract: Contract) -> None:
    """Equal, better, or a refusal that says so; never another number."""
    for backend in ("ort-cpu", "onnx-reference"):
        kinds = {edge.name: answer(contract, edge.name, backend).kind for edge in contract.edges}
        assert {name: kind for name, kind in kinds.items() if kind != "equal"} == {
            "beta = inf": "better",
            "float16, beta = 1000": "better",
            "float32 beside float64": "refuses",
        }


def test_the_plain_graph_differs_where_the_design_says(contract: Contract) -> None:
    for edge, text in DIFFERS.items():
        found = answer(contract, edge, PLAIN)
        assert found.kind == "differs" and text in found.text, edge


def test_what_pytorch_says_is_asked_of_pytorch(contract: Contract) -> None:
    assert answer(contract, "mean of nothing", PYTORCH).text == "nan"
    assert answer(contract, "negative beta", PYTORCH).text.startswith("RuntimeError: smooth_l1")
    assert answer(contract, "size_average=False", PYTORCH).text == "2.625"
    assert answer(contract, "reduce=False", PYTORCH).text == "[0.125, 2.5]"
    assert answer(contract, "broadcasting, none", PYTORCH).text == "[[0.5, 1.5], [1.5, 0.5]]"


ONE = module._Probe("one", "", [0.5], [0], {"reduction": "none"})
TRUTH = np.array([0.125], np.float32)


@pytest.mark.parametrize(
    ("got", "torch", "kind", "text"),
    [
        (TRUTH, TRUTH, "equal", "[0.125]"),
        (TRUTH, np.array([np.inf], np.float32), "better", "[0.125]"),
        (TRUTH * 2, TRUTH, "differs", "[0.25] (8,388,608 ULP off)"),
        (TRUTH * np.float32(np.nan), TRUTH, "differs", "[nan]"),
        (TRUTH.astype(np.float64), TRUTH, "differs", "[0.125] as float64[1]"),
        (TRUTH.reshape(()), TRUTH, "differs", "0.125 as float32[]"),
        (ValueError("no\nway"), TRUTH, "refuses", "ValueError: no"),
        (ValueError(""), TRUTH, "refuses", "ValueError: "),
        (ValueError("no"), RuntimeError("neither"), "equal", "ValueError: no"),
        (TRUTH, RuntimeError("no"), "differs", "[0.125]"),
        (TRUTH, TRUTH.astype(np.float64), "differs", "[0.125] as float32[1]"),
        (TRUTH.astype(np.float64), TRUTH.astype(np.float64), "equal", "[0.125]"),
        (TRUTH.astype(np.float64) * 2, TRUTH.astype(np.float64), "differs", "[0.25]"),
    ],
)
def test_each_kind_of_answer(
    got: Array | Exception, torch: Array | Exception, kind: str, text: str
) -> None:
    assert module._answer("x", ONE, got, torch) == Answer("x", kind, text)


def test_a_large_result_is_told_by_its_shape() -> None:
    assert module._text(np.zeros((3, 4), np.float16)) == "float16[3, 4]"


def test_a_crash_of_ours_is_not_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> Array:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(module, "_ours", crash)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        probe_contract()


def test_an_unknown_backend_is_refused_first() -> None:
    with pytest.raises(SpecError, match="unknown backend 'gpu'"):
        probe_contract(("gpu",))
