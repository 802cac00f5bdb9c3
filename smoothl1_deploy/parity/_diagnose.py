"""`diagnose`: why a model is wrong. Probes are fed, and faults are tried on the answers.

1. Formula and reduction, on ordinary numbers: the simplest hypothesis that explains every answer.
2. The arithmetic, where the formula is right: a narrow format, accumulators that drift.
3. The gradient, where the model gives one.
4. Special values: NaN, infinities, zeros, nothing at all.

What no answer shows is not named. `<=` for `<` changes no value of the loss, nor of its slope:
both formulas give beta/2 at |d| = beta, and both slopes are 1. It shows where beta is 0 (0/0 at
d = 0) alone. Swapped inputs show in a gradient alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .._floats import CLASS_NAMES, Array, dtype_name, ieee_class, limits, round_to, wide_dtype
from .._records import grouped
from .._spec import LossSpec
from ..backends._runner import Runner
from ..reference._oracle import oracle_gradient
from ._bounds import UNIT_ROUNDOFF, accumulation_error
from ._cases import CaseResult
from ._drift import DriftPoint
from ._faults import ACCUMULATION, Diagnosis, Evidence, Fault
from ._fit import Hypothesis, find, narrower, right, weighted
from ._probes import Reply, Subject

_SHOWN = 3  # replies given as evidence

#: These leave the numbers of other probes their meaning; after another fault of the formula the
#: rest is noise.
_HARMLESS = {Fault.SHAPE, Fault.DTYPE, Fault.RANGE}
#: Families whose squares leave the range of a dtype.
_EXTREME = {"overflow", "subnormals", "boundary", "outliers"}


def diagnose(
    runner: Runner,
    spec: LossSpec,
    *,
    failures: Sequence[CaseResult] = (),
    drift: Sequence[DriftPoint] = (),
) -> tuple[Diagnosis, ...]:
    """The faults that explain what `runner` answers, the likeliest first.

    Args:
        runner: of the model in question.
        spec: what it ought to compute.
        failures: red cases, where there are any: that no fault was found for them is said.
        drift: the points of `artefact_drift`, for faults of accumulation.

    Returns:
        Nothing for a model that answers every probe rightly and has no red case.
    """
    known = "an array of betas has no probes"
    found: list[Diagnosis] = []
    if not spec.beta_shape:
        subject, known = Subject(runner, spec), "right on every probe"
        found = list(_formula(subject))
        if all(item.fault in _HARMLESS for item in found):
            found += [*_accumulation(spec, drift), *_gradient(subject), *_special(subject)]
    if failures and not found:
        families = ", ".join(dict.fromkeys(failure.case.family for failure in failures))
        fault = Fault.UNKNOWN
        why = f"{known}, but these cases are red, and nothing says why"
        if not spec.beta_shape and all(failure.case.family in _EXTREME for failure in failures):
            fault = Fault.RANGE
            why = "right on ordinary numbers, wrong where squares leave the range"
        found.append(Diagnosis(fault, f"{why}: {families}; first: {failures[0].verdict.detail}"))
    return tuple(found)


# --- evidence


def _evidence(reply: Reply, hypothesis: Hypothesis | None = None) -> Evidence:
    """The element that differs most from what is right."""
    expected, got, dtype = reply.expected, reply.got, reply.spec.dtype
    at = 0
    if got.shape == expected.shape and got.size:
        wide = wide_dtype(dtype)
        with np.errstate(invalid="ignore"):
            off = np.abs(got.astype(wide) - expected.astype(wide))
        at = int(np.argmax(np.where(np.isnan(off), np.inf, off)))
    truth = _number(expected, at)
    return Evidence(
        reply.text,
        math.nan if truth is None else truth,
        _number(got, at),
        None if hypothesis is None else _number(round_to(hypothesis.predict(reply), dtype), at),
    )


def _number(values: Array, at: int = 0) -> float | None:
    """An element; None where there is none."""
    return None if at >= values.size else float(values.flat[at])


def _clearest(replies: Sequence[Reply], hypothesis: Hypothesis) -> tuple[Evidence, ...]:
    """The answers furthest, in proportion, from what is right."""

    def distance(item: Evidence) -> float:
        if item.got is None or not math.isfinite(item.got):
            return math.inf
        return abs(item.got - item.expected) / max(abs(item.expected), abs(item.got), 1e-300)

    items = [_evidence(reply, hypothesis) for reply in replies]
    return tuple(sorted(items, key=distance, reverse=True)[:_SHOWN])


def _named(fault: Fault, why: str, replies: Sequence[Reply]) -> Diagnosis:
    """A fault of which the first replies are the evidence."""
    return Diagnosis(fault, why, tuple(map(_evidence, replies[:_SHOWN])))


# --- formula, reduction and format


def _formula(subject: Subject) -> Iterator[Diagnosis]:
    """What is wrong with formula, reduction or format; nothing where all three are right."""
    spec, replies = subject.spec, subject.ordinary
    if errors := [reply for reply in replies if reply.error]:
        what = f"{len(errors)} of {len(replies)} ordinary inputs gave an error: {errors[0].error}"
        yield _named(Fault.NO_ANSWER, what, errors)
        return
    if not replies:
        return
    yield from _form_of_result(replies)
    if spec.effective_beta == 0 and all(np.isnan(reply.got).all() for reply in replies):
        why = "every loss is NaN: a formula that divides by beta is used without a guard for 0"
        yield _named(Fault.ZERO_DIVISION, why, replies[:1])
        return
    lost = [reply for reply in replies if reply.overflowed]
    told = [reply for reply in replies if not reply.overflowed]
    found = find(spec, told) if len(told) > len(lost) else []
    if not found and not subject.any_rank:
        found = [each for each in [weighted(spec, subject.elementwise(), told)] if each]
    if found:
        best, *others = found
        names = dict.fromkeys(step.explanation for other in others for step in other.faults)
        also = f". These would explain the answers as well: {'; '.join(names)}" if names else ""
        for step in best.faults:
            why = f"{step.explanation} ({len(told)} of {len(told)} probes explained){also}"
            assert step.fault is not None
            yield Diagnosis(step.fault, why, _clearest(told, best), step.estimate)
        if lost:
            why = f"infinite in {len(lost)} of {len(replies)} probes, where the loss is finite"
            yield _named(Fault.RANGE, why, lost)
        return
    for dtype in narrower(spec.dtype):
        if all(_is_narrow(reply, dtype) for reply in replies):
            why = f"computed or added up in {dtype}: every answer is near the right one, and a "
            why += f"{dtype} number"
            wrong = [reply for reply in replies if not right(spec).explains(reply)]
            yield _named(Fault.NARROW_ARITHMETIC, why, wrong)
            return
    why = f"no known fault explains all {len(replies)} answers"
    yield Diagnosis(Fault.UNKNOWN, why, _clearest(replies, right(spec)))


def _form_of_result(replies: Sequence[Reply]) -> Iterator[Diagnosis]:
    """A wrong dtype, or else a wrong shape of the right numbers' count."""
    judged = all(reply.got.shape == reply.expected.shape for reply in replies)
    for reply in replies:
        got, expected = reply.got, reply.expected
        if got.dtype != expected.dtype:
            why = f"the result is {dtype_name(got.dtype)}, PyTorch's is {reply.spec.dtype}"
            yield _named(Fault.DTYPE, why, [reply])
            return
        if judged and reply.shape != expected.shape:
            why = (
                f"the result has the shape {reply.shape}, PyTorch's has {expected.shape}; "
                "the numbers are judged without regard to it"
            )
            yield _named(Fault.SHAPE, why, [reply])
            return


def _is_narrow(reply: Reply, dtype: str) -> bool:
    """Whether an answer is right to a narrower format's rounding, and has that format's few bits.

    A mean may be a sum in the narrow format, divided in the wide one.
    """
    if not right(reply.spec).explains(reply, UNIT_ROUNDOFF[dtype]):
        return False
    got = reply.got.astype(wide_dtype(reply.spec.dtype))
    count = reply.count // max(got.size, 1) if reply.spec.reduction == "mean" else 1
    narrow = (round_to(got * n, dtype).astype(got.dtype) / n for n in (1, count))
    return any(np.array_equal(values.astype(reply.got.dtype), reply.got) for values in narrow)


# --- sums of many elements


def _accumulation(spec: LossSpec, drift: Sequence[DriftPoint]) -> Iterator[Diagnosis]:
    """An error that grows with the number of elements: a sum in too narrow a format."""
    points = [point for point in drift if point.output == "loss"]
    red = sorted((p for p in points if not p.ok), key=lambda p: p.elements, reverse=True)
    if not red:
        return
    fewest, known = min(point.elements for point in points), ""
    if any(point.elements > fewest for point in points):
        # A formula is off by as much at every size; a sum by more and more, until it is all gone.
        # In ULP: a half format's own rounding is a large relative error, but never many of these.
        start = max(point.result.verdict.ulp for point in points if point.elements == fewest)
        is_lost = any(point.value == math.inf or (point.relative or 0.0) > 0.25 for point in red)
        if not is_lost and max(point.result.verdict.ulp for point in red) <= 4 * start:
            return
        first = red[-1].elements
        known = f"the error grows with the number of elements, red from {first:,} on: "
    for dtype in (spec.compute_dtype, *narrower(spec.compute_dtype)):
        if all(_can_be_of(spec, point, dtype) for point in points):
            worst = max(red, key=lambda point: (point.relative or 0.0, point.elements))
            error = "overflow" if worst.relative is None else f"{worst.relative:.1e}"
            why = (
                f"{known}{error} at {worst.elements:,} elements (PyTorch: "
                f"{worst.result.verdict.torch_ulp} ULP), which adding up in {dtype} explains; "
                "accumulate in float64, or compensate"
            )
            evidence = (
                Evidence(f"{p.elements:,} elements, family {p.family}", p.oracle, p.value)
                for p in red[:_SHOWN]
            )
            yield Diagnosis(ACCUMULATION[dtype], why, tuple(evidence), worst.relative)
            return


def _can_be_of(spec: LossSpec, point: DriftPoint, dtype: str) -> bool:
    """Whether a sum that is accumulated in `dtype` can be as far off as this one."""
    if point.relative is not None:
        limit = accumulation_error(dtype, point.elements) + 2 * UNIT_ROUNDOFF[spec.dtype]
        return point.relative <= limit
    if point.value is None or not math.isfinite(point.oracle):
        return point.ok
    total = point.oracle * (point.elements if spec.reduction == "mean" else 1)
    largest, *_ = limits(dtype)
    return point.value == math.inf and total > largest


# --- the gradient


#: What may be made of a gradient, and of the number of elements that a mean is over.
_GRADIENTS: tuple[tuple[Fault, str, Callable[[Array, int], Array]], ...] = (
    (Fault.SWAPPED_INPUTS, "every gradient has the opposite sign: it is d loss / d target",
     lambda exact, count: -exact),
    (Fault.GRADIENT_SCALE,
     "the gradient is not divided by the number of elements, as the mean's is",
     lambda exact, count: exact * count),
    (Fault.GRADIENT_SCALE,
     "the gradient is divided by the number of elements, which only the mean's is",
     lambda exact, count: exact / count),
    (Fault.WRONG_GRADIENT,
     "the gradient is not clip(d, -beta, beta) / beta, and no known fault explains it",
     lambda exact, count: exact),
)  # fmt: skip


def _gradient(subject: Subject) -> Iterator[Diagnosis]:
    """What is wrong with the output `grad_input`, by the probes that don't broadcast."""
    if not subject.has_gradient:
        return
    spec, wide = subject.spec, wide_dtype(subject.spec.dtype)
    asked: list[tuple[Reply, Array, Array]] = []
    for reply in subject.ordinary:
        input, target = reply.arrays[:2]
        got = reply.gradient
        if got is not None and input.shape == target.shape == got.shape:
            given = dict(zip(spec.operands, reply.arrays, strict=True))
            exact = oracle_gradient(spec, **given).astype(wide)
            asked.append((reply, got.astype(wide), exact))

    def holds(change: Callable[[Array, int], Array]) -> bool:
        tolerance = 16 * UNIT_ROUNDOFF[spec.dtype]
        pairs = [(got, change(exact, spec.count(exact.shape))) for _, got, exact in asked]
        return all((np.abs(got - it) <= tolerance * np.abs(it)).all() for got, it in pairs)

    *known, unknown = _GRADIENTS
    if holds(unknown[2]):
        return
    reply, got, exact = asked[0]
    first, truth = float(got.flat[0]), float(exact.flat[0])
    evidence = (Evidence(f"grad_input, {reply.text}", truth, first),)
    fault, why, _ = next((each for each in known if holds(each[2])), unknown)
    ratio = first / truth if fault is Fault.GRADIENT_SCALE else None
    yield Diagnosis(fault, why, evidence, ratio)


# --- special values


def _special(subject: Subject) -> Iterator[Diagnosis]:
    """What is wrong with NaN, infinities, zeros and nothing at all."""
    wrong = grouped(
        (reply.kind, reply)
        for reply in subject.special()
        if reply.error or not np.array_equal(ieee_class(reply.got), ieee_class(reply.expected))
    )
    of_infinities = wrong.pop("inf-inf", [])
    if of_infinities and "nan" not in wrong:  # where any NaN is lost, theirs goes the same way
        wrong.setdefault("inf", []).extend(of_infinities)
    for replies in wrong.values():
        fault, why = _special_fault(replies[0])
        error = f" ({replies[0].error})" if replies[0].error else ""
        yield _named(fault, why + error, replies)


def _special_fault(reply: Reply) -> tuple[Fault, str]:
    """Which fault a wrong answer to a special probe shows, and why."""
    style = "{:g}" if reply.kind == "empty" else None
    said = "an error" if reply.error else _in_words(reply.got, style)
    truth = _in_words(reply.expected, style)
    if reply.kind == "empty":
        reduction = reply.spec.reduction
        is_mean = reduction == "mean" and not reply.error
        why = f"the {reduction} of no elements is {said} where PyTorch gives {truth}"
        return Fault.EMPTY_MEAN if is_mean else Fault.EMPTY, why
    why = f"{reply.text} gives {said} where PyTorch gives {truth}"
    if reply.kind == "nan":
        return Fault.NAN_SWALLOWED, why
    if reply.kind == "inf":
        return Fault.INFINITE_INPUT, why
    if np.isnan(reply.got).any():
        why = (
            "d = 0 gives NaN, and no other difference does: with beta = 0, |d| <= beta lets d = 0 "
            "into the quadratic part, which is 0/0; |d| < beta does not"
        )
        return Fault.LESS_OR_EQUAL, why
    if least := _number(reply.got):  # smaller than the probes of the formula see
        why = f"d = 0 gives {least:.3g}, as where |d| is sqrt(d^2 + e) with a tiny e; use Abs"
        return Fault.SMOOTH_ABS, why
    return Fault.NEGATIVE_ZERO, why


def _in_words(values: Array, style: str | None = None) -> str:
    """The first number, or its IEEE class."""
    if not values.size:
        return "nothing"
    first = values.reshape(-1)[:1]
    return style.format(float(first[0])) if style else CLASS_NAMES[int(ieee_class(first)[0])]
