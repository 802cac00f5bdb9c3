"""Exact sums of products of floats, for sums whose terms cancel: there no format is wide enough.

A float is an integer times a power of two. A product of floats is split without error into floats
(Veltkamp's and Dekker's TwoProduct, of significands alone, so that nothing over- or underflows);
the integers are added up for each power of two, and the totals in Python's own integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np

from ..floats import Array, round_to

_SPLIT = 2.0**27 + 1
_HALF = 2.0**27  # a significand is split in two, whose sums float64 holds up to 2^26 terms


def sums_of_products(
    products: Sequence[Sequence[Array | float]], keys: Array, sums: int
) -> list[Fraction]:
    """For each key 0 <= k < `sums`: the exact sum of the products of the elements with that key.

    Args:
        products: each a sequence of factors, finite float64 of the shape of `keys` or rank 0.
        keys: integers, of any shape; at most 2^26 elements.
        sums: how many.
    """
    found = [Fraction(0)] * sums
    for factors in products:
        for significand, exponent in _pieces(factors, keys.shape):
            _add(found, significand.reshape(-1), exponent.reshape(-1), keys.reshape(-1))
    return found


def _pieces(
    factors: Sequence[Array | float], shape: tuple[int, ...]
) -> Iterator[tuple[Array, Array]]:
    """The product as floats to be added: significands below 1, and their powers of two."""
    pieces, power = [np.ones(shape)], np.zeros(shape, np.int64)
    for factor in factors:
        significand, exponent = np.frexp(np.asarray(factor, np.float64))
        power = power + exponent
        parts = [part for piece in pieces for part in _two_product(piece, significand)]
        pieces = [part for part in parts if part.any()]
    for piece in pieces:
        significand, exponent = np.frexp(piece)
        yield significand, power + exponent


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    product = a * b
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    rest = a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)
    return product, rest


def _split(a: Array) -> tuple[Array, Array]:
    scaled = _SPLIT * a
    high = scaled - (scaled - a)
    return high, a - high


def _add(found: list[Fraction], significand: Array, exponent: Array, keys: Array) -> None:
    kept = significand != 0
    if not kept.any():
        return
    significand, exponent, keys = significand[kept], exponent[kept], keys[kept]
    lowest = int(exponent.min())
    width = int(exponent.max()) - lowest + 1
    at = keys * width + (exponent - lowest)
    places: Array = np.arange(len(found) * width)
    if places.size > 1 << 22:
        places, at = np.unique(at, return_inverse=True)
    integer = significand * 2.0**53
    high = np.floor(integer / _HALF)
    parts = (high, integer - high * _HALF)
    totals = np.stack([np.bincount(at, part, len(places)) for part in parts])
    nonzero = totals.any(axis=0)
    for place, upper, lower in zip(
        places[nonzero].tolist(), *totals[:, nonzero].tolist(), strict=True
    ):
        key, power = divmod(place, width)
        total = (int(upper) << 27) + int(lower)
        found[key] += Fraction(total) * Fraction(2) ** (power + lowest - 53)


def round_fraction(value: Fraction, dtype: str) -> Array:
    """`value` rounded once to `dtype`, to nearest, ties to even; an array of rank 0."""
    try:
        nearest = float(value)
    except OverflowError:
        nearest = float("inf") if value > 0 else float("-inf")
    inexact = np.isfinite(nearest) and Fraction(nearest) != value
    if dtype != "float64" and inexact and np.float64(nearest).view(np.uint64) % 2 == 0:
        # To odd, so that the rounding to the narrower format is the only one (`floats.round_to`).
        nearest = float(np.nextafter(nearest, np.inf if value > nearest else -np.inf))
    return round_to(np.asarray(nearest), dtype)
