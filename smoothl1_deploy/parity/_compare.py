"""The verdict on one result: IEEE class first, then ULP to the oracle, beside PyTorch's own.

1. The class (NaN, +inf, -inf, finite, +0, -0) of every element equals PyTorch's, or the
   oracle's where PyTorch itself overflowed, underflowed, or made NaN of finite input ("better
   than PyTorch").
2. `none`, and the gradient: the largest ULP distance to the oracle is at most PyTorch's own plus 1.
   Of fewer than 1,024 elements chance decides whose largest is larger (of 3.6e7 float32 elements
   either was 3 ULP off at most, and in 0.03 % alone by 2 or more): PyTorch's own is then its
   largest over that many elements drawn alike. That holds for rule 3 too.
3. `mean`, `sum`, per sample: at most PyTorch's own plus 1, or 2; or 3 with a constant factor, whose
   product is one rounding more.
4. Where an error bound is proved for what made the result (`parity.bounds`): at most that.
5. Where differences of float64 cancel in a gradient that is summed back, PyTorch's own distance is
   luck: an element may also be off by what their roundings are proved to leave (`gradient_bound`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .._floats import CLASS_NAMES, Array, ieee_class, limits, ulp_distance
from .._records import Record
from .._spec import ELEMENTS, LossSpec
from ..reference._oracle import element_losses

#: What a reduction may be off, where PyTorch happens to be nearer than that.
REDUCTION_FLOOR = 2
_NAN = CLASS_NAMES.index("nan")


@dataclass(frozen=True, slots=True)
class Verdict(Record):
    """The comparison of one result with PyTorch and the oracle, in the output dtype.

    Attributes:
        ok: rules 1 to 5 hold.
        ulp: the largest distance to the oracle; of elements in a wrong class, none is counted.
        torch_ulp: PyTorch's own largest distance.
        allowed: what `ulp` may be at most.
        bound: what is proved of it, in whole ULP; None where nothing is.
        elements: how many elements the result has.
        wrong_class: how many are in a class that rule 1 doesn't allow.
        better: how many are in the oracle's class where PyTorch is not.
        worst: the flat index of the worst element, or None for an empty result.
        detail: what is wrong, in words; empty when `ok`.
    """

    ok: bool
    ulp: int
    torch_ulp: int
    allowed: int
    elements: int
    wrong_class: int = 0
    better: int = 0
    worst: int | None = None
    detail: str = ""
    bound: int | None = None

    @classmethod
    def failed(cls, elements: int, detail: str) -> Verdict:
        """The verdict on an error, or on an answer of another dtype or shape."""
        return cls(False, 0, 0, 0, elements, wrong_class=elements, detail=detail)

    @property
    def badness(self) -> tuple[bool, int, int]:
        """Larger for the worse of two verdicts: the red one, then by wrong classes and distance."""
        return not self.ok, self.wrong_class, self.ulp


def _torch_lost_it(
    spec: LossSpec, torch_class: Array, input: Array, target: Array, output: str
) -> Array | bool:
    """Where PyTorch's class may be put right: everywhere but at NaN from non-finite input.

    An infinite difference has a loss that is not finite, and a slope that is: 1 or -1.
    """
    with np.errstate(over="ignore"):
        beta = np.asarray(spec.effective_beta).astype(input.dtype)
    # A half format's kernel of Huber's loss rounds delta to that format, to inf or to 0.
    lost = np.isinf(beta) != np.isinf(spec.effective_beta)
    if spec.loss == "huber":
        lost |= (beta == 0) & (np.asarray(spec.effective_beta) > 0)
    if lost.any() or not (torch_class == _NAN).any():
        return True
    finite: Array = np.isfinite(input) & np.isfinite(target)
    not_nan: Array = torch_class != _NAN
    if output == "grad_input":
        with np.errstate(all="ignore"):
            is_number = ~np.isnan(np.subtract(input, target, dtype=np.longdouble))
        finite = np.where(np.isfinite(spec.effective_beta), is_number, finite)
        return np.asarray(not_nan | _all_behind(finite, torch_class.shape))
    if spec.reduction == "none":
        return np.asarray(not_nan | finite)
    finite = finite | _overflowed_rows(spec, input, target)
    return np.asarray(not_nan | finite.all(axis=_reduced(spec, finite)))


def _all_behind(conditions: Array, shape: tuple[int, ...]) -> Array:
    """For each element of an array of `shape` that was broadcast: whether all that it met hold."""
    own = (1,) * (conditions.ndim - len(shape)) + shape
    axes = tuple(i for i, n in enumerate(own) if n != conditions.shape[i])
    return np.asarray(conditions.all(axis=axes, keepdims=True)).reshape(shape)


def _overflowed_rows(spec: LossSpec, input: Array, target: Array) -> Array:
    """Where a finite difference's square overflows PyTorch's dtype, the whole row or tensor.

    So does a Huber loss beyond its knee. A weight of 0 makes NaN of that infinity, whatever else
    there is in the row.
    """
    with np.errstate(all="ignore"):
        d = np.subtract(input, target, dtype=np.longdouble)
        squares = 0.5 * d * d
        huber = element_losses(d, spec) if spec.loss == "huber" else np.zeros_like(d)
    largest, *_ = limits(spec.dtype)
    is_lost = ((squares > largest) & (abs(d) < spec.effective_beta)) | (huber > largest)
    overflowed = np.isfinite(d) & is_lost
    return np.asarray(overflowed.any(axis=_reduced(spec, overflowed), keepdims=True))


def _reduced(spec: LossSpec, whole: Array) -> tuple[int, ...]:
    kept = spec.kept_axes(whole.ndim)
    return tuple(axis for axis in range(whole.ndim) if axis not in kept)


def distances(values: Array, oracle: Array, comparable: Array) -> Array:
    """ULP to the oracle where `comparable`, else 0; most elements are equal and cost nothing."""
    distances = np.zeros(values.shape, np.uint64)
    differs = comparable & (values != oracle)
    if differs.any():
        distances[differs] = ulp_distance(values[differs], oracle[differs])
    return distances


def compare(
    spec: LossSpec,
    result: Array,
    torch: Array,
    oracle: Array,
    input: Array,
    target: Array,
    output: str = "loss",
    bound: int | None = None,
    torch_alike: int = 0,
    unavoidable: Array | None = None,
) -> Verdict:
    """Judge one output by PyTorch's and the oracle's answer to the same `input` and `target`.

    `torch_alike` is PyTorch's own largest distance over elements like those, where they are few;
    `unavoidable` is of each element what rule 5 allows, in ULP.
    """
    spec = spec.of_elements if output in ELEMENTS else spec
    per_element = spec.reduction == "none" or output == "grad_input"
    if result.dtype != oracle.dtype or result.shape != oracle.shape:
        found = f"got {result.dtype}{result.shape}, expected {oracle.dtype}{oracle.shape}"
        return Verdict.failed(result.size, found)
    if result.size == 0:
        return Verdict(True, 0, 0, 0, 0)

    ours, theirs, truth = (ieee_class(values) for values in (result, torch, oracle))
    lost = _torch_lost_it(spec, theirs, input, target, output)
    healed = np.asarray((ours == truth) & (theirs != truth) & lost)
    allowed_class = (ours == theirs) | healed
    better = int(healed.sum())
    wrong = int(allowed_class.size - allowed_class.sum())

    finite = np.isfinite(oracle)
    ours_at = distances(result, oracle, finite & (ours == truth))
    torch_at = distances(torch, oracle, finite & (theirs == truth))
    torch_ulp = max(int(torch_at.max()), torch_alike)
    allowed = torch_ulp + 1
    if not per_element or better:
        # Where PyTorch left the class its own distance is unbounded, and no measure.
        allowed = max(allowed, REDUCTION_FLOOR + (spec.loss_weight != 1.0))
    if bound is not None:
        allowed = min(allowed, bound)

    furthest = int(np.argmax(ours_at))
    if unavoidable is not None:
        limits = np.maximum(unavoidable, np.uint64(allowed))
        over = np.where(ours_at > limits, ours_at, 0)
        furthest = int(np.argmax(over)) if over.any() else furthest
        allowed = int(limits.flat[furthest])
    ulp = int(ours_at.flat[furthest])
    worst = int(np.argmax(~allowed_class)) if wrong else furthest
    what = ""
    if wrong:
        what = f"{wrong} of {result.size} in a wrong class"
    elif ulp > allowed:
        what = f"{ulp:,} ULP > {allowed:,}"
    at = np.unravel_index(worst, result.shape)
    answers = f"got {result[at]!s}, PyTorch {torch[at]!s}, oracle {oracle[at]!s}"
    detail = what and f"{what}; at {tuple(map(int, at))}: {answers}"
    return Verdict(
        not what, ulp, torch_ulp, allowed, result.size, wrong, better, worst, detail, bound
    )
