"""Random draws: a spec, its shapes and its data, each a function of one number.

The grid of `matrix` meets every value of every field, and few of their combinations. A draw
combines them at random, with the shapes, weights and numbers that were found by looking for what
breaks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
import onnx

from .._shapes import Dim, describe
from .._shapes import Shape as Axes
from .._spec import DTYPES, ELEMENTS, EMPTIES, NORMALIZERS, REDUCTIONS, ROUTES, LossSpec
from ..graph._export import export
from ._cases import Case, References, with_beta
from ._families import ADVERSARIAL, FAMILIES, WEIGHTS, usual_knee
from ._report import is_extended

_BY_TORCH = 0.15  # is the share of the torch route, whose export takes ten times as long
_CASES = 3  # are fed to each draw: to export takes longer than to run
_BETAS = (0.0, 1e-3, 0.5, 1.0, 2.0, 1e4, 3e38, math.inf)
_NO_BETAS = (-1.0, -1e-45, -math.inf, math.nan)  # what only a run-time beta can be
_RANKS = (0, 1, 1, 2, 2, 2, 3, 4)
_SIZES = (1, 2, 3, 5, 7, 16, 17, 33, 64)
_FEW_SIZES = 5  # sizes, the smallest, are for the axes of a rank above 2
_LARGE = 12, 17  # powers of 2 that the elements of a large case are between
_AXES = (None, None, (0,), (1,), (-1,), (0, 2), (1, 2), (-3, -2))
_UNUSUAL = 0.25  # is the share of empty or large cases where an axis is dynamic; of empty ones:
_EMPTY, _EMPTY_WITHOUT_BETA = 0.06, 0.2
_FAMILIES = (*FAMILIES, *ADVERSARIAL, *ADVERSARIAL)

#: An array's axes, as indices into those of the whole; None for one of size 1.
_Axes = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Draw:
    """What one number stands for.

    Attributes:
        number: any integer >= 0; it decides all the rest.
        spec: what the artefact computes.
        beta: the spec's, or with `runtime_beta` what is fed, which may be negative or NaN; one of
            an array of betas.
        route: of the export.
        axes: of input, target and, where there are some, weight and mask.
        declared: the axes of the export where a backend finds out at run time which of them were
            broadcast: other names for each array, or None for any rank. Mostly `axes` again.
        cases: what is fed.
    """

    number: int
    spec: LossSpec
    beta: float
    route: str
    axes: tuple[Axes, ...]
    declared: tuple[Axes, ...] | None
    cases: tuple[Case, ...]

    @classmethod
    def of(cls, number: int) -> Draw:
        """The draw of a number."""
        random = Random(number)
        spec = _further(Random(f"further {number}"), _spec(random))
        spec = _in_another_loss(Random(f"loss {number}"), spec)
        beta = spec.knee
        if spec.runtime_beta:
            fed = LossSpec(_beta(random))
            # Half of a subnormal one is what an artefact that can't know it rounds.
            beta = 1.0 if fed.has_subnormal_beta else fed.effective_beta
            if random.random() < 0.15:
                beta = random.choice(_NO_BETAS)
            if spec.loss == "huber":
                beta = beta or 1.0  # a delta is no 0
        by_torch = spec.is_of_torch and random.random() < _BY_TORCH
        route = "torch" if by_torch else random.choice(ROUTES[:2])
        least = max((axis + 1 if axis >= 0 else -axis for axis in spec.axes or ()), default=0)
        least = max(least, int(spec.per_sample))
        rank = max(random.choice(_RANKS), least)
        arrays = _arrays(random, spec, rank)
        sizes = _SIZES[: _FEW_SIZES if rank > 2 else None]
        if spec.gradient:
            sizes = sizes[1:]  # a sum of one term that is -0: 0 in a runtime, none in autograd
        whole: list[Dim] = [
            f"axis_{i}" if random.random() < 0.75 else random.choice(sizes) for i in range(rank)
        ]
        if whole and not by_torch:
            spec = _of_betas(Random(f"betas {number}"), spec, whole, sizes)
            beta = beta if spec.runtime_beta else usual_knee(spec)
        whole.append("copies")  # the axis that weights alone may have, at index -1
        axes = tuple(tuple(1 if i is None else whole[i] for i in array) for array in arrays)
        declared = axes if by_torch else _declared(random, axes)
        draw = cls(number, spec, beta, route, axes, declared, ())
        cases = tuple(draw._case(random, arrays, whole, sizes) for _ in range(_CASES))
        return replace(draw, cases=cases)

    def _case(
        self, random: Random, arrays: tuple[_Axes, ...], whole: list[Dim], sizes: tuple[int, ...]
    ) -> Case:
        """One input pair in the shapes of `arrays`, whose dynamic axes get sizes of their own."""
        spec = self.spec
        given = [dim if isinstance(dim, int) else random.choice(sizes) for dim in whole]
        given[-1] = random.choice((1, 2, 3))
        dynamic = [i for i, dim in enumerate(whole[:-1]) if isinstance(dim, str)]
        kind = random.random()
        if dynamic and kind < _UNUSUAL:
            axis = random.choice(dynamic)
            given[axis] = 1
            many = int(2 ** random.uniform(*_LARGE))
            empty = _EMPTY if self.beta >= 0 else _EMPTY_WITHOUT_BETA
            given[axis] = 0 if kind < empty else max(1, many // math.prod(given))
        shapes = tuple(tuple(1 if i is None else given[i] for i in array) for array in arrays)
        layout = " ".join(map(describe, shapes))
        operands = dict(zip(spec.operands, shapes, strict=True))
        case = Case.at(random.choice(_FAMILIES), layout, operands, self.number)
        weighs = spec.weight is not None or spec.upstream
        if weighs and random.random() < 0.5:
            case = replace(case, weighting=random.choice([*WEIGHTS]))
        # Where sums of weights, or what the factor makes of a gradient, overflow as well, PyTorch's
        # NaN has two causes.
        multiplies = spec.weight or spec.loss_weight != 1.0
        overflows = multiplies and case.family in ("overflow", "inf", "nan", "inf-minus-inf")
        # Autograd adds these weights up before the product that underflows to -0.
        is_wider = spec.gradient and any(-1 in array for array in arrays)
        if overflows or (is_wider and case.weighting in ("tiny", "mixed")):
            case = replace(case, weighting="usual")
        return case

    def model(self, any_rank: bool) -> onnx.ModelProto:
        """The artefact, for a backend that takes any rank or for one that doesn't."""
        axes = self.declared if any_rank else self.axes
        if axes is None:
            return export(self.spec, self.route)
        input, *others = zip(self.spec.operands, axes, strict=True)
        shapes: dict[str, Any] = {f"{name}_shape": given for name, given in others}
        return export(self.spec, self.route, input[1], **shapes)

    def references(self, case: Case) -> References:
        """What is right for one of the cases."""
        if self.beta >= 0:
            return References.of(with_beta(self.spec, self.beta), case)
        return References.of(with_beta(self.spec, 1.0), case, self.beta)


def _beta(random: Random) -> float:
    """A usual one, any between 1e-6 and 1e6, one that is odd among float32's subnormal ones, or one
    that is nearly 1.

    A subnormal one of float64 has a half that no format holds.
    """
    kind = random.random()
    if kind < 0.5:
        return random.choice(_BETAS)
    if kind < 0.75:
        return 10 ** random.uniform(-6, 6)
    if kind < 0.9:
        odd = 2 * random.randrange(1 << random.randrange(12)) + 1
        return math.ldexp(odd, -149)
    return 1 + math.ldexp(random.choice((-1, 1)), -random.randrange(10, 24))


def _spec(random: Random) -> LossSpec:
    reduction, dtype = random.choice(REDUCTIONS), random.choice(DTYPES)
    beta = _beta(random)
    if random.random() < 0.25:
        return LossSpec(beta, reduction, dtype)
    normalizers = (None, *(NORMALIZERS if reduction == "mean" else NORMALIZERS[:1]))
    gradient, runtime_beta = random.random() < 0.6, random.random() < 0.25
    return LossSpec(
        1.0 if runtime_beta else beta,
        reduction,
        dtype,
        per_sample=reduction != "none" and random.random() < 0.35,
        gradient=gradient,
        runtime_beta=runtime_beta,
        weight=random.choice(normalizers),
        upstream=gradient and random.random() < 0.5,
    )


def _further(random: Random, spec: LossSpec) -> LossSpec:
    """The spec, or one of four with axes, a mask, a divisor or a value for means of nothing."""
    is_mean = spec.reduction == "mean"
    if random.random() > 0.25 or not is_extended(spec):
        return spec
    axes = random.choice(_AXES) if spec.reduction != "none" and not spec.per_sample else None
    beside = random.choice((None, None, None, *ELEMENTS[spec.reduction == "none" :]))
    return replace(
        spec,
        elements=beside,
        axes=axes,
        mask=random.random() < 0.5,
        divisor=is_mean and spec.weight != "weights" and random.random() < 0.4,
        empty=random.choice(EMPTIES) if is_mean else "nan",
    )


def _in_another_loss(random: Random, spec: LossSpec) -> LossSpec:
    """The spec, or one of four as Huber's; one of five has a constant factor."""
    loss, factor = random.random() < 0.25, random.choice((2.0, 0.3, -1.7, 1e-3))
    if loss and spec.knee:
        delta = None if spec.runtime_beta else spec.beta
        spec = replace(spec, loss="huber", beta=1.0, delta=delta)
    return replace(spec, loss_weight=factor) if random.random() < 0.2 else spec


def _of_betas(random: Random, spec: LossSpec, whole: list[Dim], sizes: tuple[int, ...]) -> LossSpec:
    """The spec, or one of six with a beta for each index of an axis, whose size is fixed then."""
    if random.random() > 1 / 6:
        return spec
    axis = random.randrange(len(whole))
    dim = whole[axis]
    whole[axis] = size = dim if isinstance(dim, int) else random.choice(sizes)
    some = random.random() < 0.6
    knees = [random.choice(_BETAS) if some else _beta(random) for _ in range(size)]
    least = 1e-3 if spec.loss == "huber" else 0.0  # a delta is no 0
    shape = (size, *(1 for _ in whole[axis + 1 :]))
    if spec.runtime_beta:
        return replace(spec, runtime_beta=shape)
    return spec.at(np.reshape([max(knee, least) for knee in knees], shape))


def _arrays(random: Random, spec: LossSpec, rank: int) -> tuple[_Axes, ...]:
    """The axes of the operands: of the whole, or of part of it to be broadcast."""
    whole = tuple(range(rank))

    def part() -> _Axes:
        if random.random() < 0.6:
            return whole
        axes: _Axes = tuple(i if random.random() < 0.5 else None for i in whole)
        while axes and axes[0] is None and random.random() < 0.5:
            axes = axes[1:]
        return axes

    input, target = part(), part()
    if spec.axes or (spec.per_sample and not input + target):
        input = whole
    column: _Axes = (*whole[:-1], None) if rank else ()
    others = (
        random.choice((whole, part(), column, whole[-1:], (None,), (), (-1, *whole)))
        for _ in spec.operands[2:]
    )
    return input, target, *others


def _declared(random: Random, axes: tuple[Axes, ...]) -> tuple[Axes, ...] | None:
    """`axes`, None for any rank, or names of each array's own for what is dynamic or broadcast."""
    if random.random() < 0.3:
        return None
    if random.random() < 0.8:
        return axes
    return tuple(
        tuple(dim if isinstance(dim, int) and dim > 1 else f"{role}_{i}" for i, dim in enumerate(x))
        for role, x in zip("abwm", axes, strict=False)
    )
