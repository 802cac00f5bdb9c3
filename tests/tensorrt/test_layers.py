"""Each layer of a network by itself: against the ONNX project's evaluator, and at its corners."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

pytest.importorskip("tensorrt_rtx")

import tensorrt_rtx as trt

from smoothl1_deploy.errors import InvalidInputError, UnsupportedError
from smoothl1_deploy.tensorrt import _network as layers
from smoothl1_deploy.tensorrt._flavour import get_flavour
from smoothl1_deploy.tensorrt._network import plan
from smoothl1_deploy.tensorrt._parse import ParsedNetwork, parse

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4)).astype(np.float32) * 2
Y = RNG.normal(size=(4,)).astype(np.float32)
CUBE = RNG.normal(size=(2, 4, 6)).astype(np.float32)
NAN, INF = np.nan, np.inf
EDGES = np.array([[0.0, -0.0, 2.5, -2.5], [INF, -INF, NAN, -0.5]], np.float32)
INTS = np.array([[7, -7, 6, -6], [5, -5, 0, 1]], np.int64)
DIVISORS = np.array([3, 3, -4, -4], np.int64)
BOOLS = np.array([[True, False, True, False]] * 2)
HALF = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def model_of(body):
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 20]> g {body}')


def network(body):
    return parse(model_of(body), get_flavour("tensorrt_rtx"))


def run(body, **feeds):
    """The first output of a graph."""
    return next(iter(plan(network(body)).run(feeds).values()))


def one(op, x="float[N,4]", y="float[N,4]", extra="", feed=X):
    """A graph of one node, and what it is fed."""
    return f"({x} x) => ({y} y) {extra} {{ y = {op} }}", {"x": feed}


def two(op, kind="float", y=None, x=X, z=Y):
    return f"({kind}[N,4] x, {kind}[4] z) => ({y or kind}[N,4] y) {{ y = {op}(x,z) }}", {
        "x": x,
        "z": z,
    }


def cast(to, x, y, feed):
    return one(f"Cast<to={to}>(x)", f"{x}[N,4]", f"{y}[N,4]", feed=feed)


def sliced(start, end, step):
    constants = zip("seat", (start, end, 0, step), strict=True)
    extra = ", ".join(f"int64[1] {name}={{{value}}}" for name, value in constants)
    return one("Slice(x,s,e,a,t)", y="float[M,4]", extra=f"<{extra}>")


EXPAND = "(float[4] x, float[N,4] z) => (float[N,4] y) { s = Shape(z) y = Expand(x,s) }"
RESHAPE = "(float[N,4] x, int64[2] s) => (float[A,B] y) { y = Reshape(x,s) }"
WHERE = "(bool[N,4] c, float[N,4] x, float[4] z) => (float[N,4] y) { y = Where(c,x,z) }"
CONCAT = "(float[N,4] x, float[N,4] z) => (float[N,8] y) { y = Concat<axis=1>(x,z) }"
BOOL, INT = ("bool[N,4]",) * 2, {"kind": "int64", "x": INTS, "z": DIVISORS}

#: LayerType -> graphs that the parser makes such a layer of, and what they are fed.
CASES = {
    "UNARY": [
        *(one(f"{op}(x)", feed=EDGES) for op in ("Abs", "Neg", "Sign")),
        *(one(f"{op}(x)", feed=np.abs(X)) for op in ("Sqrt", "Reciprocal")),
        *(one(f"{op}(x)", y="bool[N,4]", feed=EDGES) for op in ("IsNaN", "IsInf")),
        one("Not(x)", *BOOL, feed=BOOLS),
    ],
    "ACTIVATION": [one("Relu(x)"), one("Clip(x,a,b)", extra="<float a={-1}, float b={0.5}>")],
    "ELEMENTWISE": [
        *(two(op) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max")),
        two("Pow", x=np.abs(X)),
        *(two(op, y="bool") for op in ("Equal", "Greater", "Less", "GreaterOrEqual")),
        *(two(op, "bool", x=BOOLS, z=BOOLS[0, ::-1]) for op in ("And", "Or", "Xor")),
        *(two(op, **INT) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max")),
    ],
    "SELECT": [(WHERE, {"c": BOOLS, "x": X[:2], "z": Y})],
    "CAST": [
        cast(1, "bool", "float", BOOLS),
        cast(1, "int64", "float", INTS * 12345678901),
        cast(6, "float", "int32", X * 100),
        cast(7, "float", "int64", X * 100),
        cast(9, "float", "bool", EDGES),
        cast(10, "float", "float16", X * 1e4),
        cast(16, "float", "bfloat16", X),
        cast(10, "int64", "float16", INTS * 4099),
        cast(1, "bfloat16", "float", X.astype(ml_dtypes.bfloat16)),
    ],
    "REDUCE": [
        one(f"{op}<keepdims={keep}>(x,a)", y=f"float{shape}", extra=f"<int64[{n}] a={{{axes}}}>")
        for op in ("ReduceSum", "ReduceMean")
        for keep, shape, n, axes in ((0, "[N]", 1, "1"), (1, "[N,1]", 1, "-1"), (0, "", 2, "0,1"))
    ],
    "CONCATENATION": [(CONCAT, {"x": X, "z": X + 1})],
    "SLICE": [
        (EXPAND, {"x": Y, "z": X}),
        *(sliced(*s) for s in [(0, 2, 1), (1, 100, 1), (-1, -100, -1), (0, 3, 2), (2, 1, 1)]),
    ],
    "GATHER": [one("Gather<axis=1>(x,i)", y="float[N,2,1]", extra="<int64[2,1] i={0,-1}>")],
    "SHUFFLE": [
        one("Transpose<perm=[2,0,1]>(x)", "float[N,4,6]", "float[6,N,4]", feed=CUBE),
        one("Reshape(x,s)", y="float[N,2,2]", extra="<int64[3] s={0,2,-1}>"),
        one("Reshape(x,s)", "float[1,1]", "float", "<int64[0] s={}>", X[:1, :1]),
        (RESHAPE, {"x": X, "s": np.array([2, -1])}),
    ],
    "SQUEEZE": [
        one("Squeeze(x,a)", "float[N,1,4]", extra="<int64[1] a={1}>", feed=X[:1, None]),
        one("Squeeze(x)", "float[3,1,4]", "float[3,4]", feed=X[:, None]),
    ],
    "UNSQUEEZE": [one("Unsqueeze(x,a)", y="float[1,N,4,1]", extra="<int64[2] a={0,-1}>")],
    "SHAPE": [one("Shape(x)", y="int64[2]")],
    "IDENTITY": [one("Identity(x)")],
}


@pytest.mark.parametrize("layer", CASES)
def test_layer_agrees_with_onnx(layer):
    kind = trt.ILayer.type
    for body, feeds in CASES[layer]:
        parsed = network(body)
        found = [parsed.network.get_layer(i) for i in range(parsed.network.num_layers)]
        assert layer in {kind.fget(each).name for each in found}, body
        with np.errstate(all="ignore"):
            expected = ReferenceEvaluator(model_of(body)).run(None, feeds)
        outputs = plan(parsed).run(feeds).values()
        for got, want in zip(outputs, map(np.asarray, expected), strict=True):
            assert (got.dtype, got.shape) == (want.dtype, want.shape), body
            if layer in ("REDUCE", "ELEMENTWISE", "UNARY") and got.dtype == np.float32:
                np.testing.assert_allclose(got, want, rtol=3e-6, atol=3e-6, err_msg=body)
            else:
                np.testing.assert_array_equal(got, want, err_msg=body)


def test_every_layer_that_the_evaluator_knows_has_a_case():
    assert {*CASES, "CONSTANT"} == {*layers.HANDLERS}


# Rounding and NaN


def test_half_arithmetic_rounds_once():
    """Against the exact result in float64, rounded once: every layer in its own dtype."""
    exact = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide}
    for (dtype, kind), op in itertools.product(HALF.items(), exact):
        x, z = RNG.normal(size=(2, 4000)).astype(kind)
        want = exact[op](x.astype(np.float64), z.astype(np.float64)).astype(kind)
        got = run(f"({dtype}[N] x, {dtype}[N] z) => ({dtype}[N] y) {{ y = {op}(x,z) }}", x=x, z=z)
        assert got.dtype == want.dtype
        # numpy rounds float64 to the half formats by way of float32: a tie in 2^13 may differ.
        assert (got != want).sum() <= 1, (op, dtype)


def summed(dtype, op="ReduceSum"):
    return f"({dtype}[N] x) => ({dtype} y) <int64[1] a={{0}}> {{ y = {op}<keepdims=0>(x,a) }}"


def test_a_sum_is_the_exact_one_rounded_once():
    """2^24 + 1 - 2^24 in float32: one pass in order would lose the 1."""
    assert run(summed("float"), x=np.array([2.0**24, 1, -(2.0**24)], np.float32)) == 1
    big = np.full(64, 60000, np.float16)  # the sum overflows float16, the mean doesn't
    assert run(summed("float16", "ReduceMean"), x=big) == 60000
    # Just above the middle of two neighbours: by way of float32 it would be the middle.
    for dtype, low, high in (("float16", 2048, 2050), ("bfloat16", 256, 258)):
        assert run(summed(dtype), x=np.array([low, 1, 2.0**-24], HALF[dtype])) == high


def test_sums_of_nothing_and_of_integers():
    empty = np.zeros(0, np.float32)
    assert run(summed("float"), x=empty) == 0
    assert np.isnan(run(summed("float", "ReduceMean"), x=empty))
    wraps = np.array([2**31 - 1, 4], np.int32)
    assert run(summed("int32"), x=wraps) == -(2**31) + 3


def test_casts_to_integers_saturate():
    """NVIDIA/TensorRT#4775: NaN becomes 0, what is too large the bound."""
    x = np.array([NAN, INF, -INF, 3e9, -3e9, 2.9, -2.9], np.float32)
    got = run("(float[N] x) => (int32[N] y) { y = Cast<to=6>(x) }", x=x)
    top, bottom = 2**31 - 1, -(2**31)
    assert got.tolist() == [0, top, bottom, top, bottom, 2, -2]


def test_an_open_clip_ends_at_the_largest_float():
    """The parser writes FLT_MAX for a bound that is left out: what TensorRT makes of the graph."""
    body = "(float[N] x) => (float[N] y) <float a={-1}> { y = Clip(x,a) }"
    got = run(body, x=np.array([INF, -INF], np.float32))
    assert got.tolist() == [np.finfo(np.float32).max, -1]


@pytest.mark.parametrize("drops_nan", [True, False])
def test_minimum_maximum_and_relu_swallow_nan_where_asked_to(drops_nan):
    nan, number = np.full((1, 4), NAN, np.float32), np.full(4, 2, np.float32)
    for (body, feeds), kept in (
        (two("Min", x=nan, z=number), 2),
        (two("Max", x=nan, z=number), 2),
        (one("Relu(x)", feed=nan), 0),
        (one("Abs(x)", feed=nan), NAN),
    ):
        got = plan(network(body), clip_drops_nan=drops_nan).run(feeds)["y"]
        np.testing.assert_array_equal(got, np.full((1, 4), kept if drops_nan else NAN))


# What the parser does not make, on networks by hand


class Net:
    """A network made by hand, in the frame that `plan` takes."""

    def __init__(self):
        self.flavour = get_flavour("tensorrt_rtx")
        self.builder = self.flavour.builder()
        typed = int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network = self.builder.create_network(1 << typed)
        self.x = self.network.add_input("x", trt.float32, (-1, 4))

    def plan(self, layer):
        layer.get_output(0).name = "y"
        self.network.mark_output(layer.get_output(0))
        return plan(ParsedNetwork(self.builder, self.network, None, self.flavour, (), (), ()))


SUM, PROD = trt.ElementWiseOperation.SUM, trt.ElementWiseOperation.PROD


def test_layers_out_of_order_are_sorted():
    """The parser adds some layers before those whose outputs they read."""
    net = Net()
    x = net.x
    product = net.network.add_elementwise(x, x, PROD)
    total = net.network.add_elementwise(x, x, SUM)
    product.set_input(1, total.get_output(0))
    np.testing.assert_array_equal(net.plan(product).run({"x": X})["y"], X * (X + X))


def test_a_network_that_is_not_well_formed_is_refused():
    net = Net()
    x = net.x
    product = net.network.add_elementwise(x, x, PROD)
    total = net.network.add_elementwise(x, product.get_output(0), SUM)
    product.set_input(1, total.get_output(0))
    with pytest.raises(UnsupportedError, match=r"can't infer the shape of .* not well formed"):
        net.plan(product)


# What it says


def test_indices_outside_are_refused():
    body = "(float[N,4] x, int64[M] i) => (float[M,4] y) { y = Gather<axis=0>(x,i) }"
    for index in (-1, 3):
        with pytest.raises(InvalidInputError, match=rf"GATHER reads the indices {index} to .* 3;"):
            run(body, x=X, i=np.array([index]))
    net = Net()
    made = net.plan(net.network.add_slice(net.x, (1, 0), (3, 4), (1, 1)))
    with pytest.raises(InvalidInputError, match=r"SLICE reads the indices 1 to 3 of axis 0, .* 3;"):
        made.run({"x": X})


def test_shapes_that_do_not_fit_name_the_layer():
    body = "(float[N] x, float[M] z) => (float[K] y) { y = Add(x,z) }"
    with pytest.raises(
        InvalidInputError, match=r"layer '.*' of type ELEMENTWISE .* \(3,\), \(4,\)"
    ):
        run(body, x=X[:, 0], z=Y)


UNKNOWN = {
    "'conv_head' of type CONVOLUTION is of a kind, .*'ort-cpu' here, or": (
        "(float[N,1,2,2] x) => (float[N,1,1,1] y) <float[1,1,2,2] w={1,2,3,4}> "
        "{ [conv_head] y = Conv(x,w) }"
    ),
    "type UNARY has the operation SIN": one("Sin(x)")[0],
    "type ACTIVATION has the activation SIGMOID": one("Sigmoid(x)")[0],
    "type REDUCE has the operation MAX on float32": one("ReduceMax<keepdims=0>(x)", y="float")[0],
    "type SLICE has the mode FILL": (
        "(float[N,4] x) => (float[N,6] y) <int64[4] p={0,1,0,1}> { y = Pad(x,p) }"
    ),
    "type GATHER has the mode ELEMENT": (
        "(float[N,4] x, int64[N,2] i) => (float[N,2] y) { y = GatherElements<axis=1>(x,i) }"
    ),
    "'c' of type CONSTANT holds constants of bfloat16": (
        "(bfloat16[N] x) => (bfloat16[N] y) <bfloat16 c={2}> { y = Mul(x,c) }"
    ),
    "the tensor 'x' has the dtype fp8; .* knows .*float32": one(
        "Identity(x)", "float8e4m3fn[N]", "float8e4m3fn[N]"
    )[0],
}


def test_what_the_evaluator_does_not_know_is_named():
    for message, body in UNKNOWN.items():
        with pytest.raises(UnsupportedError, match=message):
            plan(network(body))


def test_a_misread_layer_is_reported(monkeypatch):
    """Every result is held against the dtype and rank that TensorRT infers."""
    wrong = ("IUnaryLayer", lambda view, layer: lambda x: x.astype(np.float64))
    monkeypatch.setitem(layers.HANDLERS, "UNARY", wrong)
    with pytest.raises(UnsupportedError, match=r"to float64 of rank 2, .* float32 of rank 2"):
        run(one("Abs(x)")[0], x=X)
