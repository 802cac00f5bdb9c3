"""What every view shows: the report's numbers in words, and in tables.

A `Table` is text in rows; it is written for the terminal and as Markdown here, and as HTML by the
template.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from statistics import median
from typing import TYPE_CHECKING

from ..._records import markdown_table
from ..._spec import LossSpec
from .._contract import Contract
from .._drift import DATA, Drift, DriftPoint
from .._families import BRANCHES
from .._report import Build, Cell, Report, is_extended, mean_shares

if TYPE_CHECKING:
    from rich.table import Table as RichTable
    from rich.text import Text

    from .._verify import Verification
    from .._whole import ModelVerification

# XML 1.0 has no place for these, and a browser drops or replaces them.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
# What no Markdown can be made of, nor a link: a point stands between digits alone.
_HARMLESS = re.compile(r"(?:[\w ,/%=^+–★-]|(?<=\d)\.(?=\d))*")


def clean(text: str) -> str:
    """`text` with every character that XML or UTF-8 can't hold replaced by U+FFFD."""
    return _CONTROL.sub("\ufffd", text)


def plural(count: int, noun: str) -> str:
    """`"1 cell"`, `"2 cells"`; thousands apart."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def beta_text(beta: float) -> str:
    """The shortest text that is this beta and no other."""
    if not math.isfinite(beta):
        return f"{beta:g}"
    digits, exponent = f"{beta:e}".split("e")
    scientific = f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    exact = [text for text in (f"{beta:g}", scientific, repr(beta)) if float(text) == beta]
    return min(exact, key=len)


def variant(spec: LossSpec) -> str:
    """The reduction, and every extension of the spec that is not at its default."""
    words = [spec.reduction]
    for field in fields(spec):
        value = getattr(spec, field.name)
        if field.name in ("beta", "reduction", "dtype") or value == field.default:
            continue
        if field.default is MISSING or not isinstance(value, bool):
            words.append(f"{field.name}={value}")
        else:
            words.append(field.name.replace("_", " "))
    return " ".join(words)


def distance_text(ulp: int) -> str:
    """A distance in four characters or so: 12, 9999, 12k, 3M, 2e9."""
    for limit, divisor, suffix in ((10_000, 1, ""), (10**6, 10**3, "k"), (10**9, 10**6, "M")):
        if ulp < limit:
            return f"{ulp // divisor}{suffix}"
    return f"{ulp:.0e}".replace("e+0", "e").replace("e+", "e")


def finding(cell: Cell) -> str:
    """What the worst case is: `""` (green, or not run), `"class"`, `"error"` or `"distance"`.

    `"error"` is an exception in place of an answer; the detail says which.
    """
    if cell.ok or cell.worst is None:
        return ""
    verdict, sample = cell.worst.verdict, cell.worst.sample
    no_answer = sample is not None and not sample.got
    if no_answer or (not verdict.wrong_class and verdict.ulp <= verdict.allowed):
        return "error"
    return "class" if verdict.wrong_class else "distance"


def measured_text(cell: Cell) -> str:
    """What a table has for the cell: the distance, or `class` or `error`."""
    found = finding(cell)
    return found if found in ("class", "error") else distance_text(cell.ulp)


def representative(cells: Iterable[Cell]) -> Cell | None:
    """The cell to show for several: the reddest, then the furthest off; None if none ran."""
    run = [cell for cell in cells if cell.refused is None]
    if not run:
        return None
    order = ("", "distance", "class", "error")
    return max(run, key=lambda cell: (order.index(finding(cell)), cell.ulp, -cell.allowed))


def family_shares(report: Report) -> dict[str, dict[str, float]]:
    """family -> branch -> share of elements, a mean over the cells with 0 < beta < inf.

    At beta = 0 and beta = inf one branch can't be reached, which says nothing of a family.
    """
    cells = [cell for cell in report.cells if 0 < cell.beta < math.inf]
    names = dict.fromkeys(family for cell in cells for family in cell.families)
    return {
        name: mean_shares([cell.families[name] for cell in cells if name in cell.families])
        for name in names
    }


def by_backend(cells: Iterable[Cell]) -> list[tuple[str, str, list[Cell]]]:
    """The cells of each backend and route, a backend's routes together."""
    groups: dict[str, dict[str, list[Cell]]] = {}
    for cell in cells:
        groups.setdefault(cell.backend, {}).setdefault(cell.route, []).append(cell)
    return [
        (name, route, found) for name, routes in groups.items() for route, found in routes.items()
    ]


# --- cells in rows and columns


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells in rows and columns.

    Attributes:
        corner: what the rows are.
        columns: group and name of each, a group's together.
        rows: the name of each, and for every column the cells there; most often one, or none.
        title, subtitle: what tells it from other grids.
    """

    corner: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, tuple[tuple[Cell, ...], ...]], ...]
    title: str = ""
    subtitle: str = ""

    @classmethod
    def of(
        cls,
        corner: str,
        cells: Sequence[Cell],
        row: Callable[[Cell], str],
        column: Callable[[Cell], tuple[str, str]],
        title: str = "",
        subtitle: str = "",
    ) -> Grid:
        """The cells by what `row` and `column` call them, in the order in which they come."""
        entries: dict[tuple[str, tuple[str, str]], list[Cell]] = {}
        for cell in cells:
            entries.setdefault((row(cell), column(cell)), []).append(cell)
        found = dict.fromkeys(map(column, cells))
        groups = list(dict.fromkeys(group for group, _ in found))
        columns = tuple(sorted(found, key=lambda each: groups.index(each[0])))
        rows = tuple(
            (name, tuple(tuple(entries.get((name, each), ())) for each in columns))
            for name in dict.fromkeys(map(row, cells))
        )
        return cls(corner, columns, rows, title, subtitle)

    @property
    def groups(self) -> Mapping[str, int]:
        """The groups of columns, and how many each has."""
        return Counter(group for group, _ in self.columns)

    @property
    def red(self) -> bool:
        """Whether any cell is."""
        return any(not cell.ok for _, row in self.rows for cells in row for cell in cells)

    def table(self, title: str) -> Table:
        """The worst of each entry's cells, as distance to the oracle / allowed."""
        columns = (f"{group} {name}".strip() for group, name in self.columns)
        rows = [(name, *map(_limit_entry, row)) for name, row in self.rows]
        return Table(title, (self.corner, *columns), rows, "l" + "r" * len(self.columns))


def split(cells: Iterable[Cell]) -> tuple[list[Cell], list[Cell]]:
    """The plain cells, and those of the extensions, by beta; the rest of the order is kept."""
    ordered = sorted(cells, key=lambda cell: cell.beta)
    return (
        [cell for cell in ordered if not is_extended(cell.spec)],
        [cell for cell in ordered if is_extended(cell.spec)],
    )


def beta_of(cell: Cell) -> str:
    """The name of a row or column of one beta."""
    return beta_text(cell.beta)


def variant_of(cell: Cell) -> str:
    """The name of a row or column of one reduction, with its extensions."""
    return variant(cell.spec)


def overviews(report: Report) -> list[Grid]:
    """One grid of all that is plain, and one of all extensions, where there are any."""
    plain, extended = split(report.cells)
    grids = [
        Grid.of("beta", plain, beta_of, lambda cell: (cell.spec.dtype, variant_of(cell))),
        Grid.of("extension", extended, variant_of, lambda cell: ("", cell.spec.dtype)),
    ]
    return [grid for grid in grids if grid.rows]


# --- tables of text


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a table that is good or bad."""

    text: str
    ok: bool


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text, under a title; `align` has a letter a column, `l` or `r`.

    What stands below, and the lines between rows, are the terminal's alone.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Entry | str, ...]]
    align: str
    below: str = ""
    ruled: bool = False

    def rich(self) -> RichTable:
        """For the terminal."""
        from rich.table import Table as RichTable

        table = RichTable(
            title=_rich_entry(self.title),
            title_justify="left",
            caption=_rich_entry(self.below) if self.below else None,
            caption_justify="left",
            show_lines=self.ruled,
        )
        for name, letter in zip(self.columns, self.align, strict=True):
            table.add_column(_rich_entry(name), justify="right" if letter == "r" else "left")
        for row in self.rows:
            table.add_row(*map(_rich_entry, row))
        return table

    def markdown(self) -> list[str]:
        """The lines of GitHub-flavoured Markdown, a blank one at either end."""
        header, *rows = ([*map(_markdown_entry, row)] for row in (self.columns, *self.rows))
        return ["", *markdown_table(header, rows, self.align), ""]


def _rich_entry(entry: Entry | str) -> Text:
    from rich.text import Text

    if isinstance(entry, str):
        return Text(entry)
    return Text(entry.text, style="green" if entry.ok else "bold white on red")


def _markdown_entry(entry: Entry | str) -> str:
    if isinstance(entry, Entry) and not entry.ok:
        return f"❌ **{entry.text}**"
    text = entry if isinstance(entry, str) else entry.text
    return text if _HARMLESS.fullmatch(text) else code(text)


def code(text: str) -> str:
    """A code span of Markdown: nothing in it is markup, a mention or a link."""
    text = " ".join(clean(text).split())
    fence = "`" * (1 + longest_backticks(text))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def longest_backticks(text: str) -> int:
    """The length of the longest run of backticks: a longer one is not closed from inside."""
    return max(map(len, re.findall("`+", text)), default=0)


def _limit_entry(cells: Sequence[Cell]) -> Entry | str:
    """`ulp/allowed`, a star where we are right and PyTorch isn't."""
    worst = representative(cells)
    if worst is None:
        return "–"
    star = "★" if any(cell.better_than_pytorch for cell in cells) else ""
    return Entry(f"{measured_text(worst)}/{distance_text(worst.allowed)}{star}", worst.ok)


def matrix(report: Report) -> list[Table]:
    """The overviews, in text."""
    title = (
        "ULP to the oracle / allowed, the worst of every route and backend "
        "(★ right where PyTorch itself overflows, underflows or makes NaN)"
    )
    titles = (title, "the extensions, likewise")
    return [grid.table(text) for grid, text in zip(overviews(report), titles, strict=False)]


def _row(*entries: Entry | str | int) -> tuple[Entry | str, ...]:
    """A row of a table; thousands stand apart."""
    return tuple(f"{entry:,}" if isinstance(entry, int) else entry for entry in entries)


def _none_wanted(count: int) -> Entry:
    """A count that is good where it is 0."""
    return Entry(f"{count:,}", not count)


def _refusals(reasons: Sequence[str]) -> str:
    """How many there are, and each reason once."""
    return f"{len(reasons):,}: {'; '.join(dict.fromkeys(reasons))}" if reasons else ""


def backends(report: Report) -> Table:
    """One row a backend and route."""
    rows = []
    for backend, route, cells in by_backend(report.cells):
        run = [cell for cell in cells if cell.refused is None]
        red = _none_wanted(sum(not cell.ok for cell in run))
        largest = max((cell.ulp for cell in run), default=0)
        refused = _refusals([cell.refused for cell in cells if cell.refused is not None])
        cases = sum(cell.cases for cell in run)
        rows.append(_row(backend, route, len(run), cases, red, largest, refused))
    columns = ("backend", "route", "cells", "cases", "red", "largest ULP", "not run")
    return Table("backends and routes", columns, rows, "llrrrrl")


def draws(report: Report) -> Table:
    """One row a backend and route that met random draws."""
    rows = []
    for row in report.draws:
        near, red = row.nearest, _none_wanted(len(row.red))
        limit = f"{measured_text(near)}/{distance_text(near.allowed)}, {near.draw}" if near else "–"
        rows.append(_row(row.backend, row.route, row.draws, row.cases, red, row.refused, limit))
    columns = ("backend", "route", "draws", "cases", "red", "not run", "nearest to its limit")
    title = "random combinations; the nearest to its limit as ULP / allowed, number"
    return Table(title, columns, rows, "llrrrrr")


def branches(report: Report) -> Table:
    """The share of elements in each branch, by family; a branch never reached is marked."""
    rows = [
        (name, *(f"{shares[key]:.1%}" if shares[key] else "never" for key in BRANCHES))
        for name, shares in family_shares(report).items()
    ]
    title = "share of elements in each branch, a mean over 0 < beta < inf"
    return Table(title, ("family", *BRANCHES), rows, "l" + "r" * len(BRANCHES))


def engines(builds: Sequence[Build]) -> Table:
    """One row a route: engines built, failed and refused."""
    rows = []
    # A refused build knows only the flavour that was asked for ("auto"): the route joins them.
    for route in dict.fromkeys(build.route for build in builds):
        group = [build for build in builds if build.route == route]
        built = [build for build in group if build.ok and build.refused is None]
        failed = _none_wanted(sum(not build.ok for build in group))
        seconds = f"{median([build.seconds for build in built] or [0.0]):.2f} s"
        largest = bytes_text(max((build.bytes for build in built), default=0))
        flavours = ", ".join(dict.fromkeys(build.flavour for build in built or group))
        refused = _refusals([build.refused for build in group if build.refused is not None])
        rows.append(_row(route, len(built), failed, seconds, largest, flavours, refused))
    columns = ("route", "built", "failed", "median time", "largest", "flavour", "refused")
    return Table("engines", columns, rows, "lrrrrll")


def bytes_text(count: int) -> str:
    """`"512 B"`, `"20 kB"`."""
    return f"{count / 1024:,.0f} kB" if count >= 1024 else f"{count} B"


def drift(measured: Drift) -> Table:
    """The error of every way of computing a mean, at the largest size."""
    size = measured.curves[0].elements[-1] if measured.curves else 0
    rows = [
        (curve.way, curve.data, f"{curve.relative_error[-1]:.1e}", f"{curve.ulp[-1]:,}")
        for curve in measured.curves
    ]
    title = f"`mean`, float32, at {size:,} elements, against the oracle"
    return Table(title, ("way", "data", "relative error", "ULP"), rows, "llrr")


def artefact_drift(points: Sequence[DriftPoint]) -> Table:
    """One row a size and family: error and ULP, measured, PyTorch's, allowed, bound."""
    rows = []
    for point in sorted(points, key=lambda p: (p.output, DATA.index(p.family), p.elements)):
        verdict = point.result.verdict
        errors = (point.relative, point.torch_relative)
        bound = math.inf if point.bound is None else point.bound
        rows.append(
            _row(
                *(point.elements, point.family, point.output),
                *("-" if error is None else f"{error:.1e}" for error in errors),
                Entry("class" if verdict.wrong_class else f"{verdict.ulp:,}", point.ok),
                *(verdict.torch_ulp, verdict.allowed),
                f"{bound:,.1f}" if math.isfinite(bound) else "-",
            )
        )
    numbers = ("error", "PyTorch's", "ULP", "PyTorch's", "allowed", "bound")
    return Table(
        "error of the reduction by size",
        ("elements", "inputs", "output", *numbers),
        rows,
        "rllrrrrrr",
        below="bound: what is proved of the graphs that smoothl1-deploy makes, in ULP",
    )


def verification(found: Verification) -> Table:
    """One row a case: distance to the oracle, PyTorch's own, what is allowed, branches reached."""
    rows = []
    for result in found.results:
        verdict, case = result.verdict, result.case
        word = "better than PyTorch" if verdict.better else "equal"
        numbers = (verdict.ulp, verdict.torch_ulp, verdict.allowed)
        shares = (f"{result.shares[branch]:.0%}" for branch in BRANCHES)
        said = Entry(word if verdict.ok else verdict.detail, verdict.ok)
        rows.append(_row(case.family, case.layout, *numbers, *shares, said))
    likely = ", ".join(item.fault.value for item in found.diagnoses)
    return Table(
        f"{found.name} on {found.backend}",
        ("family", "shape", "ULP", "PyTorch's", "allowed", *BRANCHES, "verdict"),
        rows,
        "llrrrrrrl",
        below=f"most likely: {likely}" if likely else "",
    )


def whole_runs(found: ModelVerification) -> Table:
    """One row an output of the whole model: a loss of what it predicted, or one it had before."""
    rows = []
    for run in found.runs:
        for name, verdict in run.losses.items():
            word = "better than PyTorch" if verdict.better else "equal"
            said = Entry(word if verdict.ok else verdict.detail, verdict.ok)
            numbers = (verdict.ulp, verdict.torch_ulp, verdict.allowed)
            rows.append(_row(run.data, name, *numbers, said))
        for name, same in run.same.items():
            said = Entry("the same bits" if same else "OTHER BITS than before", same)
            rows.append(_row(run.data, name, "", "", "", said))
    columns = ("data", "output", "ULP", "PyTorch's", "allowed", "verdict")
    return Table(f"{found.name}, the whole model on {found.backend}", columns, rows, "llrrrl")


def diagnoses(found: Verification) -> Table:
    """One row a fault: its name, what it does, and the answers that speak for it."""
    rows = [
        (Entry(item.fault.value, False), item.explanation, "\n".join(map(str, item.evidence)))
        for item in found.diagnoses
    ]
    columns = ("fault", "why", "evidence")
    return Table("most likely what is wrong", columns, rows, "lll", ruled=True)


#: What stands before an answer, by its kind.
MARKS: Mapping[str, str] = {
    "reference": "", "equal": "=", "better": "★", "refuses": "⊘", "differs": "≠",
}  # fmt: skip


def contract(probed: Contract) -> Table:
    """The rows in which some column is not PyTorch's equal."""
    rows = [
        (edge.name, *(f"{MARKS[answer.kind]} {cut(answer.text, 80)}" for answer in edge.answers))
        for edge in probed.edges
        if any(answer.kind not in ("reference", "equal") for answer in edge.answers)
    ]
    title = "= as PyTorch, ★ right where PyTorch is not, ⊘ an error instead of an answer, ≠ differs"
    return Table(title, ("edge", *probed.columns), rows, "l" * (1 + len(probed.columns)))


def cut(text: str, limit: int = 300) -> str:
    """`text`, no longer than the limit."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
