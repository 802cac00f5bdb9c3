"""The measurements of the plan: the speed table and the small calls, within a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

from ..device import Device
from .contestants import Call, prepare, record
from .plan import COLUMNS, Budget, Group, SmallCell, SpeedCell, bytes_to_move
from .timing import Timing, sweep, time_calls

__all__ = ["Bench", "SmallRow", "SpeedRow", "run_small", "run_speed"]

_CALLS = 100  # of a small call in a row: its launches are what is measured
_SMALL_SECONDS = 6.0  # of one small cell, with what makes it ready
_CELL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """A cell with its timing, or why there is none; `bytes` is what it must move."""

    cell: SpeedCell
    bytes: int
    timing: Timing | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return _row(asdict(self.cell), self.timing, self.error, bytes=self.bytes)


@dataclass(frozen=True, slots=True)
class SmallRow:
    """A small cell with its timing, or why there is none."""

    cell: SmallCell
    timing: Timing | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return _row(asdict(self.cell), self.timing, self.error)


def _row(
    cell: dict[str, Any], timing: Timing | None, error: str | None, **more: Any
) -> dict[str, Any]:
    return {**cell, **more, "timing": timing.to_dict() if timing else None, "error": error}


@dataclass(frozen=True, slots=True)
class Bench:
    """What the measurements need of the outside; a test gives its own.

    Attributes:
        tensors: (rows, dtype) -> input and target on the device.
        prepare: as `contestants.prepare`.
        record: as `contestants.record`, the device given.
        time: seconds of a call, so many in a row; of a single one without what caches hold.
    """

    tensors: Callable[[int, str], tuple[Any, Any]]
    prepare: Callable[..., tuple[Call, Any]]
    record: Callable[[Call, Any, Any, Any], Callable[[], Any]]
    time: Callable[[Callable[[], Any], int], Timing]

    @classmethod
    def on(cls, torch: Any, device: Device) -> Bench:
        """The real one."""
        swept = cache(partial(sweep, torch, device.kind))  # made when it is needed

        def tensors(rows: int, dtype: str) -> tuple[Any, Any]:
            made = torch.Generator(device=device.kind).manual_seed(0)
            shape, settings = (2, rows, COLUMNS), {"device": device.kind, "generator": made}
            x, t = torch.randn(shape, dtype=getattr(torch, dtype), **settings) * 2
            return x, t

        return cls(
            tensors,
            prepare,
            lambda call, runner, x, t: record(device, call, runner, x, t),
            lambda call, calls: time_calls(torch, call, calls, swept() if calls == 1 else None),
        )


def run_speed(groups: Sequence[Group], bench: Bench, budget: Budget, keep: float) -> list[SpeedRow]:
    """Measure what fits in the budget less `keep` seconds; an error is a row, not the end."""
    rows = []
    for group in groups:
        if not budget.allows(group.seconds, group.cells, keep):
            continue
        try:
            call, _ = bench.prepare(group.contestant, group.reduction, group.dtype)
        except Exception as exc:  # a runtime's own: the other contestants go on
            rows += [_failed(cell, exc) for cell in group.cells]
            continue
        for cell in group.cells:
            if not budget.allows(_CELL_SECONDS, [cell], keep):
                continue
            try:
                x, t = bench.tensors((1 << cell.log2) // COLUMNS, cell.dtype)
                timing = bench.time(partial(call, x, t), 1)
                rows.append(SpeedRow(cell, _bytes(cell), timing))
            except Exception as exc:
                rows.append(_failed(cell, exc))
    return rows


def run_small(
    cells: Sequence[SmallCell], bench: Bench, budget: Budget, keep: float
) -> list[SmallRow]:
    """Likewise for the small calls."""
    rows = []
    for cell in cells:
        if not budget.allows(_SMALL_SECONDS, [cell], keep):
            continue
        try:
            call, runner = bench.prepare(cell.contestant, cell.reduction, "float32", small=True)
            x, t = bench.tensors(64, "float32")
            work = bench.record(call, runner, x, t) if cell.graph else partial(call, x, t)
            rows.append(SmallRow(cell, bench.time(work, _CALLS)))
        except Exception as exc:
            rows.append(SmallRow(cell, error=f"{type(exc).__name__}: {exc}"))
    return rows


def _bytes(cell: SpeedCell) -> int:
    return bytes_to_move(cell.reduction, cell.dtype, 1 << cell.log2)


def _failed(cell: SpeedCell, exc: Exception) -> SpeedRow:
    return SpeedRow(cell, _bytes(cell), error=f"{type(exc).__name__}: {exc}")
