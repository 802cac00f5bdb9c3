"""Damage: to the bytes of any file, and to an ONNX model in ways a parser lets through."""

from __future__ import annotations

import functools
import json
from typing import Any

import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper

from smoothl1_deploy import LossSpec, attach, export
from smoothl1_deploy._model import ATTACHED, Loss, metadata_of, tensors
from smoothl1_deploy.graph._metadata import HASH, content_hash, forget_spec

from .values import JSON, NAMES

_INTS = st.sampled_from([0, 1, -1, 2, 7, 127, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63)])
#: A run of bytes: where (per mille), what is done there, and with what.
BYTE_EDITS = st.lists(
    st.tuples(
        st.integers(0, 1000),
        st.sampled_from(["flip", "set", "insert", "delete", "cut", "double", "huge", "zero"]),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)


def damage_bytes(data: bytes, edits: list[tuple[int, str, bytes]]) -> bytes:
    """`data` after each edit."""
    out = bytearray(data)
    for permille, kind, value in edits:
        at = len(out) * permille // 1001
        if kind == "flip" and out:
            out[at] ^= value[0] or 1
        elif kind == "set":
            out[at : at + len(value)] = value
        elif kind == "insert":
            out[at:at] = value
        elif kind == "delete":
            del out[at : at + len(value)]
        elif kind == "cut":
            del out[at:]
        elif kind == "double":
            out[at:at] = out[at : at + 64 * value[0]]
        elif kind == "huge":  # the longest varint: a length of 2^64 - 1
            out[at : at + 10] = b"\xff" * 9 + b"\x01"
        elif kind == "zero":
            out[at : at + 16] = bytes(16)
    return bytes(out)


def damaged_bytes(data: bytes) -> st.SearchStrategy[bytes]:
    """`data` with up to four edits."""
    return BYTE_EDITS.map(functools.partial(damage_bytes, data))


@functools.cache
def bases() -> tuple[onnx.ModelProto, ...]:
    """Sound models: ours by two routes and several specs, and two of other origin."""
    spec, shape = LossSpec(0.5), ("N", 16)
    weighted = LossSpec(0.5, "mean", weight="weights", gradient=True)
    return (
        export(spec, shape=shape),
        export(spec, "inlined", shape),
        export(LossSpec(0.5, "none", "float16"), shape=(4, 16)),
        export(LossSpec(0.0, "sum", "bfloat16"), shape=shape),
        export(LossSpec(2.0, "mean", "float64", per_sample=True), shape=shape),
        export(weighted, shape=shape),
        export(LossSpec(reduction="sum", runtime_beta=True)),
        attach(foreign(), "hidden", "hidden_gt", LossSpec(reduction="none")),
        foreign(),
    )


def foreign() -> onnx.ModelProto:
    """A small network with weights, an If and an internal tensor `hidden`."""
    half, branch = ", ".join(["0.5"] * 64), "() => (float[] chosen) { chosen = Identity(hidden) }"
    return onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["": 18]>
        foreign (float[N, 16] x, float[N, 4] label) => (float[N, 4] z)
        <float[16, 4] w = {{{half}}}, bool yes = {{1}}>
        {{
            hidden = MatMul(x, w)
            y = If <then_branch = branch {branch}, else_branch = branch {branch}> (yes)
            z = Sub(y, label)
        }}""")


def nested(depth: int) -> onnx.ModelProto:
    """A graph in an attribute of a node of a graph, `depth` times over."""
    model = foreign()
    graph = model.graph
    for _ in range(depth):
        node = graph.node.add(op_type="If", input=["yes"], output=["deep"])
        graph = node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g
        graph.name = "g"
    return model


def recursive(functions: int = 1) -> onnx.ModelProto:
    """Local functions that call each other in a ring."""
    model = foreign()
    model.opset_import.append(helper.make_opsetid("ring", 1))
    for number in range(functions):
        called = f"F{(number + 1) % functions}"
        body = [helper.make_node(called, ["a"], ["b"], domain="ring")]
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ring", 1)]
        model.functions.append(
            helper.make_function("ring", f"F{number}", ["a"], ["b"], body, opsets)
        )
    model.graph.node.append(helper.make_node("F0", ["y"], ["never"], domain="ring"))
    return model


def engine_node(source: str = "", inputs: Any = ("y",), domain: str = "com.microsoft") -> Any:
    """A node that carries what says of itself that it is an engine."""
    said = {"source": source} if source else {}
    return helper.make_node(
        *("EPContext", [*inputs], ["engine"]), domain=domain, ep_cache_context=b"ftrt", **said
    )


def carrying(where: str, source: str = "") -> onnx.ModelProto:
    """A model with an engine in its graph, a function, a subgraph, or a function's attribute."""
    model = foreign()
    node = engine_node(source, domain="other" if where == "other domain" else "com.microsoft")
    branch = helper.make_graph([node], "branch", [], [onnx.ValueInfoProto(name="engine")])
    if where in ("function", "default"):
        body = helper.make_node("If", ["y"], ["engine"])
        for name in ("then_branch", "else_branch"):
            body.attribute.add(name=name, ref_attr_name="branch", type=onnx.AttributeProto.GRAPH)
        nodes = [node if where == "function" else body]
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
        function = helper.make_function("f", "F", ["y"], ["engine"], nodes, opsets)
        if where == "default":
            function.attribute_proto.append(helper.make_attribute("branch", branch))
        model.functions.append(function)
        node = helper.make_node("F", ["y"], ["engine"], domain="f")
    elif where == "subgraph":
        node = helper.make_node("If", ["yes"], ["e"], then_branch=branch, else_branch=branch)
    model.graph.node.append(node)
    return model


def carries_engine(message: Any) -> bool:
    """Whether a node anywhere in a message carries an engine, whatever the field is called."""
    if isinstance(message, onnx.NodeProto) and message.op_type == "EPContext":
        return True
    fields = (value for field, value in message.ListFields() if field.message_type)
    parts = (value if hasattr(value, "__len__") else [value] for value in fields)
    return any(carries_engine(part) for values in parts for part in values)


@st.composite
def damaged_models(draw: st.DrawFn) -> onnx.ModelProto:
    """A model whose protobuf is sound and whose content isn't, or not always."""
    special = draw(st.integers(0, 39))
    if special == 0:
        return nested(draw(st.sampled_from([1, 5, 20, 30, 60])))
    if special == 1:
        return recursive(draw(st.integers(1, 3)))
    model = onnx.ModelProto()
    model.CopyFrom(draw(st.sampled_from(bases())))
    if draw(st.booleans()):
        forget_spec(model)  # a model of other origin
    for _ in range(draw(st.integers(1, 3))):
        _edit(draw, model)
    if draw(st.booleans()) and model.metadata_props:
        helper.set_model_props(model, {**metadata_of(model), HASH: content_hash(model)})
    return model


def _edit(draw: st.DrawFn, model: onnx.ModelProto) -> None:
    """One change of a message, of a kind and at a place that are drawn."""
    graph = model.graph
    bodies = [graph, *model.functions]
    nodes = [node for body in bodies for node in body.node]
    values = [*graph.input, *graph.output, *graph.value_info]
    node: Any = draw(st.sampled_from(nodes)) if nodes else onnx.NodeProto()
    value: Any = draw(st.sampled_from(values)) if values else onnx.ValueInfoProto()
    constants = [*tensors(model)]
    number = draw(_INTS)
    what = draw(st.integers(0, 18))
    if what == 0 and value.type.tensor_type.shape.dim:
        draw(st.sampled_from([*value.type.tensor_type.shape.dim])).dim_value = number
    elif what == 1:
        value.type.tensor_type.elem_type = draw(st.integers(-1, 30))
    elif what == 2:
        value.name = _text(draw)
    elif what == 3:
        value.type.tensor_type.shape.dim.add().dim_param = _text(draw)
    elif what == 4:
        value.type.tensor_type.ClearField("shape")
    elif what == 5 and nodes:
        node.op_type = draw(st.sampled_from(_OPERATORS))
    elif what == 6 and nodes:
        field = node.input if draw(st.booleans()) else node.output
        if field:
            field[draw(st.integers(0, len(field) - 1))] = _text(draw)
    elif what == 7 and nodes and node.attribute:
        attribute = draw(st.sampled_from([*node.attribute]))
        attribute.i, attribute.f = number, float(number)
        if draw(st.booleans()):
            attribute.ints.extend([number, -number if number > -(2**63) else 0])
        if draw(st.booleans()):
            attribute.type = draw(st.integers(0, 14))
    elif what == 8 and constants:
        tensor = draw(st.sampled_from(constants))
        del tensor.dims[:]
        tensor.dims.extend(draw(st.lists(_INTS, max_size=3)))
    elif what == 9 and constants:
        draw(st.sampled_from(constants)).data_type = draw(st.integers(-1, 30))
    elif what == 10 and constants:
        tensor = draw(st.sampled_from(constants))
        tensor.data_location = TensorProto.EXTERNAL
        key, name = draw(st.sampled_from(["location", "offset", "length"])), _text(draw)
        tensor.external_data.add(key=key, value=name)
    elif what == 11 and model.opset_import:
        draw(st.sampled_from([*model.opset_import])).version = number
    elif what == 12:
        model.ir_version = number
    elif what == 13 and model.metadata_props:
        draw(st.sampled_from([*model.metadata_props])).value = _text(draw)
    elif what == 14 and nodes:
        body: Any = draw(st.sampled_from(bodies))
        if body.node:
            del body.node[draw(st.integers(0, len(body.node) - 1))]
    elif what == 15 and model.functions:
        del model.functions[draw(st.integers(0, len(model.functions) - 1))]
    elif what == 16:
        attached = Loss.of(LossSpec()).to_dict()
        attached[draw(st.sampled_from([*attached]))] = draw(JSON)
        noted = json.dumps(draw(st.sampled_from([attached, [attached], [attached, []]])))
        helper.set_model_props(model, {**metadata_of(model), ATTACHED: noted})
    elif what == 17 and nodes:
        node.op_type = "EPContext"
        node.attribute.extend(engine_node(_text(draw)).attribute)
    else:
        graph.input.add(name=_text(draw)).type.sequence_type.elem_type.tensor_type.elem_type = 1


def _text(draw: st.DrawFn) -> str:
    text: str = draw(NAMES)
    return text.encode(errors="ignore").decode()  # protobuf takes no lone surrogates


_OPERATORS = [
    "Add", "Reshape", "Expand", "Range", "Tile", "ConstantOfShape", "Pad", "Loop", "Scan", "If",
    "Cast", "ReduceSum", "Gather", "Resize", "Where", "Flatten", "Size", "Shape", "NonZero",
    "Concat", "Split", "Unique", "TopK", "OneHot", "Conv", "EyeLike", "Nonsense", "SmoothL1Loss",
]  # fmt: skip
