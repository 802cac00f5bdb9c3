"""The report as GitHub-flavoured Markdown, short enough for a comment on a pull request."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence

from ..contract import Contract
from ..drift import Drift
from ..report import Cell, Report, is_extended, repeat_command
from .common import (
    DRAW_COLUMNS,
    backend_rows,
    beta_text,
    clean,
    distance_text,
    draw_rows,
    measured_text,
    plural,
    representative,
    variant,
)

__all__ = ["render"]

#: GitHub refuses a comment of more than 65,536 characters.
_RED_SHOWN = 20


def _code(text: str) -> str:
    """A code span: nothing in it is markup, a mention or a link."""
    text = " ".join(clean(text).split())
    fence = "`" * (1 + max((len(run) for run in _backticks(text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _backticks(text: str) -> list[str]:
    return "".join(c if c == "`" else " " for c in text).split()


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> list[str]:
    """`align` has a letter a column: l or r."""
    rule = ("---:" if letter == "r" else "---" for letter in align)
    lines = (header, list(rule), *rows)
    # A pipe ends a table cell, inside a code span too.
    escaped = ([entry.replace("|", "\\|") for entry in line] for line in lines)
    return ["", *(f"| {' | '.join(line)} |" for line in escaped), ""]


def _cut(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _headline(report: Report) -> str:
    counts = report.summary
    parts = [plural(counts["cells"], "cell"), plural(counts["cases"], "case")]
    what = ", ".join([*parts, *([plural(counts["draws"], "draw")] if counts["draws"] else [])])
    if report:
        return f"## ✅ Smooth L1 parity: every one of {what} is equal"
    red = [plural(counts["red"], "red cell")] if counts["red"] else []
    red += [plural(counts["red_builds"], "failed engine")] if counts["red_builds"] else []
    return f"## ❌ Smooth L1 parity: {' and '.join(red)} ({what})"


def _entry(cells: Sequence[Cell]) -> str:
    worst = representative(cells)
    if worst is None:
        return "–"
    star = "\\*" if any(cell.better for cell in cells) else ""
    text = f"{measured_text(worst)}/{distance_text(worst.allowed)}{star}"
    return text if worst.ok else f"❌ **{text}**"


def _grid(
    corner: str, cells: Sequence[Cell], row: Callable[[Cell], str], column: Callable[[Cell], str]
) -> list[str]:
    """A table of the worst cell of each row and column, both in the order of `cells`."""
    columns = list(dict.fromkeys(map(column, cells)))
    rows = [
        [name, *(_entry([c for c in cells if (row(c), column(c)) == (name, x)]) for x in columns)]
        for name in dict.fromkeys(map(row, cells))
    ]
    return _table([corner, *columns], rows, "r" * (1 + len(columns)))


def _matrix(report: Report) -> list[str]:
    lines = [
        "ULP to the oracle / allowed, the worst of every route and backend "
        "(\\* right where PyTorch itself overflows, underflows or makes NaN):"
    ]
    plain = [cell for cell in report.cells if not is_extended(cell.spec)]
    if plain:
        lines += _grid(
            "beta",
            plain,
            lambda cell: beta_text(cell.beta),
            lambda cell: f"{cell.spec.dtype} {cell.spec.reduction}",
        )
    extended = [cell for cell in report.cells if is_extended(cell.spec)]
    if extended:
        lines += _grid(
            "extension, every beta",
            extended,
            lambda cell: variant(cell.spec),
            lambda cell: cell.spec.dtype,
        )
    return lines


def _red(report: Report) -> list[str]:
    lines: list[str] = []
    if report.red:
        lines.append("### Red cells")
    for cell in report.red[:_RED_SHOWN]:
        spec, first = cell.spec, cell.failures[0]
        where = f"{spec.dtype}, beta {beta_text(cell.beta)}, {variant(spec)}"
        lines += [
            f"- {_code(f'{where}; {cell.route} on {cell.backend}')}: "
            f"{plural(len(cell.failures), 'red case')} of {cell.cases}. "
            f"First: {_code(f'{first.case.family} {first.case.layout}')} "
            f"{_code(_cut(first.verdict.detail))}  ",
            f"  {_code(repeat_command(cell, report.seed))}",
        ]
    if len(report.red) > _RED_SHOWN:
        lines.append(f"- and {len(report.red) - _RED_SHOWN} more; the full list is in report.json")
    if report.red_builds:
        lines += ["", "### Failed engines"]
    for build in report.red_builds[:_RED_SHOWN]:
        name = _code(f"{build.spec.name} {build.route} {build.flavour}")
        lines.append(f"- {name}: {_code(_cut(build.error or ''))}")
    if len(report.red_builds) > _RED_SHOWN:
        lines.append(f"- and {len(report.red_builds) - _RED_SHOWN} more")
    return [*lines, ""] if lines else []


def _drift(drift: Drift) -> list[str]:
    rows = [
        [_code(c.way), c.data, f"{c.relative_error[-1]:.1e}", f"{c.ulp[-1]:,}"]
        for c in drift.curves
    ]
    size = drift.curves[0].elements[-1] if drift.curves else 0
    return [
        "### Error against size",
        f"`mean`, float32, at {size:,} elements, against the oracle:",
        *_table(["", "data", "relative error", "ULP"], rows, "llrr"),
    ]


def _contract(contract: Contract) -> list[str]:
    """The rows in which some column is not PyTorch's equal."""
    rows = [
        [edge.name, *(f"{_MARK[a.kind]}{_code(_cut(a.text, 80))}" for a in edge.answers)]
        for edge in contract.edges
        if any(answer.kind not in ("reference", "equal") for answer in edge.answers)
    ]
    if not rows:
        return []
    header = ["", *map(_code, contract.columns)]
    return [
        "### Contract differences",
        "= as PyTorch, ★ right where PyTorch is not, ⊘ an error instead of an answer, ≠ differs",
        *_table(header, rows, "l" * len(header)),
    ]


_MARK = {"reference": "", "equal": "= ", "better": "★ ", "refuses": "⊘ ", "differs": "≠ "}


def render(report: Report) -> str:
    """Headline, matrix and red cells; the rest folded away."""
    backends = [
        [
            _code(row.backend),
            _code(row.route),
            f"{row.cells:,}",
            f"{row.cases:,}",
            f"❌ **{row.red}**" if row.red else "0",
            "; ".join(map(_code, row.reasons)) if row.refused else "",
        ]
        for row in backend_rows(report)
    ]
    lines = [_headline(report), "", *_red(report), *_matrix(report)]
    header = ["backend", "route", "cells", "cases", "red", "not run"]
    lines += _table(header, backends, "llrrrl")
    if report.draws:
        lines += ["Random combinations:", *_table(DRAW_COLUMNS, draw_rows(report), "llrrrrr")]
    lines += _drift(report.drift) if report.drift else []
    lines += _contract(report.contract) if report.contract else []
    environment = json.dumps(dict(report.environment), indent=1, ensure_ascii=True)
    # A fence longer than any run of backticks inside can't be closed from inside.
    fence = "`" * (3 + max((len(run) for run in _backticks(environment)), default=0))
    lines += [
        f"<details><summary>Seed {report.seed}, {report.seconds:.0f} s; environment</summary>",
        "",
        *(f"- {_code(note)}" for note in report.notes),
        "",
        f"{fence}json",
        environment,
        fence,
        "",
        "</details>",
    ]
    return "\n".join(lines) + "\n"
