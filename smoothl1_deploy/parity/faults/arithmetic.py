"""Faults of the arithmetic: a right formula in too narrow a format, a sum that drifts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import ml_dtypes
import numpy as np

from ...backends.base import Runner
from ...floats import NUMPY_DTYPE, round_to, wide_dtype
from ...spec import LossSpec
from ..artefact_drift import DriftPoint
from ..bounds import UNIT_ROUNDOFF, accumulation_error
from ..cases import CaseResult
from ..shapes import ShapePlan
from .evidence import SHOWN, evidence_of
from .fit import count_of, explains, narrower, right
from .names import ACCUMULATION, Diagnosis, Evidence, Fault
from .probes import Answer, ask, narrow_probe

__all__ = ["accumulation", "accumulation_of_cases", "narrow_format"]


def _fits_format(spec: LossSpec, answer: Answer, dtype: str) -> bool:
    """Whether every number of the answer, or it times the count, is one of a narrower format."""
    if answer.got is None:
        return False
    got = answer.got.astype(wide_dtype(spec.dtype))
    count = count_of(answer) // max(got.size, 1)
    if np.array_equal(round_to(got, dtype).astype(got.dtype), got):
        return True
    # A sum in the narrow format, divided in the wide one.
    total = round_to(got * count, dtype).astype(got.dtype) / count
    own = NUMPY_DTYPE[spec.dtype]
    return spec.reduction == "mean" and bool(np.array_equal(total.astype(own), answer.got))


def narrow_format(
    runner: Runner, spec: LossSpec, plan: ShapePlan, answers: Sequence[Answer]
) -> Diagnosis | None:
    """The right formula in a narrower format: near the truth, and with its few bits."""
    for dtype in narrower(spec.dtype):
        unit = UNIT_ROUNDOFF[dtype]
        if not all(explains(spec, right(spec), answer, unit) for answer in answers):
            continue
        if not all(_fits_format(spec, answer, dtype) for answer in answers):
            continue
        wrong = [answer for answer in answers if not explains(spec, right(spec), answer)]
        evidence = tuple(evidence_of(spec, answer) for answer in wrong[:SHOWN])
        bits = round(-math.log2(unit))
        probe = narrow_probe(spec, plan, bits)
        why = f"every answer is a {dtype} number, near the right one"
        if probe is not None and spec.reduction != "none":
            answer = ask(runner, spec, probe)
            if explains(spec, right(spec), answer, unit):
                return Diagnosis(
                    ACCUMULATION[dtype],
                    f"the elements are right, but they are added up in {dtype}: {why}",
                    (*evidence, evidence_of(spec, answer)),
                )
        return Diagnosis(Fault.NARROW_ARITHMETIC, f"computed in {dtype}: {why}", evidence)
    return None


def _consistent(spec: LossSpec, point: DriftPoint, dtype: str) -> bool:
    """Whether a sum accumulated in `dtype` can be as far off as this one."""
    if point.relative is not None:
        limit = accumulation_error(dtype, point.elements) + 2 * UNIT_ROUNDOFF[spec.dtype]
        return point.relative <= limit
    if point.value is None or not math.isfinite(point.oracle):
        return point.ok
    total = point.oracle * (point.elements if spec.reduction == "mean" else 1)
    overflows = total > float(ml_dtypes.finfo(NUMPY_DTYPE[dtype]).max)  # type: ignore[no-untyped-call]
    return point.value == math.inf and overflows


def _grows(points: Sequence[DriftPoint], red: Sequence[DriftPoint]) -> bool:
    """A formula is off by as much at every size; a sum by more and more, until it is all gone."""
    if any(point.value == math.inf for point in red):
        return True
    fewest = min(point.elements for point in points)
    # In ULP: a half format's own rounding is a large relative error, but never many of these.
    worst = max(point.result.verdict.ulp for point in red)
    start = max(p.result.verdict.ulp for p in points if p.elements == fewest)
    alone = all(point.elements == fewest for point in points)
    return alone or worst > 4 * start or any((point.relative or 0.0) > 0.25 for point in red)


def _error(relative: float | None) -> str:
    return "overflow" if relative is None else f"{relative:.1e}"


def accumulation(spec: LossSpec, points: Sequence[DriftPoint]) -> Iterator[Diagnosis]:
    """An error that grows with the number of elements: a sum in too narrow a format."""
    points = [point for point in points if point.output == "loss"]
    red = [point for point in points if not point.ok]
    if not red or not _grows(points, red):
        return
    worst = max(red, key=lambda point: (point.relative or 0.0, point.elements))
    finest_first = sorted(UNIT_ROUNDOFF, key=UNIT_ROUNDOFF.__getitem__)
    for dtype in finest_first if spec.dtype == "float64" else finest_first[1:]:
        if all(_consistent(spec, point, dtype) for point in points):
            break
    else:
        return
    sizes = sorted({point.elements for point in points})
    first = min(point.elements for point in red)
    grows = f"the error grows with the number of elements, red from {first:,} on: "
    explanation = (
        f"{grows if len(sizes) > 1 else ''}{_error(worst.relative)} at "
        f"{worst.elements:,} elements (PyTorch: {_error(worst.torch_relative)}), which adding "
        f"up in {dtype} explains; accumulate in float64, or compensate"
    )
    evidence = [
        Evidence(f"{p.elements:,} elements, family {p.family}", p.oracle, p.value)
        for p in sorted(red, key=lambda p: -p.elements)[:SHOWN]
    ]
    yield Diagnosis(ACCUMULATION[dtype], explanation, tuple(evidence), worst.relative)


def accumulation_of_cases(spec: LossSpec, red: Sequence[CaseResult]) -> Diagnosis | None:
    """Sums that no drift was measured of (`--no-drift`, rows): the formula's probes are right."""
    dtype = spec.compute_dtype
    for case in red:
        shape = np.broadcast_shapes(case.case.input_shape, case.case.target_shape)
        count = math.prod(shape[1:] if spec.per_sample else shape)
        off = 2 * UNIT_ROUNDOFF[spec.dtype] * (case.verdict.ulp - 1)
        of_the_loss = case.sample is not None and case.sample.output == "loss"
        if case.verdict.wrong_class or not of_the_loss or off > accumulation_error(dtype, count):
            return None
    if spec.reduction == "none":
        return None
    worst = max(red, key=lambda case: case.verdict.ulp)
    explanation = (
        f"right on a few elements, and {worst.verdict.ulp:,} ULP off in family "
        f"{worst.case.family}, {worst.case.layout}, which adding up in {dtype} explains; "
        "accumulate in float64, or compensate"
    )
    evidence = tuple(
        Evidence(
            f"{c.case.layout}, family {c.case.family}", float(c.sample.oracle), float(c.sample.got)
        )
        for c in red[:SHOWN]
        if c.sample
    )
    return Diagnosis(ACCUMULATION[dtype], explanation, evidence)
