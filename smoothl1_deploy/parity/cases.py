"""A case: spec × shape × input family × seed, and the check of one runner on it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..backends.base import Runner
from ..floats import Array
from ..graph import shapes as graph_shapes
from ..reference.oracle import oracle
from ..spec import LossSpec
from .compare import Verdict, compare
from .families import branch_shares, generate
from .samples import Sample, sample_of

__all__ = ["LAYOUTS", "Case", "CaseResult", "Layout", "References", "check"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """A named pair of shapes, and the axes to export an artefact of fixed rank for it."""

    input: Shape
    target: Shape
    input_axes: graph_shapes.Shape
    target_axes: graph_shapes.Shape


def _same(shape: Shape, axes: graph_shapes.Shape) -> Layout:
    return Layout(shape, shape, axes, axes)


LAYOUTS: Mapping[str, Layout] = {
    "matrix": _same((64, 16), ("N", 16)),
    "no-rows": _same((0, 16), ("N", 16)),
    "2^20": _same((1 << 16, 16), ("N", 16)),
    "2^24": _same((1 << 20, 16), ("N", 16)),
    "scalar": _same((), ()),
    "empty": _same((0,), ("N",)),
    "odd": _same((1021,), ("N",)),
    "4-d": _same((2, 3, 8, 5), ("N", 3, "H", "W")),
    "broadcast-row": Layout((64, 16), (16,), ("N", 16), (16,)),
    "broadcast-both": Layout((7, 1, 5), (3, 1), ("N", 1, 5), (3, 1)),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One input pair, reproducible from these fields alone."""

    family: str
    layout: str
    input_shape: Shape
    target_shape: Shape
    seed: int = 0

    @classmethod
    def of(cls, family: str, layout: str, seed: int = 0) -> Case:
        """The case of a family in a named layout."""
        shapes = LAYOUTS[layout]
        return cls(family, layout, shapes.input, shapes.target, seed)

    def arrays(self, spec: LossSpec) -> tuple[Array, Array]:
        """Input and target. They depend on beta and dtype, so that each branch is reached, and
        not on the reduction.
        """
        text = f"{self.family} {self.input_shape} {self.target_shape} {spec.beta!r} {spec.dtype}"
        rng = np.random.default_rng([self.seed, zlib.crc32(text.encode())])
        return generate(self.family, spec, self.input_shape, self.target_shape, rng)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "family": self.family,
            "layout": self.layout,
            "input_shape": list(self.input_shape),
            "target_shape": list(self.target_shape),
            "seed": self.seed,
        }


@dataclass(frozen=True, slots=True)
class References:
    """A case's arrays with both references' answers, computed once for every route and backend."""

    input: Array
    target: Array
    torch: Array
    oracle: Array
    shares: Mapping[str, float]

    @classmethod
    def of(cls, spec: LossSpec, case: Case) -> References:
        """Generate the case's arrays and ask both references."""
        from ..reference.module import eager

        input, target = _arrays(case, spec.beta, spec.dtype)
        return cls(
            input,
            target,
            eager(spec, input, target),
            oracle(spec, input, target),
            branch_shares(spec, input, target),
        )


@lru_cache(maxsize=64)  # the three reductions of one beta and dtype share their inputs
def _arrays(case: Case, beta: float, dtype: str) -> tuple[Array, Array]:
    return case.arrays(LossSpec(beta=beta, dtype=dtype))


@dataclass(frozen=True, slots=True)
class CaseResult:
    """The verdict on one case, how much of each branch it reached, and its worst element."""

    case: Case
    verdict: Verdict
    shares: Mapping[str, float]
    sample: Sample | None = None

    @classmethod
    def failed(cls, case: Case, refs: References, detail: str) -> CaseResult:
        """The result of a case that gave an error instead of an answer."""
        count = refs.oracle.size
        sample = sample_of(refs.input, refs.target, None, refs.torch, refs.oracle, 0)
        verdict = Verdict(False, 0, 0, 0, count, wrong_class=count, detail=detail)
        return cls(case, verdict, refs.shares, sample)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **self.case.to_dict(),
            **self.verdict.to_dict(),
            "shares": dict(self.shares),
            "sample": self.sample.to_dict() if self.sample else None,
        }


def check(runner: Runner, spec: LossSpec, case: Case, refs: References | None = None) -> CaseResult:
    """Run one case and judge the answer."""
    refs = References.of(spec, case) if refs is None else refs
    outputs = runner.run(refs.input, refs.target)
    loss = outputs.get("loss", next(iter(outputs.values())))
    verdict = compare(spec, loss, refs.torch, refs.oracle, refs.input, refs.target)
    sample = sample_of(refs.input, refs.target, loss, refs.torch, refs.oracle, verdict.worst)
    return CaseResult(case, verdict, refs.shares, sample)
