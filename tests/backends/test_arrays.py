"""What arrays `run` takes: promoted as PyTorch promotes, of shapes that fit, or refused."""

from __future__ import annotations

import itertools
import warnings

import ml_dtypes
import numpy as np
import pytest
import torch

from smoothl1_deploy.artefact import Port
from smoothl1_deploy.backends.arrays import check_shapes, promote
from smoothl1_deploy.errors import InvalidInputError
from smoothl1_deploy.floats import NUMPY_DTYPE
from smoothl1_deploy.spec import DTYPES

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "bool")
TORCH = {name: getattr(torch, name) for name in (*DTYPES, *INTEGERS)}
NUMPY = {**NUMPY_DTYPE, **{name: np.dtype(name) for name in INTEGERS}}


def both(input: np.ndarray, target: np.ndarray, dtype: str) -> tuple[np.ndarray, ...]:
    return tuple(promote({"input": input, "target": target}, dtype).values())


# promote


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("a", "b"), list(itertools.product(TORCH, TORCH)))
def test_promotion_is_that_of_torch(a: str, b: str, dtype: str) -> None:
    expected = str(torch.promote_types(TORCH[a], TORCH[b])).removeprefix("torch.")
    x, y = np.ones(2, NUMPY[a]), np.zeros(2, NUMPY[b])
    if expected == dtype:
        results = both(x, y, dtype)
        assert [r.dtype for r in results] == [NUMPY_DTYPE[dtype]] * 2
        assert [r.tolist() for r in results] == [[1, 1], [0, 0]]
        return
    with pytest.raises(InvalidInputError) as caught:
        both(x, y, dtype)
    if expected in DTYPES:
        assert str(caught.value) == (
            f"input {a} and target {b} promote to {expected}, but the artefact is {dtype}; "
            f"convert them, or export with dtype={expected!r}"
        )
    else:
        assert str(caught.value) == (
            f"input and target are both integral ({a}, {b}); PyTorch refuses that too. "
            f"Convert one of them: input.astype({dtype!r})"
        )


def test_pytorch_refuses_two_integral_tensors() -> None:
    for dtype in INTEGERS:
        x = torch.ones(2, dtype=TORCH[dtype])
        with pytest.raises(RuntimeError):
            torch.nn.functional.smooth_l1_loss(x, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_of_the_dtype_is_not_copied(dtype: str) -> None:
    x = np.ones(2, NUMPY_DTYPE[dtype])
    assert both(x, x, dtype)[0] is x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("integer", INTEGERS)
def test_promoted_values_are_those_of_torch(dtype: str, integer: str) -> None:
    if integer == "bool":
        values = np.array([True, False])
    else:
        info = np.iinfo(integer)
        steps = [
            0,
            1,
            3,
            127,
            255,
            257,
            2049,
            65519,
            65520,
            2**24 + 1,
            2**53 + 1,
            info.max,
            info.min,
        ]
        kept = [sign * v for v in steps for sign in (1, -1) if info.min <= sign * v <= info.max]
        values = np.array(kept, integer)
    expected = torch.from_numpy(values).to(TORCH[dtype]).double().tolist()
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        _, got = both(np.ones(1, NUMPY_DTYPE[dtype]), values, dtype)
    assert got.astype(np.float64).tolist() == expected


@pytest.mark.parametrize(
    "array",
    [
        np.array(["a", "b"]),
        np.array([b"a"]),
        np.array([1.0, None], object),
        np.array([1 + 2j]),
        np.array([1], "datetime64[s]"),
        np.zeros(2, "f4,f4"),
        np.zeros(2, np.longdouble),
        np.zeros(2, ml_dtypes.float8_e4m3fn),
        np.zeros(2, ml_dtypes.int4),
    ],
    ids=lambda array: str(array.dtype),
)
def test_what_is_no_number_format_of_a_loss(array: np.ndarray) -> None:
    if array.dtype == np.float64:
        pytest.skip("long double is float64 here")
    good = np.zeros(2, np.float32)
    for what, a, b in (("input", array, good), ("target", good, array)):
        with pytest.raises(InvalidInputError) as caught:
            both(a, b, "float32")
        assert str(caught.value) == (
            f"{what} has the dtype {array.dtype}, which is not a number format of a loss"
        )


# check_shapes

Dims = tuple[int | str, ...] | None


def check(input: tuple[int, ...], target: tuple[int, ...], a: Dims, b: Dims) -> tuple[int, ...]:
    arrays = {"input": np.zeros(input), "target": np.zeros(target)}
    return check_shapes(
        arrays, {"input": Port("input", "float32", a), "target": Port("target", "float32", b)}
    )


@pytest.mark.parametrize(
    ("input", "target", "a", "b", "out"),
    [
        ((), (), None, None, ()),
        ((2, 1), (3,), None, None, (2, 3)),
        ((2, 0), (1,), None, None, (2, 0)),
        ((5, 4), (5, 4), ("N", 4), ("N", 4), (5, 4)),
        ((5, 4), (5, 1), ("N", 4), ("N", 1), (5, 4)),
        ((5, 4), (1, 4), ("N", 4), ("M", 4), (5, 4)),
        ((3, 3), (3,), ("N", "N"), ("N",), (3, 3)),
        ((), (4,), (), ("N",), (4,)),
    ],
)
def test_shapes_that_fit(
    input: tuple[int, ...], target: tuple[int, ...], a: Dims, b: Dims, out: tuple[int, ...]
) -> None:
    assert check(input, target, a, b) == out


@pytest.mark.parametrize(
    ("input", "target", "a", "b", "text"),
    [
        ((5, 3), (5, 4), ("N", 4), ("N", 4), "input has the shape (5, 3), but the artefact takes "
         "(N, 4) with N=5;"),
        ((5,), (5,), ("N", 4), ("N", 4), "input has the shape (5,), but the artefact takes (N, 4)"),
        ((5, 4, 1), (5, 4), ("N", 4), ("N", 4), "input has the shape (5, 4, 1), but"),
        ((), (), (1,), (1,), "input has the shape (), but the artefact takes (1); reshape it"),
        ((5, 4), (6, 4), ("N", 4), ("N", 4), "target has the shape (6, 4), but the artefact takes "
         "(N, 4) with N=5; reshape it"),
        ((5, 4), (1, 4), ("N", 4), ("N", 4), "target has the shape (1, 4), but the artefact takes "
         "(N, 4) with N=5;"),
        ((3, 4), (3, 4), ("N", "N"), ("N", "N"), "input has the shape (3, 4), but the artefact "
         "takes (N, N) with N=3;"),
        ((0,), (0,), (3,), (3,), "input has the shape (0,), but the artefact takes (3);"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit(
    input: tuple[int, ...], target: tuple[int, ...], a: Dims, b: Dims, text: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        check(input, target, a, b)
    assert str(caught.value).startswith(text)
    assert str(caught.value).endswith(
        "reshape it, or export with another shape (target_shape= for a target that broadcasts)"
    )


def test_shapes_that_can_not_be_broadcast() -> None:
    for a, b in ((None, None), (("N", 4), ("M", 4))):
        with pytest.raises(InvalidInputError) as caught:
            check((5, 4), (3, 4), a, b)
        assert str(caught.value) == (
            "input (5, 4) and target (3, 4) can't be broadcast to one shape"
        )
