"""The tests: one for each dtype, beta and reduction, over every case of a kind.

A test goes through all its cases and fails with the worst, so that a runtime that gets one family
wrong has one red test for each spec, and not a page of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial

import onnx
import pytest

from .._records import plain
from .._spec import DTYPES, REDUCTIONS, LossSpec
from ..backends._base import Backend
from ..graph._export import export
from ..parity._cases import LAYOUTS, Case, CaseResult, References
from ..parity._families import FAMILIES
from ..parity._matrix import artefact_axes, is_spared
from ._subject import Handing, as_it_is, on_one_core, read_only, strided, tried

#: What each beta shows: no division, a step that floats don't hold, the default, a square that
#: overflows float16, no linear part.
BETAS = (0.0, 1e-3, 0.1, 1.0, 1e4, float("inf"))
SPECS = [
    LossSpec(b, reduction, dtype) for dtype in DTYPES for b in BETAS for reduction in REDUCTIONS
]
#: The route of the files that a backend runs: operators of ONNX alone.
_ROUTE = "inlined"

VALUES = [Case.of(family, layout) for layout in ("matrix", "odd") for family in FAMILIES]
SHAPES = [
    Case.of("normal", layout)
    for layout in ("scalar", "empty", "no-rows", "4-d", "broadcast-row", "broadcast-both")
]
SIZES = [Case.of(family, "2^20") for family in ("normal", "constant")]
FEW = [Case.of("normal", layout) for layout in ("matrix", "4-d", "broadcast-row")]

Hold = Callable[..., None]


def name_of(spec: LossSpec) -> str:
    """What stands between the brackets of a test's name."""
    return f"{spec.dtype}-beta{spec.beta:g}-{spec.reduction}"


every_spec = pytest.mark.parametrize("spec", SPECS, ids=name_of)
at_beta_1 = pytest.mark.parametrize("spec", [s for s in SPECS if s.beta == 1], ids=name_of)


@lru_cache(maxsize=64)
def _model(spec: LossSpec, layout: str, any_rank: bool) -> onnx.ModelProto:
    axes = artefact_axes(spec, _ROUTE, layout, any_rank)
    return export(spec, _ROUTE, axes["shape"], target_shape=axes.get("target_shape"))


def wrong(
    backend: Backend,
    spec: LossSpec,
    cases: Sequence[Case] = tuple(VALUES),
    handing: Handing = as_it_is,
) -> list[CaseResult]:
    """The cases of a spec that a backend gets wrong, the worst first."""
    load = cache(lambda layout: backend.load(_model(spec, layout, backend.any_rank)))
    found = []
    for case in cases:
        spared = is_spared(spec, case, backend) or case.layout not in (backend.layouts or LAYOUTS)
        if not spared:
            refs = References.of(spec, case)
            runner = partial(load, case.layout)
            found.append(tried(runner, backend, refs, handing))
    red = [result for result in found if not result.verdict.ok]
    return sorted(red, key=lambda result: result.verdict.badness, reverse=True)


def told(red: Sequence[CaseResult], cases: int) -> str:
    """What is wrong: the worst case with its numbers, then the names of all."""
    worst, names = red[0], ", ".join(f"{each.case.family} {each.case.layout}" for each in red)
    shapes = f"{worst.case.input_shape} and {worst.case.target_shape}"
    lines = [f"{worst.case.family} {worst.case.layout}: {worst.verdict.detail}"]
    if worst.sample:
        of = f" (the first of {worst.sample.behind:,})" if worst.sample.behind > 1 else ""
        given = (f"{name} {', '.join(x)}" for name, x in worst.sample.inputs.items())
        lines.append(f"from {'; '.join(given)}{of}")
    lines.append(f"the shapes are {shapes}; of {cases} cases {len(red)} are wrong: {names}")
    return "\n".join(lines)


#: Makes the backend that is tried, for a number of threads.
SUBJECT = pytest.StashKey[Callable[[int], Backend]]()


@pytest.fixture
def hold(request: pytest.FixtureRequest, spec: LossSpec) -> Hold:
    """Fails the test where what is tried gets a case of its spec wrong; skips what it refuses."""

    def held(cases: Sequence[Case], handing: Handing = as_it_is, threads: int = 0) -> None:
        backend = request.config.stash[SUBJECT](threads)
        if reason := backend.refuses(spec):
            pytest.skip(reason)
        red = wrong(backend, spec, cases, handing)
        request.node.user_properties.append(("wrong", plain(red)))
        if red:
            pytest.fail(told(red, len(cases)), pytrace=False)

    return held


@every_spec
def test_values(hold: Hold) -> None:
    """Every family, in 64 rows of 16 and in 1,021 elements, which no vector divides."""
    hold(VALUES)


@at_beta_1
def test_shapes(hold: Hold) -> None:
    """Rank 0, nothing at all, four axes, and targets that broadcast."""
    hold(SHAPES)


@at_beta_1
def test_sizes(hold: Hold) -> None:
    """2^20 elements: what sums lose on their way."""
    hold(SIZES)


@at_beta_1
def test_read_only(hold: Hold) -> None:
    """Arrays that can't be written to."""
    hold(FEW, read_only)


@at_beta_1
def test_strided(hold: Hold) -> None:
    """Arrays that are a slice of larger ones."""
    hold(FEW, strided)


@at_beta_1
def test_one_core(hold: Hold) -> None:
    """The same sizes on one core with one thread, where a sum has one part alone."""
    with on_one_core():
        hold(SIZES, threads=1)
