"""What a floating-point number is: formats, rounding, classes, distances in ULP (numpy only)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ._spec import DTYPES

Array = NDArray[Any]

#: dtype name of a spec -> numpy dtype.
NUMPY_DTYPE: dict[str, np.dtype[Any]] = {
    name: np.dtype(getattr(ml_dtypes, name, name)) for name in DTYPES
}

#: The IEEE class of a number, by the code `ieee_class` gives it.
CLASS_NAMES = ("finite", "+0", "-0", "+inf", "-inf", "nan")


def limits(dtype: str) -> tuple[float, float, float]:
    """The largest finite, the smallest normal and the smallest subnormal number of a format."""
    info = ml_dtypes.finfo(NUMPY_DTYPE[dtype])  # type: ignore[no-untyped-call]
    return float(info.max), float(info.tiny), float(info.smallest_subnormal)


def dtype_name(dtype: np.dtype[Any]) -> str:
    """`"bfloat16"` for ml_dtypes' bfloat16 too; byte order is left out."""
    return np.dtype(dtype).name


def wide_dtype(dtype: str) -> np.dtype[Any]:
    """A format with at least 11 more bits of significand than `dtype`.

    float64 for the narrower formats; the platform's long double (64 bits of significand on
    x86-64) for float64.
    """
    return np.dtype(np.longdouble) if dtype == "float64" else np.dtype(np.float64)


def round_to(values: Array, dtype: str) -> Array:
    """Round float64 or long double `values` to `dtype` once, to nearest, ties to even.

    numpy and ml_dtypes go to the half formats by way of float32 or float64, which rounds twice.
    Rounding to odd on the way makes the second rounding the only one that counts (Boldo and
    Melquiond, "Emulation of FMA and correctly rounded sums", 2008: two extra bits suffice).
    """
    values = np.asarray(values)
    with np.errstate(all="ignore"):
        if dtype not in ("float16", "bfloat16"):
            return values.astype(NUMPY_DTYPE[dtype])
        nearest = values.astype(np.float32)
        back = nearest.astype(values.dtype)
        other = np.nextafter(nearest, np.where(back < values, np.inf, -np.inf).astype(np.float32))
        even = _bits(nearest) & 1 == 0
        inexact = (back != values) & ~np.isnan(values)
        return np.where(inexact & even, other, nearest).astype(NUMPY_DTYPE[dtype])


def _bits(values: Array) -> Array:
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}").reshape(values.shape)


def ieee_class(values: Array) -> NDArray[np.uint8]:
    """The class of each element: an index into `CLASS_NAMES`."""
    values = np.asarray(values)
    code = np.zeros(values.shape, np.uint8)
    code[values == 0] = 1
    code[np.isinf(values)] = 3
    code += (code > 0) & np.signbit(values)
    code[np.isnan(values)] = 5
    return code


def ulp_distance(a: Array, b: Array) -> NDArray[np.uint64]:
    """How many representable numbers of the common dtype lie between `a` and `b`.

    Equal numbers are 0 apart, +0 and -0 too, neighbours 1. Meaningless where an element is NaN.
    """
    if a.dtype != b.dtype:
        raise TypeError(f"ULP distance is defined within one dtype, got {a.dtype} and {b.dtype}")

    def ordered(values: Array) -> NDArray[np.uint64]:
        bits = _bits(values).astype(np.uint64)
        sign = np.uint64(1 << (8 * values.dtype.itemsize - 1))
        magnitude = bits & (sign - np.uint64(1))
        return np.where(bits & sign, sign - magnitude, sign + magnitude).astype(np.uint64)

    x, y = ordered(np.asarray(a)), ordered(np.asarray(b))
    return np.where(x > y, x - y, y - x).astype(np.uint64)
