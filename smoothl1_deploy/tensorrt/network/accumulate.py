"""Layers with an accumulator inside: computed in float64, rounded once to the tensor's dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...floats import Array
from .arithmetic import extrema, narrow, widened
from .layer import Handler, LayerView, axes_of

__all__ = ["ACCUMULATE"]

Function = Callable[..., Any]


def _reduce(view: LayerView, layer: Any) -> Function:
    """Over nothing: SUM 0, PROD 1, MAX -inf, MIN inf, AVG NaN (ReduceOperation in NvInfer.h)."""
    dtype = view.dtype
    op, axes, keep = layer.op.name, axes_of(int(layer.axes)), bool(layer.keep_dims)
    if op in ("MIN", "MAX"):
        function = extrema(view.drops_nan)[op == "MAX"]
        if view.is_float:
            initial = dtype.type(np.inf if op == "MIN" else -np.inf)
        else:
            bounds = np.iinfo(dtype)
            initial = dtype.type(bounds.max if op == "MIN" else bounds.min)
        return lambda x: function.reduce(x, axis=axes, keepdims=keep, initial=initial)
    if op not in ("SUM", "PROD", "AVG") or (op == "AVG" and not view.is_float):
        raise view.unsupported(f"has the operation {op} on {dtype.name}")
    ufunc: Any = np.multiply if op == "PROD" else np.add
    if not view.is_float:  # wraps around in its own width
        return lambda x: ufunc.reduce(x, axis=axes, keepdims=keep, dtype=dtype)
    to_dtype = narrow(dtype)

    def total(x: Array) -> Any:
        return ufunc.reduce(x, axis=axes, keepdims=keep, dtype=np.float64)

    if op != "AVG":
        return lambda x: to_dtype(total(x))
    return lambda x: to_dtype(
        np.divide(total(x), np.float64(np.prod([x.shape[axis] for axis in axes])))
    )


def _matrix_multiply(view: LayerView, layer: Any) -> Function:
    left, right = layer.op0.name, layer.op1.name
    for op in (left, right):
        if op not in ("NONE", "TRANSPOSE", "VECTOR"):
            raise view.unsupported(f"has the matrix operation {op}")

    def product(a: Array, b: Array) -> Array:
        a = a[..., None, :] if left == "VECTOR" else a
        b = b[..., :, None] if right == "VECTOR" else b
        a = a.swapaxes(-1, -2) if left == "TRANSPOSE" else a
        b = b.swapaxes(-1, -2) if right == "TRANSPOSE" else b
        out: Array = np.matmul(a, b)
        out = out[..., 0] if right == "VECTOR" else out
        if left == "VECTOR":
            out = out[..., 0] if right == "VECTOR" else out[..., 0, :]
        return out

    return widened(product, view.dtype)


def _softmax(view: LayerView, layer: Any) -> Function:
    axes = axes_of(int(layer.axes))

    def softmax(x: Array) -> Array:
        e = np.exp(x - np.max(x, axis=axes, keepdims=True, initial=-np.inf))
        out: Array = e / e.sum(axis=axes, keepdims=True)
        return out

    return widened(softmax, view.dtype)


def _normalization(view: LayerView, layer: Any) -> Function:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, over the masked axes of each group."""
    axes, groups, epsilon = axes_of(int(layer.axes)), int(layer.num_groups), float(layer.epsilon)

    def normalize(x: Array, scale: Array, bias: Array) -> Array:
        if groups > 1:  # the channels of a group are reduced together
            grouped = x.reshape((x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]))
            over = (2, *(axis + 1 for axis in axes if axis > 1))
        else:
            grouped, over = x, axes
        centred = grouped - grouped.mean(axis=over, keepdims=True)
        variance = np.mean(centred * centred, axis=over, keepdims=True)
        normal = (centred / np.sqrt(variance + epsilon)).reshape(x.shape)
        if groups > 1 and scale.shape[1] == groups != x.shape[1]:  # 10.x: one a group
            scale, bias = (np.repeat(w, x.shape[1] // groups, axis=1) for w in (scale, bias))
        out: Array = normal * scale + bias
        return out

    return widened(normalize, view.dtype)


def _einsum(view: LayerView, layer: Any) -> Function:
    equation = str(layer.equation)
    return widened(lambda *arrays: np.einsum(equation, *arrays), view.dtype)


def _topk(view: LayerView, layer: Any) -> Function:
    """The first of equal elements wins; where NaN stands TensorRT doesn't say, here last."""
    op, (axis,) = layer.op.name, axes_of(int(layer.axes))
    fixed = None if view.has(1) else int(layer.k)
    index_dtype, is_float = view.outputs[1].dtype, view.is_float
    if op not in ("MAX", "MIN"):
        raise view.unsupported(f"has the operation {op}")

    def topk(x: Array, k: Any = None) -> tuple[Array, Array]:
        count = int(fixed if k is None else k)  # type: ignore[arg-type]
        key: Any = x.astype(np.float64) if is_float else x
        if op == "MAX":
            key = -key if is_float else ~key  # ~ has no overflow
        index = np.argsort(key, axis=axis, kind="stable").take(np.arange(count), axis)
        return np.take_along_axis(x, index, axis), index.astype(index_dtype)

    return topk


#: LayerType -> (class of the bindings, handler).
ACCUMULATE: dict[str, tuple[str, Handler]] = {
    "EINSUM": ("IEinsumLayer", _einsum),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", _matrix_multiply),
    "NORMALIZATION": ("INormalizationLayer", _normalization),
    "REDUCE": ("IReduceLayer", _reduce),
    "SOFTMAX": ("ISoftMaxLayer", _softmax),
    "TOPK": ("ITopKLayer", _topk),
}
