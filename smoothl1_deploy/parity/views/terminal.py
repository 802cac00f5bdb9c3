"""The report as rich tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from ..families import BRANCHES
from ..report import Cell, Report
from .common import (
    backend_rows,
    beta_text,
    distance_text,
    family_shares,
    measured_text,
    representative,
    variant,
)

__all__ = ["backend_table", "families_table", "matrix_table"]


def _entry(cells: Sequence[Cell]) -> Text:
    """`ulp/allowed`, green or red, a star where we are right and PyTorch isn't."""
    worst = representative(cells)
    if worst is None:
        return Text("-", style="dim")
    star = "*" if any(cell.better for cell in cells) else ""
    style = "green" if worst.ok else "bold white on red"
    return Text(f"{measured_text(worst)}/{distance_text(worst.allowed)}{star}", style=style)


def matrix_table(report: Report) -> Table:
    """beta × reduction for each dtype, the worst over routes and backends in each place."""
    columns = list(dict.fromkeys((cell.spec.dtype, variant(cell.spec)) for cell in report.cells))
    table = Table(
        title="ULP to the oracle / allowed, the worst of every route and backend",
        title_justify="left",
        caption="* right where PyTorch itself overflows, underflows or makes NaN",
        caption_justify="left",
    )
    table.add_column("beta", justify="right")
    for dtype, name in columns:
        table.add_column(f"{dtype}\n{name}", justify="right")
    for beta in dict.fromkeys(cell.spec.beta for cell in report.cells):
        row = [cell for cell in report.cells if cell.spec.beta == beta]
        places = (
            [cell for cell in row if (cell.spec.dtype, variant(cell.spec)) == column]
            for column in columns
        )
        table.add_row(beta_text(beta), *map(_entry, places))
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
