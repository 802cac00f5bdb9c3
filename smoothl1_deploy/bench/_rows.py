"""The rows of a benchmark, whatever it ran on; their tables, their file, their plot."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .._files import read_file, refusal_told, write_atomic
from .._records import Record, grouped
from .._spec import LossSpec
from .._table import Table
from ..errors import require
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
        written = 0 if self.contestant == READ else math.prod(self.spec.loss_shape(self.shape))
        return (2 * self.elements + written) * _BYTES[self.spec.dtype]


def row_tables(rows: Sequence[Row], copy: float | None = None) -> list[Table]:
    """A table for each spec and way: times, ratios to others, GB/s, errors.

    Args:
        rows: those of one spec and way in the order to be shown.
        copy: bytes a second of a copy, to be compared with; None for those of the row `READ`.
    """
    groups = grouped(((row.spec, row.way), row) for row in rows)
    return [_row_table(group, copy) for group in groups.values()]


def _row_table(rows: Sequence[Row], copy: float | None) -> Table:
    times = {(row.contestant, row.shape): row.timing.median for row in rows if row.timing}
    header = ["contestant", "elements", "time", "quartiles", "p99", *(f"x {n}" for n in _AGAINST)]
    header += ["GB/s", "of a copy" if copy else "of the read", "error", "peak"]

    def cells(row: Row) -> list[str]:
        found = [row.contestant, _power(row.elements)]
        if row.timing is None:
            return [*found, "error", *[""] * (len(header) - 3)]
        median, rate = row.timing.median, row.bytes / row.timing.median
        found += [seconds(median), _quartiles(row.timing), seconds(row.timing.p99)]
        for name in _AGAINST:
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

    lines = [*map(cells, rows)]
    filled = [at for at in range(len(header)) if any(line[at] for line in lines)]
    title = f"{rows[0].spec.name}, {rows[0].way}"
    if len({row.elements for row in rows}) == 1:  # as everywhere on a CPU
        title += f", {lines[0][1]} elements"
        filled.remove(1)
    if rows[0].threads is not None:
        title += f", {rows[0].threads} thread(s), load {rows[0].load:.1f}"
    problems = (
        f"{row.contestant}, {line[1]} elements: {' '.join(row.problem.split())}"
        for row, line in zip(rows, lines, strict=True)
        if row.problem
    )
    keys = 1 + (1 in filled)
    columns, *shown = (tuple(line[at] for at in filled) for line in (header, *lines))
    align = "l" * keys + "r" * (len(filled) - keys)
    return Table(title, columns, shown, align, tuple(problems), keys)


def once_table(found: Mapping[str, Timing | str]) -> Table:
    """What is paid once; a text says why a step was left out."""
    timings = ((name, t) for name, t in found.items() if isinstance(t, Timing))
    rows = [(name, seconds(timing.median), _quartiles(timing)) for name, timing in timings]
    left_out = tuple(f"{name}: {why}" for name, why in found.items() if isinstance(why, str))
    return Table("paid once", ("what", "median", "quartiles"), rows, "lrr", left_out)


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
    with refusal_told(f"can't add to {path}", "choose another folder with -o"):
        kept = read_file(path) if path.exists() else b""
    write_atomic(path, kept + lines.encode())


def plot_png(rows: Sequence[Row], date: str, environment: Mapping[str, Any]) -> bytes:
    """Nanoseconds an element over the number of elements: a panel a spec, a line a contestant.

    A point is the median, its bar goes from the first to the third quartile.

    Args:
        rows: measured on a CPU.
        date: ISO 8601, of the start.
        environment: as `_environment.environment` tells it.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    require("matplotlib", "bench", "the plot of a benchmark")
    from matplotlib.figure import Figure

    groups = grouped(
        (row.spec, (row.contestant, (row.elements, row.timing))) for row in rows if row.timing
    )
    names = [*dict.fromkeys(row.contestant for row in rows)]
    columns = max(1, min(3, len(groups)))
    high = max(1, math.ceil(len(groups) / columns))
    figure = Figure(figsize=(max(8, 5 * columns), 4 * high + 2), layout="constrained")
    panels = figure.subplots(high, columns, squeeze=False, sharey=True).flat
    for panel in panels[len(groups) :]:
        panel.remove()
    handles = {}
    for panel, (spec, lines) in zip(panels, groups.items(), strict=False):
        for name, found in grouped(lines).items():
            points = np.array([(size, t.q1, t.median, t.q3) for size, t in sorted(found)])
            elements, *quartiles = points.T
            first, middle, third = (1e9 * values / elements for values in quartiles)
            is_limit = name == READ
            handles[name] = panel.errorbar(
                elements,
                middle,
                (middle - first, third - middle),
                color="0.5" if is_limit else f"C{names.index(name)}",
                linestyle="--" if is_limit else "-",
                linewidth=2.5 if name == names[0] else 1.2,  # ours, and on top
                zorder=3 if name == names[0] else 2,
                marker="o",
                markersize=4,
                capsize=3,
            )
        kind = " per sample" if spec.per_sample else ""
        panel.set_title(f"{spec.reduction}{kind}, {spec.dtype}, beta {spec.beta:g}")
        panel.set_xscale("log", base=2)
        panel.set(yscale="log", xlabel="elements")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
    figure.supylabel("ns an element")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns + 1)
    figure.suptitle(_caption(rows, date, environment))
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def _caption(rows: Sequence[Row], date: str, environment: Mapping[str, Any]) -> str:
    """What is shown, and on what it was measured."""
    loads = [row.load for row in rows if row.load is not None] or [0.0]
    threads = "/".join(sorted({str(row.threads) for row in rows}))
    packages = environment["packages"]
    versions = [f"{name} {packages[name]}" for name in ("onnxruntime", "torch") if packages[name]]
    return "\n".join(
        [
            "Smooth L1 loss: medians and quartiles of interleaved turns in one process",
            f"{environment['processor']}, {environment['cores']} cores; {threads} threads each; "
            f"load {min(loads):.1f} to {max(loads):.1f}; {date[:10]}",
            ", ".join([f"smoothl1-deploy {environment['smoothl1_deploy']}", *versions]),
        ]
    )
