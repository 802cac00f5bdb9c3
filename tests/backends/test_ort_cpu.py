"""`ort-cpu` is one session on the file, with the operators where there are any."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from agreement import assert_right, pair

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy._floats import ulp_distance
from smoothl1_deploy._spec import DTYPES, REDUCTIONS
from smoothl1_deploy.backends import _ort_cpu as ort_cpu
from smoothl1_deploy.backends._base import load
from smoothl1_deploy.backends._runner import Runner
from smoothl1_deploy.errors import InvalidInputError, SpecError
from smoothl1_deploy.reference._oracle import oracle


@pytest.mark.parametrize("columns", [1, 2, 32, 64, 8192])
def test_repeated_data_stay_within_two_ulp(columns: int) -> None:
    """What is the same in every lane is wrong in the same way in every lane: the worst data."""
    rng = np.random.default_rng(columns)
    for beta in (1.0, 0.1, 3.3, 0.37):
        spec = LossSpec(beta)
        run = load(export(spec)).run
        for _ in range(25):
            scale = beta * np.exp(2 * rng.standard_normal())
            a = np.tile((scale * rng.standard_normal(columns)).astype(np.float32), 8192 // columns)
            got = run(a, 0 * a)["loss"]
            assert ulp_distance(got, oracle(spec, a, 0 * a)) <= 2


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_element_of_any_place_counts(reduction: str) -> None:
    """Places of a kernel's first and last lane, of a block, of a task and of what is left over."""
    spec = LossSpec(0.5, reduction)
    run = load(export(spec)).run
    for value in (np.nan, np.inf, 3e38):
        for at in (0, 15, 16, 1023, 1024, (1 << 15) - 1, 1 << 15, 100_002):
            a, b = pair(spec, (100_003,))
            a[at] = value
            assert_right(spec, run(a, b)["loss"], a, b, f"at {at}")


def test_without_the_operators_no_value_moves_by_more_than_an_ulp(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def runners(spec: LossSpec) -> tuple[Runner, Runner]:
        with monkeypatch.context() as patch:
            patch.setattr("smoothl1_deploy.ops._LIBRARY", tmp_path / "deleted.so")
            return load(export(spec)), load(export(spec), "ort-cpu-bare")

    for dtype in DTYPES:
        for reduction in REDUCTIONS:
            spec = LossSpec(0.3, reduction, dtype)
            a, b = pair(spec, (5, 10_007))
            without, bare = (runner.run(a, b)["loss"] for runner in runners(spec))
            assert without.tobytes() == bare.tobytes()
            with_them = load(export(spec)).run(a, b)["loss"]
            assert ulp_distance(with_them, without).max() <= 1, spec


def test_an_error_says_whose_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = load(export(LossSpec()))
    assert isinstance(runner, ort_cpu.OrtRunner)

    class Broken:
        def run(self, *given: object) -> None:
            raise RuntimeError("planted")

    monkeypatch.setattr(runner, "_session", Broken())
    with pytest.raises(InvalidInputError, match="ONNX Runtime refused the inputs: planted"):
        runner.run(np.ones(4, np.float32), np.ones(4, np.float32))


def test_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    assert ort_cpu.default_threads() == 8
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5})
    assert ort_cpu.default_threads() == 2
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert ort_cpu.default_threads() == 1
    with pytest.raises(SpecError, match="threads must be 1 to 4096, or 0 for the default, got -1"):
        load(export(LossSpec()), threads=-1)
