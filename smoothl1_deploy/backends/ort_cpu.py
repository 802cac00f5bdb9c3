"""`ort-cpu`: ONNX Runtime's CPU execution provider."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from ..artefact import Port
from ..errors import InvalidInputError, UnsupportedError, require
from ..floats import NUMPY_DTYPE, Array
from ..graph.elements import ELEMENT_TYPE
from ..graph.tiles import why_not_tiled
from ..ops import library, register
from .base import Backend, Runner
from .crew import Crew, default_threads
from .slots import Slots
from .sums import ROW, Sums, has_sums
from .tiles import Tiles

__all__ = ["SILENT", "OrtCpuBackend", "OrtOpsBackend", "OrtTiledBackend"]

#: ONNX Runtime's logging level of sessions: fatal only. What else a session would write to the
#: process's stderr, it raises as well, and probes of anyone's model fail on purpose.
SILENT = 4

#: Elements up to which a sum is quickest by the artefact's own graph; see bench/NOTES.md.
_FEW = 1 << 12


class OrtRunner(Runner):
    """One inference session; `run` may be called from many threads at once.

    Args:
        model: the artefact.
        ort: the module onnxruntime.
        threads: for one call.
        tile: elements of a tile, where larger arrays are to be cut into tiles; 0 to run the
            artefact's own graph on arrays of any size.
        prepare: what is done to the options of a session before it is opened.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        ort: Any,
        threads: int,
        tile: int,
        prepare: Callable[[Any], None] | None = None,
    ) -> None:
        super().__init__(model)
        self._ort = ort
        self._prepare = prepare
        self._threads = threads
        self._session = self._open(model.SerializeToString(), threads)
        ports = (*self.signature.inputs.values(), *self.signature.outputs)
        # numpy has no bfloat16 that ONNX Runtime's Python interface would take.
        self._by_address = any(port.dtype == "bfloat16" for port in ports)
        self._input_names = {role: port.name for role, port in self.signature.inputs.items()}
        self._output_names = [port.name for port in self.signature.outputs]
        self._tile = tile
        self._crew = Crew(threads)
        self._lock = threading.Lock()
        self._tiles: Tiles | None = None
        self._sums: Sums | None = None
        # What is known of an exported graph holds of no other: another's runs as it is, and of
        # its outputs the shapes aren't known.
        own = self.spec if self.exported else None
        self._has_sums = own is not None and has_sums(own)
        # Up to so many elements the artefact's own graph is what runs.
        self._few: float = min(tile, _FEW) if self._has_sums else tile
        if not tile or own is None or why_not_tiled(own):
            self._few = math.inf
        pair = [self.signature.input, self.signature.target]
        self._slots = Slots(self._session, pair) if own and prepare is None else None

    def added_in_float32(self, size: int) -> int:
        """A row of `sums.ROW` where the sums are had that way."""
        return ROW if self._has_sums and size > self._few else 1

    def _shapes(self, shape: tuple[int, ...]) -> dict[Port, tuple[int, ...]]:
        feeds = {"input": np.empty(shape)}
        return {port: self._output_shape(port, feeds, shape) for port in self.signature.outputs}

    def _open(self, model: bytes, threads: int) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = SILENT
        # Idle threads sleep: others have work for the cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self._prepare is not None:
            self._prepare(options)
        try:
            return self._ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # pybind raises a class of its own for each status code
            raise UnsupportedError(f"ONNX Runtime can't load the model: {exc}") from exc

    def _execute(self, feeds: dict[str, Array], shape: tuple[int, ...]) -> dict[str, Array]:
        try:
            many = feeds["input"].size > self._few and _of_one_shape(feeds, shape)
            if many and self._has_sums:
                loss = self._prepared_sums().run(feeds["input"], feeds["target"])
                if loss is not None:
                    return {"loss": loss}
            return self._by_its_own_graph(feeds, shape, many)
        except Exception as exc:
            raise InvalidInputError(f"ONNX Runtime refused the inputs: {exc}") from exc

    def _execute_pair(self, input: Array, target: Array) -> dict[str, Array]:
        feeds = {"input": input, "target": target}
        try:
            if self._slots is not None and 0 < input.size <= min(_FEW, self._few):
                return self._slots.run(input, target, self._shapes)
            many = input.size > self._few
            if many and self._sums is not None:
                loss = self._sums.run(input, target)
                if loss is not None:
                    return {"loss": loss}
            return self._by_its_own_graph(feeds, input.shape, many)
        except Exception as exc:
            raise InvalidInputError(f"ONNX Runtime refused the inputs: {exc}") from exc

    def _by_its_own_graph(
        self, feeds: dict[str, Array], shape: tuple[int, ...], many: bool
    ) -> dict[str, Array]:
        if many and feeds["input"].size > self._tile:
            return self._prepared_tiles().run(feeds, shape)
        if self._by_address:
            return self._run_bound(feeds, shape)
        named = {self._input_names[role]: array for role, array in feeds.items()}
        values = self._session.run(self._output_names, named)
        return dict(zip(self._output_names, map(np.asarray, values), strict=True))

    # Prepared when first needed: a caller with few elements never pays for them.

    def _prepared_sums(self) -> Sums:
        with self._lock:
            if self._sums is None:
                assert self.spec is not None
                self._sums = Sums(self.spec, self._open_tile, self._tile, self._crew)
            return self._sums

    def _prepared_tiles(self) -> Tiles:
        with self._lock:
            if self._tiles is None:
                assert self.spec is not None
                self._tiles = Tiles(self.spec, self._open_tile, self._tile, self._crew)
            return self._tiles

    def _open_tile(self, model: bytes) -> Any:
        return self._open(model, 1)

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


class OrtOpsBackend(OrtCpuBackend):
    """ONNX Runtime on the CPU, with the operators of `ops`: the file alone, at every size."""

    name = "ort-cpu-ops"

    def __init__(self) -> None:
        super().__init__()
        library()

    def load(self, model: onnx.ModelProto) -> Runner:
        """Open an inference session on `model` in which the operators are registered."""
        return OrtRunner(model, self._ort, self.threads or default_threads(), 0, register)


class OrtTiledBackend(OrtCpuBackend):
    """What `ort-cpu` does to large arrays, done to small ones: for the matrix to check it."""

    name = "ort-cpu-tiled"
    tile = 64
