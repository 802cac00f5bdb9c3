"""A case: spec × shape × input family × seed, and the check of one runner on it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from ..backends.base import Runner
from ..floats import NUMPY_DTYPE, Array
from ..graph import shapes as graph_shapes
from ..reference.oracle import oracle, oracle_gradient
from ..spec import LossSpec
from .bounds import in_range, proved_bound
from .compare import Verdict, compare
from .families import branch_shares, generate
from .samples import Sample, sample_of

__all__ = ["LAYOUTS", "Case", "CaseResult", "Layout", "References", "check", "with_beta"]

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
        """Input and target; a function of beta and dtype, and not of the reduction."""
        rng = self._generator(spec, "")
        return generate(self.family, spec, self.input_shape, self.target_shape, rng)

    def weights(self, spec: LossSpec) -> Array:
        """Weights of the target's shape, as detection heads use them: some 0, most up to 2."""
        rng = self._generator(spec, " weight")
        weights = rng.uniform(0.1, 2.0, self.target_shape)
        kept = rng.random(self.target_shape) > 0.2
        return np.asarray(np.where(kept, weights, 0.0)).astype(NUMPY_DTYPE[spec.dtype])

    def upstream(self, spec: LossSpec) -> Array:
        """A gradient to flow in, of the loss's shape and of either sign."""
        shape = np.broadcast_shapes(self.input_shape, self.target_shape)
        if spec.reduction != "none":
            shape = shape[:1] if spec.per_sample else ()
        rng = self._generator(spec, " upstream")
        values = rng.uniform(0.1, 2.0, shape) * rng.choice([-1.0, 1.0], shape)
        return np.asarray(values).astype(NUMPY_DTYPE[spec.dtype])

    def _generator(self, spec: LossSpec, what: str) -> np.random.Generator:
        shapes = f"{self.input_shape} {self.target_shape}"
        text = f"{self.family} {shapes} {spec.beta!r} {spec.dtype}{what}"
        return np.random.default_rng([self.seed, zlib.crc32(text.encode())])

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
    """A case's arrays with both references' answers, computed once for every route and backend.

    Attributes:
        spec: what the references computed; beta is a number here, also for `runtime_beta`.
        torch: PyTorch's array for each output of the spec.
        oracle: the exact one.
        shares: how much of each branch the case reaches.
        in_range: whether the case meets what the proved bound assumes.
    """

    spec: LossSpec
    input: Array
    target: Array
    weight: Array | None
    grad_output: Array | None
    torch: Mapping[str, Array]
    oracle: Mapping[str, Array]
    shares: Mapping[str, float]
    in_range: bool

    @classmethod
    def of(cls, spec: LossSpec, case: Case) -> References:
        """Generate the case's arrays and ask both references."""
        from ..reference.module import eager_outputs

        large = math.prod(case.input_shape) > _MOST_KEPT
        make = _arrays.__wrapped__ if large else _arrays
        input, target = make(case, spec.beta, spec.dtype)
        weight = case.weights(spec) if spec.weight else None
        upstream = case.upstream(spec) if spec.upstream else None
        exact = {"loss": oracle(spec, input, target, weight)}
        if spec.gradient:
            exact["grad_input"] = oracle_gradient(spec, input, target, weight, upstream)
        return cls(
            spec,
            input,
            target,
            weight,
            upstream,
            eager_outputs(spec, input, target, weight, grad_output=upstream),
            exact,
            branch_shares(spec, input, target),
            in_range(spec, input, target, weight),
        )


def with_beta(spec: LossSpec, beta: float) -> LossSpec:
    """What an artefact of `spec` computes when it is fed `beta`, which it takes as a float32."""
    if not spec.runtime_beta:
        return replace(spec, beta=beta)
    return replace(spec, beta=LossSpec(beta).effective_beta, runtime_beta=False)


#: Elements of arrays that are kept for the next spec; those of 2^24 would stay in memory for good.
_MOST_KEPT = 1 << 20


@lru_cache(maxsize=64)  # the three reductions of one beta and dtype share their inputs
def _arrays(case: Case, beta: float, dtype: str) -> tuple[Array, Array]:
    return case.arrays(LossSpec(beta=beta, dtype=dtype))


#: Elements from which on the largest distance of PyTorch says something of PyTorch.
_ENOUGH = 1024


@lru_cache(maxsize=512)
def _torch_alike(family: str, beta: float, dtype: str) -> Mapping[str, int]:
    """PyTorch's own largest distance over elements of a family, by the output."""
    spec = LossSpec(beta, "none", dtype, gradient=True)
    refs = References.of(spec, Case(family, "alike", (_ENOUGH,), (_ENOUGH,)))
    return {
        name: compare(spec, theirs, theirs, refs.oracle[name], refs.input, refs.target, name).ulp
        for name, theirs in refs.torch.items()
    }


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
        size = refs.oracle["loss"].size
        verdict = Verdict(False, 0, 0, 0, size, wrong_class=size, detail=detail)
        return cls(case, verdict, refs.shares, _sample(refs, "loss", None, 0))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **self.case.to_dict(),
            **self.verdict.to_dict(),
            "shares": dict(self.shares),
            "sample": self.sample.to_dict() if self.sample else None,
        }


def check(
    runner: Runner, case: Case, refs: References, accumulator: str | None = None
) -> CaseResult:
    """Run one case and judge every output; the verdict is that of the worst.

    Args:
        runner: of the artefact.
        case: what was run.
        refs: its arrays, and what is right for them.
        accumulator: the dtype in which one of our own artefacts is added up, for the bound that
            is proved for it; None for anything else.
    """
    spec = refs.spec
    proved = None
    given = [refs.input, refs.target, *([] if refs.weight is None else [refs.weight])]
    shape = np.broadcast_shapes(*(array.shape for array in given))
    if accumulator is not None and refs.in_range:
        in_float32 = runner.added_in_float32(math.prod(shape))
        proved = proved_bound(spec, shape, accumulator, in_float32)
    beta = spec.effective_beta if "beta" in runner.signature.inputs else None
    outputs = runner.run(
        refs.input, refs.target, weight=refs.weight, beta=beta, grad_output=refs.grad_output
    )
    if len(refs.oracle) == 1:
        outputs = {"loss": outputs.get("loss", next(iter(outputs.values())))}
    few = 0 < math.prod(shape) < _ENOUGH
    alike = _torch_alike(case.family, spec.effective_beta, spec.dtype) if few else {}
    verdicts = {
        name: compare(
            spec,
            outputs[name],
            refs.torch[name],
            exact,
            refs.input,
            refs.target,
            name,
            proved if name == "loss" else None,
            alike.get(name, 0),
        )
        for name, exact in refs.oracle.items()
    }
    name = max(verdicts, key=lambda n: verdicts[n].badness)
    better = sum(verdict.better for verdict in verdicts.values())
    sample = _sample(refs, name, outputs[name], verdicts[name].worst)
    return CaseResult(case, replace(verdicts[name], better=better), refs.shares, sample)


def _sample(refs: References, output: str, got: Array | None, worst: int | None) -> Sample | None:
    arrays = {"input": refs.input, "target": refs.target}
    if refs.weight is not None:
        arrays["weight"] = refs.weight
    return sample_of(output, arrays, got, refs.torch[output], refs.oracle[output], worst)
