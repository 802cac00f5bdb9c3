"""`smoothl1-deploy parity`: the whole matrix, or a part of it."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._files import check_writable, make_folder, write_atomic
from .._spec import ROUTES, LossSpec
from ..errors import BackendUnavailableError, MissingDependencyError, SpecError
from ._console import INTERRUPTED, print_lines, print_note, print_tables, progress_bar
from ._options import (
    BackendNames,
    Count,
    Dtypes,
    Next,
    Reductions,
    Workers,
    end_unless,
    one_of,
    processes,
)

if TYPE_CHECKING:
    from ..parity._report import Report

EXAMPLE = "smoothl1-deploy parity --quick -o out/parity"

_SHOWN = 10  # red cells that are printed one by one


def parity(
    *,
    output: Path = Path("out/parity"),
    quick: bool = False,
    engines: bool = True,
    seed: Count = 0,
    draws: Annotated[int | None, typer.Option(min=0, max=1_000_000_000)] = None,
    draw: Annotated[list[int] | None, typer.Option(min=0)] = None,
    workers: Workers = 0,
    beta: list[float] | None = None,
    reduction: Reductions = None,
    dtype: Dtypes = None,
    route: Annotated[list[str] | None, one_of(*ROUTES)] = None,
    backend: BackendNames = None,
    extensions: bool = True,
    extensions_only: bool = False,
    pairs: list[Path] | None = None,
) -> Next:
    """Check every beta, reduction, dtype, route and backend against PyTorch and the exact loss.

    Exits with 1 where a cell is red, and prints the command that repeats it. After Ctrl-C the
    report is of what was done by then.

    Options:
        output: Folder for report.json and the engines.
        quick: Fewer betas and sizes: half a minute.
        engines: Build a TensorRT engine of every artefact, with its sidecar.
        seed: Which inputs and draws are made.
        draws: Random combinations beside the grid; 240, 36 with --quick, none of a part of it.
        draw: Only this random draw. Repeat for more.
        workers: Processes; 0: one a core, at most 8.
        pairs: What prove wrote, to stand in the report. Repeat for more.

    Which part of the matrix:
        beta: Repeat for more.
        reduction: Repeat for more.
        dtype: Repeat for more.
        route: Repeat for more.
        backend: Repeat for more; by default all that can be used here.
        extensions: Also what torch.nn.SmoothL1Loss has no argument for: gradients, weights, masks,
            axes, Huber's loss and the others.
        extensions_only: The extensions alone.
    """
    from ..parity._matrix import DRAWS, QUICK_DRAWS, Matrix, MatrixInterrupted, run_matrix
    from ..parity._pairs import read_proofs

    check_writable(output / "report.json")
    proofs = tuple(proof for path in pairs or () for proof in read_proofs(path))
    part = _checked_part(beta=beta, reduction=reduction, dtype=dtype, route=route)
    backends, absent = _backends(backend, quick)
    is_part = bool(part or extensions_only or not extensions)
    if draws is None:
        draws = 0 if is_part else QUICK_DRAWS if quick else DRAWS
    matrix = replace(
        Matrix.quickly(backends) if quick else Matrix(backends),
        extensions=extensions or extensions_only,
        plain=not extensions_only,
        engines=_engine_folder(output) if engines and not (quick or draw) else None,
        seed=seed,
        draws=draws,
        draw=tuple(draw or ()),
        absent=absent,
        **part,
    )
    report, interrupted = None, False
    try:
        with progress_bar("matrix") as progress:
            report = run_matrix(matrix, workers=processes(workers), progress=progress)
        report = replace(report, pairs=proofs)
        _show(report)
        # Beside a part of the matrix, drift and contract would say little.
        if not (quick or is_part or backend or draw):
            report = _measured(report, backends)
    except MatrixInterrupted as exc:
        report, interrupted = replace(exc.report, pairs=proofs), True
        _show(report)
    except KeyboardInterrupt:
        if report is None:
            raise
        interrupted = True
    shown = _write(report, output)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    end_unless(report)
    return [shlex.join(["xdg-open", str(shown)])]


def _checked_part(**options: list[Any] | None) -> dict[str, Any]:
    """The fields of the matrix that are given; a bad name is an error here, not in a cell."""
    for name, values in options.items():
        for value in values or ():
            if name != "route":
                LossSpec(**{name: value})
            elif value not in ROUTES:
                raise SpecError(f"unknown route {value!r}; choose one of {', '.join(ROUTES)}")
    return {f"{name}s": tuple(dict.fromkeys(values)) for name, values in options.items() if values}


def _backends(asked: list[str] | None, quick: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those asked for, or every one but PyTorch; and why others are left out, said aloud."""
    from ..backends._base import backend_class, get_backend, missing
    from ..backends._names import BACKENDS, REFERENCES

    if asked is not None:
        for name in asked:
            get_backend(name)  # raises where it can't be used
        return tuple(dict.fromkeys(asked)), ()
    reasons = {name: missing(name) for name in BACKENDS if name not in REFERENCES}
    absent = [f"{name} not available: {reason}" for name, reason in reasons.items() if reason]
    for line in absent:
        print_note(line)
    usable = [name for name, reason in reasons.items() if not reason]
    wire = [name for name in usable if backend_class(name).over_the_wire]
    if quick and wire:  # a server takes longer to start than all the rest
        usable = [name for name in usable if name not in wire]
        absent.append(f"quick: no {' and no '.join(wire)}; --backend asks for it")
    return tuple(usable), tuple(absent)


def _engine_folder(output: Path) -> Path | None:
    """The folder of the engines, made; None, said aloud, where no engine can be built here."""
    from ..tensorrt._flavour import get_flavour

    try:
        get_flavour("auto")
    except (MissingDependencyError, BackendUnavailableError) as exc:
        print_note(f"no engines are built: {exc}")
        return None
    return make_folder(output / "engines")


def _measured(report: Report, backends: tuple[str, ...]) -> Report:
    """The report with what takes some seconds more: the drift by size, and the contract's edges."""
    from ..backends._base import backend_class
    from ..parity._contract import probe_contract
    from ..parity._drift import measure_drift

    with progress_bar("error by size") as progress:
        drift = measure_drift(progress=progress)
    with progress_bar("contract") as progress:
        local = [name for name in backends if not backend_class(name).over_the_wire]
        contract = probe_contract(local, progress=progress)
    return replace(report, drift=drift, contract=contract)


def _show(report: Report) -> None:
    from ..parity._report import repeat_command
    from ..parity.views import _tables as tables

    shown = (tables.certainty, tables.backends, tables.draws, tables.branches)
    every = [*tables.matrix(report), *tables.pairs(report), *(view(report) for view in shown)]
    print_tables(table for table in every if table.rows)
    lines = [f"sampled: {note}" for note in report.notes if " not available: " not in note]
    for cell in report.red[:_SHOWN]:
        failure = cell.failures[0]
        case = failure.case
        lines += [
            "",
            f"red: {cell.spec.name} (beta {cell.beta!r}), {cell.route} on {cell.backend}, "
            f"{len(cell.failures)} of {cell.cases} cases",
            f"  {case.family}, {case.layout}, seed {case.seed}: {failure.verdict.detail}",
            f"  repeat it: {repeat_command(cell, report.seed)}",
        ]
    if len(report.red) > _SHOWN:
        lines.append(f"and {len(report.red) - _SHOWN} more red cells, in report.json")
    for build in report.red_builds[:_SHOWN]:
        lines.append(f"red: engine of {build.spec.name}, {build.route}: {build.error}")
    print_lines(lines)


def _write(report: Report, folder: Path) -> Path:
    """Write the report as JSON, JUnit XML, Markdown, and HTML where it can be made; the last."""
    from ..parity.views import _junit as junit
    from ..parity.views import _markdown as markdown
    from ..parity.views._html import render

    paths = [
        write_atomic(folder / "report.json", report.to_json().encode()),
        write_atomic(folder / "junit.xml", junit.render(report).encode()),
        write_atomic(folder / "report.md", markdown.render(report).encode()),
    ]
    try:
        paths.append(write_atomic(folder / "report.html", render(report).encode()))
    except MissingDependencyError as exc:
        print_note(f"no report.html: {exc}")
    summary = report.summary
    built = f", {summary['builds']} engines built ({summary['red_builds']} red)"
    counts = (
        f"{summary['cells']} cells, {summary['draws']} draws, {summary['cases']} cases in "
        f"{summary['seconds']:.0f} s: {summary['red']} red{built if report.builds else ''}"
    )
    print_lines(["", counts, f"wrote {', '.join(map(str, paths))}"])
    return paths[-1]
