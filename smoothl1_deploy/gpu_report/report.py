"""`GpuReport`: everything one run found, as JSON and as a Markdown table. Pure functions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .parity import Parity
from .passes import Counted, passes_table
from .plan import DTYPES, REDUCTIONS
from .speed import SmallRow, SpeedRow
from .targets import Target, Winner, judge, winners

__all__ = ["GpuReport", "file_stem", "markdown"]

_FORMAT = 2  # since 2 with targets, stages and passes
_UNCOUNTED = Counted(problem="not counted")
_SHOWN = 20  # red cells in the Markdown; the JSON has all


@dataclass(frozen=True, slots=True)
class GpuReport:
    """What `scripts/gpu_report` found on one card.

    Attributes:
        gpu: name, compute capability, driver.
        date: ISO 8601, UTC, of the start.
        environment: versions and hardware.
        bandwidth: bytes a second of a copy on the device; None where it wasn't measured.
        absent: backend -> why it wasn't run.
        dropped: what there was no time for.
        seconds: the whole run.
        passes: over memory, of each form of the graph.
    """

    gpu: Mapping[str, Any]
    date: str
    environment: Mapping[str, Any]
    bandwidth: float | None
    speed: tuple[SpeedRow, ...]
    small: tuple[SmallRow, ...]
    parity: Parity
    absent: Mapping[str, str]
    dropped: tuple[str, ...]
    seconds: float
    passes: Counted = _UNCOUNTED

    @property
    def targets(self) -> tuple[Target, ...]:
        """Every target of every backend, met or not."""
        return judge(self.speed, self.small, self.bandwidth)

    @property
    def winners(self) -> tuple[Winner, ...]:
        """One stage of a reduction against two."""
        return winners(self.speed)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "format": _FORMAT,
            "gpu": dict(self.gpu),
            "date": self.date,
            "environment": dict(self.environment),
            "copy_bandwidth_bytes_per_s": self.bandwidth,
            "speed": [row.to_dict() for row in self.speed],
            "small": [row.to_dict() for row in self.small],
            "parity": self.parity.to_dict(),
            "targets": [target.to_dict() for target in self.targets],
            "stages": [winner.to_dict() for winner in self.winners],
            "passes": self.passes.to_dict(),
            "absent": dict(self.absent),
            "dropped": list(self.dropped),
            "seconds": round(self.seconds, 1),
        }

    def to_json(self) -> str:
        """Strict JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"


def file_stem(gpu: str, date: str) -> str:
    """`gpu-nvidia-l4-2026-11-22` of a card's name and an ISO date."""
    return f"gpu-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}-{date[:10]}"


def markdown(report: GpuReport) -> str:
    """The report for people."""
    gpu = report.gpu
    torch = report.environment.get("packages", {}).get("torch")
    copy = f"{report.bandwidth / 1e9:,.0f} GB/s" if report.bandwidth else "not measured"
    lines = [
        f"# {gpu['name']}, {report.date[:10]}",
        "",
        f"Compute capability {gpu['compute_capability']}, driver {gpu['driver']}, torch {torch}; "
        f"{report.seconds:.0f} s. A copy on the device moves {copy}, read plus written.",
        "",
        *_targets(report.targets),
        *_parity(report.parity),
        *_speed(report),
        *_small(report.small),
        *(
            _listed("One stage or two", [str(each) for each in report.winners])
            or ["## One stage or two", "", "Not measured.", ""]
        ),
        *_passes(report.passes),
        *_listed("Not available", [f"`{k}`: {_cell(v)}" for k, v in report.absent.items()]),
        *_listed("No time for", [f"{each}" for each in report.dropped]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [*(f"| {' | '.join(line)} |" for line in (header, rule, *rows)), ""]


def _cell(text: str) -> str:
    """Text that neither ends a table's cell nor its line."""
    return " ".join(text.split()).replace("|", "\\|")


def _listed(title: str, items: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *(f"- {item}" for item in items), ""] if items else []


def _targets(targets: Sequence[Target]) -> list[str]:
    """A row a target, a column a backend."""
    names = list(dict.fromkeys(target.contestant for target in targets))
    by_place = {(target.what, target.contestant): target for target in targets}
    rows = []
    for what, sample in {target.what: target for target in targets}.items():
        sign = "≥" if sample.at_least else "≤"
        rows.append(
            [what, f"{sign} {sample.limit:g}", *(_verdict(by_place[what, name]) for name in names)]
        )
    return ["## Targets", "", *_table(("target", "asked", *names), rows)]


def _verdict(target: Target) -> str:
    if target.found is None:
        return target.verdict
    where = f" ({target.where})" if target.where else ""
    return f"{target.found:.3g}{where}: {target.verdict}"


def _passes(passes: Counted) -> list[str]:
    lines = ["## Passes over memory under ONNX Runtime's CUDA provider", ""]
    if passes.problem:
        return [*lines, f"Not counted: {_cell(passes.problem)}", ""]
    return [
        *lines,
        "Counted on the graph its optimiser leaves; `at most` is the share of the copy's bandwidth "
        "that counts as reached when every operator runs at all of it.",
        "",
        *passes_table(passes.rows),
        "",
    ]


def _parity(parity: Parity) -> list[str]:
    lines = ["## Parity", ""]
    if parity.problem:
        return [*lines, f"Not run: {parity.problem}", ""]
    lines += _table(
        ("backend", "cells", "red", "refused", "cases"),
        ([f"`{name}`", *map(str, counts.values())] for name, counts in parity.backends.items()),
    )
    if "torch-cuda" not in parity.backends:
        lines += [
            "PyTorch's own CUDA kernel (`torch-cuda`), a further reference: not measured.",
            "",
        ]
    elif not parity.reference:
        lines += ["PyTorch's own CUDA kernel (`torch-cuda`) keeps what its CPU kernel allows.", ""]
    else:
        lines += [
            f"PyTorch's own CUDA kernel (`torch-cuda`) leaves what its CPU kernel allows in "
            f"{len(parity.reference)} cells; it is a reference here, not under test.",
            "",
        ]
    entries = [*parity.red, *parity.reference][:_SHOWN]
    if entries:
        lines += _table(
            ("red cell", "route", "backend", "ULP", "allowed", "families", "first"),
            (
                [f"`{e['spec']}` at {e['beta']}", e["route"], e["backend"], str(e["ulp"]),
                 str(e["allowed"]), ", ".join(e["families"]), _cell(e["detail"])]
                for e in entries
            ),
        )  # fmt: skip
    return [*lines, *(f"- {_cell(note)}" for note in parity.notes), ""]


def _speed(report: GpuReport) -> list[str]:
    """One table a dtype and reduction: microseconds by size, and the share of the bandwidth."""
    rows = {row.cell: row for row in report.speed}
    lines = [
        "## Speed",
        "",
        "Median microseconds of the GPU between CUDA events, the caches swept before each call; "
        "the share of the copy's bandwidth, counting each input read and each output written once.",
        "",
    ]
    some = False
    for dtype in DTYPES:
        for reduction in REDUCTIONS:
            chosen = [c for c in rows if (c.dtype, c.reduction) == (dtype, reduction)]
            if not chosen:
                continue
            some = True
            names = list(dict.fromkeys(cell.contestant for cell in chosen))
            sizes = sorted({cell.log2 for cell in chosen})
            by_place = {(c.contestant, c.log2): rows[c] for c in chosen}
            lines += [f"### `{reduction}`, {dtype}", ""]
            lines += _table(
                ("contestant", *(f"2^{log2}" for log2 in sizes)),
                (
                    [name, *(_figure(by_place.get((name, s)), report.bandwidth) for s in sizes)]
                    for name in names
                ),
            )
    errors = {
        f"{row.cell.contestant}, {row.cell.reduction}, {row.cell.dtype}: {_cell(row.error)}": 0
        for row in report.speed
        if row.error
    }
    return [*(lines if some else [*lines[:2], "Not measured.", ""]),
            *(f"- {error}" for error in errors), *([""] if errors else [])]  # fmt: skip


def _figure(row: SpeedRow | None, bandwidth: float | None) -> str:
    if row is None:
        return "–"
    if row.timing is None:
        return "error"
    text = f"{row.timing.median * 1e6:,.1f}"
    if bandwidth and row.timing.median > 0:
        text += f" ({row.bytes / row.timing.median / bandwidth:.0%})"
    return text


def _small(rows: Sequence[SmallRow]) -> list[str]:
    if not rows:
        return []
    lines = ["## Small calls: 64×16 float32", "", "Microseconds a call in a row of 100.", ""]
    found = {(r.cell.contestant, r.cell.reduction, r.cell.graph): r for r in rows}
    names = list(dict.fromkeys((r.cell.contestant, r.cell.reduction) for r in rows))

    def figure(key: tuple[str, str, bool]) -> str:
        row = found.get(key)
        if row is None:
            return "–"
        return f"{row.timing.median * 1e6:.1f}" if row.timing else _cell(str(row.error))[:80]

    return [*lines, *_table(
        ("contestant", "reduction", "call by call", "CUDA graph"),
        ([name, how, figure((name, how, False)), figure((name, how, True))] for name, how in names),
    )]  # fmt: skip
