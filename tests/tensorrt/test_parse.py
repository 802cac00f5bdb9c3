"""float64 is refused or narrowed in plain sight; the parsed network is what the graph declares."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import onnx
import onnx.inliner
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from smoothl1_deploy import LossSpec, export, load
from smoothl1_deploy.errors import ArtefactError, BuildError, UnsupportedError
from smoothl1_deploy.graph._metadata import read_spec
from smoothl1_deploy.tensorrt._parse import parse
from smoothl1_deploy.tensorrt._prepare import prepare

FLOAT, DOUBLE = TensorProto.FLOAT, TensorProto.DOUBLE
# One export by the torch route stands for all: it takes a second.
NARROWED = [
    *itertools.product(("function", "inlined"), (("N", 16), (4, 16), ()), ("float32", "float16")),
    ("torch", (4, 16), "float16"),
]


def model(text):
    """A model from onnx's text; `f` is a domain of its functions."""
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 25, "f" : 1]> g {text}')


def doubles(made):
    """Every value of float64 that shape inference finds in the graph, functions inlined."""
    flat = onnx.inliner.inline_local_functions(made)
    inferred = onnx.shape_inference.infer_shapes(flat, strict_mode=True).graph
    values = [*inferred.input, *inferred.output, *inferred.value_info]
    return [v.name for v in values if v.type.tensor_type.elem_type == DOUBLE]


# What is narrowed


@pytest.mark.parametrize(("route", "shape", "dtype"), NARROWED, ids=str)
def test_accumulators_are_narrowed_and_named(route, shape, dtype):
    original = export(LossSpec(beta=0.5, reduction="mean", dtype=dtype), route, shape)
    assert doubles(original)  # else there is nothing to see here
    before = original.SerializeToString()
    prepared, notes = prepare(original)
    assert doubles(prepared) == []
    assert original.SerializeToString() == before
    assert notes[0].startswith("computes in float32 on TensorRT, which has no float64: Cast to")
    if route == "function":
        assert notes[0].endswith("in WideSum/WideSum_tmp, WideMean/WideMean_tmp_1")
    # Neither refused as changed nor taken for what was exported.
    assert (read_spec(prepared), read_spec(original) is None) == (None, False)
    onnx.checker.check_model(prepared, full_check=True)


def test_declarations_of_inner_values_are_narrowed_too():
    original = onnx.shape_inference.infer_shapes(export(LossSpec(), "inlined", ("N",)))
    prepared, _ = prepare(original)
    for made, some in ((original, True), (prepared, False)):
        kinds = {v.type.tensor_type.elem_type for v in made.graph.value_info}
        assert (DOUBLE in kinds) == some
    onnx.checker.check_model(prepared, full_check=True)


def test_without_float64_the_model_is_itself():
    original = export(LossSpec(reduction="none"), shape=("N",))
    prepared, notes = prepare(original)
    assert prepared is original and notes == ()


def test_subgraphs_are_narrowed_too():
    branch = "() => (float b) <double[N] d> { d = Cast<to=11>(x) [back] b = Cast<to=1>(d) }"
    made = model(
        "(float[N] x, bool c) => (float[M] y) "
        f"{{ [the_if] y = If<then_branch = t {branch}, else_branch = e {branch}>(c) }}"
    )
    prepared, notes = prepare(made)
    assert "the_if/d" in notes[0]
    for attribute in prepared.graph.node[0].attribute:
        assert attribute.g.value_info[0].type.tensor_type.elem_type == FLOAT
        assert [helper.get_node_attr_value(n, "to") for n in attribute.g.node] == [FLOAT, FLOAT]


AS = """ <domain: "f", opset_import: ["" : 25]> As <to> (a) => (b) { b = Cast<to: int = @to>(a) }"""


def test_an_element_type_handed_to_a_function_is_found():
    made = model("(float[N] x) => (float[N] y) { d = f.As<to=11>(x) y = Cast<to=1>(d) }" + AS)
    assert doubles(made) == ["d"]
    prepared, notes = prepare(made)
    assert doubles(prepared) == []
    assert "computes in float32" in notes[0]


HANDED_ON = """(float[N] x, float[N] y) => (float[N] z) {
        d = Sub(x, y)
        z = f.Outer<scale: float = 3.0>(d)
    }
<domain: "f", opset_import: ["" : 18, "f" : 1]> Outer <scale> (x) => (y) {
    y = f.Inner<scale: float = @scale>(x)
}
<domain: "f", opset_import: ["" : 18]> Inner <scale> (x) => (y) {
    s = Constant<value_float: float = @scale>()
    y = Mul(x, s)
}
"""


def test_what_a_function_hands_on_to_another_by_reference_is_not_lost(rtx):
    """TensorRT's parser would compute with 0 in its place."""
    made = model(HANDED_ON)
    made.opset_import[0].version = 18
    runner = load(made, "trt-network", input_name="x", target_name="y")
    (got,) = runner.run(np.full(2, 5, "f4"), np.full(2, 1, "f4")).values()
    assert got.tolist() == [12, 12]


def test_exact_constants_are_narrowed_and_nan_is_exact():
    body = "{ d = Cast<to=11>(x) %s p = Mul(d, s) y = Cast<to=1>(p) }"
    for number, as_node in itertools.product((0.25, np.nan, [0.5, np.inf]), (True, False)):
        scalar = numpy_helper.from_array(np.asarray(number, np.float64), "s")
        made = model("(float[N] x) => (float[N] y) " + body % ("s = Constant()" * as_node))
        if as_node:
            made.graph.node[1].attribute.append(helper.make_attribute("value", scalar))
        else:
            made.graph.initializer.append(scalar)
        prepared, notes = prepare(made)
        assert doubles(prepared) == []
        assert notes[1] == "float64 constants, exact in float32, became float32: s"


# What is refused


def test_float64_losses_are_refused_with_reason_and_remedy():
    for route, reduction in itertools.product(("function", "inlined"), ("none", "mean")):
        with pytest.raises(UnsupportedError) as caught:
            prepare(export(LossSpec(dtype="float64", reduction=reduction), route, ("N",)))
        text = str(caught.value)
        assert text.startswith("the graph input 'input' is float64. TensorRT has no float64")
        assert "silently compute in float32" in text
        assert "Export in float32, or run this model on ONNX Runtime" in text


WIDE = "(float[N] x) => (float[N] y) %s { d = Cast<to=11>(x) e = Mul(d, s) y = Cast<to=1>(e) }"
NOISE = """ <domain: "f", opset_import: ["" : 25]> Noise <dtype> (a) => (b)
    { b = RandomNormalLike<dtype: int = @dtype>(a) }"""
REFUSED = {
    "graph output 'd' is float64": "(float[N] x) => (double[N] d) { d = Cast<to=11>(x) }",
    r"constant 's' holds the float64 0\.7, ": WIDE % "<double[2] s = {0.5, 0.7}>",
    r"constant 'd' holds the float64 0\.7, ": (
        "(float[N] x) => (float[2] y) { d = Constant<value = double[2] {0.5, 0.7}>() "
        "y = Cast<to=1>(d) }"
    ),
    r"'s' holds the float64 0\.333333333333, which float32 can't hold": (
        WIDE % "<double s = {0.333333333333}>"
    ),
    r"'s' holds the float64 1e\+300": WIDE % "<double s = {1e300}>",
    r"'d' \(RandomNormalLike\) makes float64 \(attribute dtype\)": (
        "(float[N] x) => (float[N] y) { d = RandomNormalLike<dtype=11>(x) y = Cast<to=1>(d) }"
    ),
    r"'d' \(BitCast\) makes float64 \(attribute to\)": (
        "(int64[N] x) => (float[N] y) { d = BitCast<to=11>(x) y = Cast<to=1>(d) }"
    ),
    r"'y' \(LayerNormalization\) makes float64 \(attribute stash_type\)": (
        "(float[N] x) => (float[N] y) { y = LayerNormalization<stash_type=11>(x, x) }"
    ),
    r"RandomNormalLike\) makes float64 \(attribute dtype\)": (
        "(float[N] x) => (float[N] y) { d = f.Noise<dtype=11>(x) y = Cast<to=1>(d) }" + NOISE
    ),
    r"'x' has an unknown rank, which TensorRT would take for rank 0. Export with a shape": (
        "(float[] x) => (float[N] y) { y = Abs(x) }"
    ),
    "graph input 'x' is no tensor": (
        "(seq(float[N]) x) => (float[N] y) { y = ConcatFromSequence<axis=0>(x) }"
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_tensorrt_would_misread_is_refused(message):
    made = model(REFUSED[message])
    if "unknown rank" in message:
        made.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(UnsupportedError, match=message):
        prepare(made)


def test_sparse_constants_of_float64_are_refused():
    indices = numpy_helper.from_array(np.array([1]), "indices")
    sparse = helper.make_sparse_tensor(numpy_helper.from_array(np.array([0.5]), "s"), indices, [3])
    made = model(WIDE % "")
    made.graph.sparse_initializer.append(sparse)
    with pytest.raises(UnsupportedError, match="the constant 's' is float64"):
        prepare(made)
    made = model("(float[N] x) => (float[N] y) { d = Constant() y = Cast<to=1>(d) }")
    made.graph.node[0].attribute.append(helper.make_attribute("sparse_value", sparse))
    with pytest.raises(UnsupportedError, match=r"\(Constant\) makes float64 \(attribute sparse_v"):
        prepare(made)


def test_a_function_called_without_its_attribute_is_refused():
    made = model("(float[N] x) => (float[N] y) { y = f.As(x) }" + AS)
    with pytest.raises(ArtefactError, match=r"'y' calls As without the attribute\(s\) to"):
        prepare(made)


def test_an_empty_model_is_refused():
    with pytest.raises(ArtefactError, match="has no outputs"):
        prepare(onnx.ModelProto())


# What the parser makes


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_network_has_the_ports_that_the_graph_declares(rtx, dtype):
    shapes = ((), ("N",), (0,), (2, 3, 4, 5))
    for reduction, shape in itertools.product(("none", "mean", "sum"), shapes):
        made = export(LossSpec(beta=0.5, reduction=reduction, dtype=dtype), shape=shape)
        parsed = parse(made, rtx)
        assert parsed.network.name == made.graph.name
        dims = tuple(-1 if isinstance(d, str) else d for d in shape)
        ports = [(p.name, p.dtype, p.shape) for p in (*parsed.inputs, *parsed.outputs)]
        out = dims if reduction == "none" else ()
        assert ports == [("input", dtype, dims), ("target", dtype, dims), ("loss", dtype, out)]
        assert bool(parsed.notes) == (reduction != "none")


ABS = "(float[N] x) => (float[N] y) { y = Abs(x) }"


def test_a_network_has_the_same_name_each_time_and_axes_keep_theirs(rtx):
    made = model(ABS)
    made.graph.name = ""
    name = parse(made, rtx).network.name
    assert name.startswith("graph_") and len(name) == len("graph_") + 16
    assert parse(copy.deepcopy(made), rtx).network.name == name
    parsed = parse(export(LossSpec(reduction="none"), shape=("N", 16)), rtx)
    assert str(parsed.inputs[0]) == "input: float32[N, 16]"


PARSER_ERRORS = {
    r"node 'foo' \(operator Foo\).*Express the node in operators TensorRT supports, or run": (
        "(float[N] x) => (float[N] y) { [foo] y = Foo(x) }"
    ),
    r"node 'det' \(operator Det\): UNSUPPORTED_NODE": (
        "(float[2,2] x) => (float y) { [det] y = Det(x) }"
    ),
    r"operator Det, inside .*Outer": (
        "(float[2,2] x) => (float y) { y = f.Outer(x) }"
        ' <domain: "f", opset_import: ["" : 18]> Outer (a) => (b) { b = Det(a) }'
    ),
    r"\(operator ReduceSum\).*can't reduce a tensor of rank 0: Reshape it to \(-1,\) first": (
        "(float x) => (float y) { y = ReduceSum(x) }"
    ),
    r"\(operator Add\).*promotes nothing: cast both inputs of the node to one dtype": (
        "(float[N] x, float16[N] h) => (float[N] y) { y = Add(x, h) }"
    ),
    "before any node: ": ("(float[N] x) => (float[1] y) <int16[1] c = {1}> { y = Cast<to=1>(c) }"),
}


@pytest.mark.parametrize("message", PARSER_ERRORS)
def test_parser_errors_name_node_operator_and_remedy(rtx, message):
    made = model(PARSER_ERRORS[message])
    made.opset_import[0].version = 18
    with pytest.raises(BuildError, match=message) as caught:
        parse(made, rtx)
    assert str(caught.value).startswith("tensorrt_rtx 1.")
    assert "cudaError" not in str(caught.value)  # the missing GPU is not the reason


def test_a_gradient_of_axes_that_meet_unknown_says_what_to_export(rtx):
    for route in ("function", "inlined"):
        made = export(LossSpec(gradient=True), route, ("N", 4), target_shape=("M", 4))
        with pytest.raises(BuildError, match="no NonZero.*export with a size of 1 or one name for"):
            parse(made, rtx)


def test_an_input_of_a_type_that_tensorrt_lacks_is_named(rtx):
    for element in ("INT16", "UINT32", "STRING"):
        made = model(f"({element.lower()}[N] x) => ({element.lower()}[N] y) {{ y = Identity(x) }}")
        with pytest.raises(UnsupportedError, match=f"the graph input 'x' is {element}.*cast it"):
            parse(made, rtx)


def test_a_false_element_type_is_refused(rtx):
    with pytest.raises(UnsupportedError, match="'y' as FLOAT16, TensorRT made it FLOAT"):
        parse(model("(float[N] x) => (float16[N] y) { y = Abs(x) }"), rtx)


def test_of_a_false_shape_the_nodes_are_believed_and_a_note_says_so(rtx):
    for declared, shape, got in (("N,3", "N", (-1,)), ("3", "4", (4,))):
        parsed = parse(model(f"(float[{shape}] x) => (float[{declared}] y) {{ y = Abs(x) }}"), rtx)
        assert parsed.outputs[0].shape == got
        assert "the model declares 'y' with the shape (" in parsed.notes[0]


def test_a_shape_that_tensorrt_alone_contradicts_is_refused(rtx):
    """onnx's inference doesn't follow numbers through Abs, and TensorRT does."""
    made = model(
        "(float[2,2] x) => (float[3] y) <float[1] size = {-4}> "
        "{ positive = Abs(size) shape = Cast<to=7>(positive) y = Reshape(x, shape) }"
    )
    with pytest.raises(UnsupportedError, match=r"with the shape \[3\], TensorRT made it \[4\]"):
        parse(made, rtx)


def test_a_parser_that_narrows_is_caught(fake, monkeypatch):
    # What would happen if `prepare` let a float64 input through: the fake narrows it, as
    # TensorRT does, and the comparison of the ports sees it.
    monkeypatch.setattr("smoothl1_deploy.tensorrt._parse.prepare", lambda m: (m, ()))
    made = export(LossSpec(dtype="float64", reduction="none"), "inlined", ("N",))
    with pytest.raises(UnsupportedError, match="'input' as DOUBLE, TensorRT made it FLOAT"):
        parse(made, fake("10.16.1"))


def test_a_network_without_the_graph_s_inputs_is_refused(fake, monkeypatch):
    flavour = fake("10.16.1")
    # TensorRT's parser says True to b"xx" and leaves the network empty (tried with 1.7.1).
    monkeypatch.setattr(flavour.trt.OnnxParser, "parse", lambda self, data: True)
    with pytest.raises(UnsupportedError, match=r"the graph's inputs are \['x'\], those of.*\[\]"):
        parse(model(ABS), flavour)
