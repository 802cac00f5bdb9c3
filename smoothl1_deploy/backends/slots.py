"""Arrays of one shape bound to a session once: what makes a small call cheap.

Handing two numpy arrays to ONNX Runtime and taking one back costs about as much as a loss of a
thousand elements. Copying them into arrays that are bound already costs a tenth of that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from ..artefact import Port
from ..floats import NUMPY_DTYPE, Array
from ..graph.elements import ELEMENT_TYPE

__all__ = ["Slots"]

Shape = tuple[int, ...]


class _Slot:
    """One set of bound arrays; for one call at a time."""

    def __init__(
        self, session: Any, inputs: list[Port], outputs: dict[Port, Shape], shape: Shape
    ) -> None:
        self.shape = shape
        self._run = session.run_with_iobinding
        self._binding = session.io_binding()
        self._input, self._target = (np.empty(shape, NUMPY_DTYPE[p.dtype]) for p in inputs)
        self._outputs = {
            port.name: np.empty(its_shape, NUMPY_DTYPE[port.dtype])
            for port, its_shape in outputs.items()
        }
        for port, array in zip(inputs, (self._input, self._target), strict=True):
            self._binding.bind_input(*_address(port, array))
        for port, array in zip(outputs, self._outputs.values(), strict=True):
            self._binding.bind_output(*_address(port, array))

    def run(self, input: Array, target: Array) -> dict[str, Array]:
        self._input[...] = input
        self._target[...] = target
        self._run(self._binding)
        return {name: array.copy() for name, array in self._outputs.items()}


def _address(port: Port, array: Array) -> tuple[Any, ...]:
    return port.name, "cpu", 0, ELEMENT_TYPE[port.dtype], array.shape, array.ctypes.data


class Slots:
    """Bound arrays of the last shape, as many as there were calls at once.

    Args:
        session: an ONNX Runtime session of two inputs.
        inputs: of the session: the prediction and the target.

    `run` may be called from many threads at once.
    """

    def __init__(self, session: Any, inputs: list[Port]) -> None:
        self._session = session
        self._inputs = inputs
        self._free: deque[_Slot | None] = deque()

    def run(
        self, input: Array, target: Array, outputs: Callable[[Shape], dict[Port, Shape]]
    ) -> dict[str, Array]:
        """The outputs for two arrays of one shape, not empty, and of the ports' dtypes.

        `outputs` tells the session's, each with its shape, for inputs of one shape.
        """
        try:
            slot = self._free.pop()  # in one step: another thread may want it
        except IndexError:
            slot = None
        if slot is None or slot.shape != input.shape:
            slot = _Slot(self._session, self._inputs, outputs(input.shape), input.shape)
        found = slot.run(input, target)
        self._free.append(slot)
        return found
