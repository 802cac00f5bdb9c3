"""`ort-cpu`: ONNX Runtime's CPU execution provider."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from ..errors import InvalidInputError, UnsupportedError, require
from ..floats import NUMPY_DTYPE, Array
from ..graph.elements import ELEMENT_TYPE
from .base import Backend, Runner

__all__ = ["OrtCpuBackend"]

_ERROR = 3  # ONNX Runtime's logging level


class OrtRunner(Runner):
    """One inference session; `run` may be called from many threads at once."""

    def __init__(self, model: onnx.ModelProto, ort: Any, threads: int) -> None:
        super().__init__(model)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = _ERROR
        try:
            self._session = ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as exc:  # pybind raises a class of its own for each status code
            raise UnsupportedError(f"ONNX Runtime can't load the model: {exc}") from exc
        self._ort = ort
        ports = (*self.signature.inputs.values(), *self.signature.outputs)
        # numpy has no bfloat16 that ONNX Runtime's Python interface would take.
        self._by_address = any(port.dtype == "bfloat16" for port in ports)

    def _execute(self, feeds: dict[str, Array], shape: tuple[int, ...]) -> dict[str, Array]:
        try:
            if self._by_address:
                return self._run_bound(feeds, shape)
            named = {self.signature.inputs[role].name: array for role, array in feeds.items()}
            values = self._session.run(None, named)
        except Exception as exc:
            raise InvalidInputError(f"ONNX Runtime refused the inputs: {exc}") from exc
        ports = self.signature.outputs
        return {port.name: np.asarray(v) for port, v in zip(ports, values, strict=True)}

    def _run_bound(self, feeds: dict[str, Array], shape: tuple[int, ...]) -> dict[str, Array]:
        binding = self._session.io_binding()
        outputs: dict[str, Array] = {}
        for role, array in feeds.items():
            port = self.signature.inputs[role]
            element = ELEMENT_TYPE[port.dtype]
            binding.bind_input(port.name, "cpu", 0, element, array.shape, array.ctypes.data)
        for port in self.signature.outputs:
            out = np.empty(self._output_shape(port, feeds, shape), NUMPY_DTYPE[port.dtype])
            element = ELEMENT_TYPE[port.dtype]
            binding.bind_output(port.name, "cpu", 0, element, out.shape, out.ctypes.data)
            outputs[port.name] = out
        self._session.run_with_iobinding(binding)
        return outputs


class OrtCpuBackend(Backend):
    """ONNX Runtime on the CPU."""

    name = "ort-cpu"

    def __init__(self) -> None:
        self._ort = require("onnxruntime", "cpu", "the ort-cpu backend")

    def load(self, model: onnx.ModelProto) -> Runner:
        """Open an inference session on `model`."""
        return OrtRunner(model, self._ort, self.threads)
