"""Layers that move elements and compute shapes; no number changes in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...errors import InvalidInputError
from ...floats import Array
from .arithmetic import narrow
from .layer import Handler, LayerView

__all__ = ["MOVEMENT"]

Function = Callable[..., Any]


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _shape(view: LayerView, layer: Any) -> Function:
    dtype = view.dtype
    return lambda x: np.array(x.shape, dtype)


def _shuffle(view: LayerView, layer: Any) -> Function:
    """Transpose, reshape, transpose; each part may be missing."""
    # The bindings always give eight entries; those beyond the rank are not initialised.
    before = _ints(layer.first_transpose)[: view.first.rank]
    after = _ints(layer.second_transpose)[: view.outputs[0].rank]
    zero_copies = bool(layer.zero_is_placeholder)
    runtime_dims = view.has(1)
    dims = None if runtime_dims or layer.reshape_dims is None else _ints(layer.reshape_dims)
    first = None if before == tuple(range(len(before))) else before
    second = None if after == tuple(range(len(after))) else after

    def shuffle(x: Array, wanted: Array | None = None) -> Array:
        if first is not None:
            x = x.transpose(first)
        target = dims if wanted is None else _ints(wanted)
        if target is not None:
            if zero_copies and 0 in target:
                target = tuple(x.shape[i] if n == 0 else n for i, n in enumerate(target))
            x = x.reshape(target)
        return x if second is None else x.transpose(second)

    return shuffle


def _squeeze(view: LayerView, layer: Any) -> Function:
    if view.has(1):
        return lambda x, axes: x.squeeze(_ints(axes.reshape(-1)))
    # Not x.squeeze(): a dynamic axis that happens to have length 1 stays.
    ones = tuple(axis for axis, n in enumerate(view.first.shape or ()) if n == 1)
    return lambda x: x.squeeze(ones)


def _unsqueeze(view: LayerView, layer: Any) -> Function:
    return lambda x, axes: np.expand_dims(x, _ints(axes.reshape(-1)))


def _concatenation(view: LayerView, layer: Any) -> Function:
    axis = int(layer.axis)
    return lambda *arrays: np.concatenate(arrays, axis)


def _outside(view: LayerView, axis: int, index: Array, length: int) -> InvalidInputError:
    return InvalidInputError(
        f"the layer {view.name!r} of type {view.type} reads the indices {index.min()} to "
        f"{index.max()} of axis {axis}, which has the length {length}; TensorRT leaves that "
        "undefined: give indices that lie inside"
    )


def _slice(view: LayerView, layer: Any) -> Function:
    mode = layer.mode.name
    if mode not in ("STRICT_BOUNDS", "WRAP", "CLAMP", "REFLECT", "FILL"):
        raise view.unsupported(f"has the mode {mode}")

    def static(input: int, attribute: str) -> tuple[int, ...] | None:
        value = None if view.has(input) else getattr(layer, attribute, None)
        return None if value is None else _ints(value)

    fixed = [static(1, "start"), static(2, "shape"), static(3, "stride")]
    fixed_axes = static(5, "axes")

    def places(index: Array, length: int, axis: int) -> Array:
        """Where each element of `index` is read; -1 is outside."""
        if mode == "WRAP" and length:
            return index % length
        if mode == "CLAMP" and length:
            return index.clip(0, length - 1)
        if mode == "REFLECT" and length:
            period = max(2 * (length - 1), 1)
            folded = index % period
            return np.minimum(folded, period - folded) if length > 1 else 0 * index
        inside = (index >= 0) & (index < length)
        if mode != "FILL" and not inside.all():
            raise _outside(view, axis, index, length)
        return np.where(inside, index, -1)

    def run(
        x: Array,
        start: Array | None = None,
        size: Array | None = None,
        stride: Array | None = None,
        fill: Array | None = None,
        axes: Array | None = None,
    ) -> Array:
        given = [
            f if a is None else _ints(a) for f, a in zip(fixed, (start, size, stride), strict=True)
        ]
        which = fixed_axes if axes is None else _ints(axes)
        for i, axis in enumerate(range(x.ndim) if which is None else which):
            first, count, step = (values[i] for values in given if values is not None)
            length = x.shape[axis]
            if (first, count, step) == (0, length, 1):
                continue
            index = places(first + step * np.arange(count), length, axis)
            if (index >= 0).all():
                x = x.take(index, axis)
                continue
            value = x.dtype.type(0) if fill is None else fill
            border = np.full((*x.shape[:axis], 1, *x.shape[axis + 1 :]), value, x.dtype)
            x = np.concatenate([x, border], axis).take(index, axis)  # -1 is the border
        return x

    return run


def _gather(view: LayerView, layer: Any) -> Function:
    """TensorRT documents zero for an index out of bounds (IGatherLayer in NvInfer.h)."""
    shape = view.first.shape
    mode, axis = layer.mode.name, int(layer.axis)
    if mode not in ("DEFAULT", "ELEMENT", "ND"):
        raise view.unsupported(f"has the mode {mode}")
    if layer.num_elementwise_dims:
        raise view.unsupported(f"has {layer.num_elementwise_dims} elementwise dimension(s)")

    def inside(index: Array, length: int, axis: int) -> tuple[Array, Array]:
        """The index where it is valid, else 0; and where it is valid."""
        if (shape is None or shape[axis] == -1) and (index < 0).any():
            raise _outside(view, axis, index, length)
        index = np.where(index < 0, index + length, index)
        valid = (index >= 0) & (index < length)
        return np.where(valid, index, 0), valid

    def default(x: Array, index: Array) -> Array:
        if not index.ndim and 0 <= index < x.shape[axis]:  # one size of a shape: the usual case
            return x.take(index, axis)
        place, valid = inside(index, x.shape[axis], axis)
        if valid.all():
            return x.take(place, axis)
        if not x.shape[axis]:
            return np.zeros((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]), x.dtype)
        keep = valid.reshape((*valid.shape, *(1,) * (x.ndim - axis - 1)))
        return np.where(keep, x.take(place, axis), x.dtype.type(0))

    def element(x: Array, index: Array) -> Array:
        place, valid = inside(index, x.shape[axis], axis)
        # The other axes of the index may be shorter than those of the data.
        x = x[tuple(slice(None) if i == axis else slice(n) for i, n in enumerate(index.shape))]
        return np.where(valid, np.take_along_axis(x, place, axis), x.dtype.type(0))

    def nd(x: Array, index: Array) -> Array:
        pairs = [inside(index[..., i], x.shape[i], i) for i in range(index.shape[-1])]
        valid = np.logical_and.reduce([v for _, v in pairs])
        found = x[tuple(place for place, _ in pairs)]
        return np.where(
            valid.reshape((*valid.shape, *(1,) * (found.ndim - valid.ndim))), found, x.dtype.type(0)
        )

    return {"DEFAULT": default, "ELEMENT": element, "ND": nd}[mode]


def _fill(view: LayerView, layer: Any) -> Function:
    """LINSPACE: alpha + the sum over the axes of beta[axis] * index[axis]."""
    dtype = view.dtype
    if layer.operation.name != "LINSPACE":
        raise view.unsupported(f"has the operation {layer.operation.name}")
    fixed_dims = None if view.has(0) else _ints(layer.shape)
    fixed_alpha = None if view.has(1) else layer.alpha
    fixed_beta = None if view.has(2) else layer.beta
    whole = dtype.kind in "iu"
    kind: Any = np.int64 if whole else np.float64
    to_dtype: Function = (lambda x: x.astype(dtype)) if whole else narrow(dtype)

    def fill(dims: Any = None, alpha: Any = None, beta: Any = None) -> Any:
        shape = fixed_dims if dims is None else _ints(dims)
        assert shape is not None
        out = np.full(shape, fixed_alpha if alpha is None else alpha, kind)
        steps = np.asarray(fixed_beta if beta is None else beta, kind).reshape(-1)
        for axis, step in enumerate(steps):
            column = np.arange(shape[axis], dtype=kind).reshape(
                (-1, *(1,) * (len(shape) - axis - 1))
            )
            out += column * step
        return to_dtype(out)

    return fill


#: LayerType -> (class of the bindings, handler).
MOVEMENT: dict[str, tuple[str, Handler]] = {
    "CONCATENATION": ("IConcatenationLayer", _concatenation),
    "FILL": ("IFillLayer", _fill),
    "GATHER": ("IGatherLayer", _gather),
    "SHAPE": ("IShapeLayer", _shape),
    "SHUFFLE": ("IShuffleLayer", _shuffle),
    "SLICE": ("ISliceLayer", _slice),
    "SQUEEZE": ("ISqueezeLayer", _squeeze),
    "UNSQUEEZE": ("IUnsqueezeLayer", _unsqueeze),
}
