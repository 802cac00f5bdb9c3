"""Units of work in processes: all of them, or those that the time allows."""

from __future__ import annotations

import multiprocessing
import time

import pytest

from smoothl1_deploy.parity.matrix import Matrix, run_matrix
from smoothl1_deploy.parity.pool import each


@pytest.mark.parametrize("workers", [1, 2])
def test_every_unit_comes_back(workers: int) -> None:
    assert dict(each(abs, [-1, 2, -3], workers)) == {-1: 1, 2: 2, -3: 3}


def test_nothing_is_begun_after_the_end() -> None:
    assert [*each(abs, [-1], 1, time.monotonic() - 1)] == []


def test_processes_still_at_work_are_ended() -> None:
    before = set(multiprocessing.active_children())
    start = time.monotonic()
    assert [*each(time.sleep, [600.0, 601.0], 2, start + 0.5)] == []
    assert time.monotonic() - start < 60
    for child in set(multiprocessing.active_children()) - before:
        child.join(20)
        assert child.exitcode is not None


def test_what_a_matrix_left_out_is_named() -> None:
    matrix = Matrix(("onnx-reference",), betas=(0.5, float("inf")), dtypes=("float16",))
    report = run_matrix(matrix, seconds=0)
    assert report.cells == ()
    assert report.notes[-1] == "left out after 0 s: float16 beta 0.5, float16 beta inf"
