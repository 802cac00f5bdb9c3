"""What the lint asks of a graph: is the target of a loss held against the shape of its input?

A loss is recognised by its metadata, or by its shape: two inputs of the graph, declared alike,
whose difference goes into a distance. Of any other graph nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from ..model import Loss, inlined, inputs_of, main_tensors

__all__ = ["unguarded"]

#: Operators through which a tensor's rows pass as they are.
_TRANSPARENT = ("Cast", "Identity")
_GUARDED = (*_TRANSPARENT, "Reshape")
#: What is made of a difference where it is a distance.
_DISTANCE = ("Abs", "Clip", "Mul", "Pow", "ReduceL1", "ReduceL2", "ReduceSumSquare", "Sign")


def unguarded(model: onnx.ModelProto, losses: tuple[Loss, ...]) -> list[tuple[str, str]]:
    """Pairs (target, input): a target of one row would be broadcast to the rows of the input.

    Args:
        model: any.
        losses: what its metadata say that it computes; empty for a model of other origin.
    """
    graph = _Graph(inlined(model))
    pairs = list(_known(graph, losses)) if losses else list(_recognised(graph))
    return list(dict.fromkeys(pairs))


class _Graph:
    """The nodes of a graph without functions, by what they read and write."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.made_by = {name: node for node in self.nodes for name in node.output}
        self.ports = {value.name for value in inputs_of(model)}
        self.constants = {tensor.name for tensor in model.graph.initializer}
        self._shapes = {
            tensor.name: [dim if isinstance(dim, int) else -1 for dim in tensor.shape or ()]
            for tensor in main_tensors(model).values()
        }

    def origin(self, tensor: str, through: tuple[str, ...] = _TRANSPARENT) -> str:
        """The tensor of these rows that comes first."""
        node = self.made_by.get(tensor)
        if node is None or node.op_type not in through:
            return tensor
        return self.origin(node.input[0], through)

    def ancestors(self, tensor: str) -> set[str]:
        found, waiting = set[str](), [tensor]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                node = self.made_by.get(name)
                waiting += [] if node is None else node.input
        return found

    def alike(self, a: str, b: str) -> bool:
        """Whether both are declared in one shape that has an axis of rows.

        Names of axes don't count: inference invents them.
        """
        shape = self._shapes.get(a) or [0]
        return shape[0] == -1 and shape == self._shapes.get(b)

    def is_guarded(self, tensor: str, like: str) -> bool:
        """Whether it is reshaped to a shape that is made of the other's."""
        return any(
            node.op_type == "Reshape"
            and self.origin(node.input[0], _GUARDED) == tensor
            and like in self.ancestors(node.input[1])
            for node in self.nodes
        )


def _known(graph: _Graph, losses: tuple[Loss, ...]) -> Iterator[tuple[str, str]]:
    for loss in losses:
        input = loss.inputs["input"]
        sources = graph.ancestors(input)
        for role in ("target", "weight"):
            tensor = loss.inputs.get(role)
            if tensor is None or not graph.alike(tensor, input):
                continue
            origin = graph.origin(tensor)
            rowless = origin in graph.constants or origin in sources
            if not rowless and not graph.is_guarded(origin, input):
                yield tensor, input


def _recognised(graph: _Graph) -> Iterator[tuple[str, str]]:
    for node in graph.nodes:
        if node.op_type != "Sub":
            continue
        pair = [graph.origin(name) for name in node.input]
        if pair[0] == pair[1] or not set(pair) <= graph.ports:
            continue
        users = [other for other in graph.nodes if node.output[0] in other.input]
        distance = any(user.op_type in _DISTANCE for user in users)
        if distance and graph.alike(pair[0], pair[1]):
            yield pair[1], pair[0]
