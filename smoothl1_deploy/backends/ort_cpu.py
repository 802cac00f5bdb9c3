"""`ort-cpu`: ONNX Runtime's CPU execution provider."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import onnx

from ..errors import InvalidInputError, UnsupportedError, require
from ..floats import NUMPY_DTYPE, Array
from ..graph.elements import ELEMENT_TYPE
from ..graph.tiles import why_not_tiled
from .base import Backend, Runner
from .tiles import Tiles, default_threads

__all__ = ["OrtCpuBackend", "OrtTiledBackend"]

_ERROR = 3  # ONNX Runtime's logging level


class OrtRunner(Runner):
    """One inference session; `run` may be called from many threads at once.

    Args:
        model: the artefact.
        ort: the module onnxruntime.
        threads: for one call.
        tile: elements of a tile, where larger arrays are to be cut into tiles; 0 to run the
            artefact's own graph on arrays of any size.
    """

    def __init__(self, model: onnx.ModelProto, ort: Any, threads: int, tile: int) -> None:
        super().__init__(model)
        self._ort = ort
        self._threads = threads
        self._session = self._open(model.SerializeToString(), threads)
        ports = (*self.signature.inputs.values(), *self.signature.outputs)
        # numpy has no bfloat16 that ONNX Runtime's Python interface would take.
        self._by_address = any(port.dtype == "bfloat16" for port in ports)
        can_tile = self.spec is not None and why_not_tiled(self.spec) is None
        self._tile = tile if can_tile else 0
        self._tiles: Tiles | None = None
        self._lock = threading.Lock()

    def _open(self, model: bytes, threads: int) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = _ERROR
        # Idle threads sleep: others have work for the cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            return self._ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # pybind raises a class of its own for each status code
            raise UnsupportedError(f"ONNX Runtime can't load the model: {exc}") from exc

    def _execute(self, feeds: dict[str, Array], shape: tuple[int, ...]) -> dict[str, Array]:
        try:
            if 0 < self._tile < feeds["input"].size and _of_one_shape(feeds, shape):
                return self._tiled().run(feeds, shape)
            if self._by_address:
                return self._run_bound(feeds, shape)
            named = {self.signature.inputs[role].name: array for role, array in feeds.items()}
            values = self._session.run(None, named)
        except Exception as exc:
            raise InvalidInputError(f"ONNX Runtime refused the inputs: {exc}") from exc
        ports = self.signature.outputs
        return {port.name: np.asarray(v) for port, v in zip(ports, values, strict=True)}

    def _tiled(self) -> Tiles:
        """The tiles, prepared when they are first needed: small calls never pay for them."""
        with self._lock:
            if self._tiles is None:
                assert self.spec is not None
                self._tiles = Tiles(
                    self.spec, lambda model: self._open(model, 1), self._tile, self._threads
                )
            return self._tiles

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


def _of_one_shape(feeds: dict[str, Array], shape: tuple[int, ...]) -> bool:
    return all(array.shape == shape for name, array in feeds.items() if name != "beta")


class OrtCpuBackend(Backend):
    """ONNX Runtime on the CPU."""

    name = "ort-cpu"

    def __init__(self) -> None:
        self._ort = require("onnxruntime", "cpu", "the ort-cpu backend")

    def load(self, model: onnx.ModelProto) -> Runner:
        """Open an inference session on `model`."""
        return OrtRunner(model, self._ort, self.threads or default_threads(), self.tile)


class OrtTiledBackend(OrtCpuBackend):
    """What `ort-cpu` does to large arrays, done to small ones: for the matrix to check it."""

    name = "ort-cpu-tiled"
    tile = 64
