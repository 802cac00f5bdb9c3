"""Smooth L1 with one thing wrong: small numpy functions to hold a model's answers against.

All are evaluated in a format wider than the spec's dtype, so that what differs is the formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...floats import Array
from ...spec import LossSpec
from .names import Fault

__all__ = ["FORMS", "Form", "Reduction", "reductions", "smooth_l1"]

#: Losses of the elements, from input, target (broadcast, wide) and beta.
Elements = Callable[[Array, Array, float], Array]


@dataclass(frozen=True, slots=True)
class Form:
    """A formula of the element.

    Attributes:
        fault: None for the right one.
        explanation: what it computes, in words.
        losses: the formula.
        estimate: a number that was inferred for it.
        cancels: whether it subtracts numbers that may be nearly equal, so that its rounding
            errors are those of |d|, not of the result.
    """

    fault: Fault | None
    explanation: str
    losses: Elements
    estimate: float | None = None
    cancels: bool = False


def _parts(
    quadratic: Callable[[Array, float], Array], linear: Callable[[Array, float], Array]
) -> Elements:
    """`quadratic(d, beta)` where |d| < beta, `linear(d, beta)` elsewhere."""

    def losses(a: Array, b: Array, beta: float) -> Array:
        d = a - b
        result: Array = np.where(np.abs(d) < beta, quadratic(d, beta), linear(d, beta))
        return result

    return losses


def _quadratic(d: Array, beta: float) -> Array:
    return 0.5 * d * (d / beta) if beta else d * math.nan


def _linear(d: Array, beta: float) -> Array:
    return np.asarray(np.abs(d) - 0.5 * beta)


def smooth_l1(a: Array, b: Array, beta: float) -> Array:
    """The right formula, of elements in a wide format."""
    return _parts(_quadratic, _linear)(a, b, beta)


def _truncated_inputs(a: Array, b: Array, beta: float) -> Array:
    return smooth_l1(np.trunc(a), np.trunc(b), beta)


def _truncated_difference(a: Array, b: Array, beta: float) -> Array:
    return smooth_l1(np.trunc(a - b), np.zeros_like(b), beta)


def _truncated_loss(a: Array, b: Array, beta: float) -> Array:
    return np.trunc(smooth_l1(a, b, beta))


#: In the order in which one that explains as much as another is preferred.
FORMS: tuple[Form, ...] = (
    Form(None, "the formula is right", smooth_l1),
    Form(
        Fault.MISSING_HALF,
        "below beta the loss is d^2 / beta, twice what it should be",
        _parts(lambda d, beta: 2 * _quadratic(d, beta), _linear),
    ),
    Form(
        Fault.MISSING_LINEAR_HALF,
        "from beta on the loss is |d| - beta, where it should be |d| - 0.5*beta",
        _parts(_quadratic, lambda d, beta: np.abs(d) - beta),
        cancels=True,
    ),
    Form(
        Fault.MISSING_HALF,
        "the loss is d^2 / beta below beta and |d| - beta from there on: 0.5 is missing in both",
        _parts(lambda d, beta: 2 * _quadratic(d, beta), lambda d, beta: np.abs(d) - beta),
        cancels=True,
    ),
    Form(
        Fault.MISSING_OFFSET,
        "from beta on the loss is |d|, without -0.5*beta",
        _parts(_quadratic, lambda d, beta: np.abs(d)),
    ),
    Form(
        Fault.HUBER,
        "the loss is torch.nn.HuberLoss(delta=beta), beta times Smooth L1; divide it by beta",
        lambda a, b, beta: beta * smooth_l1(a, b, beta),
    ),
    Form(
        Fault.MISSING_DIVISION,
        "below beta the loss is 0.5*d^2, not divided by beta",
        _parts(lambda d, beta: 0.5 * d * d, _linear),
    ),
    Form(Fault.MSE, "the loss is d^2 everywhere", lambda a, b, beta: (a - b) ** 2),
    Form(Fault.MSE, "the loss is 0.5*d^2 everywhere", lambda a, b, beta: 0.5 * (a - b) ** 2),
    Form(
        Fault.MSE,
        "the loss is 0.5*d^2 / beta everywhere: it has no linear part",
        lambda a, b, beta: _quadratic(a - b, beta),
    ),
    Form(Fault.L1, "the loss is |d| everywhere", lambda a, b, beta: np.abs(a - b)),
    Form(
        Fault.BRANCHES_SWAPPED,
        "the linear part is used below beta and the quadratic part above",
        _parts(_linear, _quadratic),
        cancels=True,
    ),
    Form(
        Fault.MISSING_ABS,
        "from beta on the loss is d - 0.5*beta: negative differences lack the absolute value",
        _parts(_quadratic, lambda d, beta: d - 0.5 * beta),
    ),
    Form(
        Fault.MISSING_ABS,
        "d is compared with beta without its absolute value: every negative d takes the "
        "quadratic part",
        lambda a, b, beta: np.where(a - b < beta, _quadratic(a - b, beta), _linear(a - b, beta)),
    ),
    Form(Fault.TRUNCATION, "input and target are truncated to integers", _truncated_inputs),
    Form(Fault.TRUNCATION, "the difference is truncated to an integer", _truncated_difference),
    Form(Fault.TRUNCATION, "the loss of each element is truncated", _truncated_loss),
)


#: From the losses and the shapes of input and target: a reduction, and a count.
Apply = Callable[[Array, tuple[int, ...], tuple[int, ...]], Array]
Count = Callable[[Array, tuple[int, ...], tuple[int, ...]], int]


@dataclass(frozen=True, slots=True)
class Reduction:
    """A way to sum up.

    Attributes:
        fault: None for the spec's own.
        explanation: what it does, in words.
        apply: from the losses and the shapes of input and target.
        estimate: a number that was inferred for it.
    """

    fault: Fault | None
    explanation: str
    apply: Apply
    estimate: float | None = None


_MISTAKEN = {
    ("mean", "sum"): Fault.SUM_FOR_MEAN,
    ("sum", "mean"): Fault.MEAN_FOR_SUM,
    ("none", "mean"): Fault.REDUCED,
    ("none", "sum"): Fault.REDUCED,
    ("mean", "none"): Fault.NOT_REDUCED,
    ("sum", "none"): Fault.NOT_REDUCED,
}

_COUNTS: tuple[tuple[str, Count], ...] = (
    ("the size of the first axis (the batch)", lambda x, a, b: x.shape[0] if x.ndim else 1),
    (
        "the number of elements in one row (all axes but the first)",
        lambda x, a, b: math.prod(x.shape[1:]),
    ),
    ("the size of the last axis", lambda x, a, b: x.shape[-1] if x.ndim else 1),
    ("the number of all elements", lambda x, a, b: x.size),
    ("the number of elements of the input, before broadcasting", lambda x, a, b: math.prod(a)),
    ("the number of elements of the target, before broadcasting", lambda x, a, b: math.prod(b)),
    ("the number of elements less 1", lambda x, a, b: max(x.size - 1, 1)),
)


def _total(x: Array) -> Array:
    return np.asarray(x.sum())


def _row_totals(x: Array) -> Array:
    return np.asarray(x.reshape(x.shape[0], -1).sum(axis=1) if x.ndim else x)


def _row_length(x: Array) -> int:
    return math.prod(x.shape[1:])


def _divided(total: Callable[[Array], Array], count: Count) -> Apply:
    return lambda x, a, b: np.asarray(total(x) / max(count(x, a, b), 1))


def _of_axis(operator: Callable[..., Array], axis: int) -> Apply:
    return lambda x, a, b: operator(x, axis=axis) if x.ndim else x


def reductions(spec: LossSpec) -> tuple[Reduction, ...]:
    """The spec's own first, then what it could be taken for."""
    total, length = (_row_totals, _row_length) if spec.per_sample else (_total, np.size)
    plain: dict[str, Apply] = {
        "none": lambda x, a, b: x,
        "mean": _divided(total, lambda x, a, b: length(x)),
        "sum": lambda x, a, b: total(x),
    }
    found = [Reduction(None, "the reduction is right", plain[spec.reduction])]
    for other, apply in plain.items():
        if other != spec.reduction:
            why = f"the reduction is {other!r}, the spec says {spec.reduction!r}"
            found.append(Reduction(_MISTAKEN[spec.reduction, other], why, apply))
    if spec.reduction == "none":
        return tuple(found)
    if spec.per_sample:
        why = "all rows are reduced to one number, the spec says one for each"
        found += [
            Reduction(Fault.REDUCED, why, apply)
            for apply in (_divided(_total, lambda x, a, b: x.size), lambda x, a, b: _total(x))
        ]
    for name, count in _COUNTS:
        text = f"the sum is divided by {name}; the spec says {spec.reduction!r}"
        if spec.per_sample:
            text += " of each row"
        found.append(Reduction(Fault.WRONG_COUNT, text, _divided(total, count)))
    if not spec.per_sample:
        for operator in (np.mean, np.sum):
            for axis, name in ((0, "first"), (-1, "last")):
                text = f"only the {name} axis is reduced, by its {operator.__name__}"
                found.append(Reduction(Fault.SOME_AXES, text, _of_axis(operator, axis)))
    return tuple(found)
