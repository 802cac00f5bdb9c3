"""The faults that `diagnose` can name, and a diagnosis with its evidence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

__all__ = ["ACCUMULATION", "Diagnosis", "Evidence", "Fault", "json_number"]


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
    WRONG_COEFFICIENT = "wrong coefficient"
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


def json_number(value: float | None) -> float | str | None:
    """What is not finite as a string: strict JSON has no other way."""
    return str(value) if value is not None and not math.isfinite(value) else value


@dataclass(frozen=True, slots=True)
class Evidence:
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

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON: what is not finite is a string."""
        fields = {key: json_number(getattr(self, key)) for key in ("expected", "got", "explained")}
        return {"probe": self.probe, **fields}


def _text(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.9g}"


@dataclass(frozen=True, slots=True)
class Diagnosis:
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

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        return {
            "fault": self.fault.value,
            "explanation": self.explanation,
            "estimate": json_number(self.estimate),
            "evidence": [item.to_dict() for item in self.evidence],
        }
