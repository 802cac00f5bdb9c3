"""`onnx-reference`: the ONNX project's own evaluator, in numpy; slow, and what the text means."""

from __future__ import annotations

import numpy as np
import onnx

from ..floats import NUMPY_DTYPE, Array
from .base import Backend, Runner

__all__ = ["ReferenceBackend"]


class ReferenceRunner(Runner):
    """Evaluates the graph node by node."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        from onnx.reference import ReferenceEvaluator

        self._evaluator = ReferenceEvaluator(model)

    def _execute(self, input: Array, target: Array, shape: tuple[int, ...]) -> dict[str, Array]:
        feeds = {self.signature.input.name: input, self.signature.target.name: target}
        with np.errstate(all="ignore"):  # overflow and NaN are results here, not accidents
            values = self._evaluator.run(None, feeds)
        ports = self.signature.outputs
        return {
            port.name: np.asarray(value, NUMPY_DTYPE[port.dtype])
            for port, value in zip(ports, values, strict=True)
        }


class ReferenceBackend(Backend):
    """`onnx.reference.ReferenceEvaluator`."""

    name = "onnx-reference"

    def load(self, model: onnx.ModelProto) -> Runner:
        """Prepare `model` for evaluation in numpy."""
        return ReferenceRunner(model)
