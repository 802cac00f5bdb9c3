"""Seconds a call: on the host, everyone in turn; on a GPU, between two events."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from .._records import Record

_WARM_UP = 3  # calls on a GPU
_FEWEST, _MOST = 10, 200  # samples on a GPU
_ENOUGH = 0.3  # seconds of samples on a GPU
_COPIED = 1 << 30  # bytes, far beyond any cache, and beyond what a launch takes
_SWEPT = 1 << 29  # bytes, beyond any cache; to read them takes longer than to launch a call


@dataclass(frozen=True, slots=True)
class Timing(Record):
    """Seconds a call: quartiles and 99th percentile of `samples`, each the mean of `calls`."""

    q1: float
    median: float
    q3: float
    p99: float
    samples: int
    calls: int = 1

    @classmethod
    def of(cls, seconds: Sequence[float], calls: int = 1) -> Timing:
        """The timing of at least one sample."""
        q1, median, q3, p99 = map(float, np.quantile(seconds, [0.25, 0.5, 0.75, 0.99]))
        return cls(q1, median, q3, p99, len(seconds), calls)


def in_turn(
    calls: Sequence[Callable[[], Any]], *, rounds: int = 15, turn: float = 0.01, most: int = 50
) -> list[Timing]:
    """The time of each call on the host, so measured that a noisy machine is noisy for all.

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


def time_calls(
    torch: Any,
    call: Callable[[], object],
    calls: int = 1,
    before: Callable[[], object] | None = None,
) -> Timing:
    """The time of `call` on torch's current CUDA stream, after a warm-up.

    A sample is the time between two events around `calls` calls. With many, that is what a loop of
    them gets done. With one, and `sweep` before, it is the GPU's own time on memory that no cache
    holds: the GPU is busy with the sweep while the host launches. (triton.testing.do_bench clears
    the caches by a write, which costs each call 8 to 10 us that a read does not: bench/NOTES.md.)
    """

    def sample() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if before is not None:
            before()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3  # from milliseconds

    for _ in range(_WARM_UP):
        call()
    samples = min(_MOST, max(_FEWEST, math.ceil(_ENOUGH / max(sample(), 1e-7))))
    return Timing.of([sample() / calls for _ in range(samples)], calls)


@cache
def sweep(torch: Any, device: str = "cuda") -> Callable[[], object]:
    """What leaves nothing of a call's tensors in the caches: a read of far more than they hold.

    A write would leave as much to be written back while the call is timed.
    """
    room: Any = torch.ones(_SWEPT // 4, dtype=torch.float32, device=device)
    return lambda: room.sum()


def copy_bandwidth(torch: Any) -> float:
    """Bytes a second, read plus written, of a copy on the device: the limit that counts there."""
    source = torch.zeros(_COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * _COPIED / time_calls(torch, lambda: target.copy_(source)).median
