"""The benchmark on a GPU: PyTorch, and every backend that runs there, within a time.

It imports what torch brings and no more, so that it runs where torch alone is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from time import monotonic
from typing import Any

from .._device import Device
from .._spec import LossSpec
from ..errors import require
from ._rows import COMPILED, EAGER, Row
from ._timing import Timing, sweep, time_calls

TORCH = (EAGER, COMPILED)
BACKENDS = ("torch-triton", "trt", "ort-cuda", "ort-tensorrt", "ort-tensorrt-rtx")
DTYPES = ("float32", "float16")
REDUCTIONS = ("mean", "none", "sum")
COLUMNS = 16  # of every input: 2^10 elements are 64 rows, the small call
SIZES = (26, 24, 22, 20, 18, 14, 10)  # log2 of the number of elements

#: The ways to call: the time of the GPU alone, and what a loop of small calls gets done.
ALONE = "the GPU alone, caches swept"
IN_A_ROW = "100 calls in a row"
GRAPH = "100 replays of a CUDA graph"
_CALLS = 100


@dataclass(frozen=True, slots=True)
class Job:
    """One loss by one contestant, which is loaded once, at some sizes (log2 of the elements)."""

    contestant: str
    spec: LossSpec
    way: str
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        sizes = ", ".join(f"2^{log2}" for log2 in self.sizes)
        return f"{self.contestant}, {self.spec.reduction}, {self.spec.dtype}, {self.way}: {sizes}"

    def row(self, log2: int, timing: Timing | None = None, problem: Exception | None = None) -> Row:
        """What came out at a size."""
        said = None if problem is None else f"{type(problem).__name__}: {problem}"
        shape = ((1 << log2) // COLUMNS, COLUMNS)
        return Row(self.spec, shape, self.contestant, self.way, timing, said)


def plan(contestants: Sequence[str]) -> list[Job]:
    """What is measured, what matters most first: small calls, then everyone at `mean` in float32.

    The largest size comes first: torch.compile specialises on the first shape it sees, and that is
    the one the bandwidth is compared at.
    """
    small = [
        Job(name, LossSpec(1.0, reduction), way, SIZES[-1:])
        for reduction, name, way in product(("mean", "none"), contestants, (IN_A_ROW, GRAPH))
    ]
    return small + [
        Job(name, LossSpec(1.0, reduction, dtype), ALONE, SIZES)
        for dtype, reduction, name in product(DTYPES, REDUCTIONS, contestants)
    ]


def usable_backends() -> tuple[tuple[str, ...], dict[str, str]]:
    """The GPU backends that run a small model here, and why the others don't.

    They are tried, not asked: an engine may be built on a card that can't run it, and the exact
    answer is worth a line in the report.
    """
    try:
        from ..backends._base import load
        from ..graph._export import export

        model = export(LossSpec(), shape=("N", COLUMNS))
    except ImportError as exc:  # onnx, onnxscript or what they need
        return (), dict.fromkeys(BACKENDS, f"no model can be exported here: {exc}")
    import numpy as np

    found, reasons = [], {}
    for name in BACKENDS:
        try:
            ones = np.ones((2, COLUMNS), np.float32)
            load(model, name).run(ones, ones)
            found.append(name)
        except Exception as exc:  # whatever a driver or a runtime raises, the others go on
            reasons[name] = f"{type(exc).__name__}: {exc}"
    return tuple(found), reasons


def torch_loss(spec: LossSpec) -> Callable[[Any, Any], Any]:
    """PyTorch's loss of two tensors."""
    torch = require("torch", "torch", "PyTorch as a contestant")
    smooth_l1 = torch.nn.functional.smooth_l1_loss
    if not spec.per_sample:
        return lambda a, b: smooth_l1(a, b, reduction=spec.reduction, beta=spec.beta)

    def rows(a: Any, b: Any) -> Any:
        losses = smooth_l1(a, b, reduction="none", beta=spec.beta)
        return losses.mean(1) if spec.reduction == "mean" else losses.sum(1)

    return rows


def prepare(job: Job) -> tuple[Callable[[Any, Any], Any], Any]:
    """The call of a contestant on two tensors, and its runner (None for PyTorch's)."""
    if job.contestant in TORCH:
        loss = torch_loss(job.spec)
        if job.contestant == COMPILED:
            loss = require("torch", "torch", "PyTorch as a contestant").compile(loss)
        return loss, None
    from ..backends._base import get_backend
    from ..graph._export import export

    if job.contestant == "trt":  # the one whose engine can be tuned for a size
        from ..backends._trt import TrtBackend

        rows = (1 << job.sizes[0]) // COLUMNS
        backend: Any = TrtBackend(profile={"input": (1, rows, rows)})
    else:
        backend = get_backend(job.contestant)
    runner = backend.load(export(job.spec, shape=("N", COLUMNS)))
    return runner.run, runner


def timed(
    torch: Any, device: Device, job: Job, log2: int, call: Callable[[Any, Any], Any], runner: Any
) -> Timing:
    """The time of the job's call on normal data of so many elements.

    Raises:
        UnsupportedError: for a backend that can't be recorded in a CUDA graph.
    """
    made = torch.Generator(device=device.kind).manual_seed(0)
    shape, dtype = (2, (1 << log2) // COLUMNS, COLUMNS), getattr(torch, job.spec.dtype)
    x, t = torch.randn(shape, dtype=dtype, device=device.kind, generator=made) * 2
    work: Callable[[], Any] = partial(call, x, t)
    if job.way == ALONE:
        return time_calls(torch, work, before=sweep(torch, device.kind))
    if job.way == GRAPH:
        work = (device.capture(work) if runner is None else runner.capture(x, t)).replay
    return time_calls(torch, work, _CALLS)


def run(
    jobs: Sequence[Job], timed: Callable[..., Timing], seconds: float
) -> tuple[list[Row], list[str]]:
    """The rows of what fits into the seconds, and what there was no time for.

    Args:
        jobs: in the order to be done. An error in one of them is a row, and not the end.
        timed: the function `timed` with torch and the device given.
        seconds: after which nothing is begun; a compilation at that time takes 15 more.
    """
    end = monotonic() + seconds
    rows: list[Row] = []
    dropped: list[str] = []
    for job in jobs:
        if monotonic() > end:
            dropped.append(str(job))
            continue
        try:
            call, runner = prepare(job)
        except Exception as exc:  # a runtime's own: the other contestants go on
            rows += [job.row(log2, problem=exc) for log2 in job.sizes]
            continue
        for log2 in job.sizes:
            if monotonic() > end:
                dropped.append(str(replace(job, sizes=(log2,))))
                continue
            try:
                rows.append(job.row(log2, timed(job, log2, call, runner)))
            except Exception as exc:
                rows.append(job.row(log2, problem=exc))
    return rows, dropped
