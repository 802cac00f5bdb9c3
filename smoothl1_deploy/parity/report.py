"""The result of a matrix: cells, builds, environment; JSON and tables are views of it."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from rich.table import Table
from rich.text import Text

from ..spec import LossSpec
from .cases import CaseResult
from .families import BRANCHES

__all__ = [
    "Build",
    "Cell",
    "Report",
    "backend_table",
    "cell_of",
    "extension_table",
    "families_table",
    "is_extended",
    "matrix_table",
    "repeat_command",
]

FORMAT = 1  # of the JSON; raised when a reader would have to change


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination of spec, route and backend over all its cases.

    Attributes:
        beta: what was computed with: the spec's, or with `runtime_beta` the one that was fed.
        ulp, torch_ulp, allowed: of the worst case: the failing one, or the one with the largest
            distance to the oracle.
        better: elements, over all cases, that are right where PyTorch isn't.
        families: share of elements in each branch, by family, as a mean over its cases.
        worst: the case those numbers come from; None where nothing was run.
        failures: every red case.
        refused: why this combination isn't run; None where it is.
    """

    spec: LossSpec
    beta: float
    route: str
    backend: str
    cases: int = 0
    ulp: int = 0
    torch_ulp: int = 0
    allowed: int = 0
    better: int = 0
    layouts: tuple[str, ...] = ()
    families: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    worst: CaseResult | None = None
    failures: tuple[CaseResult, ...] = ()
    refused: str | None = None

    @property
    def ok(self) -> bool:
        """Whether no case is red."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "spec": self.spec.to_dict(),
            "beta": "inf" if math.isinf(self.beta) else self.beta,
            "route": self.route,
            "backend": self.backend,
            "ok": self.ok,
            "refused": self.refused,
            "cases": self.cases,
            "layouts": list(self.layouts),
            "ulp": self.ulp,
            "torch_ulp": self.torch_ulp,
            "allowed": self.allowed,
            "better_than_pytorch": self.better,
            "worst": self.worst.to_dict() if self.worst else None,
            "failures": [result.to_dict() for result in self.failures],
            "families": {name: dict(shares) for name, shares in self.families.items()},
        }


def _mean_shares(shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {branch: fmean(each[branch] for each in shares) for branch in shares[0]}


def is_extended(spec: LossSpec) -> bool:
    """Whether the spec is more than `torch.nn.SmoothL1Loss`."""
    return spec != LossSpec(spec.beta, spec.reduction, spec.dtype)


def cell_of(
    spec: LossSpec, beta: float, route: str, backend: str, results: Sequence[CaseResult]
) -> Cell:
    """Sum up the cases (at least one) of one combination."""
    failures = tuple(result for result in results if not result.verdict.ok)
    worst = max(failures or results, key=lambda r: (r.verdict.wrong_class > 0, r.verdict.ulp))
    by_family: dict[str, list[Mapping[str, float]]] = {}
    for result in results:
        if any(result.shares.values()):  # an empty case has none to count
            by_family.setdefault(result.case.family, []).append(result.shares)
    families = {family: _mean_shares(shares) for family, shares in by_family.items()}
    return Cell(
        spec,
        beta,
        route,
        backend,
        cases=len(results),
        ulp=worst.verdict.ulp,
        torch_ulp=worst.verdict.torch_ulp,
        allowed=worst.verdict.allowed,
        better=sum(result.verdict.better for result in results),
        layouts=tuple(dict.fromkeys(result.case.layout for result in results)),
        families=families,
        worst=worst,
        failures=failures,
    )


@dataclass(frozen=True, slots=True)
class Build:
    """One engine built from one artefact, or why not."""

    spec: LossSpec
    route: str
    flavour: str
    seconds: float = 0.0
    bytes: int = 0
    refused: str | None = None
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether it was built, or refused for a reason that holds."""
        return self.error is None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "spec": self.spec.to_dict(),
            "route": self.route,
            "flavour": self.flavour,
            "ok": self.ok,
            "seconds": round(self.seconds, 4),
            "bytes": self.bytes,
            "refused": self.refused,
            "error": self.error,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """Everything one run of the matrix found. True where no cell and no build is red."""

    cells: tuple[Cell, ...]
    builds: tuple[Build, ...]
    environment: Mapping[str, Any]
    seed: int
    seconds: float
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return all(cell.ok for cell in self.cells) and all(build.ok for build in self.builds)

    @property
    def red(self) -> tuple[Cell, ...]:
        """The cells with a failing case."""
        return tuple(cell for cell in self.cells if not cell.ok)

    @property
    def red_builds(self) -> tuple[Build, ...]:
        """The engines that could not be built."""
        return tuple(build for build in self.builds if not build.ok)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        run = [cell for cell in self.cells if cell.refused is None]
        return {
            "format": FORMAT,
            "ok": bool(self),
            "summary": {
                "cells": len(run),
                "red": len(self.red),
                "refused": len(self.cells) - len(run),
                "cases": sum(cell.cases for cell in run),
                "builds": sum(build.refused is None for build in self.builds),
                "red_builds": len(self.red_builds),
                "seconds": round(self.seconds, 2),
            },
            "seed": self.seed,
            "notes": list(self.notes),
            "environment": dict(self.environment),
            "cells": [cell.to_dict() for cell in self.cells],
            "builds": [build.to_dict() for build in self.builds],
        }

    def to_json(self) -> str:
        """Strict JSON: an infinite beta is a string, and nothing else is infinite."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"


def repeat_command(cell: Cell, seed: int) -> str:
    """The command that runs this cell, and only it, on the same inputs."""
    spec = cell.spec
    words = ["smoothl1-deploy", "parity", "--beta", repr(cell.beta), "--reduction", spec.reduction]
    words += ["--dtype", spec.dtype, "--route", cell.route, "--backend", cell.backend]
    words += ["--extensions-only"] if is_extended(spec) else ["--no-extensions"]
    return shlex.join([*words, "--seed", str(seed), "--no-engines"])


def _beta(beta: float) -> str:
    return "inf" if math.isinf(beta) else f"{beta:g}"


def _entry(cells: Sequence[Cell]) -> Text:
    """`ulp/allowed`, green or red, a star where we are right and PyTorch isn't."""
    run = [cell for cell in cells if cell.refused is None]
    if not run:
        return Text("-", style="dim")
    worst = max(run, key=lambda cell: (not cell.ok, cell.ulp - cell.allowed))
    star = "*" if any(cell.better for cell in run) else ""
    style = "green" if all(cell.ok for cell in run) else "bold white on red"
    wrong = worst.worst is not None and worst.worst.verdict.wrong_class > 0
    return Text(f"{'class' if wrong else worst.ulp}/{worst.allowed}{star}", style=style)


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
    for beta in dict.fromkeys(cell.beta for cell in cells):
        places = (
            [c for c in cells if c.spec == LossSpec(beta, reduction, dtype)]
            for dtype, reduction in columns
        )
        table.add_row(_beta(beta), *map(_entry, places))
    return table


def extension_table(report: Report) -> Table | None:
    """beta × dtype for each extended spec, likewise; None where there is none."""
    cells = [cell for cell in report.cells if is_extended(cell.spec)]
    if not cells:
        return None
    betas = sorted({cell.beta for cell in cells})
    table = Table(title="the extensions, likewise", title_justify="left")
    table.add_column("extension")
    table.add_column("dtype")
    for beta in betas:
        table.add_column(_beta(beta), justify="right")
    for spec in dict.fromkeys(replace(cell.spec, beta=1.0) for cell in cells):
        row = [cell for cell in cells if replace(cell.spec, beta=1.0) == spec]
        entries = (_entry([cell for cell in row if cell.beta == beta]) for beta in betas)
        table.add_row(_extensions(spec), spec.dtype, *entries)
    return table


def _extensions(spec: LossSpec) -> str:
    """`mean per_sample weight=count`."""
    words = [name for name in ("per_sample", "gradient", "runtime_beta") if getattr(spec, name)]
    words += [f"weight={spec.weight}"] if spec.weight else []
    return " ".join([spec.reduction, *words])


def backend_table(report: Report) -> Table:
    """One row a backend and route: cells, cases, refusals."""
    table = Table()
    for column, justify in (
        ("backend", "left"),
        ("route", "left"),
        ("cells", "right"),
        ("cases", "right"),
        ("red", "right"),
        ("not run", "left"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for backend, route in dict.fromkeys((cell.backend, cell.route) for cell in report.cells):
        cells = [c for c in report.cells if c.backend == backend and c.route == route]
        run = [cell for cell in cells if cell.refused is None]
        red = sum(not cell.ok for cell in run)
        refused = dict.fromkeys(cell.refused for cell in cells if cell.refused)
        reasons = f"{len(cells) - len(run)}: {'; '.join(map(str, refused))}" if refused else ""
        table.add_row(
            backend,
            route,
            str(len(run)),
            str(sum(cell.cases for cell in run)),
            Text(str(red), style="bold red" if red else "green"),
            reasons,
        )
    return table


def families_table(report: Report) -> Table:
    """The share of elements in each branch, by family; a branch never reached is marked."""
    cells = [cell for cell in report.cells if 0 < cell.beta < math.inf]
    names = list(dict.fromkeys(family for cell in cells for family in cell.families))
    table = Table(
        title="share of elements in each branch, a mean over 0 < beta < inf", title_justify="left"
    )
    table.add_column("family")
    for branch in BRANCHES:
        table.add_column(branch, justify="right")
    for name in names:
        shares = _mean_shares([cell.families[name] for cell in cells if name in cell.families])
        table.add_row(
            name,
            *(
                Text("never", style="yellow") if share == 0 else Text(f"{share:.1%}")
                for share in (shares[branch] for branch in BRANCHES)
            ),
        )
    return table
