"""`onnx-reference`: the ONNX project's own evaluator, in numpy; slow, and what the text means."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_reduce_sum import ReduceSum_13

from .._floats import NUMPY_DTYPE, Array
from ..errors import UnsupportedError
from ._base import Backend
from ._runner import Runner
from ._whole import Session


class _ReduceSum(ReduceSum_13):
    """Our correction of the evaluator (onnx 1.23), which adds 0 where nothing is to be reduced.

    The standard has ReduceSum return its input where `noop_with_empty_axes` holds and there are
    no axes; 0 + -0 is +0.
    """

    op_domain = ""

    def _run(
        self, x: Any, axes: Any = None, keepdims: Any = None, noop_with_empty_axes: Any = None
    ) -> Any:
        if noop_with_empty_axes and axes is not None and axes.size == 0:
            return (x,)
        return super()._run(x, axes, keepdims, noop_with_empty_axes)  # type: ignore[no-untyped-call]


class _Flatten(OpRun):
    """Our correction of the evaluator (onnx 1.23), which can't flatten a tensor without rows."""

    op_domain = ""

    def _run(self, x: Any, axis: int = 1) -> Any:
        return (x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:])),)


for _operator in (_ReduceSum, _Flatten):
    _operator.__name__ = _operator.__name__[1:]  # the evaluator goes by the name


class _Evaluator(ReferenceEvaluator):
    """The evaluator, corrected; for each function of a model it makes another of its own class."""

    def __init__(self, proto: Any, **arguments: Any) -> None:
        super().__init__(proto, **{**arguments, "new_ops": [_ReduceSum, _Flatten]})


def _evaluator(model: onnx.ModelProto) -> _Evaluator:
    try:
        return _Evaluator(model)
    except Exception as exc:  # damage comes to light in numpy, or in operators it doesn't know
        raise UnsupportedError(f"the ONNX reference evaluator can't load it: {exc}") from exc


def _evaluated(evaluator: _Evaluator, feeds: dict[str, Array]) -> list[Any]:
    try:
        with np.errstate(all="ignore"):  # overflow and NaN are results here, not accidents
            return list(evaluator.run(None, feeds))
    except Exception as exc:  # numpy's and the evaluator's own, of any class
        raise UnsupportedError(f"the ONNX reference evaluator failed: {exc}") from exc


class ReferenceRunner(Runner):
    """Evaluates the graph node by node."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        self._evaluator = _evaluator(model)

    def _execute(self, feeds: dict[str, Array], shape: tuple[int, ...]) -> dict[str, Array]:
        values = _evaluated(self._evaluator, self._named(feeds))
        ports = self.signature.outputs
        return {
            port.name: np.asarray(value, NUMPY_DTYPE[port.dtype])
            for port, value in zip(ports, values, strict=True)
        }


class ReferenceBackend(Backend):
    """`onnx.reference.ReferenceEvaluator`."""

    name = "onnx-reference"
    large = False

    def load(self, model: onnx.ModelProto) -> Runner:
        """Prepare `model` for evaluation in numpy."""
        return ReferenceRunner(model)

    def open(self, model: onnx.ModelProto) -> Session:
        """Prepare the whole of `model` for evaluation in numpy."""
        evaluator = _evaluator(model)
        names = [value.name for value in model.graph.output]
        return lambda feeds: dict(zip(names, _evaluated(evaluator, feeds), strict=True))
