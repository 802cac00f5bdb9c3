"""What a GPU is held to, and whether the measurements meet it. Pure functions of the rows.

A contestant meets a target, misses it by a share of it, or was not measured: an error, a cell that
there was no time for, and a card without the package all count as the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .contestants import TORCH
from .plan import DTYPES, REDUCTIONS, TWIN, SmallCell, SpeedCell, is_twin
from .speed import SmallRow, SpeedRow

__all__ = ["Target", "Winner", "judge", "winners"]

_LARGE = 26  # log2 of the elements at which the bandwidth is asked for
_SHARE = 0.85  # of the bandwidth of a copy on the card
_SLOWER = 1.05  # times torch.compile, at most
_FASTER = 3.0  # times as fast as PyTorch eager, for `mean`
_CALL, _GRAPH = 1.0, 0.5  # times PyTorch eager's small call, at most
_NOBODY = "any backend"


@dataclass(frozen=True, slots=True)
class Target:
    """One target of one contestant.

    Attributes:
        what: in words, for instance `"mean float16 2^26: share of the copy's bandwidth"`.
        limit: the number asked for; `at_least` says on which side of it.
        found: the number measured, None where it wasn't.
        where: the cell `found` comes from, where it is the worst of many.
    """

    what: str
    contestant: str
    limit: float
    at_least: bool
    found: float | None
    where: str = ""

    @property
    def met(self) -> bool | None:
        """None where nothing was measured."""
        if self.found is None:
            return None
        return self.found >= self.limit if self.at_least else self.found <= self.limit

    @property
    def verdict(self) -> str:
        """`met`, `missed by 12%` (of the limit), or `not measured`."""
        if self.found is None:
            return "not measured"
        return "met" if self.met else f"missed by {abs(self.found / self.limit - 1):.1%}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "target": self.what, "contestant": self.contestant, "limit": self.limit,
            "at_least": self.at_least, "found": self.found, "where": self.where,
            "met": self.met, "verdict": self.verdict,
        }  # fmt: skip


def judge(
    speed: Sequence[SpeedRow], small: Sequence[SmallRow], bandwidth: float | None
) -> tuple[Target, ...]:
    """Every target of every backend that has a row; of nobody in particular where none has.

    Args:
        speed: the speed table, PyTorch's rows among them.
        small: the small calls, likewise.
        bandwidth: bytes a second of a copy on the card.
    """
    seconds = {row.cell: row.timing.median for row in speed if row.timing}
    moved = {row.cell: row.bytes for row in speed}
    calls = {row.cell: row.timing.median for row in small if row.timing}
    rows = [*(row.cell.contestant for row in speed), *(row.cell.contestant for row in small)]
    names = [n for n in dict.fromkeys(rows) if n not in TORCH and not is_twin(n)]
    found: list[Target] = []
    for name in names or (_NOBODY,):
        found += _bandwidth(name, seconds, moved, bandwidth)
        found.append(_compiled(name, seconds))
        found += _eager(name, seconds)
        found += _small(name, calls)
    return tuple(found)


def _bandwidth(
    name: str,
    seconds: Mapping[SpeedCell, float],
    moved: Mapping[SpeedCell, int],
    bandwidth: float | None,
) -> Iterator[Target]:
    for reduction in REDUCTIONS:
        for dtype in DTYPES:
            cell = SpeedCell(name, reduction, dtype, _LARGE)
            share = None
            if bandwidth and cell in seconds:
                share = moved[cell] / seconds[cell] / bandwidth
            what = f"{reduction} {dtype} 2^{_LARGE}: share of the copy's bandwidth"
            yield Target(what, name, _SHARE, True, share)


def _compiled(name: str, seconds: Mapping[SpeedCell, float]) -> Target:
    """The worst of every cell that both have."""
    ratios = {
        cell: time / seconds[other]
        for cell, time in seconds.items()
        if cell.contestant == name
        and (other := SpeedCell("torch-compile", cell.reduction, cell.dtype, cell.log2)) in seconds
    }
    worst = max(ratios, key=lambda cell: ratios[cell], default=None)
    where = f"{worst.reduction} {worst.dtype} 2^{worst.log2}" if worst else ""
    what = "any cell: time over torch.compile's"
    return Target(what, name, _SLOWER, False, ratios[worst] if worst else None, where)


def _eager(name: str, seconds: Mapping[SpeedCell, float]) -> Iterator[Target]:
    for dtype in DTYPES:
        own, eager = (
            seconds.get(SpeedCell(who, "mean", dtype, _LARGE)) for who in (name, "torch-eager")
        )
        ratio = eager / own if own and eager else None
        what = f"mean {dtype} 2^{_LARGE}: times as fast as PyTorch eager"
        yield Target(what, name, _FASTER, True, ratio)


def _small(name: str, calls: Mapping[SmallCell, float]) -> Iterator[Target]:
    for reduction in dict.fromkeys(("mean", "none", *(cell.reduction for cell in calls))):
        eager = calls.get(SmallCell("torch-eager", reduction, False))
        for graph, limit in ((False, _CALL), (True, _GRAPH)):
            own = calls.get(SmallCell(name, reduction, graph))
            ratio = own / eager if own and eager else None
            how = "in a CUDA graph" if graph else "call by call"
            what = f"{reduction} 64x16 {how}: time over PyTorch eager's call"
            yield Target(what, name, limit, False, ratio)


@dataclass(frozen=True, slots=True)
class Winner:
    """A backend's default way to add up against its twin; `ratio` above 1: the twin is faster."""

    contestant: str
    twin: str
    cell: str
    ratio: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"contestant": self.contestant, "twin": self.twin, "cell": self.cell,
                "default_over_twin": self.ratio}  # fmt: skip

    def __str__(self) -> str:
        if self.ratio > 1:
            return f"{self.cell}: {self.twin} takes {1 / self.ratio:.2f} of the default's time"
        return f"{self.cell}: the default takes {self.ratio:.2f} of the time of {self.twin}"


def winners(speed: Sequence[SpeedRow]) -> tuple[Winner, ...]:
    """One stage of a reduction against two, wherever both were measured."""
    seconds = {row.cell: row.timing.median for row in speed if row.timing}
    found = []
    for cell, time in seconds.items():
        if not is_twin(cell.contestant):
            continue
        name, _, twin = cell.contestant.partition(TWIN)
        default = seconds.get(SpeedCell(name, cell.reduction, cell.dtype, cell.log2))
        if default:
            text = f"{name} {cell.reduction} {cell.dtype} 2^{cell.log2}"
            found.append(Winner(name, twin, text, default / time))
    return tuple(found)
