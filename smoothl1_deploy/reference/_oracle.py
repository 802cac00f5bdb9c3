"""The oracle: the exact loss, rounded once to the output dtype.

Independent of torch and of the graph code. Elements are computed in a format with at least 11
more bits than the dtype (float64, or long double for float64), with an exponent range in which
nothing that is finite in the dtype over- or underflows; sums are pairwise in long double. Where
terms of either sign (of gradients, of negative weights) cancel to less than an eighth of their
magnitudes, the sum is computed again, exactly.

So a result is the correctly rounded one, but where the exact value lies so close to the middle
of two neighbours that the wide format can't tell which is nearer: within 2^-26 ULP of it, in
float64 within 2^-9 (its sums 2^-5). tests/reference/test_oracle.py holds it to that with rational
arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from .._floats import NUMPY_DTYPE, Array, round_to, wide_dtype
from .._spec import LossSpec

CHUNK = 1 << 20  # elements a step: keeps the wide temporaries of a 2^24 case at tens of MB


def element_losses(d: Array, spec: LossSpec, beta: Any = None) -> Array:
    """The definition, element by element; `d` is wide, and `beta` the spec's, or broadcasts so."""
    wide_beta = d.dtype.type(spec.effective_beta if beta is None else beta)
    d = np.broadcast_to(np.abs(d), np.broadcast_shapes(d.shape, np.shape(wide_beta)))
    if spec.loss == "huber":
        beyond = wide_beta * (d - 0.5 * wide_beta)
        return np.asarray(np.where(d < wide_beta, 0.5 * d * d, beyond))
    # Dividing before multiplying keeps beta = inf right; where beta is 0, nothing is below it.
    quotient = np.divide(d, wide_beta, out=np.zeros_like(d), where=d < wide_beta)
    losses: Array = np.where(d < wide_beta, 0.5 * d * quotient, d - 0.5 * wide_beta)
    return losses


def _element_slopes(d: Array, spec: LossSpec) -> Array:
    """d(loss)/dd; for beta = 0 the sign of d, which is 0 for 0 and for NaN, as PyTorch has it."""
    d, beta = np.broadcast_arrays(d, d.dtype.type(spec.effective_beta))
    if spec.loss == "huber":
        return np.clip(d, -beta, beta)
    sign = np.where((beta == 0) & np.isnan(d), d.dtype.type(0), np.sign(d))
    inside = np.abs(d) < beta
    ratio = np.divide(d, beta, out=np.zeros_like(d), where=inside)
    slopes: Array = np.where(inside, ratio, sign)
    return slopes


def oracle(
    spec: LossSpec,
    input: Array,
    target: Array,
    weight: Array | None = None,
    mask: Array | None = None,
    divisor: Array | None = None,
) -> Array:
    """The exact loss of `input` and `target`.

    Args:
        spec: beta, or each of an array, is first rounded to the compute dtype, as PyTorch does. For
            an artefact with `runtime_beta`, the spec with that beta as a number.
        input: any shape, dtype of the spec.
        target: a shape that broadcasts with `input`'s, same dtype.
        weight: a third, where the spec has one.
        mask: booleans that broadcast likewise, where the spec has them.
        divisor: a number that a mean is divided by, where the spec has one.

    Returns:
        An array of the spec's dtype, in the shape that `spec.loss_shape` makes of the broadcast
        one. The mean of nothing is NaN, the sum of nothing 0.

    >>> oracle(LossSpec(reduction="none"), np.float32([1, 2]), np.float32([0, 0]))
    array([0.5, 1.5], dtype=float32)
    """
    _check_dtypes(spec, input, target, weight)
    wide = wide_dtype(spec.dtype)
    arrays = _selected(mask, input, target, weight)
    shape = np.broadcast_shapes(arrays[0].shape, spec.beta_shape)
    flat = [_as_rows(spec, np.broadcast_to(array, shape)) for array in arrays]
    betas = _as_rows(spec, np.broadcast_to(spec.effective_beta, shape))
    rows, columns = flat[0].shape
    losses = np.empty((rows, columns), NUMPY_DTYPE[spec.dtype])
    factor = np.longdouble(spec.effective_loss_weight)
    totals = np.zeros((4, rows), np.longdouble)  # losses, their magnitudes; weights, likewise
    with np.errstate(all="ignore"):
        for start in range(0, columns, CHUNK) if rows else ():
            part = slice(start, start + CHUNK)
            # In rows: down columns, as of a broadcast row, numpy adds up one by one.
            a, b, *w = (array[:, part].astype(wide, order="C") for array in flat)
            exact = element_losses(a - b, spec, betas[:, part] if spec.beta_shape else None)
            if w:
                exact *= w[0]
            if spec.reduction == "none":
                losses[:, part] = round_to(exact * wide.type(factor), spec.dtype)
                continue
            for i, terms in enumerate((exact, *w)):
                totals[2 * i] += terms.sum(axis=1, dtype=np.longdouble)
                if w:
                    totals[2 * i + 1] += abs(terms).sum(axis=1, dtype=np.longdouble)
        if spec.reduction == "none":
            return losses.reshape(shape)
        total, magnitude, weights, weight_magnitude = totals
        result = total
        by = _divisor(spec, shape, mask, divisor, weights)
        if spec.reduction == "mean":
            result = total / by
        rounded = round_to(result * factor, spec.dtype)
        if weight is not None:
            doubtful = _cancels(total, magnitude)
            if spec.weight == "weights":
                doubtful |= _cancels(weights, weight_magnitude)
            for row in np.flatnonzero(doubtful & np.isfinite(totals).all(axis=0)):
                wide_row = (array[row].astype(np.float64) for array in flat)
                rounded[row] = _exact_row(spec, by[row % by.size], betas[row], *wide_row)
        return rounded.reshape(spec.loss_shape(shape))


def _as_rows(spec: LossSpec, whole: Array) -> Array:
    """An array in the element losses' shape, a row for each number that they are reduced to."""
    kept = spec.kept_axes(whole.ndim) if spec.reduction != "none" else ()
    others = [axis for axis in range(whole.ndim) if axis not in kept]
    sizes = [math.prod(whole.shape[axis] for axis in axes) for axes in (kept, others)]
    return whole.transpose(*kept, *others).reshape(sizes)


def _selected(mask: Array | None, *given: Array | None) -> list[Array]:
    """What is given in the shape it broadcasts to, with 0 in all where the mask leaves out."""
    arrays = [array for array in given if array is not None]
    if mask is None:
        return [*np.broadcast_arrays(*arrays)]
    kept, *whole = np.broadcast_arrays(mask, *arrays)
    return [np.where(kept, array, array.dtype.type(0)) for array in whole]


def _divisor(
    spec: LossSpec,
    shape: tuple[int, ...],
    mask: Array | None,
    divisor: Array | None,
    weights: Array | None = None,
) -> Array:
    """What each row of a mean is divided by, or one number for all: the weights' sum where that."""
    if spec.weight == "weights" and weights is not None:
        by = weights
    elif divisor is not None:
        by = np.asarray(divisor, np.longdouble).reshape(1)
    elif mask is not None:
        by = _as_rows(spec, np.broadcast_to(mask, shape)).sum(axis=1, dtype=np.longdouble)
    else:
        by = np.asarray([spec.count(shape)], np.longdouble)
    return np.where(by == 0, np.inf, by) if spec.empty == "zero" else by


def _cancels(total: Array, magnitude: Array) -> Array:
    """Whether so little is left of the terms that their roundings may show in it."""
    return np.asarray(magnitude > 8 * abs(total))


def _exact_row(
    spec: LossSpec, by: np.longdouble, beta: Array, input: Array, target: Array, weight: Array
) -> Array:
    """The weighted sum or mean of one row, of at least one element, all of it finite."""
    is_huber = spec.loss == "huber"
    sign, inside = _signs(input, target, beta)
    outside, inside = ~inside, inside & (is_huber | np.isfinite(beta))
    a, b = input * inside, target * inside
    # Twice the Huber loss, or 2 beta times the other: (a - b)^2, or 2 beta |a - b| - beta^2
    unit = beta if is_huber else _unit(beta, 0.5)
    products: list[Sequence[Array | float]] = [(a, a, weight), (-2.0, a, b, weight), (b, b, weight)]
    finite = np.where(outside, beta, 0.0)
    products += [(2.0, np.where(outside, unit, 0.0), sign, x, weight) for x in (input, -target)]
    products += [(-finite, finite, weight)]
    units, keys = np.unique(np.ones_like(unit) if is_huber else unit, return_inverse=True)
    sums = sums_of_products(products, keys, units.size)
    total = sum((s / (2 * Fraction(u)) for s, u in zip(sums, units, strict=True)), Fraction(0))
    divisor = Fraction(1)
    if spec.reduction == "mean":
        if not np.isfinite(by):
            quotient = np.longdouble(float(total)) / by
            return round_to(np.asarray(quotient * spec.effective_loss_weight), spec.dtype)
        divisor = Fraction(*by.as_integer_ratio())
        if spec.weight == "weights":
            (divisor,) = sums_of_products([(weight,)], np.zeros_like(keys), 1)
        if divisor == 0:
            limit = np.nan if total == 0 else math.inf if total > 0 else -math.inf
            return np.asarray(limit * spec.effective_loss_weight)
        total /= divisor
    factor = spec.effective_loss_weight
    if total == 0:  # whose sign no fraction has
        return round_to(np.asarray((-0.0 if divisor < 0 else 0.0) * factor), spec.dtype)
    return round_fraction(total * Fraction(factor), spec.dtype)


def _unit(beta: Array, of_zero: float) -> Array:
    """What the loss of an element is multiplied by, lest it be divided: beta, where it divides."""
    return np.where(np.isinf(beta), 1.0, np.where(beta == 0, of_zero, beta))


def _signs(input: Array, target: Array, beta: Array) -> tuple[Array, Array]:
    """The sign of each difference, and whether it is below beta: of the exact differences."""
    d = input - target
    back = d - input  # Knuth's TwoSum: d + rest is input - target
    rest = (input - (d - back)) + (-target - back)
    sign = np.nan_to_num(np.sign(d))  # where beta is 0, the slope of NaN is 0
    inside = (abs(d) < beta) | ((abs(d) == beta) & (sign * rest < 0))
    # Of an infinite beta a difference may have overflowed.
    return sign, np.where(np.isinf(beta), np.isfinite(input) & np.isfinite(target), inside)


def oracle_gradient(
    spec: LossSpec,
    input: Array,
    target: Array,
    weight: Array | None = None,
    mask: Array | None = None,
    divisor: Array | None = None,
    grad_output: Array | None = None,
) -> Array:
    """The exact gradient of the summed loss with respect to `input`, in `input`'s shape.

    The arguments are those of `oracle`; and `grad_output`, in the loss's shape, by which the loss
    is multiplied before it is summed.
    """
    _check_dtypes(spec, input, target, weight, grad_output)
    wide, own_shape = wide_dtype(spec.dtype), input.shape
    if mask is not None:
        input, target, *weights = _selected(mask, input, target, weight)
        weight = weights[0] if weights else None
    with np.errstate(all="ignore"):
        d = input.astype(wide) - target.astype(wide)
        slopes = _element_slopes(d, spec) * wide.type(spec.effective_loss_weight)
        if weight is not None:
            slopes = slopes * weight.astype(wide)
        beside = spec.shape_over_axes(slopes.shape)
        divisors = _divisors(spec, slopes.shape, weight, mask, divisor)
        if divisors is not None:
            wide_divisors = np.array([_to_long_double(value) for value in divisors])
            is_one = wide_divisors.size == 1
            slopes = slopes / wide_divisors.reshape(() if is_one else beside)
        if grad_output is not None:
            grad_output = grad_output.reshape(beside)
            slopes = slopes * grad_output.astype(wide)
        if mask is not None:
            slopes = np.where(mask, slopes, slopes.dtype.type(0))
        extra = slopes.ndim - len(own_shape)
        axes = tuple(range(extra)) + tuple(
            i + extra for i, n in enumerate(own_shape) if n == 1 and slopes.shape[i + extra] != 1
        )
        if not axes:
            return round_to(slopes.reshape(own_shape), spec.dtype)
        # numpy adds up pairwise along the last axis alone.
        moved = np.moveaxis(slopes, axes, range(-len(axes), 0))
        kept = moved.shape[: slopes.ndim - len(axes)]
        terms = np.ascontiguousarray(moved).reshape(*kept, math.prod(moved.shape[len(kept) :]))
        # A sum starts at 0: of nothing but -0 it is 0, as PyTorch has it.
        total = terms.sum(axis=-1, dtype=np.longdouble) + 0.0
        magnitude = abs(terms).sum(axis=-1, dtype=np.longdouble)
        rounded = round_to(total, spec.dtype)
        factors = [x for x in (weight, grad_output) if x is not None]
        samples = np.arange(math.prod(beside)).reshape(beside)
        for at in map(tuple, np.argwhere(_cancels(total, magnitude) & np.isfinite(magnitude))):
            a, b, beta, *others = (
                _along(array, slopes.shape, axes, at).astype(np.float64)
                for array in (input, target, np.asarray(spec.effective_beta), *factors)
            )
            keys = np.zeros(a.size, np.int64)
            if divisors is not None and len(divisors) > 1:
                keys = _along(samples, slopes.shape, axes, at)
            rounded[at] = _exact_slope(spec, a, b, beta, others, keys, divisors)
        return rounded.reshape(own_shape)


def exact_outputs(
    spec: LossSpec,
    input: Array,
    target: Array,
    *,
    grad_output: Array | None = None,
    **more: Array,
) -> dict[str, Array]:
    """The exact array of every output of a spec, of arrays by the role they play."""
    exact = {"loss": oracle(spec, input, target, **more)}
    operands = {name: array for name, array in more.items() if name in spec.operands}
    if spec.elements == "losses":
        exact["losses"] = oracle(spec.of_elements, input, target, **operands)
    elif spec.elements:
        given = (a.shape for a in (input, target, *operands.values()))
        whole = np.broadcast_shapes(*given, spec.beta_shape)
        a, b = (x.astype(wide_dtype(spec.dtype)) for x in selected(input, target, **more))
        with np.errstate(all="ignore"):
            exact["differences"] = round_to(np.broadcast_to(a - b, whole), spec.dtype)
    if spec.gradient:
        exact["grad_input"] = oracle_gradient(spec, input, target, grad_output=grad_output, **more)
    return exact


def selected(
    input: Array, target: Array, mask: Array | None = None, **_: Any
) -> tuple[Array, Array]:
    """Input and target as a loss sees them: equal, and both 0, where the mask leaves out."""
    if mask is not None:
        input, target = _selected(mask, input, target)
    return input, target


def _along(array: Array, shape: tuple[int, ...], axes: tuple[int, ...], at: Sequence[int]) -> Array:
    """The elements that one element of the sum over `axes` is made of."""
    moved = np.moveaxis(np.broadcast_to(array, shape), axes, range(-len(axes), 0))
    return np.asarray(moved[tuple(at)]).reshape(-1)


def _divisors(
    spec: LossSpec,
    shape: tuple[int, ...],
    weight: Array | None,
    mask: Array | None,
    divisor: Array | None,
) -> list[Fraction | float] | None:
    """What the losses of a mean are divided by: one, or one for each row; exact where finite."""
    if spec.reduction != "mean":
        return None
    if spec.weight != "weights" or weight is None:
        return [
            Fraction(*by.as_integer_ratio()) if np.isfinite(by) else float(by)
            for by in _divisor(spec, shape, mask, divisor)
        ]
    parts = _as_rows(spec, np.broadcast_to(weight, shape)).astype(np.float64)
    keys = np.broadcast_to(np.arange(len(parts))[:, None], parts.shape)
    exact = sums_of_products([(np.where(np.isfinite(parts), parts, 0),)], keys, len(parts))
    plain = parts.sum(axis=1).tolist()  # NaN and infinite where an element is
    of_nothing = math.inf if spec.empty == "zero" else Fraction(0)
    return [(e or of_nothing) if math.isfinite(p) else p for e, p in zip(exact, plain, strict=True)]


def _to_long_double(value: Fraction | float) -> np.longdouble:
    if not isinstance(value, Fraction):
        return np.longdouble(value)
    unit = 2**200 if abs(value) > 2**1000 else 1  # a sum may be no float64, and is a long double
    high = float(value / unit)
    return (np.longdouble(high) + np.longdouble(float(value / unit - Fraction(high)))) * unit


#: Quotients are added up in units of 1 / _UNIT, as their common denominator may have a million
#: factors; it is far below the smallest product of four float64.
_UNIT = 1 << 5000


def _exact_slope(
    spec: LossSpec,
    input: Array,
    target: Array,
    beta: Array,
    factors: Sequence[Array],
    keys: Array,
    divisors: Sequence[Fraction | float] | None,
) -> Array:
    """One element of the gradient: the sum of at least one term, all of them finite."""
    is_huber = spec.loss == "huber"
    sign, inside = _signs(input, target, beta)
    a, b = (np.where(inside & (is_huber | np.isfinite(beta)), x, 0.0) for x in (input, -target))
    slope_one = beta if is_huber else _unit(beta, 1.0)
    outside = np.where(inside, 0.0, slope_one)
    products: list[Sequence[Array | float]] = [(sign, outside, *factors), (a, *factors)]
    units, index = np.unique(np.ones_like(beta) if is_huber else slope_one, return_inverse=True)
    by_unit = [
        by * Fraction(unit) if math.isfinite(by) else by for by in divisors or [1] for unit in units
    ]
    sums = sums_of_products([*products, (b, *factors)], keys * units.size + index, len(by_unit))
    total = Fraction(0)
    pairs = [(s, Fraction(d)) for s, d in zip(sums, by_unit, strict=True) if s and math.isfinite(d)]
    if len(by_unit) == 1:
        total = sum((s / d for s, d in pairs), Fraction(0))
    else:
        units_of_all = sum(
            _UNIT * s.numerator * d.denominator // (s.denominator * d.numerator) for s, d in pairs
        )
        if abs(units_of_all) > len(pairs):  # else nothing but what the divisions rounded off
            total = Fraction(units_of_all, _UNIT)
    return round_fraction(total * Fraction(spec.effective_loss_weight), spec.dtype)


def _check_dtypes(spec: LossSpec, *arrays: Array | None) -> None:
    expected = NUMPY_DTYPE[spec.dtype]
    dtypes = [array.dtype for array in arrays if array is not None]
    if any(dtype != expected for dtype in dtypes):
        given = " and ".join(map(str, dtypes))
        raise TypeError(f"the oracle of {spec} takes {expected}, got {given}")


def sums_of_products(
    products: Sequence[Sequence[Array | float]], keys: Array, sums: int
) -> list[Fraction]:
    """For each key 0 <= k < `sums`: the exact sum of the products of the elements with that key.

    For sums whose terms cancel, where no format is wide enough: a float is an integer times a power
    of two, and Python's integers have no end. They are added up for each power by itself.

    Args:
        products: each a sequence of factors, finite float64 of the shape of `keys` or rank 0.
        keys: integers, of any shape.
        sums: how many.
    """
    found = [Fraction(0)] * sums
    for factors in products:
        flat = [np.broadcast_to(factor, keys.shape).reshape(-1) for factor in factors]
        for start in range(0, keys.size, CHUNK):
            part = slice(start, start + CHUNK)
            key, terms = keys.reshape(-1)[part], [factor[part] for factor in flat]
            kept = np.logical_and.reduce([term != 0 for term in terms])
            integer, power = np.ones(int(kept.sum()), object), np.zeros(int(kept.sum()), np.int64)
            for term in terms:
                significand, exponent = np.frexp(term[kept].astype(np.float64))
                integer *= np.ldexp(significand, 53).astype(np.int64)
                power += exponent - 53
            order = np.lexsort((power, key[kept]))
            runs = np.stack([key[kept], power])[:, order]
            first = np.flatnonzero(np.diff(runs, axis=1, prepend=-1).any(axis=0))
            if first.size:
                totals = np.add.reduceat(integer[order], first)
                for k, exponent, total in zip(*runs[:, first].tolist(), totals, strict=True):
                    found[k] += Fraction(total) * Fraction(2) ** exponent
    return found


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
