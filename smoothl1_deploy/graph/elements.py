"""Constants of the graphs: element types by the dtype names of a spec, the scalars of the loss."""

from __future__ import annotations

import math

from onnx import TensorProto

__all__ = [
    "DTYPE_OF_ELEMENT",
    "ELEMENT_TYPE",
    "IR_VERSION",
    "element_name",
    "loss_scalars",
    "slope_scalars",
]

IR_VERSION = 10  # ONNX 1.16: the oldest runtime we test reads it

#: dtype name of a spec -> ONNX element type.
ELEMENT_TYPE: dict[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float64": TensorProto.DOUBLE,
}

#: The inverse.
DTYPE_OF_ELEMENT = {element: name for name, element in ELEMENT_TYPE.items()}


def loss_scalars(beta: float) -> tuple[tuple[str, float], ...]:
    """The last three inputs of the function `SmoothL1LossTerms`, by name."""
    return ("beta", beta), ("half", 0.5), ("divisor", beta or 1.0)


def slope_scalars(beta: float) -> tuple[tuple[str, float], ...]:
    """The last two inputs of the function `SmoothL1SlopeTerms`, by name, and its divisor.

    A beta that many differences would overflow with is made a number below 1 by a power of two.
    """
    if beta == 0 or math.isinf(beta):
        shrink, divisor = float(beta == 0), 1.0
    elif beta < 2.0**500:
        shrink, divisor = 1.0, beta
    else:
        divisor, exponent = math.frexp(beta)
        shrink = math.ldexp(1.0, -exponent)
    return ("slope_beta", beta), ("slope_shrink", shrink), ("slope_divisor", divisor)


def element_name(element: int) -> str:
    """`"FLOAT"`, or the number of a type that this version of onnx doesn't know."""
    known = TensorProto.DataType.DESCRIPTOR.values_by_number.get(element)
    return known.name if known else f"element type {element}"
