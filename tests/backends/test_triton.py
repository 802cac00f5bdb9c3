"""`triton-http` and `triton-grpc`: the artefact behind a real server, as any other backend."""

from __future__ import annotations

import numpy as np
import pytest
from agreement import assert_right, pair
from embedded import embedded_triton

from smoothl1_deploy import LossSpec, export, load
from smoothl1_deploy.backends._base import missing
from smoothl1_deploy.errors import ArtefactError, InvalidInputError
from smoothl1_deploy.parity._matrix import Matrix, run_matrix

OVER_THE_WIRE = ("triton-http", "triton-grpc")


@pytest.fixture(scope="module", autouse=True)
def _triton() -> None:
    embedded_triton()


@pytest.mark.parametrize("backend", OVER_THE_WIRE)
def test_the_right_number_in_the_right_shape(backend: str) -> None:
    assert missing(backend) is None
    for spec in (LossSpec(0.5), LossSpec(0.5, "none", "bfloat16"), LossSpec(per_sample=True)):
        runner = load(export(spec, shape=("N", 4)), backend)
        a, b = pair(spec, (3, 4))
        assert_right(spec, runner.run(a, b)["loss"], a, b)


def test_what_it_can_not_serve() -> None:
    with pytest.raises(ArtefactError, match="the rank of 'input' is unknown"):
        load(export(LossSpec()), "triton-http")
    runner = load(export(LossSpec(), shape=("N", 4)), "triton-http")
    with pytest.raises(InvalidInputError, match=r"target has the shape \(1, 4\)"):
        runner.run(np.zeros((3, 4), "f4"), np.zeros((1, 4), "f4"))


def test_a_part_of_the_matrix_goes_over_the_wire() -> None:
    matrix = Matrix(
        OVER_THE_WIRE, betas=(0.5, 1.0), dtypes=("float16",), routes=("function", "inlined"),
        reductions=("none", "mean"), extensions=False, quick=True,
    )  # fmt: skip
    report = run_matrix(matrix)
    assert report, [cell.failures[0].verdict.detail for cell in report.red]
    cells = {(c.spec.reduction, c.beta, c.route, c.backend) for c in report.cells}
    assert cells == {(r, 1.0, "inlined", b) for r in ("none", "mean") for b in OVER_THE_WIRE}
    for cell in report.cells:
        assert {"nan", "inf", "overflow"} <= set(cell.families)
        assert set(cell.layouts) == {"matrix", "no-rows"}
    assert any("triton-http" in note for note in report.notes)


def test_a_single_cell_can_be_repeated() -> None:
    matrix = Matrix(
        ("triton-grpc",), betas=(0.1,), dtypes=("float32",), routes=("function",),
        reductions=("sum",), extensions=False, quick=True,
    )  # fmt: skip
    report = run_matrix(matrix)
    assert report and [(c.beta, c.route) for c in report.cells] == [(0.1, "function")]


def test_a_runner_that_is_collected_in_the_middle_of_a_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import gc

    from smoothl1_deploy.serving import _repository as repository

    runners = [load(export(LossSpec(), shape=("N", 4)), "triton-grpc") for _ in range(2)]
    a, b = pair(LossSpec(), (3, 4))
    runners[0].run(a, b)
    real = repository.write_model

    def collecting(*args: object, **kwargs: object) -> object:
        if len(runners) == 2:
            runner = runners.pop(0)
            runner.cycle = runner  # nothing but itself keeps it
            del runner
        assert gc.collect()
        return real(*args, **kwargs)

    monkeypatch.setattr(repository, "write_model", collecting)
    assert_right(LossSpec(), runners[-1].run(a, b)["loss"], a, b)
