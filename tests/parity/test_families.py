"""Each family reaches what it is for, in every dtype; and its numbers stay what they are."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from itertools import product

import ml_dtypes
import numpy as np
import pytest

from smoothl1_deploy import LossSpec
from smoothl1_deploy._floats import NUMPY_DTYPE
from smoothl1_deploy._spec import DTYPES
from smoothl1_deploy.parity._cases import LAYOUTS, Case, is_for
from smoothl1_deploy.parity._families import (
    ADVERSARIAL,
    BRANCHES,
    FAMILIES,
    WEIGHTS,
    branch_shares,
)


def test_arrays_have_the_shapes_of_the_layout_and_depend_on_the_case_alone() -> None:
    layouts = [name for name in LAYOUTS if "^" not in name and is_for(LossSpec(), name)]
    for dtype in DTYPES:
        for family in {**FAMILIES, **ADVERSARIAL}:
            for layout in layouts:
                case = Case.of(family, layout, seed=3)
                pair = case.arrays(LossSpec(0.5, dtype=dtype))
                shapes = (LAYOUTS[layout].input, LAYOUTS[layout].target)
                assert tuple(array.shape for array in pair) == shapes, case
                assert {array.dtype for array in pair} == {NUMPY_DTYPE[dtype]}, case
                again = Case.of(family, layout, seed=3).arrays(LossSpec(0.5, "sum", dtype))
                assert [a.tobytes() for a in pair] == [b.tobytes() for b in again], case
    one, two = (Case.of("normal", "matrix", seed).arrays(LossSpec())[0] for seed in (0, 1))
    assert (one != two).any()


#: CRC-32 of what is fed. `magnitudes` is left out: `exp2` is not the same on every processor.
DATA = {
    "normal": 1793382623, "quadratic": 1994292248, "linear": 2817679513, "boundary": 3145944981,
    "zeros": 1880359839, "subnormals": 2150389044, "overflow": 1756327917, "outliers": 2542392675,
    "nan": 3719800282, "inf": 1615752621, "inf-minus-inf": 761714270, "constant": 3613120553,
    "repeated": 1107063310, "brink": 2308412431, "usual weights": 1835974586,
    "signed weights": 3331050588, "zeros weights": 15889852, "huge weights": 3825464175,
    "tiny weights": 2963948427, "mixed weights": 864831626,
}  # fmt: skip


def test_the_data_stay_so_that_the_command_of_a_red_cell_repeats_it() -> None:
    found = dict.fromkeys((*FAMILIES, *ADVERSARIAL, *(f"{kind} weights" for kind in WEIGHTS)), 0)
    for name, dtype in product(found, DTYPES):
        spec = LossSpec(0.1, "none", dtype, weight="count", gradient=True, upstream=True)
        kind = name.removesuffix(" weights")
        if kind == name:
            arrays = Case.of(name, "broadcast-both", seed=5).arrays(spec)
        else:
            case = replace(Case.of("normal", "broadcast-both", seed=5), weighting=kind)
            arrays = case.more(spec).values()
        for array in arrays:
            found[name] = zlib.crc32(array.tobytes(), found[name])
    del found["magnitudes"]
    assert found == DATA


def shares(family: str, beta: float, dtype: str) -> dict[str, float]:
    spec = LossSpec(beta, dtype=dtype)
    return branch_shares(spec, *Case.of(family, "matrix").arrays(spec))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_branches_are_reached(dtype: str) -> None:
    for beta in (1e-3, 0.5, 1.0, 1e4):
        assert shares("quadratic", beta, dtype)["quadratic"] == 1, beta
        assert shares("linear", beta, dtype)["linear"] == 1, beta
    for beta in (0.5, 1.0, 2.0):
        for family in ("normal", "boundary", "outliers"):
            reached = shares(family, beta, dtype)
            assert min(reached["quadratic"], reached["linear"]) > 0.1, (family, beta)


def test_branches_that_are_impossible_and_nothing_at_all_are_seen_in_the_shares() -> None:
    for beta in (0.0, math.inf):
        assert shares("quadratic", beta, "float32")["quadratic"] == (1 if beta else 0)
        assert shares("linear", beta, "float32")["linear"] == (0 if beta else 1)
    empty = np.zeros(0, np.float32)
    assert branch_shares(LossSpec(), empty, empty) == dict.fromkeys(BRANCHES, 0.0)


def test_the_boundary_is_exact() -> None:
    beta = np.float32(0.1)
    left, right = Case.of("boundary", "matrix").arrays(LossSpec(0.1))
    assert not right.any()
    neighbours = {np.nextafter(beta, np.float32(end)) for end in (0, 1)}
    assert set(np.abs(left).ravel()) == {beta, *neighbours}


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
        case = replace(Case.of("normal", "odd"), weighting=kind)
        return case.more(spec)["weight"].astype(np.longdouble)

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
