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

__all__ = ["oracle"]

_CHUNK = 1 << 20  # elements a step: keeps the wide temporaries of a 2^24 case at tens of MB


def _element_losses(d: Array, beta: float) -> Array:
    """The definition, element by element; `d` is wide and is overwritten by its magnitude."""
    d = np.abs(d)
    wide_beta = d.dtype.type(beta)
    # Dividing before multiplying keeps beta = inf right; where beta is 0, nothing is below it.
    quotient = np.divide(d, wide_beta, out=np.zeros_like(d), where=d < wide_beta)
    return np.where(d < wide_beta, 0.5 * d * quotient, d - 0.5 * wide_beta)


def oracle(spec: LossSpec, input: Array, target: Array) -> Array:
    """The exact loss of `input` and `target`.

    Args:
        spec: beta is first rounded to the compute dtype, as PyTorch does.
        input: any shape, dtype of the spec.
        target: a shape that broadcasts with `input`'s, same dtype.

    Returns:
        An array of the spec's dtype: the broadcast shape for `none`, rank 0 otherwise. The mean
        of nothing is NaN, the sum of nothing 0.
    """
    wide = wide_dtype(spec.dtype)
    expected = NUMPY_DTYPE[spec.dtype]
    if input.dtype != expected or target.dtype != expected:
        raise TypeError(f"the oracle of {spec} takes {expected}, got {input.dtype} and {target.dtype}")
    a, b = np.broadcast_arrays(input, target)
    shape, count = a.shape, a.size
    a, b = a.reshape(-1), b.reshape(-1)
    losses = np.empty(count, expected)
    total = np.longdouble(0)
    with np.errstate(all="ignore"):
        for start in range(0, count, _CHUNK):
            part = slice(start, start + _CHUNK)
            exact = _element_losses(a[part].astype(wide) - b[part].astype(wide), spec.effective_beta)
            if spec.reduction == "none":
                losses[part] = round_to(exact, spec.dtype)
            else:
                total += exact.sum(dtype=np.longdouble)
        if spec.reduction == "none":
            return losses.reshape(shape)
        result = total / np.longdouble(count) if spec.reduction == "mean" else total
        return round_to(np.asarray(result), spec.dtype)
