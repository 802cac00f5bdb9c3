"""The inputs and outputs of any ONNX graph, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import onnx

__all__ = ["graph_ports", "show_ports"]


def graph_ports(model: onnx.ModelProto) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Inputs (constants left out) and outputs: `name`, `dtype`, `shape` (None for any rank)."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    return [_port(value) for value in inputs], [_port(value) for value in model.graph.output]


def _port(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    except KeyError:  # a sequence or another type that is no tensor
        dtype = value.type.WhichOneof("value") or "unknown"
    shape = None
    if tensor.HasField("shape"):
        shape = [
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or -1
            for dim in tensor.shape.dim
        ]
    return {"name": value.name, "dtype": dtype, "shape": shape}


def show_ports(ports: Iterable[Mapping[str, Any]]) -> str:
    """`"input: float32[N, 16], target: float32[N, 16]"`."""
    return ", ".join(
        f"{port['name']}: {port['dtype']}"
        + (" of any rank" if port["shape"] is None else f"[{', '.join(map(str, port['shape']))}]")
        for port in ports
    )
