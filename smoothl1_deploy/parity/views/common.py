"""What the views share: names of things, and the report put in the order people read it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields

from ...spec import LossSpec
from ..report import Cell, Report, mean_shares

__all__ = [
    "DRAW_COLUMNS",
    "BackendRow",
    "backend_rows",
    "beta_text",
    "clean",
    "distance_text",
    "draw_rows",
    "family_shares",
    "finding",
    "measured_text",
    "plural",
    "representative",
    "variant",
]

# XML 1.0 has no place for these, and a browser drops or replaces them.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


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
    """What stands in the cell's place of a table: the distance, or `class` or `error`."""
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


#: Of a table of the random draws, whose rows are `draw_rows`.
DRAW_COLUMNS = ("backend", "route", "draws", "cases", "red", "not run", "nearest to its limit")


def draw_rows(report: Report) -> list[tuple[str, ...]]:
    """One row a backend and route, as text."""
    rows = []
    for row in report.draws:
        near = row.nearest
        limit = f"{measured_text(near)}/{distance_text(near.allowed)}, {near.draw}" if near else "-"
        counts = (row.draws, row.cases, len(row.red), row.refused)
        rows.append((row.backend, row.route, *(f"{count:,}" for count in counts), limit))
    return rows


@dataclass(frozen=True, slots=True)
class BackendRow:
    """One backend with one route, summed up."""

    backend: str
    route: str
    cells: int
    cases: int
    red: int
    ulp: int
    refused: int
    reasons: tuple[str, ...]


def backend_rows(report: Report) -> Sequence[BackendRow]:
    """One row a backend and route, a backend's routes together; `ulp` is the largest of all."""
    rows = []
    pairs = dict.fromkeys((cell.backend, cell.route) for cell in report.cells)
    backends = list(dict.fromkeys(backend for backend, _ in pairs))
    for backend, route in sorted(pairs, key=lambda pair: backends.index(pair[0])):
        cells = [c for c in report.cells if c.backend == backend and c.route == route]
        run = [cell for cell in cells if cell.refused is None]
        rows.append(
            BackendRow(
                backend,
                route,
                len(run),
                sum(cell.cases for cell in run),
                sum(not cell.ok for cell in run),
                max((cell.ulp for cell in run), default=0),
                len(cells) - len(run),
                tuple(dict.fromkeys(cell.refused for cell in cells if cell.refused)),
            )
        )
    return rows
