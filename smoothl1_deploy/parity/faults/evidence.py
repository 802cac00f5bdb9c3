"""The answers that speak for a fault."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ...floats import Array, round_to, wide_dtype
from ...spec import LossSpec
from .fit import Hypothesis, predict
from .names import Evidence
from .probes import Answer

__all__ = ["SHOWN", "clearest", "evidence_of", "number"]

SHOWN = 3  # answers given as evidence


def number(value: Array | None) -> float | None:
    """The first element; None of nothing."""
    return None if value is None or not value.size else float(value.reshape(-1)[0])


def evidence_of(spec: LossSpec, answer: Answer, hypothesis: Hypothesis | None = None) -> Evidence:
    """The element that differs most from what is right."""
    expected, got = answer.expected, answer.got
    explained = None
    if hypothesis is not None:
        explained = round_to(predict(spec, hypothesis, answer), spec.dtype)
    if got is not None and got.shape == expected.shape and got.size:
        wide = wide_dtype(spec.dtype)
        with np.errstate(invalid="ignore"):
            off = np.abs(got.astype(wide) - expected.astype(wide))
        off = np.where(np.isnan(off), np.inf, off)
        at = np.unravel_index(int(np.argmax(off)), got.shape)
        expected, got = expected[at], got[at]
        if explained is not None and explained.shape == off.shape:
            explained = explained[at]
    value = number(np.asarray(expected))
    return Evidence(
        answer.probe.text,
        math.nan if value is None else value,
        None if got is None else number(np.asarray(got)),
        None if explained is None else number(np.asarray(explained)),
    )


def clearest(
    spec: LossSpec, answers: Sequence[Answer], hypothesis: Hypothesis
) -> tuple[Evidence, ...]:
    """The answers furthest, in proportion, from what is right."""

    def distance(item: Evidence) -> float:
        if item.got is None or not math.isfinite(item.got):
            return math.inf
        return abs(item.got - item.expected) / max(abs(item.expected), abs(item.got), 1e-300)

    items = [evidence_of(spec, answer, hypothesis) for answer in answers]
    return tuple(sorted(items, key=distance, reverse=True)[:SHOWN])
