"""Seconds on a GPU, between CUDA events; and the bandwidth to hold them against.

No GPU has run this module yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Timing", "copy_bandwidth", "summarise", "time_calls"]

_WARM_UP = 3
_FEWEST, _MOST = 10, 200  # samples
_ENOUGH = 0.3  # seconds of samples
_COPIED = 1 << 28  # bytes, far beyond any cache


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


def time_calls(torch: Any, call: Callable[[], object], calls: int = 1) -> Timing:
    """Time `call` on torch's current stream, after a warm-up.

    A sample is the time between two events around `calls` calls: with one call the GPU's own
    time where that is longer than the launch; with many, what a loop of them gets done.
    """
    for _ in range(_WARM_UP):
        call()
    first = _sample(torch, call, calls)  # how many samples there is time for
    samples = min(_MOST, max(_FEWEST, math.ceil(_ENOUGH / max(first, 1e-7))))
    return summarise([_sample(torch, call, calls) / calls for _ in range(samples)], calls)


def _sample(torch: Any, call: Callable[[], object], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3  # from milliseconds


def copy_bandwidth(torch: Any) -> float:
    """Bytes a second, read plus written, of a copy on the device: the limit that counts here."""
    source = torch.zeros(_COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * _COPIED / time_calls(torch, lambda: target.copy_(source)).median
