"""What the report measures, in which order, and what it drops when the time is short.

Pure functions of names and seconds: no GPU, no torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

__all__ = ["COLUMNS", "TWIN", "Budget", "Group", "SmallCell", "SpeedCell", "bytes_to_move",
           "is_twin", "plan_groups", "plan_small", "plan_speed", "twin_of"]  # fmt: skip

COLUMNS = 16  # of every input: 2^10 elements are 64 rows, the small call
SIZES = (26, 24, 22, 20, 18, 14, 10)  # log2 of the elements
_TWIN_SIZES = (26, 20, 18)
TWIN = ", "  # between a backend and how its twin adds up
_ITEM = {"float32": 4, "float16": 2}  # bytes
DTYPES = tuple(_ITEM)
REDUCTIONS = ("mean", "none", "sum")

#: Seconds to make a contestant ready for one reduction and dtype: a compilation, an engine.
_READY = {"torch-eager": 0.1, "torch-compile": 15.0}
_READY_ELSE = 5.0
_PER_CELL = 0.6  # seconds; the timer is told to stay below


@dataclass(frozen=True, slots=True)
class SpeedCell:
    """One figure of the speed table; `log2` is that of the number of elements."""

    contestant: str
    reduction: str
    dtype: str
    log2: int

    def __str__(self) -> str:
        return f"{self.contestant} {self.reduction} {self.dtype} 2^{self.log2}"


@dataclass(frozen=True, slots=True)
class SmallCell:
    """A call of 64 rows of 16, with its launches recorded in a CUDA graph or without."""

    contestant: str
    reduction: str
    graph: bool

    def __str__(self) -> str:
        how = "with a CUDA graph" if self.graph else "call by call"
        return f"{self.contestant} {self.reduction} 64x16 {how}"


@dataclass(frozen=True, slots=True)
class Group:
    """Cells that one loaded contestant serves, and the seconds they are expected to take."""

    contestant: str
    reduction: str
    dtype: str
    cells: tuple[SpeedCell, ...]
    seconds: float


def plan_groups(contestants: Sequence[str]) -> list[Group]:
    """The speed table, what matters most first: every contestant at `mean` in float32.

    Within a group the largest size comes first: torch.compile specialises on the first shape it
    sees, and that is the one the bandwidth is compared at.
    """
    groups = []
    for dtype, reduction, name in product(DTYPES, REDUCTIONS, contestants):
        cells = tuple(SpeedCell(name, reduction, dtype, log2) for log2 in SIZES)
        seconds = _READY.get(name, _READY_ELSE) + _PER_CELL * len(cells)
        groups.append(Group(name, reduction, dtype, cells, seconds))
    return groups


def twin_of(backend: str) -> str:
    """The backend with the other way to add up: its graph's one stage in two, or the reverse."""
    return backend + TWIN + ("one launch" if backend == "torch-triton" else "two stages")


def is_twin(contestant: str) -> bool:
    """Whether a contestant is one of `twin_of`."""
    return TWIN in contestant


def plan_speed(contestants: Sequence[str], backends: Sequence[str]) -> list[Group]:
    """The speed table with the twins of the backends, which come before the half formats."""
    groups = plan_groups(contestants)
    wide = [group for group in groups if group.dtype == "float32"]
    return [*wide, *_plan_twins(backends), *groups[len(wide) :]]


def _plan_twins(backends: Sequence[str]) -> list[Group]:
    """One stage of a reduction against two, at the sizes at which that may matter."""
    groups = []
    for name in map(twin_of, backends):
        cells = tuple(SpeedCell(name, "mean", "float32", log2) for log2 in _TWIN_SIZES)
        groups.append(Group(name, "mean", "float32", cells, _READY_ELSE + _PER_CELL * len(cells)))
    return groups


def plan_small(contestants: Sequence[str]) -> list[SmallCell]:
    """The small calls, float32."""
    return [
        SmallCell(name, reduction, graph)
        for reduction, name, graph in product(("mean", "none"), contestants, (False, True))
    ]


def bytes_to_move(reduction: str, dtype: str, elements: int) -> int:
    """What any implementation must move: each input read once, each output written once."""
    written = elements if reduction == "none" else 1
    return (2 * elements + written) * _ITEM[dtype]


class Budget:
    """Seconds to spend, and a list of what there was no time for.

    Args:
        seconds: altogether.
        clock: seconds from any origin.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._start = clock()
        self.dropped: list[str] = []

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    @property
    def left(self) -> float:
        """Seconds that remain, at least 0."""
        return max(0.0, self.seconds - self.spent)

    def allows(self, seconds: float, what: Iterable[Any], keep: float = 0.0) -> bool:
        """Whether `seconds` fit in what is left less `keep`; if not, `what` is noted as dropped."""
        if self.left - keep >= seconds:
            return True
        self.dropped += [str(each) for each in what]
        return False
