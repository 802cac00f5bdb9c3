"""Input families: what the loss is fed, each family reaching what another one can't.

A family is a function of a spec, two shapes and a generator, and returns input and target in
the spec's dtype. The share of elements in each branch is reported beside every result, so that
a family that never reaches a branch is seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from .._floats import NUMPY_DTYPE, Array, limits
from .._spec import LossSpec
from ._shapes import Shape

Generator = np.random.Generator
Kind = TypeVar("Kind", bound=Callable[..., Any])


def usual_knee(spec: LossSpec) -> float:
    """The knee; of an array of them one in the middle of those that are neither 0 nor inf."""
    if not spec.beta_shape:
        return float(spec.knee)
    knees = np.sort(np.ravel(spec.knee))
    between = knees[(knees > 0) & np.isfinite(knees)]
    knees = between if between.size else knees
    return float(knees[knees.size // 2])


def _knee(spec: LossSpec) -> float:
    """beta, brought into the range where the dtype can step over it on both sides."""
    largest, _, smallest = limits(spec.dtype)
    beta: float = spec.at(usual_knee(spec)).effective_beta
    return min(max(beta, 4 * smallest), largest / 4)


def _sign(shape: Shape, rng: Generator) -> Array:
    return rng.choice(np.array([-1.0, 1.0]), size=shape)


def _normal(spec: LossSpec, a: Shape, b: Shape, rng: Generator) -> tuple[Array, Array]:
    """Standard normal around a knee that both branches are reached from."""
    scale = min(max(1.0, _knee(spec)), 1e3)
    return rng.standard_normal(a) * scale, rng.standard_normal(b) * scale


def _quadratic(spec: LossSpec, a: Shape, b: Shape, rng: Generator) -> tuple[Array, Array]:
    """|d| < beta everywhere (impossible for beta = 0)."""
    beta = _knee(spec)
    return rng.uniform(-0.99, 0.99, a) * beta, rng.uniform(-0.005, 0.005, b) * beta


def _linear(spec: LossSpec, a: Shape, b: Shape, rng: Generator) -> tuple[Array, Array]:
    """|d| > beta everywhere (impossible for beta = inf)."""
    beta = _knee(spec)
    reach = beta * rng.uniform(1.02, 3.0, a) + rng.exponential(size=a) * min(beta, 1.0)
    return _sign(a, rng) * reach, rng.uniform(-0.005, 0.005, b) * beta


def _boundary(spec: LossSpec, a: Shape, b: Shape, rng: Generator) -> tuple[Array, Array]:
    """|d| exactly beta (as the dtype holds it), and one ULP to each side."""
    dtype = NUMPY_DTYPE[spec.dtype]
    beta = np.asarray(_knee(spec), dtype)
    ends = np.asarray(np.inf, dtype), np.asarray(0, dtype)
    around = np.stack([beta, *(np.nextafter(beta, end) for end in ends)])
    return rng.choice(around.astype(np.float64), size=a) * _sign(a, rng), np.zeros(b)


def _zeros(spec: LossSpec, a: Shape, b: Shape, rng: Generator) -> tuple[Array, Array]:
    """+0 and -0 against each other: the loss is +0 always."""
    signed = np.array([0.0, -0.0])
    return rng.choice(signed, size=a), rng.choice(signed, size=b)


def _subnormals(spec: LossSpec, a: Shape, b: Shape, rng: Generator) -> tuple[Array, Array]:
    """Differences that are subnormal, where squares underflow."""
    _, tiny, smallest = limits(spec.dtype)
    steps = int(min(tiny / smallest, 2**20))
    return (rng.integers(-steps, steps, s).astype(np.float64) * smallest for s in (a, b))  # type: ignore[return-value]


def _overflow(spec: LossSpec, a: Shape, b: Shape, rng: Generator) -> tuple[Array, Array]:
    """The largest numbers, of either sign: differences and squares overflow."""
    largest, _, _ = limits(spec.dtype)
    half = math.sqrt(largest)  # squares overflow from here on
    sizes = np.array([largest, largest / 2, largest / 8, half * 2, half, half / 2])
    return rng.choice(sizes, size=a) * _sign(a, rng), rng.choice(sizes, size=b) * _sign(b, rng)


def _outliers(spec: LossSpec, a: Shape, b: Shape, rng: Generator) -> tuple[Array, Array]:
    """A few differences of 1e30, or half the largest number, among ordinary ones.

    And among the targets what some losses leave out as no target: 0, -1, -100, 255.
    """
    largest, _, _ = limits(spec.dtype)
    size = min(1e30, largest / 2)
    left = np.where(rng.random(a) < 0.01, size, rng.standard_normal(a))
    left = np.where(np.arange(left.size).reshape(a) == 0, size, left)
    return left, _sprinkle(rng.standard_normal(b), rng, (0.0, -1.0, -100.0, 255.0))


def _sprinkle(value: Array, rng: Generator, specials: tuple[float, ...]) -> Array:
    """`value` with about a tenth of its elements, the first always, replaced by `specials`."""
    chosen = rng.choice(np.array(specials), size=value.shape)
    here = (rng.random(value.shape) < 0.1) | (np.arange(value.size).reshape(value.shape) == 0)
    return np.where(here, chosen, value)


def _nan(spec: LossSpec, a: Shape, b: Shape, rng: Generator) -> tuple[Array, Array]:
    """NaN here and there, on either side."""
    left, right = _normal(spec, a, b, rng)
    return _sprinkle(left, rng, (math.nan,)), np.where(rng.random(b) < 0.05, math.nan, right)


def _inf(spec: LossSpec, a: Shape, b: Shape, rng: Generator) -> tuple[Array, Array]:
    """Infinities of both signs in the input: the loss is inf, and NaN for beta = inf."""
    left, right = _normal(spec, a, b, rng)
    return _sprinkle(left, rng, (math.inf, -math.inf)), right


def _inf_minus_inf(spec: LossSpec, a: Shape, b: Shape, rng: Generator) -> tuple[Array, Array]:
    """Infinities on both sides: NaN where they have the same sign."""
    left, right = _inf(spec, a, b, rng)
    return left, _sprinkle(right, rng, (math.inf, -math.inf))


def _constant(spec: LossSpec, a: Shape, b: Shape, rng: Generator) -> tuple[Array, Array]:
    """The same difference everywhere: every rounding error of a sum points the same way."""
    beta = _knee(spec)
    low, high = (0.1, 1.37) if beta >= 1 else (0.1 * beta, 1.37 * beta)
    return np.full(a, low), np.full(b, high)


def _repeated(spec: LossSpec, a: Shape, b: Shape, rng: Generator) -> tuple[Array, Array]:
    """A row of 32 numbers again and again: what adds up in lanes meets the same ones in each."""
    row = _knee(spec) * rng.uniform(0.01, 3.0, 32) * rng.choice([-1.0, 1.0], 32)
    row = np.where(rng.random(32) < 0.5, row[0], row)
    return np.resize(row, a), np.zeros(b)


def _magnitudes(spec: LossSpec, a: Shape, b: Shape, rng: Generator) -> tuple[Array, Array]:
    """Differences of every magnitude between numbers of every magnitude, nearly equal ones too."""
    largest, tiny, _ = limits(spec.dtype)
    reach = min(-math.log2(tiny), math.log2(largest)) / 2

    def spread(shape: Shape) -> Array:
        return _sign(shape, rng) * np.exp2(rng.uniform(-reach, reach, shape))

    right = spread(b)
    near = np.broadcast_to(right, np.broadcast_shapes(a, b)).reshape(-1)
    near = np.resize(near, a) * (1 + np.exp2(rng.uniform(-60, -1, a)))
    return np.where(rng.random(a) < 0.5, near, spread(a)), right


def _brink(spec: LossSpec, a: Shape, b: Shape, rng: Generator) -> tuple[Array, Array]:
    """Differences whose sum is just below the largest number."""
    largest, _, _ = limits(spec.dtype)
    size = largest / max(math.prod(np.broadcast_shapes(a, b)), 1)
    return _sign(a, rng) * size * rng.uniform(0.5, 0.99, a), np.zeros(b)


def _usual_weights(spec: LossSpec, shape: Shape, rng: Generator) -> Array:
    """Weights as detection heads use them: a fifth 0, the others up to 2."""
    weights = rng.uniform(0.1, 2.0, shape)
    return np.where(rng.random(shape) > 0.2, weights, 0.0)


def _signed_weights(spec: LossSpec, shape: Shape, rng: Generator) -> Array:
    """Weights of either sign, zeros too."""
    return rng.choice(np.array([-2.0, -0.3, -0.0, 0.0, 0.7, 1.0]), shape)


def _zeros_weights(spec: LossSpec, shape: Shape, rng: Generator) -> Array:
    """Weights of 0 and -0 alone."""
    return rng.choice(np.array([-0.0, 0.0]), shape)


def _huge_weights(spec: LossSpec, shape: Shape, rng: Generator) -> Array:
    """Weights just below the largest number, 3e38 in float32."""
    return rng.uniform(0.8, 0.99, shape) * limits(spec.dtype)[0]


def _tiny_weights(spec: LossSpec, shape: Shape, rng: Generator) -> Array:
    """Weights around the smallest normal number, 1e-38 in float32."""
    return rng.uniform(0.1, 3.0, shape) * limits(spec.dtype)[1]


def _mixed_weights(spec: LossSpec, shape: Shape, rng: Generator) -> Array:
    """Weights of all these kinds in one array."""
    kinds = (_usual_weights, _signed_weights, _huge_weights, _tiny_weights)
    return np.choose(rng.integers(0, 4, shape), [kind(spec, shape, rng) for kind in kinds])


def _named(*functions: Kind) -> Mapping[str, Kind]:
    """Each by its name: `_inf_minus_inf` is `inf-minus-inf`, `_usual_weights` is `usual`."""
    return {f.__name__[1:].removesuffix("_weights").replace("_", "-"): f for f in functions}


#: What weights, and a gradient that flows in, are like.
WEIGHTS = _named(
    *(_usual_weights, _signed_weights, _zeros_weights),
    *(_huge_weights, _tiny_weights, _mixed_weights),
)

#: Families that were found by looking for what breaks; the draws of the matrix have them too.
ADVERSARIAL = _named(_repeated, _magnitudes, _brink)

FAMILIES = _named(
    *(_normal, _quadratic, _linear, _boundary, _zeros, _subnormals),
    *(_overflow, _outliers, _nan, _inf, _inf_minus_inf, _constant),
)


def generate(
    family: str, spec: LossSpec, a: Shape, b: Shape, rng: Generator
) -> tuple[Array, Array]:
    """Input of shape `a` and target of shape `b` in the spec's dtype."""
    left, right = {**FAMILIES, **ADVERSARIAL}[family](spec, a, b, rng)
    dtype = NUMPY_DTYPE[spec.dtype]
    with np.errstate(over="ignore"):
        return np.asarray(left).astype(dtype), np.asarray(right).astype(dtype)


def weigh(kind: str, spec: LossSpec, shape: Shape, rng: Generator) -> Array:
    """Weights of a kind, in the spec's dtype."""
    with np.errstate(over="ignore"):
        return np.asarray(WEIGHTS[kind](spec, shape, rng)).astype(NUMPY_DTYPE[spec.dtype])


#: Where an element can be: below beta, at or above it, or at a difference that is no number.
BRANCHES = ("quadratic", "linear", "non-finite")


def branch_shares(spec: LossSpec, input: Array, target: Array) -> dict[str, float]:
    """The share of elements in the quadratic and the linear branch, and of non-finite differences.

    An empty case has shares of 0 alone.
    """
    with np.errstate(all="ignore"):
        d = np.abs(np.subtract(input, target, dtype=np.float64))
    d, beta = np.broadcast_arrays(d, spec.effective_beta)
    finite = np.isfinite(d)
    count = max(d.size, 1)
    below = int(((d < beta) & finite).sum())
    counts = below, int(finite.sum()) - below, int((~finite).sum())
    return {branch: n / count for branch, n in zip(BRANCHES, counts, strict=True)}
