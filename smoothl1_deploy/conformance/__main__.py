"""`python -m smoothl1_deploy.conformance FILE...`: the suite's results as a table of Markdown."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .._records import grouped
from .._spec import DTYPES
from .._table import Entry, Table

_NUMBERS = ("class", "ULP")  # kinds of fault in an answer, beside what came instead of one
_MOST = 4  # names of cases in an entry; the files have all


def table_of(results: Iterable[Mapping[str, Any]]) -> Table:
    """A row for each that was tried, a column for each dtype.

    >>> spec = {"dtype": "float64", "beta": 1.0, "reduction": "sum"}
    >>> case = {"family": "normal", "layout": "2^20", "detail": "9 ULP > 2; at ()", "ulp": 9}
    >>> test = {"test": "test_sizes[]", "outcome": "failed", "spec": spec, "wrong": [case]}
    >>> found = {"tried": "mine:loss", "tests": [test], "date": "2026-11-29"}
    >>> table_of([{**found, "packages": {"torch": "2.13.0"}}]).rows[0][-1].text
    '1 of 1: 9 ULP at beta 1: normal 2^20'
    """
    found = [*results]
    rows = [(each["tried"], *(_entry(each["tests"], dtype) for dtype in DTYPES)) for each in found]
    versions = {name: version for each in found for name, version in each["packages"].items()}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    dates = ", ".join(sorted({each["date"][:10] for each in found}))
    columns = ("tried", *DTYPES)
    return Table("What each gets wrong", columns, rows, "lllll", (f"{dates}, with {listed}",))


def _entry(tests: Iterable[Mapping[str, Any]], dtype: str) -> Entry:
    """How many tests of a dtype are red, and by what."""
    ran = [test for test in tests if test["outcome"] != "skipped"]
    mine = [test for test in ran if test["spec"]["dtype"] == dtype]
    if not mine:
        return Entry("not tried", ok=True)
    red = sum(bool(test["wrong"]) for test in mine)
    said = [_fault(kind, cases) for kind, cases in grouped(_faults(mine)).items()]
    return Entry(f"{red} of {len(mine)}" + (": " if said else "") + "; ".join(said), not red)


def _fault(kind: str, cases: list[tuple[float, str, int]]) -> str:
    """A kind of fault in words: the distance, the betas, the cases, the worst first."""
    if kind not in _NUMBERS:
        return kind
    worst = [*dict.fromkeys(name for _, name, _ in sorted(cases, key=lambda case: -case[2]))]
    more = [f"{len(worst) - _MOST} more"] if len(worst) > _MOST else []
    distance = f"{max(ulp for _, _, ulp in cases):,} " if kind == "ULP" else ""
    at = ", ".join(f"{beta:g}" for beta in sorted({beta for beta, _, _ in cases}))
    return f"{distance}{kind} at beta {at}: {', '.join(worst[:_MOST] + more)}"


def _faults(tests: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, tuple[float, str, int]]]:
    """The kind of each wrong case, and its beta, name and distance.

    What a hostile variant gives as the plain arrays do is no fault of its own.
    """
    seen = set()
    for test in tests:
        beta, variant = float(test["spec"]["beta"]), test["test"].partition("[")[0]
        for case in test["wrong"]:
            key = beta, test["spec"]["reduction"], case["family"], case["layout"], case["detail"]
            if key in seen:
                continue
            seen.add(key)
            odd = case["layout"] not in ("matrix", "odd")
            name = f"{case['family']} {case['layout']}" if odd else case["family"]
            if variant not in ("test_values", "test_shapes", "test_sizes"):
                name = f"{name} {variant.removeprefix('test_').replace('_', '-')}"
            yield _kind(case["detail"]), (beta, name, case["ulp"])


def _kind(detail: str) -> str:
    """A wrong class, a distance, or what came instead of an answer."""
    if "in a wrong class" in detail:
        return "class"
    short = re.sub(r"\(.*?\)", "", detail).removeprefix("UnsupportedError: ")[:60]
    return "ULP" if " ULP > " in detail else short


if __name__ == "__main__":
    found = [json.loads(Path(path).read_text()) for path in sys.argv[1:]]
    print("\n".join(table_of(found).markdown()))
