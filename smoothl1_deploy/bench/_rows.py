"""The rows of a benchmark, whatever it ran on; their table in Markdown, their file, their plot."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .._files import read_file, write_atomic
from .._records import Record, markdown_table
from .._spec import LossSpec
from ..errors import OutputError, reason_of, require
from ._timing import Timing

PLAIN = "plain export"
EAGER = "torch eager"
COMPILED = "torch.compile"
#: Who moves as many bytes as the inputs have, and computes nothing of use.
READ = "reading the inputs"

#: Each row shows how many times faster it is than theirs.
_AGAINST = (PLAIN, EAGER, COMPILED, READ)
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Row(Record):
    """One contestant at one shape.

    Attributes:
        spec: what is computed.
        shape: of input and target, two axes.
        contestant: who computes it.
        way: how it is called; rows of one way can be compared.
        timing: in seconds; None where `problem` says why it could not be called.
        error: relative, the largest of an element; None where it isn't compared.
        threads: it was allowed; None on a GPU.
        load: of the machine (1 minute) when it was measured; None on a GPU.
        peak: memory of a call over that of its inputs; None where it wasn't measured.
    """

    spec: LossSpec
    shape: tuple[int, int]
    contestant: str
    way: str
    timing: Timing | None = None
    problem: str | None = None
    error: float | None = None
    threads: int | None = None
    load: float | None = None
    peak: float | None = None
    derived: ClassVar[tuple[str, ...]] = ("elements", "bytes")

    @property
    def elements(self) -> int:
        """How many elements each input has."""
        return self.shape[0] * self.shape[1]

    @property
    def bytes(self) -> int:
        """What any implementation must move: each input read once, each output written once."""
        written = 1
        if self.contestant == READ:
            written = 0
        elif self.spec.reduction == "none":
            written = self.elements
        elif self.spec.per_sample:
            written = self.shape[0]
        return (2 * self.elements + written) * _BYTES[self.spec.dtype]


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, under its title, with an empty line at the end."""
    lines = markdown_table(header, rows, "l" + "r" * (len(header) - 1))
    return "\n".join([f"### {title}", "", *lines, ""])


def row_tables(rows: Sequence[Row], copy: float | None = None) -> list[str]:
    """A table for each spec and way: times, ratios to others, GB/s, errors.

    Args:
        rows: those of one spec and way in the order to be shown.
        copy: bytes a second of a copy, to be compared with; None for those of the row `READ`.
    """
    groups: dict[tuple[LossSpec, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.spec, row.way), []).append(row)
    return [_row_table(group, copy) for group in groups.values()]


def _row_table(rows: Sequence[Row], copy: float | None) -> str:
    times = {(row.contestant, row.shape): row.timing.median for row in rows if row.timing}
    against = [name for name in _AGAINST if any(who == name for who, _ in times)]
    header = ["contestant", "elements", "time", "quartiles", "p99", *(f"x {n}" for n in against)]
    header += ["GB/s", "of a copy" if copy else "of the read", "error", "peak"]

    def cells(row: Row) -> list[str]:
        found = [row.contestant, _power(row.elements)]
        if row.timing is None:
            return [*found, f"error: {row.problem}"[:80], *[""] * (len(header) - 3)]
        median, rate = row.timing.median, row.bytes / row.timing.median
        found += [seconds(median), _quartiles(row.timing), seconds(row.timing.p99)]
        for name in against:
            other = times.get((name, row.shape))
            found.append(f"{other / median:.2f}" if other and name != row.contestant else "")
        reading = times.get((READ, row.shape))
        limit = copy or (reading and 2 * row.elements * _BYTES[row.spec.dtype] / reading)
        return [
            *found,
            f"{rate / 1e9:.2f}",
            f"{rate / limit:.0%}" if limit else "",
            "" if row.error is None else f"{row.error:.1e}",
            "" if row.peak is None else f"{row.peak:.2f}x",
        ]

    title = f"{rows[0].spec.name}, {rows[0].way}"
    if rows[0].threads is not None:
        title += f", {rows[0].threads} thread(s), load {rows[0].load:.1f}"
    return table(title, header, map(cells, rows))


def once_table(found: Mapping[str, Timing | str]) -> str:
    """What is paid once; a text says why a step was left out."""
    rows = [
        [name, timing, ""]
        if isinstance(timing, str)
        else [name, seconds(timing.median), _quartiles(timing)]
        for name, timing in found.items()
    ]
    return table("paid once", ["what", "median", "quartiles"], rows)


def seconds(value: float) -> str:
    """`12.3 us`."""
    units = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))
    unit, scale = next((u for u in units if value >= u[1]), units[-1])
    return f"{value / scale:.3g} {unit}"


def _quartiles(timing: Timing) -> str:
    return f"{seconds(timing.q1)} - {seconds(timing.q3)}"


def _power(size: int) -> str:
    power = size.bit_length() - 1
    return f"2^{power}" if size == 1 << power else str(size)


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add one JSON line a row; what is in the file stays.

    Raises:
        OutputError: when the file can't be written.
    """
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    try:
        kept = read_file(path) if path.exists() else b""
    except OSError as exc:
        raise OutputError(
            f"can't add to {path}: {reason_of(exc)}; choose another folder with -o"
        ) from exc
    write_atomic(path, kept + lines.encode())


def plot_png(rows: Sequence[Row]) -> bytes:
    """Nanoseconds an element over the number of elements, a line a contestant, log scales.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    require("matplotlib", "bench", "the plot of a benchmark")
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.timing is not None:
            label = f"{row.contestant} ({row.spec.reduction}, {row.spec.dtype})"
            point = (row.elements, row.timing.median / row.elements * 1e9)
            lines.setdefault(label, []).append(point)
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=label)
    axes.set(xscale="log", yscale="log", xlabel="elements", ylabel="ns an element, median")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()
