"""What the evaluator makes of the corners: rounding, empty axes, NaN, indices outside, errors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

pytest.importorskip("tensorrt_rtx")

from smoothl1_deploy.errors import InvalidInputError, UnsupportedError
from smoothl1_deploy.tensorrt.flavour import get_flavour
from smoothl1_deploy.tensorrt.network import plan
from smoothl1_deploy.tensorrt.parse import parse

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4)).astype(np.float32) * 2
Y = RNG.normal(size=(4,)).astype(np.float32)
NAN, INF = np.nan, np.inf


def model_of(body, opset=18):
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> g {body}')


def network(body, opset=18):
    return parse(model_of(body, opset), get_flavour("tensorrt_rtx"))


def unary(op, x="float[N,4]", y="float[N,4]"):
    return f"({x} x) => ({y} y) {{ y = {op} }}"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
def test_half_arithmetic_rounds_once(op, dtype):
    """Against the exact result in float64, rounded once: every layer in its own dtype."""
    element = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    body = f"({dtype}[N] x, {dtype}[N] z) => ({dtype}[N] y) {{ y = {op}(x,z) }}"
    x, z = RNG.normal(size=(2, 4000)).astype(element)
    exact = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide}[op]
    want = exact(x.astype(np.float64), z.astype(np.float64)).astype(element)
    got = plan(network(body)).run({"x": x, "z": z})["y"]
    assert got.dtype == element
    # numpy rounds float64 to the half formats by way of float32: a tie in 2^13 may differ.
    assert (got != want).sum() <= 1


def test_a_sum_is_the_exact_one_rounded_once():
    """2^24 + 1 - 2^24 in float32: one pass in order would lose the 1."""
    body = "(float[N] x) => (float y) <int64[1] a={0}> { y = ReduceSum<keepdims=0>(x,a) }"
    x = np.array([2.0**24, 1, -(2.0**24)], np.float32)
    assert plan(network(body)).run({"x": x})["y"] == 1
    half = "(float16[N] x) => (float16 y) <int64[1] a={0}> { y = ReduceMean<keepdims=0>(x,a) }"
    big = np.full(64, 60000, np.float16)  # the sum overflows float16, the mean doesn't
    assert plan(network(half)).run({"x": big})["y"] == 60000


@pytest.mark.parametrize(("dtype", "values"), [("float16", (2048, 2050)), ("bfloat16", (256, 258))])
def test_the_rounding_to_a_half_format_is_not_done_twice(dtype, values):
    """Just above the middle of two neighbours: by way of float32 it would be the middle."""
    element = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    body = f"({dtype}[N] x) => ({dtype} y) <int64[1] a={{0}}> {{ y = ReduceSum<keepdims=0>(x,a) }}"
    x = np.array([values[0], 1, 2.0**-24], element)
    assert plan(network(body)).run({"x": x})["y"] == values[1]


def test_the_first_of_equal_elements_wins():
    body = "(float[N] x) => (float[9] v, int64[9] i) <int64[1] k={9}> { v,i = TopK(x,k) }"
    x = np.resize(np.array([1, 0, 2], np.float32), 300)
    out = plan(network(body)).run({"x": x})
    assert out["i"].tolist() == list(range(2, 27, 3))


@pytest.mark.parametrize(
    ("op", "empty"),
    [("Sum", 0.0), ("Prod", 1.0), ("Max", -INF), ("Min", INF), ("Mean", NAN)],
)
def test_reductions_of_nothing(op, empty):
    body = (
        f"(float[N,4] x) => (float[4] y) <int64[1] a={{0}}> {{ y = Reduce{op}<keepdims=0>(x,a) }}"
    )
    got = plan(network(body)).run({"x": np.zeros((0, 4), np.float32)})["y"]
    np.testing.assert_array_equal(got, np.full(4, empty, np.float32))


def test_casts_to_integers_saturate():
    """NVIDIA/TensorRT#4775: NaN becomes 0, what is too large the bound."""
    x = np.array([NAN, INF, -INF, 3e9, -3e9, 2.9, -2.9], np.float32)
    got = plan(network("(float[N] x) => (int32[N] y) { y = Cast<to=6>(x) }")).run({"x": x})["y"]
    top, bottom = 2**31 - 1, -(2**31)
    assert got.tolist() == [0, top, bottom, top, bottom, 2, -2]


def test_an_open_clip_ends_at_the_largest_float():
    """The parser writes FLT_MAX for a bound that is left out: what TensorRT makes of the graph."""
    body = "(float[N] x) => (float[N] y) <float a={-1}> { y = Clip(x,a) }"
    got = plan(network(body)).run({"x": np.array([INF, -INF], np.float32)})["y"]
    assert got.tolist() == [np.finfo(np.float32).max, -1]


def test_gather_outside_the_axis():
    body = "(float[N,4] x, int64[M] i) => (float[M,4] y) { y = Gather<axis=0>(x,i) }"
    run = plan(network(body)).run
    got = run({"x": X, "i": np.array([2, 3])})["y"]
    np.testing.assert_array_equal(got, [X[2], np.zeros(4)])  # zero, as NvInfer.h documents it
    with pytest.raises(InvalidInputError, match=r"GATHER reads the indices -1 to -1 of axis 0"):
        run({"x": X, "i": np.array([-1])})
    assert run({"x": X[:0], "i": np.array([0])})["y"].tolist() == [[0.0] * 4]


def test_shapes_that_do_not_fit_name_the_layer():
    body = "(float[N] x, float[M] z) => (float[K] y) { y = Add(x,z) }"
    with pytest.raises(
        InvalidInputError, match=r"layer '.*' of type ELEMENTWISE .* \(3,\), \(4,\)"
    ):
        plan(network(body)).run({"x": X[:, 0], "z": Y})


def test_unknown_layer_is_named():
    body = (
        "(float[N,1,2,2] x) => (float[N,1,1,1] y) <float[1,1,2,2] w={1,2,3,4}> "
        "{ [conv_head] y = Conv(x,w) }"
    )
    with pytest.raises(
        UnsupportedError, match=r"the layer 'conv_head' of type CONVOLUTION .*'ort-cpu' here, or"
    ):
        plan(network(body))


def test_bfloat16_constants_cannot_be_read():
    body = "(bfloat16[N] x) => (bfloat16[N] y) <bfloat16 c={2}> { y = Mul(x,c) }"
    parsed = network(body)
    with pytest.raises(UnsupportedError, match=r"'c' of type CONSTANT holds constants of bfloat16"):
        plan(parsed)
    two = np.array(2, ml_dtypes.bfloat16)
    got = plan(parsed, constants={"c": two}).run({"x": np.array([3], ml_dtypes.bfloat16)})
    assert got["y"] == 6


@pytest.mark.parametrize(
    ("default", "explicit", "by"),
    [
        ("Selu(x)", "Selu<alpha=1.67326319,gamma=1.05070102>(x)", 1e-5),  # it takes opset 1's
        ("Trilu(x)", "Trilu<upper=1>(x)", 1.0),  # it takes upper=0
    ],
)
def test_shows_where_the_parser_departs_from_onnx(default, explicit, by):
    """Two defaults of attributes that the parser of tensorrt_rtx 1.7 has wrong: found like this."""
    if not get_flavour("tensorrt_rtx").version.startswith("1.7."):
        pytest.skip("seen in tensorrt_rtx 1.7")
    want = ReferenceEvaluator(model_of(unary(default))).run(None, {"x": X})[0]
    got, right = (plan(network(unary(op))).run({"x": X})["y"] for op in (default, explicit))
    np.testing.assert_allclose(right, want, rtol=3e-6)
    assert np.abs(got - want).max() > by
