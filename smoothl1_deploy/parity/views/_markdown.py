"""A report or a verification as GitHub-flavoured Markdown, short enough for a pull request."""

from __future__ import annotations

import json

from ..._table import Table, code, harmless, longest_backticks
from .._report import Report, repeat_command
from .._verify import Verification
from .._whole import ModelVerification
from . import _tables as tables
from ._tables import cut, plural, spec_text

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
    cells, engines = [], []
    for cell in report.red:
        first, where = cell.failures[0], spec_text(cell.spec, cell.beta)
        cells.append(
            f"- {code(f'{where}; {cell.route} on {cell.backend}')}: "
            f"{plural(len(cell.failures), 'red case')} of {cell.cases}. "
            f"First: {code(f'{first.case.family} {first.case.layout}')} "
            f"{code(cut(first.verdict.detail))}  \n"
            f"  {code(repeat_command(cell, report.seed))}"
        )
    for build in report.red_builds:
        name = code(f"{build.spec.name} {build.route} {build.flavour}")
        engines.append(f"- {name}: {code(cut(build.error or ''))}")
    of_all = "; the full list is in report.json"
    return [*_first("Red cells", cells, of_all), *_first("Failed engines", engines)]


def _first(title: str, items: list[str], of_all: str = "") -> list[str]:
    """The first items under their title, and how many more there are; nothing of none."""
    more = len(items) - _RED_SHOWN
    told = [f"- and {more} more{of_all}"] if more > 0 else []
    return [f"### {title}", *items[:_RED_SHOWN], *told, ""] if items else []


def _section(table: Table) -> list[str]:
    """A table under its title; nothing of one without rows."""
    return [table.title, *table.markdown()] if table.rows else []


def _not_run(found: Report | Verification | ModelVerification) -> list[str]:
    """When and with what, and what this says nothing of."""
    lines = [f"- {what}: {harmless(why)}" for what, why in tables.not_run(found)]
    versions = ", ".join(tables.versions(found.environment))
    return ["", f"{code(found.date)}, {code(versions)}", "", "Not run:", "", *lines, ""]


def render(found: Report | Verification | ModelVerification) -> str:
    """Headline, what was not run, what is red, and tables; the rest folded away."""
    return _of_report(found) if isinstance(found, Report) else _of_verification(found)


def _of_verification(found: Verification | ModelVerification) -> str:
    lines = [f"## {'✅' if found else '❌'} {tables.equal_text(found)}", ""]
    lines.append(f"{code(found.name)} on {code(found.backend)}, sha256 {found.sha256}")
    lines += ["", *(f"- {code(f'{n}: {spec_text(v.spec)}')}" for n, v in found.losses.items())]
    lines += _not_run(found)
    for table in tables.verified(found):
        lines += ["", f"### {harmless(table.title)}", *table.markdown()]
    return "\n".join(lines)


def _of_report(report: Report) -> str:
    lines = [_headline(report), *_not_run(report), *_red(report)]
    shown = [*tables.matrix(report), tables.certainty(report), *tables.pairs(report)]
    shown += [tables.backends(report), tables.draws(report)]
    for table in shown:
        lines += _section(table)
    if report.drift:
        lines += ["### Error against size", *_section(tables.drift(report.drift))]
    if report.contract:
        lines += ["### Contract differences", *_section(tables.contract(report.contract))]
    environment = json.dumps(dict(report.environment), indent=1, ensure_ascii=True)
    fence = "`" * (3 + longest_backticks(environment))
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
