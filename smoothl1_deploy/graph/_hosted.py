"""What becomes of somebody else's model that gets a loss: opset, functions, what is dropped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx
import onnx.inliner
import onnx.version_converter

from .._model import MODEL_ERRORS, opset_of, subgraphs, value_names
from ..errors import ArtefactError

_OLDEST_OPSET = 13  # that the functions of `functions` can be called in
_OLDEST_IR = 8  # the first with functions
_PARSED = 2**31 - 1  # bytes that protobuf reads in one message


class OldOpsetError(ArtefactError):
    """A model older than `needed`, the lowest opset that has what a loss is made of."""

    def __init__(self, opset: int, needed: int) -> None:
        super().__init__(
            f"the model is of opset {opset}, and this loss needs {needed}; convert it with "
            "convert_opset=True (--convert-opset), or onnx.version_converter"
        )
        self.needed = needed


def check_opset(
    model: onnx.ModelProto, functions: Iterable[onnx.FunctionProto], nodes: Iterable[onnx.NodeProto]
) -> None:
    """Whether the opset of `model` has what `functions` and `nodes` are made of.

    Raises:
        OldOpsetError: for one that is too old; says how to convert the model.
    """
    every = [*nodes, *(node for function in functions for node in function.node)]
    reshapes = any(attribute.name == "allowzero" for n in every for attribute in n.attribute)
    opset, needed = opset_of(model), 14 if reshapes else _OLDEST_OPSET
    if opset < needed:
        raise OldOpsetError(opset, needed)


def _raise_ir(model: onnx.ModelProto) -> None:
    """Make `model` one that may have functions, its constants as constant as they were.

    Before IR 4 every initialiser had to be listed among the inputs. From IR 4 on one that is
    listed may be overridden by the caller, so that no runtime folds it into anything.
    """
    if model.ir_version < 4:
        _unlist_initialisers(model.graph)
    model.ir_version = max(model.ir_version, _OLDEST_IR)


def _unlist_initialisers(graph: onnx.GraphProto) -> None:
    constants = {tensor.name for tensor in graph.initializer}
    fed = [value for value in graph.input if value.name not in constants]
    del graph.input[:]
    graph.input.extend(fed)
    for node in graph.node:
        for subgraph in subgraphs(node):
            _unlist_initialisers(subgraph)


def add_functions(model: onnx.ModelProto, functions: Iterable[onnx.FunctionProto]) -> None:
    """Add the functions that `model` lacks; their bodies mean the same in every opset they allow.

    The IR version becomes the first that has functions, where it is older.

    Raises:
        ArtefactError: when a function of that name is there and computes something else.
    """
    _raise_ir(model)
    opset = opset_of(model)
    present = {(function.domain, function.name): function for function in model.functions}
    for function in functions:
        other = present.get((function.domain, function.name))
        if other is None:
            copy = model.functions.add()
            copy.CopyFrom(function)
            for entry in copy.opset_import:
                if entry.domain == "":
                    entry.version = opset
        elif _body(other) != _body(function):
            raise ArtefactError(
                f"the model has a function {function.domain}.{function.name} that computes "
                "something else, of another version of smoothl1-deploy perhaps; put it in place "
                "with onnx.inliner.inline_local_functions(model), or attach to the model as it was"
            )


def _body(function: onnx.FunctionProto) -> list[Any]:
    ports = [[*function.input], [*function.output], [*function.attribute]]
    return ports + [
        [n.op_type, n.domain, [*n.input], [*n.output], [str(a) for a in n.attribute]]
        for n in function.node
    ]


def converted(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """`model` in the opset `opset`.

    Its functions are put in the places where they are called: onnx's converter (1.23) drops them.

    Raises:
        ArtefactError: for what the converter can't do, and for more than it can read.
    """
    check_parsed(model, "the conversion of the opset")
    try:
        if model.functions:
            model = onnx.inliner.inline_local_functions(model, convert_version=True)
        return onnx.version_converter.convert_version(model, opset)
    except (onnx.version_converter.ConvertError, *MODEL_ERRORS, RuntimeError) as exc:
        raise ArtefactError(f"onnx can't convert the model to opset {opset}: {exc}") from exc


def check_parsed(model: onnx.ModelProto, step: str) -> None:
    """Refuse a model too big for `step`, which onnx takes in C++: it arrives there as one message.

    Raises:
        ArtefactError: for more than 2 GB in memory.
    """
    size = model.ByteSize()
    if size > _PARSED:
        raise ArtefactError(
            f"the model holds {size} bytes in memory, and {step} takes {_PARSED} at most "
            "(protobuf's limit); leave its weights in a file beside it with "
            "onnx.load(path, load_external_data=False)"
        )


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
