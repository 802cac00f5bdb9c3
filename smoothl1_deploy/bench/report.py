"""Rows as a table, as JSON lines with where they come from, and as a plot."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ..errors import OutputError, reason_of, require
from ..files import read_file, write_atomic
from .contestants import PLAIN
from .measure import READ, Row
from .timing import Timing

__all__ = ["append_rows", "bench_table", "once_table", "plot_png"]

#: Everyone's time is shown as a ratio to theirs.
_AGAINST = (PLAIN, "torch eager", "torch.compile", READ)


def _seconds(value: float) -> str:
    units = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))
    unit, scale = next((u for u in units if value >= u[1]), units[-1])
    return f"{value / scale:.3g} {unit}"


def _shape(row: Row) -> str:
    size = row.shape[0] * row.shape[1]
    power = size.bit_length() - 1
    return f"2^{power}" if size == 1 << power else f"{size}"


def bench_table(rows: Sequence[Row]) -> Table:
    """One row a contestant: time with quartiles and p99, how many times faster, GB/s, error."""
    first = rows[0]
    table = Table(
        title=f"{first.spec.name}, {_shape(first)} elements {list(first.shape)}, "
        f"{first.threads} thread(s), load {first.load:.1f}",
        title_justify="left",
    )
    table.add_column("contestant")
    against = [name for name in _AGAINST if any(row.contestant == name for row in rows)]
    limit = next((r.gigabytes_per_second for r in rows if r.contestant == READ), None)
    columns = ["time", "quartiles", "p99", *(f"x {name}" for name in against)]
    for name in (*columns, "GB/s", "of the read", "error", "peak"):
        table.add_column(name, justify="right")
    for row in rows:
        share = row.gigabytes_per_second / limit if limit else 0
        table.add_row(
            row.contestant,
            _seconds(row.timing.median),
            f"{_seconds(row.timing.q1)} - {_seconds(row.timing.q3)}",
            _seconds(row.timing.p99),
            *(f"{row.speedup[name]:.2f}" if name in row.speedup else "" for name in against),
            f"{row.gigabytes_per_second:.2f}",
            f"{share:.0%}",
            "" if row.error is None else f"{row.error:.1e}",
            "" if row.peak is None else f"{row.peak:.2f}x",
        )
    return table


def once_table(found: Mapping[str, Timing | str]) -> Table:
    """What is paid once."""
    table = Table(title="paid once", title_justify="left")
    for name in ("what", "median", "quartiles"):
        table.add_column(name)
    for name, timing in found.items():
        if isinstance(timing, str):
            table.add_row(name, timing, "")
        else:
            quartiles = f"{_seconds(timing.q1)} - {_seconds(timing.q3)}"
            table.add_row(name, _seconds(timing.median), quartiles)
    return table


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add one JSON line a row; what is in the file stays.

    Raises:
        OutputError: when the file can't be written.
    """
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    try:
        kept = read_file(path)
    except FileNotFoundError:
        kept = b""
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
        size = row.shape[0] * row.shape[1]
        point = (size, row.timing.median / size * 1e9)
        label = f"{row.contestant} ({row.spec.reduction}, {row.spec.dtype})"
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
