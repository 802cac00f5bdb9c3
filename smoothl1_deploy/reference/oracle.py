"""The oracle: the exact loss, rounded once to the output dtype.

Independent of torch and of the graph code. Elements are computed in a format with at least 11
more bits than the dtype (float64, or long double for float64), with an exponent range in which
nothing that is finite in the dtype over- or underflows; sums are pairwise in long double.

So a result is the correctly rounded one, but where the exact value lies so close to the middle
of two neighbours that the wide format can't tell which is nearer: within 2^-26 ULP of it, in
float64 within 2^-9 (its sums 2^-5). tests/reference/test_oracle.py holds it to that with rational
arithmetic.
"""

from __future__ import annotations

import numpy as np

from ..floats import NUMPY_DTYPE, Array, round_to, wide_dtype
from ..spec import LossSpec

__all__ = ["oracle", "oracle_gradient"]

_CHUNK = 1 << 20  # elements a step: keeps the wide temporaries of a 2^24 case at tens of MB


def _element_losses(d: Array, beta: float) -> Array:
    """The definition, element by element; `d` is wide and is overwritten by its magnitude."""
    d = np.abs(d)
    wide_beta = d.dtype.type(beta)
    # Dividing before multiplying keeps beta = inf right; where beta is 0, nothing is below it.
    quotient = np.divide(d, wide_beta, out=np.zeros_like(d), where=d < wide_beta)
    losses: Array = np.where(d < wide_beta, 0.5 * d * quotient, d - 0.5 * wide_beta)
    return losses


def _element_slopes(d: Array, beta: float) -> Array:
    """d(loss)/dd; for beta = 0 the sign of d, which is 0 for 0 and for NaN, as PyTorch has it."""
    if beta == 0:
        sign: Array = np.where(np.isnan(d), 0.0, np.sign(d)).astype(d.dtype)
        return sign
    inside = np.abs(d) < beta
    ratio = np.divide(d, d.dtype.type(beta), out=np.zeros_like(d), where=inside)
    slopes: Array = np.where(inside, ratio, np.sign(d))
    return slopes


def oracle(spec: LossSpec, input: Array, target: Array, weight: Array | None = None) -> Array:
    """The exact loss of `input` and `target`.

    Args:
        spec: beta is first rounded to the compute dtype, as PyTorch does. For an artefact with
            `runtime_beta`, the spec with that beta as a number.
        input: any shape, dtype of the spec.
        target: a shape that broadcasts with `input`'s, same dtype.
        weight: likewise, where the spec has one.

    Returns:
        An array of the spec's dtype: the broadcast shape for `none`, [N] per sample, rank 0
        otherwise. The mean of nothing is NaN, the sum of nothing 0.
    """
    _check_dtypes(spec, input, target, weight)
    wide = wide_dtype(spec.dtype)
    given = [input, target] if weight is None else [input, target, weight]
    arrays = np.broadcast_arrays(*given)
    shape = arrays[0].shape
    rows = shape[0] if spec.per_sample else 1
    columns = arrays[0].size // rows if rows else 0
    flat = [array.reshape(rows, columns) if rows else array for array in arrays]
    losses = np.empty((rows, columns), NUMPY_DTYPE[spec.dtype])
    total, weights = np.zeros(rows, np.longdouble), np.zeros(rows, np.longdouble)
    with np.errstate(all="ignore"):
        for start in range(0, columns, _CHUNK) if rows else ():
            part = slice(start, start + _CHUNK)
            a, b, *w = (array[:, part].astype(wide) for array in flat)
            exact = _element_losses(a - b, spec.effective_beta)
            if w:
                exact *= w[0]
                weights += w[0].sum(axis=1, dtype=np.longdouble)
            if spec.reduction == "none":
                losses[:, part] = round_to(exact, spec.dtype)
            else:
                total += exact.sum(axis=1, dtype=np.longdouble)
        if spec.reduction == "none":
            return losses.reshape(shape)
        if spec.reduction == "mean":
            total = total / (weights if spec.weight == "weights" else np.longdouble(columns))
        return round_to(total if spec.per_sample else total[0], spec.dtype)


def oracle_gradient(
    spec: LossSpec,
    input: Array,
    target: Array,
    weight: Array | None = None,
    grad_output: Array | None = None,
) -> Array:
    """The exact gradient of the summed loss with respect to `input`, in `input`'s shape.

    The arguments are those of `oracle`; and `grad_output`, in the loss's shape, by which the loss
    is multiplied before it is summed.
    """
    _check_dtypes(spec, input, target, weight, grad_output)
    wide = wide_dtype(spec.dtype)
    with np.errstate(all="ignore"):
        d = input.astype(wide) - target.astype(wide)
        slopes = _element_slopes(d, spec.effective_beta)
        if weight is not None:
            slopes = slopes * weight.astype(wide)
        if spec.reduction == "mean":
            axes = tuple(range(1 if spec.per_sample else 0, slopes.ndim))
            parts = np.ones_like(slopes) if spec.weight != "weights" else weight
            assert parts is not None
            parts = np.broadcast_to(parts.astype(np.longdouble), slopes.shape)
            slopes = slopes / parts.sum(axis=axes, keepdims=True)
        if grad_output is not None:
            upstream = grad_output.astype(wide)
            if spec.per_sample:
                upstream = upstream.reshape(-1, *[1] * (slopes.ndim - 1))
            slopes = slopes * upstream
        extra = slopes.ndim - input.ndim
        axes = tuple(range(extra)) + tuple(
            i + extra for i, n in enumerate(input.shape) if n == 1 and slopes.shape[i + extra] != 1
        )
        if axes:
            slopes = slopes.sum(axis=axes, keepdims=True, dtype=np.longdouble)
        return round_to(slopes.reshape(input.shape), spec.dtype)


def _check_dtypes(spec: LossSpec, *arrays: Array | None) -> None:
    expected = NUMPY_DTYPE[spec.dtype]
    dtypes = [array.dtype for array in arrays if array is not None]
    if any(dtype != expected for dtype in dtypes):
        given = " and ".join(map(str, dtypes))
        raise TypeError(f"the oracle of {spec} takes {expected}, got {given}")
