"""The result of a matrix: cells, draws, builds, environment. What a person reads is in `views`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from statistics import fmean
from typing import Any, ClassVar

from .._environment import now
from .._records import Record, grouped, plain
from .._spec import LossSpec
from ._cases import CaseResult
from ._contract import Contract
from ._drift import Drift
from ._pairs import Proof

FORMAT = 1  # is raised when a reader of the JSON would have to change


@dataclass(frozen=True, slots=True)
class Cell(Record):
    """One combination of spec, route and backend over all its cases.

    Attributes:
        beta: what was computed with: the spec's, or with `runtime_beta` the one that was fed; of an
            array of betas the task's, or one of them.
        ulp, torch_ulp, allowed, bound: of the worst case: the failing one, or the one with the
            largest distance to the oracle.
        better_than_pytorch: elements, over all cases, that are right where PyTorch isn't.
        families: share of elements in each branch, by family, as a mean over its cases.
        worst: the case those numbers come from; None where nothing was run.
        failures: every red case.
        refused: why this combination isn't run; None where it is.
        draw: the number of the random draw it is; None in the grid.
    """

    spec: LossSpec
    beta: float
    route: str
    backend: str
    cases: int = 0
    ulp: int = 0
    torch_ulp: int = 0
    allowed: int = 0
    bound: int | None = None
    better_than_pytorch: int = 0
    layouts: tuple[str, ...] = ()
    families: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    worst: CaseResult | None = None
    failures: tuple[CaseResult, ...] = ()
    refused: str | None = None
    draw: int | None = None
    derived: ClassVar = ("ok",)

    @property
    def ok(self) -> bool:
        """Whether no case is red."""
        return not self.failures


def mean_shares(
    shares: Iterable[tuple[str, Mapping[str, float]]],
) -> dict[str, dict[str, float]]:
    """Of each family the mean of its shares, branch by branch."""
    return {
        family: {branch: fmean(each[branch] for each in those) for branch in those[0]}
        for family, those in grouped(shares).items()
    }


def is_extended(spec: LossSpec) -> bool:
    """Whether the spec is more than `torch.nn.SmoothL1Loss`."""
    return spec.beta_shape != () or spec != LossSpec(spec.beta, spec.reduction, spec.dtype)


def cell_of(
    spec: LossSpec, beta: float, route: str, backend: str, results: Sequence[CaseResult]
) -> Cell:
    """Sum up the cases (at least one) of one combination."""
    worst = max(results, key=lambda result: result.verdict.badness)
    # An empty case has no shares to count.
    shares = ((r.case.family, r.shares) for r in results if any(r.shares.values()))
    return Cell(
        spec,
        beta,
        route,
        backend,
        cases=len(results),
        ulp=worst.verdict.ulp,
        torch_ulp=worst.verdict.torch_ulp,
        allowed=worst.verdict.allowed,
        bound=worst.verdict.bound,
        better_than_pytorch=sum(result.verdict.better for result in results),
        layouts=tuple(dict.fromkeys(result.case.layout for result in results)),
        families=mean_shares(shares),
        worst=worst,
        failures=tuple(result for result in results if not result.verdict.ok),
    )


@dataclass(frozen=True, slots=True)
class Build(Record):
    """One engine built from one artefact, or why not."""

    spec: LossSpec
    route: str
    flavour: str
    seconds: float = 0.0
    bytes: int = 0
    refused: str | None = None
    error: str | None = None
    derived: ClassVar = ("ok",)

    @property
    def ok(self) -> bool:
        """Whether it was built, or refused for a reason that holds."""
        return self.error is None


@dataclass(frozen=True, slots=True)
class Draws(Record):
    """The random draws that one backend met by one route, summed up.

    Attributes:
        draws: that were run; `refused`: that were not.
        nearest: the cell that is the nearest to its limit, or over it; None where none was run.
        red: the cells with a failing case.
    """

    backend: str
    route: str
    draws: int
    cases: int
    refused: int
    nearest: Cell | None
    red: tuple[Cell, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: green draws are counted, and only the nearest to its limit is told."""
        near = self.nearest
        shown = near and {"draw": near.draw, "ulp": near.ulp, "allowed": near.allowed}
        return {**Record.to_dict(self), "nearest": shown}


def draws_of(cells: Iterable[Cell]) -> tuple[Draws, ...]:
    """The cells of draws, summed up by backend and route, in the order they come in."""
    found = []
    for key, group in grouped(((cell.backend, cell.route), cell) for cell in cells).items():
        run = [cell for cell in group if cell.refused is None]
        nearest = max(run, key=lambda cell: (not cell.ok, cell.ulp - cell.allowed), default=None)
        cases = sum(cell.cases for cell in run)
        red = tuple(cell for cell in run if not cell.ok)
        found.append(Draws(*key, len(run), cases, len(group) - len(run), nearest, red))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Report:
    """Everything one run of the matrix found. True where no cell and no build is red.

    Attributes:
        cells: of the grid.
        draws: of the random combinations beside it.
        pairs: what `prove` found of every pair of a half format, as it was handed in; it has a
            verdict of its own.
        date: when it was made, ISO 8601, UTC.
    """

    cells: tuple[Cell, ...]
    builds: tuple[Build, ...]
    environment: Mapping[str, Any]
    seed: int
    seconds: float
    notes: tuple[str, ...] = ()
    drift: Drift | None = None
    contract: Contract | None = None
    draws: tuple[Draws, ...] = ()
    pairs: tuple[Proof, ...] = ()
    date: str = field(default_factory=now)

    def __repr__(self) -> str:
        counts = self.summary
        red = f"{counts['red']} red, {counts['refused']} not run, {counts['red_builds']} failed"
        return f"<Report of {counts['cells']} cells, {counts['draws']} draws: {red} engines>"

    def _repr_html_(self) -> str:
        """What a notebook shows: the verdict, and the matrix."""
        from .views._tables import matrix

        return "".join([f"<p>{escape(repr(self))}</p>", *(t.html() for t in matrix(self))])

    def __bool__(self) -> bool:
        return not self.red and not self.red_builds

    @property
    def red(self) -> tuple[Cell, ...]:
        """The cells with a failing case, those of draws last."""
        grid = tuple(cell for cell in self.cells if not cell.ok)
        return (*grid, *(cell for row in self.draws for cell in row.red))

    @property
    def red_builds(self) -> tuple[Build, ...]:
        """The engines that could not be built."""
        return tuple(build for build in self.builds if not build.ok)

    @property
    def summary(self) -> dict[str, Any]:
        """The counts."""
        run = [cell for cell in self.cells if cell.refused is None]
        return {
            "cells": len(run),
            "draws": sum(row.draws for row in self.draws),
            "red": len(self.red),
            "refused": len(self.cells) - len(run),
            "cases": sum(c.cases for c in run) + sum(row.cases for row in self.draws),
            "builds": sum(build.refused is None for build in self.builds),
            "red_builds": len(self.red_builds),
            "seconds": self.seconds,
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, and as `views/schema.json` says."""
        parts = ("date", "seed", "notes", "environment", "cells", "draws", "builds", "pairs")
        return {
            "format": FORMAT,
            "ok": bool(self),
            "summary": self.summary,
            **{name: plain(getattr(self, name)) for name in (*parts, "drift", "contract")},
        }

    def to_json(self) -> str:
        """Strict JSON: an infinite beta is a string, and nothing else is infinite."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"


def repeat_command(cell: Cell, seed: int) -> str:
    """The command that runs this cell, and only it, on the same inputs."""
    spec = cell.spec
    part = ["--draw", str(cell.draw), "--backend", cell.backend]
    if cell.draw is None:
        part = ["--beta", repr(cell.beta), "--reduction", spec.reduction, "--dtype", spec.dtype]
        part += ["--route", cell.route, "--backend", cell.backend]
        part += ["--extensions-only" if is_extended(spec) else "--no-extensions"]
        part += ["--seed", str(seed)]
    return shlex.join(["smoothl1-deploy", "parity", *part, "--no-engines"])
