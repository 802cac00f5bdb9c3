"""The faults that a Smooth L1 graph can have, and the wrong formulas that show them.

A formula is a small numpy function to hold a model's answers against: Smooth L1 with one thing
wrong, or a reduction that is not the spec's. All are evaluated in a format wider than the spec's
dtype, so that what differs is the formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from .._floats import Array
from .._records import Record
from .._spec import LossSpec


class Fault(StrEnum):
    """What can be wrong with a Smooth L1 graph. The value is the name that people read."""

    # The formula of an element.
    WRONG_BETA = "wrong beta"
    MISSING_HALF = "missing 0.5 in the quadratic part"
    MISSING_LINEAR_HALF = "missing 0.5 in the linear part"
    MISSING_OFFSET = "missing -0.5*beta in the linear part"
    MISSING_DIVISION = "missing division by beta"
    HUBER = "Huber instead of Smooth L1"
    MSE = "squared error instead of Smooth L1"
    L1 = "L1 instead of Smooth L1"
    PSEUDO_HUBER = "pseudo-Huber instead of Smooth L1"
    LOG_COSH = "log-cosh instead of Smooth L1"
    SMOOTH_ABS = "smoothed absolute value"
    CLIPPED = "loss clipped above"
    WEIGHTED = "elements masked or weighted"
    BRANCHES_SWAPPED = "branches swapped"
    MISSING_ABS = "missing absolute value"
    TRUNCATION = "truncation to integers"
    SCALED = "scaled by a constant factor"
    ZERO_DIVISION = "0/0 for beta = 0"
    # The reduction.
    SUM_FOR_MEAN = "sum instead of mean"
    MEAN_FOR_SUM = "mean instead of sum"
    REDUCED = "reduced where PyTorch does not reduce"
    NOT_REDUCED = "not reduced"
    SOME_AXES = "reduced over some of the axes only"
    WRONG_COUNT = "mean over the wrong count"
    # The arithmetic.
    FLOAT64_ACCUMULATION = "float64 accumulation"
    FLOAT32_ACCUMULATION = "float32 accumulation"
    HALF_ACCUMULATION = "half-precision accumulation"
    NARROW_INPUT = "inputs narrowed"
    NARROW_ARITHMETIC = "computed in a narrower format"
    RANGE = "overflow or underflow on the way"
    # Special values and form.
    LESS_OR_EQUAL = "<= for <"
    NAN_SWALLOWED = "NaN swallowed"
    INFINITE_INPUT = "infinite input mishandled"
    EMPTY_MEAN = "empty mean is not NaN"
    EMPTY = "empty input mishandled"
    NEGATIVE_ZERO = "negative zero"
    SHAPE = "wrong shape of the result"
    DTYPE = "wrong dtype of the result"
    NO_ANSWER = "no answer"
    # The gradient.
    SWAPPED_INPUTS = "input and target swapped in the gradient"
    GRADIENT_SCALE = "gradient scaled by the count"
    WRONG_GRADIENT = "wrong gradient"

    UNKNOWN = "unknown"


#: An accumulator's dtype -> the fault of using it where ours is wider.
ACCUMULATION = {
    "float64": Fault.FLOAT64_ACCUMULATION,
    "float32": Fault.FLOAT32_ACCUMULATION,
    "float16": Fault.HALF_ACCUMULATION,
    "bfloat16": Fault.HALF_ACCUMULATION,
}


@dataclass(frozen=True, slots=True)
class Evidence(Record):
    """One answer of the model that speaks for a fault.

    Attributes:
        probe: what was fed.
        expected: the exact answer.
        got: the model's.
        explained: what a model with this fault answers; None where that can't be said.
    """

    probe: str
    expected: float
    got: float | None
    explained: float | None = None

    def __str__(self) -> str:
        words = f"{self.probe}: expected {_text(self.expected)}, got {_text(self.got)}"
        if self.explained is not None:
            words += f" (this fault gives {_text(self.explained)})"
        return words


def _text(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.9g}"


@dataclass(frozen=True, slots=True)
class Diagnosis(Record):
    """The most likely fault behind wrong answers.

    Attributes:
        fault: its name.
        explanation: in sentences, with the numbers that were inferred.
        evidence: the answers that speak for it most clearly.
        estimate: the number that was inferred (a beta, a count, a factor); None where none was.
    """

    fault: Fault
    explanation: str
    evidence: tuple[Evidence, ...] = ()
    estimate: float | None = None

    def __str__(self) -> str:
        return f"{self.fault.value}: {self.explanation}"


@dataclass(frozen=True, slots=True)
class Step:
    """One of the two steps of a loss: the formula of an element, or the reduction.

    Attributes:
        fault: None for what the spec asks for.
        explanation: what it computes, in words.
        compute: a formula's losses, from input, target (broadcast, wide) and beta; or a reduction's
            result, from the losses and the shapes of input and target.
        estimate: a number that was inferred for it.
        cancels: from |d|, the size of the numbers that a formula subtracts where they may be nearly
            equal: its rounding errors are theirs, not those of the result. None where none are.
    """

    fault: Fault | None
    explanation: str
    compute: Callable[..., Array]
    estimate: float | None = None
    cancels: Callable[[float], float] | None = None


# --- formulas of an element

#: Losses of the elements, from input, target (broadcast, wide) and beta.
Losses = Callable[[Array, Array, float], Array]


def _piecewise(
    below: Callable[[Array, float], Array], above: Callable[[Array, float], Array]
) -> Losses:
    """`below(d, beta)` where |d| < beta, `above(d, beta)` elsewhere."""

    def losses(a: Array, b: Array, beta: float) -> Array:
        """The losses of elements in a wide format."""
        d = a - b
        return np.where(np.abs(d) < beta, below(d, beta), above(d, beta))

    return losses


def _quadratic(d: Array, beta: float) -> Array:
    return 0.5 * d * (d / beta) if beta else d * math.nan


def _linear(d: Array, beta: float) -> Array:
    return np.asarray(np.abs(d) - 0.5 * beta)


def _coefficients(p: float, q: float) -> Losses:
    """`p d^2 / beta` below beta, `|d| - q beta` above."""
    return _piecewise(
        lambda d, beta: 2 * p * _quadratic(d, beta), lambda d, beta: np.abs(d) - q * beta
    )


#: The right formula, of elements in a wide format.
smooth_l1 = _piecewise(_quadratic, _linear)


def _log_cosh(a: Array, b: Array, beta: float) -> Array:
    d = np.abs(a - b)
    return np.asarray(d + np.log1p(np.exp(-2 * d)) - math.log(2))


def _masked(keep: Callable[[Array], Array], of_none: float | None) -> Losses:
    """0 where not kept. A mean over the kept alone is one over all of that much larger losses.

    `of_none` is that mean where nothing is kept; None where the mean is over all.
    """

    def losses(a: Array, b: Array, beta: float) -> Array:
        kept = keep(b)
        share = 1.0 if of_none is None else float(kept.mean())
        if not share:
            return np.full_like(b, of_none)
        return np.where(kept, smooth_l1(a, b, beta) / share, 0.0)

    return losses


#: What is made an integer, and the loss of elements in which `f` makes it one.
_INTEGERS: tuple[tuple[str, Callable[..., Array]], ...] = (
    ("input and target are", lambda f, a, b, beta: smooth_l1(f(a), f(b), beta)),
    ("the target alone is", lambda f, a, b, beta: smooth_l1(a, f(b), beta)),
    ("the difference is", lambda f, a, b, beta: smooth_l1(f(a - b), 0 * b, beta)),
)
_MASKS: tuple[tuple[str, Callable[[Array], Array]], ...] = (
    ("0", lambda b: b != 0),
    ("0 or less", lambda b: b > 0),
    ("below 0", lambda b: b >= 0),
    *((str(value), lambda b, value=value: b != value) for value in (-1, -100, 255)),
)
_LEFT_OUT = "are left out, of the mean's count as well"
_MASKED_MEANS: tuple[tuple[str, str, float | None], ...] = (
    ("count as 0", "count", None),
    (_LEFT_OUT, "weights", math.nan),
    (_LEFT_OUT, "weights", 0.0),
)
_INSTEAD = "compute it by torch.nn.SmoothL1Loss instead"
_BY_ABS = "compute |d| by Abs, which is exact"

#: What a formula may be; of two that explain as much, the earlier one is named.
FORMS: tuple[Step, ...] = (
    Step(None, "the formula is right", smooth_l1),
    Step(Fault.MISSING_HALF, "below beta the loss is d^2 / beta, twice what it should be",
         _coefficients(1, 0.5)),
    Step(Fault.MISSING_LINEAR_HALF,
         "from beta on the loss is |d| - beta, where it should be |d| - 0.5*beta",
         _coefficients(0.5, 1), cancels=abs),
    Step(Fault.MISSING_HALF,
         "the loss is d^2 / beta below beta and |d| - beta from there on: 0.5 is missing in both",
         _coefficients(1, 1), cancels=abs),
    Step(Fault.MISSING_HALF,
         "the loss is d^2 / beta below beta and |d| from there on: 0.5 is missing in "
         "0.5 * min(|d|, beta)^2 / beta", _coefficients(1, 0)),
    Step(Fault.MISSING_HALF,
         "the loss is max(|d| - beta, 0): 0.5 is missing in c * (d - 0.5*c) / beta, where c is d "
         "clipped to beta",
         _piecewise(lambda d, beta: np.zeros_like(d), lambda d, beta: np.abs(d) - beta),
         cancels=abs),
    Step(Fault.MISSING_OFFSET, "from beta on the loss is |d|, without -0.5*beta",
         _coefficients(0.5, 0)),
    Step(Fault.HUBER,
         "the loss is torch.nn.HuberLoss(delta=beta), beta times Smooth L1; divide it by beta",
         lambda a, b, beta: beta * smooth_l1(a, b, beta)),
    Step(Fault.MISSING_DIVISION, "below beta the loss is 0.5*d^2, not divided by beta",
         _piecewise(lambda d, beta: 0.5 * d * d, _linear)),
    Step(Fault.MISSING_DIVISION,
         "the loss is 0.5 * min(|d|, beta)^2, not divided by beta, and the excess of |d| over it",
         _piecewise(lambda d, beta: 0.5 * d * d,
                    lambda d, beta: np.abs(d) - beta + 0.5 * beta * beta)),
    Step(Fault.MSE, "the loss is d^2 everywhere", lambda a, b, beta: (a - b) ** 2),
    Step(Fault.MSE, "the loss is 0.5*d^2 everywhere", lambda a, b, beta: 0.5 * (a - b) ** 2),
    Step(Fault.MSE, "the loss is 0.5*d^2 / beta everywhere: it has no linear part",
         lambda a, b, beta: _quadratic(a - b, beta)),
    Step(Fault.L1, "the loss is |d| everywhere", lambda a, b, beta: np.abs(a - b)),
    Step(Fault.BRANCHES_SWAPPED,
         "the linear part is used below beta and the quadratic part above",
         _piecewise(_linear, _quadratic), cancels=abs),
    Step(Fault.MISSING_ABS,
         "from beta on the loss is d - 0.5*beta: negative differences lack the absolute value",
         _piecewise(_quadratic, lambda d, beta: d - 0.5 * beta)),
    Step(Fault.MISSING_ABS,
         "d is compared with beta without its absolute value: every negative d takes the "
         "quadratic part",
         lambda a, b, beta: np.where(a - b < beta, _quadratic(a - b, beta), _linear(a - b, beta))),
    Step(Fault.LOG_COSH, f"the loss is log(cosh(d)), whatever beta is; {_INSTEAD}",
         _log_cosh, cancels=lambda d: d + 1),
    *(
        Step(Fault.TRUNCATION, f"{what} {how} to an integer; cast to a float type",
             lambda a, b, beta, f=f, made=made: made(f, a, b, beta))
        for f, how in ((np.trunc, "truncated"), (np.rint, "rounded"))
        for what, made in _INTEGERS
    ),
    *(
        Step(Fault.WEIGHTED,
             f"elements whose target is {which} {are}; give the mask as weights of 0 and 1, which "
             f"a spec with the weight {weight!r} takes",
             _masked(keep, of_none))
        for which, keep in _MASKS
        for are, weight, of_none in _MASKED_MEANS
    ),
)  # fmt: skip


# --- formulas with a number of their own


#: The number of a formula from |d| > 0, the loss of that element, > 0, and beta; what is not > 0
#: and finite says that this element doesn't tell.
Solve = Callable[[float, float, float], float]
#: A formula from the number and the spec.
Form = Callable[[float, LossSpec], Step]


def _beta_text(beta: float, spec: LossSpec) -> str:
    why = f"beta = {beta:.9g} fits every answer; the spec says {spec.beta:.9g}"
    six_digits = 5e-6
    if math.isclose(beta * spec.beta, 1, rel_tol=six_digits):
        why += "; that is 1/beta"
    elif math.isclose(beta * spec.beta * spec.beta, 1, rel_tol=six_digits):
        why += "; that is 1/beta^2, as where beta was taken for a sigma"
    return why


def _clip_text(top: float, spec: LossSpec) -> str:
    beta = spec.effective_beta
    d = top + beta / 2 if 2 * top >= beta else math.sqrt(2 * beta * top)
    return (
        f"the loss of an element is never above {top:.9g}, as where |d| is clipped to {d:.9g}; "
        "leave the clip out"
    )


def _smoothed(a: Array, b: Array, p: float) -> Array:
    return np.sqrt((a - b) ** 2 + p)


def _excess(d: float, loss: float, beta: float) -> float:
    """The e for which sqrt(d^2 + e) - beta/2 is that loss, which only the linear part tells."""
    size = loss + beta / 2
    return size * size - d * d if d >= beta else 0.0


#: Formulas with a number of their own, which is read off the answers; of two that explain as much
#: with numbers as round, the earlier one is named.
FITS: tuple[tuple[Solve, Form], ...] = (
    (lambda d, loss, _: 2 * (d - loss) if 2 * loss >= d else d * d / (2 * loss),
     lambda beta, spec: Step(
        Fault.WRONG_BETA, _beta_text(beta, spec), lambda a, b, _: smooth_l1(a, b, beta), beta)),
    (lambda d, loss, _: loss / math.sqrt(d * d - 2 * loss) if d * d > 2 * loss else 0.0,
     lambda delta, _: Step(
        Fault.PSEUDO_HUBER,
        "the loss is pseudo-Huber, delta^2 * (sqrt(1 + (d/delta)^2) - 1), with "
        f"delta = {delta:.9g}; {_INSTEAD}",
        lambda a, b, _: delta * (np.hypot(a - b, delta) - delta),
        delta, lambda d: delta * (d + delta))),
    (lambda d, loss, _: (d * d - loss * loss) / (2 * loss),
     lambda delta, _: Step(
        Fault.PSEUDO_HUBER,
        "the loss is pseudo-Huber over delta, sqrt(d^2 + delta^2) - delta, with "
        f"delta = {delta:.9g}; {_INSTEAD}",
        lambda a, b, _: np.hypot(a - b, delta) - delta,
        delta, lambda d: d + delta)),
    (_excess, lambda e, _: Step(
        Fault.SMOOTH_ABS, f"|d| is sqrt(d^2 + {e:.9g}) in the linear part; {_BY_ABS}",
        lambda a, b, beta: np.where(_smoothed(a, b, e) < beta,
                                    _quadratic(a - b, beta), _smoothed(a, b, e) - 0.5 * beta), e)),
    (_excess, lambda e, _: Step(
        Fault.SMOOTH_ABS, f"|d| is sqrt(d^2 + {e:.9g}) in both parts; {_BY_ABS}",
        lambda a, b, beta: smooth_l1(_smoothed(a, b, e), np.zeros_like(a), beta), e)),
    (lambda d, loss, _: _excess(d, loss, 0.0),
     lambda e, _: Step(
        Fault.SMOOTH_ABS,
        f"the loss is Charbonnier's, sqrt(d^2 + {e:.9g}) everywhere; {_INSTEAD}",
        lambda a, b, _: _smoothed(a, b, e), e)),
    (lambda d, loss, _: loss,
     lambda top, spec: Step(
        Fault.CLIPPED, _clip_text(top, spec),
        lambda a, b, beta: np.minimum(smooth_l1(a, b, beta), top), top)),
)  # fmt: skip


# --- reductions

#: From the losses and the shapes of input and target.
Apply = Callable[[Array, tuple[int, ...], tuple[int, ...]], Array]
Count = Callable[[Array, tuple[int, ...], tuple[int, ...]], int]

#: The fault of another reduction in place of one that reduces.
_MISTAKEN = {
    "sum": Fault.SUM_FOR_MEAN, "mean": Fault.MEAN_FOR_SUM, "none": Fault.NOT_REDUCED,
}  # fmt: skip
_COUNTS: tuple[tuple[str, Count], ...] = (
    ("the size of the first axis (the batch)", lambda x, a, b: x.shape[0] if x.ndim else 1),
    ("the number of elements in one row (all axes but the first)",
     lambda x, a, b: math.prod(x.shape[1:])),
    ("the size of the last axis", lambda x, a, b: x.shape[-1] if x.ndim else 1),
    ("the number of elements of the input, before broadcasting", lambda x, a, b: math.prod(a)),
    ("the number of elements of the target, before broadcasting", lambda x, a, b: math.prod(b)),
    ("the number of elements less 1", lambda x, a, b: x.size - 1),
)  # fmt: skip


def _total(x: Array) -> Array:
    return np.asarray(x.sum())


def _row_totals(x: Array) -> Array:
    return np.asarray(x.reshape(x.shape[0], -1).sum(axis=1) if x.ndim else x)


def _divided(total: Callable[[Array], Array], count: Count) -> Apply:
    return lambda x, a, b: np.asarray(total(x) / max(count(x, a, b), 1))


def reductions(spec: LossSpec) -> tuple[Step, ...]:
    """The spec's own first, then what it could be taken for."""
    total, of_each = (_row_totals, " of each row") if spec.per_sample else (_total, "")
    plain: dict[str, Apply] = {
        "none": lambda x, a, b: x,
        "mean": _divided(total, lambda x, a, b: math.prod(x.shape[1:]) if of_each else x.size),
        "sum": lambda x, a, b: total(x),
    }
    found = [Step(None, "the reduction is right", plain.pop(spec.reduction))]
    for other, apply in plain.items():
        fault = Fault.REDUCED if spec.reduction == "none" else _MISTAKEN[other]
        why = f"the reduction is {other!r}, the spec says {spec.reduction!r}"
        found.append(Step(fault, why, apply))
    if spec.reduction == "none":
        return tuple(found)
    if spec.per_sample:
        why = "all rows are reduced to one number, the spec says one for each"
        for apply in (_divided(_total, lambda x, a, b: x.size), lambda x, a, b: _total(x)):
            found.append(Step(Fault.REDUCED, why, apply))
    for name, count in _COUNTS:
        why = f"the sum is divided by {name}; the spec says {spec.reduction!r}{of_each}"
        found.append(Step(Fault.WRONG_COUNT, why, _divided(total, count)))
    if not spec.per_sample:
        for operator in (np.mean, np.sum):
            for axis, name in ((0, "first"), (-1, "last")):
                why = f"only the {name} axis is reduced, by its {operator.__name__}"
                found.append(Step(Fault.SOME_AXES, why, _over_axis(operator, axis)))
    return tuple(found)


def _over_axis(operator: Callable[..., Array], axis: int) -> Apply:
    return lambda x, a, b: operator(x, axis=axis) if x.ndim else x
