"""The heat maps of the HTML report: which cell stands where, in which step of the colour scale."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..report import Cell, Report, is_extended
from .common import beta_text, distance_text, finding, measured_text, representative, variant

__all__ = ["STEPS", "Map", "Place", "Row", "cell_ids", "maps_by_dtype", "overviews", "step"]

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
    """One row's label and places; None for a combination that is not in the matrix."""

    label: str
    places: tuple[Place | None, ...]


@dataclass(frozen=True, slots=True)
class Map:
    """Rows × columns, `groups` spanning the columns; `corner` says what the rows are."""

    title: str
    subtitle: str
    corner: str
    groups: tuple[tuple[str, int], ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def red(self) -> bool:
        """Whether any place is."""
        return any(place and place.kind == "red" for row in self.rows for place in row.places)


def cell_ids(cells: Iterable[Cell]) -> dict[int, str]:
    """`id(cell)` -> an HTML id that says which cell it is; unique in the report."""
    taken: set[str] = set()
    found: dict[int, str] = {}
    for cell in cells:
        spec = cell.spec
        words = [spec.dtype, cell.route, cell.backend, variant(spec), "beta", beta_text(cell.beta)]
        slug = re.sub(r"[^A-Za-z0-9.+-]+", "-", "-".join(words))
        name, number = slug, 2
        while name in taken:
            name, number = f"{slug}-{number}", number + 1
        taken.add(name)
        found[id(cell)] = name
    return found


def _label(cell: Cell) -> str:
    spec = cell.spec
    where = f"{spec.dtype}, {cell.route} on {cell.backend}, beta {beta_text(cell.beta)}, "
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


#: What a cell's row and column are called: (group, name) for a column.
_Rows = Callable[[Cell], str]
_Columns = Callable[[Cell], tuple[str, str]]


def _by_beta(cell: Cell) -> str:
    return beta_text(cell.beta)


def _by_variant(cell: Cell) -> str:
    return variant(cell.spec)


def _map(
    cells: Sequence[Cell],
    ids: dict[int, str],
    rows: _Rows,
    columns: _Columns,
    *,
    corner: str,
    title: str = "",
    subtitle: str = "",
) -> Map:
    """Cells sorted into places; where several share one, the representative stands for them."""
    places: dict[tuple[str, tuple[str, str]], list[Cell]] = {}
    for cell in cells:
        places.setdefault((rows(cell), columns(cell)), []).append(cell)

    def entry(row: str, column: tuple[str, str]) -> Place | None:
        there = places.get((row, column), [])
        shown = representative(there) or (there[0] if there else None)
        return _place(shown, ids, any(c.better for c in there)) if shown else None

    found = list(dict.fromkeys(columns(cell) for cell in cells))
    groups = list(dict.fromkeys(group for group, _ in found))
    order = sorted(found, key=lambda column: groups.index(column[0]))
    spans = tuple((group, sum(g == group for g, _ in order)) for group in groups)
    return Map(
        title,
        subtitle,
        corner,
        spans,
        tuple(name for _, name in order),
        tuple(
            Row(row, tuple(entry(row, column) for column in order))
            for row in dict.fromkeys(rows(cell) for cell in cells)
        ),
    )


def _sorted(report: Report, extended: bool) -> list[Cell]:
    """The plain cells or those of the extensions, by beta; the rest of the order is kept."""
    cells = (cell for cell in report.cells if is_extended(cell.spec) == extended)
    return sorted(cells, key=lambda cell: cell.beta)


def overviews(report: Report, ids: dict[int, str]) -> list[Map]:
    """One map of all that is plain, one of all extensions; the worst of what shares a place."""
    maps = []
    plain, extended = _sorted(report, False), _sorted(report, True)
    if plain:
        maps.append(
            _map(plain, ids, _by_beta, lambda c: (c.spec.dtype, _by_variant(c)), corner="beta")
        )
    if extended:
        maps.append(
            _map(extended, ids, _by_variant, lambda c: ("", c.spec.dtype), corner="extension")
        )
    return maps


def maps_by_dtype(report: Report, ids: dict[int, str]) -> dict[str, list[Map]]:
    """dtype -> one map a backend and route, a backend's routes together, extensions after."""
    maps: dict[str, list[Map]] = {}
    for dtype in dict.fromkeys(cell.spec.dtype for cell in report.cells):
        for extended in (False, True):
            cells = [cell for cell in _sorted(report, extended) if cell.spec.dtype == dtype]
            pairs = dict.fromkeys((cell.backend, cell.route) for cell in cells)
            backends = list(dict.fromkeys(backend for backend, _ in pairs))
            for backend, route in sorted(pairs, key=lambda pair: backends.index(pair[0])):
                here = [c for c in cells if (c.backend, c.route) == (backend, route)]
                rows = _by_variant if extended else _by_beta
                drawn = _map(
                    here,
                    ids,
                    rows,
                    (lambda c: ("", _by_beta(c))) if extended else (lambda c: ("", _by_variant(c))),
                    corner="extension" if extended else "beta",
                    title=route,
                    subtitle=backend,
                )
                maps.setdefault(dtype, []).append(drawn)
    return maps
