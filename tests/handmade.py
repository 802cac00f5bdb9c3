"""ONNX models of somebody else's, made from text, and bare sessions that run any model."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy then knows bfloat16)
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper, parser

from smoothl1_deploy import LossSpec, attach
from smoothl1_deploy._floats import ulp_distance

Array = NDArray[Any]


def model_of(
    text: str, opset: int = 18, ir: int = 8, imports: str = "", **constants: Array
) -> onnx.ModelProto:
    """The graph and the functions of `text`, with initialisers; `imports` are more domains."""
    head = f'<ir_version: {ir}, opset_import: ["" : {opset}{imports}]>'
    model = parser.parse_model(f"{head} {text}")
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in constants.items())
    return model


def detector(dtype: str = "float", reduction: str = "mean") -> onnx.ModelProto:
    """The first `wide` numbers of each image for boxes, with two losses: all in one, and scores."""
    model = model_of(
        """g (TYPE[N, 3, 8, 8] images, int64[1] wide) => (TYPE[N, boxes] boxes) {
            flat = Flatten(images)
            start = Constant<value_ints=[0]>()
            axis = Constant<value_ints=[1]>()
            boxes = Slice(flat, start, wide, axis)
        }""".replace("TYPE", dtype)
    )
    spec = LossSpec(0.5, reduction, {"float": "float32"}.get(dtype, dtype))
    scored = attach(model, "boxes", "boxes_gt", spec)
    scores = LossSpec(0.5, per_sample=True, dtype=spec.dtype)
    return attach(scored, "boxes", "boxes_gt", scores, loss_name="scores")


def opened(
    model: onnx.ModelProto | Path, level: str = "ORT_ENABLE_ALL", threads: int = 0
) -> ort.InferenceSession:
    """ONNX Runtime on the CPU, as anyone opens it, that prints nothing."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_session(session: ort.InferenceSession, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Every output; bfloat16, which numpy can't feed, goes in and out by its address."""
    binding = session.io_binding()
    held = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in feeds.items()}
    for name, array in held.items():
        element = helper.np_dtype_to_tensor_dtype(array.dtype)
        binding.bind_input(name, "cpu", 0, element, array.shape, array.ctypes.data)
    names = [output.name for output in session.get_outputs()]
    for name in names:
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    found = {}
    for name, value in zip(names, binding.get_outputs(), strict=True):
        dtype = helper.tensor_dtype_to_np_dtype(value.element_type())
        size = math.prod(value.shape()) * dtype.itemsize
        data = (ctypes.c_char * size).from_address(value.data_ptr()) if size else b""
        found[name] = np.frombuffer(bytes(data), dtype).reshape(value.shape())
    return found


def run(
    model: onnx.ModelProto | Path, feeds: Mapping[str, Array], level: str = "ORT_DISABLE_ALL"
) -> dict[str, Array]:
    """Every output. By default unoptimised: fusions across new nodes would be another program."""
    return run_session(opened(model, level), feeds)


def assert_near(got: Array, expected: Array, most: int, note: object = "") -> None:
    """Finite where it is expected, and there so many ULP from it; else the same."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), note
    finite = np.isfinite(expected)
    assert np.array_equal(got[~finite], expected[~finite], equal_nan=True), note
    assert ulp_distance(got[finite], expected[finite]).max(initial=0) <= most, note


def assert_kept(before: dict[str, Array], after: dict[str, Array]) -> None:
    """Every output that was there before has its bits."""
    for name, value in before.items():
        assert value.tobytes() == after[name].tobytes(), name
