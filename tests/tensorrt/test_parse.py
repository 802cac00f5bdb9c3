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
from smoothl1_deploy.graph.metadata import read_spec
from smoothl1_deploy.tensorrt.flavour import get_flavour
from smoothl1_deploy.tensorrt.parse import parse, prepare

FLOAT, HALF, DOUBLE = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE
# One export by the torch route stands for all: it takes a second.
NARROWED = [
    *itertools.product(("function", "inlined"), (("N", 16), (4, 16), ()), ("float32", "float16")),
    ("torch", (4, 16), "float16"),
]


def value(name, element=FLOAT, shape=("N",)):
    return helper.make_tensor_value_info(name, element, shape)


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs, outputs, name=f"the_{op.lower()}", **attributes)


def model(nodes, inputs=None, outputs=None, functions=(), initializer=()):
    graph = helper.make_graph(
        nodes, "graph", inputs or [value("x")], outputs or [value("y")], initializer
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)


def doubles(made):
    """Every value of float64 that shape inference finds in the graph, functions inlined."""
    flat = onnx.inliner.inline_local_functions(made)
    inferred = onnx.shape_inference.infer_shapes(flat, strict_mode=True).graph
    values = [*inferred.input, *inferred.output, *inferred.value_info]
    return [v.name for v in values if v.type.tensor_type.elem_type == DOUBLE]


# --- prepare: what is narrowed ---------------------------------------------------------------


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


def test_the_narrowed_model_computes_the_same_to_float32():
    ort = pytest.importorskip("onnxruntime")
    original = export(LossSpec(beta=0.5, reduction="mean"), shape=("N",))
    prepared, _ = prepare(original)
    rng = np.random.default_rng(0)
    feeds = {n: rng.normal(size=1000).astype(np.float32) for n in ("input", "target")}
    results = [
        ort.InferenceSession(m.SerializeToString()).run(None, feeds)[0]
        for m in (original, prepared)
    ]
    np.testing.assert_allclose(*results, rtol=1e-6)


def test_notes_on_inner_values_are_narrowed_too():
    original = onnx.shape_inference.infer_shapes(export(LossSpec(), "inlined", ("N",)))
    assert any(v.type.tensor_type.elem_type == DOUBLE for v in original.graph.value_info)
    prepared, _ = prepare(original)
    assert not any(v.type.tensor_type.elem_type == DOUBLE for v in prepared.graph.value_info)
    onnx.checker.check_model(prepared, full_check=True)


def test_without_float64_the_model_is_itself():
    original = export(LossSpec(reduction="none"), shape=("N",))
    assert prepare(original) == (original, ())
    assert prepare(original)[0] is original


def test_subgraphs_are_narrowed_too():
    branch = helper.make_graph(
        [node("Cast", ["x"], ["d"], to=DOUBLE), node("Cast", ["d"], ["b"], to=FLOAT)],
        "branch",
        [],
        [value("b", FLOAT, None)],
        value_info=[value("d", DOUBLE)],
    )
    made = model(
        [
            node("ReduceMax", ["x"], ["m"], keepdims=0),
            node("Cast", ["m"], ["c"], to=TensorProto.BOOL),
            node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
        ],
        outputs=[value("y", FLOAT, ("M",))],
    )
    prepared, notes = prepare(made)
    assert "the_if/the_cast" in notes[0]
    for attribute in prepared.graph.node[2].attribute:
        assert attribute.g.value_info[0].type.tensor_type.elem_type == FLOAT
        assert [helper.get_node_attr_value(n, "to") for n in attribute.g.node] == [FLOAT, FLOAT]


def test_an_element_type_handed_to_a_function_is_found():
    cast = node("Cast", ["a"], ["b"])
    cast.attribute.append(onnx.AttributeProto(name="to", ref_attr_name="to", type=2))
    function = helper.make_function(
        "local", "As", ["a"], ["b"], [cast], [helper.make_opsetid("", 18)], ["to"]
    )
    made = model(
        [
            node("As", ["x"], ["d"], domain="local", to=DOUBLE),
            node("Cast", ["d"], ["y"], to=FLOAT),
        ],
        functions=[function],
    )
    assert doubles(made) == ["d"]
    prepared, notes = prepare(made)
    assert doubles(prepared) == []
    assert "computes in float32" in notes[0]


@pytest.mark.parametrize("number", [0.25, np.nan])
@pytest.mark.parametrize("as_node", [True, False])
def test_an_exact_scalar_is_narrowed_and_nan_is_exact(as_node, number):
    scalar = numpy_helper.from_array(np.float64(number), "scalar")
    constant = helper.make_node("Constant", [], ["scalar"], name="scalar", value=scalar)
    nodes = [
        node("Cast", ["x"], ["d"], to=DOUBLE),
        node("Mul", ["d", "scalar"], ["p"]),
        node("Cast", ["p"], ["y"], to=FLOAT),
    ]
    made = model([constant, *nodes]) if as_node else model(nodes, initializer=[scalar])
    prepared, notes = prepare(made)
    assert doubles(prepared) == []
    assert notes[1] == "float64 scalars, exact in float32, became float32: scalar"


# --- prepare: what is refused ----------------------------------------------------------------


@pytest.mark.parametrize("route", ["function", "inlined"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_float64_losses_are_refused_with_reason_and_remedy(route, reduction):
    made = export(LossSpec(dtype="float64", reduction=reduction), route, ("N",))
    with pytest.raises(UnsupportedError) as caught:
        prepare(made)
    text = str(caught.value)
    assert text.startswith("the graph input 'input' is float64. TensorRT has no float64")
    assert "silently compute in float32" in text
    assert "Export with dtype='float32', or run this model on ONNX Runtime" in text


def refused_models():
    narrow = node("Cast", ["d"], ["y"], to=FLOAT)
    widen = node("Cast", ["x"], ["d"], to=DOUBLE)
    vector = numpy_helper.from_array(np.array([0.5, 1.0]), "vector")
    third = numpy_helper.from_array(np.float64(1 / 3), "third")
    huge = numpy_helper.from_array(np.float64(1e300), "huge")
    yield "output", model([widen], outputs=[value("d", DOUBLE)]), "graph output 'd' is float64"
    yield (
        "initializer",
        model([widen, node("Add", ["d", "vector"], ["e"])], initializer=[vector]),
        r"constant 'vector' is float64 of shape \(2,\)",
    )
    yield (
        "constant node",
        model([node("Constant", [], ["d"], value=vector), narrow]),
        r"constant 'the_constant' is float64 of shape \(2,\)",
    )
    yield (
        "inexact scalar",
        model([widen, node("Mul", ["d", "third"], ["e"])], initializer=[third]),
        r"'third' is the float64 0\.3333333333333333, which float32 can't hold",
    )
    yield (
        "overflowing scalar",
        model([widen, node("Mul", ["d", "huge"], ["e"])], initializer=[huge]),
        r"'huge' is the float64 1e\+300",
    )
    yield (
        "element type attribute",
        model([node("RandomNormalLike", ["x"], ["d"], dtype=DOUBLE), narrow]),
        r"'the_randomnormallike' \(RandomNormalLike\) makes float64 \(attribute dtype\)",
    )
    yield (
        "bits as float64",
        model([node("BitCast", ["x"], ["d"], to=DOUBLE), narrow], [value("x", TensorProto.INT64)]),
        r"'the_bitcast' \(BitCast\) makes float64 \(attribute to\)",
    )
    yield (
        "float64 inside a layer",
        model([node("LayerNormalization", ["x", "x"], ["y"], stash_type=DOUBLE)]),
        r"'the_layernormalization' \(LayerNormalization\) makes float64 \(attribute stash_type\)",
    )
    inner = node("RandomNormalLike", ["a"], ["b"])
    inner.attribute.append(onnx.AttributeProto(name="dtype", ref_attr_name="dtype", type=2))
    function = helper.make_function(
        "local", "Noise", ["a"], ["b"], [inner], [helper.make_opsetid("", 18)], ["dtype"]
    )
    yield (
        "element type handed to a function",
        model(
            [node("Noise", ["x"], ["d"], domain="local", dtype=DOUBLE), narrow],
            None,
            None,
            [function],
        ),
        r"RandomNormalLike\) makes float64 \(attribute dtype\)",
    )
    indices = numpy_helper.from_array(np.array([1]), "indices")
    sparse = helper.make_sparse_tensor(numpy_helper.from_array(np.array([0.5]), "s"), indices, [3])
    yield (
        "sparse constant node",
        model([node("Constant", [], ["d"], sparse_value=sparse), narrow]),
        r"'the_constant' \(Constant\) makes float64 \(attribute sparse_value\)",
    )
    with_sparse = model([widen, node("Add", ["d", "s"], ["e"])])
    with_sparse.graph.sparse_initializer.append(sparse)
    yield "sparse initializer", with_sparse, "the constant 's' is float64"
    yield (
        "unknown rank",
        model([node("Abs", ["x"], ["y"])], inputs=[value("x", FLOAT, None)]),
        r"'x' has an unknown rank, which TensorRT would take for rank 0. Export with a shape",
    )
    sequence = helper.make_tensor_sequence_value_info("x", FLOAT, ("N",))
    yield (
        "sequence",
        model([node("ConcatFromSequence", ["x"], ["y"], axis=0)], inputs=[sequence]),
        "graph input 'x' is no tensor",
    )


@pytest.mark.parametrize(
    ("made", "message"),
    [pytest.param(made, message, id=name) for name, made, message in refused_models()],
)
def test_refused(made, message):
    with pytest.raises(UnsupportedError, match=message):
        prepare(made)


def test_our_export_of_any_rank_is_refused():
    with pytest.raises(UnsupportedError, match=r"shape=\('N', 16\): a name makes an axis dynamic"):
        prepare(export(LossSpec()))


def test_data_left_in_another_file():
    weight = numpy_helper.from_array(np.ones(3, np.float32), "w")
    onnx.external_data_helper.set_external_data(weight, "weights.bin")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    made = model([node("Add", ["x", "w"], ["y"])], initializer=[weight])
    with pytest.raises(ArtefactError, match=r"'w' lie in another file.*onnx\.load\(path\)"):
        prepare(made)


HANDED_ON = """<ir_version: 10, opset_import: ["" : 18, "f" : 1]>
    g (float[N] x, float[N] y) => (float[N] z) {
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
    made = onnx.parser.parse_model(HANDED_ON)
    runner = load(made, "trt-network", input_name="x", target_name="y")
    (got,) = runner.run(np.full(2, 5, "f4"), np.full(2, 1, "f4")).values()
    assert got.tolist() == [12, 12]


def test_a_function_called_without_its_attribute():
    made = export(LossSpec(beta=0.5), shape=("N",))
    call = next(n for n in made.graph.node if n.op_type.startswith("SmoothL1"))
    function = next(f for f in made.functions if f.name == call.op_type)
    if not function.attribute:
        function.attribute.extend(a.name for a in function.attribute_proto)
        del function.attribute_proto[:]
    assert list(function.attribute) == ["beta"]
    del call.attribute[:]
    with pytest.raises(
        ArtefactError, match=r"calls SmoothL1LossMean without the attribute\(s\) beta"
    ):
        prepare(made)


def test_an_empty_model():
    with pytest.raises(ArtefactError, match="has no outputs"):
        prepare(onnx.ModelProto())


# --- parse -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(), ("N",), (0,), (2, 3, 4, 5)], ids=str)
def test_parsed_as_declared(rtx, dtype, reduction, shape):
    made = export(LossSpec(beta=0.5, reduction=reduction, dtype=dtype), shape=shape)
    parsed = parse(made, rtx)
    assert parsed.network.name == made.graph.name
    dims = tuple(-1 if isinstance(d, str) else d for d in shape)
    assert [(p.name, p.dtype, p.shape) for p in parsed.inputs] == [
        ("input", dtype, dims),
        ("target", dtype, dims),
    ]
    out = dims if reduction == "none" else ()
    assert [(p.name, p.dtype, p.shape) for p in parsed.outputs] == [("loss", dtype, out)]
    assert bool(parsed.notes) == (reduction != "none")


def test_the_network_of_a_nameless_graph_has_a_name(rtx):
    made = model([node("Abs", ["x"], ["y"])])
    made.graph.name = ""
    name = parse(made, rtx).network.name
    assert name.startswith("graph_") and len(name) == len("graph_") + 16
    assert parse(copy.deepcopy(made), rtx).network.name == name
    assert parse(made, rtx, network_name="mine").network.name == "mine"


def test_dimension_names_are_kept(rtx):
    parsed = parse(export(LossSpec(reduction="none"), shape=("N", 16)), rtx)
    assert str(parsed.inputs[0]) == "input: float32[N, 16]"


PARSER_ERRORS = {
    "unknown operator": (
        model([node("Foo", ["x"], ["y"])]),
        r"node 'the_foo' \(operator Foo\).*Express the node in operators TensorRT supports, or run",
    ),
    "unsupported operator": (
        model([node("Det", ["x"], ["y"])], [value("x", FLOAT, (2, 2))], [value("y", FLOAT, ())]),
        r"node 'the_det' \(operator Det\): UNSUPPORTED_NODE",
    ),
    "reduction of rank 0": (
        model([node("ReduceSum", ["x"], ["y"])], [value("x", FLOAT, ())], [value("y", FLOAT, ())]),
        r"\(operator ReduceSum\).*can't reduce a tensor of rank 0: Reshape it to \(-1,\) first",
    ),
    "mixed dtypes": (
        model([node("Add", ["x", "h"], ["y"])], [value("x"), value("h", HALF)]),
        r"\(operator Add\).*promotes nothing: cast both inputs of the node to one dtype",
    ),
    "element type": (
        model(
            [node("Cast", ["c"], ["y"], to=FLOAT)],
            initializer=[helper.make_tensor("c", TensorProto.INT16, [1], [1])],
        ),
        "before any node: ",
    ),
}


@pytest.mark.parametrize("case", PARSER_ERRORS)
def test_parser_errors_name_node_operator_and_remedy(rtx, case):
    made, message = PARSER_ERRORS[case]
    with pytest.raises(BuildError, match=message) as caught:
        parse(made, rtx)
    assert str(caught.value).startswith("tensorrt_rtx 1.")
    assert "cudaError" not in str(caught.value)  # the missing GPU is not the reason


@pytest.mark.parametrize("element", ["INT16", "UINT32", "STRING"])
def test_an_input_of_a_type_that_tensorrt_lacks_is_named(rtx, element):
    kind = TensorProto.DataType.Value(element)
    made = model([node("Identity", ["x"], ["y"])], [value("x", kind)], [value("y", kind)])
    with pytest.raises(UnsupportedError, match=f"the graph input 'x' is {element}.*cast it"):
        parse(made, rtx)


def test_the_error_inside_a_function_names_the_function(rtx):
    function = helper.make_function(
        "local", "Outer", ["a"], ["b"], [node("Det", ["a"], ["b"])], [helper.make_opsetid("", 18)]
    )
    made = model(
        [helper.make_node("Outer", ["x"], ["y"], name="caller", domain="local")],
        [value("x", FLOAT, (2, 2))],
        [value("y", FLOAT, ())],
        functions=[function],
    )
    with pytest.raises(BuildError, match=r"operator Det, inside .*Outer"):
        parse(made, rtx)


def test_a_false_element_type_is_refused(rtx):
    made = model([node("Abs", ["x"], ["y"])], [value("x", FLOAT, ("N",))], [value("y", HALF)])
    with pytest.raises(UnsupportedError, match="'y' as FLOAT16, TensorRT made it FLOAT"):
        parse(made, rtx)


@pytest.mark.parametrize(("declared", "shape"), [(("N", 3), ("N",)), ((3,), (4,))])
def test_of_a_false_shape_the_nodes_are_believed_and_a_note_says_so(rtx, declared, shape):
    output = value("y", FLOAT, declared)
    made = model([node("Abs", ["x"], ["y"])], [value("x", FLOAT, shape)], [output])
    parsed = parse(made, rtx)
    assert parsed.outputs[0].shape == tuple(-1 if dim == "N" else dim for dim in shape)
    assert "the model declares 'y' with the shape (" in parsed.notes[0]


def test_a_shape_that_tensorrt_alone_contradicts_is_refused(rtx):
    """onnx's inference doesn't follow numbers through Abs, and TensorRT does."""
    size = helper.make_tensor("size", TensorProto.FLOAT, [1], [-4.0])
    nodes = [node("Abs", ["size"], ["positive"]),
             node("Cast", ["positive"], ["shape"], to=TensorProto.INT64),
             node("Reshape", ["x", "shape"], ["y"])]  # fmt: skip
    made = model(nodes, [value("x", FLOAT, (2, 2))], [value("y", FLOAT, (3,))], initializer=[size])
    with pytest.raises(UnsupportedError, match=r"with the shape \[3\], TensorRT made it \[4\]"):
        parse(made, rtx)


def test_a_parser_that_narrows_is_caught(fake, monkeypatch):
    # What would happen if `prepare` let a float64 input through: the fake narrows it, as
    # TensorRT does, and the comparison of the ports sees it.
    monkeypatch.setattr("smoothl1_deploy.tensorrt.parse.prepare", lambda m: (m, ()))
    made = export(LossSpec(dtype="float64", reduction="none"), "inlined", ("N",))
    with pytest.raises(UnsupportedError, match="'input' as DOUBLE, TensorRT made it FLOAT"):
        parse(made, fake("10.16.1"))


def test_a_network_without_the_graph_s_inputs_is_refused(fake, monkeypatch):
    flavour = fake("10.16.1")
    # TensorRT's parser says True to b"xx" and leaves the network empty (tried with 1.7.1).
    monkeypatch.setattr(flavour.trt.OnnxParser, "parse", lambda self, data: True)
    with pytest.raises(UnsupportedError, match=r"the graph's inputs are \['x'\], those of.*\[\]"):
        parse(model([node("Abs", ["x"], ["y"])]), flavour)


@pytest.mark.parametrize("route", ["function", "inlined"])
def test_a_gradient_of_axes_that_meet_unknown_says_what_to_export(route: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = export(LossSpec(gradient=True), route, ("N", 4), target_shape=("M", 4))
    with pytest.raises(BuildError, match="no NonZero.*export with a size of 1 or one name for"):
        parse(model, get_flavour("tensorrt_rtx"))
    parse(export(LossSpec(gradient=True), route, ("N", 4)), get_flavour("tensorrt_rtx"))


def test_a_name_that_is_no_utf_8_is_refused_before_tensorrt_reads_it():
    """Its Python ends with a UnicodeDecodeError at the layer of that name."""
    data = export(LossSpec(0.5), "inlined", ("N", 16)).SerializeToString()
    damaged = onnx.ModelProto.FromString(data.replace(b"WideSum_flat", b"WideSum\xf5flat"))
    with pytest.raises(UnsupportedError, match=r"a node has the name b'WideSum\\xf5flat"):
        prepare(damaged)
