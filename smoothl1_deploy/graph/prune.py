"""`prune`: a graph without what none of its outputs needs."""

from __future__ import annotations

import onnx

from ..model import subgraphs, value_names

__all__ = ["prune"]


def prune(graph: onnx.GraphProto) -> None:
    """Drop the nodes, inputs and initialisers that no output needs."""
    needed = {value.name for value in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed.update(node.input)
            for subgraph in subgraphs(node):
                needed.update(value_names(subgraph))
        needed.discard("")  # an input or output that is left out
    for field, items in (
        (graph.node, kept[::-1]),
        (graph.input, [value for value in graph.input if value.name in needed]),
        (graph.initializer, [value for value in graph.initializer if value.name in needed]),
        (graph.value_info, [value for value in graph.value_info if value.name in needed]),
    ):
        chosen = list(items)
        del field[:]
        field.extend(chosen)
