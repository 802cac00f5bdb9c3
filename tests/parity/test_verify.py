"""`verify`: green on what we export, red on what drifts, clear about what it can't judge."""

from __future__ import annotations

import json
import math
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import child
import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest
from planted import plant
from rich.console import Console
from theirs import their_loss

from smoothl1_deploy import LossSpec, export, verify
from smoothl1_deploy._artefact import select_ports, signature
from smoothl1_deploy._floats import Array
from smoothl1_deploy._table import Table
from smoothl1_deploy.backends._base import load
from smoothl1_deploy.errors import ArtefactError, ModelWarning
from smoothl1_deploy.ops import is_built as library_is_built
from smoothl1_deploy.parity import _cases as cases
from smoothl1_deploy.parity import _drift as drift_module
from smoothl1_deploy.parity._bounds import bound
from smoothl1_deploy.parity._contract import plain_export as export_plainly
from smoothl1_deploy.parity._drift import DATA, SIZES, artefact_drift
from smoothl1_deploy.parity._faults import Fault
from smoothl1_deploy.parity.views import _tables as tables

Axes = tuple[int | str, ...]


def shown(table: Table) -> str:
    console = Console(file=StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.fixture
def few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drift of a thousand elements, where its growth is not what is asked."""
    monkeypatch.setattr(drift_module, "SIZES", (1 << 10,))


def test_our_artefacts_are_green_in_every_shape() -> None:
    shapes: tuple[Axes | None, ...] = (None, ("N", 16), ("N", "M"), (), (4,), (0, 3))
    for shape, route in product(shapes, ("function", "inlined")):
        result = verify(export(LossSpec(0.5), route, shape), drift=shape == ("N", 16))
        assert result, (shape, route, result.failures)
        assert result.spec == LossSpec(0.5)
        assert len(tables.verification(result).rows) == len(result.results)
        assert result.to_dict()["ok"] is True and result.diagnoses == ()
        if shape == ("N", 16):
            assert {case.case.layout for case in result.results} == {"64,16", "N=0"}
            sizes = [point.elements for point in result.drift]
            assert sizes == [n for n in SIZES for _ in DATA]


def test_the_extensions_are_green(few_sizes: None) -> None:
    for spec in (
        LossSpec(0.5, per_sample=True),
        LossSpec(0.5, "none", gradient=True),
        LossSpec(0.5, "sum", gradient=True, per_sample=True),
        LossSpec(runtime_beta=True),
        LossSpec(0.5, weight="count"),
        LossSpec(0.5, weight="weights", dtype="float16"),
        LossSpec(0.5, gradient=True, upstream=True),
        LossSpec(0.5, "sum", per_sample=True, gradient=True, upstream=True, weight="count"),
    ):
        result = verify(export(spec, shape=("N", 5)))
        assert result, (spec, result.failures)
        assert bool(result.drift) is not (spec.per_sample or spec.reduction == "none")
        assert {point.output for point in result.drift} <= {*spec.outputs}
        assert tables.verification(result).rows
        assert len(tables.artefact_drift(result.drift).rows) == len(result.drift)


def test_a_spec_that_is_not_the_model_s_is_red_and_a_path_will_do(tmp_path: Path) -> None:
    path = tmp_path / "loss.onnx"
    onnx.save(export(LossSpec(0.5, "sum", "float16"), shape=("N", 8)), path)
    assert verify(path, drift=False)
    result = verify(path, spec=LossSpec(0.6, "sum", "float16"), drift=False)
    assert not result
    assert any("ULP >" in failure.verdict.detail for failure in result.failures)


@pytest.fixture(scope="module")
def plain_export() -> onnx.ModelProto:
    """What torch.onnx.export makes of the loss without this package."""
    return export_plainly({}, "float32", ("N", 16))


def test_the_plain_exporter_s_drift_and_its_empty_mean_are_found(
    plain_export: onnx.ModelProto,
) -> None:
    """The sum of 2^20 equal float32 drifts, and of an empty batch it gives 0.0."""
    result = verify(plain_export, spec=LossSpec())
    failed = {(f.case.family, f.case.layout) for f in result.failures}
    assert {("constant", "65536,16"), ("normal", "N=0")} <= failed
    faults = [item.fault for item in result.diagnoses]
    assert faults == [Fault.FLOAT32_ACCUMULATION, Fault.EMPTY_MEAN]

    curve = {p.elements: p for p in result.drift if p.family == "constant"}
    assert list(curve) == [1 << power for power in (10, 14, 16, 18, 20, 22)]
    errors = [point.relative or 0.0 for point in curve.values()]
    assert errors == sorted(errors) and errors[-1] > 1e-3
    assert all((point.torch_relative or 0.0) < 1e-6 for point in curve.values())
    assert set(result.to_dict()) == {
        "ok", "name", "sha256", "changed", "spec", "backend", "seed", "cases", "drift",
        "diagnoses", "environment", "date",
    }  # fmt: skip
    last = result.to_dict()["drift"][-2]
    assert last["elements"] == 1 << 22 and last["case"]["family"] == "constant"
    assert last["case"]["ulp"] > 10_000 > last["case"]["allowed"] and last["ok"] is False
    assert last["bound_ulp"] == bound(LossSpec(), 1 << 22)
    assert 1e-3 < abs(last["value"] / last["oracle"] - 1) < 1e-2
    table = shown(tables.artefact_drift(result.drift))
    assert "4,194,304" in table and "bound" in table and f"{errors[-1]:.1e}" in table


def test_float32_sums_of_the_plain_exporter_s_float16_are_named() -> None:
    """Three ULP of float16 too many, at the largest size alone."""
    result = verify(export_plainly({}, "float16", ("N", 16)), spec=LossSpec(dtype="float16"))
    summed, empty = result.diagnoses
    assert (summed.fault, empty.fault) == (Fault.FLOAT32_ACCUMULATION, Fault.EMPTY_MEAN)
    assert "which adding up in float32 explains; accumulate in float64" in summed.explanation


def test_2_to_24_elements_stay_below_2_gigabytes(
    plain_export: onnx.ModelProto, tmp_path: Path
) -> None:
    path = tmp_path / "plain.onnx"
    onnx.save(plain_export, path)
    program = (
        "from smoothl1_deploy import LossSpec, verify\n"
        f"v = verify({str(path)!r}, spec=LossSpec(), large=True)\n"
        "print(v.drift[-2].elements, v.drift[-2].relative)\n"
        # Not ru_maxrss: a process begins with that of the one that started it.
        "status = open('/proc/self/status').read().split()\n"
        "print(1024 * int(status[status.index('VmHWM:') + 1]))"
    )
    done = child.run("-c", program, check=True)
    elements, error, memory = done.stdout.split()
    assert int(elements) == 1 << 24 and float(error) > 1e-2
    assert int(memory) < 2e9


def test_the_drift_of_a_loss_of_another_rank_is_judged_by_its_numbers() -> None:
    more = "dims = Constant<value_ints=[1]>() loss = Reshape(out, dims)"
    model = theirs(outputs="float[1] loss", more=more)
    found = verify(model, spec=LossSpec())
    assert not any(result.verdict.ok for result in found.results)
    assert found.drift and all(point.ok for point in found.drift)


def test_drift_is_empty_where_nothing_adds_up() -> None:
    assert verify(export(LossSpec(reduction="none"), shape=("N",))).drift == ()
    assert verify(export(LossSpec(), shape=(4,))).drift == ()


def test_the_seed_decides_the_inputs() -> None:
    model = export(LossSpec(0.3, "none"), shape=("N",))
    one, two = verify(model, seed=1), verify(model, seed=2)
    assert one and two
    assert np.any([a.shares != b.shares for a, b in zip(one.results, two.results, strict=True)])


def test_a_right_artefact_of_few_elements_is_green() -> None:
    """PyTorch happened to hit the nearest number, and the rule of its own distance + 1 was red."""
    for shape, seed in (((1,), 82), ((3,), 83)):
        assert verify(export(LossSpec(293.3461099414553, "none"), shape=shape), seed=seed)


# Models of other origin


def theirs(inputs: str = "float[rows, cols] y_hat, float[n, 3] y", **given: Any) -> onnx.ModelProto:
    """Anyone's mean for beta 1."""
    return their_loss(inputs=inputs, **{"of": ("y_hat", "y"), **given})


def test_any_names_and_all_sorts_of_shapes_will_do() -> None:
    result = verify(theirs(), spec=LossSpec())
    assert result, result.failures
    for shape in ("input_shape", "target_shape"):
        assert {getattr(r.case, shape) for r in result.results} == {(64, 3), (0, 3)}
    for inputs in (
        "float[s0, s1, s2, s3] y_hat, float[s0, s1, s2, s3] y",
        "float[?, 3] y_hat, float[?, 3] y",
        "float[batch, 1] y_hat, float[1, cols] y",
        "float[batch, 5, 7] y_hat, float[time, features] y",
        "float[3, 4] y_hat, float[4] y",
        "float[N, 80, 80, 80] y_hat, float[N, 80, 80, 80] y",
    ):
        result = verify(theirs(inputs), spec=LossSpec(), drift=False)
        assert result, (inputs, result.failures[0].verdict.detail)


def test_the_inputs_are_taken_by_name() -> None:
    two = theirs("float[N, 4] gt, float[N, 4] boxes", of=("boxes", "gt"))
    for names in ({}, {"input_name": "boxes"}, {"target_name": "gt"}):
        assert signature(select_ports(two, **names)).input.name == "boxes"
    assert signature(select_ports(two, "boxes", "gt")).input.name == "boxes"
    assert signature(select_ports(two, "gt", "boxes")).input.name == "gt"
    assert two.graph.input[0].name == "gt"  # the caller's model is as it was
    assert verify(two, spec=LossSpec(), target_name="gt", drift=False)
    for first in ("target", "Labels", "y_true"):
        model = theirs(f"float[N] {first}, float[N] x", of=("x", first))
        assert signature(select_ports(model)).target.name == first


def test_one_of_several_outputs_is_taken_by_name_or_for_being_called_loss() -> None:
    model = theirs(outputs="int64 number, float out, float[rows, cols] each")
    assert verify(model, spec=LossSpec(), output_name="out", drift=False)
    assert verify(model, spec=LossSpec(reduction="none"), output_name="each", drift=False)
    model = theirs(outputs="int64 number, float loss", more="loss = Identity(out)")
    assert verify(model, spec=LossSpec(), drift=False)
    outputs = load(model).run(np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32))
    assert list(outputs) == ["loss"]


def test_what_can_t_be_compared_is_refused() -> None:
    three = "float[N, 4] gt, float[N, 4] boxes, float[N, 4] weights"
    weighted = theirs(three, of=("boxes", "gt"))
    many = theirs(outputs="int64 number, float out, float[rows, cols] each")
    mixed = theirs("float[N] y_hat, double[N] y")
    float64, weighs = LossSpec(dtype="float64"), LossSpec(weight="count")
    refused: list[tuple[onnx.ModelProto, dict[str, Any], str]] = [
        (
            theirs(),
            {"spec": None},
            r"does not say what it computes.*say it by a spec: beta, reduction",
        ),
        (weighted, {}, r"3 inputs \('gt', 'boxes', 'weights'\).*input_name, target_name"),
        (weighted, {"input_name": "boxes"}, r"besides 'boxes' the model has 2 inputs"),
        (weighted, {"input_name": "boxes", "target_name": "gt"}, "takes 'weights', which nothing"),
        (many, {}, r"3 outputs \('number', 'out', 'each'\).*output_name"),
        (many, {"output_name": "number"}, "'number' has the element type INT64"),
        (theirs(), {"input_name": "x"}, "'x' is no input of the model; it has 'y_hat', 'y'"),
        (theirs(), {"target_name": "x"}, "target_name 'x' is no input of the model"),
        (theirs(), {"output_name": "x"}, "'x' is no output of the model; it has 'out'"),
        (theirs(), {"input_name": "y", "target_name": "y"}, "are both 'y'; give two inputs"),
        (mixed, {}, "'y_hat' as float32 and 'y' as float64"),
        (theirs(), {"spec": float64}, "takes float32, the spec says float64"),
        (theirs(), {"spec": weighs}, "takes input, target, the spec input, target, weight"),
        (
            theirs(),
            {"spec": LossSpec(gradient=True)},
            "an output grad_input, and the model none of that name",
        ),
    ]
    for model, options, message in refused:
        with pytest.raises(ArtefactError, match=message):
            verify(model, **{"spec": LossSpec(), **options})


# What something else has changed since it was exported


def test_our_own_artefact_is_taken_by_its_names() -> None:
    model = export(LossSpec(0.5, gradient=True), shape=("N",))
    assert select_ports(model) is model
    assert select_ports(model, "input", "target", "loss") is model
    with pytest.raises(ArtefactError, match="exported by smoothl1-deploy, and its inputs"):
        select_ports(model, output_name="grad_input")
    changed = export(LossSpec(0.5), "inlined", shape=("N",))
    changed.graph.output.append(changed.graph.input[0])
    chosen = select_ports(changed, output_name="loss")
    assert [value.name for value in chosen.graph.output] == ["loss"]


def test_a_changed_artefact_is_held_against_the_spec_in_its_metadata() -> None:
    model = export(LossSpec(0.5), "inlined", shape=("N",))
    assert not verify(model, drift=False).changed
    model.graph.name = "optimised"
    with pytest.warns(ModelWarning, match="changed by something else after"):
        found = verify(model, drift=False)
    assert found and found.changed and found.to_dict()["changed"] is True
    assert found.spec == LossSpec(0.5)
    half = next(node for node in model.graph.node if node.op_type == "Abs")
    half.op_type = "Neg"
    with pytest.warns(ModelWarning):
        assert not verify(model, drift=False)


def test_a_wrong_body_is_red_though_an_operator_of_ours_takes_its_place() -> None:
    """`ort-cpu` runs the operator, and everyone else the body: in the cases and in the drift."""
    model = export(LossSpec(0.5), shape=("N",))
    ones = np.ones(4, np.float32)
    for function in model.functions:
        for node in function.node:
            if node.op_type == "Abs":
                node.op_type = "Neg"
    with pytest.warns(ModelWarning):
        if library_is_built():
            assert load(model).run(3 * ones, ones)["loss"] == 1.75
        found = verify(model)
    assert not all(result.verdict.ok for result in found.results)
    assert not all(point.ok for point in found.drift)


def test_a_changed_artefact_is_held_to_no_bound_that_is_proved_of_exported_ones(
    few_sizes: None,
) -> None:
    model = export(LossSpec(0.5), shape=("N",))
    assert all(point.result.verdict.bound is not None for point in verify(model).drift)
    model.doc_string = "optimised"
    with pytest.warns(ModelWarning):
        assert all(point.result.verdict.bound is None for point in verify(model).drift)


# The shapes of weights, and gradients that are summed back


def test_weights_are_drawn_in_the_shape_that_the_artefact_declares(few_sizes: None) -> None:
    for shapes in (
        {"weight_shape": ("N", 1)},
        {"weight_shape": (16,)},
        {"weight_shape": (1,)},
        {"weight_shape": ()},
        {"weight_shape": ("K", "N", 16)},
        {"target_shape": (16,)},
        {"shape": (1, 16), "target_shape": ("N", 16), "weight_shape": ("rows", 1)},
    ):
        axes: dict[str, Any] = {"shape": ("N", 16), **shapes}
        model = export(LossSpec(0.5, weight="count"), **axes)
        result = verify(model)
        assert result, (axes, result.failures)
        declared = axes.get("weight_shape", axes["shape"])
        assert {len(f.case.weight_shape or ()) for f in result.results} == {len(declared)}
        # What is red is diagnosed with weights of that shape as well.
        wrong = verify(model, spec=LossSpec(0.75, weight="count"), drift=False)
        assert [item.fault for item in wrong.diagnoses] == [Fault.WRONG_BETA], axes


def test_any_rank_meets_weights_of_every_shape_and_no_case_without_rows() -> None:
    result = verify(export(LossSpec(0.5, weight="weights")), drift=False)
    assert result, result.failures
    shapes = {case.case.weight_shape for case in result.results}
    assert shapes >= {(64, 1), (16,), (1,), (), (3, 64, 16)}
    result = verify(export(LossSpec(0.5, per_sample=True)))
    assert result and all(case.case.input_shape for case in result.results)


def test_no_artefact_is_blamed_for_what_only_a_wider_format_holds() -> None:
    """Weighted float64 slopes that cancel in a sum: the matrix spares them too."""
    spec = LossSpec(0.3, dtype="float64", per_sample=True, weight="count", gradient=True)
    result = verify(export(spec), drift=False)
    assert result and len(result.results) > 10, result.failures


@pytest.mark.parametrize("shape", [None, (1, 16)], ids=["any rank", "one row"])
def test_a_gradient_that_is_summed_back_is_measured_at_every_size(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...] | None
) -> None:
    """Thousands of ULP off in 2^18 rows, and right in the 64 that the families are fed."""
    monkeypatch.setattr(drift_module, "SIZES", (1 << 10, 1 << 18))
    spec = LossSpec(0.5, "none", gradient=True)
    target = ("N", 16) if shape else None
    runner = load(export(spec, shape=shape, target_shape=target))
    points = artefact_drift(runner, spec, accumulator="float64")
    assert all(point.ok for point in points)
    assert {(point.output, point.bound) for point in points} == {("grad_input", None)}
    assert {point.result.case.input_shape for point in points} == {(1, 16)}
    honest = runner.run

    def linear(input: Array, target: Array, **given: object) -> dict[str, Array]:
        slopes = np.clip(input - target, -0.5, 0.5) / np.float32(0.5)
        total = np.add.accumulate(slopes, dtype=np.float32)[-1:]
        return {**honest(input, target, **given), "grad_input": total}

    runner.run = linear  # type: ignore[method-assign,assignment]
    points = artefact_drift(runner, spec, accumulator="float64")
    red = {point.elements for point in points if not point.ok}
    assert 1 << 18 in red
    assert json.dumps([point.to_dict() for point in points], allow_nan=False)
    assert "grad_input" in shown(tables.artefact_drift(points))


def test_our_own_drift_is_held_to_the_proved_bound(
    few_sizes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ULP are always allowed to anyone; of our own graphs a narrower bound may be proved."""

    def two_off(spec: LossSpec, input: Array, right: dict[str, Array]) -> dict[str, Array]:
        return {"loss": np.nextafter(np.nextafter(right["loss"], np.float32(9)), np.float32(9))}

    runner = load(export(LossSpec(), shape=("N", 16)))
    assert all(point.ok for point in artefact_drift(runner, LossSpec(), accumulator="float64"))
    plant(runner, two_off)
    monkeypatch.setattr(cases, "proved_bound", lambda *given: 1)
    for accumulator in (None, "float64"):
        points = artefact_drift(runner, LossSpec(), accumulator=accumulator)
        assert [point.ok for point in points] == [accumulator is None] * 2
        assert {p.result.verdict.bound for p in points} == {1 if accumulator else None}


def test_a_bound_that_bounds_nothing_is_strict_json_too(
    few_sizes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift_module, "bound", lambda *given: math.inf)
    runner = load(export(LossSpec(), shape=("N", 16)))
    points = artefact_drift(runner, LossSpec(), accumulator="float32")
    assert all(point.ok and point.to_dict()["bound_ulp"] == "inf" for point in points)
    json.dumps([point.to_dict() for point in points], allow_nan=False)
    assert "inf" not in shown(tables.artefact_drift(points))
