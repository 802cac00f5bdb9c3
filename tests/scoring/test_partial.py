"""Exact sums: equal to rational arithmetic, whatever the order, the blocks and the dtype."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from smoothl1_deploy._floats import NUMPY_DTYPE
from smoothl1_deploy.scoring import _partial as module
from smoothl1_deploy.scoring._partial import ExactSum, Partial, exact_sum

FLOATS = stn.arrays(np.float64, st.integers(0, 200), elements=st.floats(allow_nan=False))


@given(FLOATS)
def test_the_sum_is_that_of_fractions(values: np.ndarray) -> None:
    finite = values[np.isfinite(values)]
    found = exact_sum(values)
    assert found.finite == sum(map(Fraction, finite.tolist()), Fraction(0))
    assert repr(found.special) == repr(sum(values[~np.isfinite(values)].tolist(), 0.0))


@given(FLOATS, st.integers(0, 200))
def test_where_the_values_are_cut_does_not_matter(values: np.ndarray, cut: int) -> None:
    parts = exact_sum(values[:cut]) + exact_sum(values[cut:][::-1])
    assert parts.to_dict() == exact_sum(values).to_dict()  # where NaN is NaN


@pytest.mark.parametrize("dtype", sorted(NUMPY_DTYPE))
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e2])
def test_every_dtype_over_several_blocks(dtype: str, scale: float) -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(3 * module._BLOCK + 7) ** 3 * scale).astype(NUMPY_DTYPE[dtype])
    exact = sum(map(Fraction, values.astype(np.float64).tolist()), Fraction(0))
    assert exact_sum(values).finite == exact


def test_a_full_block_of_the_largest_multiples_stays_exact() -> None:
    values = np.full(module._BLOCK, np.nextafter(np.float64(2), 0))
    assert exact_sum(values).finite == Fraction(float(values[0])) * module._BLOCK
    values[::2] = 2.0**-40
    assert exact_sum(values).finite == (Fraction(float(values[1])) + Fraction(1, 2**40)) * (
        module._BLOCK // 2
    )


def test_a_full_block_of_many_bits_stays_exact() -> None:
    values = np.random.default_rng(0).uniform(1, 2, module._BLOCK)
    assert exact_sum(values).finite == sum(map(Fraction, values.tolist()))


def test_a_sum_beyond_float64_is_infinite_only_in_the_end() -> None:
    huge = exact_sum(np.full(4, 1.7e308))
    assert Partial(huge).sum == math.inf
    assert Partial(huge, exact_sum(np.array([4.0]))).mean == 1.7e308


@pytest.mark.parametrize(
    ("total", "divisor", "mean"),
    [
        ([], [], math.nan),
        ([1.0], [0.0], math.inf),
        ([-1.0], [0.0], -math.inf),
        ([1.0, math.nan], [2.0], math.nan),
        ([math.inf, 1.0], [2.0], math.inf),
        ([math.inf, 1.0], [-2.0], -math.inf),
        ([math.inf, -math.inf], [2.0], math.nan),
        ([1.0], [math.inf], 0.0),
        ([math.inf], [math.inf], math.nan),
        ([1.0, 2.0], [3.0, 4.0], 3 / 7),
    ],
)
def test_the_mean_is_the_quotient_of_ieee(
    total: list[float], divisor: list[float], mean: float
) -> None:
    found = Partial(exact_sum(np.array(total)), exact_sum(np.array(divisor))).mean
    assert found == mean or (math.isnan(found) and math.isnan(mean))


@given(FLOATS)
def test_a_partial_survives_json(values: np.ndarray) -> None:
    partial = Partial(exact_sum(values), ExactSum(Fraction(1, 3), math.inf), values.size)
    fields = json.loads(json.dumps(partial.to_dict()))
    assert Partial.from_dict(fields).to_dict() == fields == partial.to_dict()


@pytest.mark.parametrize(
    "total",
    [
        {"finite": "1e300000000", "special": 0.0},  # which takes hours
        {"finite": "1/0", "special": 0.0},
        {"finite": "1", "special": 0.5},
        {"finite": 1, "special": 0.0},
        {"finite": "1"},
        3,
    ],
)
def test_a_damaged_partial_is_refused(total: object) -> None:
    one = {"finite": "1", "special": 0.0}
    with pytest.raises((KeyError, TypeError, ValueError)):
        Partial.from_dict({"total": total, "divisor": one, "count": 1})
