"""The matrix: complete, reproducible, and able to turn red."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
from planted import planted

from smoothl1_deploy import LossSpec
from smoothl1_deploy._floats import Array
from smoothl1_deploy._spec import DTYPES
from smoothl1_deploy.backends._base import backend_class
from smoothl1_deploy.errors import InvalidInputError
from smoothl1_deploy.parity._cases import LAYOUTS, Case, is_for, needs_wider
from smoothl1_deploy.parity._families import FAMILIES
from smoothl1_deploy.parity._matrix import (
    EXTENSIONS,
    Matrix,
    Task,
    is_run,
    run_matrix,
)
from smoothl1_deploy.parity._report import is_extended, repeat_command
from smoothl1_deploy.parity.views import _tables as tables


def test_a_small_matrix_is_complete_and_green() -> None:
    matrix = Matrix(
        ("ort-cpu", "onnx-reference"), betas=(0.0, 0.5), dtypes=("float32",),
        extensions=False, quick=True,
    )  # fmt: skip
    seen: list[tuple[int, int]] = []
    report = run_matrix(matrix, progress=lambda done, total: seen.append((done, total)))
    assert report
    assert {(c.spec, c.route, c.backend) for c in report.cells} == {
        (LossSpec(beta, reduction, "float32"), route, backend)
        for beta in (0.0, 0.5)
        for reduction in ("none", "mean", "sum")
        for route in ("function", "inlined", "torch")
        for backend in ("ort-cpu", "onnx-reference")
    }
    assert seen == [(0, 2), (1, 2), (2, 2)]
    for cell in report.cells:
        assert set(cell.families) == set(FAMILIES)
        every = {n for n in LAYOUTS if "^" not in n and is_for(cell.spec, n)}
        assert set(cell.layouts) == ({"matrix", "no-rows"} if cell.route == "torch" else every)


def test_a_report_repeats_itself_in_strict_json_whatever_processes_found_it() -> None:
    matrix = Matrix(
        ("ort-cpu",), betas=(1.0, float("inf")), dtypes=("bfloat16",), routes=("inlined",),
        quick=True,
    )  # fmt: skip
    one, two = (json.loads(run_matrix(matrix, workers=n).to_json()) for n in (1, 2))
    assert one["cells"] == two["cells"]
    assert one["summary"]["cells"] == 8 and one["summary"]["red"] == 0
    assert one["cells"][-1]["beta"] == "inf"
    assert one["environment"]["packages"]["onnxruntime"]
    assert one["notes"]


def test_the_extensions_are_cells_of_their_own() -> None:
    matrix = Matrix(
        ("ort-cpu", "trt-network"), betas=(0.0, 0.1), dtypes=("bfloat16",),
        routes=("function", "torch"), plain=False,
    )  # fmt: skip
    report = run_matrix(matrix)
    assert report, report.red
    assert {cell.route for cell in report.cells} == {"function"}
    assert {cell.beta for cell in report.cells} == {0.0, 0.1}
    found = set()
    for cell in report.cells:
        spec = cell.spec if cell.spec.beta_shape else cell.spec.at(1.0)
        found.add(replace(spec, dtype="float32", runtime_beta=cell.spec.runtime_beta))
    assert found == set(EXTENSIONS)
    (table,) = tables.matrix(report)
    assert len(table.rows) == len(EXTENSIONS)


def test_wrong_answers_and_errors_are_red_cells_with_a_command() -> None:
    def fault(spec: LossSpec, input: Array, right: dict[str, Array]) -> dict[str, Array]:
        if input.size == 0:
            raise InvalidInputError("a planted refusal")
        return {"loss": np.nan_to_num(right["loss"])} if np.isnan(input).any() else right

    matrix = Matrix(
        ("ort-cpu",), betas=(0.5,), reductions=("mean",), dtypes=("float32",),
        routes=("function",), extensions=False, seed=7, quick=True,
    )  # fmt: skip
    with planted(fault):
        report = run_matrix(matrix)
    assert not report
    (cell,) = report.red
    found = {(f.case.family, f.case.layout): f.verdict.detail for f in cell.failures}
    assert set(found) == {
        ("nan", "matrix"), ("nan", "odd"), ("normal", "empty"), ("normal", "no-rows"),
    }  # fmt: skip
    assert "wrong class" in found["nan", "matrix"] and "oracle" in found["nan", "matrix"]
    assert "InvalidInputError: a planted refusal" in found["normal", "empty"]
    assert {f.case.seed for f in cell.failures} == {7}
    assert repeat_command(cell, report.seed) == (
        "smoothl1-deploy parity --beta 0.5 --reduction mean --dtype float32 "
        "--route function --backend ort-cpu --no-extensions --seed 7 --no-engines"
    )
    assert [len(table.rows) for table in tables.matrix(report)] == [1]


def test_an_error_that_grows_with_the_size_is_red_at_a_million_elements_alone() -> None:
    """As that of sums in float32: 2^-30 of the 1,024 elements of the families, 2^-20 there."""

    def fault(spec: LossSpec, input: Array, right: dict[str, Array]) -> dict[str, Array]:
        return {"loss": np.asarray(right["loss"] * np.float32(1 + input.size * 2.0**-40))}

    matrix = Matrix(
        ("ort-cpu",), betas=(0.5,), reductions=("mean",), dtypes=("float32",),
        routes=("function",), extensions=False,
    )  # fmt: skip
    with planted(fault):
        (cell,) = run_matrix(matrix).red
    found = {(failure.case.family, failure.case.layout) for failure in cell.failures}
    assert found == {("normal", "2^20"), ("constant", "2^20")}


def test_a_gradient_is_summed_back_over_a_million_rows_in_every_dtype() -> None:
    cases = {
        (spec.dtype, case.family)
        for task in Matrix(("ort-cpu",)).tasks()
        if isinstance(task, Task)
        for spec in task.specs()
        for case in task.cases(spec)
        if spec.gradient
        and (case.input_shape, case.target_shape) == ((1, 4), (1_000_000, 4))
        and is_run(case, "function", backend_class("ort-cpu"))
        and not needs_wider(spec, case, wide=True)
    }
    assert cases == {(dtype, family) for dtype in DTYPES for family in ("normal", "constant")}


def test_2_to_24_elements_are_one_cell_of_the_first_task() -> None:
    large = [
        (task.label, spec, case.family)
        for task in Matrix(("ort-cpu",)).tasks()
        if isinstance(task, Task)
        for spec in task.specs()
        for case in task.cases(spec)
        if case.layout == "2^24"
    ]
    assert large == [("float32 beta 1", LossSpec(), family) for family in ("normal", "constant")]
    case = Case.of("normal", "2^24")
    assert is_run(case, "torch", backend_class("ort-cpu"))
    assert not is_run(case, "function", backend_class("onnx-reference"))


def test_what_is_spared_has_no_wider_format_to_be_right_in() -> None:
    same = Case.of("normal", "odd")
    back = Case("normal", "back", (1, 3), (4, 3))
    gradient, weighted = LossSpec(gradient=True), LossSpec(gradient=True, weight="count")
    spared = [
        (gradient, back), (weighted, Case.of("subnormals", "odd")), (LossSpec(1e-44), same),
        *((weighted, replace(same, weighting=kind)) for kind in ("tiny", "mixed")),
        (gradient, replace(back, family="overflow")),
    ]  # fmt: skip
    met = [
        (gradient, same), (LossSpec(), back), (LossSpec(weight="count"), same),
        *((weighted, replace(same, weighting=kind)) for kind in ("usual", "signed", "huge")),
    ]  # fmt: skip
    assert all(needs_wider(spec, case, wide=False) for spec, case in spared)
    assert not any(needs_wider(spec, case, wide=False) for spec, case in met)
    pairs = (*spared, *met)
    assert [pair for pair in pairs if needs_wider(*pair, wide=True)] == [spared[-1]]
    in_float64 = [(replace(spec, dtype="float64"), case) for spec, case in pairs]
    wider = [pair for pair in in_float64 if needs_wider(*pair, wide=True)]
    assert wider == [in_float64[1], in_float64[len(spared) - 1]]
    assert needs_wider(LossSpec(dtype="float64", gradient=True, upstream=True), back, wide=True)


def test_a_sample_of_the_matrix_goes_over_the_wire() -> None:
    """A process an artefact: beta 1 and one route, or the first of what is asked for."""

    def sampled(*, extended: bool = False, **part: tuple[object, ...]) -> set[object]:
        matrix = Matrix(("triton-http",), **part)  # type: ignore[arg-type]
        return {
            (task.dtype, task.beta, route)
            for task in matrix.tasks()
            for spec in task.specs()
            for route in task.routes(spec)
            if task.samples(spec, route, backend_class("triton-http"))
            and (is_extended(spec) or not extended)
        }

    assert sampled() == {(dtype, 1.0, "inlined") for dtype in DTYPES}
    assert sampled(extended=True) == {("float32", 1.0, "inlined")}
    part = {"betas": (0.5, 2.0), "routes": ("torch", "function"), "dtypes": ("float16",)}
    assert sampled(**part) == {("float16", 0.5, "torch")}
