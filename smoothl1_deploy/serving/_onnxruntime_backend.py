"""A backend `onnxruntime` for the embedded Triton, which brings only the `python` backend.

`serve` copies this file, as `onnxruntime/model.py`, into the server's folder of backends: so it is
a *python-based backend*, with which `platform: "onnxruntime_onnx"` and `1/model.onnx` load
unchanged. It runs inside Triton's stub process, where this package need not be importable, and
imports numpy and onnxruntime alone. The library of `smoothl1_deploy.ops` is copied beside it, and
is the only library that it registers.

Tensors go both ways by DLPack and ONNX Runtime's own values, because `as_numpy()` of this stub,
which was built against numpy 1, gives wrong values with numpy 2 and no error.
"""

from __future__ import annotations

import contextlib
import ctypes
import filecmp
import importlib
import json
import os
import time
from typing import Any

import numpy as np

#: The name of the library of operators beside this file.
OPERATORS = "operators.so"
#: The environment variable that has the losses counted; see `LossMetrics`.
COUNT_LOSSES = "SMOOTHL1_DEPLOY_COUNT_LOSSES"
#: The request id of a canary, whose losses are not counted.
CANARY_ID = "smoothl1-deploy-canary"
#: Upper bounds of the buckets of losses; a bucket without a bound comes after them.
BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

_LOSSES = ("loss", "score")  # the names of the outputs that are losses
_PERIOD = 1.0  # seconds between two rounds of the counters, each of which sends the server messages

#: The data types that are served: Triton's name -> ONNX Runtime's.
_TYPES = {
    "TYPE_FP16": "tensor(float16)",
    "TYPE_BF16": "tensor(bfloat16)",
    "TYPE_FP32": "tensor(float)",
    "TYPE_FP64": "tensor(double)",
    "TYPE_INT32": "tensor(int32)",
    "TYPE_INT64": "tensor(int64)",
    "TYPE_BOOL": "tensor(bool)",
}


class TritonPythonModel:
    """One instance of a model; Triton calls the class and the methods by these names."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Open the session, and hold the config against the graph as the C++ backend does."""
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
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self._inputs = self._checked(config["input"], inputs, "input")
        self._outputs = self._checked(config["output"], outputs, "output")
        if absent := sorted({value.name for value in inputs} - {*self._inputs}):
            raise self._pb.TritonModelException(
                f"the graph needs the inputs {absent}, which config.pbtxt doesn't have"
            )
        # What goes by no DLPack to numpy and back, bfloat16 and booleans, is computed one by one.
        dtypes = {*self._inputs.values(), *self._outputs.values()}
        self._stacks = self._batches and dtypes.isdisjoint(("TYPE_BF16", "TYPE_BOOL"))
        self._metrics: LossMetrics | None = None
        if COUNT_LOSSES in os.environ:
            self._metrics = LossMetrics(self._pb, args["model_name"], str(args["model_version"]))

    def _operators(self, path: str) -> str:
        """The server's copy of the library that a config names; no other library is run."""
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
        """Name -> Triton's data type of the config's ports, after a comparison with the graph's."""
        known = {value.name: value for value in values}
        for port in ports:
            name, dtype = port["name"], port["data_type"]
            if name not in known:
                raise self._pb.TritonModelException(
                    f"config.pbtxt has the {kind} {name!r}, but the graph has {sorted(known)}"
                )
            value = known[name]
            dims = [-1] * self._batches + [int(dim) for dim in port["dims"]]
            shape = [dim if isinstance(dim, int) else -1 for dim in value.shape]
            fits = _TYPES.get(dtype) == value.type and len(dims) == len(shape)
            if not fits or any(
                a != b and -1 not in (a, b) for a, b in zip(dims, shape, strict=True)
            ):
                batch = ", with the batch's axis," if self._batches else ""
                raise self._pb.TritonModelException(
                    f"{kind} {name!r} is {dtype} {dims}{batch} in config.pbtxt and {value.type} "
                    f"{shape} in the graph"
                )
        return {port["name"]: port["data_type"] for port in ports}

    def execute(self, requests: list[Any]) -> list[Any]:
        """One answer, or one error, for each request."""
        feeds = [{t.name(): self._value(t) for t in one.inputs()} for one in requests]
        answers = None
        if self._stacks and len(feeds) > 1:
            with contextlib.suppress(Exception):  # a request is wrong: each is tried alone
                answers = self._stacked(feeds)
        answers = answers or [self._answer(feed) for feed in feeds]
        if self._metrics is not None:
            for request, answer in zip(requests, answers, strict=True):
                if request.request_id() != CANARY_ID and isinstance(answer, dict):
                    self._metrics.count(answer)
            self._metrics.tell()
        return [self._response(answer) for answer in answers]

    def _value(self, tensor: Any) -> Any:
        """An input where it lies.

        Booleans go by way of numpy: ONNX Runtime (1.31) refuses their DLPack, and Triton's own
        as_numpy (2.51) gives True for all of them.
        """
        if self._inputs[tensor.name()] == "TYPE_BOOL":
            return self._ort.OrtValue.ortvalue_from_numpy(np.from_dlpack(tensor))
        return self._ort.OrtValue.from_dlpack(tensor.to_dlpack())

    def _run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        names = list(self._outputs)
        return dict(zip(names, self._session.run_with_ort_values(names, feeds), strict=True))

    def _answer(self, feeds: dict[str, Any]) -> Any:
        """The outputs, or the exception that says why there are none."""
        try:
            return self._run(feeds)
        except Exception as exc:  # pybind raises a class of its own for each status code
            return exc

    def _response(self, answer: Any) -> Any:
        if isinstance(answer, Exception):
            error = self._pb.TritonError(
                f"onnx runtime error: {answer}", self._pb.TritonError.INVALID_ARG
            )
            return self._pb.InferenceResponse(error=error)
        make = self._pb.Tensor.from_dlpack
        outputs = [make(name, _dense(value)) for name, value in answer.items()]
        return self._pb.InferenceResponse(outputs)

    def _stacked(self, feeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The outputs of several requests, computed as one batch."""
        load = self._ort.OrtValue.from_dlpack
        arrays = [{name: np.from_dlpack(value) for name, value in f.items()} for f in feeds]
        counts = [len(next(iter(one.values()))) for one in arrays]
        if any({*map(len, one.values())} != {n} for one, n in zip(arrays, counts, strict=True)):
            raise ValueError("the inputs of a request differ in their rows")
        whole = {name: load(np.concatenate([one[name] for one in arrays])) for name in arrays[0]}
        ends = np.cumsum(counts)
        outputs = {name: np.from_dlpack(value) for name, value in self._run(whole).items()}
        if any(len(array) != ends[-1] for array in outputs.values()):
            raise ValueError("an output has not one row for each row of the inputs")
        return [
            {name: load(array[end - n : end].copy()) for name, array in outputs.items()}
            for n, end in zip(counts, ends, strict=True)
        ]


def _dense(value: Any) -> Any:
    """The DLPack capsule of an output as Triton takes it.

    ONNX Runtime 1.32 writes strides of 0 for a tensor without elements, which Triton takes for one
    that isn't contiguous; without strides it is. They stand behind data, device, number of axes,
    dtype and shape (DLTensor of dlpack.h, with pointers of 64 bits).
    """
    capsule = value.__dlpack__()
    if 0 in value.shape():
        pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
            ("PyCapsule_GetPointer", ctypes.pythonapi)
        )
        ctypes.c_void_p.from_address(pointer_of(capsule, b"dltensor") + 32).value = None
    return capsule


class LossMetrics:
    """The distribution of the losses that a model gave, as a histogram on the server's `/metrics`.

    This Triton has counters and no histograms for backends. So the buckets are counters with
    Prometheus' label `le`, which is what a histogram is on the wire. The server is told at most
    once a second.

    Args:
        pb: Triton's `triton_python_backend_utils`.
        model: the name of the model, for the label `model`.
        version: its version, for the label `version`.
    """

    def __init__(self, pb: Any, model: str, version: str) -> None:
        # The families must outlive their metrics.
        self._families = {
            name: pb.MetricFamily(
                name=f"smooth_l1_loss_{name}", description=text, kind=pb.MetricFamily.COUNTER
            )
            for name, text in (
                ("bucket", "Losses up to the bound le, cumulative"),
                ("sum", "Sum of the finite losses"),
                ("count", "Number of the finite losses"),
                ("not_finite", "Number of losses that are NaN or infinite"),
            )
        }
        counters = [("bucket", {"le": bound}) for bound in (*map(repr, BOUNDS), "+Inf")]
        counters += [(name, {}) for name in ("sum", "count", "not_finite")]
        self._counters = [
            self._families[name].Metric(labels={"model": model, "version": version, **more})
            for name, more in counters
        ]
        self._pending = np.zeros(len(counters))
        self._told = 0.0

    def count(self, outputs: dict[str, Any]) -> None:
        """Add the losses among the outputs of a request, of any shape and any float dtype."""
        for name in set(_LOSSES) & outputs.keys():
            values = _numbers(outputs[name])
            finite = values[np.isfinite(values)]
            below = [int(np.count_nonzero(finite <= bound)) for bound in BOUNDS]
            total, number = max(0.0, float(finite.sum())), len(finite)
            self._pending += np.array([*below, number, total, number, len(values) - number])

    def tell(self) -> None:
        """Tell the server what was counted, if it was told long enough ago."""
        now = time.monotonic()
        if now - self._told < _PERIOD:
            return
        self._told = now
        for counter, amount in zip(self._counters, self._pending, strict=True):
            if amount:
                counter.increment(float(amount))
        self._pending[:] = 0


def _numbers(value: Any) -> Any:
    """The numbers of an OrtValue, as float64."""
    if value.data_type() == "tensor(bfloat16)":  # bits that are the upper half of a float32's
        data = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
        bits = np.frombuffer(data, np.uint16)
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.from_dlpack(value).reshape(-1).astype(np.float64)
