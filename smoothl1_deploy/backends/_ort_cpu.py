"""`ort-cpu`: ONNX Runtime's CPU execution provider, one session on the file and nothing else."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from .. import ops
from .._floats import NUMPY_DTYPE, Array
from .._model import ELEMENT_TYPE
from ..errors import InvalidInputError, UnsupportedError, require
from ._base import Backend
from ._runner import Runner
from ._whole import Session

#: ONNX Runtime's logging level of sessions: fatal only. What else a session would write to the
#: process's stderr, it raises as well, and probes of anyone's model fail on purpose.
SILENT = 4

_MOST_THREADS = 8  # one loss takes no more of a large machine


def default_threads() -> int:
    """Every core this process may run on, but `_MOST_THREADS` at most."""
    try:
        found = len(os.sched_getaffinity(0))
    except AttributeError:  # not every system has affinities
        found = os.cpu_count() or 1
    return min(found, _MOST_THREADS)


def open_session(
    model: onnx.ModelProto, ort: Any, threads: int, prepare: Callable[[Any], None] | None = None
) -> Any:
    """A session on the CPU.

    Args:
        model: what it runs.
        ort: the module onnxruntime.
        threads: for one call.
        prepare: what is done to its options before it is opened.

    Raises:
        UnsupportedError: with ONNX Runtime's words, where it can't load the model.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = SILENT
    # Idle threads sleep: others have work for the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if prepare is not None:
        prepare(options)
    try:
        return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    except Exception as exc:  # pybind raises a class of its own for each status code
        raise UnsupportedError(f"ONNX Runtime can't load the model: {exc}") from exc


def whole_session(session: Any, ort: Any) -> Session:
    """A session by names; bfloat16 too, which ONNX Runtime's Python interface takes as bits."""
    names = [port.name for port in session.get_outputs()]
    bfloat16, element = NUMPY_DTYPE["bfloat16"], ELEMENT_TYPE["bfloat16"]

    def given(array: Array) -> Any:
        if array.dtype == bfloat16:
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.int16), element)
        return ort.OrtValue.ortvalue_from_numpy(array)

    def made(value: Any) -> Array:
        if value.element_type() != element:
            return np.asarray(value.numpy())
        size = math.prod(value.shape())
        bits = (ctypes.c_uint16 * size).from_address(value.data_ptr()) if size else ()
        return np.array(bits, np.uint16).view(bfloat16).reshape(value.shape())

    def run(feeds: dict[str, Array]) -> dict[str, Array]:
        values = {name: given(array) for name, array in feeds.items()}
        try:
            outputs = session.run_with_ort_values(names, values)
        except Exception as exc:  # pybind raises a class of its own for each status code
            raise InvalidInputError(f"ONNX Runtime refused the inputs: {exc}") from exc
        return {name: made(value) for name, value in zip(names, outputs, strict=True)}

    return run


class OrtRunner(Runner):
    """One inference session; `run` may be called from many threads at once.

    Args:
        model: the artefact.
        open: makes a session of it.
    """

    def __init__(self, model: onnx.ModelProto, open: Callable[[onnx.ModelProto], Any]) -> None:
        super().__init__(model)
        self._session = open(model)
        ports = (*self.signature.inputs.values(), *self.signature.outputs)
        # numpy has no bfloat16 that ONNX Runtime's Python interface would take.
        self._by_address = any(port.dtype == "bfloat16" for port in ports)
        self._output_names = [port.name for port in self.signature.outputs]

    def _execute(self, feeds: dict[str, Array], shape: tuple[int, ...]) -> dict[str, Array]:
        try:
            if self._by_address:
                return self._run_bound(feeds, shape)
            values = self._session.run(self._output_names, self._named(feeds))
        except Exception as exc:
            raise InvalidInputError(f"ONNX Runtime refused the inputs: {exc}") from exc
        return dict(zip(self._output_names, map(np.asarray, values), strict=True))

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


class OrtBareBackend(Backend):
    """ONNX Runtime on the CPU with nothing registered: the file as anyone's session runs it."""

    name = "ort-cpu-bare"

    def __init__(self) -> None:
        self._ort = require("onnxruntime", "cpu", f"the {self.name} backend")

    def load(self, model: onnx.ModelProto) -> Runner:
        """Open an inference session on `model`."""
        return OrtRunner(model, self._session)

    def open(self, model: onnx.ModelProto) -> Session:
        """Open an inference session on the whole of `model`."""
        return whole_session(self._session(model), self._ort)

    def _session(self, model: onnx.ModelProto) -> Any:
        return open_session(model, self._ort, self.threads or default_threads())


class OrtCpuBackend(OrtBareBackend):
    """ONNX Runtime on the CPU, with the operators of `ops` where they were built."""

    name = "ort-cpu"

    def _session(self, model: onnx.ModelProto) -> Any:
        prepare = ops.register if ops.is_built() else None
        return open_session(model, self._ort, self.threads or default_threads(), prepare)

    def load_body(self, model: onnx.ModelProto) -> Runner | None:
        """Open a session without the operators, where one with them may run other code."""
        return OrtRunner(model, super()._session) if ops.is_built() and model.functions else None
