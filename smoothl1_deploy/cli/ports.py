"""The inputs and outputs of any ONNX graph, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import onnx

from ..model import axes_of, inputs_of, outputs_of

__all__ = ["graph_ports", "show_ports"]


def graph_ports(model: onnx.ModelProto) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Inputs (constants left out) and outputs: `name`, `dtype`, `shape` (None for any rank)."""
    return [*map(_port, inputs_of(model))], [*map(_port, outputs_of(model))]


def _port(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    except KeyError:  # a sequence or another type that is no tensor
        dtype = value.type.WhichOneof("value") or "unknown"
    axes = axes_of(value)
    shape = None if axes is None else [-1 if axis is None else axis for axis in axes]
    return {"name": value.name, "dtype": dtype, "shape": shape}


def show_ports(ports: Iterable[Mapping[str, Any]]) -> str:
    """`"input: float32[N, 16], target: float32[N, 16]"`."""
    return ", ".join(
        f"{port['name']}: {port['dtype']}"
        + (" of any rank" if port["shape"] is None else f"[{', '.join(map(str, port['shape']))}]")
        for port in ports
    )
