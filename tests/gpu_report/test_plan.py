"""The plan of the GPU report: order, cost, bytes, and what a short time drops."""

from __future__ import annotations

import pytest

from smoothl1_deploy.gpu_report.plan import (
    Budget,
    SmallCell,
    SpeedCell,
    bytes_to_move,
    plan_groups,
    plan_small,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_speed_table_is_whole_and_in_order() -> None:
    groups = plan_groups(("torch-eager", "trt"))
    cells = [cell for group in groups for cell in group.cells]
    assert len(cells) == len(set(cells)) == 2 * 2 * 3 * 7
    assert {cell.log2 for cell in cells} >= {10, 26}
    assert groups[0].cells[0] == SpeedCell("torch-eager", "mean", "float32", 26)
    assert [g.dtype for g in groups] == ["float32"] * 6 + ["float16"] * 6
    assert all(list(g.cells) == sorted(g.cells, key=lambda c: -c.log2) for g in groups)
    assert all(group.seconds > 0 for group in groups)
    assert str(cells[0]) == "torch-eager mean float32 2^26"


def test_the_small_calls() -> None:
    cells = plan_small(("trt",))
    assert [str(cell) for cell in cells] == [
        "trt mean 64x16 call by call",
        "trt mean 64x16 with a CUDA graph",
        "trt none 64x16 call by call",
        "trt none 64x16 with a CUDA graph",
    ]
    assert plan_small(()) == []
    assert cells[1] == SmallCell("trt", "mean", True)


@pytest.mark.parametrize(
    ("reduction", "dtype", "elements", "expected"),
    [
        ("none", "float32", 1 << 26, 3 * 4 << 26),
        ("mean", "float32", 1 << 26, (2 * 4 << 26) + 4),
        ("sum", "float16", 1024, 2 * 2 * 1024 + 2),
    ],
)
def test_what_must_be_moved(reduction: str, dtype: str, elements: int, expected: int) -> None:
    assert bytes_to_move(reduction, dtype, elements) == expected


def test_a_budget_drops_what_does_not_fit_and_says_which() -> None:
    clock = Clock()
    budget = Budget(10.0, clock)
    assert budget.allows(4.0, ["a"])
    clock.now += 4
    assert budget.spent == 4 and budget.left == 6
    assert not budget.allows(4.0, ["b", "c"], keep=3.0)
    assert budget.allows(3.0, ["d"], keep=3.0)
    clock.now += 60
    assert budget.left == 0.0 and not budget.allows(0.1, ["e"])
    assert budget.dropped == ["b", "c", "e"]
