"""Huber losses, L1 by its name, and a constant factor: how they are of one kind with Smooth L1."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from agreement import difference, pair

from smoothl1_deploy import LossSpec, attach, build_engine, export, load, verify
from smoothl1_deploy._floats import NUMPY_DTYPE, ulp_distance
from smoothl1_deploy._spec import DTYPES, REDUCTIONS
from smoothl1_deploy.errors import UnsupportedError
from smoothl1_deploy.parity._cases import LAYOUTS, Case, References, check
from smoothl1_deploy.reference._module import eager_outputs
from smoothl1_deploy.reference._oracle import oracle
from smoothl1_deploy.scoring import make_job
from smoothl1_deploy.scoring._scorer import Scorer
from smoothl1_deploy.serving._graph import serve

ROUTES = ("function", "inlined")
HUBER = LossSpec(loss="huber", delta=0.5)


def run(spec: LossSpec, x: Any, y: Any, route: str = "function", **given: Any) -> dict[str, Any]:
    return load(export(spec, route)).run(x, y, **given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
def test_huber_is_delta_times_smooth_l1(route: str, dtype: str) -> None:
    """Within a rounding; a gradient in every bit, of a power of two, but where it is subnormal."""
    for delta, reduction in ((0.25, "none"), (2.0, "none"), (0.5, "mean"), (4.0, "sum")):
        smooth = LossSpec(delta, reduction, dtype, gradient=True)
        huber = LossSpec(1.0, reduction, dtype, gradient=True, loss="huber", delta=delta)
        x, y = pair(smooth, (40, 30))
        ours, theirs = run(huber, x, y, route), run(smooth, x, y, route)
        for name in ("loss", "grad_input"):
            scaled = theirs[name] * NUMPY_DTYPE[dtype].type(delta)
            assert ulp_distance(ours[name], scaled).max() <= (name == "loss" or dtype == "float16")


@pytest.mark.parametrize("dtype", DTYPES)
def test_huber_at_its_limits(dtype: str) -> None:
    """Of a delta of inf it is half the square, of a tiny one delta times the distance."""
    numbers = [0.0, 1e-3, -2.0, 30.0, -100.0]
    x = np.array(numbers).astype(NUMPY_DTYPE[dtype])
    y = np.zeros_like(x)
    wide = x.astype(np.float64)
    for delta, exact in ((math.inf, wide * wide / 2), (2.0**-14, abs(wide) * 2.0**-14)):
        spec = LossSpec(reduction="none", dtype=dtype, loss="huber", delta=delta, gradient=True)
        got = run(spec, x, y)
        np.testing.assert_allclose(
            got["loss"].astype(float)[2:], exact[2:], rtol=2.0**-7 if len(dtype) > 7 else 1e-4
        )
        slopes = x if math.isinf(delta) else np.clip(wide, -delta, delta).astype(x.dtype)
        assert (got["grad_input"] == slopes).all()
    infinite = np.array([math.inf, -math.inf]).astype(x.dtype)
    spec = LossSpec(reduction="none", dtype=dtype, loss="huber", gradient=True)
    got = run(spec, infinite, np.zeros_like(infinite))
    assert got["loss"].tolist() == [math.inf, math.inf]
    assert got["grad_input"].tolist() == [1.0, -1.0]


@pytest.mark.parametrize("backend", ["ort-cpu", "onnx-reference"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_delta_at_run_time_is_above_0_or_all_is_nan(dtype: str, backend: str) -> None:
    """As PyTorch refuses 0; the sum of nothing too, which has no element to know it by."""
    spec = LossSpec(reduction="sum", dtype=dtype, loss="huber", runtime_beta=True, gradient=True)
    runner = load(export(spec), backend)
    x = np.array([[0.3, -4.0, 0.0]]).astype(dtype)
    for delta in (0.0, -1.0, -math.inf, math.nan):
        for a in (x, x[:0]):
            got = runner.run(a, np.zeros_like(a), beta=delta)
            fed = np.asarray(delta, np.float32)
            expected = eager_outputs(spec, a, np.zeros_like(a), beta=fed)
            for name, array in got.items():
                assert np.isnan(array).all() and np.isnan(expected[name]).all()
                assert array.shape == expected[name].shape
    for delta in (1e-30, 0.5, 1.0, 1e30, math.inf):
        known = spec.at(float(np.float32(delta)))
        got, expected = runner.run(x, 0 * x, beta=delta), load(export(known)).run(x, 0 * x)
        assert all((got[name] == expected[name]).all() for name in got)


@pytest.mark.parametrize("route", ROUTES)
def test_l1_by_name_is_the_same_file(route: str) -> None:
    by_name = export(LossSpec(loss="l1"), route)
    assert by_name.SerializeToString() == export(LossSpec(beta=0), route).SerializeToString()
    module = torch.nn.L1Loss()
    x, y = pair(LossSpec(0), (9, 5))
    expected = module(torch.from_numpy(x), torch.from_numpy(y)).numpy()
    assert ulp_distance(run(LossSpec.from_module(module), x, y, route)["loss"], expected) <= 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_factor_of_a_power_of_two_changes_no_bit_but_the_exponent(reduction: str) -> None:
    for plain in (LossSpec(0.3, reduction, gradient=True), replace(HUBER, reduction=reduction)):
        x, y = pair(plain, (40, 30))
        for factor in (4.0, -0.5):
            ours, theirs = run(replace(plain, loss_weight=factor), x, y), run(plain, x, y)
            for name, array in ours.items():
                assert array.tobytes() == (theirs[name] * np.float32(factor)).tobytes()


def test_the_factor_is_multiplied_before_the_one_rounding() -> None:
    """Of a sum, and of a product with a weight, that no float16 or float32 is, a tenth that is."""
    spec = LossSpec(reduction="sum", dtype="float16", loss_weight=0.1)
    x = np.full(300, 1000, np.float16)
    assert run(spec, x, np.zeros_like(x))["loss"] == np.float16(300 * 999.5 * np.float32(0.1))
    spec = LossSpec(0.0, "none", weight="count", loss_weight=0.1)
    x, w = np.full(3, 2, np.float32), np.full(3, 3e38, np.float32)
    got = run(spec, x, 0 * x, weight=w)["loss"]
    assert (got == np.float32(6e38 * float(np.float32(0.1)) * (float(w[0]) / 3e38))).all()


def test_nan_is_in_the_gradient_where_clip_swallows_it() -> None:
    """The kernels of TensorRT may (NVIDIA/TensorRT#4758), as the evaluator of its networks does."""
    pytest.importorskip("tensorrt_rtx")
    spec = replace(HUBER, reduction="none", gradient=True)
    x = np.array([math.nan, 3, -0.1], np.float32)
    found = load(export(spec, shape=("N",)), "trt-network").run(x, 0 * x)
    assert np.isnan([found["loss"][0], found["grad_input"][0]]).all()
    assert found["grad_input"][1:].tolist() == [0.5, np.float32(-0.1)]


def test_an_engine_is_built_of_each() -> None:
    pytest.importorskip("tensorrt_rtx")
    for spec in (replace(HUBER, gradient=True), LossSpec(loss_weight=0.3, weight="count")):
        engine = build_engine(export(spec, "inlined", ("N", 16)))
        assert engine.sidecar.to_dict()["spec"] == spec.to_dict()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_torch_route_exports_huber_as_it_is(dtype: str) -> None:
    spec = LossSpec(dtype=dtype, loss="huber", delta=0.3)
    model = export(spec, "torch", ("N", 16))
    x, y = pair(spec, (8, 16))
    reason = difference(
        load(model).run(x, y)["loss"], oracle(spec, x, y), eager_outputs(spec, x, y)["loss"]
    )
    assert not reason
    assert verify(export(spec, "torch", ("N", 16)), drift=False)
    with pytest.raises(
        UnsupportedError, match="knows nothing of a spec's extensions; use the route"
    ):
        export(replace(spec, loss_weight=2.0), "torch", ("N", 16))


def test_an_attached_a_served_and_a_scored_huber_loss_are_right() -> None:
    """With a factor, by every way that makes its own nodes of the assembly."""
    spec = replace(HUBER, per_sample=True, loss_weight=0.3)
    x, y = pair(spec, (6, 4))
    exact = oracle(spec, x, y)
    float32 = onnx.TensorProto.FLOAT
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])],
        "same",
        [value("x", float32, ["N", 4])],
        [value("y", float32, ["N", 4])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model.ir_version = 10
    attached = attach(model, "y", "t", spec)
    assert ulp_distance(load(attached).run(x=x, t=y)["loss"], exact).max() <= 1
    assert verify(attached, drift=False)
    served = load(serve(export(spec, shape=("N", 4))).model)
    assert ulp_distance(served.run(x, y)["loss"], exact).max() <= 1
    for asked in (spec, replace(spec, per_sample=False), replace(HUBER, reduction="sum")):
        partial, _ = Scorer(make_job(asked)).score({"input": x, "target": y})
        got = partial.mean if asked.reduction == "mean" else partial.sum
        whole = oracle(
            replace(asked, per_sample=False, dtype="float64"), x.astype(float), y.astype(float)
        )
        assert got == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.parametrize("layout", ["broadcast-row", "broadcast-both", "weight-row", "4-d"])
def test_a_huber_gradient_is_right_in_every_layout(layout: str) -> None:
    for dtype in ("float32", "float64"):
        spec = LossSpec(
            dtype=dtype, loss="huber", delta=0.7, gradient=True, loss_weight=1.7,
            weight="weights" if LAYOUTS[layout].weight is not None else None,
        )  # fmt: skip
        result = check(
            load(export(spec)), References.of(spec, Case.of("normal", layout)), "float64"
        )
        assert result.verdict.ok, (dtype, result)
