"""The report as one HTML file: no network, no other file, readable without a script.

Everything that comes from a run (names, details of failures, versions) is escaped by jinja2;
the style sheet, the script and the drawing are this package's own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from statistics import median
from typing import Any

from ...errors import require
from ..compare import REDUCTION_FLOOR
from ..contract import KINDS, Contract
from ..drift import Drift
from ..families import BRANCHES
from ..report import Build, Cell, Report, repeat_command
from .common import (
    DRAW_COLUMNS,
    backend_rows,
    beta_text,
    clean,
    draw_rows,
    family_shares,
    finding,
    measured_text,
    plural,
    variant,
)
from .glossary import BACKENDS, ROUTES, family_meaning, layout_meaning
from .heatmap import STEPS, cell_ids, maps_by_dtype, overviews
from .plot import curves_svg

__all__ = ["render"]

_FAILURES_SHOWN = 30  # a panel; all of them are in the JSON
_RED_SHOWN = 10  # at the top of the page; the others are folded away


@dataclass(frozen=True, slots=True)
class _Panel:
    """What a click on a cell shows."""

    anchor: str
    cell: Cell
    beta: str
    variant: str
    measured: str
    repeat: str


def _panels(report: Report, ids: Mapping[int, str]) -> list[_Panel]:
    return [
        _Panel(
            ids[id(cell)],
            cell,
            beta_text(cell.beta),
            variant(cell.spec),
            measured_text(cell) if finding(cell) in ("class", "error") else f"{cell.ulp:,}",
            repeat_command(cell, report.seed),
        )
        for cell in _shown(report)
    ]


def _shown(report: Report) -> list[Cell]:
    """The cells that have a panel: those of the grid, and of the draws those that are red."""
    return [*report.cells, *(cell for row in report.draws for cell in row.red)]


@dataclass(frozen=True, slots=True)
class _Engines:
    """The engines of one flavour and route, summed up."""

    flavour: str
    route: str
    built: int
    refused: int
    reasons: tuple[str, ...]
    failed: tuple[Build, ...]
    seconds: float
    largest: int


def _engines(builds: Sequence[Build]) -> list[_Engines]:
    rows = []
    # A refused build knows only the flavour that was asked for ("auto"): the route joins them.
    for route in dict.fromkeys(build.route for build in builds):
        group = [build for build in builds if build.route == route]
        built = [build for build in group if build.ok and build.refused is None]
        refused = [build for build in group if build.refused is not None]
        flavours = dict.fromkeys(build.flavour for build in built or group)
        rows.append(
            _Engines(
                ", ".join(flavours),
                route,
                len(built),
                len(refused),
                tuple(dict.fromkeys(build.refused for build in refused if build.refused)),
                tuple(build for build in group if not build.ok),
                median([build.seconds for build in built]) if built else 0.0,
                max((build.bytes for build in built), default=0),
            )
        )
    return rows


def _meant(meanings: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """The meanings of the names that occur, in the order of the glossary."""
    present = set(names)
    return {name: meaning for name, meaning in meanings.items() if name in present}


def _layouts(report: Report) -> dict[str, str]:
    names = dict.fromkeys(layout for cell in report.cells for layout in cell.layouts)
    return {name: layout_meaning(name) for name in names}


def _bytes(count: int) -> str:
    return f"{count / 1024:,.0f} kB" if count >= 1024 else f"{count} B"


def _asset(name: str) -> str:
    return files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


def _environment() -> Any:
    jinja2 = require("jinja2", "report", "the HTML report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: (
            clean(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
        ),
    )
    environment.filters |= {"plural": plural, "bytes": _bytes}
    return environment


def render(report: Report, drift: Drift | None = None, contract: Contract | None = None) -> str:
    """The whole document.

    Args:
        report: of `run_matrix`.
        drift: the curves; by default those the report carries.
        contract: the table of differences; likewise.

    Raises:
        MissingDependencyError: without jinja2, or without matplotlib where there are curves.
    """
    environment = _environment()
    import markupsafe  # jinja2's own dependency

    drift = report.drift if drift is None else drift
    contract = report.contract if contract is None else contract
    ids = cell_ids(_shown(report))
    script = _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    panels = _panels(report, ids)
    document: str = environment.get_template("report.html.j2").render(
        report=report,
        summary=report.summary,
        panels=panels,
        red=[panel for panel in panels if not panel.cell.ok],
        overviews=overviews(report, ids),
        maps=maps_by_dtype(report, ids),
        steps=[label for _, label in STEPS],
        backends=backend_rows(report),
        draws=draw_rows(report),
        draw_columns=DRAW_COLUMNS,
        shares=family_shares(report),
        branches=BRANCHES,
        routes_meant=_meant(ROUTES, (cell.route for cell in report.cells)),
        backends_meant=_meant(BACKENDS, (cell.backend for cell in report.cells)),
        layouts_meant=_layouts(report),
        family_meaning=family_meaning,
        engines=_engines(report.builds),
        drift=drift,
        curves={k: markupsafe.Markup(v) for k, v in curves_svg(drift).items()} if drift else {},
        contract=contract,
        kinds=KINDS,
        floor=REDUCTION_FLOOR,
        better=sum(cell.better for cell in report.cells),
        worst=max((cell.ulp for cell in report.cells if cell.ok), default=0),
        failures_shown=_FAILURES_SHOWN,
        red_shown=_RED_SHOWN,
        style=markupsafe.Markup(_asset("report.css")),
        script=markupsafe.Markup(script),
        script_hash=digest,
    )
    return document.lstrip() + "\n"
