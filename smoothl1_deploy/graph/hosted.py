"""The package's functions in somebody else's model: which opset they need, and how they go in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx

from ..errors import ArtefactError
from .convert import OLDEST, opset_of

__all__ = ["add_functions", "check_opset"]


def check_opset(
    model: onnx.ModelProto, functions: Iterable[onnx.FunctionProto], nodes: Iterable[onnx.NodeProto]
) -> None:
    """Whether the opset of `model` has what `functions` and `nodes` are made of.

    Raises:
        ArtefactError: for one that is too old; says how to convert the model.
    """
    every = [*nodes, *(node for function in functions for node in function.node)]
    reshapes = any(attribute.name == "allowzero" for n in every for attribute in n.attribute)
    opset, oldest = opset_of(model), 14 if reshapes else OLDEST
    if opset < oldest:
        raise ArtefactError(
            f"the model is of opset {opset}, and this loss needs {oldest}; convert it with "
            "convert_opset=True (--convert-opset), or onnx.version_converter"
        )


def add_functions(model: onnx.ModelProto, functions: Iterable[onnx.FunctionProto]) -> None:
    """Add the functions that `model` lacks; their bodies mean the same in every opset they allow.

    Raises:
        ArtefactError: when a function of that name is there and computes something else.
    """
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
