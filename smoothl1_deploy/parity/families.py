"""Input families: what the loss is fed, each family reaching what another one can't.

A family is a function of a spec, two shapes and a generator, and returns input and target in
the spec's dtype. The share of elements in each branch is reported beside every result, so that
a family that never reaches a branch is seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from ..floats import NUMPY_DTYPE, Array
from ..spec import LossSpec

__all__ = ["BRANCHES", "FAMILIES", "Family", "branch_shares", "generate"]

Shape = tuple[int, ...]
Generator = np.random.Generator
Family = Callable[[LossSpec, Shape, Shape, Generator], tuple[Array, Array]]


def _limits(spec: LossSpec) -> tuple[float, float, float]:
    """Largest finite, smallest normal and smallest subnormal number of the spec's dtype."""
    info = ml_dtypes.finfo(NUMPY_DTYPE[spec.dtype])  # type: ignore[no-untyped-call]
    return float(info.max), float(info.tiny), float(info.smallest_subnormal)


def _knee(spec: LossSpec) -> float:
    """beta, brought into the range where the dtype can step over it on both sides."""
    largest, _, smallest = _limits(spec)
    return min(max(spec.effective_beta, 4 * smallest), largest / 4)


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
    _, tiny, smallest = _limits(spec)
    steps = int(min(tiny / smallest, 2**20))
    return (rng.integers(-steps, steps, s).astype(np.float64) * smallest for s in (a, b))  # type: ignore[return-value]


def _overflow(spec: LossSpec, a: Shape, b: Shape, rng: Generator) -> tuple[Array, Array]:
    """The largest numbers, of either sign: differences and squares overflow."""
    largest, _, _ = _limits(spec)
    half = math.sqrt(largest)  # squares overflow from here on
    sizes = np.array([largest, largest / 2, largest / 8, half * 2, half, half / 2])
    return rng.choice(sizes, size=a) * _sign(a, rng), rng.choice(sizes, size=b) * _sign(b, rng)


def _outliers(spec: LossSpec, a: Shape, b: Shape, rng: Generator) -> tuple[Array, Array]:
    """A few differences of 1e30, or half the largest number, among ordinary ones."""
    largest, _, _ = _limits(spec)
    size = min(1e30, largest / 2)
    left = np.where(rng.random(a) < 0.01, size, rng.standard_normal(a))
    return np.where(np.arange(left.size).reshape(a) == 0, size, left), rng.standard_normal(b)


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


FAMILIES: Mapping[str, Family] = {
    "normal": _normal,
    "quadratic": _quadratic,
    "linear": _linear,
    "boundary": _boundary,
    "zeros": _zeros,
    "subnormals": _subnormals,
    "overflow": _overflow,
    "outliers": _outliers,
    "nan": _nan,
    "inf": _inf,
    "inf-minus-inf": _inf_minus_inf,
    "constant": _constant,
}


def generate(
    family: str, spec: LossSpec, a: Shape, b: Shape, rng: Generator
) -> tuple[Array, Array]:
    """Input of shape `a` and target of shape `b` in the spec's dtype."""
    left, right = FAMILIES[family](spec, a, b, rng)
    dtype = NUMPY_DTYPE[spec.dtype]
    with np.errstate(over="ignore"):
        return np.asarray(left).astype(dtype), np.asarray(right).astype(dtype)


#: Where an element can be: below beta, at or above it, or at a difference that is no number.
BRANCHES = ("quadratic", "linear", "non-finite")


def branch_shares(spec: LossSpec, input: Array, target: Array) -> dict[str, float]:
    """The share of elements in the quadratic and the linear branch, and of non-finite differences.

    Of an empty case, all shares are 0.
    """
    with np.errstate(all="ignore"):
        d = np.abs(
            np.subtract(input, target, dtype=np.float64 if spec.dtype != "float64" else None)
        )
    finite = np.isfinite(d)
    count = max(d.size, 1)
    below = int(((d < spec.effective_beta) & finite).sum())
    counts = below, int(finite.sum()) - below, int((~finite).sum())
    return {branch: n / count for branch, n in zip(BRANCHES, counts, strict=True)}
