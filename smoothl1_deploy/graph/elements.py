"""The element types of ONNX, by the dtype names of a spec."""

from __future__ import annotations

from onnx import TensorProto

__all__ = ["DTYPE_OF_ELEMENT", "ELEMENT_TYPE"]

#: dtype name of a spec -> ONNX element type.
ELEMENT_TYPE: dict[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float64": TensorProto.DOUBLE,
}

#: The inverse.
DTYPE_OF_ELEMENT = {element: name for name, element in ELEMENT_TYPE.items()}
