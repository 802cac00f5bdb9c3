"""How far from the oracle the graphs of this package can be at most: a bound that is proved.

Notation: `u` is the unit roundoff of a format (2^-24 for float32), `gamma(n, u) = n u / (1 - n u)`;
a product of n factors `1 + delta`, |delta| <= u, is within `1 +- gamma(n, u)` (Higham, Accuracy and
Stability of Numerical Algorithms, 2nd edition, 2002, Lemma 3.1).

Gappa proves the constants below and the steps between them; what stands by hand, and by whose, is
in the list that `scripts/prove_bounds` prints (proofs/). Where they come from:

Each element, in the compute dtype, sees at most `_ELEMENT` roundings. That of `d` counts twice: the
elasticity `d l'(d) / l(d)` is 2 below beta and at most 2 above it. Where rounding `d` carries it
over the knee nothing is lost: the loss is continuous there. That of a Huber loss sees as many, by
hand: beyond the knee, where with x = |d| / delta it is delta^2 times (x - 1) + 1/2, that of `d`
counts x / (x - 1/2) times, the two of the first term 2 (x - 1) / (x - 1/2), that of the second
1/2 / (x - 1/2), and that of their sum once: 4 in all.

The sum of n elements >= 0:

1. float16, bfloat16, float32: in float64, in whatever order: gamma(n - 1, 2^-53), relative,
   because no term is negative (Higham, section 4.2).
2. float64, `CompensatedSum`: `u + 8 n^2 u^2` and smaller terms, u = 2^-53. The split makes
   multiples of `u sigma`, whose sum is exact, and n rests of at most `u sigma` each, whose sum is
   off by at most gamma(n - 1, u) n u sigma; sigma is at most 8 times the naive sum; adding the two
   is one rounding (Rump, Ogita, Oishi, "Accurate floating-point summation part I", 2008).

A weight is one product more an element, in the accumulator's dtype where there is a sum or a
constant factor, and so is that factor; a mean that divides by the sum of the weights carries the
error of that sum as well. `mean` divides once more, in the accumulator's dtype. A result that is
not yet in the output dtype is rounded to it, by way of float32 for the half formats.

From a relative error r to ULP: between x and x (1 + r) lie at most `r / (u (1 - r))` steps of the
output format, and each rounding to nearest adds half of one. The oracle's own error is counted too.

What the bound assumes: IEEE arithmetic, weights >= 0, no overflow, and no underflow within the loss
of an element (a difference whose square, over beta, is subnormal, loses bits that no sum can give
back; so does half of a subnormal beta).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from .._floats import Array, ulp_distance
from .._spec import LossSpec
from ..reference._oracle import CHUNK, element_losses

#: 2^-p for p bits of significand.
UNIT_ROUNDOFF: Mapping[str, float] = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}
_WIDE = UNIT_ROUNDOFF["float64"]
_LONG_DOUBLE = float(np.finfo(np.longdouble).epsneg)  # 2^-64 on x86-64
_ELEMENT = 4  # roundings that reach an element of the loss, as derived above
_SPLIT_LIMIT = 1 << 26  # elements that one split of CompensatedSum serves
_SIGMA = 8  # times the naive sum: where CompensatedSum splits, at most
_SUMS = 2  # that a mean over the sum of the weights stands on, as the oracle may
_LARGEST = 0.5  # relative error, beyond which nothing is said
_NEAREST = 0.5  # ULP that a rounding to nearest moves a number, at most
_ORACLE_DEPTH = 256  # additions that an element passes through within a chunk, at most
_ORACLE_KEEPS = 8  # the oracle's sums are an eighth of their magnitudes, or exact
_BACK = 4  # roundings of a gradient summed back: three of the graph, one of the oracle
_ROOM = 1.001  # for the roundings of gradient_bound itself, and products of errors
_CANCELS = 2  # unit roundoffs, from which on the terms of a gradient cancel
_UNDERFLOWS = 4  # smallest subnormals that are lost where a gradient is subnormal
_MARGIN = 4  # from the smallest normal number, and to the largest, for roundings


def gamma(count: int, unit: float) -> float:
    """`count u / (1 - count u)`; infinite where it means nothing."""
    product = count * unit
    return product / (1 - product) if product < 1 else float("inf")


def accumulation_error(dtype: str, count: int) -> float:
    """The relative error of adding up `count` elements >= 0 in `dtype`, in any order, at most.

    What a graph that is not ours may do: 2^24 float32 elements added up in float32 can be off by
    everything. Source: Higham, section 4.2.
    """
    return gamma(max(count - 1, 0), UNIT_ROUNDOFF[dtype])


def _sum_error(spec: LossSpec, count: int, accumulator: str) -> float:
    if spec.dtype != "float64":
        return accumulation_error(accumulator, count)
    if count > _SPLIT_LIMIT:
        return accumulation_error("float64", count) + _WIDE
    naive = accumulation_error("float64", count)
    return _WIDE + (1 + _WIDE) * naive * count * _WIDE * _SIGMA * (1 + naive)


def _oracle_error(spec: LossSpec, count: int) -> float:
    """It computes elements in float64, or long double for float64, and sums in long double."""
    products = 1 + (spec.loss_weight != 1.0)
    element = gamma(_ELEMENT + products, _LONG_DOUBLE if spec.dtype == "float64" else _WIDE)
    if spec.reduction == "none":
        return element
    return element + _SUMS * gamma(_ORACLE_DEPTH + count // CHUNK, _LONG_DOUBLE)


def bound(spec: LossSpec, count: int, accumulator: str = "float64") -> float:
    """The largest distance to the oracle, in ULP of the loss, that our graphs can have.

    Args:
        spec: dtype and reduction; the bound does not depend on beta.
        count: elements that go into one number of the output; `none` disregards it.
        accumulator: dtype of the sums, where the runtime has no float64 ("float32", TensorRT).

    Returns:
        A real number, or infinity where `count` roundings can take everything: a distance is a
        whole number at most that. With float64 accumulators about 5 for float32 at any
        count up to 2^24, 1 for the half formats, 7 for float64.

    Raises:
        ValueError: for a negative count.
    """
    if count < 0:
        raise ValueError(f"count must be >= 0, got {count}")
    unit = UNIT_ROUNDOFF[spec.dtype]
    relative = gamma(_ELEMENT, UNIT_ROUNDOFF[spec.compute_dtype])
    product = spec.compute_dtype if spec.reduction == "none" else accumulator
    relative += (bool(spec.weight) + (spec.loss_weight != 1.0)) * UNIT_ROUNDOFF[product]
    rounded = spec.dtype == spec.compute_dtype  # the last operation is in the output dtype already
    if spec.reduction != "none":
        sums = _SUMS if spec.weight == "weights" else 1
        relative += sums * _sum_error(spec, count, accumulator)
        if spec.reduction == "mean":
            relative += UNIT_ROUNDOFF[accumulator]
    if spec.reduction != "none" or spec.loss_weight != 1.0:
        if spec.compute_dtype != spec.dtype:
            relative += UNIT_ROUNDOFF["float32"]  # a cast may go by way of float32
        rounded = spec.dtype == "float64"
    relative *= 1 + relative  # the products of the terms above
    if relative >= _LARGEST:
        return math.inf
    relative += _oracle_error(spec, count)
    # The oracle rounds once; the graph's last cast is another rounding.
    steps = relative / (unit * (1 - relative)) + _NEAREST
    return steps if rounded else steps + _NEAREST


def proved_bound(spec: LossSpec, shape: tuple[int, ...], accumulator: str) -> int | None:
    """`bound` in whole ULP for element losses of this shape; None where it bounds nothing."""
    limit = bound(spec, spec.count(shape), accumulator)
    return None if math.isinf(limit) else math.floor(limit)


def gradient_bound(spec: LossSpec, input: Array, target: Array, exact: Array) -> Array | None:
    """The largest distance to the oracle, in ULP of each element, of a gradient summed back.

    Proved of a float64 gradient of one beta, without weights and upstream gradient, whose terms are
    differences, rounded once each because no format is wider, and may cancel. Our graphs add them
    up, clipped, and divide by beta and the count of a mean: with n terms the error is at most
    `(u sum |d| + 8 n^2 u^2 sum |clip(d)|) / (beta count) + 3 u |exact|`, the first sum being of the
    differences below beta (others are clipped to beta exactly), the second term as in 2. above; the
    oracle's own rounding is one more, and what its sum in long double loses about another. 0 for an
    element whose terms don't cancel: the first sum is at most `u |exact|` then. None where nothing
    is proved, or nothing is summed back.
    """
    whole = np.broadcast_shapes(input.shape, target.shape)
    beta, terms = spec.effective_beta, math.prod(whole) // max(input.size, 1)
    # A Huber loss isn't divided by its delta, which is the largest of its slopes.
    divisor, top = (1.0, beta) if spec.loss == "huber" else (beta, 1.0)
    is_scaled = spec.weight or spec.upstream or spec.mask or spec.divisor
    is_plain = spec.dtype == "float64" and not is_scaled and not spec.beta_shape
    if not is_plain or not 1 < terms <= _SPLIT_LIMIT or divisor == 0 or math.isinf(divisor):
        return None
    with np.errstate(all="ignore"):
        slopes = abs(input - target) / divisor
        below = np.where(slopes <= top, slopes, 0)
        errors = below + _SIGMA * terms * terms * _WIDE * np.minimum(slopes, top)
        extra = len(whole) - input.ndim
        axes = tuple(i for i in range(len(whole)) if i < extra or input.shape[i - extra] == 1)
        # Multiplied last: the error of a subnormal slope is none of 0.
        reach = _WIDE * errors.sum(axis=axes).reshape(input.shape)
        reach *= abs(spec.loss_weight)
        if spec.reduction == "mean":
            reach /= spec.count(whole)
        cancels = reach > _CANCELS * _WIDE * abs(exact)
        own = (_BACK + (spec.loss_weight != 1.0)) * _WIDE
        own += _ORACLE_KEEPS * gamma(_ORACLE_DEPTH, _LONG_DOUBLE)
        lost = _UNDERFLOWS * np.finfo("float64").smallest_subnormal
        reach = _ROOM * reach + own * abs(exact) + lost
        ends = (ulp_distance(exact, end) for end in (exact - reach, exact + reach))
        return np.where(cancels, np.maximum(*ends), np.uint64(0))


def in_range(
    spec: LossSpec,
    input: Array,
    target: Array,
    weight: Array | None = None,
    mask: Array | None = None,
) -> bool:
    """Whether what `bound` assumes is so: no element over- or underflows, no weight is negative.

    Asked of the exact differences, in the compute dtype.
    """
    if weight is not None and mask is not None:
        weight = np.where(mask, weight, weight.dtype.type(0))
    given = [np.asarray(spec.effective_beta), input, target, *([] if weight is None else [weight])]
    flat = [array.reshape(-1) for array in np.broadcast_arrays(*given)]
    chunks = range(0, flat[0].size, CHUNK)
    return all(_chunk_in_range(spec, *(array[i : i + CHUNK] for array in flat)) for i in chunks)


def _chunk_in_range(
    spec: LossSpec, beta: Array, input: Array, target: Array, weight: Array | None = None
) -> bool:
    limits = np.finfo(spec.compute_dtype)
    smallest = _MARGIN * float(limits.smallest_normal)  # room for roundings
    is_huber = spec.loss == "huber"
    is_zero = (beta == 0) & (not is_huber)
    with np.errstate(all="ignore"):
        distance = abs(input.astype(np.float64) - target.astype(np.float64))
        slope = np.minimum(distance, beta) / (1.0 if is_huber else beta + (beta == 0))
        slope = np.where(is_zero, np.sign(distance), slope)
        loss = element_losses(distance, spec, beta)
        factors = np.asarray(1.0 if weight is None else weight.astype(np.float64))
        is_scaled = weight is not None or spec.loss_weight != 1.0
        if is_scaled and not _weights_in_range(spec, loss, factors * abs(spec.loss_weight)):
            return False
    fits = np.maximum(distance, loss) <= float(limits.max) / _MARGIN
    if not fits.all():  # NaN and infinity too
        return False
    tiny = (loss < smallest) | (slope < smallest)
    # An L1 loss is a difference, which is exact where it is subnormal; others are exactly 0.
    is_exact = (beta == 0) | (np.isinf(beta) & (not is_huber))
    return not (tiny & (distance > 0) & ~is_exact).any()


def _weights_in_range(spec: LossSpec, loss: Array, weight: Array) -> bool:
    """No weight is negative, and no product leaves the range of the dtype it is computed in."""
    narrow = spec.reduction == "none" and spec.dtype != "float64"
    limits = np.finfo(spec.compute_dtype if narrow else "float64")
    product = loss * weight
    fits = (loss == 0) | (weight == 0) | (product >= _MARGIN * limits.smallest_normal)
    return bool(((weight >= 0) & fits & (product <= limits.max / _MARGIN)).all())
