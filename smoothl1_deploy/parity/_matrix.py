"""The matrix: every beta × reduction × dtype × route × backend, over layouts and families.

What it holds, and what of that is sampled, stands first; how it is run after it. A task for one
process is a beta with a dtype: its inputs and both references' answers are computed once and
serve every reduction, route and backend. Tasks run in worker processes (`_pool`). Beside this
grid of every value of every field there are random combinations of them (`_draws`).
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path

import onnx

from .._environment import environment
from .._shapes import Shape as Axes
from .._spec import DTYPES, REDUCTIONS, ROUTES, LossSpec
from ..backends._base import Backend, backend_class, get_backend, missing
from ..backends._runner import Runner
from ..errors import SmoothL1DeployError, UnsupportedError, require
from ..graph._export import export
from ._cases import (
    LAYOUTS,
    Case,
    CaseResult,
    References,
    check,
    is_for,
    needs_wider,
    unanswered,
    with_beta,
)
from ._draws import Draw
from ._families import FAMILIES, usual_knee
from ._pool import each
from ._report import Build, Cell, Report, cell_of, draws_of, is_extended

BETAS = (0.0, 1e-3, 0.1, 0.5, 1.0, 2.0, 10.0, 1e4, math.inf)
_QUICK_BETAS = (0.0, 0.5, 1.0, math.inf)

#: Random combinations in the whole matrix, and in the quick one.
DRAWS = 240
QUICK_DRAWS = 36
_DRAWS_A_SEED = 1 << 20  # so that two seeds have none in common
_DRAWS_A_TASK = 12
_MOST_SLOWLY = 1 << 14  # elements of a draw that a slow backend is fed

_ROW_OF_BETAS = (*BETAS, 1e-6, 3.0, 0.25, 1e20, 7.0, 0.0, math.inf)
#: The extensions alone and together; beta, where it is no array, and dtype are the task's.
EXTENSIONS = (
    LossSpec(_ROW_OF_BETAS, gradient=True),
    LossSpec(_ROW_OF_BETAS, reduction="none", mask=True, weight="count", gradient=True),
    LossSpec(loss="huber", delta=[*_ROW_OF_BETAS[1:-2], 0.6, 0.8, 1.2], per_sample=True),
    LossSpec(per_sample=True),
    LossSpec(reduction="sum", per_sample=True),
    LossSpec(reduction="none", gradient=True),
    LossSpec(gradient=True),
    LossSpec(gradient=True, upstream=True),
    LossSpec(reduction="none", gradient=True, upstream=True),
    LossSpec(runtime_beta=True),
    LossSpec(gradient=True, runtime_beta=(16,)),
    LossSpec(mask=True, weight="weights", elements="losses", runtime_beta=(16,)),
    LossSpec(weight="count"),
    LossSpec(weight="weights"),
    LossSpec(reduction="none", gradient=True, runtime_beta=True, weight="count"),
    LossSpec(loss="huber"),
    LossSpec(loss="huber", reduction="none", gradient=True),
    LossSpec(loss="huber", gradient=True, weight="weights", loss_weight=-0.3),
    LossSpec(loss="huber", reduction="sum", per_sample=True, gradient=True, runtime_beta=True),
    LossSpec(loss="huber", mask=True, gradient=True, divisor=True, empty="zero", loss_weight=0.5),
    LossSpec(reduction="none", loss_weight=2.5),
    LossSpec(gradient=True, loss_weight=0.1),
    LossSpec(mask=True),
    LossSpec(reduction="none", mask=True, gradient=True),
    LossSpec(mask=True, weight="count", per_sample=True, empty="zero"),
    LossSpec(axes=(0,)),
    LossSpec(elements="differences"),
    LossSpec(per_sample=True, mask=True, weight="count", elements="losses"),
    LossSpec(axes=(0,), mask=True, weight="weights", gradient=True, upstream=True),
    LossSpec(divisor=True, gradient=True),
    LossSpec(per_sample=True, mask=True, weight="count", gradient=True, divisor=True, empty="zero"),
    LossSpec(
        per_sample=True,
        gradient=True,
        runtime_beta=True,
        weight="weights",
        upstream=True,
        mask=True,
    ),
)

#: The spec whose gradient is summed back over a million rows.
_TALL = LossSpec(gradient=True)
#: Layouts that one family is fed in; every family is fed in "matrix" and "odd".
_SHAPE_LAYOUTS = ("scalar", "empty", "no-rows", "4-d", "broadcast-row", "broadcast-both")
#: Layouts that show what an extension could get wrong beyond the plain losses.
_EXTENSION_LAYOUTS = ("odd", "no-rows", "4-d", "broadcast-both", "weight-column")
#: The inlined route is made of the function route: with extensions, these betas show it.
_INLINED_BETAS = (0.0, 1.0, math.inf)
#: The torch route takes about a second an export: one fixed rank, this one, serves it.
_TORCH_LAYOUTS = ("matrix", "no-rows", "2^20")
#: The route whose files are one node, which `ort-cpu` runs by an operator; it has none for others.
_PROVEN_ROUTE = "function"
_BARE = "ort-cpu-bare"


@dataclass(frozen=True, slots=True)
class Matrix:
    """Which part of the matrix to run.

    Attributes:
        backends: names; those that can't be used here must be left out by the caller.
        plain: what `torch.nn.SmoothL1Loss` itself computes.
        extensions: also the variants of `EXTENSIONS` (one of them with `quick`).
        draws: how many random combinations of all that, after the grid. Their betas and shapes
            are their own.
        draw: numbers of draws, which are all that is run then; for the repetition of one.
        quick: fewer betas, no large layouts, the torch route for float32 only.
        engines: a folder to leave a TensorRT engine of every artefact in; None builds none.
        absent: what is left out because it can't run here: `"<backend> not available: <reason>"`.
    """

    backends: tuple[str, ...]
    betas: tuple[float, ...] = BETAS
    reductions: tuple[str, ...] = REDUCTIONS
    dtypes: tuple[str, ...] = DTYPES
    routes: tuple[str, ...] = ROUTES
    plain: bool = True
    extensions: bool = True
    seed: int = 0
    draws: int = 0
    draw: tuple[int, ...] = ()
    quick: bool = False
    engines: Path | None = None
    absent: tuple[str, ...] = ()

    def __repr__(self) -> str:
        counts = ", ".join(
            f"{len(getattr(self, name))} {name}"
            for name in ("betas", "reductions", "dtypes", "routes")
        )
        draws = len(self.draw) or self.draws
        return f"<Matrix of {counts}, {draws} draws, on {', '.join(self.backends)}>"

    @classmethod
    def quickly(cls, backends: tuple[str, ...], seed: int = 0) -> Matrix:
        """The part that takes about half a minute on two cores."""
        return cls(backends, betas=_QUICK_BETAS, seed=seed, draws=QUICK_DRAWS, quick=True)

    @property
    def samples_inlined(self) -> bool:
        """Whether the extensions are inlined at some of the betas only."""
        has_both = {"function", "inlined"} <= {*self.routes}
        return has_both and {*_INLINED_BETAS} <= {*self.betas}

    def tasks(self) -> list[Task | DrawTask]:
        """The work: the grid, the longest task first, and the draws."""
        grid = [Task(self, beta, dtype) for dtype in self.dtypes for beta in self.betas]
        grid.sort(key=lambda task: (task.beta, task.dtype) != (1.0, "float32"))
        first = self.seed * _DRAWS_A_SEED
        numbers = self.draw or tuple(range(first, first + self.draws))
        drawn = [
            DrawTask(self, numbers[i : i + _DRAWS_A_TASK])
            for i in range(0, len(numbers), _DRAWS_A_TASK)
        ]
        return [*([] if self.draw else grid), *drawn]

    def notes(self) -> Iterator[str]:
        """What is sampled, for the report."""
        if self.draw:
            yield f"draws {', '.join(map(str, self.draw))} alone"
        else:
            yield from self._notes_on_the_grid()
            yield from self._notes_on_backends()
            yield from self._notes_on_sizes()
        yield from self.absent

    def _notes_on_the_grid(self) -> Iterator[str]:
        layouts = ", ".join(n for n in _TORCH_LAYOUTS if not (self.quick and n == "2^20"))
        also = "; other shapes by the random draws" if self.draws else ""
        yield f"torch route: exported for (N, 16) only, layouts {layouts}{also}"
        if self.draws:
            yield f"{self.draws} random combinations of spec, shapes and data, none over the wire"
        narrow = self._names(lambda backend: backend.accumulator == "float32")
        without = ", ".join(narrow)
        if narrow and self.extensions:
            yield f"{without}: no gradient of a broadcast input, summed back in float32"
        if narrow and self.draws:
            yield (
                f"{without}, in the draws: no subnormal beta or weights and no slopes by a beta "
                "above 1e30, for which the graph takes float64"
            )
        if self.extensions:
            yield "float64: no gradient of a broadcast input with weights or upstream"
            yield "no gradient of a broadcast input of the largest numbers"
            yield (
                f"{' and '.join(['float64', *narrow])}: no weighted gradient, and none with an "
                "upstream one, of subnormal differences, which no wider format is there for"
            )
            yield f"a known array of betas: with those of beta {self.betas[0]:g}"
            if self.samples_inlined:
                yield "extensions by the inlined route: beta 0, 1 and inf only"

    def _names(self, are: Callable[[type[Backend]], bool]) -> list[str]:
        return [name for name in self.backends if are(backend_class(name))]

    def _notes_on_backends(self) -> Iterator[str]:
        wired = self._names(lambda backend: backend.over_the_wire)
        if wired:
            yield (
                f"{', '.join(wired)}: beta 1, inlined route (or the first of what is asked "
                "for), extensions in float32 only"
            )
        for name in self.backends:
            layouts = backend_class(name).layouts
            if layouts is not None:
                yield f"{name}: layouts {', '.join(layouts)}"
        if _BARE in self.backends:
            nodes = "ort-cpu has no operator for the nodes of the others"
            yield f"{_BARE}: the {_PROVEN_ROUTE} route; {nodes}"
        of_the_spec = self._names(lambda backend: backend.of_the_spec)
        if of_the_spec:
            yield (
                f"{', '.join(of_the_spec)}: no graph is run, the spec is computed; the function "
                "route (or the first of what is asked for)"
            )
        if "torch-triton" in self.backends and not missing("torch-triton"):
            slow = get_backend("torch-triton").slow
            if slow:
                yield f"torch-triton on {slow}: of 2^20 elements only mean at beta 1, constant"

    def _notes_on_sizes(self) -> Iterator[str]:
        if self.quick:
            yield "quick: torch route for float32 only, no layout of 2^20 or 2^24 elements"
            yield "quick: of the extensions only all together"
            return
        yield "layout 2^20: every route on ort-cpu, the function route on the others"
        yield "layout 2^24: beta 1, mean, float32, families normal and constant"
        if self.extensions:
            yield (
                "layout broadcast-10^6, a gradient summed back over a million rows: beta 1, "
                "mean, the function route on ort-cpu and those with a GPU"
            )
            if self.engines is not None:
                yield f"engines of the extensions: beta {self.betas[0]:g} only"


@dataclass(frozen=True, slots=True)
class Task:
    """A task of one beta with one dtype."""

    matrix: Matrix
    beta: float
    dtype: str

    @property
    def label(self) -> str:
        """For a note on what was left out."""
        return f"{self.dtype} beta {self.beta:g}"

    def specs(self) -> list[LossSpec]:
        """What the artefacts compute; with `runtime_beta`, the task's beta is fed to them."""
        reductions = self.matrix.reductions if self.matrix.plain else ()
        specs = [LossSpec(self.beta, reduction, self.dtype) for reduction in reductions]
        chosen = EXTENSIONS[-1:] if self.matrix.quick else EXTENSIONS
        return specs + [
            replace(e if e.runtime_beta or e.beta_shape else e.at(self.beta), dtype=self.dtype)
            for e in chosen
            if self.matrix.extensions and e.reduction in self.matrix.reductions
            # An array is there once; the delta of a Huber loss is no 0.
            if (
                self.beta == self.matrix.betas[0]
                if e.beta_shape and not e.runtime_beta
                else self.beta or not e.delta
            )
        ]

    def cases(self, spec: LossSpec) -> list[Case]:
        """Families and layouts, each with the matrix's seed."""
        of = partial(Case.of, seed=self.matrix.seed)
        cases = [of(family, "matrix") for family in FAMILIES]
        if is_extended(spec):
            cases += [of("normal", name) for name in _EXTENSION_LAYOUTS if is_for(spec, name)]
            if spec == replace(_TALL, dtype=self.dtype) and not self.matrix.quick:
                cases += [of(family, "broadcast-10^6") for family in ("normal", "constant")]
            return cases
        cases += [of(family, "odd") for family in FAMILIES]
        cases += [of("normal", name) for name in _SHAPE_LAYOUTS]
        if not self.matrix.quick:
            cases.append(of("normal", "2^20"))
            if spec.reduction != "none":  # what a sum of equal numbers drifts to
                cases.append(of("constant", "2^20"))
            if spec == LossSpec():
                cases += [of("normal", "2^24"), of("constant", "2^24")]
        return cases

    def routes(self, spec: LossSpec) -> list[str]:
        """The routes of the matrix less those that are left out; see `Matrix.notes`."""
        left_out = set()
        if is_extended(spec) or (self.matrix.quick and self.dtype != "float32"):
            left_out.add("torch")
        if is_extended(spec) and self.matrix.samples_inlined and self.beta not in _INLINED_BETAS:
            left_out.add("inlined")
        return [route for route in self.matrix.routes if route not in left_out]

    def samples(self, spec: LossSpec, route: str, backend: Backend | type[Backend]) -> bool:
        """Whether a combination is run at all; see `Matrix.notes`."""
        matrix = self.matrix

        def is_one(value: object, usual: object, asked: tuple[object, ...]) -> bool:
            """Whether `value` is the usual one, or the first of what is asked for without it."""
            return value == (usual if usual in asked else asked[0])

        if backend.name == _BARE:
            return route == _PROVEN_ROUTE
        if backend.of_the_spec:  # one route is all
            return is_one(route, _PROVEN_ROUTE, matrix.routes)
        if not backend.over_the_wire:
            return True
        if is_extended(spec) and self.dtype != "float32" and len(matrix.dtypes) > 1:
            return False
        return is_one(self.beta, 1.0, matrix.betas) and is_one(route, "inlined", matrix.routes)


@dataclass(frozen=True, slots=True)
class DrawTask:
    """A task of some draws, by their numbers."""

    matrix: Matrix
    numbers: tuple[int, ...]

    @property
    def label(self) -> str:
        """For a note on what was left out."""
        return f"draws {self.numbers[0]} to {self.numbers[-1]}"

    def draws(self) -> list[Draw]:
        """Those of the dtypes, reductions and routes that are asked for."""
        asked = self.matrix
        return [
            draw
            for draw in map(Draw.of, self.numbers)
            if draw.spec.dtype in asked.dtypes
            and draw.spec.reduction in asked.reductions
            and draw.route in asked.routes
        ]

    @staticmethod
    def samples(draw: Draw, backend: Backend) -> bool:
        """Whether a backend meets a draw at all; see `Matrix.notes`."""
        if backend.name == _BARE:
            return draw.route == _PROVEN_ROUTE
        return not backend.over_the_wire


def artefact_axes(
    spec: LossSpec, route: str, layout: str, any_rank: bool
) -> dict[str, Axes | None]:
    """What `export` is told of the axes for a layout.

    Fixed rank for the layouts of two axes, any rank for the others where the backend runs it.
    """
    if route != "torch" and any_rank and layout not in _TORCH_LAYOUTS:
        return {"shape": None}
    shapes = LAYOUTS[layout]
    axes: dict[str, Axes | None] = {"shape": shapes.input_axes, "target_shape": shapes.target_axes}
    own = shapes.target_axes if shapes.weight_axes is None else shapes.weight_axes
    return axes | {f"{name}_shape": own for name in spec.operands[2:]}


def is_run(case: Case, route: str, backend: Backend | type[Backend]) -> bool:
    """Whether a route and backend are sampled at the layout of a case; see `Matrix.notes`."""
    if backend.layouts is not None and case.layout not in backend.layouts:
        return False
    if case.layout == "broadcast-10^6":
        return route == "function" and backend.large
    if case.layout == "2^24":
        return backend.large
    if case.layout == "2^20" and backend.name != "ort-cpu":
        return route == "function"
    return route != "torch" or case.layout in _TORCH_LAYOUTS


def is_spared(spec: LossSpec, case: Case, backend: Backend) -> bool:
    """Whether a backend is too slow for a case, or has no format that is wide enough for it."""
    wide = backend.accumulator != "float32"
    return is_too_slow(spec, case, backend) or needs_wider(spec, case, wide)


def is_too_slow(spec: LossSpec, case: Case, backend: Backend) -> bool:
    """Whether a slow backend is spared a case; see `Matrix.notes`."""
    if backend.slow is None:
        return False
    if case.layout in LAYOUTS:
        is_least = (spec.reduction, spec.beta, case.family) == ("mean", 1.0, "constant")
        return case.layout == "2^24" or ("^" in case.layout and not is_least)
    return math.prod(case.shape(spec)) > _MOST_SLOWLY


# How it is run


def _run_task(task: Task | DrawTask) -> list[Cell | Build]:
    return [*(_draws(task) if isinstance(task, DrawTask) else _grid(task))]


def _draws(task: DrawTask) -> Iterator[Cell]:
    """A cell for each draw and backend."""
    backends = [get_backend(name, threads=1) for name in task.matrix.backends]
    for draw in task.draws():
        references = [draw.references(case) for case in draw.cases]
        make = cache(draw.model)
        for backend in backends:
            if not task.samples(draw, backend):
                continue
            key = (draw.spec, draw.beta, draw.route, backend.name)
            reason = backend.refuses(draw.spec)
            if reason is not None:
                yield Cell(*key, refused=reason, draw=draw.number)
                continue
            load = cache(lambda: backend.load(make(backend.any_rank)))  # noqa: B023
            results = [
                _checked(load, backend, refs)
                for refs in references
                if not is_spared(refs.spec, refs.case, backend)
            ]
            if results:
                yield replace(cell_of(*key, results), draw=draw.number)


def _grid(task: Task) -> Iterator[Cell | Build]:
    """A cell for each spec, route and backend, and the engines.

    Exports and runners are made once; the arrays of one case are held at a time.
    """
    matrix = task.matrix
    backends = [get_backend(name, threads=1) for name in matrix.backends]
    make = cache(export)

    @cache
    def load(backend: Backend, spec: LossSpec, route: str, **axes: Axes | None) -> Runner:
        return backend.load(make(spec, route, **axes))

    for spec in task.specs():
        found: dict[tuple[str, Backend], list[CaseResult]] = {}
        for route, backend in product(task.routes(spec), backends):
            if task.samples(spec, route, backend):
                reason = backend.refuses(spec)
                if reason:
                    yield Cell(spec, task.beta, route, backend.name, refused=reason)
                else:
                    found[route, backend] = []
        for case in task.cases(spec):
            meeting = [
                (route, backend)
                for route, backend in found
                if is_run(case, route, backend) and not is_spared(spec, case, backend)
            ]
            if not meeting:
                continue
            refs = References.of(with_beta(spec, task.beta), case)
            for route, backend in meeting:
                axes = artefact_axes(spec, route, case.layout, backend.any_rank)
                loaded = partial(load, backend, spec, route, **axes)
                found[route, backend].append(_checked(loaded, backend, refs))
                if case.layout == "2^24":  # a session keeps the memory of its largest call
                    load.cache_clear()
                    gc.collect()
        load.cache_clear()
        for (route, backend), results in found.items():
            if results:
                yield cell_of(spec, task.beta, route, backend.name, results)
        # An engine of each extension, not of each with every beta.
        if matrix.engines and (not is_extended(spec) or task.beta == matrix.betas[0]):
            for route in task.routes(spec):
                model = make(spec, route, **artefact_axes(spec, route, "matrix", any_rank=False))
                yield _build(spec, route, model, matrix.engines)


def _checked(load: Callable[[], Runner], backend: Backend, refs: References) -> CaseResult:
    try:
        runner = load()
    except SmoothL1DeployError as exc:
        # A backend that can't load one artefact is a red case, not the end of the run.
        return CaseResult.of(refs, unanswered(refs, exc))
    return check(runner, refs, backend.accumulator)


def _build(spec: LossSpec, route: str, model: onnx.ModelProto, folder: Path) -> Build:
    """A TensorRT engine in `folder`; a refusal is a result, a failure a red one."""
    from ..tensorrt._build import build_engine

    started = time.perf_counter()
    path = folder / f"{model.graph.name}.engine"
    try:
        engine = build_engine(model, path)
    except UnsupportedError as exc:
        return Build(spec, route, "auto", refused=str(exc))
    except SmoothL1DeployError as exc:
        return Build(spec, route, "auto", error=f"{type(exc).__name__}: {exc}")
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
        progress: called with the tasks done and their number, at the start and after each.
        seconds: after which no task is begun and, with several workers, those at work are ended;
            the report's notes name what is left out.

    Returns:
        The report, its cells in the order of the matrix, whatever order they finished in.

    Raises:
        MatrixInterrupted: for KeyboardInterrupt, with the report of what was done.
    """
    require("torch", "torch", "the matrix, which compares with PyTorch,")
    started = time.perf_counter()
    tasks = matrix.tasks()
    progress(0, len(tasks))
    undone = dict.fromkeys(tasks)
    found: list[Cell | Build] = []
    running = each(_run_task, tasks, workers, time.monotonic() + seconds)
    interrupted = False
    try:
        # Closing: an interrupt comes here as well as there, and the processes must end.
        with contextlib.closing(running):
            for done, (task, those) in enumerate(running, 1):
                del undone[task]
                found += those
                progress(done, len(tasks))
    except KeyboardInterrupt:
        interrupted = True
    taken = time.perf_counter() - started
    why = f"interrupted after {taken:.0f} s" if interrupted else f"after {seconds:.0f} s"
    names = ", ".join(task.label for task in undone)
    left_out = [f"left out {why}: {names}"] if names else []
    report = _report(matrix, found, taken, [*matrix.notes(), *left_out])
    if interrupted:
        raise MatrixInterrupted(report)
    return report


def _report(matrix: Matrix, found: list[Cell | Build], taken: float, notes: list[str]) -> Report:
    """The cells, draws and builds in the order of the matrix."""

    def order(item: Cell | Build) -> tuple[object, ...]:
        spec, route = item.spec, ROUTES.index(item.route)
        of_spec = (is_extended(spec), DTYPES.index(spec.dtype))
        named = (REDUCTIONS.index(spec.reduction), spec.name, route)
        if isinstance(item, Build):
            return *of_spec, usual_knee(spec), *named
        backend = matrix.backends.index(item.backend)
        if item.draw is not None:
            return backend, route, item.draw
        return *of_spec, item.beta, *named, backend

    cells = [item for item in found if isinstance(item, Cell)]
    return Report(
        tuple(sorted((cell for cell in cells if cell.draw is None), key=order)),
        tuple(sorted((item for item in found if isinstance(item, Build)), key=order)),
        environment(),
        matrix.seed,
        taken,
        tuple(notes),
        draws=draws_of(sorted((cell for cell in cells if cell.draw is not None), key=order)),
    )
