"""Faults that show at special values alone, and those of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ...backends.base import Runner
from ...floats import CLASS_NAMES, Array, ieee_class, wide_dtype
from ...reference.oracle import oracle_gradient
from ...spec import LossSpec
from ..bounds import UNIT_ROUNDOFF
from ..shapes import ShapePlan
from .evidence import SHOWN, evidence_of, number
from .fit import explains, right
from .names import Diagnosis, Evidence, Fault
from .probes import Answer, Probe, ask, ask_all, boundary_probe, formula_probes, special_probes

__all__ = ["gradient_output", "special_values"]


def _wrong(answer: Answer) -> bool:
    """Whether an answer to a special probe has another IEEE class than the oracle's."""
    if answer.got is None or answer.got.shape != answer.expected.shape:
        return True
    return not np.array_equal(ieee_class(answer.got), ieee_class(answer.expected))


def _classes(values: Array | None) -> str:
    if values is None:
        return "an error"
    if not values.size:
        return "nothing"
    return CLASS_NAMES[int(ieee_class(values).reshape(-1)[0])]


def special_values(runner: Runner, spec: LossSpec, plan: ShapePlan) -> Iterator[Diagnosis]:
    """NaN, infinities, zeros, nothing at all, and |d| = beta."""
    answers = ask_all(runner, spec, special_probes(spec, plan))
    wrong: dict[str, list[Answer]] = {}
    for answer in answers:
        if _wrong(answer):
            wrong.setdefault(answer.probe.kind, []).append(answer)
    if "nan" in wrong:
        wrong.pop("inf-inf", None)  # its NaN goes the same way
    elif "inf-inf" in wrong:
        wrong.setdefault("inf", []).extend(wrong.pop("inf-inf"))
    for kind, found in wrong.items():
        fault, text = _EXPLAIN[kind](spec, found[0])
        text += f" ({found[0].error})" if found[0].error else ""
        yield Diagnosis(fault, text, tuple(evidence_of(spec, each) for each in found[:SHOWN]))
    yield from _boundary(runner, spec, plan)


def _value(answer: Answer) -> str:
    value = number(answer.got)
    return "an error" if answer.got is None else "nothing" if value is None else f"{value:g}"


def _nan(spec: LossSpec, answer: Answer) -> tuple[Fault, str]:
    why = f"{answer.probe.text} gives {_classes(answer.got)} where PyTorch gives NaN"
    return Fault.NAN_SWALLOWED, why


def _infinite(spec: LossSpec, answer: Answer) -> tuple[Fault, str]:
    got, expected = _classes(answer.got), _classes(answer.expected)
    return Fault.INFINITE_INPUT, f"{answer.probe.text} gives {got} where PyTorch gives {expected}"


def _zero(spec: LossSpec, answer: Answer) -> tuple[Fault, str]:
    if answer.got is not None and np.isnan(answer.got).any():
        why = (
            "d = 0 gives NaN, and no other difference does: with beta = 0, |d| <= beta lets d = 0 "
            "into the quadratic part, which is 0/0; |d| < beta does not"
        )
        return Fault.LESS_OR_EQUAL, why
    least = number(answer.got)
    if least:  # smaller than the probes of the formula see
        why = f"d = 0 gives {least:.3g}, as where |d| is sqrt(d^2 + e) with a tiny e; use Abs"
        return Fault.SMOOTH_ABS, why
    why = f"{answer.probe.text} gives {_classes(answer.got)} where PyTorch gives +0"
    return Fault.NEGATIVE_ZERO, why


def _empty(spec: LossSpec, answer: Answer) -> tuple[Fault, str]:
    answered = answer.got is not None
    fault = Fault.EMPTY_MEAN if spec.reduction == "mean" and answered else Fault.EMPTY
    expected = number(answer.expected)
    truth = "nothing" if expected is None else f"{expected:g}"
    why = f"the {spec.reduction} of no elements is {_value(answer)} where PyTorch gives {truth}"
    return fault, why


_EXPLAIN: dict[str, Callable[[LossSpec, Answer], tuple[Fault, str]]] = {
    "nan": _nan,
    "inf": _infinite,
    "zero": _zero,
    "empty": _empty,
}


def _boundary(runner: Runner, spec: LossSpec, plan: ShapePlan) -> Iterator[Diagnosis]:
    """|d| = beta, asked where the square of beta leaves the range of the dtype."""
    probe = boundary_probe(spec, plan)
    if probe is None:
        return
    answer = ask(runner, spec, probe)
    if explains(spec, right(spec), answer):
        return
    yield Diagnosis(
        Fault.LESS_OR_EQUAL,
        f"|d| = beta takes the quadratic part, where beta^2 leaves the range of {spec.dtype}; "
        "|d| < beta sends it to the linear part",
        (evidence_of(spec, answer),),
    )


def gradient_output(runner: Runner, spec: LossSpec, plan: ShapePlan) -> Iterator[Diagnosis]:
    """What is wrong with the output `grad_input`, asked with probes that don't broadcast."""
    if all(port.name != "grad_input" for port in runner.signature.outputs):
        return
    wide, tolerance = wide_dtype(spec.dtype), 16 * UNIT_ROUNDOFF[spec.dtype]
    asked: list[tuple[Probe, Array, Array]] = []
    for answer in ask_all(runner, spec, formula_probes(spec, plan, any_rank=False)):
        probe, got = answer.probe, answer.gradient
        if got is None or probe.input.shape != probe.target.shape or got.shape != probe.input.shape:
            continue
        exact = oracle_gradient(spec, probe.input, probe.target, probe.weight).astype(wide)
        asked.append((probe, got.astype(wide), exact))

    def holds(change: Callable[[Array], Array]) -> bool:
        return all(
            bool(np.all(np.abs(got - change(exact)) <= tolerance * np.abs(change(exact))))
            for _, got, exact in asked
        )

    if holds(lambda exact: exact):
        return
    probe, got, exact = asked[0]
    first, truth = float(got.reshape(-1)[0]), float(exact.reshape(-1)[0])
    evidence = (Evidence(f"grad_input, {probe.text}", truth, first),)
    if holds(lambda exact: -exact):
        why = "every gradient has the opposite sign: it is d loss / d target"
        yield Diagnosis(Fault.SWAPPED_INPUTS, why, evidence)
    elif holds(lambda exact: exact * exact.size):
        why = "the gradient is not divided by the number of elements, as the mean's is"
        yield Diagnosis(Fault.GRADIENT_SCALE, why, evidence, first / truth)
    elif holds(lambda exact: exact / exact.size):
        why = "the gradient is divided by the number of elements, which only the mean's is"
        yield Diagnosis(Fault.GRADIENT_SCALE, why, evidence, first / truth)
    else:
        why = "the gradient is not clip(d, -beta, beta) / beta, and no known fault explains it"
        yield Diagnosis(Fault.WRONG_GRADIENT, why, evidence)
