"""Shapes: what is accepted, how two broadcast, how they are written down."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoothl1_deploy._shapes import broadcast, check_shape, describe, summed_axes
from smoothl1_deploy.errors import SpecError

REMEDY = "give integers >= 0 for fixed axes and identifiers for dynamic ones, as in ('N', 16)"


def test_valid_shapes() -> None:
    for shape in ((), (0,), ("N",), ("N", 16), ("batch_size", "é", 2**60), ("N", "N")):
        assert check_shape(shape) == check_shape(list(shape)) == shape
    assert check_shape(None) is None  # any rank


def test_what_is_no_shape_is_refused() -> None:
    for dim in (-1, 1.0, True, None, "", "N+1", "2N", "a b", "a.b", b"N", 2**63, (3,), "N-M"):
        with pytest.raises(SpecError) as caught:
            check_shape((4, dim))  # type: ignore[arg-type]
        assert str(caught.value) == f"shape (4, {dim!r}) has the axis {dim!r}; {REMEDY}"
    for shape in (5, "N", b"N", {3}, iter([3]), object):
        with pytest.raises(SpecError) as caught:
            check_shape(shape, "target_shape")  # type: ignore[arg-type]
        text = f"target_shape must be a sequence or None (any rank), got {shape!r}; {REMEDY}"
        assert str(caught.value) == text


fixed = st.lists(st.sampled_from([0, 1, 1, 2, 3]), max_size=4).map(tuple)


@given(fixed, fixed)
def test_fixed_shapes_broadcast_as_in_numpy(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    try:
        expected = np.broadcast_shapes(a, b)
    except ValueError:
        with pytest.raises(SpecError, match="can't be broadcast"):
            broadcast(a, b)
    else:
        assert broadcast(a, b) == expected


def test_shapes_that_can_not_be_broadcast() -> None:
    with pytest.raises(SpecError) as caught:
        broadcast(("N", 2, 5), (3, 5))
    assert str(caught.value) == "shapes ('N', 2, 5) and (3, 5) can't be broadcast: 2 against 3"


def test_dynamic_axes() -> None:
    for a, b, out in (
        (("N", 16), ("N", 16), ("N", 16)),
        (("N", 16), (16,), ("N", 16)),
        (("N",), (), ("N",)),
        (("N",), (1,), ("N",)),
        (("N",), (4,), (4,)),  # N is 1 or 4
        (("N",), (0,), (0,)),
        (("N",), ("M",), ("N_or_M",)),
        (("N", 1), ("M", 4), ("N_or_M", 4)),
        (("N", "M"), ("M",), ("N", "M")),
    ):
        assert broadcast(a, b) == out
        if "N_or_M" not in out:
            assert broadcast(b, a) == out


def test_what_was_repeated_only_the_run_tells_where_axes_differ_by_name() -> None:
    for shape, other in ((("N",), ("M",)), (("N", 4), (8, 4)), (None, (3,)), ((3,), None)):
        assert summed_axes(shape, other) is None
    assert summed_axes((1,), ("M",)) == (0,)


def test_describe() -> None:
    for shape, text in (
        (None, "any"),
        ((), "scalar"),
        ((2, "batch_size", 4), "2xbatch_sizex4"),
        (("max",), "<max>"),
        (("scalar", 2), "<scalar>x2"),
    ):
        assert describe(shape) == text


def test_no_two_shapes_have_one_description() -> None:
    """Graph names are made of it, and TensorRT's caches look engines up by them."""
    dims = (1, 11, "N", "x", "NxN", "Nx1", "any", "scalar", "_", "N_N")
    shapes = [None, *(s for n in range(4) for s in itertools.product(dims, repeat=n))]
    assert len({describe(shape) for shape in shapes}) == len(shapes)  # type: ignore[arg-type]
