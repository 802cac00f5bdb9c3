"""Error against size: how far a full `mean` drifts from the truth as the tensor grows.

Three ways to the same number: this tool's graph and the plain exporter's, both on ONNX Runtime's
CPU provider, and PyTorch eager. The plain graph adds float32 up one after the other
(microsoft/onnxruntime#28450), which constant data show worst: every rounding points one way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..backends.base import get_backend
from ..floats import Array, ulp_distance
from ..graph.export import export
from ..reference.oracle import oracle
from ..spec import LossSpec
from .plain_export import PlainExport, plain_export

__all__ = ["DATA", "SIZES", "WAYS", "Curve", "Drift", "measure_drift"]

SIZES = tuple(2**power for power in range(10, 25))
WAYS = ("smoothl1-deploy", "torch.onnx.export", "PyTorch eager")
DATA = ("constant", "normal")

_COLUMNS = 16
_SPEC = LossSpec(beta=1.0, reduction="mean", dtype="float32")


@dataclass(frozen=True, slots=True)
class Curve:
    """One way of computing the mean, on one kind of data.

    Attributes:
        way: one of `WAYS`.
        data: one of `DATA`.
        elements: the sizes.
        relative_error: against the oracle in float64, at each size; half an ULP of float32 is
            up to 6e-8, so the best possible answer has an error too.
        ulp: distance in float32 to the oracle rounded to float32, at each size.
    """

    way: str
    data: str
    elements: tuple[int, ...]
    relative_error: tuple[float, ...]
    ulp: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Drift:
    """The curves of every way on every kind of data, for one spec."""

    spec: LossSpec
    seed: int
    seconds: float
    curves: tuple[Curve, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        lists = ("elements", "relative_error", "ulp")
        curves = [
            {key: list(value) if key in lists else value for key, value in asdict(curve).items()}
            for curve in self.curves
        ]
        return {
            "spec": self.spec.to_dict(),
            "seed": self.seed,
            "seconds": round(self.seconds, 2),
            "curves": curves,
        }


def _data(kind: str, rows: int, seed: int) -> tuple[Array, Array]:
    """float32 [rows, 16], made in float32: 2^24 elements in float64 would be 256 MB."""
    shape = (rows, _COLUMNS)
    if kind == "constant":  # |d| = 1.27, in the linear branch
        return np.full(shape, 0.1, np.float32), np.full(shape, 1.37, np.float32)
    rng = np.random.default_rng(seed)
    left, right = (rng.standard_normal(shape, np.float32) for _ in range(2))
    return left, right


def _truth(input: Array, target: Array) -> float:
    """The exact mean, rounded to float64; by parts, since the widened arrays are twice as large."""
    wide = LossSpec(_SPEC.beta, "sum", "float64")
    step = 1 << 16
    parts = [
        float(oracle(wide, *(a[at : at + step].astype(np.float64) for a in (input, target))))
        for at in range(0, len(input), step)
    ]
    return float(np.sum(parts, dtype=np.longdouble) / np.longdouble(input.size))


def _ways() -> dict[str, Callable[[Array, Array], Array]]:
    from ..reference.module import eager

    shape = ("N", _COLUMNS)
    ours = get_backend("ort-cpu").load(export(_SPEC, shape=shape))
    plain = PlainExport(plain_export({"beta": _SPEC.beta}, _SPEC.dtype, shape))
    functions = (
        lambda input, target: ours.run(input, target)["loss"],
        plain.run,
        lambda input, target: eager(_SPEC, input, target),
    )
    return dict(zip(WAYS, functions, strict=True))


def measure_drift(
    sizes: Sequence[int] = SIZES,
    seed: int = 0,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Drift:
    """Measure every way on every kind of data, at each size.

    Args:
        sizes: numbers of elements, multiples of 16; a smaller size is a prefix of a larger.
        seed: of the normal data.
        progress: called with the measurements done and their number, before and after each size.

    Raises:
        MissingDependencyError: without torch or onnxruntime.
        ValueError: for a size that is no positive multiple of 16.
    """
    bad = [size for size in sizes if size <= 0 or size % _COLUMNS]
    if bad or not sizes:
        raise ValueError(f"sizes must be positive multiples of {_COLUMNS}, got {bad or 'none'}")
    started = time.perf_counter()
    ways = _ways()
    curves = []
    total = len(sizes) * len(DATA)
    progress(0, total)
    for number, data in enumerate(DATA):
        found: dict[str, list[tuple[float, int]]] = {way: [] for way in ways}
        input, target = _data(data, max(sizes) // _COLUMNS, seed)
        for i, size in enumerate(sizes, 1):
            pair = input[: size // _COLUMNS], target[: size // _COLUMNS]
            truth = _truth(*pair)
            nearest = np.asarray(truth, np.float32)
            for way, run in ways.items():
                got = run(*pair)
                error = abs(float(got) - truth) / truth
                found[way].append((error, int(ulp_distance(got, nearest))))
            progress(number * len(sizes) + i, total)
        curves += [
            Curve(way, data, tuple(sizes), *map(tuple, zip(*points, strict=True)))
            for way, points in found.items()
        ]
    return Drift(_SPEC, seed, time.perf_counter() - started, tuple(curves))
