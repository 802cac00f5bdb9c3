"""The report as rich tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from ..families import BRANCHES
from ..report import Cell, Report, is_extended
from .common import (
    DRAW_COLUMNS,
    backend_rows,
    beta_text,
    distance_text,
    draw_rows,
    family_shares,
    measured_text,
    representative,
    variant,
)

__all__ = ["backend_table", "draws_table", "extension_table", "families_table", "matrix_table"]


def _entry(cells: Sequence[Cell]) -> Text:
    """`ulp/allowed`, green or red, a star where we are right and PyTorch isn't."""
    worst = representative(cells)
    if worst is None:
        return Text("-", style="dim")
    star = "*" if any(cell.better for cell in cells) else ""
    style = "green" if worst.ok else "bold white on red"
    return Text(f"{measured_text(worst)}/{distance_text(worst.allowed)}{star}", style=style)


def _betas(cells: Sequence[Cell]) -> list[float]:
    return sorted({cell.beta for cell in cells})


def matrix_table(report: Report) -> Table:
    """beta × reduction for each dtype, the worst over routes and backends in each place."""
    cells = [cell for cell in report.cells if not is_extended(cell.spec)]
    columns = list(dict.fromkeys((cell.spec.dtype, cell.spec.reduction) for cell in cells))
    table = Table(
        title="ULP to the oracle / allowed, the worst of every route and backend",
        title_justify="left",
        caption="* right where PyTorch itself overflows, underflows or makes NaN",
        caption_justify="left",
    )
    table.add_column("beta", justify="right")
    for dtype, reduction in columns:
        table.add_column(f"{dtype}\n{reduction}", justify="right")
    for beta in _betas(cells):
        row = [cell for cell in cells if cell.beta == beta]
        places = (
            [cell for cell in row if (cell.spec.dtype, cell.spec.reduction) == column]
            for column in columns
        )
        table.add_row(beta_text(beta), *map(_entry, places))
    return table


def extension_table(report: Report) -> Table | None:
    """beta × dtype for each extended spec, likewise; None where there is none."""
    cells = [cell for cell in report.cells if is_extended(cell.spec)]
    if not cells:
        return None
    table = Table(title="the extensions, likewise", title_justify="left")
    table.add_column("extension")
    table.add_column("dtype")
    for beta in _betas(cells):
        table.add_column(beta_text(beta), justify="right")
    for name, dtype in dict.fromkeys((variant(cell.spec), cell.spec.dtype) for cell in cells):
        row = [c for c in cells if (variant(c.spec), c.spec.dtype) == (name, dtype)]
        entries = (_entry([cell for cell in row if cell.beta == beta]) for beta in _betas(cells))
        table.add_row(name, dtype, *entries)
    return table


def backend_table(report: Report) -> Table:
    """One row a backend and route: cells, cases, refusals."""
    table = Table()
    for column in ("backend", "route"):
        table.add_column(column)
    for column in ("cells", "cases", "red"):
        table.add_column(column, justify="right")
    table.add_column("not run")
    for row in backend_rows(report):
        red = Text(str(row.red), style="bold red" if row.red else "green")
        reasons = Text(f"{row.refused}: {'; '.join(row.reasons)}" if row.refused else "")
        table.add_row(row.backend, row.route, str(row.cells), str(row.cases), red, reasons)
    return table


def draws_table(report: Report) -> Table | None:
    """One row a backend and route that met random draws; None where there were none."""
    if not report.draws:
        return None
    table = Table(title="random combinations: ULP / allowed, number", title_justify="left")
    for column in DRAW_COLUMNS:
        left = column in ("backend", "route")
        table.add_column(column, justify="left" if left else "right")
    for row, cells in zip(draw_rows(report), report.draws, strict=True):
        table.add_row(*row, style="bold red" if cells.red else "")
    return table


def families_table(report: Report) -> Table:
    """The share of elements in each branch, by family; a branch never reached is marked."""
    table = Table(
        title="share of elements in each branch, a mean over 0 < beta < inf", title_justify="left"
    )
    table.add_column("family")
    for branch in BRANCHES:
        table.add_column(branch, justify="right")
    for name, shares in family_shares(report).items():
        entries = (
            Text("never", style="yellow") if shares[branch] == 0 else Text(f"{shares[branch]:.1%}")
            for branch in BRANCHES
        )
        table.add_row(name, *entries)
    return table
