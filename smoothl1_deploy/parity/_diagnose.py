"""`diagnose`: why a model is wrong. Probes are fed, and faults are tried on the answers.

1. Formula and reduction, on ordinary numbers: the simplest hypothesis that explains every answer.
2. The arithmetic, where the formula is right: narrow formats, accumulators that drift.
3. The gradient, where the model gives one.
4. Special values: NaN, infinities, zeros, |d| exactly beta, nothing at all.

What no answer shows is not named. `<=` for `<` changes no value of the loss, nor of its slope:
both formulas give beta/2 at |d| = beta, and both slopes are 1. It shows where beta is 0 (0/0 at
d = 0) alone; elsewhere `choice_at_beta` reads it off the graph. Swapped inputs show in a gradient
alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import ml_dtypes
import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from .._artefact import Signature
from .._floats import CLASS_NAMES, NUMPY_DTYPE, Array, dtype_name, ieee_class, round_to, wide_dtype
from .._model import inlined
from .._spec import LossSpec
from ..backends._runner import Runner
from ..reference._oracle import oracle_gradient
from ._bounds import UNIT_ROUNDOFF, accumulation_error
from ._cases import CaseResult
from ._drift import DriftPoint
from ._faults import ACCUMULATION, Diagnosis, Evidence, Fault
from ._fit import Hypothesis, explains, find, narrower, predict, right, weighted
from ._probes import Answer, Subject
from ._shapes import ShapePlan, elements

_SHOWN = 3  # answers given as evidence

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
    subject = Subject(runner, spec)
    found = list(_formula(subject))
    if all(item.fault in {*_HARMLESS, Fault.RANGE} for item in found):
        found += _drift(spec, drift)
        found += _gradient(subject)
        found += _special(subject)
        found += _rest(spec, found, failures)
    return tuple(found)


# --- evidence


def evidence_of(answer: Answer, hypothesis: Hypothesis | None = None) -> Evidence:
    """The element that differs most from what is right."""
    expected, got, dtype = answer.expected, answer.got, answer.spec.dtype
    explained = None if hypothesis is None else round_to(predict(hypothesis, answer), dtype)
    at = 0
    if got is not None and got.shape == expected.shape and got.size:
        wide = wide_dtype(dtype)
        with np.errstate(invalid="ignore"):
            off = np.abs(got.astype(wide) - expected.astype(wide))
        at = int(np.argmax(np.where(np.isnan(off), np.inf, off)))
    truth = _number(expected, at)
    return Evidence(
        answer.probe.text,
        math.nan if truth is None else truth,
        _number(got, at),
        _number(explained, at),
    )


def _number(values: Array | None, at: int = 0) -> float | None:
    """An element; None where there is none."""
    return None if values is None or at >= values.size else float(values.flat[at])


def _clearest(answers: Sequence[Answer], hypothesis: Hypothesis) -> tuple[Evidence, ...]:
    """The answers furthest, in proportion, from what is right."""

    def distance(item: Evidence) -> float:
        if item.got is None or not math.isfinite(item.got):
            return math.inf
        return abs(item.got - item.expected) / max(abs(item.expected), abs(item.got), 1e-300)

    items = [evidence_of(answer, hypothesis) for answer in answers]
    return tuple(sorted(items, key=distance, reverse=True)[:_SHOWN])


def _named(fault: Fault, why: str, answers: Sequence[Answer]) -> Diagnosis:
    """A fault of which the first answers are the evidence."""
    return Diagnosis(fault, why, tuple(map(evidence_of, answers[:_SHOWN])))


# --- formula, reduction and format


def _formula(subject: Subject) -> Iterator[Diagnosis]:
    """What is wrong with them; nothing where all three are right."""
    spec = subject.spec
    answers = subject.ordinary
    errors = [answer for answer in answers if answer.got is None]
    if errors:
        what = f"{len(errors)} of {len(answers)} ordinary inputs gave an error: {errors[0].error}"
        yield _named(Fault.NO_ANSWER, what, errors)
        return
    if not answers:
        return
    yield from _form_of_result(answers)
    if spec.effective_beta == 0 and all(
        a.got is not None and np.isnan(a.got).all() for a in answers
    ):
        why = "every loss is NaN: a formula that divides by beta is used without a guard for 0"
        yield _named(Fault.ZERO_DIVISION, why, answers[:1])
        return
    lost = [answer for answer in answers if answer.overflowed]
    told = [answer for answer in answers if not answer.overflowed]
    found = find(spec, told) if len(told) > len(lost) else []
    if not found and not subject.any_rank:
        found = [each for each in [weighted(spec, subject.places(), told)] if each]
    if found:
        yield from _explained(found, told)
        if lost:
            why = f"infinite in {len(lost)} of {len(answers)} probes, where the loss is finite"
            yield _named(Fault.RANGE, why, lost)
        return
    narrow = _narrow_format(subject, answers)
    if narrow is not None:
        yield narrow
        return
    why = f"no known fault explains all {len(answers)} answers"
    yield Diagnosis(Fault.UNKNOWN, why, _clearest(answers, right(spec)))


def _form_of_result(answers: Sequence[Answer]) -> Iterator[Diagnosis]:
    """A wrong dtype, or else a wrong shape."""
    for answer in answers:
        got, expected = answer.got, answer.expected
        assert got is not None
        if got.dtype != expected.dtype:
            why = f"the result is {dtype_name(got.dtype)}, PyTorch's is {answer.spec.dtype}"
            yield _named(Fault.DTYPE, why, [answer])
            return
        if answer.shape != expected.shape and got.shape == expected.shape:
            why = (
                f"the result has the shape {answer.shape}, PyTorch's has {expected.shape}; "
                "the numbers are judged without regard to it"
            )
            yield _named(Fault.SHAPE, why, [answer])
            return


def _explained(found: Sequence[Hypothesis], answers: Sequence[Answer]) -> Iterator[Diagnosis]:
    """The faults of the best hypothesis; the others are mentioned."""
    best, *others = found
    names = dict.fromkeys(part.explanation for other in others for part in other.faults)
    also = f". These would explain the answers as well: {'; '.join(names)}" if names else ""
    evidence = _clearest(answers, best)
    for part in best.faults:
        text = f"{part.explanation} ({len(answers)} of {len(answers)} probes explained){also}"
        assert part.fault is not None
        yield Diagnosis(part.fault, text, evidence, part.estimate)


def _narrow_format(subject: Subject, answers: Sequence[Answer]) -> Diagnosis | None:
    """The right formula in a narrower format: near the truth, and with its few bits."""
    spec = subject.spec
    for dtype in narrower(spec.dtype):
        unit = UNIT_ROUNDOFF[dtype]
        if not all(explains(right(spec), answer, unit) for answer in answers):
            continue
        if not all(_has_few_bits(answer, dtype) for answer in answers):
            continue
        wrong = [answer for answer in answers if not explains(right(spec), answer)][:_SHOWN]
        why = f"every answer is a {dtype} number, near the right one"
        probed = subject.narrow(round(-math.log2(unit))) if spec.reduction != "none" else []
        if any(explains(right(spec), answer, unit) for answer in probed):
            why = f"the elements are right, but they are added up in {dtype}: {why}"
            evidence = tuple(map(evidence_of, (*wrong, *probed)))
            return Diagnosis(ACCUMULATION[dtype], why, evidence)
        return _named(Fault.NARROW_ARITHMETIC, f"computed in {dtype}: {why}", wrong)
    return None


def _has_few_bits(answer: Answer, dtype: str) -> bool:
    """Whether every number of the answer, or it times the count, is one of a narrower format."""
    if answer.got is None:
        return False
    got = answer.got.astype(wide_dtype(answer.spec.dtype))
    if np.array_equal(round_to(got, dtype).astype(got.dtype), got):
        return True
    # A sum in the narrow format, divided in the wide one.
    count = answer.count // max(got.size, 1)
    mean = round_to(got * count, dtype).astype(got.dtype) / count
    is_same = np.array_equal(mean.astype(answer.got.dtype), answer.got)
    return answer.spec.reduction == "mean" and is_same


# --- sums of many elements


def _relative(value: float | None, truth: float) -> float | None:
    """An error; None where there is none to be told."""
    if value is None or not (math.isfinite(value) and math.isfinite(truth)) or truth == 0:
        return None
    return abs(value - truth) / abs(truth)


def _is_of(spec: LossSpec, point: DriftPoint, dtype: str) -> bool:
    """Whether a sum that is accumulated in `dtype` can be as far off as this one."""
    if point.relative is not None:
        limit = accumulation_error(dtype, point.elements) + 2 * UNIT_ROUNDOFF[spec.dtype]
        return point.relative <= limit
    if point.value is None or not math.isfinite(point.oracle):
        return point.ok
    total = point.oracle * (point.elements if spec.reduction == "mean" else 1)
    largest = float(ml_dtypes.finfo(NUMPY_DTYPE[dtype]).max)  # type: ignore[no-untyped-call]
    return point.value == math.inf and total > largest


def _accumulation(
    spec: LossSpec, points: Sequence[DriftPoint], formats: Sequence[str], known: str
) -> Iterator[Diagnosis]:
    """The first of the formats that explains how far off all the sums are, if one does."""
    red = sorted((point for point in points if not point.ok), key=lambda point: -point.elements)
    for dtype in formats if red else ():
        if all(_is_of(spec, point, dtype) for point in points):
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


def _drift(spec: LossSpec, points: Sequence[DriftPoint]) -> Iterator[Diagnosis]:
    """An error that grows with the number of elements: a sum in too narrow a format."""
    points = [point for point in points if point.output == "loss"]
    red = [point for point in points if not point.ok]
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
        first = min(point.elements for point in red)
        known = f"the error grows with the number of elements, red from {first:,} on: "
    formats = [spec.compute_dtype, *narrower(spec.compute_dtype)]
    yield from _accumulation(spec, points, formats, known)


def _sums_of(spec: LossSpec, cases: Sequence[CaseResult]) -> list[DriftPoint]:
    """Red cases as points of a drift; nothing where one of them is something else."""
    points = []
    for case in cases:
        sample = case.sample
        if spec.reduction == "none" or sample is None or sample.output != "loss" or not sample.got:
            return []
        got, exact = float(sample.got), float(sample.oracle)
        error = _relative(got, exact)
        points.append(DriftPoint(sample.behind, case, sample.output, got, exact, error, None, None))
    return points


# --- the gradient


#: What may be made of a gradient.
_GRADIENTS: tuple[tuple[Fault, str, Callable[[Array], Array]], ...] = (
    (Fault.SWAPPED_INPUTS, "every gradient has the opposite sign: it is d loss / d target",
     lambda exact: -exact),
    (Fault.GRADIENT_SCALE,
     "the gradient is not divided by the number of elements, as the mean's is",
     lambda exact: exact * exact.size),
    (Fault.GRADIENT_SCALE,
     "the gradient is divided by the number of elements, which only the mean's is",
     lambda exact: exact / exact.size),
    (Fault.WRONG_GRADIENT,
     "the gradient is not clip(d, -beta, beta) / beta, and no known fault explains it", np.copy),
)  # fmt: skip


def _gradient(subject: Subject) -> Iterator[Diagnosis]:
    """What is wrong with the output `grad_input`, by the probes that don't broadcast."""
    if not subject.has_gradient:
        return
    spec, wide = subject.spec, wide_dtype(subject.spec.dtype)
    asked: list[tuple[Answer, Array, Array]] = []
    for answer in subject.ordinary:
        input, target, *weights = answer.probe.arrays
        got = answer.gradient
        if got is not None and input.shape == target.shape == got.shape:
            exact = oracle_gradient(spec, input, target, *weights).astype(wide)
            asked.append((answer, got.astype(wide), exact))

    def holds(change: Callable[[Array], Array]) -> bool:
        tolerance = 16 * UNIT_ROUNDOFF[spec.dtype]
        pairs = [(got, change(exact)) for _, got, exact in asked]
        return all((np.abs(got - it) <= tolerance * np.abs(it)).all() for got, it in pairs)

    if holds(np.copy):
        return
    answer, got, exact = asked[0]
    first, truth = float(got.flat[0]), float(exact.flat[0])
    evidence = (Evidence(f"grad_input, {answer.probe.text}", truth, first),)
    *known, unknown = _GRADIENTS
    fault, why, _ = next((each for each in known if holds(each[2])), unknown)
    ratio = first / truth if fault is Fault.GRADIENT_SCALE else None
    yield Diagnosis(fault, why, evidence, ratio)


# --- special values


def _special(subject: Subject) -> Iterator[Diagnosis]:
    """NaN, infinities, zeros and nothing at all."""
    wrong: dict[str, list[Answer]] = {}
    for answer in subject.special():
        got, expected = answer.got, answer.expected
        if got is None or not np.array_equal(ieee_class(got), ieee_class(expected)):
            wrong.setdefault(answer.probe.kind, []).append(answer)
    if "nan" in wrong:
        wrong.pop("inf-inf", None)  # its NaN goes the same way
    elif "inf-inf" in wrong:
        wrong.setdefault("inf", []).extend(wrong.pop("inf-inf"))
    for answers in wrong.values():
        fault, why = _special_fault(answers[0])
        error = f" ({answers[0].error})" if answers[0].error else ""
        yield _named(fault, why + error, answers)


def _special_fault(answer: Answer) -> tuple[Fault, str]:
    """Which fault a wrong answer to a special probe shows, and why."""
    spec, got, text = answer.spec, answer.got, answer.probe.text
    if answer.probe.kind == "empty":
        mean = spec.reduction == "mean" and got is not None
        said, truth = _in_words(got, "{:g}"), _in_words(answer.expected, "{:g}")
        why = f"the {spec.reduction} of no elements is {said} where PyTorch gives {truth}"
        return Fault.EMPTY_MEAN if mean else Fault.EMPTY, why
    why = f"{text} gives {_in_words(got)} where PyTorch gives {_in_words(answer.expected)}"
    if answer.probe.kind == "nan":
        return Fault.NAN_SWALLOWED, why
    if answer.probe.kind == "inf":
        return Fault.INFINITE_INPUT, why
    if got is not None and np.isnan(got).any():
        why = (
            "d = 0 gives NaN, and no other difference does: with beta = 0, |d| <= beta lets d = 0 "
            "into the quadratic part, which is 0/0; |d| < beta does not"
        )
        return Fault.LESS_OR_EQUAL, why
    if least := _number(got):  # smaller than the probes of the formula see
        why = f"d = 0 gives {least:.3g}, as where |d| is sqrt(d^2 + e) with a tiny e; use Abs"
        return Fault.SMOOTH_ABS, why
    return Fault.NEGATIVE_ZERO, why


def _in_words(values: Array | None, style: str | None = None) -> str:
    """The first number, or its IEEE class."""
    if values is None:
        return "an error"
    if not values.size:
        return "nothing"
    first = values.reshape(-1)[:1]
    return style.format(float(first[0])) if style else CLASS_NAMES[int(ieee_class(first)[0])]


# --- what stays red


#: Families whose squares leave the range of a dtype.
_EXTREME = {"overflow", "subnormals", "boundary", "outliers"}
#: The families in which faults show that ordinary numbers don't have; other faults account for all
#: that is red.
_FAMILIES = {
    Fault.NAN_SWALLOWED: {"nan", "inf-minus-inf"},
    Fault.INFINITE_INPUT: {"inf", "inf-minus-inf", "overflow"},
    Fault.NEGATIVE_ZERO: {"zeros"},
    Fault.RANGE: _EXTREME,
}


def _accounts(fault: Fault, case: CaseResult) -> bool:
    """Whether a case is red for this fault."""
    is_empty = 0 in (*case.case.input_shape, *case.case.target_shape)
    if is_empty or fault in (Fault.EMPTY, Fault.EMPTY_MEAN):
        return is_empty and fault in (*_HARMLESS, Fault.EMPTY, Fault.EMPTY_MEAN)
    if fault is Fault.LESS_OR_EQUAL:
        return case.verdict.wrong_class > 0
    return case.case.family in _FAMILIES.get(fault, {case.case.family})


def _rest(
    spec: LossSpec, found: Sequence[Diagnosis], failures: Sequence[CaseResult]
) -> Iterator[Diagnosis]:
    """What stays red after every fault that was found."""
    left = [c for c in failures if not any(_accounts(item.fault, c) for item in found)]
    if not left:
        return
    # Sums that no drift was measured of (`--no-drift`, rows), where the formula's probes are right.
    known = "right on a few elements, and "
    summed = list(_accumulation(spec, _sums_of(spec, left), [spec.compute_dtype], known))
    if summed:
        yield from summed
        return
    fault, why = (
        Fault.UNKNOWN,
        "right on every probe, but these cases are red, and nothing says why",
    )
    if all(case.case.family in _EXTREME for case in left):
        fault, why = Fault.RANGE, "right on ordinary numbers, wrong where squares leave the range"
    families = ", ".join(dict.fromkeys(case.case.family for case in left))
    yield Diagnosis(fault, f"{why}: {families}; first: {left[0].verdict.detail}")


# --- what no answer shows

_MOST = 1 << 16  # elements: ONNX's evaluator is slow, and fixed shapes may be large


def choice_at_beta(
    model: onnx.ModelProto, signature: Signature, spec: LossSpec
) -> Diagnosis | None:
    """`<= for <`, where the graph sends |d| = beta to the branch of smaller differences.

    A graph that chooses by a condition (`Where`) tells: ONNX's evaluator computes the condition one
    step below beta, at beta, and one above.

    Args:
        model: with its inputs in the order input, target.
        signature: of it.
        spec: what it ought to compute.

    Returns:
        None where the comparison is right, and where nothing can be read: no `Where`, a beta that
        the dtype doesn't hold, other inputs, an operator that ONNX's evaluator lacks.
    """
    beta, dtype = spec.effective_beta, NUMPY_DTYPE[spec.dtype]
    shapes = ShapePlan.of(signature).small()
    is_held = 0 < beta < math.inf and float(np.asarray(beta).astype(dtype)) == beta
    only_a_pair = set(signature.inputs) == {"input", "target"}
    if not is_held or not only_a_pair or not 0 < elements(shapes) <= _MOST:
        return None
    knee = np.asarray(beta, dtype)
    steps = (np.nextafter(knee, dtype.type(0)), knee, np.nextafter(knee, dtype.type(np.inf)))
    try:
        chosen = _conditions(
            model,
            signature,
            [(np.full(shapes[0], d, dtype), np.zeros(shapes[1], dtype)) for d in steps],
        )
    except Exception:  # whatever an evaluator dies of, it says nothing about the comparison
        return None
    if (True, True, False) not in chosen and (False, False, True) not in chosen:
        return None
    why = (
        "the graph sends |d| = beta to the quadratic part, PyTorch to the linear one. Both give "
        f"beta/2 there, so with beta = {beta:g} no answer differs; with beta = 0 it would be 0/0"
    )
    evidence = Evidence(f"the graph's condition at d = beta = {beta:g}", 0.5 * beta, 0.5 * beta)
    return Diagnosis(Fault.LESS_OR_EQUAL, why, (evidence,))


def _conditions(
    model: onnx.ModelProto, signature: Signature, pairs: Sequence[tuple[Array, Array]]
) -> list[tuple[bool, ...]]:
    """For each `Where` whose condition is the same in all elements: its value for every pair."""
    flat = inlined(model)
    made = {name for node in flat.graph.node for name in node.output}
    asked = dict.fromkeys(node.input[0] for node in flat.graph.node if node.op_type == "Where")
    wanted = [name for name in asked if name in made]
    if not wanted:
        return []
    evaluator = ReferenceEvaluator(flat)
    names = signature.input.name, signature.target.name
    with np.errstate(all="ignore"):  # beta may be as large as its dtype takes
        found = [evaluator.run(wanted, dict(zip(names, pair, strict=True))) for pair in pairs]
    return [
        tuple(bool(value.all()) for value in values)
        for values in zip(*found, strict=True)
        if all(value.size and value.all() == value.any() for value in values)
    ]
