"""`mean` and `sum` of many elements, faster than the artefact's own graph and as exact.

With `core = clip(d, -beta, beta)` an element loss is `core * (d - core / 2) / beta`, and the
division is left for the end. That saves two operators; and instead of casting every element to
float64 it casts sums of 32, added up in float32.

What that costs: ONNX Runtime adds up 32 elements in a few lanes side by side, so equal numbers are
doubled rather than piled up. For constant, periodic and random data the sum stays within 2 ULP of
the exact one (PyTorch within 7; bench/NOTES.md), which tests/backends/test_sums.py holds it to.

What can't be had this way shows in the sum, and then the artefact's own arithmetic answers:
`core * d` overflows where the loss may not, and underflows sooner, for a small beta. The sum is
then infinite, NaN, or so small that an underflow may matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ..floats import NUMPY_DTYPE, Array
from ..graph.elements import ELEMENT_TYPE, IR_VERSION
from ..spec import LossSpec
from .crew import Crew

__all__ = ["ROW", "Sums", "has_sums", "sums_model"]

#: Elements that are added up in float32.
ROW = 32

#: A mean of `core * (d - core / 2)` below it may owe something to underflow, above it not 2^-48.
_SAFE = 2.0**-100


def has_sums(spec: LossSpec) -> bool:
    """Whether the sum of `spec` can be had this way at all."""
    return (
        spec.reduction != "none"
        and spec.dtype in ("float32", "float16")  # numpy hands bfloat16 to no runtime
        and 0 < spec.effective_beta < math.inf
        and not (spec.per_sample or spec.gradient or spec.runtime_beta or spec.weight)
    )


def sums_model(spec: LossSpec) -> onnx.ModelProto:
    """`input` and `target` [rows, 32] to `sum`, float64, of `core * (d - core / 2)`."""
    beta = spec.effective_beta
    element = ELEMENT_TYPE[spec.dtype]
    constants = {"low": -beta, "high": beta, "half": 0.5}
    nodes = [
        helper.make_node("Sub", ["input_wide", "target_wide"], ["d"]),
        helper.make_node("Clip", ["d", "low", "high"], ["core"]),
        helper.make_node("Mul", ["core", "half"], ["core_half"]),
        helper.make_node("Sub", ["d", "core_half"], ["excess"]),
        helper.make_node("Mul", ["core", "excess"], ["losses"]),
        helper.make_node("ReduceSum", ["losses", "last"], ["rows"], keepdims=0),
        helper.make_node("Cast", ["rows"], ["rows_wide"], to=TensorProto.DOUBLE),
        helper.make_node("ReduceSum", ["rows_wide"], ["sum"], keepdims=0),
    ]
    names = ["input", "target"]
    if spec.dtype == "float32":
        for node in nodes[:1]:
            node.input[:] = names
    else:
        casts = [
            helper.make_node("Cast", [name], [f"{name}_wide"], to=TensorProto.FLOAT)
            for name in names
        ]
        nodes = [*casts, *nodes]
    graph = helper.make_graph(
        nodes,
        f"{spec.name}_sums",
        [helper.make_tensor_value_info(name, element, ("rows", ROW)) for name in names],
        [helper.make_tensor_value_info("sum", TensorProto.DOUBLE, ())],
        [
            *(
                helper.make_tensor(name, TensorProto.FLOAT, (), [v])
                for name, v in constants.items()
            ),
            helper.make_tensor("last", TensorProto.INT64, (1,), [1]),
        ],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=IR_VERSION
    )


class Sums:
    """The sums of one artefact.

    Args:
        spec: `has_sums` says that it has them.
        open_session: opens an ONNX Runtime session on the bytes of a model, for one thread.
        tile: elements of a tile.
        crew: whose threads share the tiles.

    `run` may be called from many threads at once.
    """

    def __init__(
        self, spec: LossSpec, open_session: Callable[[bytes], Any], tile: int, crew: Crew
    ) -> None:
        self._session = open_session(sums_model(spec).SerializeToString())
        self._beta = spec.effective_beta
        self._is_mean = spec.reduction == "mean"
        self._dtype = NUMPY_DTYPE[spec.dtype]
        self._most = float(np.finfo(self._dtype).max)
        self._rows = max(1, tile // ROW)
        self._crew = crew

    def run(self, input: Array, target: Array) -> Array | None:
        """The loss of two contiguous arrays of one shape, rank 0.

        None where it can't be trusted; then the artefact's own arithmetic has the answer.
        """
        size = input.size
        rows = size // ROW
        if rows * ROW == size:
            pair = input.reshape(rows, ROW), target.reshape(rows, ROW)
        else:
            a, b = input.reshape(-1)[: rows * ROW], target.reshape(-1)[: rows * ROW]
            pair = a.reshape(rows, ROW), b.reshape(rows, ROW)
        total = self._sum(*pair) if rows <= self._rows else self._shared(*pair)
        if rows * ROW < size:
            # What is left over, beside zeros, whose loss is 0.
            rest = np.zeros((2, 1, ROW), self._dtype)
            rest[0, 0, : size - rows * ROW] = input.reshape(-1)[rows * ROW :]
            rest[1, 0, : size - rows * ROW] = target.reshape(-1)[rows * ROW :]
            total += self._sum(rest[0], rest[1])
        if not _SAFE * size <= total < math.inf:
            return None
        loss = total / (self._beta * size) if self._is_mean else total / self._beta
        return np.array(loss, self._dtype) if loss < self._most else None

    def _sum(self, input: Array, target: Array) -> float:
        return float(self._session.run(_OUTPUT, {"input": input, "target": target})[0])

    def _shared(self, input: Array, target: Array) -> float:
        parts = -(-len(input) // self._rows)
        step = -(-len(input) // parts)
        sums = [0.0] * parts

        def begin() -> Callable[[int], None]:
            def do(index: int) -> None:
                rows = slice(index * step, (index + 1) * step)
                sums[index] = self._sum(input[rows], target[rows])

            return do

        self._crew.share(parts, begin)
        return sum(sums)  # in their order, whichever thread was first


_OUTPUT = ["sum"]
