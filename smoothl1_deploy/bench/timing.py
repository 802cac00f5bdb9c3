"""Time side by side: everyone in turn, many times, so that a noisy machine is noisy for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Timing", "interleaved"]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds a call: quartiles, the 99th percentile, and how many calls they are of."""

    q1: float
    median: float
    q3: float
    p99: float
    calls: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Of all measured calls."""
        q1, median, q3, p99 = np.quantile(seconds, [0.25, 0.5, 0.75, 0.99])
        return cls(float(q1), float(median), float(q3), float(p99), len(seconds))


def interleaved(
    calls: Sequence[Callable[[], Any]], *, rounds: int = 15, turn: float = 0.01, most: int = 50
) -> list[Timing]:
    """The time of each call.

    Every round gives each of them a turn: one call that doesn't count, for the caches, then as
    many as fit into the turn. The pause after it lets threads of the last one that spin run dry.

    Args:
        calls: without arguments.
        rounds: turns of each.
        turn: seconds; at least one call is measured.
        most: calls of a turn.
    """
    measured: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, seconds in zip(calls, measured, strict=True):
            call()
            end = time.perf_counter() + turn
            for _ in range(most):
                started = time.perf_counter()
                call()
                now = time.perf_counter()
                seconds.append(now - started)
                if now > end:
                    break
            time.sleep(0.002)
    return [Timing.of(seconds) for seconds in measured]
