"""The report as GitHub-flavoured Markdown, short enough for a comment on a pull request."""

from __future__ import annotations

import json

from .._report import Report, repeat_command
from . import _tables as tables
from ._tables import beta_text, code, cut, plural, variant

#: GitHub refuses a comment of more than 65,536 characters.
_RED_SHOWN = 20


def _headline(report: Report) -> str:
    counts = report.summary
    parts = [plural(counts["cells"], "cell"), plural(counts["cases"], "case")]
    what = ", ".join([*parts, *([plural(counts["draws"], "draw")] if counts["draws"] else [])])
    if report:
        return f"## ✅ Smooth L1 parity: every one of {what} is equal"
    red = [plural(counts["red"], "red cell")] if counts["red"] else []
    red += [plural(counts["red_builds"], "failed engine")] if counts["red_builds"] else []
    return f"## ❌ Smooth L1 parity: {' and '.join(red)} ({what})"


def _red(report: Report) -> list[str]:
    lines: list[str] = []
    if report.red:
        lines.append("### Red cells")
    for cell in report.red[:_RED_SHOWN]:
        spec, first = cell.spec, cell.failures[0]
        where = f"{spec.dtype}, beta {beta_text(cell.beta)}, {variant(spec)}"
        lines += [
            f"- {code(f'{where}; {cell.route} on {cell.backend}')}: "
            f"{plural(len(cell.failures), 'red case')} of {cell.cases}. "
            f"First: {code(f'{first.case.family} {first.case.layout}')} "
            f"{code(cut(first.verdict.detail))}  ",
            f"  {code(repeat_command(cell, report.seed))}",
        ]
    if len(report.red) > _RED_SHOWN:
        lines.append(f"- and {len(report.red) - _RED_SHOWN} more; the full list is in report.json")
    if report.red_builds:
        lines += ["", "### Failed engines"]
    for build in report.red_builds[:_RED_SHOWN]:
        name = code(f"{build.spec.name} {build.route} {build.flavour}")
        lines.append(f"- {name}: {code(cut(build.error or ''))}")
    if len(report.red_builds) > _RED_SHOWN:
        lines.append(f"- and {len(report.red_builds) - _RED_SHOWN} more")
    return [*lines, ""] if lines else []


def _section(table: tables.Table) -> list[str]:
    """A table under its title; nothing of one without rows."""
    return [table.title, *table.markdown()] if table.rows else []


def render(report: Report) -> str:
    """Headline, red cells and tables; the rest folded away."""
    lines = [_headline(report), "", *_red(report)]
    shown = [*tables.matrix(report), tables.backends(report), tables.draws(report)]
    for table in shown:
        lines += _section(table)
    if report.drift:
        lines += ["### Error against size", *_section(tables.drift(report.drift))]
    if report.contract:
        lines += ["### Contract differences", *_section(tables.contract(report.contract))]
    environment = json.dumps(dict(report.environment), indent=1, ensure_ascii=True)
    fence = "`" * (3 + tables.longest_backticks(environment))
    lines += [
        f"<details><summary>Seed {report.seed}, {report.seconds:.0f} s; environment</summary>",
        "",
        *(f"- {code(note)}" for note in report.notes),
        "",
        f"{fence}json",
        environment,
        fence,
        "",
        "</details>",
    ]
    return "\n".join(lines) + "\n"
