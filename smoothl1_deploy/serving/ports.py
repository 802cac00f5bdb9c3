"""What a model file takes and gives, in a server's terms: names, Triton data types, dims."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import TensorProto

from ..model import axes_of, inputs_of, outputs_of
from ..tensorrt.sidecar import Sidecar

__all__ = ["DATA_TYPES", "ModelPorts", "TensorPort", "engine_ports", "onnx_ports"]

#: dtype name -> Triton's. Source: `DataType` of Triton's model_config.proto.
DATA_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "uint16": "TYPE_UINT16",
    "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "string": "TYPE_STRING",
}


@dataclass(frozen=True, slots=True)
class TensorPort:
    """One input or output.

    Attributes:
        data_type: Triton's, such as `"TYPE_FP32"`; `"TYPE_INVALID"` for one it doesn't have.
        dims: with the axis of rows, -1 for a dynamic axis; None for any rank.
    """

    name: str
    data_type: str
    dims: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class ModelPorts:
    """The inputs and outputs of a model file; `defaults` are inputs that it has values for."""

    inputs: tuple[TensorPort, ...]
    outputs: tuple[TensorPort, ...]
    defaults: tuple[TensorPort, ...] = ()


def _onnx_port(value: onnx.ValueInfoProto) -> TensorPort:
    tensor, shape = value.type.tensor_type, axes_of(value)
    known = TensorProto.DataType.DESCRIPTOR.values_by_number.get(tensor.elem_type)
    names = {"FLOAT": "float32", "DOUBLE": "float64"}
    dtype = names.get(known.name, known.name.lower()) if known else ""
    dims = None if shape is None else tuple(d if isinstance(d, int) else -1 for d in shape)
    return TensorPort(value.name, DATA_TYPES.get(dtype, "TYPE_INVALID"), dims)


def onnx_ports(model: onnx.ModelProto) -> ModelPorts:
    """Those of an ONNX graph."""
    inputs, outputs = (
        tuple(map(_onnx_port, values)) for values in (inputs_of(model), outputs_of(model))
    )
    defaults = tuple(filter(lambda port: port not in inputs, map(_onnx_port, model.graph.input)))
    return ModelPorts(inputs, outputs, defaults)


def engine_ports(sidecar: Sidecar) -> ModelPorts:
    """Those of a TensorRT engine, as its sidecar says."""
    inputs, outputs = (
        tuple(
            TensorPort(port.name, DATA_TYPES.get(port.dtype, "TYPE_INVALID"), port.shape)
            for port in ports
        )
        for ports in (sidecar.inputs, sidecar.outputs)
    )
    return ModelPorts(inputs, outputs)
