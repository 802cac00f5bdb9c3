"""A backend `onnxruntime` for the embedded Triton, which brings only the `python` backend.

The launcher copies this file, as `onnxruntime/model.py`, into the backend directory: a
*python-based backend*, which makes `platform: "onnxruntime_onnx"` with `1/model.onnx` load
unchanged. It runs inside Triton's stub process, where this package need not be importable: it
imports numpy, onnxruntime, and `loss_metrics` where that is copied beside it. So is the library of
`smoothl1_deploy.ops`, the only one that it registers.

Tensors go both ways by DLPack, because `as_numpy()` of this stub, built against numpy 1, gives
wrong values with numpy 2 and no error.
"""

from __future__ import annotations

import contextlib
import ctypes
import filecmp
import importlib
import json
import os
from typing import Any

import numpy as np

__all__ = ["OPERATORS", "TritonPythonModel"]

#: What the library of operators is called beside this file.
OPERATORS = "operators.so"

#: Triton's name -> (ONNX Runtime's, ONNX's element type, numpy's).
_TYPES: dict[str, tuple[str, int, Any]] = {
    "TYPE_FP16": ("tensor(float16)", 10, np.float16),
    "TYPE_BF16": ("tensor(bfloat16)", 16, np.uint16),  # carried as its bits
    "TYPE_FP32": ("tensor(float)", 1, np.float32),
    "TYPE_FP64": ("tensor(double)", 11, np.float64),
    "TYPE_INT32": ("tensor(int32)", 6, np.int32),
    "TYPE_INT64": ("tensor(int64)", 7, np.int64),
}
_UINT, _BFLOAT = 1, 4  # DLDataTypeCode


class _DLTensor(ctypes.Structure):
    """The head of a `DLManagedTensor`, source: dlpack.h 0.8."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
    )


class _Capsule:
    """A DLPack capsule of a C-contiguous tensor, its numbers called `code` where one is given."""

    def __init__(self, capsule: Any, code: int | None = None) -> None:
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        tensor = _DLTensor.from_address(pointer(capsule, b"dltensor"))
        tensor.strides = None  # Triton refuses those that an empty array may have
        if code is not None:
            tensor.code = code  # numpy's DLPack knows no bfloat16
        self._capsule = capsule

    def given_away(self) -> _Capsule:
        """Itself, without numpy's destructor.

        The stub takes the memory over and calls the capsule "used_dlpack", where the standard has
        "used_dltensor": numpy would write an error for each tensor into the server's log.
        """
        forget = ctypes.pythonapi.PyCapsule_SetDestructor
        forget.argtypes = (ctypes.py_object, ctypes.c_void_p)
        forget(self._capsule, None)
        return self

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # the CPU


class TritonPythonModel:
    """One instance of a model; the names of class and methods are those Triton calls."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Open the session, after the config was held against the graph as the C++ backend does."""
        self._pb = importlib.import_module("triton_python_backend_utils")
        self._ort = importlib.import_module("onnxruntime")
        config = json.loads(args["model_config"])
        name = config.get("default_model_filename") or "model.onnx"
        path = os.path.join(args["model_repository"], str(args["model_version"]), name)
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        threads = config.get("parameters", {}).get("intra_op_thread_count", {})
        options.intra_op_num_threads = int(threads.get("string_value", "1"))
        named = config.get("model_operations", {}).get("op_library_filename", [])
        for library in {self._operators(path) for path in named}:
            options.register_custom_ops_library(library)
        self._session = self._ort.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self._batches = int(config["max_batch_size"]) > 0
        self._inputs = self._checked(config["input"], self._session.get_inputs(), "input")
        self._outputs = self._checked(config["output"], self._session.get_outputs(), "output")
        self._metrics: Any = None
        self._losses: list[str] = []
        self._canary_id = ""
        with contextlib.suppress(ModuleNotFoundError):  # copied only where it was asked for
            module = importlib.import_module("loss_metrics")
            self._canary_id = module.CANARY_ID
            self._losses = [name for name in self._outputs if name in module.OUTPUTS]
            self._metrics = module.LossMetrics(
                self._pb, args["model_name"], str(args["model_version"])
            )
        graph_inputs = {value.name for value in self._session.get_inputs()}
        absent = sorted(graph_inputs - {*self._inputs})
        if absent:
            raise self._pb.TritonModelException(
                f"the graph needs the inputs {absent}, which config.pbtxt doesn't have"
            )

    def _operators(self, path: str) -> str:
        """The launcher's copy of the library that a config names: it is run, and no other."""
        own = os.path.join(os.path.dirname(__file__), OPERATORS)
        with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL in the name
            if filecmp.cmp(path, own, shallow=False):
                return own
        raise self._pb.TritonModelException(
            f"config.pbtxt names the operator library {path!r}, and the embedded server runs none "
            "but that of its own installation; write the model again with smoothl1-deploy "
            "repository --ops, or take model_operations out of its config"
        )

    def _checked(self, ports: Any, values: Any, kind: str) -> dict[str, str]:
        """Name -> Triton dtype of the config's ports, each held against the graph's."""
        known = {value.name: value for value in values}
        for port in ports:
            name, dtype = port["name"], port["data_type"]
            if name not in known:
                raise self._pb.TritonModelException(
                    f"config.pbtxt has the {kind} {name!r}, but the graph has {sorted(known)}"
                )
            value = known[name]
            if dtype not in _TYPES or _TYPES[dtype][0] != value.type:
                raise self._pb.TritonModelException(
                    f"{kind} {name!r} is {dtype} in config.pbtxt and {value.type} in the graph"
                )
            dims = [-1] * self._batches + [int(dim) for dim in port["dims"]]
            shape = [dim if isinstance(dim, int) else -1 for dim in value.shape]
            pairs = zip(dims, shape, strict=False)
            if len(dims) != len(shape) or any(a != b and -1 not in (a, b) for a, b in pairs):
                batch = " (with the batch's axis)" if self._batches else ""
                raise self._pb.TritonModelException(
                    f"{kind} {name!r} has the shape {dims}{batch} in config.pbtxt and {shape} in "
                    "the graph"
                )
        return {port["name"]: port["data_type"] for port in ports}

    def execute(self, requests: list[Any]) -> list[Any]:
        """One answer, or one error, for each request."""
        feeds = [self._feeds(request) for request in requests]
        self._counted = [request.request_id() != self._canary_id for request in requests]
        responses = self._responses(feeds)
        if self._metrics is not None:
            self._metrics.tell()
        return responses

    def _responses(self, feeds: list[dict[str, Any]]) -> list[Any]:
        if self._batches and len(feeds) > 1 and _stackable(feeds):
            try:
                return self._split(feeds, self._run(_stacked(feeds)))
            except Exception:  # one of them is wrong: each is tried alone
                pass
        return [self._answer(*item) for item in zip(feeds, self._counted, strict=True)]

    def _answer(self, feeds: dict[str, Any], counted: bool) -> Any:
        try:
            return self._response(self._run(feeds), counted)
        except Exception as exc:  # pybind raises a class of its own for each status code
            error = self._pb.TritonError(
                f"onnx runtime error: {exc}", self._pb.TritonError.INVALID_ARG
            )
            return self._pb.InferenceResponse(error=error)

    def _feeds(self, request: Any) -> dict[str, Any]:
        feeds = {}
        for tensor in request.inputs():
            name = tensor.name()
            if self._inputs[name] == "TYPE_BF16":
                array = np.from_dlpack(_Capsule(tensor.to_dlpack(), _UINT))
            else:
                array = np.from_dlpack(tensor)
            feeds[name] = array
        return feeds

    def _run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        names = list(self._outputs)
        if "TYPE_BF16" not in (*self._inputs.values(), *self._outputs.values()):
            return dict(zip(names, self._session.run(names, feeds), strict=True))
        make = self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type
        values = {
            name: make(np.ascontiguousarray(array), _TYPES[self._inputs[name]][1])
            for name, array in feeds.items()
        }
        outputs = self._session.run_with_ort_values(names, values)
        return {name: self._array(name, value) for name, value in zip(names, outputs, strict=True)}

    def _array(self, name: str, value: Any) -> Any:
        """A copy of what an OrtValue holds; its own numpy() knows no bfloat16."""
        shape, dtype = value.shape(), np.dtype(_TYPES[self._outputs[name]][2])
        size = int(np.prod(shape)) * dtype.itemsize
        data = ctypes.string_at(value.data_ptr(), size) if size else b""
        return np.frombuffer(bytearray(data), dtype).reshape(shape)

    def _response(self, outputs: dict[str, Any], counted: bool) -> Any:
        for name in self._losses if counted else ():
            self._metrics.count(self._numbers(name, outputs[name]))
        return self._pb.InferenceResponse([self._tensor(*item) for item in outputs.items()])

    def _numbers(self, name: str, array: Any) -> Any:
        if self._outputs[name] != "TYPE_BF16":
            return array
        return (array.astype(np.uint32) << 16).view(np.float32)

    def _tensor(self, name: str, array: Any) -> Any:
        if not array.flags.writeable or not array.flags.c_contiguous:  # numpy exports no other
            array = array.copy()
        code = _BFLOAT if self._outputs[name] == "TYPE_BF16" else None
        return self._pb.Tensor.from_dlpack(name, _Capsule(array.__dlpack__(), code).given_away())

    def _split(self, feeds: list[dict[str, Any]], outputs: dict[str, Any]) -> list[Any]:
        rows = [len(next(iter(feed.values()))) for feed in feeds]
        ends = np.cumsum(rows)
        if any(len(array) != ends[-1] for array in outputs.values()):
            raise ValueError("an output has not one row for each row of the inputs")
        return [
            self._response({name: array[end - n : end] for name, array in outputs.items()}, counted)
            for n, end, counted in zip(rows, ends, self._counted, strict=True)
        ]


def _stackable(feeds: list[dict[str, Any]]) -> bool:
    def rests(feed: dict[str, Any]) -> list[tuple[str, Any]]:
        return sorted((name, array.shape[1:]) for name, array in feed.items())

    same_rows = all(len({len(array) for array in feed.values()}) == 1 for feed in feeds)
    return same_rows and all(rests(feed) == rests(feeds[0]) for feed in feeds)


def _stacked(feeds: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
