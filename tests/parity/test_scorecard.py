"""The diagnosis's own score, for a few graphs; scripts/scorecard judges all of them."""

from __future__ import annotations

import pytest
from scorecard import (
    NOT_PLANTED,
    PAGE,
    PLANTS,
    REDUCTIONS,
    SPELLINGS,
    Cell,
    Outcome,
    by_fault,
    by_spelling,
    judge,
    planted_cells,
)

from smoothl1_deploy.parity import _diagnose
from smoothl1_deploy.parity._faults import Fault

#: The fault that each spelling makes another formula of, one the reduction has, one of a gradient.
CELLS = [
    *(Cell(spelling, "mean", Fault.MISSING_HALF) for spelling in SPELLINGS),
    Cell("Huber over beta", "per sample", Fault.MISSING_ABS),
    Cell("function", "mean", Fault.WRONG_COUNT),
    Cell("inlined", "per sample", Fault.GRADIENT_SCALE, 2),
    Cell("torch.onnx.export", "none", Fault.SMOOTH_ABS, 1),
]


def test_a_few_planted_faults_are_named() -> None:
    for cell in CELLS:
        assert (outcome := judge(cell)) and outcome.kind == "named", (cell, outcome)


def test_right_graphs_are_left_alone() -> None:
    cells = [Cell(spelling, "per sample", beta=0.5) for spelling in SPELLINGS]
    # In the format that numpy can't feed, a result of lower rank than the input, by nobody we know.
    for cell in (*cells, Cell("Clip", "per sample", beta=0.5, dtype="bfloat16")):
        assert judge(cell) == Outcome("named"), cell


def test_a_broken_diagnosis_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("Clip", "sum", Fault.L1)
    assert judge(cell) == Outcome("named", ("L1 instead of Smooth L1",))
    monkeypatch.setattr(_diagnose, "find", lambda spec, replies: [])
    assert judge(cell) == Outcome("unnamed", ("unknown",))


def test_every_fault_that_has_a_name_is_planted_and_has_a_row_on_the_page() -> None:
    named = {*Fault} - {Fault.UNKNOWN}
    assert {*PLANTS} == named
    assert {fault for fault, plants in PLANTS.items() if not plants} == {*NOT_PLANTED}
    rows = [line.split(" | ")[0] for line in PAGE.read_text().splitlines()]
    assert all(f"| {fault.value}" in rows or f"| `{fault.value}`" in rows for fault in named)
    assert {cell.reduction for cell in planted_cells()} == {*REDUCTIONS}


def test_the_tables_tell_what_is_not_named_and_hide_no_row() -> None:
    seen, alarm = Cell("Clip", "sum", Fault.L1), Cell("Clip", "mean")
    found = {seen: Outcome("unseen"), Cell("Clip", "mean", Fault.L1): Outcome("named")}
    table = by_fault(found)
    assert table.rows[0] == ("L1 instead of Smooth L1", "2", "1", "0", "0", "1")
    assert table.rows[-1] == ("all", "2", "1", "0", "0", "1")
    assert "L1 instead of Smooth L1, plant 1, not seen (sum of Clip)" in table.below
    spellings = by_spelling(found, {alarm: Outcome("another", ("wrong beta",))})
    assert spellings.rows[-1][-2:] == ("1", "1") and "wrong beta" in spellings.below[0]
