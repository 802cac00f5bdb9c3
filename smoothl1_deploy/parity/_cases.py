"""A case, which is spec × layout × family × seed, and the check of one runner on it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np

from .. import _shapes as graph_shapes
from .._floats import NUMPY_DTYPE, Array
from .._records import Record, plain
from .._spec import ELEMENTS, LossSpec
from ..backends._runner import Runner
from ..errors import SmoothL1DeployError
from ..reference._oracle import exact_outputs, selected
from ._bounds import gradient_bound, in_range, proved_bound
from ._compare import Verdict, compare
from ._families import branch_shares, generate, weigh
from ._shapes import Shape


@dataclass(frozen=True, slots=True)
class Layout:
    """Named shapes, and the axes to export an artefact of fixed rank for them.

    Weights and masks, where a spec has them, are of the target's shape (None), or of their own.
    """

    input: Shape
    target: Shape
    input_axes: graph_shapes.Shape
    target_axes: graph_shapes.Shape
    weight: Shape | None = None
    weight_axes: graph_shapes.Shape | None = None


def _same(shape: Shape, axes: graph_shapes.Shape) -> Layout:
    return Layout(shape, shape, axes, axes)


def _weighted(weight: Shape, axes: graph_shapes.Shape) -> Layout:
    return Layout((64, 16), (64, 16), ("N", 16), ("N", 16), weight, axes)


_EMPTY_ROWS, _LEFT_OUT = 0.1, 0.3  # are the shares of a mask's rows, and of other elements

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
    "broadcast-10^6": Layout((1, 4), (1_000_000, 4), (1, 4), ("N", 4)),
    "weight-column": _weighted((64, 1), ("N", 1)),
    "weight-row": _weighted((16,), (16,)),
    "weight-one": _weighted((1,), (1,)),
    "weight-scalar": _weighted((), ()),
    "weight-wider": _weighted((3, 64, 16), (3, "N", 16)),
}


def is_for(spec: LossSpec, layout: str) -> bool:
    """Whether a spec can meet a layout: rank 0 has no samples, and weights are for who weighs.

    An array of betas has to broadcast with it.
    """
    shapes = LAYOUTS[layout]
    weighs = shapes.weight is None or spec.weight is not None or spec.mask
    try:
        rank = len(np.broadcast_shapes(shapes.input, shapes.target, spec.beta_shape))
    except ValueError:
        return False
    has_axes = all(-rank <= axis < rank for axis in spec.axes or ())
    return weighs and has_axes and (rank > 0 or not spec.per_sample)


@dataclass(frozen=True, slots=True)
class Case:
    """One input pair, reproducible from these fields alone.

    Attributes:
        weight_shape: of the weights, where a spec has them; None for the target's.
        mask_shape: of the mask, where a spec has one; None for that of the weights.
        weighting: one of `families.WEIGHTS`: what weights and an upstream gradient are like.
    """

    family: str
    layout: str
    input_shape: Shape
    target_shape: Shape
    weight_shape: Shape | None = None
    seed: int = 0
    weighting: str = "usual"
    mask_shape: Shape | None = None

    @classmethod
    def of(cls, family: str, layout: str, seed: int = 0) -> Case:
        """The case of a family in a named layout."""
        shapes = LAYOUTS[layout]
        return cls(family, layout, shapes.input, shapes.target, shapes.weight, seed)

    @classmethod
    def at(cls, family: str, layout: str, shapes: Mapping[str, Shape], seed: int = 0) -> Case:
        """The case of a family in the shapes of input, target, weight and mask, by their names."""
        given: dict[str, Any] = {f"{name}_shape": shape for name, shape in shapes.items()}
        return cls(family, layout, seed=seed, **given)

    def arrays(self, spec: LossSpec) -> tuple[Array, Array]:
        """Input and target; a function of beta and dtype, and not of the reduction."""
        rng = self._generator(spec, "")
        return generate(self.family, spec, self.input_shape, self.target_shape, rng)

    def shape(self, spec: LossSpec) -> Shape:
        """What input, target and, where the spec has them, weights, mask and betas broadcast to."""
        operands = (self._shape_of(name) for name in spec.operands)
        return np.broadcast_shapes(*operands, spec.beta_shape)

    def _shape_of(self, operand: str) -> Shape:
        weight = self.target_shape if self.weight_shape is None else self.weight_shape
        mask = weight if self.mask_shape is None else self.mask_shape
        shapes = {"input": self.input_shape, "target": self.target_shape, "weight": weight}
        return shapes.get(operand, mask)

    def more(self, spec: LossSpec) -> dict[str, Array]:
        """What a spec takes beside input and target, by role, but for beta."""
        make = {"weight": self._weights, "mask": self._mask, "divisor": self._divisor}
        make["grad_output"] = self._upstream
        return {role: make[role](spec) for role in spec.inputs if role in make}

    def _weights(self, spec: LossSpec) -> Array:
        """The weights, some of them 0."""
        rng = self._generator(spec, " weight")
        return weigh(self.weighting, spec, self._shape_of("weight"), rng)

    def _mask(self, spec: LossSpec) -> Array:
        """A mask, some of whose rows select nothing."""
        shape, rng = self._shape_of("mask"), self._generator(spec, " mask")
        rows = rng.random(shape[:1] + (1,) * (len(shape) - 1)) > _EMPTY_ROWS
        return np.asarray((rng.random(shape) > _LEFT_OUT) & rows)

    def _divisor(self, spec: LossSpec) -> Array:
        """A divisor, sometimes 0."""
        rng = self._generator(spec, " divisor")
        value = rng.choice([0.0, 1.0, rng.uniform(0.5, 200.0)], p=[0.2, 0.2, 0.6])
        return np.asarray(value, spec.dtype_of("divisor"))

    def _upstream(self, spec: LossSpec) -> Array:
        """A gradient to flow in, of the loss's shape and of either sign."""
        shape = spec.loss_shape(self.shape(spec))
        rng = self._generator(spec, " upstream")
        if self.weighting != "usual":
            return weigh(self.weighting, spec, shape, rng)
        values = rng.uniform(0.1, 2.0, shape) * rng.choice([-1.0, 1.0], shape)
        return np.asarray(values).astype(NUMPY_DTYPE[spec.dtype])

    def _generator(self, spec: LossSpec, what: str) -> np.random.Generator:
        shapes = f"{self.input_shape} {self.target_shape}"
        text = f"{self.family} {shapes} {spec.knee!r} {spec.dtype}{what}"
        return np.random.default_rng([self.seed, zlib.crc32(text.encode())])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; what is as usual of weights is left out."""
        values = {field.name: plain(getattr(self, field.name)) for field in fields(self)}
        usual = {"weight_shape": None, "weighting": "usual", "mask_shape": None}
        return {key: value for key, value in values.items() if usual.get(key, ...) != value}


def needs_wider(spec: LossSpec, case: Case, wide: bool) -> bool:
    """Whether an answer can only be right in a format wider than the one at hand.

    Case 1, a gradient: summed back to a broadcast input, terms of either sign cancel, which in
    float64 leaves the roundings of products with weights or an upstream gradient, of quotients by
    an array of betas, and of numbers near the largest those of the differences; weighted (or
    multiplied by an upstream gradient or the constant factor) and divided, a subnormal slope is
    rounded three times, and so is a subnormal loss of `none` that is multiplied by the factor. How
    far PyTorch itself, which computes in the output's format, is off in these cases is a matter of
    luck, and no measure.
    (What float64 differences alone leave is no such case: `_bounds.gradient_bound` allows for it.)
    Case 2, where float64 is narrowed to float32: what a graph does in float64 because float32 has
    no room for it: a subnormal beta, slopes by a beta near the largest, products with subnormal
    weights, and those of a subnormal upstream gradient with Huber's slopes, which may be above 1.

    Case 3: an array of betas, some infinite, reduces numbers near the largest: PyTorch makes NaN of
    the squares of some, and we, as it does, infinity of the differences of others.

    Args:
        spec: beta is a number, or an array, also for an artefact that takes it at run time.
        case: of this spec.
        wide: whether the backend has float64.
    """
    scaled = spec.weight is not None or spec.upstream or spec.mask or spec.divisor
    beta = np.asarray(spec.effective_beta)
    is_mixed = 0 < np.isinf(beta).sum() < beta.size and spec.reduction != "none"
    if is_mixed and case.family == "overflow":
        return True
    has_factor = spec.loss_weight != 1.0
    if has_factor and spec.reduction == "none" and case.family in ("subnormals", "magnitudes"):
        return True
    rounds_thrice = spec.gradient and (scaled or has_factor) and case.family == "subnormals"
    sums_back = spec.gradient and case.input_shape != case.shape(spec)
    if sums_back and case.family == "overflow":
        return True
    if spec.dtype == "float64":
        return rounds_thrice or (sums_back and (scaled or spec.beta_shape != ()))
    if wide:
        return False
    is_large = bool(((beta > 1e30) & np.isfinite(beta)).any())
    if spec.has_subnormal_beta or (spec.gradient and is_large):
        return True
    is_product = spec.weight is not None or (spec.upstream and spec.loss == "huber")
    is_subnormal = is_product and case.weighting in ("tiny", "mixed")
    return sums_back or rounds_thrice or is_subnormal


@dataclass(frozen=True, slots=True)
class References:
    """A case, its arrays and both references' answers: computed once for every route and backend.

    Attributes:
        spec: what the references computed; beta is known here, also for `runtime_beta`.
        case: what the arrays are made of.
        more: what else goes in, by role: weight, mask, divisor, grad_output.
        torch: PyTorch's array for each output of the spec.
        oracle: the exact one.
        shares: how much of each branch the case reaches.
        in_range: whether the case meets what the proved bound assumes.
        beta: what an artefact that takes beta is fed.
    """

    spec: LossSpec
    case: Case
    input: Array
    target: Array
    more: Mapping[str, Array]
    torch: Mapping[str, Array]
    oracle: Mapping[str, Array]
    shares: Mapping[str, float]
    in_range: bool
    beta: Any

    @classmethod
    def of(cls, spec: LossSpec, case: Case, beta: float | None = None) -> References:
        """Generate the case's arrays and ask both references.

        A `beta` that is none, negative or NaN, is what an artefact that takes beta is fed; all
        that it gives is then NaN, of whatever arrays.
        """
        from ..reference._module import eager_outputs

        input, target = case.arrays(spec)
        more = case.more(spec)
        if spec.mask and more["mask"].shape == target.shape:  # nobody looks there
            target = np.where(more["mask"], target, target.dtype.type(np.nan))
        exact = exact_outputs(spec, input, target, **more)
        seen = selected(input, target, **more)
        asked, fed = spec, None
        if beta is not None:
            for name in exact.keys() - {"differences"}:
                exact[name] = np.full_like(exact[name], np.nan)
            asked = replace(spec.at(1.0), runtime_beta=spec.beta_shape or True)
            fed = np.full(spec.beta_shape, beta, np.float32)
        return cls(
            spec,
            case,
            input,
            target,
            more,
            eager_outputs(asked, input, target, beta=fed, **more),
            exact,
            branch_shares(spec, *seen),
            in_range(spec, *seen, more.get("weight"), more.get("mask")),
            spec.effective_beta if fed is None else fed,
        )


def with_beta(spec: LossSpec, beta: float) -> LossSpec:
    """What an artefact of `spec` computes when it is fed `beta`, which it takes as a float32.

    That of an array of betas computes what it does, and one that takes an array gets `beta` among
    others.
    """
    if not spec.runtime_beta:
        return spec if spec.beta_shape else spec.at(beta)
    fed = LossSpec(beta).effective_beta
    return spec.at(np.resize([fed, *_OTHER_BETAS], spec.beta_shape) if spec.beta_shape else fed)


#: What an array of betas that is an input has beside the one it is fed for.
_OTHER_BETAS = (1.0, 0.25, 3.0)

#: Elements from which on the largest distance of PyTorch says something of PyTorch.
_ENOUGH = 1024


def torch_alike(family: str, spec: LossSpec) -> Mapping[str, int]:
    """PyTorch's own largest distance over elements of a family, by the output."""
    loss, factor = spec.loss, spec.loss_weight
    alone = LossSpec(1.0, "none", spec.dtype, gradient=True, loss=loss, loss_weight=factor)
    is_known = spec.beta_shape or not spec.effective_beta
    return _alike(family, alone.at(spec.knee if is_known else spec.effective_beta))


@lru_cache(maxsize=512)
def _alike(family: str, spec: LossSpec) -> Mapping[str, int]:
    shape = (_ENOUGH, *spec.beta_shape)
    refs = References.of(spec, Case(family, "alike", shape, shape))
    return {
        name: compare(spec, theirs, theirs, refs.oracle[name], refs.input, refs.target, name).ulp
        for name, theirs in refs.torch.items()
    }


@dataclass(frozen=True, slots=True)
class Judged:
    """The verdict on one output; `got` is what came, None where an error came instead."""

    verdict: Verdict
    got: Array | None


_SHOWN = 4  # inputs are shown of a reduced result, which may have millions


@dataclass(frozen=True, slots=True)
class Sample(Record):
    """The worst element of a result, with what went in and both references, to check by hand.

    Numbers are text, the shortest that reads back as the same number of the dtype: NaN and the
    infinities are no numbers in JSON.

    Attributes:
        output: which result, `loss` or `grad_input`.
        index: of the element in the result; empty for rank 0.
        behind: how many element losses it is computed from.
        inputs: `input`, `target` and, where there is one, `weight`, `mask` or an array `beta`:
            those elements after broadcasting, the first four at most.
        got, torch, oracle: the three answers; `got` is empty where there was none.
    """

    output: str
    index: tuple[int, ...]
    behind: int
    inputs: Mapping[str, tuple[str, ...]]
    got: str
    torch: str
    oracle: str

    @classmethod
    def of(cls, refs: References, output: str, answer: Judged) -> Sample | None:
        """The worst element of an answer; None where the result is empty, or of another shape."""
        got, exact = answer.got, refs.oracle[output]
        worst = 0 if got is None else answer.verdict.worst
        if worst is None or worst >= exact.size or (got is not None and got.shape != exact.shape):
            return None
        at = tuple(map(int, np.unravel_index(worst, exact.shape)))
        given = {"input": refs.input, "target": refs.target, **refs.more}
        arrays = {name: given[name] for name in refs.spec.operands}
        if refs.spec.beta_shape:
            arrays["beta"] = refs.spec.effective_beta
        whole = dict(zip(arrays, np.broadcast_arrays(*arrays.values()), strict=True))
        if output == "grad_input":  # all pairs that this element of the input was broadcast to
            indices = np.arange(refs.input.size).reshape(refs.input.shape)
            here = np.broadcast_to(indices, whole["input"].shape) == worst
            parts = {name: values[here] for name, values in whole.items()}
        else:
            own = refs.spec.of_elements if output in ELEMENTS else refs.spec
            kept = own.kept_axes(whole["input"].ndim)
            parts = {
                name: np.asarray(np.moveaxis(values, kept, range(len(kept)))[at])
                for name, values in whole.items()
            }
        return cls(
            output,
            at,
            parts["input"].size,
            {name: tuple(map(str, values.flat[:_SHOWN])) for name, values in parts.items()},
            "" if got is None else str(got[at]),
            str(refs.torch[output][at]),
            str(exact[at]),
        )


@dataclass(frozen=True, slots=True)
class CaseResult:
    """The verdict on one case, how much of each branch it reached, and its worst element."""

    case: Case
    verdict: Verdict
    shares: Mapping[str, float]
    sample: Sample | None = None

    @classmethod
    def of(cls, refs: References, answers: Mapping[str, Judged]) -> CaseResult:
        """The result by the worst of the answers, each of an output of the case."""
        name = max(answers, key=lambda name: answers[name].verdict.badness)
        verdict = replace(
            answers[name].verdict, better=sum(each.verdict.better for each in answers.values())
        )
        return cls(refs.case, verdict, refs.shares, Sample.of(refs, name, answers[name]))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **self.case.to_dict(),
            **self.verdict.to_dict(),
            "shares": dict(self.shares),
            "sample": plain(self.sample),
        }


def unanswered(refs: References, error: SmoothL1DeployError) -> dict[str, Judged]:
    """An error instead of a loss is wrong in every element."""
    verdict = Verdict.failed(refs.oracle["loss"].size, f"{type(error).__name__}: {error}")
    return {"loss": Judged(verdict, None)}


def judge(
    runner: Runner, refs: References, accumulator: str | None = None, *, numbers_alone: bool = False
) -> dict[str, Judged]:
    """Run one case and judge every output; an answer that doesn't come is a wrong answer.

    Args:
        runner: of the artefact.
        refs: the case, and what is right for it.
        accumulator: the dtype in which one of our own artefacts is added up, for the bound that
            is proved for it; None for anything else.
        numbers_alone: a loss of another shape with as many elements is no fault here.
    """
    spec, case = refs.spec, refs.case
    shape = case.shape(spec)
    takes_beta = "beta" in runner.signature.inputs
    proved = None
    # An artefact that takes beta halves it in float32, where half of a subnormal beta is rounded.
    is_provable = refs.in_range and not (takes_beta and spec.has_subnormal_beta)
    if accumulator is not None and is_provable:
        proved = proved_bound(spec, shape, accumulator)
    given: dict[str, Any] = dict(refs.more)
    if takes_beta:
        given["beta"] = refs.beta
    try:
        outputs = runner.run(refs.input, refs.target, **given)
    except SmoothL1DeployError as exc:
        return unanswered(refs, exc)
    few = 0 < math.prod(shape) < _ENOUGH
    alike = torch_alike(case.family, spec) if few else {}
    # Weights may be of more axes than the pair: a verdict counts what everything broadcasts to.
    input, target = selected(refs.input, refs.target, **refs.more)
    pair = np.broadcast_to(input, shape), target
    answers = {}
    for name, exact in refs.oracle.items():
        got = outputs[runner.signature.loss.name if name == "loss" else name]
        if numbers_alone and name == "loss" and got.size == exact.size:
            got = got.reshape(exact.shape)
        bound = proved if name == "loss" else None
        slack = None
        if name == "grad_input" and accumulator == "float64" and is_provable:
            slack = gradient_bound(spec, refs.input, refs.target, exact)
        torch, like = refs.torch[name], alike.get(name, 0)
        verdict = compare(spec, got, torch, exact, *pair, name, bound, like, slack)
        answers[name] = Judged(verdict, got)
    return answers


def check(
    runner: Runner, refs: References, accumulator: str | None = None, others: Sequence[Runner] = ()
) -> CaseResult:
    """`judge`, by the worst output: of the runner and of `others`, which run the same artefact."""
    runners = (runner, *others)
    results = (CaseResult.of(refs, judge(one, refs, accumulator)) for one in runners)
    return max(results, key=lambda result: result.verdict.badness)
