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
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from ..errors import ArtefactError
from ..floats import Array

__all__ = ["ExactSum", "Partial", "exact_sum"]

_BLOCK_BITS = 15
_BLOCK = 1 << _BLOCK_BITS  # two float64 blocks fit a core's cache; smaller ones cost calls
_UNIT_BITS = 1074  # the smallest float64 is 2^-1074
_HUGE = 2.0**900  # above, the constant would overflow


@dataclass(frozen=True, slots=True)
class ExactSum:
    """The exact sum of finite floats, and how many NaN and infinities there were beside them."""

    finite: Fraction = Fraction(0)
    nan: int = 0
    plus: int = 0
    minus: int = 0

    def __add__(self, other: ExactSum) -> ExactSum:
        return ExactSum(
            self.finite + other.finite,
            self.nan + other.nan,
            self.plus + other.plus,
            self.minus + other.minus,
        )

    def times(self, factor: Fraction | int) -> ExactSum:
        """The sum of every addend times a positive number."""
        return ExactSum(self.finite * factor, self.nan, self.plus, self.minus)

    def special(self) -> float | None:
        """NaN or an infinity where the sum is one, as IEEE 754 adds them; None where finite."""
        if self.nan or (self.plus and self.minus):
            return math.nan
        if self.plus or self.minus:
            return math.inf if self.plus else -math.inf
        return None

    def over(self, divisor: ExactSum) -> float:
        """The quotient, rounded once to float64; NaN for 0 / 0."""
        top, bottom = self.special(), divisor.special()
        if bottom is not None:
            return math.nan if math.isnan(bottom) or top is not None else 0.0
        if top is not None:
            return -top if divisor.finite < 0 else top
        infinity = math.inf if (self.finite < 0) == (divisor.finite < 0) else -math.inf
        if divisor.finite == 0:
            return infinity if self.finite else math.nan
        try:
            return float(self.finite / divisor.finite)
        except OverflowError:  # beyond the largest float64
            return infinity

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without loss; what is zero is left out."""
        fields = {"finite": str(self.finite), "nan": self.nan, "+inf": self.plus}
        fields["-inf"] = self.minus
        return {name: value for name, value in fields.items() if value}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ExactSum:
        """The inverse of `to_dict`; whoever wrote the fields may have meant to harm."""
        finite = fields["finite"]
        if not re.fullmatch(r"-?\d+(/[1-9]\d*)?", finite):  # Fraction("1e300000000") takes hours
            raise ValueError(f"{finite!r} is no sum")
        return cls(Fraction(finite), *(_count(fields, name) for name in ("nan", "+inf", "-inf")))


def _count(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name, 0)
    if not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}")
    return value


_ONE = ExactSum(Fraction(1))


@dataclass(frozen=True, slots=True)
class Partial:
    """What a part of the data adds to the result.

    Attributes:
        total: of the losses (times their weights).
        divisor: what a mean divides by: the number of elements, or the sum of their weights.
        count: of elements.
    """

    total: ExactSum = field(default_factory=ExactSum)
    divisor: ExactSum = field(default_factory=ExactSum)
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without loss."""
        return {
            "total": self.total.to_dict(),
            "divisor": self.divisor.to_dict(),
            "count": self.count,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Partial:
        """The inverse of `to_dict`.

        Raises:
            ArtefactError: when the fields are damaged.
        """
        try:
            total, divisor = (ExactSum.from_dict(fields[name]) for name in ("total", "divisor"))
            return cls(total, divisor, _count(fields, "count"))
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise ArtefactError(f"a partial result is damaged: {exc!r}") from exc


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
    """NaN, infinities and huge numbers one by one; the rest of the block as it was."""
    usual = np.abs(work) < _HUGE
    odd = work[~usual]
    finite = odd[np.isfinite(odd)]
    apart = ExactSum(
        sum(map(Fraction, finite.tolist()), Fraction(0)),
        int(np.count_nonzero(np.isnan(odd))),
        int(np.count_nonzero(odd == np.inf)),
        int(np.count_nonzero(odd == -np.inf)),
    )
    return work[usual], apart
