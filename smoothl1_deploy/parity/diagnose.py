"""`diagnose`: why a model is wrong. Probes are fed, and faults are tried on the answers.

1. Formula and reduction, on ordinary numbers: the simplest hypothesis that explains every answer.
2. The arithmetic, where the formula is right: narrow formats, accumulators that drift.
3. The gradient, where the model gives one.
4. Special values: NaN, infinities, zeros, |d| exactly beta, nothing at all.

What no answer shows is not named. `<=` for `<` changes no value of the loss, nor of its slope:
both formulas give beta/2 at |d| = beta, and both slopes are 1. It shows where beta is 0 (0/0 at
d = 0) and where beta^2 over- or underflows; elsewhere `faults.comparison` reads it off the graph.
Swapped inputs show in a gradient alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from ..backends.base import Runner
from ..floats import dtype_name
from ..spec import LossSpec
from .artefact_drift import DriftPoint
from .cases import CaseResult
from .faults.arithmetic import accumulation, accumulation_of_cases, narrow_format
from .faults.evidence import SHOWN, clearest, evidence_of
from .faults.fit import Hypothesis, find, nearest, right, weighted
from .faults.names import ACCUMULATION, Diagnosis, Fault
from .faults.probes import Answer, ask_all, formula_probes, place_probes
from .faults.symptoms import gradient_output, special_values
from .shapes import ShapePlan

__all__ = ["diagnose"]

#: These say nothing about the numbers; after any other fault of the formula, but one of range,
#: the rest is noise.
_HARMLESS = {Fault.SHAPE, Fault.DTYPE}


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
        failures: red cases, where there are any: what no fault accounts for is said.
        drift: the points of `artefact_drift`, for faults of accumulation.

    Returns:
        Nothing for a model that answers every probe rightly and has no red case.
    """
    plan = ShapePlan.of(runner.signature)
    found = list(_formula(runner, spec, plan))
    if all(item.fault in {*_HARMLESS, Fault.RANGE} for item in found):
        found += accumulation(spec, drift)
        found += gradient_output(runner, spec, plan)
        found += special_values(runner, spec, plan)
        found += _rest(spec, found, failures)
    return tuple(found)


def _formula(runner: Runner, spec: LossSpec, plan: ShapePlan) -> Iterator[Diagnosis]:
    """Formula, reduction and format; nothing where all three are right."""
    any_rank = runner.signature.input.shape is None
    answers = ask_all(runner, spec, formula_probes(spec, plan, any_rank))
    errors = [answer for answer in answers if answer.got is None]
    if errors:
        what = f"{len(errors)} of {len(answers)} ordinary inputs gave an error: {errors[0].error}"
        yield Diagnosis(Fault.NO_ANSWER, what, tuple(evidence_of(spec, a) for a in errors[:SHOWN]))
        return
    if not answers:
        return
    yield from _form_of_result(spec, answers)
    if spec.effective_beta == 0 and all(
        a.got is not None and np.isnan(a.got).all() for a in answers
    ):
        why = "every loss is NaN: a formula that divides by beta is used without a guard for 0"
        yield Diagnosis(Fault.ZERO_DIVISION, why, (evidence_of(spec, answers[0]),))
        return
    lost = [answer for answer in answers if answer.overflowed]
    told = [answer for answer in answers if not answer.overflowed]
    found = find(spec, told) if len(told) > len(lost) else []
    if not found and not any_rank:
        places = ask_all(runner, spec, place_probes(spec, plan))
        found = [each for each in [weighted(spec, places, told)] if each]
    if found:
        yield from _named(spec, found, told)
        if lost:
            why = f"infinite in {len(lost)} of {len(answers)} probes, where the loss is finite"
            yield Diagnosis(Fault.RANGE, why, tuple(evidence_of(spec, a) for a in lost[:SHOWN]))
        return
    narrow = narrow_format(runner, spec, plan, answers)
    if narrow is not None:
        yield narrow
        return
    closest, count = nearest(spec, answers)
    fault = closest.form.fault or closest.reduction.fault
    name = f"'{fault.value}'" if fault else "a right formula"
    yield Diagnosis(
        Fault.UNKNOWN,
        f"no known fault explains all {len(answers)} answers; the nearest, {name}, explains "
        f"{count}",
        clearest(spec, answers, right(spec)),
    )


def _form_of_result(spec: LossSpec, answers: Sequence[Answer]) -> Iterator[Diagnosis]:
    for answer in answers:
        if answer.got is None:
            continue
        if answer.got.dtype != answer.expected.dtype:
            got = dtype_name(answer.got.dtype)
            yield Diagnosis(
                Fault.DTYPE,
                f"the result is {got}, PyTorch's is {spec.dtype}",
                (evidence_of(spec, answer),),
            )
            return
        if answer.shape != answer.expected.shape and answer.got.shape == answer.expected.shape:
            yield Diagnosis(
                Fault.SHAPE,
                f"the result has the shape {answer.shape}, PyTorch's has {answer.expected.shape}; "
                "the numbers are judged without regard to it",
                (evidence_of(spec, answer),),
            )
            return


def _named(
    spec: LossSpec, found: Sequence[Hypothesis], answers: Sequence[Answer]
) -> Iterator[Diagnosis]:
    best, *others = found
    names = dict.fromkeys(
        part.explanation
        for other in others
        for part in (other.form, other.reduction)
        if part.fault is not None
    )
    also = f". These would explain the answers as well: {'; '.join(names)}" if names else ""
    evidence = clearest(spec, answers, best)
    for part in (best.form, best.reduction):
        if part.fault is not None:
            text = f"{part.explanation} ({len(answers)} of {len(answers)} probes explained){also}"
            yield Diagnosis(part.fault, text, evidence, part.estimate)


#: Which red cases a fault accounts for; one that is not here accounts for all.
_FAMILIES = {
    Fault.NAN_SWALLOWED: {"nan", "inf-minus-inf"},
    Fault.INFINITE_INPUT: {"inf", "inf-minus-inf", "overflow"},
    Fault.NEGATIVE_ZERO: {"zeros"},
    Fault.RANGE: {"overflow", "subnormals", "boundary", "outliers"},
}


def _accounts(fault: Fault, case: CaseResult) -> bool:
    if fault in _HARMLESS:
        return True
    empty = math.prod(case.case.input_shape) == 0 or math.prod(case.case.target_shape) == 0
    about_nothing = fault in (Fault.EMPTY, Fault.EMPTY_MEAN)
    if about_nothing or empty:
        return about_nothing and empty
    if fault is Fault.LESS_OR_EQUAL:
        return case.verdict.wrong_class > 0
    if fault in ACCUMULATION.values():
        return not case.verdict.wrong_class or math.prod(case.case.input_shape) > 1 << 10
    return case.case.family in _FAMILIES.get(fault, {case.case.family})


def _rest(
    spec: LossSpec, found: Sequence[Diagnosis], failures: Sequence[CaseResult]
) -> Iterator[Diagnosis]:
    """What stays red after every fault that was found."""
    left = [c for c in failures if not any(_accounts(item.fault, c) for item in found)]
    if not left:
        return
    summed = accumulation_of_cases(spec, left)
    if summed is not None:
        yield summed
        return
    fault, text = (
        Fault.UNKNOWN,
        "right on every probe, but these cases are red, and nothing says why",
    )
    if all(_accounts(Fault.RANGE, case) for case in left):
        fault, text = Fault.RANGE, "right on ordinary numbers, wrong where squares leave the range"
    families = ", ".join(dict.fromkeys(case.case.family for case in left))
    yield Diagnosis(fault, f"{text}: {families}; first: {left[0].verdict.detail}")
