"""Layers that treat each element alone: casts, arithmetic, activations, selections, scales."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ...floats import Array
from .arithmetic import converter, divide_towards_zero, erf, extrema, narrow, widened
from .layer import Handler, LayerView, read_weights

__all__ = ["POINTWISE"]

Function = Callable[..., Any]

_ELEMENTWISE: dict[str, Function] = {
    "SUM": np.add,
    "PROD": np.multiply,
    "SUB": np.subtract,
    "AND": np.logical_and,
    "OR": np.logical_or,
    "XOR": np.logical_xor,
    "EQUAL": np.equal,
    "GREATER": np.greater,
    "LESS": np.less,
}

#: Operations that numpy rounds once in every dtype.
_UNARY_NATIVE: dict[str, Function] = {
    "ABS": np.abs,
    "NEG": np.negative,
    "SQRT": np.sqrt,
    "RECIP": lambda x: np.divide(x.dtype.type(1), x),
    "CEIL": np.ceil,
    "FLOOR": np.floor,
    "ROUND": np.rint,  # half to even, as TensorRT documents it
    "SIGN": np.sign,
    "NOT": np.logical_not,
    "ISINF": np.isinf,
    "ISNAN": np.isnan,
}
_UNARY_WIDE: dict[str, Function] = {
    "EXP": np.exp,
    "LOG": np.log,
    "SIN": np.sin,
    "COS": np.cos,
    "TAN": np.tan,
    "SINH": np.sinh,
    "COSH": np.cosh,
    "ASIN": np.arcsin,
    "ACOS": np.arccos,
    "ATAN": np.arctan,
    "ASINH": np.arcsinh,
    "ACOSH": np.arccosh,
    "ATANH": np.arctanh,
    "ERF": erf,
}

#: x, alpha, beta in float64. Source: `nvinfer1::ActivationType` in NvInfer.h.
_ACTIVATION: dict[str, Function] = {
    "SIGMOID": lambda x, a, b: 1 / (1 + np.exp(-x)),
    "TANH": lambda x, a, b: np.tanh(x),
    "LEAKY_RELU": lambda x, a, b: np.where(x >= 0, x, a * x),
    "ELU": lambda x, a, b: np.where(x >= 0, x, a * np.expm1(x)),
    "SELU": lambda x, a, b: np.where(x > 0, b * x, b * a * np.expm1(x)),
    "SOFTSIGN": lambda x, a, b: x / (1 + np.abs(x)),
    "SOFTPLUS": lambda x, a, b: a * np.logaddexp(0, b * x),
    "SCALED_TANH": lambda x, a, b: a * np.tanh(b * x),
    "THRESHOLDED_RELU": lambda x, a, b: np.where(x > a, x, 0),
    "GELU_ERF": lambda x, a, b: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "GELU_TANH": lambda x, a, b: (
        0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (0.044715 * x**3 + x)))
    ),
}


def _convert(view: LayerView, layer: Any) -> Function:
    return converter(view.first.dtype, view.dtype)


def _elementwise(view: LayerView, layer: Any) -> Function:
    op = layer.op.name
    if op in _ELEMENTWISE:
        return _ELEMENTWISE[op]
    minimum, maximum = extrema(view.drops_nan)
    if op in ("MIN", "MAX"):
        return minimum if op == "MIN" else maximum
    if op == "DIV":
        return np.divide if view.is_float else divide_towards_zero
    if op == "FLOOR_DIV":
        # Not np.floor_divide for floats: it takes the quotient before it is rounded.
        return (lambda a, b: np.floor(np.divide(a, b))) if view.is_float else np.floor_divide
    if op == "POW":
        return widened(np.power, view.dtype) if view.is_float else np.power
    raise view.unsupported(f"has the operation {op}")


def _unary(view: LayerView, layer: Any) -> Function:
    op = layer.op.name
    if op in _UNARY_NATIVE:
        return _UNARY_NATIVE[op]
    if op in _UNARY_WIDE:
        return widened(_UNARY_WIDE[op], view.dtype)
    raise view.unsupported(f"has the operation {op}")


def _activation(view: LayerView, layer: Any) -> Function:
    op, dtype = layer.type.name, view.dtype
    alpha, beta = float(layer.alpha), float(layer.beta)
    minimum, maximum = extrema(view.drops_nan)
    if op == "RELU":
        return lambda x: maximum(x, dtype.type(0))
    if op == "CLIP":
        with np.errstate(over="ignore"):  # the parser writes an open bound as FLT_MAX
            low, high = dtype.type(alpha), dtype.type(beta)
        return lambda x: minimum(maximum(x, low), high)
    if op == "HARD_SIGMOID":
        return widened(lambda x: maximum(minimum(alpha * x + beta, 1.0), 0.0), dtype)
    if op in _ACTIVATION:
        function = _ACTIVATION[op]
        return widened(lambda x: function(x, alpha, beta), dtype)
    raise view.unsupported(f"has the activation {op}")


def _select(view: LayerView, layer: Any) -> Function:
    return np.where


def _parametric_relu(view: LayerView, layer: Any) -> Function:
    return lambda x, slope: np.where(x >= 0, x, x * slope)


def _scale(view: LayerView, layer: Any) -> Function:
    """(x * scale + shift) ^ power, each a number, one a channel, or one an element."""
    rank = view.first.rank
    mode = layer.mode.name
    shapes = {
        "UNIFORM": (),
        "CHANNEL": (-1, *(1,) * (rank - layer.channel_axis - 1)),
        # The axes from the channel on; those before are batches.
        "ELEMENTWISE": (view.first.shape or ())[layer.channel_axis :],
    }
    if mode not in shapes:
        raise view.unsupported(f"has the mode {mode}")

    def read(weights: Any, default: float) -> Array:
        if isinstance(weights, np.ndarray) and weights.size == 0:
            return np.asarray(default)
        return read_weights(view, weights, view.dtype, shapes[mode]).astype(np.float64)

    scale, shift, power = read(layer.scale, 1), read(layer.shift, 0), read(layer.power, 1)
    to_dtype = narrow(view.dtype)
    if (power == 1).all():
        return lambda x: to_dtype(x.astype(np.float64) * scale + shift)
    return lambda x: to_dtype(np.power(x.astype(np.float64) * scale + shift, power))


#: LayerType -> (class of the bindings, handler).
POINTWISE: dict[str, tuple[str, Handler]] = {
    "ACTIVATION": ("IActivationLayer", _activation),
    "CAST": ("ICastLayer", _convert),
    "ELEMENTWISE": ("IElementWiseLayer", _elementwise),
    "IDENTITY": ("IIdentityLayer", _convert),
    "PARAMETRIC_RELU": ("IParametricReLULayer", _parametric_relu),
    "SCALE": ("IScaleLayer", _scale),
    "SELECT": ("ISelectLayer", _select),
    "UNARY": ("IUnaryLayer", _unary),
}
