"""What is known of the tensors of a model: names, element types, shapes, data beside the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from onnx import helper

from .elements import DTYPE_OF_ELEMENT
from .inference import inferred_graph
from .nesting import tensors
from .shapes import Shape

__all__ = [
    "Tensor",
    "external_locations",
    "float_dtype_of",
    "main_tensors",
    "node_names",
    "subgraphs",
    "value_names",
]

_SMALL = 1024  # bytes of an initialiser that shape inference may need the values of


@dataclass(frozen=True, slots=True)
class Tensor:
    """What is known of a tensor: None for an element type or a shape that nothing tells."""

    name: str
    element: int | None = None
    shape: Shape | None = None


def _skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its big initialisers as inputs: what shape inference needs, and no more."""
    whole = model.graph
    copy = onnx.ModelProto(ir_version=model.ir_version)
    copy.opset_import.extend(model.opset_import)
    copy.functions.extend(model.functions)
    graph = copy.graph
    graph.node.extend(whole.node)
    graph.input.extend(whole.input)
    graph.output.extend(whole.output)
    graph.value_info.extend(whole.value_info)
    graph.sparse_initializer.extend(whole.sparse_initializer)
    known = {value.name for value in graph.input}
    for tensor in whole.initializer:
        if tensor.ByteSize() <= _SMALL and not tensor.external_data:
            graph.initializer.append(tensor)
        elif tensor.name not in known:
            value = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            graph.input.append(value)
    return copy


def main_tensors(model: onnx.ModelProto) -> dict[str, Tensor]:
    """Every tensor of the main graph, with what shape inference tells of it."""
    graph = inferred_graph(_skeleton(model))
    found: dict[str, Tensor] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.HasField("tensor_type"):
            found[value.name] = _tensor(value)
    names = [value.name for value in (*graph.input, *graph.initializer)]
    names += [name for node in graph.node for name in node.output if name]
    for tensor in graph.initializer:
        found[tensor.name] = Tensor(tensor.name, tensor.data_type, tuple(tensor.dims))
    # Sequences and the like are no candidates; what inference can't tell still is one.
    values = (*graph.input, *graph.value_info, *graph.output)
    others = {v.name for v in values if v.type.WhichOneof("value")} - set(found)
    return {name: found.get(name, Tensor(name)) for name in names if name not in others}


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return Tensor(value.name, tensor.elem_type or None)
    dims = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{value.name}_axis_{i}"
        for i, dim in enumerate(tensor.shape.dim)
    )
    return Tensor(value.name, tensor.elem_type or None, dims)


def value_names(graph: onnx.GraphProto) -> Iterator[str]:
    """The name of every tensor, and of other values, those of subgraphs too."""
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        yield value.name
    for sparse in graph.sparse_initializer:
        yield sparse.values.name
    for node in graph.node:
        yield from node.input
        yield from node.output
        for subgraph in subgraphs(node):
            yield from value_names(subgraph)


def node_names(graph: onnx.GraphProto) -> Iterator[str]:
    """The name of every node, those of subgraphs too."""
    for node in graph.node:
        yield node.name
        for subgraph in subgraphs(node):
            yield from node_names(subgraph)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs that a node holds, of an If or a Loop for instance."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def float_dtype_of(model: onnx.ModelProto, name: str) -> str | None:
    """The dtype of a float tensor of the main graph; None where nothing tells it."""
    tensor = main_tensors(model).get(name)
    return None if tensor is None else DTYPE_OF_ELEMENT.get(tensor.element or 0)


def external_locations(model: onnx.ModelProto) -> list[str]:
    """The files beside the model that hold data of it, as the model names them."""
    found = {
        entry.value
        for tensor in tensors(model)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return sorted(found)
