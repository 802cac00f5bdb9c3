"""per_sample, gradient, runtime_beta, weight: against PyTorch, at the points that matter."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from smoothl1_deploy import LossSpec, export, load
from smoothl1_deploy._floats import NUMPY_DTYPE, ieee_class, ulp_distance
from smoothl1_deploy.errors import InvalidInputError, SpecError, UnsupportedError
from smoothl1_deploy.parity._cases import Case, References, check
from smoothl1_deploy.reference._oracle import oracle, oracle_gradient

ROUTES = ("function", "inlined")
BACKENDS = ("ort-cpu", "onnx-reference")


def pair(shape_a: tuple[int, ...], shape_b: tuple[int, ...], dtype: str = "float32") -> list:
    rng = np.random.default_rng(5)
    return [
        np.asarray(rng.standard_normal(s) * 2).astype(NUMPY_DTYPE[dtype])
        for s in (shape_a, shape_b)
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_at_every_kind_of_point_is_autograd_s(backend: str) -> None:
    for beta in (0.0, 0.5, 1.0, math.inf):
        points = [0.0, -0.0, beta, -beta, 0.3, -0.3, 1e30, math.inf, -math.inf, math.nan]
        x = np.array(points, np.float32)
        tensor = torch.tensor(x, requires_grad=True)
        torch.nn.SmoothL1Loss(beta=beta, reduction="sum")(tensor, torch.zeros(len(x))).backward()
        assert tensor.grad is not None
        expected = tensor.grad.numpy()
        spec = LossSpec(beta, "sum", gradient=True)
        got = run(spec, x, np.zeros_like(x), backend=backend)["grad_input"]
        assert ieee_class(got).tolist() == ieee_class(expected).tolist()
        finite = np.isfinite(expected)
        assert ulp_distance(got[finite], expected[finite]).max() <= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_difference_that_overflows_is_no_infinite_one(backend: str) -> None:
    """Of beta = inf the slope of every finite difference is 0, of an infinite one 1, as PyTorch."""
    x, y = np.array([1.7e308, math.inf]), np.array([-1.7e308, 0.0])
    for spec in (LossSpec(math.inf, "sum", "float64"), LossSpec(1.0, "sum", "float64")):
        spec = replace(spec, gradient=True, runtime_beta=not math.isinf(spec.beta))
        beta = math.inf if spec.runtime_beta else None
        got = run(spec, x, y, backend=backend, beta=beta)["grad_input"]
        assert got.tolist() == [0.0, 1.0]


BROADCASTS = [
    ((16,), (4, 16)),
    ((3, 1, 5), (7, 5)),
    ((), (3,)),
    ((4, 16), (16,)),
    ((1, 1), (3,)),
    ((0,), (0,)),
    ((1,), (0,)),
]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_gradient_of_a_broadcast_input_has_its_shape(reduction: str) -> None:
    spec = LossSpec(reduction=reduction, dtype="float64", gradient=True)
    for a, b in BROADCASTS:
        x, y = pair(a, b, "float64")
        tensor = torch.from_numpy(x.copy()).requires_grad_()
        torch.nn.SmoothL1Loss(reduction=reduction)(tensor, torch.from_numpy(y)).sum().backward()
        assert tensor.grad is not None
        for shapes in ({}, {"shape": a, "target_shape": b}):
            got = load(export(spec, **shapes)).run(x, y)["grad_input"]
            assert got.shape == a
            np.testing.assert_allclose(got, tensor.grad.numpy(), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("route", ROUTES)
def test_per_sample_is_a_loop_over_the_rows(route: str, backend: str) -> None:
    for reduction in ("mean", "sum"):
        loss = torch.nn.SmoothL1Loss(reduction=reduction)
        runner = load(export(LossSpec(reduction=reduction, per_sample=True), route), backend)
        for shape in ((5, 7), (4, 3, 2, 2), (6,), (0, 4), (3, 0), (0, 0)):
            x, y = pair(shape, shape)
            rows = [loss(a, b).item() for a, b in zip(*map(torch.from_numpy, (x, y)), strict=True)]
            got = runner.run(x, y)["loss"]
            assert got.shape == shape[:1] and got.dtype == np.float32
            np.testing.assert_allclose(got, np.array(rows, np.float32), rtol=3e-7)


def test_per_sample_without_an_axis_of_samples() -> None:
    with pytest.raises(SpecError, match="needs an axis of samples"):
        export(LossSpec(per_sample=True), shape=())
    runner = load(export(LossSpec(per_sample=True)))
    with pytest.raises(InvalidInputError, match="no axis of samples"):
        runner.run(np.float32(1), np.float32(0))


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_one_artefact_for_every_beta(dtype: str, backend: str) -> None:
    runner = load(export(LossSpec(reduction="none", dtype=dtype, runtime_beta=True)), backend)
    for beta in (0.0, 1e-3, 0.5, 7.0, math.inf):
        case = Case.of("normal", "odd")
        refs = References.of(LossSpec(float(np.float32(beta)), "none", dtype), case)
        assert check(runner, refs).verdict.ok, beta
    x, y = refs.input, refs.target
    for beta in (-1.0, -1e-40, math.nan, -math.inf):
        assert np.isnan(runner.run(x, y, beta=beta)["loss"].astype(np.float64)).all(), beta
    with pytest.raises(InvalidInputError, match="beta is missing"):
        runner.run(x, y)
    with pytest.raises(InvalidInputError, match="beta must be one number, got 'x'"):
        runner.run(x, y, beta="x")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_a_weighted_mean_by_count_and_by_weights(dtype: str) -> None:
    x, y = pair((4, 6), (4, 6), dtype)
    for shape in ((4, 6), (6,), (4, 1), ()):
        weight = np.asarray(np.random.default_rng(1).uniform(0.5, 2, shape)).astype(dtype)
        d, wide = abs(x.astype("f8") - y.astype("f8")), weight.astype("f8")
        losses = np.where(d < 1, 0.5 * d * d, d - 0.5) * wide
        sums = {"count": losses.size, "weights": np.broadcast_to(wide, losses.shape).sum()}
        for normalizer, divisor in sums.items():
            spec = LossSpec(dtype=dtype, weight=normalizer)
            got = run(spec, x, y, weight=weight)["loss"]
            assert ulp_distance(got, np.asarray(losses.sum() / divisor).astype(dtype)) <= 2
            ones = run(spec, x, y, weight=np.ones(shape, dtype))["loss"]
            assert ones == run(LossSpec(dtype=dtype), x, y)["loss"]
    with pytest.raises(
        InvalidInputError, match="weight is missing; the artefact takes input, target, weight"
    ):
        run(spec, x, y)


def test_nonsensical_combinations_and_the_torch_route_are_refused() -> None:
    for fields, text in (
        ({"per_sample": True, "reduction": "none"}, "the reduction none reduces nothing"),
        ({"weight": "weights", "reduction": "sum"}, "is no mean"),
        ({"weight": "area"}, "unknown weight 'area'; choose one of count, weights"),
        ({"runtime_beta": True, "beta": 0.5}, "beta 0.5 would be ignored"),
        ({"gradient": 1}, "gradient must be True or False, got 1"),
        ({"upstream": True}, "without gradient there is no such output"),
        ({"gradient": True, "upstream": 1}, "upstream must be True or False, got 1"),
    ):
        with pytest.raises(SpecError, match=text):
            LossSpec(**fields)
    with pytest.raises(UnsupportedError, match="use the route function or inlined"):
        export(LossSpec(gradient=True), "torch", ("N",))


def test_specs_survive_the_metadata_and_names_differ() -> None:
    fields: list[dict] = [{name: True} for name in ("per_sample", "gradient", "runtime_beta")]
    fields += [{"weight": "count"}, {"weight": "weights"}, {"gradient": True, "upstream": True}]
    fields.append({**fields[0], **fields[1], **fields[2], **fields[4]})
    specs = [LossSpec(**each) for each in fields]
    models = [export(spec) for spec in specs]
    assert [load(model).spec for model in models] == specs
    assert len({model.graph.name for model in models}) == len(specs)


UPSTREAM = [
    ("none", False, (4, 5), (4, 5)),
    ("none", False, (5,), (4, 5)),
    ("none", False, (4, 1), (5,)),
    ("mean", False, (4, 5), (4, 5)),
    ("sum", False, (3, 1, 5), (7, 5)),
    ("mean", True, (4, 5), (4, 5)),
    ("sum", True, (4, 3, 2), (3, 2)),
    ("mean", False, (), ()),
    ("mean", True, (0, 5), (0, 5)),
    ("none", False, (3, 0), (3, 0)),
]


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
def test_an_upstream_gradient_is_autograd_s_grad_outputs(backend: str) -> None:
    for beta, (reduction, per_sample, a, b) in itertools.product((0.0, 0.5), UPSTREAM):
        x, y = pair(a, b, "float64")
        tensor = torch.from_numpy(x.copy()).requires_grad_()
        losses = torch.nn.SmoothL1Loss(reduction="none", beta=beta)(tensor, torch.from_numpy(y))
        if per_sample:
            losses = losses.flatten(1)
            losses = losses.mean(1) if reduction == "mean" else losses.sum(1)
        elif reduction != "none":
            losses = losses.mean() if reduction == "mean" else losses.sum()
        upstream = torch.randn(losses.shape, dtype=torch.float64)
        (expected,) = torch.autograd.grad(losses, tensor, upstream)
        spec = LossSpec(beta, reduction, "float64", per_sample, gradient=True, upstream=True)
        for shapes in ({}, {"shape": a, "target_shape": b}):
            runner = load(export(spec, **shapes), backend)
            got = runner.run(x, y, grad_output=upstream)["grad_input"]
            assert got.shape == a
            np.testing.assert_allclose(got, expected.numpy(), rtol=1e-13, atol=1e-15)


def test_an_upstream_gradient_at_every_kind_of_point() -> None:
    for beta in (0.0, 0.5):
        points = np.array([0.0, -0.0, beta, -beta, 0.3, -2.0, math.inf, -math.inf, math.nan])
        x, upstream = (v.reshape(-1).astype(np.float32) for v in np.meshgrid(points, points))
        tensor = torch.tensor(x, requires_grad=True)
        loss = torch.nn.SmoothL1Loss(beta=beta, reduction="none")(tensor, torch.zeros(len(x)))
        (expected,) = torch.autograd.grad(loss, tensor, torch.tensor(upstream))
        spec = LossSpec(beta, "none", gradient=True, upstream=True)
        got = run(spec, x, np.zeros_like(x), grad_output=upstream)["grad_input"]
        nan = np.isnan(expected.numpy()) | np.isnan(x)
        np.testing.assert_allclose(got[~nan], expected.numpy()[~nan], rtol=1e-6)
        assert (np.isnan(got) == np.isnan(expected.numpy())).all()


def test_upstream_refusals() -> None:
    spec = LossSpec(per_sample=True, gradient=True, upstream=True)
    x, y = pair((4, 5), (4, 5))
    with pytest.raises(InvalidInputError, match=r"has the shape \(5,\), and the loss \(4,\)"):
        run(spec, x, y, grad_output=np.ones(5, np.float32))
    with pytest.raises(InvalidInputError, match="grad_output is missing"):
        run(spec, x, y)
    with pytest.raises(InvalidInputError, match="and no grad_output; leave it out"):
        run(LossSpec(gradient=True), x, y, grad_output=np.float32(1))


def run(spec: LossSpec, *arrays: np.ndarray, backend: str = "ort-cpu", **others: object) -> dict:
    """What the bare graph of any rank gives for these arrays."""
    return load(export(spec), backend).run(*arrays, **others)


def test_a_float64_gradient_over_many_rows_is_no_linear_sum() -> None:
    """It was 77,216 ULP off at a million rows; PyTorch is 3."""
    spec = LossSpec(0.5, "sum", "float64", gradient=True)
    x, y = pair((1, 16), (30000, 16), "float64")
    for shapes in ({}, {"shape": (1, 16), "target_shape": ("N", 16)}):
        got = load(export(spec, **shapes)).run(x, y)["grad_input"]
        assert ulp_distance(got, oracle_gradient(spec, x, y)).max() <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_slopes_that_cancel_leave_nothing(backend: str) -> None:
    """Divided first they left 2.8e-17 of 1 + 2 - 3."""
    y = np.array([[1.0], [2.0], [-3.0]], np.float32)
    for shapes in ({}, {"shape": (1, 1), "target_shape": ("N", 1)}):
        model = export(LossSpec(10.0, "sum", gradient=True), **shapes)
        assert load(model, backend).run(np.zeros((1, 1), "f4"), y)["grad_input"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_of_nothing_by_a_beta_that_is_none_is_nan(backend: str) -> None:
    for dtype in ("float32", "float64"):
        for per_sample, shape in ((False, (0, 3)), (True, (2, 0))):
            spec = LossSpec(reduction="sum", runtime_beta=True, dtype=dtype, per_sample=per_sample)
            nothing = np.zeros(shape, dtype)
            for beta, expected in ((-1.0, math.nan), (math.nan, math.nan), (0.5, 0.0)):
                got = run(spec, nothing, nothing, backend=backend, beta=beta)["loss"]
                np.testing.assert_array_equal(got, np.full(got.shape, expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_sum_is_negative_zero(dtype: str, backend: str) -> None:
    """A sum starts at 0 in PyTorch; runtimes start at the first term, here -0."""
    zeros, minus = np.zeros((4, 3), dtype), -np.ones((4, 3), dtype)
    for weight in (minus, -zeros):
        for reduction in ("sum", "mean"):
            spec = LossSpec(1.0, reduction, dtype, weight="count")
            assert not np.signbit(run(spec, zeros, zeros, backend=backend, weight=weight)["loss"])
    summed = LossSpec(1.0, "sum", dtype, gradient=True)
    got = run(summed, -zeros[:1], zeros, backend=backend)["grad_input"]
    assert not np.signbit(got).any()
    lacking = run(summed, -zeros[0], zeros[:1], backend=backend)["grad_input"]
    assert not np.signbit(lacking).any()  # a sum over one row is a sum
    assert np.signbit(run(summed, -zeros, zeros, backend=backend)["grad_input"]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weighted_slopes_that_cancel_leave_nothing(backend: str) -> None:
    """Divided before they were added up, they left -5e-56, which is -0 in float16."""
    x, y = np.zeros((1, 3), np.float16), np.float16([[1, 3, 5]] * 2) * np.float16([[1], [-3]])
    weight = np.float16([[3], [1]])
    for beta in (20.0, 1e3, 3e38):
        for reduction in ("mean", "sum"):
            spec = LossSpec(beta, reduction, "float16", weight="count", gradient=True)
            got = run(spec, x, y, backend=backend, weight=weight)["grad_input"]
            assert got.tolist() == [[0, 0, 0]] and not np.signbit(got).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_any_size_have_a_mean(backend: str) -> None:
    """In float32 the products overflowed at 3e38 and lost 12 % at 1e-38; in float64 at 1e308."""
    for dtype, *sizes in (("float32", 3e38, 1e-38), ("float64", 1.7e308, 1e-300)):
        x, y = np.full((1, 2), 3, dtype), np.zeros((1, 2), dtype)
        for size, per_sample in itertools.product(sizes, (False, True)):
            spec = LossSpec(1.0, "mean", dtype, weight="weights", per_sample=per_sample)
            weight = np.full((1, 2), size, dtype)
            assert run(spec, x, y, backend=backend, weight=weight)["loss"] == 2.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_sums_are_compensated_up_to_the_largest(backend: str) -> None:
    """The split itself overflowed above 5e291, and the sum was a naive one."""
    spec = LossSpec(0.0, "sum", "float64")
    for size in (1e-300, 1.0, 1e300):
        x = np.abs(pair((20000,), (1,), "float64")[0]) * size
        loss = run(spec, x, np.zeros_like(x), backend=backend)["loss"]
        assert ulp_distance(loss, oracle(spec, x, np.zeros_like(x))) <= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_upstream_gradient_of_negative_zero_keeps_its_sign(backend: str) -> None:
    """ONNX Runtime's Where loses it in its first branch."""
    spec = LossSpec(1.0, "sum", gradient=True, upstream=True)
    x, y = np.full((2, 3), 2, np.float32), np.zeros((2, 3), np.float32)
    got = run(spec, x, y, backend=backend, grad_output=np.float32(-0.0).reshape(()))
    assert np.signbit(got["grad_input"]).all()
