"""Which formula and reduction explain all the answers of a model.

A hypothesis holds when every answer is within the rounding that any sane order of evaluation
can make: (8 + n) u relative for n elements, u the unit roundoff of the format it is computed in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .._floats import Array, round_to, wide_dtype
from .._spec import LossSpec
from ._bounds import UNIT_ROUNDOFF
from ._faults import FITS, FORMS, Fault, Step, reductions, smooth_l1
from ._probes import Reply

_FLAT = 0.01  # relative: more than this is never a matter of rounding, but for bfloat16
#: From the roundest numbers to all digits that a float64 has: people choose round numbers.
_DIGITS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 17)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A formula with a reduction."""

    form: Step
    reduction: Step

    @property
    def faults(self) -> list[Step]:
        """What of it is not what the spec asks for."""
        return [step for step in (self.form, self.reduction) if step.fault is not None]

    def predict(self, reply: Reply) -> Array:
        """What a model of this kind answers to a probe, wide."""
        if not self.faults:  # the oracle knows every spec there is
            return reply.expected.astype(wide_dtype(reply.spec.dtype))
        input, target, *_ = (array.shape for array in reply.arrays)
        with np.errstate(all="ignore"):
            losses = self.form.compute(*reply.pair, reply.spec.effective_beta) * _unit(reply.spec)
            return np.asarray(self.reduction.compute(losses, input, target))

    def explains(self, reply: Reply, unit: float | None = None) -> bool:
        """Whether the answer is what is predicted, to rounding with this unit roundoff."""
        predicted = self.predict(reply)
        if predicted.shape not in (reply.got.shape, reply.shape):
            return False
        got = reply.got.astype(predicted.dtype).reshape(predicted.shape)
        rounded = round_to(predicted, reply.spec.dtype).astype(predicted.dtype)
        unit = UNIT_ROUNDOFF[reply.spec.dtype] if unit is None else unit
        tolerance = min((8 + reply.count) * unit, max(8 * unit, _FLAT))
        # Where a wrong formula gives the right number, as some do at one beta, a model that is off
        # is no model of it.
        is_right = np.array_equal(rounded, reply.expected.astype(predicted.dtype))
        with np.errstate(invalid="ignore"):
            scale = np.abs(predicted) + (0.0 if is_right else self._subtracted(reply))
            close = np.abs(got - predicted) <= tolerance * scale
        same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
        return bool(np.all(close | same))

    def explains_all(self, replies: Sequence[Reply]) -> bool:
        """Whether it explains each; one at least by more than being near what may cancel."""
        return all(map(self.explains, replies)) and any(
            self._subtracted(reply) <= 4 * np.abs(self.predict(reply)).min() for reply in replies
        )

    def _subtracted(self, reply: Reply) -> float:
        """The size of the numbers that the formula subtracts where they may be nearly equal."""
        if self.form.cancels is None:
            return 0.0
        return self.form.cancels(float(np.abs(np.subtract(*reply.pair)).max()))


def _unit(spec: LossSpec) -> float:
    """What Smooth L1, which the formulas are of, is multiplied by to be the loss of the spec."""
    return spec.loss_weight * (spec.effective_beta if spec.loss == "huber" else 1.0)


def right(spec: LossSpec) -> Hypothesis:
    """Nothing wrong."""
    return Hypothesis(FORMS[0], reductions(spec)[0])


def find(spec: LossSpec, replies: Sequence[Reply]) -> list[Hypothesis]:
    """Every hypothesis of the simplest kind that explains all replies, the likeliest first.

    Kinds, from the simplest: nothing wrong; one named fault; one with a number of its own (beta,
    a coefficient, a count); a wrong formula with a wrong reduction.
    """
    for forms, summed in _kinds(spec, replies) if replies else ():
        found: list[Hypothesis] = []
        for hypothesis in (Hypothesis(form, reduction) for reduction in summed for form in forms):
            if hypothesis.explains_all(replies):
                found.append(hypothesis)
                if any(step.estimate is not None for step in hypothesis.faults):
                    break  # the roundest number that fits; the others differ by rounding
        if found:
            return found
    return []


def _kinds(
    spec: LossSpec, replies: Sequence[Reply]
) -> Iterator[tuple[Iterable[Step], Iterable[Step]]]:
    """Formulas and reductions, each of the one to be tried with each of the other."""
    own, *others = reductions(spec)
    form, *wrong = FORMS if spec.loss == "smooth_l1" else FORMS[:1]
    yield [form], [own]
    yield wrong, [own]
    yield [form], others
    yield _narrowed(spec), [own]
    yield _fitted(spec, own, replies), [own]
    yield [form], _scaled(own, replies)
    yield wrong, others
    for other in others:
        yield _fitted(spec, other, replies), [other]


def weighted(
    spec: LossSpec, elementwise: Sequence[Reply], replies: Sequence[Reply]
) -> Hypothesis | None:
    """The right losses, each element of a row times a factor that its own reply tells."""
    found = [float(reply.got.sum() / reply.expected.sum()) for reply in elementwise]
    if any(reply.error for reply in elementwise) or not np.isfinite(found).all():
        return None
    for digits in (3, 6, 17):  # a mask is of ones and zeros
        factors = np.array([_rounded(factor, digits) for factor in found])

        def losses(a: Array, b: Array, beta: float, factors: Array = factors) -> Array:
            return (smooth_l1(a, b, beta).reshape(-1, len(factors)) * factors).reshape(a.shape)

        listed = ", ".join(f"{factor:.6g}" for factor in factors[:8])
        more = ", ..." if len(factors) > 8 else ""
        why = (
            f"the elements of a row count {listed}{more} times each; give these factors as "
            "weights, which a spec with the weight 'count' takes"
        )
        hypothesis = Hypothesis(Step(Fault.WEIGHTED, why, losses), reductions(spec)[0])
        if len(set(factors)) > 1 and hypothesis.explains_all(replies):
            return hypothesis
    return None


def narrower(dtype: str) -> list[str]:
    """Formats with a larger unit roundoff, the nearest first."""
    by_unit = sorted(UNIT_ROUNDOFF, key=UNIT_ROUNDOFF.__getitem__)
    return [other for other in by_unit if UNIT_ROUNDOFF[other] > UNIT_ROUNDOFF[dtype]]


def _narrowed(spec: LossSpec) -> Iterator[Step]:
    """beta, or the inputs, in a narrower format."""
    if spec.dtype == "float64" and (beta := float(np.float32(spec.knee))) != spec.knee:
        why = f"beta is rounded to float32 ({beta!r} for {spec.knee!r})"
        yield Step(Fault.WRONG_BETA, why, lambda a, b, _: smooth_l1(a, b, beta), beta)
    for dtype in narrower(spec.dtype):

        def losses(a: Array, b: Array, beta: float, dtype: str = dtype) -> Array:
            a, b = (round_to(x, dtype).astype(x.dtype) for x in (a, b))
            return smooth_l1(a, b, beta)

        why = f"input and target are rounded to {dtype} before the loss is computed"
        yield Step(Fault.NARROW_INPUT, why, losses)


# --- numbers that are read off the answers


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits - 1}e}")


def _fitted(spec: LossSpec, reduction: Step, replies: Sequence[Reply]) -> Iterator[Step]:
    """Every formula with a number, at the numbers that single replies suggest, roundest first."""
    told = []  # (|d|, loss of one element), both > 0
    for reply in replies:
        if reply.kind == "constant" and reply.got.size:
            input, target = reply.pair
            shapes = (array.shape for array in reply.arrays[:2])
            units = np.full(input.shape, _unit(spec))
            weight = float(np.asarray(reduction.compute(units, *shapes)).flat[0])
            d, loss = abs(float(input.flat[0] - target.flat[0])), float(reply.got.flat[0]) / weight
            if d > 0 < loss < math.inf:
                told.append((d, loss))
    fits = FITS if spec.loss == "smooth_l1" else ()
    beta = spec.effective_beta
    solved = [([solve(d, loss, beta) for d, loss in told], form) for solve, form in fits]
    for digits in _DIGITS:
        for numbers, form in solved:
            useful = (_rounded(number, digits) for number in numbers if 0 < number < math.inf)
            yield from (form(number, spec) for number in dict.fromkeys(useful))


def _scaled(own: Step, replies: Sequence[Reply]) -> Iterator[Step]:
    """The right loss times a factor, which the first answer tells, roundest first."""
    if not replies[0].got.size:
        return
    ratio = float(replies[0].got.flat[0]) / float(replies[0].expected.flat[0])
    for factor in dict.fromkeys(_rounded(ratio, digits) for digits in _DIGITS):
        yield Step(
            Fault.SCALED,
            f"every answer is {factor:.9g} times the right one",
            lambda x, a, b, f=factor: np.asarray(own.compute(x, a, b) * f),
            factor,
        )
