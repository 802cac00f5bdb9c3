"""Exact rational arithmetic, and one rounding to a format: what the numeric tests compare with.

Written from IEEE 754 with `fractions.Fraction` alone; it shares no code with the package.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np


class Format:
    """A binary format: bits of significand (the hidden one too), exponent range, numpy dtype."""

    def __init__(self, name: str, precision: int, emin: int, emax: int, dtype: Any) -> None:
        self.name, self.precision, self.emin, self.emax = name, precision, emin, emax
        self.dtype = np.dtype(dtype)

    @property
    def largest(self) -> Fraction:
        return (2 - Fraction(2) ** (1 - self.precision)) * Fraction(2) ** self.emax


FORMATS = {
    f.name: f
    for f in (
        Format("float32", 24, -126, 127, np.float32),
        Format("float16", 11, -14, 15, np.float16),
        Format("bfloat16", 8, -126, 127, ml_dtypes.bfloat16),
        Format("float64", 53, -1022, 1023, np.float64),
    )
}


def _quantum(magnitude: Fraction, f: Format) -> Fraction:
    """The distance of the format's neighbours around `magnitude` > 0."""
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:  # the lengths give floor(log2) or one more
        exponent -= 1
    return Fraction(2) ** (max(exponent, f.emin) - f.precision + 1)


def round_fraction(value: Fraction, dtype: str) -> float:
    """`value` to nearest, ties to even, as a Python float (which holds all four formats)."""
    f = FORMATS[dtype]
    if value == 0:
        return 0.0
    magnitude = abs(value)
    quantum = _quantum(magnitude, f)
    steps, rest = divmod(magnitude, quantum)
    if 2 * rest > quantum or (2 * rest == quantum and steps % 2 == 1):
        steps += 1
    rounded = steps * quantum
    result = math.inf if rounded > f.largest else float(rounded)
    return math.copysign(result, -1 if value < 0 else 1)


def exact_loss(input: float, target: float, beta: float) -> Fraction:
    """The definition, of finite numbers and a beta that may be infinite."""
    d = abs(Fraction(input) - Fraction(target))
    if math.isinf(beta):
        return Fraction(0)
    b = Fraction(beta)
    return d * d / (2 * b) if d < b else d - b / 2


def exact_huber(input: float, target: float, delta: float) -> Fraction:
    """The definition of the Huber loss, of finite numbers and a delta that may be infinite."""
    d = abs(Fraction(input) - Fraction(target))
    if math.isinf(delta) or d < Fraction(delta):
        return d * d / 2
    return Fraction(delta) * (d - Fraction(delta) / 2)


def exact_reduction(losses: list[Fraction], reduction: str) -> Fraction:
    """`mean` or `sum` of a list that isn't empty."""
    total = sum(losses, Fraction(0))
    return total / len(losses) if reduction == "mean" else total


def to_array(values: list[float], dtype: str) -> np.ndarray:
    """An array of the format, of numbers that it holds."""
    return np.array(values, np.float64).astype(FORMATS[dtype].dtype)


def error_in_ulp(value: float, exact: Fraction, dtype: str) -> Fraction:
    """How far `value` is from `exact`, in units in the last place of `exact`."""
    f = FORMATS[dtype]
    if exact == 0:
        return Fraction(0) if value == 0 else Fraction(2**200)
    return abs(Fraction(value) - exact) / _quantum(abs(exact), f)
