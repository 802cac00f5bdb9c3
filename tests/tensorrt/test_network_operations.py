"""Every operation of TensorRT's enumerations, and what ONNX doesn't reach, on networks by hand."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx")

import tensorrt_rtx as trt

from smoothl1_deploy.errors import InvalidInputError, UnsupportedError
from smoothl1_deploy.tensorrt.flavour import get_flavour
from smoothl1_deploy.tensorrt.network import plan
from smoothl1_deploy.tensorrt.parse import NetworkPort, ParsedNetwork

NAN, INF = math.nan, math.inf
X = np.array([[0.5, -0.25, 0.125, -0.75], [0.9, 0.3, -0.6, 0.0]], np.float32)
Z = np.array([[2.0, -4.0, 0.5, 3.0]], np.float32)
erf = np.vectorize(math.erf)

UNARY = {
    "EXP": np.exp,
    "LOG": np.log,
    "SQRT": np.sqrt,
    "RECIP": lambda x: 1 / x,
    "ABS": np.abs,
    "NEG": np.negative,
    "SIN": np.sin,
    "COS": np.cos,
    "TAN": np.tan,
    "SINH": np.sinh,
    "COSH": np.cosh,
    "ASIN": np.arcsin,
    "ACOS": np.arccos,
    "ATAN": np.arctan,
    "ASINH": np.arcsinh,
    "ACOSH": lambda x: np.arccosh(x),
    "ATANH": np.arctanh,
    "CEIL": np.ceil,
    "FLOOR": np.floor,
    "ERF": erf,
    "SIGN": np.sign,
    "ROUND": np.round,
    "ISINF": np.isinf,
    "ISNAN": np.isnan,
    "NOT": np.logical_not,
}
ELEMENTWISE = {
    "SUM": np.add,
    "PROD": np.multiply,
    "MAX": np.maximum,
    "MIN": np.minimum,
    "SUB": np.subtract,
    "DIV": np.divide,
    "POW": np.power,
    "FLOOR_DIV": lambda a, b: np.floor(a / b),
    "EQUAL": np.equal,
    "GREATER": np.greater,
    "LESS": np.less,
    "AND": np.logical_and,
    "OR": np.logical_or,
    "XOR": np.logical_xor,
}
A, B = float(np.float32(0.3)), float(np.float32(0.7))  # alpha and beta are float32
ACTIVATION = {
    "RELU": lambda x: np.maximum(x, 0),
    "SIGMOID": lambda x: 1 / (1 + np.exp(-x)),
    "TANH": np.tanh,
    "LEAKY_RELU": lambda x: np.where(x > 0, x, A * x),
    "ELU": lambda x: np.where(x > 0, x, A * (np.exp(x) - 1)),
    "SELU": lambda x: np.where(x > 0, B * x, B * (A * np.exp(x) - A)),
    "SOFTSIGN": lambda x: x / (1 + np.abs(x)),
    "SOFTPLUS": lambda x: A * np.log(np.exp(B * x) + 1),
    "CLIP": lambda x: np.clip(x, A, B),
    "HARD_SIGMOID": lambda x: np.clip(A * x + B, 0, 1),
    "SCALED_TANH": lambda x: A * np.tanh(B * x),
    "THRESHOLDED_RELU": lambda x: np.where(x > A, x, 0),
    "GELU_ERF": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "GELU_TANH": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}
REDUCE = {"SUM": np.sum, "PROD": np.prod, "MAX": np.max, "MIN": np.min, "AVG": np.mean}


class Net:
    """A network made by hand, in the frame that `plan` takes."""

    def __init__(self):
        self.flavour = get_flavour("tensorrt_rtx")
        self.builder = self.flavour.builder()
        typed = int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network = self.builder.create_network(1 << typed)
        self.ports = []

    def input(self, name, dtype, shape):
        self.ports.append(NetworkPort(name, "", tuple(shape), (None,) * len(shape)))
        return self.network.add_input(name, dtype, shape)

    def constant(self, value):
        # Weights only borrows the memory of the array.
        self.keep = [*getattr(self, "keep", []), value]
        return self.network.add_constant(value.shape, trt.Weights(value)).get_output(0)

    def plan(self, *layers, **kwargs):
        for i, layer in enumerate(layers):
            layer.get_output(0).name = f"y{i}"
            self.network.mark_output(layer.get_output(0))
        parsed = ParsedNetwork(
            trt, self.builder, self.network, None, self.flavour, (), tuple(self.ports), ()
        )
        return plan(parsed, **kwargs)


def run_one(add, feeds, shape=(-1, 4), **kwargs):
    """One layer on inputs of the feeds' dtypes."""
    net = Net()
    types = {np.float32: trt.float32, np.bool_: trt.bool, np.float16: trt.float16}
    types |= {np.int32: trt.int32, np.int64: trt.int64, ml_dtypes.bfloat16: trt.bfloat16}
    inputs = [net.input(n, types[a.dtype.type], shape) for n, a in feeds.items()]
    return net.plan(add(net, *inputs), **kwargs).run(feeds)["y0"]


def names(enum, but=()):
    return [name for name in getattr(trt, enum).__members__ if name not in but]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("op", names("UnaryOperation"))
def test_unary(op, dtype):
    x = (X != 0) if op == "NOT" else (X + (op == "ACOSH") * 2).astype(dtype)
    got = run_one(lambda n, t: n.network.add_unary(t, getattr(trt.UnaryOperation, op)), {"x": x})
    with np.errstate(all="ignore"):
        want = np.asarray(UNARY[op](x if x.dtype == bool else x.astype(np.float64)))
    assert got.dtype == (np.bool_ if want.dtype == bool else dtype)
    # The exact result, rounded once; float32 to compare, as numpy finds NaN in bfloat16 unequal.
    same = want.astype(got.dtype).astype(np.float32)
    np.testing.assert_array_equal(got.astype(np.float32), same)


@pytest.mark.parametrize("op", names("ElementWiseOperation"))
def test_elementwise(op):
    logical = op in ("AND", "OR", "XOR")
    feeds = {"x": X > 0, "z": np.broadcast_to(Z > 0, X.shape)} if logical else {"x": X, "z": Z}
    if op in ("EQUAL", "MAX", "MIN"):
        feeds["z"] = np.where([True, False, True, False], X, feeds["z"]).astype(np.float32)
    if op == "POW":
        feeds["x"] = np.abs(X)

    def add(net, a, b):
        return net.network.add_elementwise(a, b, getattr(trt.ElementWiseOperation, op))

    got = run_one(add, feeds)
    a, b = (v if logical else v.astype(np.float64) for v in feeds.values())
    with np.errstate(divide="ignore"):
        np.testing.assert_array_equal(got, ELEMENTWISE[op](a, b).astype(got.dtype))


@pytest.mark.parametrize("op", names("ActivationType"))
def test_activation(op):
    def add(net, tensor):
        layer = net.network.add_activation(tensor, getattr(trt.ActivationType, op))
        layer.alpha, layer.beta = A, B
        return layer

    got = run_one(add, {"x": X})
    np.testing.assert_allclose(got, ACTIVATION[op](X.astype(np.float64)), rtol=2e-7, atol=1e-12)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("op", names("ReduceOperation", but=("NONE",)))
def test_reduce(op, keep):
    for axes, mask in (((0,), 1), ((1,), 2), ((0, 1), 3)):

        def add(net, tensor, mask=mask):
            return net.network.add_reduce(tensor, getattr(trt.ReduceOperation, op), mask, keep)

        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            x = X.astype(dtype)
            got = run_one(add, {"x": x})
            want = REDUCE[op](x.astype(np.float64), axis=axes, keepdims=keep)
            assert got.dtype == dtype
            np.testing.assert_array_equal(got, np.asarray(want).astype(dtype))


@pytest.mark.parametrize(
    ("op", "want"), [("SUM", 2**31 - 4), ("MAX", 2**31 - 1), ("MIN", -3), ("PROD", None)]
)
def test_reduce_of_integers(op, want):
    x = np.array([[2**31 - 1, -3]], np.int32)

    def add(net, tensor):
        return net.network.add_reduce(tensor, getattr(trt.ReduceOperation, op), 2, False)

    got = run_one(add, {"x": x}, (-1, 2))
    assert got.dtype == np.int32
    assert got.tolist() == [x.prod(dtype=np.int32) if want is None else want]


def test_average_of_integers_is_refused():
    with pytest.raises(UnsupportedError, match=r"type REDUCE has the operation AVG on int32"):
        run_one(
            lambda n, t: n.network.add_reduce(t, trt.ReduceOperation.AVG, 1, False),
            {"x": np.ones((1, 4), np.int32)},
        )


@pytest.mark.parametrize("drops_nan", [True, False])
def test_who_swallows_nan(drops_nan):
    """Clip, Relu, HardSigmoid, Min, Max and their reductions; nothing else."""
    e, a, r = trt.ElementWiseOperation, trt.ActivationType, trt.ReduceOperation

    def clip(net, x):
        layer = net.network.add_activation(x, a.CLIP)
        layer.alpha, layer.beta = -3.0, 3.0
        return layer

    swallows = {
        "CLIP": (clip, -3.0),
        "RELU": (lambda n, x: n.network.add_activation(x, a.RELU), 0.0),
        "HARD_SIGMOID": (lambda n, x: n.network.add_activation(x, a.HARD_SIGMOID), 1.0),
        "MIN": (lambda n, x: n.network.add_elementwise(x, n.constant(Z), e.MIN), 2.0),
        "MAX": (lambda n, x: n.network.add_elementwise(x, n.constant(Z), e.MAX), 2.0),
        "MIN, swapped": (lambda n, x: n.network.add_elementwise(n.constant(Z), x, e.MIN), 2.0),
        "REDUCE MIN": (lambda n, x: n.network.add_reduce(x, r.MIN, 2, True), -1.0),
        "REDUCE MAX": (lambda n, x: n.network.add_reduce(x, r.MAX, 2, True), 1.0),
    }
    keeps = {
        "SUM": lambda n, x: n.network.add_reduce(x, r.SUM, 2, True),
        "SIGMOID": lambda n, x: n.network.add_activation(x, a.SIGMOID),
        "PROD": lambda n, x: n.network.add_elementwise(x, n.constant(Z), e.PROD),
        "ABS": lambda n, x: n.network.add_unary(x, trt.UnaryOperation.ABS),
    }
    x = np.array([[NAN, 1.0, -1.0, 0.5]], np.float32)
    for name, (add, number) in swallows.items():
        got = run_one(add, {"x": x}, clip_drops_nan=drops_nan)[0, 0]
        assert got == number if drops_nan else np.isnan(got), name
    for name, add in keeps.items():
        assert np.isnan(run_one(add, {"x": x}, clip_drops_nan=drops_nan)[0, 0]), name


@pytest.mark.parametrize("mode", names("ScaleMode"))
def test_scale(mode):
    shape = {"UNIFORM": (), "CHANNEL": (3, 1, 1), "ELEMENTWISE": (3, 2, 2)}[mode]
    size = math.prod(shape)
    shift, scale, power = (
        np.linspace(low, low + 1, size, dtype=np.float32) for low in (1.0, 0.5, 1.5)
    )
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2) / 8

    def add(net, tensor):
        net.keep = [shift, scale, power]
        return net.network.add_scale(
            tensor, getattr(trt.ScaleMode, mode), *(trt.Weights(w) for w in net.keep)
        )

    got = run_one(add, {"x": x}, (-1, 3, 2, 2))
    wide = (w.astype(np.float64).reshape(shape) for w in (shift, scale, power))
    b, a, p = wide
    np.testing.assert_array_equal(got, ((x * a + b) ** p).astype(np.float32))


@pytest.mark.parametrize("op0", names("MatrixOperation"))
@pytest.mark.parametrize("op1", names("MatrixOperation"))
def test_matrix_multiply(op0, op1):
    rng = np.random.default_rng(0)
    shapes = {
        "NONE": ((5, 3, 4), (5, 4, 2)),
        "TRANSPOSE": ((5, 4, 3), (5, 2, 4)),
        "VECTOR": ((5, 4),) * 2,
    }
    a = rng.normal(size=shapes[op0][0]).astype(np.float32)
    b = rng.normal(size=shapes[op1][1]).astype(np.float32)
    net = Net()
    tensors = [net.input("a", trt.float32, a.shape), net.input("b", trt.float32, b.shape)]
    ops = [getattr(trt.MatrixOperation, op) for op in (op0, op1)]
    layer = net.network.add_matrix_multiply(tensors[0], ops[0], tensors[1], ops[1])
    got = net.plan(layer).run({"a": a, "b": b})["y0"]
    letters = {"NONE": ("nik", "nkj"), "TRANSPOSE": ("nki", "njk"), "VECTOR": ("nk", "nk")}
    left, right = letters[op0][0], letters[op1][1]
    out = "n" + ("i" if "i" in left else "") + ("j" if "j" in right else "")
    want = np.einsum(f"{left},{right}->{out}", a.astype(np.float64), b.astype(np.float64))
    np.testing.assert_array_equal(got, want.astype(np.float32))


def test_linspace_with_fixed_attributes():
    net = Net()
    layer = net.network.add_fill((4,), trt.FillOperation.LINSPACE, trt.float32)
    layer.set_input(1, net.constant(np.array(0.5, np.float32)))
    layer.set_input(2, net.constant(np.array([0.25], np.float32)))
    assert net.plan(layer).run({})["y0"].tolist() == [0.5, 0.75, 1.0, 1.25]


def test_random_fill_is_refused():
    net = Net()
    layer = net.network.add_fill((4,), trt.FillOperation.RANDOM_UNIFORM, trt.float32)
    with pytest.raises(UnsupportedError, match=r"of type FILL has the operation RANDOM_UNIFORM"):
        net.plan(layer)


def test_static_shuffle_with_all_parts():
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)

    def add(net, tensor):
        layer = net.network.add_shuffle(tensor)
        layer.first_transpose = (2, 0, 1)
        layer.reshape_dims = (0, 3, -1)
        layer.second_transpose = (1, 0, 2)
        return layer

    got = run_one(add, {"x": x}, (-1, 3, 4))
    np.testing.assert_array_equal(got, x.transpose(2, 0, 1).reshape(4, 3, 2).transpose(1, 0, 2))


def test_a_dynamic_axis_of_length_1_is_not_squeezed():
    net = Net()
    tensor = net.input("x", trt.float32, (-1, 1, 3))
    layer = net.network.add_squeeze(tensor, net.constant(np.array([1], np.int64)))
    assert net.plan(layer).run({"x": np.zeros((1, 1, 3), np.float32)})["y0"].shape == (1, 3)


def test_squeeze_without_axes_goes_by_the_network():
    """TensorRT decides which axes go when it makes the network, not by the sizes of a call."""
    net = Net()
    tensor = net.input("x", trt.float32, (3, 1, 2))
    made = net.plan(net.network.add_squeeze(tensor))
    assert made.run({"x": np.zeros((3, 1, 2), np.float32)})["y0"].shape == (3, 2)


def test_floor_div_takes_the_rounded_quotient():
    """1 / 0.1 is 10 in float32, though the float32 called 0.1 is larger than a tenth."""
    x, tenth = np.ones((1, 4), np.float32), np.full((1, 4), 0.1, np.float32)

    def add(net, a, b):
        return net.network.add_elementwise(a, b, trt.ElementWiseOperation.FLOOR_DIV)

    assert run_one(add, {"x": x, "z": tenth}).tolist() == [[10.0] * 4]


def test_slice_out_of_bounds():
    with pytest.raises(InvalidInputError, match=r"SLICE reads the indices 1 to 2 of axis 0, .* 2;"):
        run_one(lambda n, t: n.network.add_slice(t, (1, 0), (2, 4), (1, 1)), {"x": X})


def test_layers_out_of_order_are_sorted():
    """The parser adds some layers before those whose outputs they read."""
    net = Net()
    x = net.input("x", trt.float32, (-1, 4))
    product = net.network.add_elementwise(x, x, trt.ElementWiseOperation.PROD)
    total = net.network.add_elementwise(x, x, trt.ElementWiseOperation.SUM)
    product.set_input(1, total.get_output(0))
    np.testing.assert_array_equal(net.plan(product).run({"x": X})["y0"], X * (X + X))


def test_a_network_that_is_not_well_formed_is_refused():
    net = Net()
    x = net.input("x", trt.float32, (-1, 4))
    product = net.network.add_elementwise(x, x, trt.ElementWiseOperation.PROD)
    total = net.network.add_elementwise(x, product.get_output(0), trt.ElementWiseOperation.SUM)
    product.set_input(1, total.get_output(0))
    with pytest.raises(
        UnsupportedError, match=r"can't infer the shape of the tensor .* not well formed"
    ):
        net.plan()


def test_constants_are_folded_once():
    """What depends on constants alone is no step of the plan."""
    net = Net()
    x = net.input("x", trt.float32, (-1, 4))
    e = trt.ElementWiseOperation
    doubled = net.network.add_elementwise(net.constant(Z), net.constant(Z), e.SUM)
    layer = net.network.add_elementwise(x, doubled.get_output(0), e.PROD)
    made = net.plan(layer)
    assert [step.view.type for step in made._steps] == ["ELEMENTWISE"]
    np.testing.assert_array_equal(made.run({"x": X})["y0"], X * (Z + Z))


def test_unknown_dtypes_are_named():
    net = Net()
    x = net.input("x", trt.fp8, (-1, 4))
    with pytest.raises(
        UnsupportedError, match=r"tensor 'x' has the dtype FP8; .* knows FLOAT, HALF"
    ):
        net.plan(net.network.add_identity(x))


def test_a_misread_layer_is_reported(monkeypatch):
    """Every result is held against the dtype and rank that TensorRT infers."""
    from smoothl1_deploy.tensorrt.network import evaluator

    wrong = ("IUnaryLayer", lambda view, layer: lambda x: x.astype(np.float64))
    monkeypatch.setitem(evaluator._HANDLERS, "UNARY", wrong)
    with pytest.raises(
        UnsupportedError, match=r"evaluated to float64 of rank 2, .* float32 of rank"
    ):
        run_one(lambda n, t: n.network.add_unary(t, trt.UnaryOperation.ABS), {"x": X})
