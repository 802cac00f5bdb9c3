"""What the names in a report mean, for who reads one without having written it."""

from __future__ import annotations

from collections.abc import Mapping

from ...environment import docstring
from ..cases import LAYOUTS
from ..families import FAMILIES

__all__ = ["BACKENDS", "ROUTES", "family_meaning", "layout_meaning"]

ROUTES: Mapping[str, str] = {
    "function": "one node, its body among the functions of the model",
    "inlined": "the same as plain ONNX operators",
    "torch": "what torch.onnx.export makes of the module with this package's translation table",
}

BACKENDS: Mapping[str, str] = {
    "onnx-reference": "the ONNX project's own evaluator: what the file means",
    "ort-cpu": "ONNX Runtime on the CPU, with this package's operators, where they were built",
    "ort-cpu-bare": "the same with nothing registered: the file alone, as anyone's session runs it",
    "trt-network": (
        "the network that TensorRT's parser made of the file, evaluated in numpy: what TensorRT "
        "understood, not what a GPU computes"
    ),
    "torch-triton": "fused kernels of Triton, the compiler, on a GPU or interpreted",
    "ort-cuda": "ONNX Runtime's CUDA provider",
    "ort-tensorrt": "ONNX Runtime's TensorRT provider",
    "ort-tensorrt-rtx": "ONNX Runtime's provider for TensorRT for RTX",
    "trt": "a TensorRT engine on a GPU",
    "triton-http": "a Triton server on this machine, asked over HTTP",
    "triton-grpc": "the same, over gRPC",
}


def family_meaning(name: str) -> str:
    """What a family of inputs holds: its function's docstring, without the full stop."""
    family = FAMILIES.get(name)
    return docstring(family).rstrip(".") if family else ""


def layout_meaning(name: str) -> str:
    """The shapes of a layout; empty for one that is not of the matrix."""
    layout = LAYOUTS.get(name)
    if layout is None:
        return ""
    weight = "" if layout.weight is None else f", weights {layout.weight}"
    if layout.input == layout.target:
        return f"two tensors of {layout.input}{weight}"
    return f"input {layout.input}, target {layout.target}{weight}"
