"""The matrix, run: every beta × reduction × dtype × route × backend, over layouts and families.

What it holds is in `plan`; its units run in worker processes.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import product
from pathlib import Path

import onnx

from ..backends.base import Backend, Runner, get_backend
from ..environment import environment
from ..errors import SmoothL1DeployError, UnsupportedError, require
from ..graph.export import ROUTES, export
from ..graph.shapes import Shape as Axes
from ..spec import DTYPES, REDUCTIONS, LossSpec
from .cases import CaseResult, References, check, unanswered, with_beta
from .plan import HUGE_BACKENDS, DrawUnit, Unit, artefact_axes, is_run, is_spared
from .plan import Matrix as Matrix
from .pool import each
from .report import Build, Cell, Report, cell_of, draws_of, is_extended

#: A combination, as (spec, beta, route, backend).
_Key = tuple[LossSpec, float, str, str]


@dataclass(slots=True)
class _Outcome:
    """What units found: the results, or the refusal, of each combination; draws; and builds."""

    results: dict[_Key, list[CaseResult]] = field(default_factory=lambda: defaultdict(list))
    refused: dict[_Key, str] = field(default_factory=dict)
    builds: list[Build] = field(default_factory=list)
    drawn: list[Cell] = field(default_factory=list)

    def add(self, other: _Outcome) -> None:
        for key, results in other.results.items():
            self.results[key] += results
        self.refused |= other.refused
        self.builds += other.builds
        self.drawn += other.drawn


def _run_unit(unit: Unit | DrawUnit) -> _Outcome:
    return _run_draws(unit) if isinstance(unit, DrawUnit) else _run_grid(unit)


def _run_draws(unit: DrawUnit) -> _Outcome:
    """Every backend on each draw: a cell a draw and backend."""
    backends = [get_backend(name, threads=1) for name in unit.matrix.backends]
    outcome = _Outcome()
    for draw in unit.draws():
        references = [draw.references(case) for case in draw.cases]
        make = cache(draw.model)
        for backend in backends:
            if not unit.samples(draw, backend.name):
                continue
            key = (draw.spec, draw.beta, draw.route, backend.name)
            reason = backend.refuses(draw.spec)
            if reason is not None:
                outcome.drawn.append(Cell(*key, refused=reason, draw=draw.number))
                continue
            load = cache(lambda: backend.load(make(backend.any_rank)))  # noqa: B023
            results = [
                _checked(load, backend, refs)
                for refs in references
                if not is_spared(refs.spec, refs.case, backend)
            ]
            if results:
                outcome.drawn.append(replace(cell_of(*key, results), draw=draw.number))
    return outcome


def _run_grid(unit: Unit) -> _Outcome:
    """Every route and backend on every spec of the unit; exports and runners are made once."""
    matrix = unit.matrix
    names = [n for n in matrix.backends if not unit.huge or n in HUGE_BACKENDS]
    backends = {name: get_backend(name, threads=1) for name in names}
    if unit.huge:
        backends = {name: found for name, found in backends.items() if found.slow is None}
    make = cache(export)

    @cache
    def load(name: str, spec: LossSpec, route: str, **axes: Axes | None) -> Runner:
        return backends[name].load(make(spec, route, **axes))

    outcome = _Outcome()
    for spec in unit.specs():
        for batch in unit.batches(spec):
            references = [References.of(with_beta(spec, unit.beta), case) for case in batch]
            for route, (name, backend) in product(unit.routes(spec), backends.items()):
                if not unit.samples(spec, route, name):
                    continue
                key = (spec, unit.beta, route, name)
                reason = backend.refuses(spec)
                if reason:
                    outcome.refused[key] = reason
                    continue
                for refs in references:
                    case = refs.case
                    if is_run(case, route, name) and not is_spared(spec, case, backend):
                        axes = artefact_axes(spec, route, case.layout, backend.any_rank)
                        loaded = partial(load, name, spec, route, **axes)
                        outcome.results[key].append(_checked(loaded, backend, refs))
                if unit.huge:  # a session keeps the memory of the largest call that it had
                    load.cache_clear()
                    gc.collect()
        # An engine of each extension, not of each with every beta.
        of_it = not is_extended(spec) or unit.beta == matrix.betas[0]
        if matrix.engines is not None and of_it and not unit.huge:
            for route in unit.routes(spec):
                model = make(spec, route, **artefact_axes(spec, route, "matrix", any_rank=False))
                outcome.builds.append(_build(spec, route, model, matrix.engines))
        load.cache_clear()
    return outcome


def _checked(load: Callable[[], Runner], backend: Backend, refs: References) -> CaseResult:
    try:
        runner = load()
    except SmoothL1DeployError as exc:
        # A backend that can't load one artefact is a red case, not the end of the run.
        return CaseResult.of(refs, unanswered(refs, exc))
    return check(runner, refs, backend.accumulator)


def _build(spec: LossSpec, route: str, model: onnx.ModelProto, folder: Path) -> Build:
    """A TensorRT engine in `folder`; a refusal is a result, a failure a red one."""
    from ..tensorrt.builder import build_engine

    started = time.perf_counter()
    path = folder / f"{model.graph.name}.engine"
    try:
        engine = build_engine(model, path)
    except UnsupportedError as exc:
        return Build(spec, route, "auto", refused=str(exc))
    except SmoothL1DeployError as exc:
        return Build(spec, route, "auto", error=f"{type(exc).__name__}: {exc}")
    assert engine.sidecar is not None  # built just now
    seconds = time.perf_counter() - started
    return Build(spec, route, engine.sidecar.flavour, seconds, path.stat().st_size)


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
    progress(0, len(units))
    undone = dict.fromkeys(units)
    total = _Outcome()
    found = each(_run_unit, units, workers, time.monotonic() + seconds)
    interrupted = False
    try:
        # Closing: an interrupt comes here as well as there, and the processes must end.
        with contextlib.closing(found):
            for done, (unit, outcome) in enumerate(found, 1):
                del undone[unit]
                total.add(outcome)
                progress(done, len(units))
    except KeyboardInterrupt:
        interrupted = True
    taken = time.perf_counter() - started
    why = f"interrupted after {taken:.0f} s" if interrupted else f"after {seconds:.0f} s"
    report = _report(matrix, total, taken, _left_out(undone, why))
    if interrupted:
        raise MatrixInterrupted(report)
    return report


def _report(matrix: Matrix, found: _Outcome, taken: float, left_out: list[str]) -> Report:
    """The cells and builds in the order of the matrix."""

    def place(cell: Cell | Build) -> tuple[object, ...]:
        spec, backend = cell.spec, getattr(cell, "backend", None)
        return (
            is_extended(spec),
            DTYPES.index(spec.dtype),
            getattr(cell, "beta", spec.beta),
            REDUCTIONS.index(spec.reduction),
            spec.name,
            ROUTES.index(cell.route),
            matrix.backends.index(backend) if backend else 0,
        )

    def place_of_draw(cell: Cell) -> tuple[object, ...]:
        return matrix.backends.index(cell.backend), ROUTES.index(cell.route), cell.draw

    cells = [cell_of(*key, results) for key, results in found.results.items()]
    cells += [Cell(*key, refused=reason) for key, reason in found.refused.items()]
    return Report(
        tuple(sorted(cells, key=place)),
        tuple(sorted(found.builds, key=place)),
        environment(),
        matrix.seed,
        taken,
        (*matrix.notes(), *left_out),
        draws=draws_of(sorted(found.drawn, key=place_of_draw)),
    )


def _left_out(units: Iterable[Unit | DrawUnit], why: str) -> list[str]:
    names = [unit.label for unit in units]
    return [f"left out {why}: {', '.join(names)}"] if names else []
