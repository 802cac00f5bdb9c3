"""Seconds on a GPU, between CUDA events; and the bandwidth to hold them against."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Timing", "copy_bandwidth", "summarise", "sweep", "time_calls"]

_WARM_UP = 3
_FEWEST, _MOST = 10, 200  # samples
_ENOUGH = 0.3  # seconds of samples
_COPIED = 1 << 30  # bytes, far beyond any cache, and beyond what a launch takes
_SWEPT = 1 << 29  # bytes, beyond any cache; to read them takes longer than to launch a call


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds a call: median and quartiles of `samples`, each the mean of `calls` in a row."""

    median: float
    lower: float
    upper: float
    samples: int
    calls: int = 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "median_s": self.median,
            "lower_quartile_s": self.lower,
            "upper_quartile_s": self.upper,
            "samples": self.samples,
            "calls_per_sample": self.calls,
        }


def summarise(seconds: Sequence[float], calls: int = 1) -> Timing:
    """Median and quartiles (by linear interpolation) of at least one sample."""
    lower, median, upper = map(float, np.quantile(seconds, [0.25, 0.5, 0.75]))
    return Timing(median, lower, upper, len(seconds), calls)


def time_calls(
    torch: Any,
    call: Callable[[], object],
    calls: int = 1,
    before: Callable[[], object] | None = None,
) -> Timing:
    """Time `call` on torch's current stream, after a warm-up.

    A sample is the time between two events around `calls` calls. With many, that is what a loop of
    them gets done. With one, and `sweep` before, it is the GPU's own time on memory that no cache
    holds: the GPU is busy with the sweep while the host launches.
    """
    for _ in range(_WARM_UP):
        call()
    first = _sample(torch, call, calls, before)  # how many samples there is time for
    samples = min(_MOST, max(_FEWEST, math.ceil(_ENOUGH / max(first, 1e-7))))
    seconds = [_sample(torch, call, calls, before) / calls for _ in range(samples)]
    return summarise(seconds, calls)


def _sample(
    torch: Any, call: Callable[[], object], calls: int, before: Callable[[], object] | None
) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if before is not None:
        before()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3  # from milliseconds


def sweep(torch: Any, device: str = "cuda") -> Callable[[], object]:
    """What leaves nothing of a call's tensors in the caches: a read of far more than they hold.

    A write would leave as much to be written back while the call is timed.
    """
    room: Any = torch.ones(_SWEPT // 4, dtype=torch.float32, device=device)
    return lambda: room.sum()


def copy_bandwidth(torch: Any) -> float:
    """Bytes a second, read plus written, of a copy on the device: the limit that counts here."""
    source = torch.zeros(_COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * _COPIED / time_calls(torch, lambda: target.copy_(source)).median
