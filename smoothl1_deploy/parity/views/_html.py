"""A report or a verification as one HTML file: no network, nothing beside it, no script needed.

Everything that comes from a run (names, details of failures, versions) is escaped by jinja2;
the style sheet and the script are this package's own.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from ..._environment import docstring
from ..._table import clean
from ...errors import require
from .._cases import LAYOUTS
from .._compare import REDUCTION_FLOOR
from .._contract import KINDS
from .._drift import Curve, Drift
from .._families import BRANCHES, FAMILIES
from .._report import Cell, Report, repeat_command
from .._verify import Verification
from .._whole import ModelVerification
from . import _tables as tables
from ._tables import Grid, beta_of, beta_text, finding, representative, variant, variant_of

_FAILURES_SHOWN = 30  # a panel; all of them are in the JSON
_RED_SHOWN = 10  # at the top of the page; the others are folded away

# --- what the names mean, for who reads a report without having written it

ROUTES: Mapping[str, str] = {
    "function": "one node, its body among the functions of the model",
    "inlined": "the same as plain ONNX operators",
    "torch": "what torch.onnx.export makes of the module with this package's translation table",
}
BACKENDS: Mapping[str, str] = {
    "onnx-reference": "the ONNX project's own evaluator: what the file means",
    "ort-cpu": "ONNX Runtime on the CPU, with this package's operators, where they were built",
    "ort-cpu-bare": "the same with nothing registered: the file alone, as anyone's session runs it",
    "trt-network": (
        "the network that TensorRT's parser made of the file, evaluated in numpy: what TensorRT "
        "understood, not what a GPU computes"
    ),
    "torch-triton": "fused kernels of Triton, the compiler, on a GPU or interpreted",
    "ort-cuda": "ONNX Runtime's CUDA provider",
    "ort-tensorrt": "ONNX Runtime's TensorRT provider",
    "ort-tensorrt-rtx": "ONNX Runtime's provider for TensorRT for RTX",
    "trt": "a TensorRT engine on a GPU",
    "triton-http": "a Triton server on this machine, asked over HTTP",
    "triton-grpc": "the same, over gRPC",
}


def family_meaning(name: str) -> str:
    """What a family of inputs holds: its function's docstring, without the full stop."""
    return docstring(FAMILIES[name]).rstrip(".")


def layout_meaning(name: str) -> str:
    """The shapes of a layout."""
    layout = LAYOUTS[name]
    weight = "" if layout.weight is None else f", weights {layout.weight}"
    if layout.input == layout.target:
        return f"two tensors of {layout.input}{weight}"
    return f"input {layout.input}, target {layout.target}{weight}"


def _meanings(report: Report) -> dict[str, dict[str, str]]:
    """The names that occur in the maps, by their kind, with what they mean."""
    routes = {cell.route for cell in report.cells}
    backends = {cell.backend for cell in report.cells}
    layouts = dict.fromkeys(layout for cell in report.cells for layout in cell.layouts)
    return {
        "Routes: how the loss becomes ONNX": {k: v for k, v in ROUTES.items() if k in routes},
        "Backends: what runs it": {k: v for k, v in BACKENDS.items() if k in backends},
        "Layouts: the shapes that are fed": {name: layout_meaning(name) for name in layouts},
    }


# --- the maps

#: The steps of the colour scale, as (largest distance in ULP, label); the last is open.
STEPS: tuple[tuple[float, str], ...] = (
    (0, "0"), (1, "1"), (2, "2"), (4, "3–4"), (16, "5–16"), (256, "17–256"), (math.inf, "> 256"),
)  # fmt: skip


def step(ulp: int) -> int:
    """The index in `STEPS` that a distance falls into."""
    return next(i for i, (limit, _) in enumerate(STEPS) if ulp <= limit)


def anchors(cells: Iterable[Cell]) -> dict[int, str]:
    """`id(cell)` -> an HTML id that says which cell it is; unique in the report."""
    found: dict[int, str] = {}
    same: Counter[str] = Counter()
    for cell in cells:
        spec = cell.spec
        words = [spec.dtype, cell.route, cell.backend, variant(spec), "beta", beta_text(cell.beta)]
        slug = re.sub(r"[^A-Za-z0-9.+-]+", "-", "-".join(words))
        same[slug] += 1
        found[id(cell)] = f"{slug}-{same[slug]}" if same[slug] > 1 else slug
    return found


def maps(report: Report) -> dict[str, list[Grid]]:
    """dtype -> one map a backend and route, a backend's routes together, extensions after."""
    found: dict[str, list[Grid]] = {}
    for dtype in dict.fromkeys(cell.spec.dtype for cell in report.cells):
        plain, extended = tables.split(cell for cell in report.cells if cell.spec.dtype == dtype)
        kinds = (
            ("beta", plain, beta_of, lambda cell: ("", variant_of(cell))),
            ("extension", extended, variant_of, lambda cell: ("", beta_of(cell))),
        )
        found[dtype] = [
            Grid.of(corner, cells, row, column, route, backend)
            for corner, group, row, column in kinds
            for backend, route, cells in tables.by_backend(group)
        ]
    return found


def _label(cell: Cell) -> str:
    """All that an entry of a map shows, in words, for a screen reader."""
    spec = cell.spec
    where = f"{spec.dtype}, {cell.route} on {cell.backend}, beta {beta_text(cell.beta)}, "
    where += f"{variant(spec)}: "
    if cell.refused is not None:
        return f"{where}not run, {cell.refused}"
    measured = {"class": "wrong class", "error": "error"}.get(finding(cell), f"{cell.ulp} ULP")
    verdict = "green" if cell.ok else "RED"
    return f"{where}{verdict}, {measured}, PyTorch {cell.torch_ulp}, allowed {cell.allowed}"


# --- the plot of error against size

_WIDTH, _HEIGHT = 460, 250  # the area between the axes
_LOWEST = -10  # the power of ten at the bottom, where an error of exactly 0 is drawn too


class Plot:
    """Where the points of some curves lie: error up, elements to the right, both logarithmic."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        errors = [error for curve in curves for error in curve.relative_error]
        sizes = [size for curve in curves for size in curve.elements]
        self.curves = curves
        self._top = max(0, math.ceil(math.log10(max(errors, default=1.0) or 1.0)))
        self._left, self._right = (math.log2(end) for end in (min(sizes), max(sizes)))

    def x(self, elements: int) -> float:
        """From the left end."""
        width = self._right - self._left or 1.0
        return round(_WIDTH * (math.log2(elements) - self._left) / width, 1)

    def y(self, error: float) -> float:
        """From the upper end."""
        power = math.log10(max(error, 10.0**_LOWEST))
        return round(_HEIGHT * (self._top - power) / (self._top - _LOWEST), 1)

    @property
    def powers_of_ten(self) -> range:
        """Those that have a line."""
        return range(_LOWEST, self._top + 1, 2)

    @property
    def powers_of_two(self) -> range:
        """Those that are named below."""
        first = math.ceil(self._left)
        return range(first + first % 2, math.floor(self._right) + 1, 2)


def plots(drift: Drift) -> dict[str, Plot]:
    """Kind of data -> the plot of its curves."""
    kinds = dict.fromkeys(curve.data for curve in drift.curves)
    return {data: Plot([c for c in drift.curves if c.data == data]) for data in kinds}


# --- the page


def _asset(name: str) -> str:
    return files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


def _template(name: str) -> Any:
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
    environment.filters |= {"plural": tables.plural, "distance": tables.distance_text, "step": step}
    return environment.get_template(name)


def render(found: Report | Verification | ModelVerification) -> str:
    """The whole document.

    Raises:
        MissingDependencyError: without jinja2.
    """
    name = "report" if isinstance(found, Report) else "verification"
    document: str = _template(f"{name}.html.j2").render(
        found=found,
        tables=tables,
        versions=tables.versions(found.environment),
        floor=REDUCTION_FLOOR,
        style=_asset("report.css"),
        **(_of_report(found) if isinstance(found, Report) else {"script": ""}),
    )
    return document.lstrip() + "\n"


def _of_report(report: Report) -> dict[str, Any]:
    """What the page of a report shows beside it, and the script that makes it easier to use."""
    # A panel is of a cell of the grid, or of a draw that is red.
    paneled = [*report.cells, *(cell for row in report.draws for cell in row.red)]
    ids = anchors(paneled)
    script = _asset("report.js")
    return dict(
        summary=report.summary,
        cells=paneled,
        anchor=lambda cell: ids[id(cell)],
        shown=lambda cells: representative(cells) or cells[0],  # the one that stands for several
        label=_label,
        repeat=lambda cell: repeat_command(cell, report.seed),
        maps=maps(report),
        steps=[label for _, label in STEPS],
        branches=BRANCHES,
        meanings=_meanings(report),
        family_meaning=family_meaning,
        plots=plots(report.drift) if report.drift else {},
        kinds=KINDS,
        worst=max((cell.ulp for cell in report.cells if cell.ok), default=0),
        failures_shown=_FAILURES_SHOWN,
        red_shown=_RED_SHOWN,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
