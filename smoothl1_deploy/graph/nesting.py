"""What a model asks for: graphs inside nodes, functions that call functions, big constants.

What reads a model recursively, a parser in C++ among them, ends the process where a model is made
to nest without end (TensorRT for RTX 1.7.1 does at a function that calls itself). So the depth is
measured before anything else looks inside.
"""

from __future__ import annotations

import graphlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import onnx
import onnx.checker
import onnx.shape_inference

from ..errors import ArtefactError

__all__ = ["MODEL_ERRORS", "check_constants", "check_nesting", "tensors"]

#: What onnx raises for a model that contradicts itself.
MODEL_ERRORS = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)
_DEEPEST = 24  # graphs in one another; protobuf's own limit of 100 messages is reached about there
_MOST_NODES = 1_000_000  # of all functions put in the places where they are called

_Name = tuple[str, str, str]


def check_nesting(model: onnx.ModelProto, by_name: bool = False) -> None:
    """Refuse what no reader can unfold.

    Args:
        model: any.
        by_name: for a reader that takes a node for a call of the function of its name, whatever
            the domain.

    Raises:
        ArtefactError: for graphs nested deeper than 24, functions that call themselves, directly
            or through others, and calls that unfold to more than a million nodes.
    """
    key = _name if by_name else _full_name
    functions = {key(f.domain, f.name, f.overload): f for f in model.functions}
    calls = {name: _calls(f.node, functions, f.name, key) for name, f in functions.items()}
    try:
        order = [*graphlib.TopologicalSorter(calls).static_order()]
    except graphlib.CycleError as exc:
        ring = " -> ".join(name for _, name, _ in exc.args[1])
        raise ArtefactError(
            f"the model's functions call themselves ({ring}), which ONNX forbids; it is damaged or "
            "made to harm"
        ) from None
    sizes: dict[_Name, int] = {}
    for name in order:
        sizes[name] = _unfolded(len(functions[name].node), calls[name], sizes)
    whole = _unfolded(
        len(model.graph.node), _calls(model.graph.node, functions, "graph", key), sizes
    )
    if whole > _MOST_NODES:
        raise ArtefactError(
            f"the model's functions unfold to {whole:,} nodes, more than {_MOST_NODES:,}; it is "
            "damaged or made to harm"
        )


def check_constants(model: onnx.ModelProto) -> None:
    """Refuse a constant that says it has more elements than its bytes can hold.

    onnx's shape inference (1.23) takes memory for what is declared: 16 GB for a file of 5 kB.

    Raises:
        ArtefactError: for such a constant, and for one of a negative size.
    """
    for tensor in tensors(model):
        elements = math.prod(tensor.dims)
        held = 4 * tensor.ByteSize()  # the narrowest elements have two bits
        fits = elements <= held or tensor.data_location == onnx.TensorProto.EXTERNAL
        if not fits or any(dim < 0 for dim in tensor.dims):
            raise ArtefactError(
                f"the constant {tensor.name!r} says it has the shape {tuple(tensor.dims)}, and "
                f"takes {tensor.ByteSize():,} bytes of the file; it is damaged or made to harm"
            )


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every constant of `model`, of its functions and of the graphs inside nodes."""
    yield from model.graph.initializer
    level = [*model.graph.node, *(node for f in model.functions for node in f.node)]
    while level:
        inside: list[onnx.GraphProto] = []
        for attribute in (attribute for node in level for attribute in node.attribute):
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            inside += [attribute.g] if attribute.HasField("g") else [*attribute.graphs]
        for graph in inside:
            yield from graph.initializer
        level = [node for graph in inside for node in graph.node]


def _full_name(domain: str, name: str, overload: str) -> _Name:
    return domain, name, overload


def _name(domain: str, name: str, overload: str) -> _Name:
    return "", name, ""


def _unfolded(own: int, calls: Counter[_Name], sizes: dict[_Name, int]) -> int:
    return own + sum(count * sizes[name] for name, count in calls.items())


def _calls(
    nodes: Iterable[onnx.NodeProto],
    functions: Iterable[_Name],
    where: str,
    key: Callable[[str, str, str], _Name],
) -> Counter[_Name]:
    """The functions called by `nodes` and the graphs inside them, each as often as it is."""
    known = set(functions)
    found: Counter[_Name] = Counter()
    level, depth = list(nodes), 0
    while level:
        if depth > _DEEPEST:
            raise ArtefactError(
                f"the {where} has graphs nested deeper than {_DEEPEST}; it is damaged or made to "
                "harm"
            )
        found.update(name for n in level if (name := key(n.domain, n.op_type, n.overload)) in known)
        inside = [
            graph
            for node in level
            for attribute in node.attribute
            for graph in ([attribute.g] if attribute.HasField("g") else [*attribute.graphs])
        ]
        level, depth = [node for graph in inside for node in graph.node], depth + 1
    return found
