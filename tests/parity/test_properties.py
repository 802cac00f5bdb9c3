"""Metamorphic relations: they hold for Smooth L1 whatever the truth is, so no oracle is asked.

Each relation is either exact, because every operation of the graph respects it, or holds within a
bound that is derived where it is used. `u` is the unit roundoff of the dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from smoothl1_deploy import LossSpec, export, load
from smoothl1_deploy._dlpack import from_torch, to_torch
from smoothl1_deploy._floats import NUMPY_DTYPE, Array, ulp_distance
from smoothl1_deploy._spec import DTYPES
from smoothl1_deploy.backends._runner import Runner
from smoothl1_deploy.parity._bounds import UNIT_ROUNDOFF, gamma

BETAS = (1e-3, 0.1, 0.5, 1.0, 3.0, 1e3)


def relation(examples: int, *dtypes: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a property on so many examples for each dtype."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        slow = [HealthCheck.too_slow]  # a machine that does other work as well
        limited = settings(max_examples=examples, deadline=None, suppress_health_check=slow)(test)
        marked: Callable[..., None] = pytest.mark.parametrize("dtype", dtypes)(limited)
        return marked

    return decorate


@cache
def runner(spec: LossSpec) -> Runner:
    return load(export(spec, "inlined"))


def losses(beta: float, dtype: str, a: Array, b: Array) -> Array:
    return runner(LossSpec(beta, "none", dtype)).run(a, b)["loss"]


def reduced(beta: float, reduction: str, dtype: str, a: Array, b: Array) -> float:
    return float(runner(LossSpec(beta, reduction, dtype)).run(a, b)["loss"])


def same(x: Array, y: Array) -> bool:
    """Equal to the sign of zero; a NaN is a NaN."""
    nan = np.isnan(x)
    return bool(
        np.array_equal(x, y, equal_nan=True) and (np.signbit(x) == np.signbit(y))[~nan].all()
    )


def pairs(dtype: str, elements: st.SearchStrategy[float], size: int = 16) -> st.SearchStrategy[Any]:
    """Two arrays of one length, from 1."""

    def cast(both: Array) -> tuple[Array, ...]:
        with np.errstate(over="ignore"):
            return tuple(np.ascontiguousarray(x) for x in both.astype(NUMPY_DTYPE[dtype]))

    shapes = st.integers(1, size).map(lambda n: (2, n))
    return hnp.arrays(np.float64, shapes, elements=elements).map(cast)


#: Everything there is, and the numbers at which something happens.
ANY = st.floats(width=32) | st.sampled_from(
    [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, 0.5, 1e-45, 3e38, 6e4]
)
#: No rounding in sums and differences: multiples of 2^-10 up to 2^10.
GRID = st.integers(-(1 << 20), 1 << 20).map(lambda n: n * 2.0**-10)
#: No over- or underflow in squares and quotients.
TAME = st.floats(-(2.0**30), 2.0**30, width=32).map(lambda x: x if abs(x) > 2.0**-30 else 0.0)
BETA = st.sampled_from(BETAS)
ANY_BETA = st.sampled_from((0.0, *BETAS, math.inf))


@relation(150, "float32", "float64")
@given(data=st.data(), beta=BETA)
def test_smooth_l1_is_huber_over_beta(dtype: str, data: Any, beta: float) -> None:
    """Within 9 u: ours is within gamma(4), Huber over beta within gamma(5).

    In Huber's linear part the difference moves the loss by 2 u, and a subtraction, a product
    and the division by beta round once each.
    """
    a, b = data.draw(pairs(dtype, TAME))
    spec = LossSpec(beta, "none", dtype)
    huber = torch.nn.functional.huber_loss(
        to_torch(a), to_torch(b), reduction="none", delta=spec.effective_beta
    )
    over = from_torch(huber / torch.tensor(spec.effective_beta, dtype=huber.dtype))
    ours = losses(beta, dtype, a, b)
    unit = UNIT_ROUNDOFF[dtype]
    assert ulp_distance(ours, over).max() <= (gamma(4, unit) + gamma(5, unit)) / unit * (1 + 1e-5)


@relation(60, *DTYPES)
@given(data=st.data())
def test_beta_0_is_l1(dtype: str, data: Any) -> None:
    """Exactly: one subtraction in the compute dtype, and one rounding of the half formats."""
    a, b = data.draw(pairs(dtype, ANY))
    compute = NUMPY_DTYPE[LossSpec(dtype=dtype).compute_dtype]
    with np.errstate(all="ignore"):
        l1 = np.abs(a.astype(compute) - b.astype(compute)).astype(a.dtype)
    assert same(losses(0.0, dtype, a, b), l1)


@relation(60, *DTYPES)
@given(data=st.data(), beta=ANY_BETA)
def test_input_and_target_are_symmetric(dtype: str, data: Any, beta: float) -> None:
    """Exactly, and in the mean as well."""
    a, b = data.draw(pairs(dtype, ANY))
    assert same(losses(beta, dtype, a, b), losses(beta, dtype, b, a))
    ours, swapped = (reduced(beta, "mean", dtype, x, y) for x, y in ((a, b), (b, a)))
    assert ours == swapped or (math.isnan(ours) and math.isnan(swapped))


@relation(100, "float32", "float64")
@given(data=st.data(), beta=BETA)
def test_the_sum_is_the_mean_times_the_count(dtype: str, data: Any, beta: float) -> None:
    """Within 2 u of the sum: each is the same float64 number, rounded once."""
    a, b = data.draw(pairs(dtype, TAME, 40))
    total = reduced(beta, "sum", dtype, a, b)
    mean = reduced(beta, "mean", dtype, a, b)
    assert abs(Fraction(total) - Fraction(mean) * a.size) <= total * 2.001 * UNIT_ROUNDOFF[dtype]


@relation(100, "float32", "float64")
@given(data=st.data(), beta=BETA)
def test_shards_add_up(dtype: str, data: Any, beta: float) -> None:
    """Within u (S + S1 + S2): three sums, each within u and a little of what it stands for."""
    a, b = data.draw(pairs(dtype, TAME, 40))
    cut = data.draw(st.integers(0, a.size))
    whole = reduced(beta, "sum", dtype, a, b)
    shards = ((a[:cut], b[:cut]), (a[cut:], b[cut:]))
    parts = [reduced(beta, "sum", dtype, *shard) for shard in shards]
    apart = abs(Fraction(whole) - sum(map(Fraction, parts)))
    assert apart <= (whole + sum(parts)) * UNIT_ROUNDOFF[dtype] * 1.001


@relation(100, "float32", "float64")
@given(data=st.data(), beta=ANY_BETA, shift=GRID)
def test_translation_changes_nothing(dtype: str, data: Any, beta: float, shift: float) -> None:
    """Exactly, where the shifted numbers are representable: the difference is the same."""
    a, b = data.draw(pairs(dtype, GRID))
    moved = (x + x.dtype.type(shift) for x in (a, b))
    assert same(losses(beta, dtype, a, b), losses(beta, dtype, *moved))


@relation(60, *DTYPES)
@given(data=st.data(), beta=ANY_BETA)
def test_the_loss_grows_with_the_difference(dtype: str, data: Any, beta: float) -> None:
    """Exactly: each operation of the graph is monotone, and so is rounding."""
    values, _ = data.draw(pairs(dtype, st.floats(0, 2.0**127, width=32), 32))
    d = np.sort(np.abs(values))
    d = d[np.isfinite(d)]
    loss = losses(beta, dtype, d, np.zeros_like(d))
    assert (loss[1:] >= loss[:-1]).all()
    assert same(loss, losses(beta, dtype, -d, np.zeros_like(d)))


@relation(120, "float32", "float64")
@given(
    data=st.data(),
    beta=BETA,
    exponent=st.sampled_from([-20, -7, -1, 1, 3, 20]),
)
def test_scaling_by_a_power_of_two(dtype: str, data: Any, beta: float, exponent: int) -> None:
    """l(k d; k beta) = k l(d; beta), exactly, where nothing over- or underflows."""
    a, b = data.draw(pairs(dtype, TAME))
    k = a.dtype.type(2.0**exponent)
    scaled_beta = LossSpec(beta, "none", dtype).effective_beta * float(k)
    assert same(losses(scaled_beta, dtype, k * a, k * b), k * losses(beta, dtype, a, b))


@relation(50, *DTYPES)
@given(data=st.data(), beta=BETA)
def test_broadcasting_is_repeating(dtype: str, data: Any, beta: float) -> None:
    """Exactly; the mean divides by the number of elements after broadcasting."""
    row, column = data.draw(pairs(dtype, TAME, 9))
    column = column[: data.draw(st.integers(1, column.size)), None]
    full = tuple(np.ascontiguousarray(x) for x in np.broadcast_arrays(row, column))
    assert same(losses(beta, dtype, row, column), losses(beta, dtype, *full))
    one, two = (reduced(beta, "mean", dtype, *both) for both in ((row, column), full))
    assert one == two or (math.isnan(one) and math.isnan(two))


@relation(200, "float64")
@given(data=st.data(), beta=BETA)
def test_the_gradient_is_the_finite_difference(dtype: str, data: Any, beta: float) -> None:
    """Of a step h, central: within h / (2 beta), because the slope's slope is at most 1 / beta.

    The points are multiples of 2^-20 and exact; each of the two losses is within gamma(4), and
    the subtraction and the gradient itself round too.
    """
    a, b = data.draw(pairs(dtype, GRID))
    step = 2.0**-20
    gradient = runner(LossSpec(beta, "none", dtype, gradient=True)).run(a, b)["grad_input"]
    high, low = (losses(beta, dtype, a + sign * step, b) for sign in (1, -1))
    rounding = gamma(6, UNIT_ROUNDOFF[dtype]) * ((high + low) / (2 * step) + abs(gradient))
    difference = (high - low) / (2 * step)
    assert (abs(difference - gradient) <= step / (2 * beta) + rounding).all()
