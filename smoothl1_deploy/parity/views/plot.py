"""The drift curves as inline SVG that follows the page's light or dark theme."""

from __future__ import annotations

import io
import math
import re
from typing import Any

from ...errors import require
from ..drift import Curve, Drift

__all__ = ["curves_svg"]

#: Colours that stand for variables of the style sheet; matplotlib knows no CSS.
_INK, _GRID = "#010203", "#040506"
_SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04")
_VARIABLES = {
    _INK: "var(--ink-2)",
    _GRID: "var(--line)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES, 1)},
}
_MARKERS, _LINES = ("o", "s", "^", "D"), ("-", "-", "--", ":")
_HALF_ULP = 2.0**-24  # of float32: the error the best possible answer may have

_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, and read by a screen reader
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": _GRID,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}


def _draw(axes: Any, curves: list[Curve]) -> None:
    import matplotlib.ticker as ticker

    for number, curve in enumerate(curves):
        # An error of exactly 0 has no place on a log scale; it is drawn at the bottom.
        errors = [max(error, 1e-10) for error in curve.relative_error]
        axes.plot(
            curve.elements,
            errors,
            label=curve.way,
            color=_SERIES[number % len(_SERIES)],
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle=_LINES[number % len(_LINES)],
            linewidth=1.8,
            markersize=4.5,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    largest = max((e for curve in curves for e in curve.relative_error), default=1e-1)
    axes.set_ylim(8e-11, max(1.0, 100 * largest))
    axes.axhline(_HALF_ULP, color=_INK, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.annotate(
        "½ ULP", (1.01, _HALF_ULP), xycoords=("axes fraction", "data"), va="center", fontsize=9
    )
    axes.xaxis.set_major_locator(ticker.LogLocator(base=2, subs=(1.0,), numticks=30))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(_power_of_two))
    axes.yaxis.set_major_locator(ticker.LogLocator(base=10, numticks=12))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(_power_of_ten))
    axes.grid(True, axis="y", linewidth=0.6)
    axes.tick_params(length=0)
    axes.set_xlabel("elements")
    axes.set_ylabel("relative error of the mean")
    axes.legend(loc="upper left", fontsize=10, handlelength=2.4)


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _power_of_two(value: float, _: int) -> str:
    power = round(math.log2(value))
    return "" if power % 2 else "2" + str(power).translate(_RAISED)


def _power_of_ten(value: float, _: int) -> str:
    power = round(math.log10(value))
    return "" if power % 2 else "10" + str(power).translate(_RAISED)


def curves_svg(drift: Drift) -> dict[str, str]:
    """Kind of data -> an `<svg>` element, as wide as its place, of relative error against size.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    matplotlib = require("matplotlib", "report", "the plot of error against size")
    from matplotlib.figure import Figure

    drawn = {}
    for data in dict.fromkeys(curve.data for curve in drift.curves):
        # The salt keeps the ids of the two pictures apart, and the bytes the same every time.
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": data}):
            figure = Figure(figsize=(5.4, 4.0), layout="constrained")
            figure.patch.set_alpha(0)
            axes = figure.add_subplot()
            axes.patch.set_alpha(0)
            _draw(axes, [curve for curve in drift.curves if curve.data == data])
            buffer = io.StringIO()
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(buffer, format="svg", metadata=nothing)
        drawn[data] = _tidy(buffer.getvalue())
    return drawn


def _tidy(document: str) -> str:
    """The element alone, sized by the page, its colours the page's."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would style the whole page
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # figure_1 and the like, in both pictures
    svg = re.sub(r'(<svg [^>]*?)\s*width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)\s*height="[^"]*"', r"\1", svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.strip()
