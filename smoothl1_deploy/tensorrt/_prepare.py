"""`prepare`: an ONNX model made fit for TensorRT, or refused with the reason.

TensorRT has no float64. Its parser narrows float64 inputs, outputs, constants and casts to
float32 without a message, reads an input of unknown rank as rank 0, and takes a call of a local
function that lacks a required attribute (each tried with tensorrt_rtx 1.7.1). What begins with a
cast inside the model, as an accumulation does, is narrowed here, in plain sight; the rest is
refused.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from .._floats import Array
from .._model import (
    Scope,
    axes_of,
    check_nesting,
    check_types,
    inlined,
    inputs_of,
    node_label,
    scopes,
)
from ..errors import ArtefactError, UnsupportedError
from ..graph._metadata import HASH, ROUTE, SERVED, SPEC, VERSION

_DOUBLE = TensorProto.DOUBLE
_REMEDY = (
    "TensorRT has no float64 and would silently compute in float32. Export in "
    "float32, or run this model on ONNX Runtime (the backend ort-cpu)"
)
_OF_THE_EXPORT = frozenset({SPEC, ROUTE, VERSION, HASH, SERVED})
#: Attributes of standard operators that hold the element type of an output.
_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "output_datatype", "stash_type"})


def prepare(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """`model`, as `artefact.read_model` gives it, as TensorRT is to see it, and what that changed.

    Internal casts to float64 (the accumulators of `WideSum` and `WideMean`, the gradient, and those
    of anyone's model) become casts to float32, in functions and subgraphs too, and constants of
    float64 that float32 holds exactly become float32.

    Returns:
        `model` itself where nothing had to change, else a changed copy without what the export
        says about itself (read the spec from `model`); and the notes, each a sentence.

    Raises:
        UnsupportedError: for any other float64, and for inputs of unknown rank.
        ArtefactError: for a model without outputs, for a call of a local function without a
            required attribute, and for a node that can't take what it is given.
    """
    try:
        check_nesting(model, by_name=True)
    except ArtefactError as exc:  # such a model ends the process (tensorrt_rtx 1.7.1)
        raise UnsupportedError(
            f"TensorRT's parser knows functions by their names alone, whatever the domain: {exc}"
        ) from exc
    _check_calls(model)
    _check_ports(model)
    check_types(model)
    if _refers_to_attributes(model):
        model = inlined(model)
    for scope in scopes(model):
        _check_constants(scope)
        _check_nodes(scope)
    if not any(_has_double(scope) for scope in scopes(model)):
        return model, ()
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy, _narrow(copy)


def _refers_to_attributes(model: onnx.ModelProto) -> bool:
    """Whether a body is to be put where it is called.

    There an element type can be seen that the caller gives. And TensorRT (for RTX 1.7.1) loses what
    one function hands on to another by reference, and computes with 0.
    """
    own = {(function.domain, function.name) for function in model.functions}
    return any(
        attribute.ref_attr_name
        for scope in scopes(model)
        for node in scope.nodes
        for attribute in node.attribute
        if (node.domain, node.op_type) in own or _sets_type(node, attribute)
    )


def _narrow(model: onnx.ModelProto) -> tuple[str, ...]:
    casts: list[str] = []
    constants: list[str] = []
    for scope in scopes(model):
        for node, element in _doubling(scope):  # each node is a Cast: the others were refused
            element.i = TensorProto.FLOAT
            casts.append(f"{scope.where}{node_label(node)}")
        for where, tensor in scope.constants:
            if tensor.data_type == _DOUBLE:
                value = _value(tensor, where).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
                constants.append(where)
        for value in scope.values:
            if value.type.tensor_type.elem_type == _DOUBLE:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
    # What the export says about itself no longer holds; a reader would refuse its hash.
    kept = [entry for entry in model.metadata_props if entry.key not in _OF_THE_EXPORT]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    notes = []
    if casts:
        notes.append(
            "computes in float32 on TensorRT, which has no float64: "
            f"Cast to float32 instead of float64 in {', '.join(casts)}"
        )
    if constants:
        notes.append(f"float64 constants, exact in float32, became float32: {', '.join(constants)}")
    return tuple(notes)


def _sets_type(node: onnx.NodeProto, attribute: onnx.AttributeProto) -> bool:
    return node.domain in ("", "ai.onnx") and attribute.name in _TYPE_ATTRIBUTES


def _doubling(scope: Scope) -> Iterator[tuple[onnx.NodeProto, onnx.AttributeProto]]:
    """The attributes that set an output's element type to float64, with their nodes."""
    for node in scope.nodes:
        for attribute in node.attribute:
            if _sets_type(node, attribute) and attribute.i == _DOUBLE:
                yield node, attribute


def _has_double(scope: Scope) -> bool:
    constants = (tensor for _, tensor in scope.constants if tensor.data_type == _DOUBLE)
    return any(True for _ in (*_doubling(scope), *constants))


def _check_constants(scope: Scope) -> None:
    for where, tensor in scope.constants:
        if tensor.data_type != _DOUBLE:
            continue
        value = _value(tensor, where)
        with np.errstate(over="ignore"):
            narrow = value.astype(np.float32).astype(np.float64)
        lost = value[(narrow != value) & ~np.isnan(value)]
        if lost.size:
            raise UnsupportedError(
                f"the constant {where!r} holds the float64 {float(lost[0])!r}, "
                f"which float32 can't hold. {_REMEDY}"
            )


def _value(tensor: TensorProto, where: str) -> Array:
    """The numbers of a constant.

    Raises:
        ArtefactError: where there are not as many as its shape says.
    """
    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except ValueError as exc:
        raise ArtefactError(f"the constant {where!r} can't be read: {exc}") from exc


def _check_nodes(scope: Scope) -> None:
    sparse = (
        (node, attribute)
        for node in scope.nodes
        for attribute in node.attribute
        if attribute.sparse_tensor.values.data_type == _DOUBLE
    )
    for node, attribute in (*_doubling(scope), *sparse):
        if node.op_type != "Cast":
            raise UnsupportedError(
                f"the node {scope.where}{node_label(node)!r} ({node.op_type}) makes float64 "
                f"(attribute {attribute.name}). {_REMEDY}"
            )


def _check_ports(model: onnx.ModelProto) -> None:
    graph = model.graph
    if not graph.output:
        raise ArtefactError("the model has no outputs; it is empty, damaged, or of another format")
    for sparse in graph.sparse_initializer:
        if sparse.values.data_type == _DOUBLE:
            raise UnsupportedError(f"the constant {sparse.values.name!r} is float64. {_REMEDY}")
    inputs = inputs_of(model)
    for kind, values in (("input", inputs), ("output", graph.output)):
        for value in values:
            if not value.type.HasField("tensor_type"):
                raise UnsupportedError(
                    f"the graph {kind} {value.name!r} is no tensor, and TensorRT takes and gives "
                    "nothing else; unpack it in the graph"
                )
            if value.type.tensor_type.elem_type == _DOUBLE:
                raise UnsupportedError(f"the graph {kind} {value.name!r} is float64. {_REMEDY}")
    for value in inputs:
        if axes_of(value) is None:
            raise UnsupportedError(
                f"the graph input {value.name!r} has an unknown rank, which TensorRT would take "
                "for rank 0. Export with a shape: a name makes an axis dynamic"
            )


def _check_calls(model: onnx.ModelProto) -> None:
    needs = {(f.domain, f.name, f.overload): set(f.attribute) for f in model.functions}
    for scope in scopes(model):
        for node in scope.nodes:
            needed = needs.get((node.domain, node.op_type, node.overload), set())
            if lacking := sorted(needed - {attribute.name for attribute in node.attribute}):
                raise ArtefactError(
                    f"the node {scope.where}{node_label(node)!r} calls {node.op_type} without the "
                    f"attribute(s) {', '.join(lacking)}, which TensorRT would not notice"
                )
