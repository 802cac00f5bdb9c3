"""Each family reaches what it is for, in every dtype."""

from __future__ import annotations

import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from smoothl1_deploy import LossSpec
from smoothl1_deploy.floats import NUMPY_DTYPE
from smoothl1_deploy.parity.cases import LAYOUTS, Case, is_for
from smoothl1_deploy.parity.families import ADVERSARIAL, BRANCHES, FAMILIES, branch_shares
from smoothl1_deploy.spec import DTYPES

INNER = [1e-3, 0.5, 1.0, 1e4]


@pytest.mark.parametrize("family", {**FAMILIES, **ADVERSARIAL})
@pytest.mark.parametrize(
    "layout", [name for name in LAYOUTS if "^" not in name and is_for(LossSpec(), name)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_dtypes_and_seeds(family: str, layout: str, dtype: str) -> None:
    case, spec = Case.of(family, layout, seed=3), LossSpec(0.5, dtype=dtype)
    left, right = case.arrays(spec)
    assert (left.shape, right.shape) == (LAYOUTS[layout].input, LAYOUTS[layout].target)
    assert left.dtype == right.dtype == NUMPY_DTYPE[dtype]
    again = case.arrays(LossSpec(0.5, "sum", dtype))
    assert left.tobytes() == again[0].tobytes() and right.tobytes() == again[1].tobytes()


def test_another_seed_is_another_input() -> None:
    spec = LossSpec()
    one, two = (Case.of("normal", "matrix", seed).arrays(spec)[0] for seed in (0, 1))
    assert (one != two).any()


def shares(family: str, beta: float, dtype: str) -> dict[str, float]:
    spec = LossSpec(beta, dtype=dtype)
    return branch_shares(spec, *Case.of(family, "matrix").arrays(spec))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", INNER)
def test_the_pure_families_are_pure(beta: float, dtype: str) -> None:
    assert shares("quadratic", beta, dtype)["quadratic"] == 1
    assert shares("linear", beta, dtype)["linear"] == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_the_mixed_families_reach_both_branches(beta: float, dtype: str) -> None:
    for family in ("normal", "boundary", "outliers"):
        reached = shares(family, beta, dtype)
        assert min(reached["quadratic"], reached["linear"]) > 0.1, family


def test_the_boundary_is_exact() -> None:
    beta = np.float32(0.1)
    left, right = Case.of("boundary", "matrix").arrays(LossSpec(0.1))
    assert not right.any()
    assert set(np.abs(left).ravel()) == {
        beta,
        np.nextafter(beta, np.float32(0)),
        np.nextafter(beta, np.float32(1)),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_special_values_are_there(dtype: str) -> None:
    arrays = {
        family: Case.of(family, "matrix").arrays(LossSpec(dtype=dtype)) for family in FAMILIES
    }
    for signed in arrays["zeros"]:
        assert np.signbit(signed).any() and not np.signbit(signed).all() and not signed.any()
    assert np.isnan(arrays["nan"][0]).any() and np.isnan(arrays["nan"][1]).any()
    assert np.isposinf(arrays["inf"][0]).any() and np.isneginf(arrays["inf"][0]).any()
    with np.errstate(invalid="ignore"):
        difference = np.subtract(*(x.astype(np.float64) for x in arrays["inf-minus-inf"]))
    assert np.isnan(difference).any()
    tiny = np.abs(arrays["subnormals"][0].astype(np.longdouble))
    assert 0 < tiny.max() <= ml_dtypes.finfo(NUMPY_DTYPE[dtype]).tiny
    outlier = np.abs(arrays["outliers"][0].astype(np.float64)).max()
    assert math.isclose(
        outlier, min(1e30, float(ml_dtypes.finfo(NUMPY_DTYPE[dtype]).max) / 2), rel_tol=0.01
    )


def test_what_was_found_by_looking_for_it() -> None:
    """Numbers that repeat, cancel, or add up to just below the largest."""
    left, _ = Case.of("repeated", "odd").arrays(LossSpec())
    assert len(np.unique(left)) <= 32 and (left[:32] == left[32:64]).all()
    for dtype in DTYPES:
        spec = LossSpec(dtype=dtype)
        left, right = (x.astype(np.longdouble) for x in Case.of("magnitudes", "odd").arrays(spec))
        sizes = np.abs(left)
        assert sizes.max() / sizes.min() > 1e3
        near = np.abs(left - right) < 1e-2 * sizes
        assert 0.2 < near.mean() < 0.8
        left, right = (x.astype(np.longdouble) for x in Case.of("brink", "odd").arrays(spec))
        total, largest = np.abs(left - right).sum(), float(ml_dtypes.finfo(NUMPY_DTYPE[dtype]).max)
        assert 0.6 * largest < total < largest
        assert dtype != "float64" or total > 5e291


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_each_kind(dtype: str) -> None:
    spec, info = LossSpec(dtype=dtype, weight="count"), ml_dtypes.finfo(NUMPY_DTYPE[dtype])

    def weights(kind: str) -> np.ndarray:
        return replace(Case.of("normal", "odd"), weighting=kind).weights(spec).astype(np.longdouble)

    assert (weights("usual") >= 0).all() and (weights("usual") == 0).any()
    signed, zeros = weights("signed"), weights("zeros")
    assert (signed < 0).any() and (signed > 0).any() and np.signbit(signed[signed == 0]).any()
    assert not zeros.any() and np.signbit(zeros).any() and not np.signbit(zeros).all()
    huge = weights("huge")
    assert np.isfinite(huge).all() and huge.min() > 0.7 * float(info.max)
    tiny = weights("tiny")
    assert (tiny < float(info.tiny)).any() and (tiny > float(info.tiny)).any() and (tiny > 0).all()
    mixed = weights("mixed")
    assert mixed.max() > 0.7 * float(info.max) and np.abs(mixed[mixed != 0]).min() < 1e-3


def test_squares_and_differences_overflow() -> None:
    left, right = Case.of("overflow", "matrix").arrays(LossSpec())
    with np.errstate(over="ignore"):
        assert np.isinf(left - right).any() and np.isinf(left * left).any()
        assert np.isfinite(left - right).any()


@pytest.mark.parametrize("beta", [0.0, math.inf])
def test_impossible_branches_are_seen_as_never_reached(beta: float) -> None:
    assert shares("quadratic", beta, "float32")["quadratic"] == (1 if beta else 0)
    assert shares("linear", beta, "float32")["linear"] == (0 if beta else 1)


def test_shares_of_nothing_are_zero() -> None:
    empty = np.zeros(0, np.float32)
    assert branch_shares(LossSpec(), empty, empty) == dict.fromkeys(BRANCHES, 0.0)
