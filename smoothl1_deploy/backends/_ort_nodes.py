"""Which nodes a provider may leave to the CPU: what works on shapes and constants, not on data.

ONNX Runtime puts the arithmetic of shapes on the CPU on purpose, where their numbers are (the
number of elements that a mean divides by); anything else there is a silent fall-back.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from .._model import inlined as without_functions
from .._model import inputs_of
from ..errors import UnsupportedError

#: Operators whose output holds no number of their input.
_OF_THE_SHAPE = ("Shape", "Size")


def inlined(model: onnx.ModelProto, kept: Iterable[tuple[str, str]] = ()) -> onnx.ModelProto:
    """A copy without local functions but those `kept`, in which every node has its own name."""
    copy = without_functions(model, kept)
    used: set[str] = set()
    for index, node in enumerate(copy.graph.node):
        if not node.name or node.name in used:
            node.name = f"{node.op_type}_{index}_{len(used)}"
        used.add(node.name)
    return copy


def host_nodes(model: onnx.ModelProto) -> frozenset[str]:
    """The names of the nodes that work on shapes and constants alone."""
    data = {value.name for value in inputs_of(model)}
    names = set()
    for node in model.graph.node:  # in topological order
        if node.op_type not in _OF_THE_SHAPE and any(name in data for name in node.input):
            data.update(node.output)
        elif not any(a.type in (a.GRAPH, a.GRAPHS) for a in node.attribute):
            names.add(node.name)
    return frozenset(names)


def check_assignment(
    model: onnx.ModelProto, assigned: Iterable[tuple[str, str, str]], provider: str
) -> None:
    """Refuse a session whose provider didn't take every node that computes on data.

    Args:
        model: what the session was opened on.
        assigned: (provider, node, operator), as the session says.
        provider: that ought to have them.

    Raises:
        UnsupportedError: names the nodes, their operators and who has them.
    """
    free = host_nodes(model)
    found = [
        f"{name} ({operator}) to {other}"
        for other, name, operator in assigned
        if other != provider and name not in free
    ]
    if found:
        listed = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        raise UnsupportedError(
            f"{provider} didn't take the whole graph; ONNX Runtime gave {listed}, and results of "
            "this backend would be those of another. Use the backend ort-cpu, or export by the "
            "route inlined"
        )
