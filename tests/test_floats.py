"""Rounding, IEEE classes and ULP distances, against rational arithmetic and `nextafter`."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from exact import FORMATS, Format, round_fraction, to_array
from hypothesis import given
from hypothesis import strategies as st

from smoothl1_deploy._floats import (
    CLASS_NAMES,
    NUMPY_DTYPE,
    dtype_name,
    ieee_class,
    round_to,
    ulp_distance,
    wide_dtype,
)
from smoothl1_deploy._spec import DTYPES

LONG = np.dtype(np.longdouble)
has_extended = np.finfo(LONG).nmant >= 63
every_format = pytest.mark.parametrize("dtype", DTYPES)


def _identical(a: np.ndarray, b: np.ndarray) -> bool:
    """Same dtype, shape and bits; one NaN is as good as another."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    nan = np.isnan(a) & np.isnan(b)
    return bool(np.all(nan | ((a == b) & (np.signbit(a) == np.signbit(b)))))


def _neighbour(value: np.ndarray, towards: float) -> np.ndarray:
    """`nextafter` for every format; ml_dtypes brings one for bfloat16."""
    with np.errstate(over="ignore"):
        return np.nextafter(value, np.asarray(towards).astype(value.dtype))


def _interesting(f: Format) -> list[float]:
    """Ends, subnormals, powers of two, odd and even significands: all held by the format."""
    smallest = math.ldexp(1.0, f.emin - f.precision + 1)
    ulp = math.ldexp(1.0, 1 - f.precision)
    normal = math.ldexp(1.0, f.emin)
    largest = float(f.largest)
    return [
        *(0.0, smallest, 2 * smallest, 3 * smallest, normal - smallest, normal),
        *(0.25, 1 - ulp / 2, 1.0, 1 + ulp, 1 + 2 * ulp, 1 + 3 * ulp, 2 - ulp, 2.0),
        *(math.ldexp(2 - ulp, f.emax - 1), math.ldexp(1.0, f.emax), largest),
    ]


def test_the_formats_have_their_names_and_wide_ones_eleven_bits_more() -> None:
    assert {name: f.dtype for name, f in FORMATS.items()} == NUMPY_DTYPE
    assert tuple(NUMPY_DTYPE) == DTYPES
    for name, dtype in NUMPY_DTYPE.items():
        assert dtype_name(dtype) == dtype_name(dtype.newbyteorder(">")) == name
        if name != "float64" or has_extended:
            assert np.finfo(wide_dtype(name)).nmant + 1 >= FORMATS[name].precision + 11


@every_format
def test_round_to_around_every_kind_of_boundary(dtype: str) -> None:
    """Each representable number, its middle to the next, and one wide ulp either side of it."""
    wide = wide_dtype(dtype)
    points: list[np.floating] = []
    for value in _interesting(FORMATS[dtype]):
        low = to_array([value], dtype)
        high = _neighbour(low, math.inf)
        middle = (low.astype(wide) + high.astype(wide)) / 2
        if not np.isfinite(middle):  # the middle to the number that would follow the largest
            middle = low.astype(wide) + (low.astype(wide) - _neighbour(low, 0).astype(wide)) / 2
        for x in (low.astype(wide), middle):
            beside = (np.nextafter(x, wide.type(end))[0] for end in (np.inf, -1))
            points += [x[0], *beside]
    values = np.array([*points, *(-p for p in points)], wide)
    # Fraction has no -0: the sign is taken from the value.
    rounded = [round_fraction(_fraction(v), dtype) for v in values]
    expected = to_array([math.copysign(r, v) for r, v in zip(rounded, values, strict=True)], dtype)
    assert _identical(round_to(values, dtype), expected)


def _fraction(value: np.floating) -> Fraction:
    """Of a long double too, which `Fraction` doesn't take."""
    return Fraction(*value.as_integer_ratio())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@given(data=st.data())
def test_round_to_near_ties(dtype: str, data: st.DataObject) -> None:
    """Where rounding twice goes wrong: just beside the middle of two neighbours."""
    f = FORMATS[dtype]
    significand = data.draw(st.integers(2 ** (f.precision - 1), 2**f.precision - 1))
    exponent = data.draw(st.integers(f.emin - f.precision - 2, f.emax - f.precision + 2))
    offset = data.draw(st.integers(-2, 2))
    tie = Fraction(2 * significand + 1) * Fraction(2) ** (exponent - 1)
    value = float(tie + offset * tie / 2**51)
    rounded = round_to(np.array([value, -value]), dtype)
    expected = round_fraction(Fraction(value), dtype)
    assert _identical(rounded, to_array([expected, -expected], dtype))


@pytest.mark.skipif(not has_extended, reason="long double is float64 here")
@every_format
@given(
    high=st.floats(allow_nan=False, allow_infinity=False),
    shift=st.integers(0, 15),
    odd=st.booleans(),
)
def test_round_to_of_long_double(dtype: str, high: float, shift: int, odd: bool) -> None:
    """Bits below float64 decide ties."""
    with np.errstate(over="ignore"):
        value = np.longdouble(high) * (1 + np.ldexp(np.longdouble(1), -53 - shift))
    if not np.isfinite(value):
        return
    rounded = round_to(np.array([value]), dtype)
    expected = math.copysign(round_fraction(_fraction(value), dtype), high)
    assert _identical(rounded, to_array([expected], dtype))


@every_format
def test_round_to_of_what_is_not_finite_and_of_any_shape_without_a_word(dtype: str) -> None:
    values = np.array([np.inf, -np.inf, np.nan, -0.0, 0.0])
    with np.errstate(all="raise"):
        rounded = round_to(values, dtype)
        round_to(np.array([1e308, -1e308, 1e-320]), dtype)
    assert _identical(rounded, values.astype(NUMPY_DTYPE[dtype]))
    assert ieee_class(rounded).tolist() == [3, 4, 5, 2, 1]
    third = round_fraction(Fraction(1 / 3), dtype)
    for shape in SHAPES:
        rounded = round_to(np.full(shape, 1 / 3), dtype)
        assert isinstance(rounded, np.ndarray)
        assert (rounded.shape, rounded.dtype) == (shape, NUMPY_DTYPE[dtype])
        assert (rounded.astype(np.float64) == third).all()


@every_format
@given(data=st.data())
def test_round_to_is_the_identity_on_the_format(dtype: str, data: st.DataObject) -> None:
    f = FORMATS[dtype]
    bits = data.draw(st.integers(0, 2 ** (8 * f.dtype.itemsize) - 1))
    value = np.array([bits], f"u{f.dtype.itemsize}").view(f.dtype)
    assert _identical(round_to(value.astype(wide_dtype(dtype)), dtype), value)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_ulp_distance_walks_through_all_the_numbers_of_a_half_format(dtype: str) -> None:
    f = FORMATS[dtype]
    every = np.arange(2**16, dtype=np.uint16).view(f.dtype)
    with np.errstate(invalid="ignore"):  # there are signalling NaNs among them
        finite = np.sort(every[np.isfinite(every)].astype(np.float64)).astype(f.dtype)
    steps = ulp_distance(finite[:-1], finite[1:])
    zeros = finite[:-1] == finite[1:]
    assert zeros.sum() == 1  # -0 and +0
    assert (steps == np.where(zeros, 0, 1)).all()
    assert int(ulp_distance(finite[:1], finite[-1:])[0]) == len(finite) - 2


@every_format
def test_ulp_distance_of_neighbours_across_zero_and_to_infinity(dtype: str) -> None:
    f = FORMATS[dtype]
    values = to_array(_interesting(f), dtype)
    values = np.concatenate([values, -values])
    up, down = _neighbour(values, math.inf), _neighbour(values, -math.inf)
    for a, b, expected in ((values, up, 1), (values, down, 1), (down, up, 2), (values, values, 0)):
        assert (ulp_distance(a, b) == expected).all()
    smallest = math.ldexp(1.0, f.emin - f.precision + 1)
    a = to_array([-0.0, 0.0, -smallest, -smallest, -3 * smallest, float(f.largest)], dtype)
    b = to_array([0.0, -0.0, smallest, 0.0, 2 * smallest, math.inf], dtype)
    assert ulp_distance(a, b).tolist() == ulp_distance(b, a).tolist() == [0, 0, 2, 1, 5, 1]
    infinite = to_array([math.inf], dtype)
    span = 2 * (f.emax - f.emin + 2) * 2 ** (f.precision - 1)
    assert ulp_distance(-infinite, infinite).tolist() == [span]
    assert ulp_distance(-infinite, infinite).dtype == np.uint64


SHAPES = ((), (0,), (1,), (2, 0, 3), (2, 3))


def test_ulp_distance_and_ieee_class_of_any_shape_and_layout() -> None:
    for shape in SHAPES:
        a = np.ones(shape, np.float32)
        assert ulp_distance(a, a).shape == shape
        codes = ieee_class(np.full(shape, -np.inf, np.float32))
        assert codes.shape == shape and (codes == 4).all()
    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    b = np.nextafter(a, np.float32(np.inf))
    assert (ulp_distance(a.T[::2], b.T[::2]) == 1).all()
    assert (ulp_distance(a[:, ::-1], b[:, ::-1]) == 1).all()
    assert ulp_distance(np.ones((3, 1), np.float32), np.ones(4, np.float32)).shape == (3, 4)


def test_ulp_distance_refuses_two_formats() -> None:
    for pair in itertools.permutations(DTYPES, 2):
        a, b = (np.ones(1, NUMPY_DTYPE[name]) for name in pair)
        with pytest.raises(TypeError, match=f"within one dtype, got {pair[0]} and {pair[1]}"):
            ulp_distance(a, b)


@every_format
def test_ieee_class(dtype: str) -> None:
    f = FORMATS[dtype]
    smallest = math.ldexp(1.0, f.emin - f.precision + 1)
    named = {
        "finite": [1.0, -1.0, smallest, -smallest, float(f.largest), -float(f.largest)],
        "+0": [0.0],
        "-0": [-0.0],
        "+inf": [math.inf],
        "-inf": [-math.inf],
        "nan": [math.nan, -math.nan],
    }
    for name, values in named.items():
        codes = ieee_class(to_array(values, dtype))
        assert [CLASS_NAMES[code] for code in codes] == [name] * len(values)
