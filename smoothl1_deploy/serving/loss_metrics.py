"""The distribution of the losses that a model gave, as a histogram on the server's `/metrics`.

The launcher copies this file beside the backend `onnxruntime`, which imports it inside Triton's
stub process: it imports numpy alone. This Triton has counters and no histograms for backends, so
the buckets are counters with Prometheus' label `le`, which is what a histogram is on the wire.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

__all__ = ["BOUNDS", "CANARY_ID", "OUTPUTS", "LossMetrics"]

#: Upper bounds of the buckets; one without bound comes after them.
BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
#: Outputs that are losses, by their name.
OUTPUTS = ("loss", "score")
#: The request id of a canary, whose losses are not counted.
CANARY_ID = "smoothl1-deploy-canary"

_PERIOD = 1.0  # seconds; each counter costs a message to the server


class LossMetrics:
    """Counts losses here, and tells the server once a second at most.

    Args:
        pb: Triton's `triton_python_backend_utils`.
        model: the labels `model` and `version`.
        version: likewise.
    """

    def __init__(self, pb: Any, model: str, version: str) -> None:
        labels = {"model": model, "version": version}

        def family(name: str, text: str) -> Any:
            return pb.MetricFamily(
                name=f"smooth_l1_loss_{name}", description=text, kind=pb.MetricFamily.COUNTER
            )

        # The families must outlive their metrics.
        self._families = {
            "bucket": family("bucket", "Losses up to the bound le, cumulative"),
            "sum": family("sum", "Sum of the finite losses"),
            "count": family("count", "Number of the finite losses"),
            "not_finite": family("not_finite", "Number of losses that are NaN or infinite"),
        }
        bounds = [*map(repr, BOUNDS), "+Inf"]
        self._buckets = [
            self._families["bucket"].Metric(labels={**labels, "le": bound}) for bound in bounds
        ]
        self._others = [
            self._families[name].Metric(labels=labels) for name in ("sum", "count", "not_finite")
        ]
        self._pending = np.zeros(len(bounds) + 3)
        self._told = 0.0

    def count(self, losses: Any) -> None:
        """Add an array of losses, of any shape and any float dtype."""
        values = np.asarray(losses).reshape(-1).astype(np.float64)
        finite = values[np.isfinite(values)]
        below = [int(np.count_nonzero(finite <= bound)) for bound in BOUNDS]
        totals = (len(finite), max(0.0, float(finite.sum())), len(finite))
        self._pending += np.array([*below, *totals, len(values) - len(finite)], np.float64)

    def tell(self) -> None:
        """Pass on what was counted, if the last time is long enough ago."""
        now = time.monotonic()
        if now - self._told < _PERIOD:
            return
        self._told = now
        for metric, amount in zip((*self._buckets, *self._others), self._pending, strict=True):
            if amount:
                metric.increment(float(amount))
        self._pending[:] = 0
