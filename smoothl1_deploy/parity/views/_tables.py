"""What every view shows: numbers in words, and in tables; of a report, and of a verification."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Any

from ..._certainty import Certainty
from ..._records import grouped
from ..._shapes import describe
from ..._spec import DTYPES, LossSpec
from ..._table import Entry, Table
from ...backends._base import backend_class
from ...backends._gpu import GpuBackend
from ...backends._names import BACKENDS, REFERENCES
from .._compare import Verdict
from .._contract import Contract
from .._drift import DATA, Drift, DriftPoint
from .._families import BRANCHES, usual_knee
from .._pairs import table as distances
from .._report import Build, Cell, Report, is_extended, mean_shares
from .._verify import Verification
from .._whole import ModelVerification


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
    words += [f"betas={describe(spec.beta_shape)}"] * bool(spec.beta_shape)
    for field in fields(spec):
        value = getattr(spec, field.name)
        if field.name not in ("beta", "delta", "reduction", "dtype") and value != field.default:
            is_flag = isinstance(value, bool)
            words.append(field.name.replace("_", " ") if is_flag else f"{field.name}={value}")
    return " ".join(words)


def spec_text(spec: LossSpec, beta: float | None = None) -> str:
    """`"float32, beta 0.5, mean per sample"`; the beta that was fed, where one was."""
    beta = usual_knee(spec) if beta is None else beta
    return f"{spec.dtype}, beta {beta_text(beta)}, {variant(spec)}"


def versions(environment: Mapping[str, Any]) -> list[str]:
    """What it ran on, and the versions that are installed, for a line."""
    packages = {name: version for name, version in environment["packages"].items() if version}
    return [
        *(f"{name} {version}" for name, version in packages.items()),
        f"Python {environment['python']}",
        f"{environment['processor']}, {environment['cores']} cores",
    ]


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
    """What a table has for the cell: the distance, or `class` or `error`."""
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
    cells = (cell for cell in report.cells if 0 < cell.beta < math.inf)
    return mean_shares(shares for cell in cells for shares in cell.families.items())


def by_backend(cells: Iterable[Cell]) -> list[tuple[str, str, list[Cell]]]:
    """The cells of each backend and route, a backend's routes together."""
    return [
        (backend, route, found)
        for backend, those in grouped((cell.backend, cell) for cell in cells).items()
        for route, found in grouped((cell.route, cell) for cell in those).items()
    ]


# --- what was not run


def not_run(found: Report | Verification | ModelVerification) -> Iterator[tuple[str, str]]:
    """What this says nothing of, as (what, why): kernels, engines, servers, cells."""
    ran = {found.backend} if not isinstance(found, Report) else {c.backend for c in found.cells}
    groups: dict[str, list[str]] = {"GPU kernels": [], "served by Triton": [], "other backends": []}
    on_gpu, served, others = groups.values()
    for name in BACKENDS:
        if name not in REFERENCES and name not in ran:
            cls = backend_class(name)
            wire = served if cls.over_the_wire else others
            (on_gpu if issubclass(cls, GpuBackend) else wire).append(name)
    yield from ((what, ", ".join(names)) for what, names in groups.items() if names)
    if not isinstance(found, Report):
        if not any(loss.drift for loss in found.losses.values()):
            yield "error by size", Certainty.NOT_RUN
        return
    if "trt" not in ran:
        built = found.summary["builds"] - found.summary["red_builds"]
        yield "TensorRT engines", f"{built or 'none'} built, none executed"
    if reasons := [cell.refused for cell in found.cells if cell.refused is not None]:
        yield plural(len(reasons), "cell"), "; ".join(dict.fromkeys(reasons))
    yield from (("left out", note) for note in found.notes if note.startswith("left out"))


def certainty(report: Report) -> Table:
    """How sure it is what each backend gives, by dtype; and the error bound of the graphs."""
    run = {(cell.backend, cell.spec.dtype) for cell in report.cells if cell.refused is None}
    ours = (name for name in BACKENDS if name not in REFERENCES)
    alike = grouped(
        (tuple(Certainty.SAMPLES if (name, d) in run else Certainty.NOT_RUN for d in DTYPES), name)
        for name in dict.fromkeys((*ours, *(cell.backend for cell in report.cells)))
    )
    alike[(Certainty.PROVED,) * len(DTYPES)] = ["the error bound of the graphs"]
    rows = [
        (what, *(Certainty.EVERY_PAIR if d in dtypes else "" for d in DTYPES))
        for what, dtypes in _every_pair(report)
    ]
    rows += [(", ".join(names), *words) for words, names in alike.items()]
    below = "samples are families, shapes and draws, and prove tries every pair of a half format"
    shown = rows if report.cells else []  # draws alone say nothing of a dtype as a whole
    return Table("how sure each statement is", ("what", *DTYPES), shown, "lllll", (below,))


def _every_pair(report: Report) -> Iterator[tuple[str, frozenset[str]]]:
    """Of what every pair was tried, and in which formats."""
    claims = sorted((p.claim for p in report.pairs if not p.left), key=lambda claim: claim.beta)
    tried = grouped(((name, c.beta), c.dtype) for c in claims for name in c.backends)
    alike = grouped(((name, frozenset(tried[name, beta])), f"{beta:g}") for name, beta in tried)
    for (backend, dtypes), betas in alike.items():
        yield f"{backend}: none and its gradient at beta {', '.join(betas)}", dtypes


def pairs(report: Report) -> list[Table]:
    """What `prove` found, a table for each format and route."""
    groups = grouped(((proof.claim.dtype, proof.claim.route), proof) for proof in report.pairs)
    return [distances(group) for group in groups.values()]


# --- cells in rows and columns


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells in rows and columns.

    Attributes:
        corner: what the rows are.
        columns: group and name of each, a group's together.
        rows: the name of each, and for every column the cells there; most often one, or none.
        title, subtitle: what tells it from other grids.
    """

    corner: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, tuple[tuple[Cell, ...], ...]], ...]
    title: str = ""
    subtitle: str = ""

    @classmethod
    def of(
        cls,
        corner: str,
        cells: Sequence[Cell],
        row: Callable[[Cell], str],
        column: Callable[[Cell], tuple[str, str]],
        title: str = "",
        subtitle: str = "",
    ) -> Grid:
        """The cells by what `row` and `column` call them, in the order in which they come."""
        entries = grouped(((row(cell), column(cell)), cell) for cell in cells)
        found = dict.fromkeys(map(column, cells))
        groups = list(dict.fromkeys(group for group, _ in found))
        columns = tuple(sorted(found, key=lambda each: groups.index(each[0])))
        rows = tuple(
            (name, tuple(tuple(entries.get((name, each), ())) for each in columns))
            for name in dict.fromkeys(map(row, cells))
        )
        return cls(corner, columns, rows, title, subtitle)

    @property
    def groups(self) -> Mapping[str, int]:
        """The groups of columns, and how many each has."""
        return Counter(group for group, _ in self.columns)

    @property
    def red(self) -> bool:
        """Whether any cell is."""
        return any(not cell.ok for _, row in self.rows for cells in row for cell in cells)

    def table(self, title: str) -> Table:
        """The worst of each entry's cells, as distance to the oracle / allowed."""
        columns = (f"{group} {name}".strip() for group, name in self.columns)
        rows = [(name, *map(_limit_entry, row)) for name, row in self.rows]
        starred = any(c.better_than_pytorch for _, row in self.rows for cells in row for c in cells)
        below = (_STAR,) if starred else ()
        return Table(title, (self.corner, *columns), rows, "l" + "r" * len(self.columns), below)


def split(cells: Iterable[Cell]) -> tuple[list[Cell], list[Cell]]:
    """The plain cells, and those of the extensions, by beta; the rest of the order is kept."""
    ordered = sorted(cells, key=lambda cell: cell.beta)
    groups = grouped((is_extended(cell.spec), cell) for cell in ordered)
    return groups.get(False, []), groups.get(True, [])


def beta_of(cell: Cell) -> str:
    """The name of a row or column of one beta."""
    return beta_text(cell.beta)


def variant_of(cell: Cell) -> str:
    """The name of a row or column of one reduction, with its extensions."""
    return variant(cell.spec)


def overviews(report: Report) -> list[Grid]:
    """One grid of all that is plain, and one of all extensions, where there are any."""
    plain, extended = split(report.cells)
    grids = [
        Grid.of("beta", plain, beta_of, lambda cell: (cell.spec.dtype, variant_of(cell))),
        Grid.of("extension", extended, variant_of, lambda cell: ("", cell.spec.dtype)),
    ]
    return [grid for grid in grids if grid.rows]


# --- tables


_STAR = "★ right where PyTorch itself overflows, underflows or makes NaN"
_BETTER = _STAR.replace("★", "better:")


def _limit_entry(cells: Sequence[Cell]) -> Entry | str:
    """`ulp/allowed`, a star where we are right and PyTorch isn't."""
    worst = representative(cells)
    if worst is None:
        return "–"
    star = "★" if any(cell.better_than_pytorch for cell in cells) else ""
    return Entry(f"{measured_text(worst)}/{distance_text(worst.allowed)}{star}", worst.ok)


def matrix(report: Report) -> list[Table]:
    """The overviews, in text."""
    title = "ULP to the oracle / allowed, the worst of every route and backend"
    titles = (title, "the extensions, likewise")
    return [grid.table(text) for grid, text in zip(overviews(report), titles, strict=False)]


def _row(*entries: Entry | str | int) -> tuple[Entry | str, ...]:
    """A row of a table; thousands stand apart."""
    return tuple(f"{entry:,}" if isinstance(entry, int) else entry for entry in entries)


def _none_wanted(count: int) -> Entry:
    """A count that is good where it is 0."""
    return Entry(f"{count:,}", not count)


def backends(report: Report) -> Table:
    """One row a backend and route; below, why cells were not run."""
    rows = []
    for backend, route, cells in by_backend(report.cells):
        run = [cell for cell in cells if cell.refused is None]
        red = _none_wanted(sum(not cell.ok for cell in run))
        largest = max((cell.ulp for cell in run), default=0)
        cases = sum(cell.cases for cell in run)
        rows.append(_row(backend, route, len(run), cases, red, len(cells) - len(run), largest))
    refused = [f"{c.backend}: {c.refused}" for c in report.cells if c.refused is not None]
    columns = ("backend", "route", "cells", "cases", "red", "not run", "largest ULP")
    below = tuple(dict.fromkeys(refused))
    return Table("backends and routes", columns, rows, "llrrrrr", below, keys=2)


def draws(report: Report) -> Table:
    """One row a backend and route that met random draws."""
    rows = []
    for row in report.draws:
        near, red = row.nearest, _none_wanted(len(row.red))
        limit = f"{measured_text(near)}/{distance_text(near.allowed)}, {near.draw}" if near else "–"
        rows.append(_row(row.backend, row.route, row.draws, row.cases, red, row.refused, limit))
    columns = ("backend", "route", "draws", "cases", "red", "not run", "nearest to its limit")
    title = "random combinations; the nearest to its limit as ULP / allowed, number"
    return Table(title, columns, rows, "llrrrrr", keys=2)


def branches(report: Report) -> Table:
    """The share of elements in each branch, by family; a branch never reached is marked."""
    rows = [
        (name, *(f"{shares[key]:.1%}" if shares[key] else "never" for key in BRANCHES))
        for name, shares in family_shares(report).items()
    ]
    title = "share of elements in each branch, a mean over 0 < beta < inf"
    return Table(title, ("family", *BRANCHES), rows, "l" + "r" * len(BRANCHES))


def engines(builds: Sequence[Build]) -> Table:
    """One row a route: engines built, failed and refused."""
    rows = []
    # A refused build knows only the flavour that was asked for ("auto"): the route joins them.
    for route, group in grouped((build.route, build) for build in builds).items():
        built = [build for build in group if build.ok and build.refused is None]
        failed = _none_wanted(sum(not build.ok for build in group))
        seconds = f"{median([build.seconds for build in built] or [0.0]):.2f} s"
        largest = bytes_text(max((build.bytes for build in built), default=0))
        flavours = ", ".join(dict.fromkeys(build.flavour for build in built or group))
        refused = sum(build.refused is not None for build in group)
        rows.append(_row(route, flavours, len(built), failed, refused, seconds, largest))
    columns = ("route", "flavour", "built", "failed", "refused", "median time", "largest")
    below = tuple(dict.fromkeys(build.refused for build in builds if build.refused is not None))
    return Table("engines by route", columns, rows, "llrrrrr", below)


def bytes_text(count: int) -> str:
    """`"512 B"`, `"20 kB"`."""
    return f"{count / 1024:,.0f} kB" if count >= 1024 else f"{count} B"


def drift(measured: Drift) -> Table:
    """The error of every way of computing a mean, at the largest size."""
    size = measured.curves[0].elements[-1] if measured.curves else 0
    rows = [
        (curve.way, curve.data, f"{curve.relative_error[-1]:.1e}", f"{curve.ulp[-1]:,}")
        for curve in measured.curves
    ]
    title = f"`mean`, float32, at {size:,} elements, against the oracle"
    return Table(title, ("way", "data", "relative error", "ULP"), rows, "llrr")


def _judged(verdict: Verdict) -> tuple[Entry | str, ...]:
    """Distance to the oracle, PyTorch's own and what is allowed; and the verdict in a word."""
    word = "better" if verdict.better else "equal"
    measured = "class" if verdict.wrong_class else f"{verdict.ulp:,}"
    said = Entry(word if verdict.ok else "red", verdict.ok)
    return _row(measured, verdict.torch_ulp, verdict.allowed, said)


def _below(judged: Iterable[tuple[str, Verdict]]) -> tuple[str, ...]:
    """What stands below verdicts: the words' meanings, and what is wrong with the red ones."""
    judged = [*judged]
    better = any(verdict.ok and verdict.better for _, verdict in judged)
    return (
        *((_BETTER,) if better else ()),
        *(f"{what}: {verdict.detail}" for what, verdict in judged if not verdict.ok),
    )


def artefact_drift(points: Sequence[DriftPoint]) -> Table:
    """One row a size and family: ULP and error, measured, PyTorch's, allowed, bound."""
    ordered = sorted(points, key=lambda p: (p.output, DATA.index(p.family), p.elements))
    rows = []
    for point in ordered:
        bound, errors = point.bound, (point.relative, point.torch_relative)
        proved = f"{bound:,.1f}" if bound is not None and math.isfinite(bound) else "-"
        shown = ("-" if error is None else f"{error:.1e}" for error in errors)
        judged = (*_judged(point.result.verdict), proved, *shown)
        rows.append(_row(point.elements, point.family, point.output, *judged))
    below = ["bound: what is proved of the graphs that smoothl1-deploy makes, in ULP"]
    if any(point.result.verdict.better for point in ordered):
        below.append(_BETTER)
    numbers = ("ULP", "PyTorch's", "allowed", "verdict", "bound", "error", "PyTorch's error")
    columns = ("elements", "inputs", "output", *numbers)
    title = "error of the reduction by size"
    return Table(title, columns, rows, "rllrrrlrrr", tuple(below), keys=3)


def verification(found: Verification) -> Table:
    """One row a case: distance to the oracle, PyTorch's own, what is allowed, branches reached."""
    rows = []
    for result in found.results:
        shares = (f"{result.shares[branch]:.0%}" for branch in BRANCHES)
        rows.append((result.case.family, result.case.layout, *_judged(result.verdict), *shares))
    likely = ", ".join(item.fault.value for item in found.diagnoses)
    red = _below((f"{r.case.family}, {r.case.layout}", r.verdict) for r in found.results)
    below = (*red, *([f"most likely: {likely}"] if likely else []))
    columns = ("family", "shape", "ULP", "PyTorch's", "allowed", "verdict", *BRANCHES)
    title = f"{found.name} on {found.backend}"
    return Table(title, columns, rows, "llrrrlrrr", below, keys=2)


def whole_runs(found: Verification | ModelVerification) -> Table:
    """One row an output of the whole model: a loss of what it predicted, or one it had before."""
    rows: list[tuple[Entry | str, ...]] = []
    for run in found.runs:
        rows += [(run.data, name, *_judged(verdict)) for name, verdict in run.losses.items()]
        rows += [
            (run.data, name, "", "", "", Entry("the same bits" if same else "OTHER BITS", same))
            for name, same in run.same.items()
        ]
    red = _below((f"{run.data}, {n}", v) for run in found.runs for n, v in run.losses.items())
    columns = ("data", "output", "ULP", "PyTorch's", "allowed", "verdict")
    title = f"{found.name}, the whole model on {found.backend}"
    return Table(title, columns, rows, "llrrrl", red, keys=2)


def diagnoses(found: Verification) -> Table:
    """One row a fault: its name and what it does; below, the answers that speak for it."""
    rows = [(Entry(item.fault.value, False), item.explanation) for item in found.diagnoses]
    evidence = tuple(f"{item.fault.value}: {e}" for item in found.diagnoses for e in item.evidence)
    return Table("most likely what is wrong", ("fault", "why"), rows, "ll", evidence)


def equal_text(found: Verification | ModelVerification) -> str:
    """How much of it is green, in a line."""
    losses = found.losses.values()
    cases = sum(len(loss.every_result) for loss in losses)
    red = sum(len(loss.failures) for loss in losses)
    runs = f"{sum(run.ok for run in found.runs)} of {plural(len(found.runs), 'run')} of the whole"
    text = f"{cases - red} of {plural(cases, 'case')} equal to PyTorch, or nearer to the truth, "
    text += Certainty.SAMPLES
    return f"{text}; {runs} green" if found.runs else text


def verified(found: Verification | ModelVerification) -> Iterator[Table]:
    """Every table of what `verify` found: of each loss, then of the whole model."""
    for loss in found.losses.values():
        yield verification(loss)
        if loss.drift:
            yield artefact_drift(loss.drift)
        if loss.diagnoses:
            yield diagnoses(loss)
    if found.runs:
        yield whole_runs(found)


#: What stands before an answer, by its kind.
MARKS: Mapping[str, str] = {
    "reference": "", "equal": "=", "better": "★", "refuses": "⊘", "differs": "≠",
}  # fmt: skip


def contract(probed: Contract) -> Table:
    """The rows in which some column is not PyTorch's equal."""
    rows = [
        (edge.name, *(f"{MARKS[answer.kind]} {cut(answer.text, 80)}" for answer in edge.answers))
        for edge in probed.edges
        if any(answer.kind not in ("reference", "equal") for answer in edge.answers)
    ]
    title = "= as PyTorch, ★ right where PyTorch is not, ⊘ an error instead of an answer, ≠ differs"
    return Table(title, ("edge", *probed.columns), rows, "l" * (1 + len(probed.columns)))


def cut(text: str, limit: int = 300) -> str:
    """`text`, no longer than the limit."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
