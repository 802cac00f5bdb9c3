"""The heat maps of the HTML report: which cell stands where, in which step of the colour scale."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..report import Cell, Report
from .common import beta_text, distance_text, finding, measured_text, representative, variant

__all__ = ["STEPS", "Map", "Place", "Row", "cell_ids", "maps_by_dtype", "overview", "step"]

#: The steps of the colour scale, as (largest distance in ULP, label); the last is open.
STEPS: tuple[tuple[int | None, str], ...] = (
    (0, "0"),
    (1, "1"),
    (2, "2"),
    (4, "3–4"),
    (16, "5–16"),
    (256, "17–256"),
    (None, "> 256"),
)


def step(ulp: int) -> int:
    """The index in `STEPS` that a distance falls into."""
    return next(i for i, (limit, _) in enumerate(STEPS) if limit is None or ulp <= limit)


@dataclass(frozen=True, slots=True)
class Place:
    """One cell of a map as it is drawn.

    Attributes:
        anchor: id of the panel it opens.
        kind: `green`, `red` or `refused`.
        step, torch_step: of our distance and of PyTorch's.
        text: our distance, or `class` or `error`.
        torch, allowed: the two small numbers.
        better: right somewhere where PyTorch isn't.
        label: all of it in words, for a screen reader.
    """

    anchor: str
    kind: str
    step: int
    torch_step: int
    text: str
    torch: str
    allowed: str
    better: bool
    label: str


@dataclass(frozen=True, slots=True)
class Row:
    """One beta: a place, or None for a combination that is not in the matrix, a column."""

    beta: str
    places: tuple[Place | None, ...]


@dataclass(frozen=True, slots=True)
class Map:
    """beta × columns, where a column is a reduction, or a dtype with a reduction."""

    title: str
    subtitle: str
    groups: tuple[tuple[str, int], ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def cell_ids(cells: Iterable[Cell]) -> dict[int, str]:
    """`id(cell)` -> an HTML id that says which cell it is; unique in the report."""
    taken: set[str] = set()
    found: dict[int, str] = {}
    for cell in cells:
        spec = cell.spec
        words = [spec.dtype, cell.route, cell.backend, variant(spec), "beta", beta_text(spec.beta)]
        slug = re.sub(r"[^A-Za-z0-9.+-]+", "-", "-".join(words))
        name, number = slug, 2
        while name in taken:
            name, number = f"{slug}-{number}", number + 1
        taken.add(name)
        found[id(cell)] = name
    return found


def _label(cell: Cell) -> str:
    spec = cell.spec
    where = f"{spec.dtype}, {cell.route} on {cell.backend}, beta {beta_text(spec.beta)}, "
    where += f"{variant(spec)}: "
    if cell.refused is not None:
        return f"{where}not run, {cell.refused}"
    measured = {"class": "wrong class", "error": "error"}.get(finding(cell), f"{cell.ulp} ULP")
    verdict = "green" if cell.ok else "RED"
    return f"{where}{verdict}, {measured}, PyTorch {cell.torch_ulp}, allowed {cell.allowed}"


def _place(cell: Cell, ids: dict[int, str], better: bool) -> Place:
    kind = "refused" if cell.refused is not None else "green" if cell.ok else "red"
    text = "–" if kind == "refused" else measured_text(cell)
    return Place(
        ids[id(cell)],
        kind,
        step(cell.ulp),
        step(cell.torch_ulp),
        text,
        distance_text(cell.torch_ulp),
        distance_text(cell.allowed),
        better,
        _label(cell),
    )


def _map(
    title: str,
    subtitle: str,
    cells: Sequence[Cell],
    betas: Sequence[float],
    columns: Sequence[tuple[str, str]],
    column_of: Callable[[Cell], tuple[str, str]],
    ids: dict[int, str],
) -> Map:
    """Cells sorted into places; where several share one, the representative stands for them."""
    places: dict[tuple[float, tuple[str, str]], list[Cell]] = {}
    for cell in cells:
        places.setdefault((cell.spec.beta, column_of(cell)), []).append(cell)

    def entry(beta: float, column: tuple[str, str]) -> Place | None:
        there = places.get((beta, column), [])
        shown = representative(there) or (there[0] if there else None)
        return _place(shown, ids, any(c.better for c in there)) if shown else None

    rows = tuple(Row(beta_text(beta), tuple(entry(beta, c) for c in columns)) for beta in betas)
    spans = {group: sum(g == group for g, _ in columns) for group, _ in columns}
    return Map(title, subtitle, tuple(spans.items()), tuple(name for _, name in columns), rows)


def _betas(report: Report) -> list[float]:
    return sorted({cell.spec.beta for cell in report.cells})


def overview(report: Report, ids: dict[int, str]) -> Map:
    """Every dtype and reduction in one map, the worst of every route and backend in each place."""

    def column(cell: Cell) -> tuple[str, str]:
        return cell.spec.dtype, variant(cell.spec)

    found = list(dict.fromkeys(map(column, report.cells)))
    dtypes = list(dict.fromkeys(dtype for dtype, _ in found))
    columns = sorted(found, key=lambda c: dtypes.index(c[0]))
    return _map("", "", report.cells, _betas(report), columns, column, ids)


def maps_by_dtype(report: Report, ids: dict[int, str]) -> dict[str, list[Map]]:
    """dtype -> one map a backend and route, a backend's routes together."""
    maps: dict[str, list[Map]] = {}
    for dtype in dict.fromkeys(cell.spec.dtype for cell in report.cells):
        of_dtype = [cell for cell in report.cells if cell.spec.dtype == dtype]
        columns = [("", name) for name in dict.fromkeys(variant(c.spec) for c in of_dtype)]
        backends = list(dict.fromkeys(cell.backend for cell in of_dtype))
        pairs = dict.fromkeys((cell.backend, cell.route) for cell in of_dtype)
        for backend, route in sorted(pairs, key=lambda pair: backends.index(pair[0])):
            cells = [c for c in of_dtype if (c.backend, c.route) == (backend, route)]
            here = [c for c in columns if any(variant(cell.spec) == c[1] for cell in cells)]
            drawn = _map(
                route, backend, cells, _betas(report), here, lambda c: ("", variant(c.spec)), ids
            )
            maps.setdefault(dtype, []).append(drawn)
    return maps
