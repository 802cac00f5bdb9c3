"""`scripts/gpu_report`: the matrix and the speed on this machine's GPU, within a time.

It runs where torch alone is installed, and says then what it could not do.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._device import Device, find_device
from .._environment import environment, now, silence
from .._files import check_writable, write_atomic
from .._records import Record
from .._table import Table
from ..errors import SmoothL1DeployError
from ..tensorrt._flavour import current_gpu
from ._gpu import BACKENDS, TORCH, plan, run, timed, usable_backends
from ._rows import Row, row_tables
from ._timing import copy_bandwidth

if TYPE_CHECKING:
    from ..parity._report import Cell, Report

_FORMAT = 3  # since 3 one list of rows, as those of `bench`
_LIMIT = 480.0  # seconds
_RESERVE = 40.0  # seconds of them for starting, ending, and what runs over
_SPEED_SHARE = 0.45  # of the rest; parity has what remains

#: The betas of the matrix, those first that go by a path of their own.
_BETAS = (1.0, 0.0, 0.5, math.inf, 0.1, 2.0, 10.0, 1e-3, 1e4)
_REFERENCE = "torch-cuda"
_WORKERS = 8  # each holds a CUDA context of its own


@dataclass(frozen=True, slots=True)
class Parity(Record):
    """What the matrix found.

    Attributes:
        ok: whether it ran, and nothing of a backend is red.
        problem: why nothing was run; None where it was.
        backends: counts by backend: cells, red, refused, cases.
        red: one entry a red cell: by how much, and the command that repeats it.
        reference: one entry a cell where PyTorch's CUDA kernel is further from the exact loss
            than its CPU kernel allows: no fault of ours, and of use to who compares with it.
        notes: what was sampled or left out.
    """

    ok: bool = False
    problem: str | None = None
    backends: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    red: tuple[Mapping[str, Any], ...] = ()
    reference: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    _text: str = ""  # in Markdown, by the matrix's own view


@dataclass(frozen=True, slots=True)
class GpuReport(Record):
    """What was found on one card.

    Attributes:
        format: of the JSON.
        gpu: name, compute capability, driver, memory.
        date: ISO 8601, UTC, of the start.
        environment: versions and hardware.
        copy_bandwidth_bytes_per_s: of a copy on the device.
        rows: of the benchmark.
        parity: of the matrix.
        absent: backend -> why it wasn't run.
        dropped: what there was no time for.
        seconds: the whole run.
    """

    format: int
    gpu: Mapping[str, Any]
    date: str
    environment: Mapping[str, Any]
    copy_bandwidth_bytes_per_s: float
    rows: tuple[Row, ...]
    parity: Parity
    absent: Mapping[str, str]
    dropped: tuple[str, ...]
    seconds: float


def measure(device: Device, seconds: float, parity: bool) -> GpuReport:
    """Everything the report holds of a device, within `seconds`."""
    import torch

    start = time.monotonic()
    date, gpu = now(), current_gpu()
    card = {
        "name": device.name,
        "compute_capability": device.capability,
        "driver": gpu.driver if gpu else "unknown",
        "memory_bytes": torch.cuda.get_device_properties(device.index).total_memory,
    }

    def left(what: str) -> float:
        spent = time.monotonic() - start
        print(f"{spent:4.0f} s  {what}", flush=True)
        return seconds - _RESERVE - spent

    left(f"{card['name']}: which backends run here")
    backends, absent = usable_backends()
    share = left("speed") * (_SPEED_SHARE if parity else 1.0)
    bandwidth = copy_bandwidth(torch)
    rows, dropped = run(plan((*TORCH, *backends)), partial(timed, torch, device), share)
    found = Parity(problem="only the speed was asked for")
    if parity:
        found = run_parity(backends, left("parity"))
    return GpuReport(
        _FORMAT, card, date, {**environment(), "torch_cuda": torch.version.cuda}, bandwidth,
        tuple(rows), found, absent, tuple(dropped), round(time.monotonic() - start, 1),
    )  # fmt: skip


def run_parity(backends: tuple[str, ...], seconds: float) -> Parity:
    """Run as much of the matrix as the seconds allow, the plain losses and the extensions."""
    if seconds <= 0:
        return Parity(problem="no time was left")
    try:
        from ..graph import _functions as functions  # noqa: F401  (the exports need onnxscript)
        from ..parity._matrix import Matrix, run_matrix
    except ImportError as exc:
        return Parity(problem=f"the matrix can't run here: {exc}")
    # The torch route is checked with the torch it was written for, not with what is here.
    matrix = Matrix((*backends, _REFERENCE), betas=_BETAS, routes=("function", "inlined"))
    workers = max(2, min(os.cpu_count() or 2, _WORKERS))
    try:
        return condense(run_matrix(matrix, workers=workers, seconds=seconds))
    except Exception as exc:  # a worker that died: what else was measured is kept
        return Parity(problem=f"the matrix ended early: {type(exc).__name__}: {exc}")


def condense(report: Report) -> Parity:
    """What is kept of a matrix's report: counts, and every red cell with its first failure."""
    from ..parity.views import _markdown as view

    ours = replace(report, cells=tuple(c for c in report.cells if c.backend != _REFERENCE))
    outside = [cell for cell in report.red if cell.backend == _REFERENCE]
    text = (
        f"{view.render(ours)}\nPyTorch's own CUDA kernel (`{_REFERENCE}`) is a reference here, not "
        f"under test: it leaves what its CPU kernel allows in {len(outside)} cells.\n"
    )
    counts: dict[str, dict[str, int]] = {}
    for cell in report.cells:
        found = counts.setdefault(cell.backend, {"cells": 0, "red": 0, "refused": 0, "cases": 0})
        found["refused" if cell.refused else "cells"] += 1
        found["red"] += not cell.ok
        found["cases"] += cell.cases
    red, reference = (tuple(_entry(c, report.seed) for c in cells) for cells in (ours.red, outside))
    return Parity(not red, None, counts, red, reference, report.notes, text)


def _entry(cell: Cell, seed: int) -> dict[str, Any]:
    from ..parity._report import repeat_command

    return {
        "command": repeat_command(cell, seed),
        "ulp": cell.ulp,
        "allowed": cell.allowed,
        "torch_ulp": cell.torch_ulp,
        "failures": len(cell.failures),
        "families": sorted({result.case.family for result in cell.failures}),
        "detail": cell.failures[0].verdict.detail,
    }


def tables(report: GpuReport) -> list[Table]:
    """The speed: one a spec and way."""
    return row_tables(report.rows, report.copy_bandwidth_bytes_per_s)


def card(report: GpuReport) -> str:
    """What was measured on, in two sentences."""
    gpu, bandwidth = report.gpu, report.copy_bandwidth_bytes_per_s
    torch = report.environment.get("packages", {}).get("torch")
    return (
        f"Compute capability {gpu['compute_capability']}, driver {gpu['driver']}, torch {torch}; "
        f"{report.seconds:.0f} s. A copy on the device moves {bandwidth / 1e9:,.0f} GB/s, read "
        "plus written."
    )


def markdown(report: GpuReport) -> str:
    """The report for people."""
    parts = [
        f"# {report.gpu['name']}, {report.date[:10]}\n",
        f"{card(report)}\n",
        report.parity._text or f"## Parity\n\nNot run: {report.parity.problem}\n",
        "## Speed\n",
        "Times are between CUDA events. `x` says how many times faster, and GB/s count each input "
        "read and each output written once.\n",
        *(line for table in tables(report) for line in (f"### {table.title}", *table.markdown())),
        *_listed("Not available", [f"`{name}`: {why}" for name, why in report.absent.items()]),
        *_listed("No time for", report.dropped),
    ]
    return "\n".join(parts)


def _listed(title: str, items: Sequence[str]) -> list[str]:
    lines = [f"- {' '.join(item.split())}" for item in items]
    return [f"## {title}\n", *lines, ""] if items else []


def report_into(
    folder: Path, seconds: float = _LIMIT, *, parity: bool = True
) -> tuple[GpuReport, list[Path]]:
    """Measure this machine's GPU, and write the JSON and the Markdown into `folder`.

    Raises:
        MissingDependencyError: without torch.
        BackendUnavailableError: without a GPU.
        OutputError: when a file can't be written.
    """
    device = find_device("the GPU report")
    check_writable(folder / "gpu.json")
    report = measure(device, seconds, parity)
    name = re.sub(r"[^a-z0-9]+", "-", report.gpu["name"].lower()).strip("-")
    stem = f"gpu-{name}-{report.date[:10]}"
    text = json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n"
    return report, [
        write_atomic(folder / f"{stem}.json", text.encode()),
        write_atomic(folder / f"{stem}.md", markdown(report).encode()),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 done, 1 a cell of a backend is red, 2 can't write, 3 no GPU or package.

    After Ctrl-C it is 130.
    """
    parser = argparse.ArgumentParser(
        prog="gpu_report", description="Parity and speed on this machine's CUDA GPU, in 8 minutes."
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("results"), help="folder")
    parser.add_argument("--seconds", type=float, default=_LIMIT, help="time budget (480)")
    parser.add_argument("--plan", action="store_true", help="show what would be measured, and end")
    options = parser.parse_args(arguments)
    silence()
    if options.plan:
        last = "then the parity matrix, float32 first, for the time that is left"
        print("\n".join([*map(str, plan((*TORCH, *BACKENDS))), last]))
        return 0
    try:
        report, paths = report_into(options.output, options.seconds)
    except SmoothL1DeployError as exc:
        print(f"error: {exc}")
        return exc.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was written")
        return 130
    for text in report.dropped:
        print(f"no time for: {text}")
    print(f"wrote {', '.join(map(str, paths))}")
    return 1 if report.parity.red else 0


if __name__ == "__main__":  # the matrix's worker processes import this module too
    raise SystemExit(main())
