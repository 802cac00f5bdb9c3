"""Arithmetic the way the evaluator means it: one rounding a layer, and what becomes of NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ...floats import NUMPY_DTYPE, Array, dtype_name, round_to

__all__ = ["converter", "divide_towards_zero", "erf", "extrema", "narrow", "widened"]

_FLOATS = frozenset(NUMPY_DTYPE)

erf = np.vectorize(math.erf, otypes=[np.float64])


def narrow(dtype: np.dtype[Any]) -> Callable[[Any], Array]:
    """Rounds float64 to `dtype` once, to nearest, ties to even."""
    if dtype == np.float32:
        return lambda values: np.asarray(values).astype(np.float32)
    name = dtype_name(dtype)
    return lambda values: round_to(values, name)


def widened(function: Callable[..., Any], dtype: np.dtype[Any]) -> Callable[..., Array]:
    """`function` computed in float64 and rounded once to `dtype`."""
    to_dtype = narrow(dtype)
    return lambda *arrays: to_dtype(function(*[a.astype(np.float64) for a in arrays]))


def converter(source: np.dtype[Any], to: np.dtype[Any]) -> Callable[[Array], Array]:
    """What a cast does: rounds to nearest, truncates to integers and saturates, NaN becomes 0.

    numpy leaves a float that no integer of the target holds undefined; TensorRT 10.16 gives 0
    for NaN and the nearest bound for the rest (NVIDIA/TensorRT#4775).
    """
    if source == to:
        return lambda x: x
    if to == np.bool_:
        return lambda x: x != 0
    if dtype_name(source) in _FLOATS and dtype_name(to) not in _FLOATS:
        bounds = np.iinfo(to)

        def saturate(x: Array) -> Array:
            wide = x.astype(np.float64)
            inside = (wide > bounds.min) & (wide < bounds.max)
            bound = np.where(wide > 0, bounds.max, bounds.min).astype(to)
            whole = np.where(inside, wide, 0).astype(to)
            return np.where(inside, whole, np.where(np.isnan(wide), to.type(0), bound))

        return saturate
    if dtype_name(to) in ("float16", "bfloat16") and dtype_name(source) not in _FLOATS:
        return widened(lambda x: x, to)  # ml_dtypes would round by way of float32
    return lambda x: x.astype(to)


def extrema(drops_nan: bool) -> tuple[np.ufunc, np.ufunc]:
    """(minimum, maximum) that return the number beside a NaN, or the NaN."""
    return (np.fmin, np.fmax) if drops_nan else (np.minimum, np.maximum)


def divide_towards_zero(a: Array, b: Array) -> Array:
    """Integer division as C has it; numpy's rounds down."""
    quotient = np.floor_divide(a, b)
    inexact = quotient * b != a
    back: Array = quotient + (inexact & ((a < 0) != (b < 0))).astype(quotient.dtype)
    return back
