"""Which formula and reduction explain all the answers of a model.

A hypothesis holds when every answer is within the rounding that any sane order of evaluation
can make: (8 + n) u relative for n elements, u the unit roundoff of the format it is computed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...floats import Array, round_to, wide_dtype
from ...spec import LossSpec
from ..bounds import UNIT_ROUNDOFF
from .hypotheses import FITS, FORMS, Elements, Form, Reduction, reductions, smooth_l1
from .names import Fault
from .probes import Answer

__all__ = [
    "Hypothesis",
    "count_of",
    "explains",
    "find",
    "narrower",
    "nearest",
    "predict",
    "right",
    "weighted",
]

_FLAT = 0.01  # relative: more than this is never a matter of rounding, but for bfloat16


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A formula with a reduction."""

    form: Form
    reduction: Reduction

    @property
    def right(self) -> bool:
        """Whether this is what the spec asks for."""
        return self.form.fault is None and self.reduction.fault is None


def right(spec: LossSpec) -> Hypothesis:
    """Nothing wrong."""
    return Hypothesis(FORMS[0], reductions(spec)[0])


def _wide(spec: LossSpec, answer: Answer) -> tuple[Array, Array]:
    wide = wide_dtype(spec.dtype)
    a, b, *_ = np.broadcast_arrays(*answer.probe.arrays)
    return a.astype(wide), b.astype(wide)


def _losses(spec: LossSpec, losses: Elements, answer: Answer) -> Array:
    with np.errstate(all="ignore"):
        return losses(*_wide(spec, answer), spec.effective_beta)


def predict(spec: LossSpec, hypothesis: Hypothesis, answer: Answer) -> Array:
    """What a model of this kind answers to a probe, wide."""
    if hypothesis.right:  # the oracle knows every spec there is
        return answer.expected.astype(wide_dtype(spec.dtype))
    losses = _losses(spec, hypothesis.form.losses, answer)
    shapes = answer.probe.input.shape, answer.probe.target.shape
    with np.errstate(all="ignore"):
        return np.asarray(hypothesis.reduction.apply(losses, *shapes))


def _tolerance(unit: float, count: int) -> float:
    return min((8 + count) * unit, max(8 * unit, _FLAT))


def explains(
    spec: LossSpec, hypothesis: Hypothesis, answer: Answer, unit: float | None = None
) -> bool:
    """Whether the answer is what the hypothesis predicts, to rounding with this unit roundoff."""
    if answer.got is None:
        return False
    predicted = predict(spec, hypothesis, answer)
    if predicted.shape not in (answer.got.shape, answer.shape):
        return False
    got = answer.got.astype(predicted.dtype).reshape(predicted.shape)
    rounded = round_to(predicted, spec.dtype).astype(predicted.dtype)
    unit = UNIT_ROUNDOFF[spec.dtype] if unit is None else unit
    scale = np.abs(predicted)
    if hypothesis.form.cancels is not None:
        scale = scale + _subtracted(spec, hypothesis.form.cancels, answer)
    limit = _tolerance(unit, count_of(answer)) * scale
    with np.errstate(invalid="ignore"):
        close = np.abs(got - predicted) <= limit
    same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
    return bool(np.all(close | same))


def _subtracted(spec: LossSpec, cancels: Callable[[float], float], answer: Answer) -> float:
    return cancels(float(np.abs(np.subtract(*_wide(spec, answer))).max()))


def count_of(answer: Answer) -> int:
    """Elements that an answer sums up."""
    return math.prod(np.broadcast_shapes(*(array.shape for array in answer.probe.arrays)))


def _holds(
    spec: LossSpec, hypothesis: Hypothesis, answers: Sequence[Answer], unit: float | None = None
) -> bool:
    if not all(explains(spec, hypothesis, answer, unit) for answer in answers):
        return False
    cancels = hypothesis.form.cancels
    # Where all that is predicted may cancel, to be near it says nothing.
    return cancels is None or any(
        _subtracted(spec, cancels, answer) <= 4 * np.abs(predict(spec, hypothesis, answer)).min()
        for answer in answers
    )


def find(spec: LossSpec, answers: Sequence[Answer]) -> list[Hypothesis]:
    """Every hypothesis of the simplest kind that explains all answers, the likeliest first.

    Kinds, from the simplest: nothing wrong; one named fault; one with a number of its own (beta,
    a coefficient, a count); a wrong formula with a wrong reduction.
    """
    own, *others = reductions(spec)
    form, *wrong = FORMS

    def kinds() -> Iterator[Iterable[Hypothesis]]:
        yield [Hypothesis(form, own)]
        yield [Hypothesis(each, own) for each in wrong]
        yield [Hypothesis(form, reduction) for reduction in others]
        yield (Hypothesis(each, own) for each in _narrowed(spec))
        yield (Hypothesis(each, own) for each in _fitted(spec, own, answers))
        yield (Hypothesis(form, reduction) for reduction in _scales(spec, own, answers))
        yield (Hypothesis(each, own) for each in _coefficients(spec, own, answers))
        yield (Hypothesis(each, other) for other in others for each in wrong)
        yield (
            Hypothesis(each, other) for other in others for each in _fitted(spec, other, answers)
        )

    if not answers:
        return []
    for kind in kinds():
        found: list[Hypothesis] = []
        for hypothesis in kind:
            if _holds(spec, hypothesis, answers):
                found.append(hypothesis)
                if hypothesis.form.estimate is not None:
                    break  # the roundest number that fits; the others differ by rounding
        if found:
            return found
    return []


def weighted(
    spec: LossSpec, places: Sequence[Answer], answers: Sequence[Answer]
) -> Hypothesis | None:
    """The right losses times a factor for each place, which the answers to `place_probes` tell."""
    if any(answer.got is None or not np.isfinite(answer.got).all() for answer in places):
        return None
    found = [float(a.got.sum() / a.expected.sum()) for a in places if a.got is not None]
    for digits in (3, 6, 17):  # a mask is of ones and zeros
        factors = np.array([float(f"{factor:.{digits}g}") for factor in found])

        def losses(a: Array, b: Array, beta: float, factors: Array = factors) -> Array:
            return (smooth_l1(a, b, beta).reshape(-1, len(factors)) * factors).reshape(a.shape)

        listed = ", ".join(f"{factor:.6g}" for factor in factors[:8])
        more = ", ..." if len(factors) > 8 else ""
        why = (
            f"the elements of a row count {listed}{more} times each; give these factors as "
            "weights, which LossSpec(weight='count') takes"
        )
        hypothesis = Hypothesis(Form(Fault.WEIGHTED, why, losses), reductions(spec)[0])
        if len(set(factors)) > 1 and _holds(spec, hypothesis, answers):
            return hypothesis
    return None


def nearest(spec: LossSpec, answers: Sequence[Answer]) -> tuple[Hypothesis, int]:
    """The hypothesis with one named fault, or none, that explains most answers; how many."""
    own, *others = reductions(spec)
    single = [Hypothesis(form, own) for form in FORMS]
    single += [Hypothesis(FORMS[0], reduction) for reduction in others]
    counts = [sum(explains(spec, each, answer) for answer in answers) for each in single]
    best = int(np.argmax(counts))
    return single[best], counts[best]


def _responses(
    spec: LossSpec, reduction: Reduction, answers: Sequence[Answer]
) -> Iterator[tuple[float, float]]:
    """(|d|, loss of one element) of every probe that is the same everywhere."""
    for answer in answers:
        if answer.probe.kind != "constant" or answer.got is None or not answer.got.size:
            continue
        shapes = answer.probe.input.shape, answer.probe.target.shape
        ones = np.ones(np.broadcast_shapes(*(array.shape for array in answer.probe.arrays)))
        weight = float(np.asarray(reduction.apply(ones, *shapes)).reshape(-1)[0])
        d = float(answer.probe.input.reshape(-1)[0]) - float(answer.probe.target.reshape(-1)[0])
        value = float(answer.got.reshape(-1)[0]) / weight
        if math.isfinite(value):
            yield abs(d), value


#: From the roundest numbers to all digits that a float64 has: people choose round numbers.
_DIGITS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 17)


def _rounded(values: Iterable[float], digits: int) -> Iterable[float]:
    return dict.fromkeys(float(f"{value:.{digits - 1}e}") for value in values)


def _rounder(value: float) -> Iterator[float]:
    """A number rounded, from the roundest on, to itself."""
    for digits in _DIGITS:
        yield from _rounded([value], digits)


def _fitted(spec: LossSpec, reduction: Reduction, answers: Sequence[Answer]) -> Iterator[Form]:
    """Every formula with a number, at the numbers that single answers suggest, roundest first."""
    beta = spec.effective_beta
    told = [(d, loss) for d, loss in _responses(spec, reduction, answers) if d > 0 < loss]
    solved = [[fit.solve(d, loss, beta) for d, loss in told] for fit in FITS]
    for digits in _DIGITS:
        for fit, numbers in zip(FITS, solved, strict=True):
            useful = [number for number in numbers if 0 < number < math.inf]
            yield from (fit.form(number, spec) for number in _rounded(useful, digits))


def _narrowed(spec: LossSpec) -> Iterator[Form]:
    if spec.dtype == "float64" and (beta := float(np.float32(spec.beta))) != spec.beta:
        why = f"beta is rounded to float32 ({beta!r} for {spec.beta!r})"
        yield Form(Fault.WRONG_BETA, why, lambda a, b, _: smooth_l1(a, b, beta), beta)
    for dtype in narrower(spec.dtype):

        def losses(a: Array, b: Array, beta: float, dtype: str = dtype) -> Array:
            a, b = (round_to(x, dtype).astype(x.dtype) for x in (a, b))
            return smooth_l1(a, b, beta)

        why = f"input and target are rounded to {dtype} before the loss is computed"
        yield Form(Fault.NARROW_INPUT, why, losses)


def narrower(dtype: str) -> list[str]:
    """Formats with a larger unit roundoff, the nearest first."""
    return [
        other
        for other in sorted(UNIT_ROUNDOFF, key=UNIT_ROUNDOFF.__getitem__)
        if UNIT_ROUNDOFF[other] > UNIT_ROUNDOFF[dtype]
    ]


def _scales(spec: LossSpec, own: Reduction, answers: Sequence[Answer]) -> Iterator[Reduction]:
    """The right loss clipped, times a factor, or over a count read off answers of each shape."""
    factors: dict[int, float] = {}
    for answer in answers:
        expected, count = float(answer.expected.reshape(-1)[0]), count_of(answer)
        if count not in factors and answer.got is not None and answer.got.size and expected:
            factors[count] = float(answer.got.reshape(-1)[0]) / expected
    if not factors or not all(math.isfinite(f) and f for f in factors.values()):
        return
    top = max(float(answer.got.max()) for answer in answers if answer.got is not None)
    yield Reduction(
        Fault.CLIPPED,
        f"the result is never above {top:.9g}; leave the clip out",
        lambda x, a, b: np.minimum(own.apply(x, a, b), top),
        top,
    )
    first = next(iter(factors.values()))
    for factor in _rounder(first):
        yield Reduction(
            Fault.SCALED,
            f"every answer is {factor:.9g} times the right one",
            lambda x, a, b, f=factor: np.asarray(own.apply(x, a, b) * f),  # type: ignore[misc]
            factor,
        )
    if spec.reduction == "none" or spec.per_sample or len(factors) == 1:
        return
    # Not one factor: a divisor that depends on the size.
    divisors = {n: (n if spec.reduction == "mean" else 1) / f for n, f in factors.items()}
    listed = ", ".join(f"{divisor:.6g} at {n} elements" for n, divisor in divisors.items())
    yield Reduction(
        Fault.WRONG_COUNT,
        f"the sum is divided by {listed}",
        lambda x, a, b: np.asarray(x.sum() / divisors.get(x.size, math.nan)),
        next(iter(divisors.values())),
    )


def _coefficients(spec: LossSpec, own: Reduction, answers: Sequence[Answer]) -> Iterator[Form]:
    """`p d^2 / beta` below and `|d| - q beta` above, with p and q solved for."""
    beta = spec.effective_beta
    if not 0 < beta < math.inf:
        return
    below, above = [], []
    for d, loss in _responses(spec, own, answers):
        if d < beta:
            below.append(loss * beta / (d * d))
        else:
            above.append(((d - loss) / beta, d))
    # The offset is best read off where |d| is smallest.
    offset = min(above, key=lambda pair: pair[1])[0] if above else 0.5
    for p in _rounder(float(np.median(below)) if below else 0.5):
        for q in _rounder(offset):

            def losses(a: Array, b: Array, beta: float, p: float = p, q: float = q) -> Array:
                d = a - b
                return np.where(np.abs(d) < beta, p * d * (d / beta), np.abs(d) - q * beta)

            why = f"the answers fit {p:.6g}*d^2/beta below beta and |d| - {q:.6g}*beta above it"
            yield Form(Fault.WRONG_COEFFICIENT, why, losses, p if abs(p - 0.5) > 1e-6 else q)
