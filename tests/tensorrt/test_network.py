"""The loss through TensorRT's parser, evaluated on the CPU, against the oracle and PyTorch."""

from __future__ import annotations

import functools
import itertools
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

pytest.importorskip("tensorrt_rtx")

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy.backends.base import get_backend, load
from smoothl1_deploy.backends.trt_network import TrtNetworkBackend
from smoothl1_deploy.errors import (
    InvalidInputError,
    MissingDependencyError,
    SpecError,
    UnsupportedError,
)
from smoothl1_deploy.floats import NUMPY_DTYPE, ieee_class, ulp_distance
from smoothl1_deploy.reference.module import eager
from smoothl1_deploy.reference.oracle import oracle
from smoothl1_deploy.tensorrt.flavour import get_flavour
from smoothl1_deploy.tensorrt.network import evaluate, plan
from smoothl1_deploy.tensorrt.parse import parse

DTYPES = ("float32", "float16", "bfloat16")
REDUCTIONS = ("none", "mean", "sum")
BETAS = (0.0, 1e-3, 0.1, 1.0, 10.0, 1e4, math.inf)
ROUTES = ("function", "inlined")
# An export by the torch route takes about a second: one for each beta, dtype and reduction.
TORCH_ROUTE = [
    (0.0, "none", "float16"),
    (1e-3, "sum", "float32"),
    (0.1, "mean", "bfloat16"),
    (1.0, "mean", "float32"),
    (10.0, "none", "bfloat16"),
    (1e4, "sum", "float16"),
    (math.inf, "mean", "float32"),
]
HALF_MEAN = LossSpec(0.5, "mean")
SPECIALS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1e-7, -3e4)


@functools.cache
def runner(spec, route="function", shape=("N", 16), target_shape=None, drops_nan=True):
    model = export(spec, route=route, shape=shape, target_shape=target_shape)
    return TrtNetworkBackend("tensorrt_rtx", clip_drops_nan=drops_nan).load(model)


@functools.cache
def parsed_network(spec=HALF_MEAN, route="inlined"):
    return parse(export(spec, route=route, shape=("N", 16)), get_flavour("tensorrt_rtx"))


def random_pair(spec, shape=(24, 16), target_shape=None, seed=0):
    """Differences on both sides of beta, and some equal to it."""
    rng = np.random.default_rng(seed)
    beta = spec.beta if 0 < spec.beta < 1e4 else 1.0
    target = np.asarray(rng.normal(size=shape if target_shape is None else target_shape))
    scale = rng.choice([0.01, 1.0, 30.0], size=shape) * beta
    input = np.asarray(rng.normal(size=shape) * scale)  # at rank 0 numpy gives a scalar
    if target_shape is None and target.size:
        input.reshape(-1)[::7] = (target.reshape(-1) + beta)[::7]
    dtype = NUMPY_DTYPE[spec.dtype]
    return input.astype(dtype), target.astype(dtype)


def feeds_of(pair):
    return dict(zip(("input", "target"), pair, strict=True))


def check(spec, got, input, target):
    """The rule of the design: the IEEE class first, then ULP to the oracle."""
    truth, contract = oracle(spec, input, target), eager(spec, input, target)
    got = np.asarray(got)
    assert got.dtype == truth.dtype
    assert got.shape == truth.shape
    classes = ieee_class(got)
    right = (classes == ieee_class(truth)) | (classes == ieee_class(contract))
    assert right.all(), (got[~right], truth[~right], contract[~right])
    finite = np.isfinite(truth) & np.isfinite(got)
    both = finite & np.isfinite(contract)
    own = ulp_distance(contract[both], truth[both]) if both.any() else np.zeros(1, np.uint64)
    allowed = max(2, int(own.max()) + 1)
    if finite.any():
        assert ulp_distance(got[finite], truth[finite]).max() <= allowed


CASES = [
    *((LossSpec(*s), r) for r in ROUTES for s in itertools.product(BETAS, REDUCTIONS, DTYPES)),
    *((LossSpec(*s), "torch") for s in TORCH_ROUTE),
]


@pytest.mark.parametrize(("spec", "route"), CASES, ids=lambda v: getattr(v, "name", v))
def test_loss_agrees_with_the_oracle(spec, route):
    if route == "torch":
        pytest.importorskip("torch")
    run = runner(spec, route).run
    pair = random_pair(spec)
    check(spec, run(*pair)["loss"], *pair)
    dtype = NUMPY_DTYPE[spec.dtype]
    values = np.array(SPECIALS, np.float64).astype(dtype)
    if spec.reduction == "none":
        grid = [np.resize(a, (6, 16)) for a in map(np.ravel, np.meshgrid(values, values))]
        check(spec, run(*grid)["loss"], *grid)
        return
    for a, b in itertools.product(values, values):
        specials = pair[0].copy(), pair[1].copy()
        specials[0][3, 5], specials[1][3, 5] = a, b
        check(spec, run(*specials)["loss"], *specials)


@pytest.mark.parametrize("drops_nan", [True, False])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1e4, math.inf])
def test_nan_survives_a_clip_that_drops_it(beta, route, drops_nan):
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        spec = LossSpec(beta, reduction, dtype)
        for which in (0, 1):
            pair = random_pair(spec)
            pair[which][2, 3] = math.nan
            loss = runner(spec, route, drops_nan=drops_nan).run(*pair)["loss"]
            expected = np.zeros((24, 16), bool)
            expected[2, 3] = True
            assert (np.isnan(loss) == (expected if reduction == "none" else True)).all()


def test_whether_a_clip_drops_nan_shows():
    """Clip alone: the switch changes something, or the test above proves nothing."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[N] x) => (float[N] y) '
        "<float a = {-2}, float b = {3}> { y = Clip(x, a, b) }"
    )
    network = parse(model, get_flavour("tensorrt_rtx"))
    feeds = {"x": np.array([math.nan, 9, -9], np.float32)}
    assert evaluate(network, feeds)["y"].tolist() == [-2.0, 3.0, -2.0]
    kept = evaluate(network, feeds, clip_drops_nan=False)["y"]
    assert np.isnan(kept[0])
    assert kept[1:].tolist() == [3.0, -2.0]


SHAPES = [
    ((), None, (), ()),
    (("N",), None, (7,), (7,)),
    (("N", 3, "H", 2), None, (2, 3, 5, 2), (2, 3, 5, 2)),
    ((2, 3), None, (2, 3), (2, 3)),
    (("N", 16), (16,), (5, 16), (16,)),
    (("N", 16), (), (5, 16), ()),
    (("N", 1), ("M",), (5, 1), (4,)),
    (("N", 1, 4), (3, 1), (2, 1, 4), (3, 1)),
    (("N", 16), None, (0, 16), (0, 16)),
    ((0, 4), None, (0, 4), (0, 4)),
    (("N", 0), None, (3, 0), (3, 0)),
    (("N", 16), (1, 16), (0, 16), (1, 16)),
]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("shape", "target_shape", "a", "b"), SHAPES, ids=str)
def test_shapes(shape, target_shape, a, b, reduction):
    for dtype, route in (("float32", "function"), ("bfloat16", "inlined")):
        spec = LossSpec(0.5, reduction, dtype)
        pair = random_pair(spec, a, b)
        loaded = runner(spec, route, shape, target_shape)
        check(spec, loaded.run(*pair)["loss"], *pair)


def test_one_plan_serves_every_size():
    spec = LossSpec(0.5, "mean")
    for rows in (1, 0, 1000, 3):
        pair = random_pair(spec, (rows, 16))
        check(spec, runner(spec).run(*pair)["loss"], *pair)


def test_outputs_are_fresh_arrays():
    """No output may be a view of an input, or of a constant of the plan."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[2] x) => (float[2] y, float[2] z) '
        "<float[2] c = {1, 2}> { y = Identity(x) z = Identity(c) }"
    )
    plan_ = plan(parse(model, get_flavour("tensorrt_rtx")))
    x = np.array([5, 6], np.float32)
    plan_.run({"x": x})["z"][:] = 0
    out = plan_.run({"x": x})
    assert out["z"].tolist() == [1, 2]
    assert not np.shares_memory(out["y"], x)


def test_many_threads_share_a_plan():
    spec = LossSpec(0.5, "mean")
    pairs = [random_pair(spec, (40 + i, 16), seed=i) for i in range(40)]
    alone = [runner(spec).run(*pair)["loss"] for pair in pairs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda pair: runner(spec).run(*pair)["loss"], pairs))
    assert alone == together


# It must be able to fail ---------------------------------------------------------------------


def scalars(parsed):
    """Name and value of each float constant that isn't 0 or 1, which only guard a division."""
    found = {}
    for i in range(parsed.network.num_layers):
        layer = parsed.network.get_layer(i)
        if layer.type == parsed.trt.LayerType.CONSTANT:
            layer.__class__ = parsed.trt.IConstantLayer
            wanted = layer.weights.dtype == np.float32 and layer.weights not in (0, 1)
            if wanted and not np.isnan(layer.weights[0]):  # NaN is for a beta that is none
                found[layer.name] = float(layer.weights[0])
    return found


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("dtype", "change"), [("float32", 2e-4), ("float16", 0.2), ("bfloat16", 0.2)]
)
def test_a_wrong_constant_is_seen(route, dtype, change):
    spec = LossSpec(2.0, "none", dtype)
    network = parsed_network(spec, route)
    pair = random_pair(spec)
    values = scalars(network)
    assert sorted(values.values()) == [0.5, 2.0]  # half, and beta or the divisor
    for name, value in values.items():

        def loss(value, name=name):
            constants = {name: np.array(value, np.float32)}
            return plan(network, constants=constants).run(feeds_of(pair))["loss"]

        check(spec, loss(value), *pair)
        with pytest.raises(AssertionError):
            check(spec, loss(value * (1 + change)), *pair)


def test_a_half_of_0_5001_is_tens_of_ulp_off_in_the_mean():
    spec = LossSpec(2.0, "mean")
    network = parsed_network(spec)
    pair = random_pair(spec)
    (name,) = [name for name, value in scalars(network).items() if value == 0.5]
    wrong = plan(network, constants={name: np.array(0.5001, np.float32)})
    distance = ulp_distance(wrong.run(feeds_of(pair))["loss"], oracle(spec, *pair))
    assert 20 < distance < 5000


@pytest.mark.parametrize("value", [0.5, 2.0])
def test_a_wrong_initializer_is_seen(value):
    spec = LossSpec(2.0, "none")
    model = export(spec, route="inlined", shape=("N", 16))
    pair = random_pair(spec)
    flavour = get_flavour("tensorrt_rtx")
    check(spec, evaluate(parse(model, flavour), feeds_of(pair))["loss"], *pair)
    wrong = np.array(value * 1.0002, np.float32)
    found = 0
    for tensor in model.graph.initializer:
        if numpy_helper.to_array(tensor) == value:
            tensor.CopyFrom(numpy_helper.from_array(wrong, tensor.name))
            found += 1
    for attribute in (a for node in model.graph.node for a in node.attribute):
        if attribute.name == "value" and numpy_helper.to_array(attribute.t) == value:
            attribute.t.CopyFrom(numpy_helper.from_array(wrong))
            found += 1
    assert found
    with pytest.raises(AssertionError):
        check(spec, evaluate(parse(model, flavour), feeds_of(pair))["loss"], *pair)


# What it says ---------------------------------------------------------------------------------


def test_inputs_that_do_not_fit():
    run = plan(parsed_network()).run
    ones = np.ones((4, 16), np.float32)
    with pytest.raises(InvalidInputError, match=r"takes input, target; got input$"):
        run({"input": ones})
    with pytest.raises(InvalidInputError, match=r"'target' .* takes float32 .* got float64 "):
        run({"input": ones, "target": ones.astype(np.float64)})
    with pytest.raises(InvalidInputError, match=r"\(N, 16\).* got float32 of the shape \(4, 3\)"):
        run({"input": ones, "target": ones[:, :3]})
    with pytest.raises(InvalidInputError, match=r"one size for each name; .* shape \(1, 16\)"):
        run({"input": ones, "target": ones[:1]})  # numpy would broadcast it


def test_constants_that_do_not_fit():
    network = parsed_network()
    name = next(iter(scalars(network)))
    with pytest.raises(SpecError, match=rf"no CONSTANT layer is called no; there are .*{name}"):
        plan(network, constants={"no": np.zeros(())})
    with pytest.raises(InvalidInputError, match=rf"'{name}' is float32 .* is float64 of the shape"):
        plan(network, constants={name: np.zeros(())})


def test_backend_is_registered():
    assert get_backend("trt-network").name == "trt-network"
    spec = LossSpec(0.5, "mean")
    pair = random_pair(spec)
    loaded = load(export(spec, shape=("N", 16)), backend="trt-network")
    check(spec, loaded.run(*pair)["loss"], *pair)
    assert loaded.spec == spec
    assert "computes in float32" in loaded.parsed.notes[0]


def test_the_backend_passes_the_choice_about_nan_on():
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[N] input, float[N] target) => '
        "(float[N] loss) <float a = {-2}, float b = {3}> "
        "{ d = Sub(input, target) loss = Clip(d, a, b) }"
    )
    pair = np.array([math.nan], np.float32), np.zeros(1, np.float32)
    assert TrtNetworkBackend().load(model).run(*pair)["loss"] == -2
    assert np.isnan(TrtNetworkBackend(clip_drops_nan=False).load(model).run(*pair)["loss"])


def test_float64_and_any_rank_are_refused():
    backend = TrtNetworkBackend()
    wide = LossSpec(dtype="float64")
    assert "no float64" in backend.refuses(wide)
    assert all(backend.refuses(LossSpec(dtype=dtype)) is None for dtype in DTYPES)
    with pytest.raises(UnsupportedError, match=r"'input' is float64. TensorRT has no float64"):
        backend.load(export(wide, shape=("N",)))
    with pytest.raises(UnsupportedError, match=r"unknown rank"):
        backend.load(export(LossSpec()))


def test_without_tensorrt_the_message_says_what_to_install(monkeypatch):
    from smoothl1_deploy.tensorrt import flavour

    monkeypatch.setattr(flavour, "_usable", {})
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'smoothl1-deploy\[rtx\]'"):
        get_backend("trt-network")
