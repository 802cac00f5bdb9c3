"""The matrix, run: every beta × reduction × dtype × route × backend, over layouts and families.

What it holds is in `plan`; its units run in worker processes.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product

import onnx

from ..backends.base import Backend, Runner, get_backend
from ..environment import environment
from ..errors import SmoothL1DeployError, require
from ..graph.export import ROUTES, export
from ..spec import DTYPES, REDUCTIONS, LossSpec
from .cases import Case, CaseResult, References, check, with_beta
from .engines import build_engines
from .plan import (
    BETAS,
    EXTENSIONS,
    HUGE_BACKENDS,
    OVER_THE_WIRE,
    DrawUnit,
    Matrix,
    Unit,
    artefact_axes,
    draw_is_run,
    is_run,
    is_sampled,
    is_too_slow,
    needs_wider,
)
from .pool import each
from .report import Build, Cell, Report, cell_of, draws_of, is_extended

__all__ = ["BETAS", "EXTENSIONS", "OVER_THE_WIRE", "Matrix", "MatrixInterrupted", "run_matrix"]


class _Artefacts:
    """The exports and loaded runners of one unit, each made once."""

    def __init__(self, backends: dict[str, Backend]) -> None:
        self._backends = backends
        self._models: dict[tuple[object, ...], onnx.ModelProto] = {}
        self._runners: dict[tuple[object, ...], Runner] = {}

    def forget(self) -> None:
        """Let go of the runners, whose sessions keep the memory of the largest call they had."""
        self._runners.clear()

    def model(
        self, spec: LossSpec, route: str, layout: str, any_rank: bool = False
    ) -> onnx.ModelProto:
        """The export for a layout."""
        axes = artefact_axes(spec, route, layout, any_rank)
        key = (spec, route, *axes.values())
        if key not in self._models:
            self._models[key] = export(spec, route, **axes)
        return self._models[key]

    def runner(self, spec: LossSpec, route: str, layout: str, backend: str) -> Runner:
        """The loaded export for a layout."""
        model = self.model(spec, route, layout, self._backends[backend].any_rank)
        key = (model.graph.name, backend)
        if key not in self._runners:
            self._runners[key] = self._backends[backend].load(model)
        return self._runners[key]


#: A combination, as (spec, beta, route, backend).
_Key = tuple[LossSpec, float, str, str]


@dataclass(slots=True)
class _Outcome:
    """What one unit found: the results, or the refusal, of each combination; and its builds."""

    results: dict[_Key, list[CaseResult]]
    refused: dict[_Key, str]
    builds: list[Build]
    drawn: list[Cell]


def _run_unit(unit: Unit | DrawUnit) -> _Outcome:
    return _run_draws(unit) if isinstance(unit, DrawUnit) else _run_grid(unit)


def _run_draws(unit: DrawUnit) -> _Outcome:
    """Every backend on each draw: a cell a draw and backend."""
    backends = [get_backend(name, threads=1) for name in unit.matrix.backends]
    outcome = _Outcome({}, {}, [], [])
    for draw in unit.draws():
        refs = {case: draw.references(case) for case in draw.cases}
        make = cache(draw.model)
        for backend in backends:
            if not draw_is_run(draw, backend.name):
                continue
            reason = backend.refuses(draw.spec)
            chosen = {
                case: ref
                for case, ref in refs.items()
                if not is_too_slow(draw.spec, case, backend)
                and not needs_wider(ref.spec, case, backend.accumulator != "float32")
            }
            key = (draw.spec, draw.beta, draw.route, backend.name)
            if reason is not None:
                outcome.drawn.append(Cell(*key, refused=reason, draw=draw.number))
            elif chosen:
                load = cache(lambda: backend.load(make(backend.any_rank)))  # noqa: B023
                results = [_checked(load, backend, case, ref) for case, ref in chosen.items()]
                outcome.drawn.append(replace(cell_of(*key, results), draw=draw.number))
    return outcome


def _run_grid(unit: Unit) -> _Outcome:
    names = [n for n in unit.matrix.backends if not unit.huge or n in HUGE_BACKENDS]
    backends = {name: get_backend(name, threads=1) for name in names}
    if unit.huge:
        backends = {name: found for name, found in backends.items() if found.slow is None}
    artefacts = _Artefacts(backends)
    outcome = _Outcome({}, {}, [], [])
    for spec in unit.specs():
        for cases in unit.batches(spec):
            _run_cases(unit, spec, cases, backends, artefacts, outcome)
        engines = None if unit.huge else unit.matrix.engines
        # An engine of each extension, not of each with every beta.
        if engines is not None and (not is_extended(spec) or unit.beta == unit.matrix.betas[0]):
            models = {r: artefacts.model(spec, r, "matrix") for r in unit.routes(spec)}
            outcome.builds += build_engines(spec, models, engines, unit.matrix.flavour)
        artefacts.forget()
    return outcome


def _run_cases(
    unit: Unit,
    spec: LossSpec,
    cases: list[Case],
    backends: dict[str, Backend],
    artefacts: _Artefacts,
    outcome: _Outcome,
) -> None:
    """Every route and backend on some cases of one spec; what is found goes into `outcome`."""
    number = with_beta(spec, unit.beta)
    refs = {case: References.of(number, case) for case in cases}
    for route, name in product(unit.routes(spec), backends):
        if not is_sampled(unit, spec, route, name):
            continue
        key = (spec, unit.beta, route, name)
        reason = backends[name].refuses(spec)
        if reason:
            outcome.refused[key] = reason
            continue
        outcome.results.setdefault(key, []).extend(
            _checked(
                partial(artefacts.runner, spec, route, case.layout, name), backends[name], case, ref
            )
            for case, ref in refs.items()
            if is_run(case, route, name)
            and not is_too_slow(spec, case, backends[name])
            and not needs_wider(spec, case, backends[name].accumulator != "float32")
        )
        if unit.huge:
            artefacts.forget()
            gc.collect()


def _checked(
    load: Callable[[], Runner], backend: Backend, case: Case, refs: References
) -> CaseResult:
    try:
        return check(load(), case, refs, backend.accumulator)
    except SmoothL1DeployError as exc:
        # A backend that fails on one case is a red case, not the end of the run.
        return CaseResult.failed(case, refs, f"{type(exc).__name__}: {exc}")


class MatrixInterrupted(KeyboardInterrupt):
    """Ctrl-C while the matrix ran; `report` holds what was done, and its notes what was not."""

    def __init__(self, report: Report) -> None:
        self.report = report


def run_matrix(
    matrix: Matrix,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    seconds: float = math.inf,
) -> Report:
    """Run the matrix.

    Args:
        matrix: which part of it.
        workers: processes; 1 runs everything in this one.
        progress: called with the units done and their number, at the start and after each.
        seconds: after which no unit is begun and, with several workers, those at work are ended;
            the report's notes name what is left out.

    Returns:
        The report, its cells in the order of the matrix, whatever order they finished in.

    Raises:
        MatrixInterrupted: for KeyboardInterrupt, with the report of what was done.
    """
    require("torch", "torch", "the matrix, which compares with PyTorch,")
    started = time.perf_counter()
    units = matrix.units()
    results: dict[_Key, list[CaseResult]] = {}
    refused: dict[_Key, str] = {}
    builds: list[Build] = []
    drawn: list[Cell] = []
    progress(0, len(units))
    undone = dict.fromkeys(units)
    found = each(_run_unit, units, workers, time.monotonic() + seconds)
    interrupted = False
    try:
        # Closing: an interrupt comes here as well as there, and the processes must end.
        with contextlib.closing(found):
            for done, (unit, outcome) in enumerate(found, 1):
                del undone[unit]
                for key, more in outcome.results.items():
                    results.setdefault(key, []).extend(more)
                refused |= outcome.refused
                builds += outcome.builds
                drawn += outcome.drawn
                progress(done, len(units))
    except KeyboardInterrupt:
        interrupted = True
    taken = time.perf_counter() - started

    cells = [cell_of(*key, found) for key, found in results.items()]
    cells += [Cell(*key, refused=reason) for key, reason in refused.items()]

    def order(item: Cell | Build) -> tuple[object, ...]:
        spec, backend = item.spec, getattr(item, "backend", None)
        return (
            is_extended(spec),
            DTYPES.index(spec.dtype),
            getattr(item, "beta", spec.beta),
            REDUCTIONS.index(spec.reduction),
            spec.name,
            ROUTES.index(item.route),
            matrix.backends.index(backend) if backend else 0,
        )

    def by_draw(cell: Cell) -> tuple[object, ...]:
        return matrix.backends.index(cell.backend), ROUTES.index(cell.route), cell.draw

    why = f"interrupted after {taken:.0f} s" if interrupted else f"after {seconds:.0f} s"
    report = Report(
        tuple(sorted(cells, key=order)),
        tuple(sorted(builds, key=order)),
        environment(),
        matrix.seed,
        taken,
        (*matrix.notes(), *_left_out(undone, why)),
        draws=draws_of(sorted(drawn, key=by_draw)),
    )
    if interrupted:
        raise MatrixInterrupted(report)
    return report


def _left_out(units: Iterable[Unit | DrawUnit], why: str) -> list[str]:
    names = [unit.label for unit in units]
    return [f"left out {why}: {', '.join(names)}"] if names else []
