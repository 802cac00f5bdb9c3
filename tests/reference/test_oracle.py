"""The oracle against rational arithmetic, and against PyTorch where IEEE 754 has special values."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from exact import (
    FORMATS,
    error_in_ulp,
    exact_huber,
    exact_loss,
    exact_reduction,
    round_fraction,
    to_array,
)
from hypothesis import given
from hypothesis import strategies as st

from smoothl1_deploy import LossSpec
from smoothl1_deploy._floats import NUMPY_DTYPE, ieee_class
from smoothl1_deploy._spec import DTYPES, REDUCTIONS
from smoothl1_deploy.reference import _oracle as oracle_module
from smoothl1_deploy.reference._module import eager
from smoothl1_deploy.reference._oracle import oracle, oracle_gradient, sums_of_products

every_format = pytest.mark.parametrize("dtype", DTYPES)
BETAS = (0.0, 1e-45, 1e-9, 2e-8, 1e-3, 0.1, 0.5, 1 - 1e-6, 1.0, 1 + 1e-6, 7.7, 1e3, 3e38, math.inf)

#: How close to a tie the wide format can't tell (the oracle's docstring), in ULP.
DOUBT = {"float32": 2**-26, "float16": 2**-26, "bfloat16": 2**-26, "float64": 2**-9}
DOUBT_OF_SUMS = {**DOUBT, "float64": 2**-5}


def check(got: np.ndarray, exact: Fraction, dtype: str, doubt: float) -> None:
    """`got` is `exact` rounded to nearest, ties to even; or on the other side of a near tie."""
    value = float(got)
    assert not math.copysign(1, value) < 0
    if value == round_fraction(exact, dtype):
        return
    assert math.isfinite(value), (value, exact)
    assert error_in_ulp(value, exact, dtype) <= Fraction(1, 2) + Fraction(doubt), (value, exact)


@st.composite
def numbers(draw: st.DrawFn, dtype: str) -> float:
    """Any finite number of the format, by its bits; small integers and fractions half the time."""
    f = FORMATS[dtype]
    if draw(st.booleans()):
        return draw(st.integers(-64, 64)) / 16
    size = f.dtype.itemsize
    bits = draw(st.integers(0, 2 ** (8 * size) - 1))
    value = float(np.array([bits], f"u{size}").view(f.dtype)[0])
    return value if math.isfinite(value) else 1.0


betas = st.one_of(
    st.sampled_from(BETAS), st.floats(min_value=0, allow_nan=False, allow_infinity=False)
)


@every_format
@given(data=st.data())
def test_elements_are_rounded_once(dtype: str, data: st.DataObject) -> None:
    a = data.draw(numbers(dtype))
    # Half of the targets lie near: their difference meets beta, and cancels.
    near = data.draw(st.booleans())
    b = data.draw(numbers(dtype)) if not near else a + data.draw(st.integers(-8, 8)) / 8
    spec = LossSpec(data.draw(betas), "none", dtype)
    with np.errstate(over="ignore"):
        x, y = to_array([a], dtype), to_array([b], dtype)
    if not (np.isfinite(x) & np.isfinite(y)).all():
        return
    exact = exact_loss(float(x[0]), float(y[0]), spec.effective_beta)
    check(oracle(spec, x, y)[0], exact, dtype, DOUBT[dtype])


@every_format
def test_random_elements(dtype: str) -> None:
    generator = np.random.default_rng(7)
    scale = generator.choice([1e-4, 0.1, 1.0, 100.0], (2, 100))
    a, b = (generator.standard_normal((2, 100)) * scale).astype(NUMPY_DTYPE[dtype])
    for spec in (LossSpec(beta, "none", dtype) for beta in BETAS):
        for got, x, y in zip(oracle(spec, a, b), a, b, strict=True):
            check(got, exact_loss(float(x), float(y), spec.effective_beta), dtype, DOUBT[dtype])


@every_format
@given(data=st.data())
def test_huber_losses_are_rounded_once_with_their_factor(dtype: str, data: st.DataObject) -> None:
    a, b = data.draw(numbers(dtype)), data.draw(numbers(dtype))
    delta, reduction = data.draw(betas.filter(bool)), data.draw(st.sampled_from(REDUCTIONS))
    factor = data.draw(st.sampled_from((1.0, 0.1, 3.0)))
    spec = LossSpec(1.0, reduction, dtype, loss="huber", delta=delta, loss_weight=factor)
    exact = exact_huber(a, b, spec.effective_beta) * Fraction(spec.effective_loss_weight)
    got = oracle(spec, to_array([a], dtype), to_array([b], dtype))
    check(got.reshape(()), exact, dtype, DOUBT[dtype])
    plain = replace(spec, loss_weight=1.0)
    slope = oracle_gradient(plain, to_array([a], dtype), to_array([b], dtype))
    exact = slope_of(replace(plain, delta=spec.effective_beta or delta), a, b)
    if spec.effective_beta:
        assert float(slope[0]) == round_fraction(exact, dtype)


def test_a_zero_over_negative_weights_is_a_negative_one() -> None:
    """Of weights that cancel, too, whose sum is computed exactly: and a factor turns it again."""
    x, w = np.ones(3, np.float32), np.array([1, 1, -2.125], np.float32)
    for factor, is_negative in ((1.0, True), (-1.5, False)):
        spec = LossSpec(math.inf, weight="weights", loss_weight=factor)
        loss = oracle(spec, x, 0 * x, w)
        assert loss == 0 and np.signbit(loss) == is_negative


@every_format
def test_around_the_boundary(dtype: str) -> None:
    """|d| = beta and its neighbours, from both sides: exact, and beta / 2 in the middle."""
    for beta in (0.25, 1.0, 2.0):
        # Not 0 * at and 2 * at: before numpy 2.1.3 an int beside a bfloat16 makes float32.
        at, zero, twice = (to_array([number], dtype) for number in (beta, 0.0, 2 * beta))
        down, up = np.nextafter(at, zero), np.nextafter(at, twice)
        d = np.concatenate([down, at, up, -down, -at, -up])
        losses = oracle(LossSpec(beta, "none", dtype), d, np.zeros_like(d))
        for got, x in zip(losses, d, strict=True):
            check(got, exact_loss(float(x), 0.0, beta), dtype, DOUBT[dtype])
        assert float(losses[1]) == beta / 2
        assert (losses[:3] == losses[3:]).all()
        assert losses[0] <= losses[1] <= losses[2]


@every_format
def test_ends_of_the_format(dtype: str) -> None:
    f = FORMATS[dtype]
    largest = float(f.largest)
    smallest = math.ldexp(1.0, f.emin - f.precision + 1)
    pairs = [(largest, 0.0), (largest, largest), (largest, -smallest), (smallest, 0.0)]
    pairs += [(2 * smallest, -smallest), (smallest, smallest)]
    for beta in (0.0, smallest, 3 * smallest, 1.0, largest, 1e39, math.inf):
        spec = LossSpec(beta, "none", dtype)
        for a, b in pairs:
            got = oracle(spec, to_array([a], dtype), to_array([b], dtype))[0]
            check(got, exact_loss(a, b, spec.effective_beta), dtype, DOUBT[dtype])


@every_format
def test_overflow_is_infinite_only_where_the_result_is(dtype: str) -> None:
    largest = to_array([float(FORMATS[dtype].largest)], dtype)
    assert oracle(LossSpec(1.0, "none", dtype), largest, -largest)[0] == np.inf
    # d itself overflows in the format, and its loss does not.
    spec = LossSpec(4 * float(largest[0]), "none", dtype)
    if math.isfinite(spec.effective_beta):
        assert float(oracle(spec, largest, -largest)[0]) == float(largest[0]) / 2
    # The sum overflows, the mean of the same losses doesn't.
    pair, zero = np.concatenate([largest, largest]), to_array([0.0, 0.0], dtype)
    assert oracle(LossSpec(0.0, "sum", dtype), pair, zero) == np.inf
    assert oracle(LossSpec(0.0, "mean", dtype), pair, zero) == largest[0]


SPECIAL = (0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan)


@every_format
def test_special_values_are_those_of_pytorch(dtype: str) -> None:
    a, b = (to_array(list(v), dtype).reshape(-1) for v in np.meshgrid(SPECIAL, SPECIAL))
    for beta in (0.0, 0.5, 1.0, math.inf):
        spec = LossSpec(beta, "none", dtype)
        got, expected = oracle(spec, a, b), eager(spec, a, b)
        assert ieee_class(got).tolist() == ieee_class(expected).tolist()
        assert (ieee_class(got) != 2).all()  # never -0
    for reduction in ("mean", "sum"):
        for values in ((1.0, math.nan), (1.0, math.inf), (math.inf, math.nan)):
            spec = LossSpec(1.0, reduction, dtype)
            a = to_array(list(values), dtype)
            got, expected = oracle(spec, a, np.zeros_like(a)), eager(spec, a, np.zeros_like(a))
            assert ieee_class(got) == ieee_class(expected) != 0


@every_format
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@given(data=st.data())
def test_reductions_are_rounded_once(dtype: str, reduction: str, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    pairs = [(data.draw(numbers(dtype)), data.draw(numbers(dtype))) for _ in range(count)]
    spec = LossSpec(data.draw(betas), reduction, dtype)
    exact = exact_reduction([exact_loss(a, b, spec.effective_beta) for a, b in pairs], reduction)
    x, y = (to_array(list(column), dtype) for column in zip(*pairs, strict=True))
    check(oracle(spec, x, y), exact, dtype, DOUBT_OF_SUMS[dtype])


@every_format
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_long_reduction(dtype: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of numbers between 2^-20 and 2^20, in chunks of 1000: naive float32 loses most of it."""
    monkeypatch.setattr(oracle_module, "CHUNK", 1000)
    generator = np.random.default_rng(3)
    a = (generator.standard_normal(4321) * 2.0 ** generator.integers(-14, 5, 4321)).astype(
        NUMPY_DTYPE[dtype]
    )
    spec = LossSpec(0.1, reduction, dtype)
    losses = [exact_loss(float(x), 0.0, spec.effective_beta) for x in a]
    got = oracle(spec, a, np.zeros_like(a))
    check(got, exact_reduction(losses, reduction), dtype, DOUBT_OF_SUMS[dtype])


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a = np.arange(20, dtype=np.float32).reshape(4, 5)
    b = np.full((4, 5), 3, np.float32)
    whole = {reduction: oracle(LossSpec(2.0, reduction), a, b) for reduction in REDUCTIONS}
    for size, reduction in product((1, 7, 19, 20, 21), REDUCTIONS):
        monkeypatch.setattr(oracle_module, "CHUNK", size)
        assert (oracle(LossSpec(2.0, reduction), a, b) == whole[reduction]).all()


SHAPES = [
    ((), ()), ((3,), ()), ((), (3,)), ((2, 3), (3,)), ((2, 1), (1, 3)),
    ((2, 1, 4), (3, 1)), ((0,), (1,)), ((2, 0), (2, 1)), ((1,), (1,)),
]  # fmt: skip


@every_format
def test_broadcasting(dtype: str) -> None:
    rtol = 0.02 if FORMATS[dtype].dtype.itemsize == 2 else 1e-6
    for (a_shape, b_shape), reduction in product(SHAPES, REDUCTIONS):
        a = np.linspace(0, 2, math.prod(a_shape)).reshape(a_shape).astype(NUMPY_DTYPE[dtype])
        b = np.linspace(1, 5, math.prod(b_shape)).reshape(b_shape).astype(NUMPY_DTYPE[dtype])
        spec = LossSpec(1.0, reduction, dtype)
        got, expected = oracle(spec, a, b), eager(spec, a, b)
        assert isinstance(got, np.ndarray)
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(got.astype(float), expected.astype(float), rtol=rtol)


@every_format
def test_nothing_has_a_mean_of_nan_and_a_sum_of_zero(dtype: str) -> None:
    empty = np.empty((0, 3), NUMPY_DTYPE[dtype])
    mean = oracle(LossSpec(reduction="mean", dtype=dtype), empty, empty)
    total = oracle(LossSpec(reduction="sum", dtype=dtype), empty, empty)
    assert mean.shape == total.shape == ()
    assert np.isnan(mean)
    assert total.tobytes() == bytes(total.nbytes)  # +0


def test_strided_input_is_read_and_left_as_it_was() -> None:
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    a, b = base.T[::2], base.T[1::2, ::-1]
    spec = LossSpec(3.0, "none")
    expected = oracle(spec, a.copy(), b.copy())
    base.flags.writeable = False
    assert (oracle(spec, a, b) == expected).all()


def test_another_dtype_is_refused() -> None:
    for a, b in (("float64", "float32"), ("float32", "float16"), ("int32", "int32")):
        with pytest.raises(TypeError, match=f"takes float32, got {a} and {b}$"):
            oracle(LossSpec(), np.ones(2, a), np.ones(2, b))


def test_is_silent_about_what_ieee_754_defines() -> None:
    a = np.array([np.inf, np.nan, 3e38], np.float32)
    with np.errstate(all="raise"):
        for reduction in REDUCTIONS:
            oracle(LossSpec(0.0, reduction), a, -a)


def cancelling(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of many magnitudes, each beside its negative but for the last bits of some."""
    count = math.prod(shape)
    values = np.ldexp(rng.standard_normal(count), rng.integers(-6, 7, count))
    half = count // 2
    values[half : 2 * half] = -values[:half] * rng.choice([1, 1, 1 + 2**-6], half)
    return rng.permutation(values).reshape(shape).astype(NUMPY_DTYPE[dtype])


def exact_of(spec: LossSpec, input: float, target: float) -> Fraction:
    exact = exact_huber if spec.loss == "huber" else exact_loss
    return Fraction(spec.loss_weight) * exact(input, target, spec.knee)


def slope_of(spec: LossSpec, input: float, target: float) -> Fraction:
    d, knee = Fraction(input) - Fraction(target), spec.knee
    if knee == 0:
        return Fraction((d > 0) - (d < 0))
    if math.isinf(knee) and spec.loss != "huber":
        return Fraction(0)
    slope = d if math.isinf(knee) else max(-Fraction(knee), min(d, Fraction(knee)))
    return Fraction(spec.loss_weight) * (slope if spec.loss == "huber" else slope / Fraction(knee))


@every_format
@pytest.mark.parametrize(
    "plain",
    [
        *(LossSpec(beta) for beta in (0.0, 0.375, 2.0)),
        LossSpec(loss="huber", delta=0.375, loss_weight=-3.0),
        LossSpec(loss="huber", delta=math.inf),
        LossSpec([[0.0], [0.375], [2.0], [math.inf], [0.75], [0.375]]),
        LossSpec(loss="huber", delta=[[0.375], [2.0], [math.inf], [0.75], [0.375], [3.0]]),
    ],
    ids=lambda spec: spec.name,
)
def test_sums_that_cancel_are_exact(dtype: str, plain: LossSpec) -> None:
    """Terms of either sign leave little of themselves, and the truth is what is left."""
    rng = np.random.default_rng([10, 3])
    for weight_kind, per_sample in (("count", False), ("weights", False), ("weights", True)):
        spec = replace(plain, dtype=dtype, weight=weight_kind, per_sample=per_sample, gradient=True)
        x, t, w = (cancelling(rng, dtype, shape) for shape in ((1, 2), (6, 2), (6, 2)))
        if per_sample:
            w = abs(w)  # each row's total is a divisor
        knees = np.broadcast_to(plain.knee, (6, 2)).tolist()
        pairs = [
            [
                (float(x[0, j]), float(t[i, j]), Fraction(float(w[i, j])), plain.at(knees[i][j]))
                for j in (0, 1)
            ]
            for i in range(6)
        ]
        rows = pairs if per_sample else [[cell for row in pairs for cell in row]]
        whole = [
            sum(c[2] for c in row) if weight_kind == "weights" else Fraction(len(row))
            for row in rows
        ]
        losses = [
            sum(c[2] * exact_of(c[3], c[0], c[1]) for c in row) / total
            for row, total in zip(rows, whole, strict=True)
        ]
        got = np.atleast_1d(oracle(spec, x, t, w))
        for value, exact in zip(got, losses, strict=True):
            assert float(value) == round_fraction(exact, dtype)
        got = oracle_gradient(spec, x, t, w)
        for j in (0, 1):
            divisors = whole if per_sample else whole * 6
            exact = sum(
                (
                    row[j][2] * slope_of(row[j][3], row[j][0], row[j][1]) / total
                    for row, total in zip(pairs, divisors, strict=True)
                ),
                Fraction(0),
            )
            assert float(got[0, j]) == round_fraction(exact, dtype)


def test_a_gradient_that_cancels_to_nothing_is_zero() -> None:
    """0.1 + 0.2 - 0.3 is 2.8e-17 in float64; 1 + 2 - 3 is 0."""
    spec = LossSpec(10.0, "sum", "float64", gradient=True)
    got = oracle_gradient(spec, np.zeros((1, 1)), np.array([[1.0], [2.0], [-3.0]]))
    assert (float(got[0, 0]), np.signbit(got[0, 0])) == (0.0, False)


def test_slopes_by_other_betas_that_cancel_are_exact() -> None:
    """0.25 / 0.5 and -0.5 / 1 leave of 3e-17 / 3 what long double can't hold beside them."""
    spec = LossSpec([[0.5], [1.0], [3.0]], "sum", "float64", gradient=True)
    got = oracle_gradient(spec, np.zeros((1, 1)), np.array([[-0.25], [0.5], [-3e-17]]))
    assert float(got[0, 0]) == float(Fraction(3e-17) / 3)


def test_products_that_no_float_holds_are_added_exactly() -> None:
    """A million factors of many magnitudes, and their negatives, leave the one that is alone."""
    rng = np.random.default_rng(3)
    a, b = (np.ldexp(rng.standard_normal(5000), rng.integers(-1000, 900, 5000)) for _ in range(2))
    one = [np.append(a, 3e-300), np.append(b, 7e-300)]
    other = [np.append(-a, 0.0), np.append(b, 0.0)]
    (total,) = sums_of_products([one, other], np.zeros(5001, np.int64), 1)
    assert total == Fraction(3e-300) * Fraction(7e-300)


@pytest.mark.parametrize("left", [2.0**-6, 2.0**-20])
def test_sums_of_which_a_part_is_left_have_lost_nothing_of_it(left: float) -> None:
    rng = np.random.default_rng(11)
    spec = LossSpec(0.0, "sum", "float64", weight="count")
    for size, weight in rng.uniform(0.5, 1, (50, 2)):
        x, w = np.full(2, size), np.array([weight, -weight * (1 + left)])
        exact = Fraction(float(size)) * sum(map(Fraction, w.tolist()))
        assert float(oracle(spec, x, np.zeros(2), w)) == float(exact)


def test_rows_add_up_pairwise_whatever_their_order_in_memory() -> None:
    """Down the columns of Fortran's order numpy adds up one by one: 64 ULP off here."""
    spec = LossSpec(0.0, "sum", "float64", per_sample=True)
    rows = np.asfortranarray(np.full((2, 1 << 20), 0.1))
    assert (oracle(spec, rows, np.zeros_like(rows)) == 0.1 * (1 << 20)).all()
