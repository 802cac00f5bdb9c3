"""Small ONNX models through TensorRT's parser, against the ONNX project's own evaluator."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

pytest.importorskip("tensorrt_rtx")

from smoothl1_deploy.tensorrt.flavour import get_flavour
from smoothl1_deploy.tensorrt.network import plan
from smoothl1_deploy.tensorrt.parse import parse

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4)).astype(np.float32) * 2
Y = RNG.normal(size=(4,)).astype(np.float32)
CUBE = RNG.normal(size=(2, 4, 6)).astype(np.float32)
NAN, INF = np.nan, np.inf
EDGES = np.array([[0.0, -0.0, 2.5, -2.5], [INF, -INF, 3.5, -0.5]], np.float32)
INTS = np.array([[7, -7, 6, -6], [5, -5, 0, 1]], np.int64)
DIVISORS = np.array([3, 3, -4, -4], np.int64)
BOOLS = np.array([[True, False, True, False]] * 2)


def model_of(body, opset=18):
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> g {body}')


def network(body, opset=18):
    return parse(model_of(body, opset), get_flavour("tensorrt_rtx"))


def layer_types(parsed):
    types = parsed.trt.ILayer.type
    return {types.fget(parsed.network.get_layer(i)).name for i in range(parsed.network.num_layers)}


def unary(op, x="float[N,4]", y="float[N,4]"):
    return f"({x} x) => ({y} y) {{ y = {op} }}"


#: name -> (layers that must occur, graph, feeds, opset)
CASES = {
    **{
        op: ("UNARY", unary(f"{op}(x)"), {"x": np.abs(X) / 8 + (op == "Acosh")}, 18)
        for op in [
            "Exp",
            "Log",
            "Sqrt",
            "Reciprocal",
            "Sin",
            "Cos",
            "Tan",
            "Sinh",
            "Cosh",
            "Asin",
            "Acos",
            "Atan",
            "Asinh",
            "Acosh",
            "Atanh",
            "Erf",
        ]
    },
    **{
        op: ("UNARY", unary(f"{op}(x)"), {"x": EDGES}, 18)
        for op in ["Abs", "Neg", "Ceil", "Floor", "Sign", "Round"]
    },
    "Not": ("UNARY", unary("Not(x)", "bool[N,4]", "bool[N,4]"), {"x": BOOLS}, 18),
    "IsNaN": (
        "UNARY",
        unary("IsNaN(x)", y="bool[N,4]"),
        {"x": np.array([[NAN, INF, 0, 1]], np.float32)},
        20,
    ),
    "IsInf": ("UNARY", unary("IsInf(x)", y="bool[N,4]"), {"x": EDGES}, 20),
    **{
        op.split("<")[0]: ("ACTIVATION", unary(f"{op}(x)"), {"x": X}, 18)
        for op in [
            "Relu",
            "Sigmoid",
            "Tanh",
            "LeakyRelu<alpha=0.2>",
            "Elu<alpha=0.7>",
            "Selu<alpha=1.6,gamma=1.1>",
            "Softsign",
            "Softplus",
            "HardSigmoid<alpha=0.3,beta=0.4>",
            "HardSwish",
            "ThresholdedRelu<alpha=0.3>",
            "Mish",
        ]
    },
    "Gelu": ("ACTIVATION", unary("Gelu(x)"), {"x": X}, 20),
    "Gelu tanh": ("ACTIVATION", unary('Gelu<approximate="tanh">(x)'), {"x": X}, 20),
    "Clip": (
        "ACTIVATION",
        "(float[N,4] x) => (float[N,4] y) <float a={-1}, float b={0.5}> { y = Clip(x,a,b) }",
        {"x": X},
        18,
    ),
    "PRelu": (
        "PARAMETRIC_RELU",
        "(float[N,4] x, float[4] s) => (float[N,4] y) { y = PRelu(x,s) }",
        {"x": X, "s": Y},
        18,
    ),
    **{
        op: (
            "ELEMENTWISE",
            f"(float[N,4] x, float[4] z) => ({y}[N,4] y) {{ y = {op}(x,z) }}",
            {"x": np.abs(X) if op == "Pow" else X, "z": Y},
            18,
        )
        for op, y in [
            *((op, "float") for op in ["Add", "Sub", "Mul", "Div", "Pow", "Min", "Max"]),
            *((op, "bool") for op in ["Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"]),
        ]
    },
    **{
        op: (
            "ELEMENTWISE",
            f"(bool[N,4] x, bool[4] z) => (bool[N,4] y) {{ y = {op}(x,z) }}",
            {"x": BOOLS, "z": np.array([True, True, False, False])},
            18,
        )
        for op in ["And", "Or", "Xor"]
    },
    **{
        f"{op} of integers": (
            "ELEMENTWISE",
            f"(int64[N,4] x, int64[4] z) => (int64[N,4] y) {{ y = {op}(x,z) }}",
            {"x": INTS, "z": DIVISORS},
            18,
        )
        for op in ["Add", "Sub", "Mul", "Div", "Mod", "Mod<fmod=1>", "Min", "Max"]
    },
    "Mod of floats": (
        "SELECT",
        "(float[N,4] x, float[4] z) => (float[N,4] y) { y = Mod<fmod=1>(x,z) }",
        {"x": INTS.astype(np.float32), "z": DIVISORS.astype(np.float32)},
        18,
    ),
    "Where": (
        "SELECT",
        "(bool[N,4] c, float[N,4] x, float[4] z) => (float[N,4] y) { y = Where(c,x,z) }",
        {"c": BOOLS, "x": X[:2], "z": Y},
        18,
    ),
    **{
        f"Cast to {to}": (
            "CAST",
            f"({a}[N,4] x) => ({b}[N,4] y) {{ y = Cast<to={to}>(x) }}",
            {"x": x},
            18,
        )
        for to, a, b, x in [
            (1, "bool", "float", BOOLS),
            (1, "int64", "float", INTS * 12345678901),
            (6, "float", "int32", X * 100),
            (7, "float", "int64", X * 100),
            (9, "float", "bool", EDGES),
            (10, "float", "float16", X * 1e4),
            (16, "float", "bfloat16", X),
            (10, "int64", "float16", INTS * 4099),
            (1, "bfloat16", "float", X.astype(ml_dtypes.bfloat16)),
        ]
    },
    **{
        f"{op} {attributes}": (
            "REDUCE",
            f"(float[N,4] x) => (float{shape} y) <int64[{n}] a={{{axes}}}> "
            f"{{ y = {op}<keepdims={attributes}>(x,a) }}",
            {"x": np.abs(X) + 0.1},
            18,
        )
        for op in [
            "ReduceSum",
            "ReduceMean",
            "ReduceMax",
            "ReduceMin",
            "ReduceProd",
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceSumSquare",
        ]
        for attributes, shape, n, axes in [
            (0, "[N]", 1, "1"),
            (1, "[N,1]", 1, "-1"),
            (0, "", 2, "0,1"),
        ]
    },
    "ReduceProd of integers": (
        "REDUCE",
        "(int64[N,4] x) => (int64[N] y) <int64[1] a={1}> { y = ReduceProd<keepdims=0>(x,a) }",
        {"x": INTS},
        18,
    ),
    "ReduceMax of integers": (
        "REDUCE",
        "(int64[N,4] x) => (int64 y) { y = ReduceMax<keepdims=0>(x) }",
        {"x": INTS},
        18,
    ),
    "Gemm": (
        "MATRIX_MULTIPLY",
        "(float[N,4] x, float[5,4] w, float[5] b) => (float[N,5] y) "
        "{ y = Gemm<transB=1,alpha=0.5,beta=2.0>(x,w,b) }",
        {
            "x": X,
            "w": RNG.normal(size=(5, 4)).astype(np.float32),
            "b": np.arange(5, dtype=np.float32),
        },
        18,
    ),
    "MatMul of vectors": (
        "MATRIX_MULTIPLY",
        "(float[4] x, float[4] w) => (float y) { y = MatMul(x,w) }",
        {"x": X[0], "w": Y},
        18,
    ),
    "MatMul with a vector": (
        "SQUEEZE",
        "(float[N,4] x, float[4] w) => (float[N] y) { y = MatMul(x,w) }",
        {"x": X, "w": Y},
        18,
    ),
    "MatMul of a batch": (
        "MATRIX_MULTIPLY",
        "(float[2,N,6] x, float[6,3] w) => (float[2,N,3] y) { y = MatMul(x,w) }",
        {"x": CUBE, "w": RNG.normal(size=(6, 3)).astype(np.float32)},
        18,
    ),
    "Einsum": (
        "EINSUM",
        '(float[N,4] x, float[4] w) => (float[N] y) { y = Einsum<equation="ij,j->i">(x,w) }',
        {"x": X, "w": Y},
        18,
    ),
    "Softmax": ("SOFTMAX", unary("Softmax<axis=-1>(x)"), {"x": X}, 18),
    "Softmax of axis 0": ("SOFTMAX", unary("Softmax<axis=0>(x)"), {"x": X * 100}, 18),
    "LogSoftmax": ("SOFTMAX", unary("LogSoftmax<axis=-1>(x)"), {"x": X}, 18),
    "LayerNormalization": (
        "NORMALIZATION",
        "(float[N,4] x, float[4] s, float[4] b) => (float[N,4] y) "
        "{ y = LayerNormalization<axis=-1,epsilon=0.01>(x,s,b) }",
        {"x": X, "s": Y, "b": Y + 1},
        18,
    ),
    "InstanceNormalization": (
        "NORMALIZATION",
        "(float[N,4,6] x, float[4] s, float[4] b) => (float[N,4,6] y) "
        "{ y = InstanceNormalization(x,s,b) }",
        {"x": CUBE, "s": Y, "b": Y + 1},
        18,
    ),
    "GroupNormalization": (
        "NORMALIZATION",
        "(float[N,4,6] x, float[4] s, float[4] b) => (float[N,4,6] y) "
        "{ y = GroupNormalization<num_groups=2>(x,s,b) }",
        {"x": CUBE, "s": Y, "b": Y + 1},
        21,
    ),
    "BatchNormalization": (
        "SCALE",
        "(float[N,4,6] x) => (float[N,4,6] y) <float[4] s={1,2,3,4}, float[4] b={0,1,0,-1}, "
        "float[4] m={1,0,-1,2}, float[4] v={1,2,0.5,4}> { y = BatchNormalization(x,s,b,m,v) }",
        {"x": CUBE},
        15,
    ),
    "Concat": (
        "CONCATENATION",
        "(float[N,4] x, float[N,4] z) => (float[N,8] y) { y = Concat<axis=1>(x,z) }",
        {"x": X, "z": X + 1},
        18,
    ),
    "Split": (
        "SLICE",
        "(float[N,4] x) => (float[N,2] y, float[N,2] z) { y,z = Split<axis=1,num_outputs=2>(x) }",
        {"x": X},
        18,
    ),
    **{
        f"Slice {start}:{end}:{step}": (
            "SLICE",
            f"(float[N,4] x) => (float[M,4] y) <int64[1] s={{{start}}}, int64[1] e={{{end}}}, "
            f"int64[1] a={{0}}, int64[1] t={{{step}}}> {{ y = Slice(x,s,e,a,t) }}",
            {"x": X},
            18,
        )
        for start, end, step in [(0, 2, 1), (1, 100, 1), (-1, -100, -1), (0, 3, 2), (2, 1, 1)]
    },
    **{
        f"Pad {mode}": (
            "SLICE",
            f"(float[N,4] x) => (float[N,8] y) <int64[4] p={{0,1,0,3}}, float c={{3}}> "
            f'{{ y = Pad<mode="{mode}">(x,p,c) }}',
            {"x": X},
            21,
        )
        for mode in ("constant", "reflect", "edge", "wrap")
    },
    "Tile": (
        "SLICE",
        "(float[N,4] x) => (float[N,8] y) <int64[2] p={1,2}> { y = Tile(x,p) }",
        {"x": X},
        18,
    ),
    "Expand": (
        "SLICE",
        "(float[4] x, float[N,4] z) => (float[N,4] y) { s = Shape(z) y = Expand(x,s) }",
        {"x": Y, "z": X},
        18,
    ),
    "ConstantOfShape": (
        "SLICE",
        "(float[N,4] x) => (float[N,4] y) "
        "{ s = Shape(x) y = ConstantOfShape<value=float[1]{7.0}>(s) }",
        {"x": X},
        18,
    ),
    **{f"Trilu {n}": ("FILL", unary(f"Trilu<upper={n}>(x)"), {"x": X}, 18) for n in (0, 1)},
    "Range": (
        "FILL",
        "(int64 n) => (int64[M] y) <int64 a={3}, int64 d={2}> { y = Range(a,n,d) }",
        {"n": np.array(10)},
        18,
    ),
    "Gather": (
        "GATHER",
        "(float[N,4] x) => (float[N,2,1] y) <int64[2,1] i={0,-1}> { y = Gather<axis=1>(x,i) }",
        {"x": X},
        18,
    ),
    "GatherElements": (
        "GATHER",
        "(float[N,4] x, int64[N,2] i) => (float[N,2] y) { y = GatherElements<axis=1>(x,i) }",
        {"x": X, "i": np.array([[0, -1], [2, 2], [-4, 1]])},
        18,
    ),
    "GatherND": (
        "GATHER",
        "(float[N,4] x, int64[M,1] i) => (float[M,4] y) { y = GatherND(x,i) }",
        {"x": X, "i": np.array([[2], [0]])},
        18,
    ),
    "Transpose": (
        "SHUFFLE",
        "(float[N,4,6] x) => (float[6,N,4] y) { y = Transpose<perm=[2,0,1]>(x) }",
        {"x": CUBE},
        18,
    ),
    "DepthToSpace": (
        "SHUFFLE",
        "(float[N,4,2,3] x) => (float[N,1,4,6] y) { y = DepthToSpace<blocksize=2>(x) }",
        {"x": CUBE.reshape(2, 4, 2, 3)},
        18,
    ),
    "Reshape": (
        "SHUFFLE",
        "(float[N,4] x) => (float[N,2,2] y) <int64[3] s={0,2,-1}> { y = Reshape(x,s) }",
        {"x": X},
        18,
    ),
    "Reshape at run time": (
        "SHUFFLE",
        "(float[N,4] x, int64[2] s) => (float[A,B] y) { y = Reshape(x,s) }",
        {"x": X, "s": np.array([2, -1])},
        18,
    ),
    "Reshape to rank 0": (
        "SHUFFLE",
        "(float[1,1] x) => (float y) <int64[0] s={}> { y = Reshape(x,s) }",
        {"x": X[:1, :1]},
        18,
    ),
    "Flatten": (
        "SHUFFLE",
        unary("Flatten<axis=1>(x)", "float[N,4,6]", "float[N,24]"),
        {"x": CUBE},
        18,
    ),
    "Squeeze": (
        "SQUEEZE",
        "(float[N,1,4] x) => (float[N,4] y) <int64[1] a={1}> { y = Squeeze(x,a) }",
        {"x": X[:1, None]},
        18,
    ),
    "Squeeze of all": (
        "SQUEEZE",
        unary("Squeeze(x)", "float[3,1,4]", "float[3,4]"),
        {"x": X[:, None]},
        18,
    ),
    "Unsqueeze": (
        "UNSQUEEZE",
        "(float[N,4] x) => (float[1,N,4,1] y) <int64[2] a={0,-1}> { y = Unsqueeze(x,a) }",
        {"x": X},
        18,
    ),
    "Shape": ("SHAPE", unary("Shape(x)", y="int64[2]"), {"x": X}, 18),
    "Identity": ("IDENTITY", unary("Identity(x)"), {"x": X}, 18),
    "ArgMax": (
        "TOPK",
        "(float[N,4] x) => (int64[N] y) { y = ArgMax<axis=1,keepdims=0>(x) }",
        {"x": np.round(X)},
        18,
    ),
    **{
        f"TopK {largest} of {dtype}": (
            "TOPK",
            f"({dtype}[N,4] x) => ({dtype}[N,3] v, int64[N,3] i) <int64[1] k={{3}}> "
            f"{{ v,i = TopK<axis=1,largest={largest}>(x,k) }}",
            {"x": x},
            18,
        )
        for largest in (0, 1)
        for dtype, x in [("float", X), ("int64", INTS)]
    },
    "Mean": (
        "ELEMENTWISE",
        "(float[N,4] x, float[4] z) => (float[N,4] y) { y = Mean(x,z) }",
        {"x": X, "z": Y},
        18,
    ),
    "GlobalAveragePool": (
        "REDUCE",
        "(float[N,4,2,3] x) => (float[N,4,1,1] y) { y = GlobalAveragePool(x) }",
        {"x": CUBE.reshape(2, 4, 2, 3)},
        18,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_layer_agrees_with_onnx(name):
    layer, body, feeds, opset = CASES[name]
    parsed = network(body, opset)
    assert layer in layer_types(parsed)
    expected = ReferenceEvaluator(model_of(body, opset)).run(None, feeds)
    outputs = plan(parsed).run(feeds)
    for got, want in zip(outputs.values(), expected, strict=True):
        want = np.asarray(want)
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        if got.dtype.kind in "biu" or layer in ("CAST", "SHUFFLE", "SLICE", "GATHER", "SELECT"):
            np.testing.assert_array_equal(got, want)
        else:
            np.testing.assert_allclose(got, want, rtol=3e-6, atol=3e-6)
