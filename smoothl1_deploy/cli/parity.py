"""`smoothl1-deploy parity`: the whole matrix, or a part of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import OutputError, SpecError, reason_of
from .console import INTERRUPTED, open_console, print_lines, print_note

if TYPE_CHECKING:
    from ..parity.matrix import Matrix
    from ..parity.report import Report

__all__ = ["EXAMPLE", "parity"]

EXAMPLE = "smoothl1-deploy parity --quick -o out/parity"

_PART = "Which part of the matrix"
_SHOWN = 10  # red cells that are printed one by one


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A live progress bar on stderr; nothing where stderr is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console = open_console(stderr=True)
    columns = (TextColumn("parity"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, Remaining(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("parity", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def parity(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for report.json and the engines.")
    ] = Path("out/parity"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer betas and sizes: half a minute.")
    ] = False,
    beta: Annotated[
        list[float] | None, typer.Option(help="Repeat for more.", rich_help_panel=_PART)
    ] = None,
    reduction: Annotated[
        list[str] | None, typer.Option(help="Repeat for more.", rich_help_panel=_PART)
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="Repeat for more.", rich_help_panel=_PART)
    ] = None,
    route: Annotated[
        list[str] | None, typer.Option(help="Repeat for more.", rich_help_panel=_PART)
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Repeat for more; all that can be used here.", rich_help_panel=_PART),
    ] = None,
    extensions: Annotated[
        bool,
        typer.Option(
            help="Also per_sample, gradient, runtime_beta, weight.", rich_help_panel=_PART
        ),
    ] = True,
    extensions_only: Annotated[
        bool, typer.Option("--extensions-only", help="Only those.", rich_help_panel=_PART)
    ] = False,
    engines: Annotated[
        bool, typer.Option(help="Build a TensorRT engine of every artefact, with its sidecar.")
    ] = True,
    flavour: Annotated[str, typer.Option(help="Of those engines.")] = "auto",
    html: Annotated[
        bool,
        typer.Option(help="Also write report.html; of the whole matrix with drift and contract."),
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of the inputs and the draws.")] = 0,
    draws: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=1_000_000_000,
            help="Random combinations beside the grid; 240, 36 with --quick, none of a part of it.",
        ),
    ] = None,
    draw: Annotated[
        list[int] | None, typer.Option(min=0, help="Only this random draw. Repeat for more.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, max=4096, help="Processes; 0: one a core, at most 8.")
    ] = 0,
) -> None:
    """Check every beta, reduction, dtype, route and backend against PyTorch and the exact loss.

    Exits with 1 where a cell is red, and prints the command that repeats it. After Ctrl-C the
    report is of what was done by then.
    """
    from dataclasses import replace

    from ..parity.matrix import MatrixInterrupted, run_matrix
    from ..parity.plan import DRAWS, QUICK_DRAWS

    _make_folder(output)
    matrix = _matrix(
        quick, seed, backend, beta=beta, reduction=reduction, dtype=dtype, route=route,
        extensions=extensions, extensions_only=extensions_only,
        engines=output / "engines" if engines and not (quick or draw) else None, flavour=flavour,
    )  # fmt: skip
    part = any((beta, reduction, dtype, route, extensions_only, not extensions))
    if draws is None:
        draws = 0 if part else QUICK_DRAWS if quick else DRAWS
    matrix = replace(matrix, draws=draws, draw=tuple(draw or ()))
    # Of a part of the matrix the whole picture would say little.
    whole = not (quick or part or backend or draw)
    report, interrupted = None, False
    try:
        with _bar() as progress:
            report = run_matrix(
                matrix, workers=workers or min(os.cpu_count() or 1, 8), progress=progress
            )
        _show(report)
        if html and whole:
            report = _measured(report, matrix.backends)
    except MatrixInterrupted as exc:
        report, interrupted = exc.report, True
        _show(report)
    except KeyboardInterrupt:
        if report is None:
            raise
        interrupted = True
    _write(report, output, html)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if not report:
        raise typer.Exit(1)


def _measured(report: Report, backends: tuple[str, ...]) -> Report:
    """The report with what takes some seconds more: the drift by size, and the contract's edges."""
    from dataclasses import replace

    from ..parity.contract import probe_contract
    from ..parity.drift import measure_drift
    from ..parity.matrix import OVER_THE_WIRE

    with _bar() as progress:
        drift = measure_drift(progress=progress)
    with _bar() as progress:
        local = [name for name in backends if name not in OVER_THE_WIRE]
        contract = probe_contract(local, progress=progress)
    return replace(report, drift=drift, contract=contract)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as exc:
        raise OutputError(
            f"can't make the folder {folder}: {reason_of(exc)}; choose another with -o"
        ) from exc


def _matrix(
    quick: bool, seed: int, backends: list[str] | None, *, engines: Path | None, flavour: str,
    extensions: bool, extensions_only: bool, **part: list[str] | list[float] | None,
) -> Matrix:  # fmt: skip
    """The part of the matrix that the options name; a bad name is an error here, not in a cell."""
    from dataclasses import replace

    from ..backends.base import get_backend
    from ..graph.export import ROUTES
    from ..parity.matrix import OVER_THE_WIRE, Matrix
    from ..spec import DTYPES, REDUCTIONS, LossSpec

    known = {"reduction": REDUCTIONS, "dtype": DTYPES, "route": ROUTES}
    for name, choices in known.items():
        for value in part[name] or ():
            if value not in choices:
                raise SpecError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
    for beta in part["beta"] or ():
        LossSpec(beta=float(beta))
    absent: tuple[str, ...] = ()
    if backends is None:
        chosen, absent = _usable_backends()
        if quick:  # a server takes longer to start than all the rest
            wire = [name for name in chosen if name in OVER_THE_WIRE]
            chosen = tuple(name for name in chosen if name not in wire)
            if wire:
                absent += (f"quick: no {' and no '.join(wire)}; --backend asks for it",)
    else:
        chosen = tuple(dict.fromkeys(backends))
        for name in chosen:
            get_backend(name)  # raises where it can't be used
    matrix = Matrix.quickly(chosen, seed) if quick else Matrix(chosen, seed=seed)
    given = {f"{name}s": tuple(dict.fromkeys(values)) for name, values in part.items() if values}
    if engines is not None:
        engines = _engine_folder(engines, flavour)
    return replace(
        matrix,
        engines=engines,
        flavour=flavour,
        extensions=extensions or extensions_only,
        plain=not extensions_only,
        absent=absent,
        **given,  # type: ignore[arg-type]
    )


def _usable_backends() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Every backend but PyTorch, which they are compared with; and why the others are left out."""
    from ..backends.base import BACKENDS, REFERENCES, missing

    names = [name for name in BACKENDS if name not in REFERENCES]
    reasons = {name: missing(name) for name in names}
    absent = [f"{name} not available: {reason}" for name, reason in reasons.items() if reason]
    for line in absent:
        print_note(line)
    return tuple(name for name, reason in reasons.items() if not reason), tuple(absent)


def _engine_folder(folder: Path, flavour: str) -> Path | None:
    """The folder, made; None, said aloud, where no engine can be built here."""
    from ..errors import BackendUnavailableError, MissingDependencyError
    from ..tensorrt.flavour import get_flavour

    try:
        get_flavour(flavour)
    except (MissingDependencyError, BackendUnavailableError) as exc:
        print_note(f"no engines are built: {exc}")
        return None
    _make_folder(folder)
    return folder


def _show(report: Report) -> None:
    from ..parity.report import repeat_command
    from ..parity.views.tables import backends, branches, draws, matrix

    console = open_console()
    for table in (*matrix(report), backends(report), draws(report), branches(report)):
        if table.rows:
            console.print(table.rich())
            console.print()
    for note in report.notes:
        if " not available: " not in note:  # said before the run
            print_lines([f"sampled: {note}"])
    for cell in report.red[:_SHOWN]:
        failure = cell.failures[0]
        print_lines(
            [
                "",
                f"red: {cell.spec.name} (beta {cell.beta!r}), {cell.route} on {cell.backend}, "
                f"{len(cell.failures)} of {cell.cases} cases",
                f"  {failure.case.family}, {failure.case.layout}, seed {failure.case.seed}: "
                f"{failure.verdict.detail}",
                f"  repeat it: {repeat_command(cell, report.seed)}",
            ]
        )
    if len(report.red) > _SHOWN:
        print_lines([f"and {len(report.red) - _SHOWN} more red cells, in report.json"])
    for build in report.red_builds[:_SHOWN]:
        print_lines([f"red: engine of {build.spec.name}, {build.route}: {build.error}"])


def _write(report: Report, folder: Path, html: bool) -> None:
    """The views of the report: JSON, JUnit XML, Markdown, and HTML where it can be made."""
    from ..artefact import write_atomic
    from ..errors import MissingDependencyError
    from ..parity.views import junit, markdown
    from ..parity.views.html import render

    paths = [
        write_atomic(folder / "report.json", report.to_json().encode()),
        write_atomic(folder / "junit.xml", junit.render(report).encode()),
        write_atomic(folder / "report.md", markdown.render(report).encode()),
    ]
    if html:
        try:
            paths.append(write_atomic(folder / "report.html", render(report).encode()))
        except MissingDependencyError as exc:
            print_note(f"no report.html: {exc}")
    summary = report.summary
    built = f", {summary['builds']} engines built ({summary['red_builds']} red)"
    print_lines(
        [
            "",
            f"{summary['cells']} cells, {summary['draws']} draws, {summary['cases']} cases "
            f"in {summary['seconds']:.0f} s: "
            f"{summary['red']} red{built if report.builds else ''}",
            f"wrote {', '.join(map(str, paths))}",
        ]
    )
