"""Sums without rounding: the order, the batches and the machines can't change the result.

A float is an integer times a power of two, so a sum of floats is one too. `ExactSum` holds it as
a `fractions.Fraction`; only the final result is rounded, once, to float64.

A block of floats is split as in Demmel and Nguyen, "Fast Reproducible Floating-Point Summation"
(2013): adding and subtracting a constant rounds every element to a multiple of one unit, coarse
enough that float64 adds the multiples without rounding in any order; what was cut off is the next
round's block, and is nearly empty.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from .._floats import Array
from .._records import Record, plain

_BLOCK_BITS = 15
_BLOCK = 1 << _BLOCK_BITS  # two float64 blocks fit a core's cache; smaller ones cost calls
_UNIT_BITS = 1074  # the smallest float64 is 2^-1074
_HUGE = 2.0**900  # above, the constant would overflow


@dataclass(frozen=True, slots=True)
class ExactSum:
    """The exact sum of floats.

    Attributes:
        finite: the sum of those that are finite.
        special: NaN or an infinity, as IEEE 754 adds up the others; 0 where there are none.
    """

    finite: Fraction = Fraction(0)
    special: float = 0.0

    def __add__(self, other: ExactSum) -> ExactSum:
        return ExactSum(self.finite + other.finite, self.special + other.special)

    def times(self, factor: int) -> ExactSum:
        """The sum of every addend times a positive number."""
        return ExactSum(self.finite * factor, self.special)

    def over(self, divisor: ExactSum) -> float:
        """The quotient, rounded once to float64; NaN for 0 / 0."""
        if divisor.special:
            return math.nan if self.special or math.isnan(divisor.special) else 0.0
        if self.special:
            return -self.special if divisor.finite < 0 else self.special
        infinity = math.inf if (self.finite < 0) == (divisor.finite < 0) else -math.inf
        if divisor.finite == 0:
            return infinity if self.finite else math.nan
        try:
            return float(self.finite / divisor.finite)
        except OverflowError:  # beyond the largest float64
            return infinity

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without loss."""
        return {"finite": str(self.finite), "special": plain(self.special)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ExactSum:
        """The inverse of `to_dict`; whoever wrote the fields may have meant to harm.

        Raises:
            ValueError, KeyError, TypeError: when the fields are damaged.
        """
        finite, special = fields["finite"], float(fields["special"])
        if not re.fullmatch(r"-?\d+(/[1-9]\d*)?", finite):  # Fraction("1e300000000") takes hours
            raise ValueError(f"{finite!r} is no sum")
        if special and math.isfinite(special):
            raise ValueError(f"{special!r} is neither NaN nor an infinity")
        return cls(Fraction(finite), special)


_NOTHING = ExactSum()
_ONE = ExactSum(Fraction(1))


@dataclass(frozen=True, slots=True)
class Partial(Record):
    """What some of the data add to the result.

    Attributes:
        total: the sum of the losses (times their weights).
        divisor: what a mean divides by: the number of elements, or the sum of their weights.
        count: the number of elements.
    """

    total: ExactSum = _NOTHING
    divisor: ExactSum = _NOTHING
    count: int = 0

    def __add__(self, other: Partial) -> Partial:
        return Partial(
            self.total + other.total, self.divisor + other.divisor, self.count + other.count
        )

    @property
    def sum(self) -> float:
        """The total, rounded once to float64."""
        return self.total.over(_ONE)

    @property
    def mean(self) -> float:
        """The mean, rounded once to float64; of nothing it is NaN."""
        return self.total.over(self.divisor)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Partial:
        """The inverse of `to_dict`; raises as `ExactSum.from_dict` does."""
        total, divisor = (ExactSum.from_dict(fields[name]) for name in ("total", "divisor"))
        if not isinstance(fields["count"], int):
            raise TypeError(f"the count is {fields['count']!r}")
        return cls(total, divisor, fields["count"])


def exact_sum(values: Array) -> ExactSum:
    """The exact sum of floats of any shape and of any dtype of `floats.NUMPY_DTYPE`.

    >>> float(exact_sum(np.array([1e308, 1.0, -1e308, 2.0**-1074])).finite)
    1.0
    """
    flat = values.reshape(-1)
    block, multiples = np.empty(_BLOCK), np.empty(_BLOCK)
    units = 0
    result = ExactSum()
    for start in range(0, flat.size, _BLOCK):
        part = flat[start : start + _BLOCK]
        work = block[: part.size]
        np.copyto(work, part)  # every dtype here fits float64 exactly
        largest = _largest(work)
        if not largest < _HUGE:  # NaN too
            work, apart = _set_apart(work)
            result += apart
            largest = _largest(work)
        units += _units(work, largest, multiples)
    return result + ExactSum(Fraction(units, 1 << _UNIT_BITS))


def _largest(work: Array) -> float:
    return float(max(work.max(), -work.min())) if work.size else 0.0


def _units(work: Array, largest: float, multiples: Array) -> int:
    """The sum of a block, in units of 2^-1074; `work` is used up."""
    units = 0
    while largest:
        # Its ulp is the unit: 2^_BLOCK_BITS multiples below the largest power stay below 2^53.
        constant = math.ldexp(1.5, math.frexp(largest)[1] + _BLOCK_BITS - 1)
        out = multiples[: work.size]
        np.add(work, constant, out=out)
        np.subtract(out, constant, out=out)
        top, bottom = float(out.sum()).as_integer_ratio()
        units += top << (_UNIT_BITS - bottom.bit_length() + 1)
        np.subtract(work, out, out=work)
        work = work[work != 0]
        largest = _largest(work)
    return units


def _set_apart(work: Array) -> tuple[Array, ExactSum]:
    """A block without NaN, infinities and huge numbers, and their sum, added up one by one."""
    usual = np.abs(work) < _HUGE
    odd = work[~usual]
    finite = np.isfinite(odd)
    total = sum(map(Fraction, odd[finite].tolist()), Fraction(0))
    return work[usual], ExactSum(total, sum(odd[~finite].tolist(), 0.0))
