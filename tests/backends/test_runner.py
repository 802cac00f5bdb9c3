"""What arrays `run` takes: promoted as PyTorch promotes, of shapes that fit, or refused."""

from __future__ import annotations

import itertools
import warnings

import ml_dtypes
import numpy as np
import pytest
import torch

from smoothl1_deploy._floats import NUMPY_DTYPE
from smoothl1_deploy._model import Port
from smoothl1_deploy._spec import DTYPES
from smoothl1_deploy.backends._runner import check_shapes, promote
from smoothl1_deploy.errors import InvalidInputError

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "bool")
TORCH = {name: getattr(torch, name) for name in (*DTYPES, *INTEGERS)}
NUMPY = {**NUMPY_DTYPE, **{name: np.dtype(name) for name in INTEGERS}}


def both(input: np.ndarray, target: np.ndarray, dtype: str) -> tuple[np.ndarray, ...]:
    return tuple(promote({"input": input, "target": target}, dtype).values())


# promote


def test_promotion_is_that_of_torch() -> None:
    for a, b, dtype in itertools.product(TORCH, TORCH, DTYPES):
        expected = str(torch.promote_types(TORCH[a], TORCH[b])).removeprefix("torch.")
        x, y = np.ones(2, NUMPY[a]), np.zeros(2, NUMPY[b])
        if expected == dtype:
            results = both(x, y, dtype)
            assert [r.dtype for r in results] == [NUMPY_DTYPE[dtype]] * 2
            assert [r.tolist() for r in results] == [[1, 1], [0, 0]]
            continue
        with pytest.raises(InvalidInputError) as caught:
            both(x, y, dtype)
        text = f"input {a} and target {b} promote to {expected}, but the artefact is {dtype}; "
        text += f"convert them, or export in {expected}"
        if expected not in DTYPES:
            text = f"input and target are both integral ({a}, {b}); PyTorch refuses that too. "
            text += f"Convert one of them to {dtype}"
        assert str(caught.value) == text
    for dtype in INTEGERS:
        x = torch.ones(2, dtype=TORCH[dtype])
        with pytest.raises(RuntimeError):
            torch.nn.functional.smooth_l1_loss(x, x)


def test_promoted_values_are_those_of_torch_and_nothing_else_is_copied() -> None:
    steps = [0, 1, 3, 127, 255, 257, 2049, 65519, 65520, 2**24 + 1, 2**53 + 1]
    for dtype, integer in itertools.product(DTYPES, INTEGERS):
        values = np.array([True, False])
        if integer != "bool":
            info = np.iinfo(integer)
            both_signs = (sign * v for v in (*steps, info.max, info.min) for sign in (1, -1))
            values = np.array([v for v in both_signs if info.min <= v <= info.max], integer)
        expected = torch.from_numpy(values).to(TORCH[dtype]).double().tolist()
        one = np.ones(1, NUMPY_DTYPE[dtype])
        with warnings.catch_warnings(), np.errstate(all="raise"):
            warnings.simplefilter("error")
            same, got = both(one, values, dtype)
        assert same is one
        assert got.astype(np.float64).tolist() == expected


def test_what_is_no_number_format_of_a_loss() -> None:
    good = np.zeros(2, np.float32)
    for array in (
        np.array(["a", "b"]),
        np.array([b"a"]),
        np.array([1.0, None], object),
        np.array([1 + 2j]),
        np.array([1], "datetime64[s]"),
        np.zeros(2, "f4,f4"),
        np.zeros(2, ml_dtypes.float8_e4m3fn),
        np.zeros(2, ml_dtypes.int4),
        *([np.zeros(2, np.longdouble)] if np.longdouble != np.float64 else []),
    ):
        for what, a, b in (("input", array, good), ("target", good, array)):
            with pytest.raises(InvalidInputError) as caught:
                both(a, b, "float32")
            text = f"{what} has the dtype {array.dtype}, which is not a number format of a loss"
            assert str(caught.value) == text


# check_shapes

Dims = tuple[int | str, ...] | None


def check(input: tuple[int, ...], target: tuple[int, ...], a: Dims, b: Dims) -> tuple[int, ...]:
    arrays = {"input": np.zeros(input), "target": np.zeros(target)}
    return check_shapes(
        arrays, {"input": Port("input", "float32", a), "target": Port("target", "float32", b)}
    )


def test_shapes_that_fit() -> None:
    for input, target, a, b, out in (
        ((), (), None, None, ()),
        ((2, 1), (3,), None, None, (2, 3)),
        ((2, 0), (1,), None, None, (2, 0)),
        ((5, 4), (5, 4), ("N", 4), ("N", 4), (5, 4)),
        ((5, 4), (5, 1), ("N", 4), ("N", 1), (5, 4)),
        ((5, 4), (1, 4), ("N", 4), ("M", 4), (5, 4)),
        ((3, 3), (3,), ("N", "N"), ("N",), (3, 3)),
        ((), (4,), (), ("N",), (4,)),
    ):
        assert check(input, target, a, b) == out


def test_shapes_that_do_not_fit() -> None:
    n4 = ("N", 4)
    for input, target, a, b, text in (
        ((5, 3), (5, 4), n4, n4, "input has the shape (5, 3), but the artefact takes (N, 4) where "
         "N is 5;"),
        ((5,), (5,), n4, n4, "input has the shape (5,), but the artefact takes (N, 4)"),
        ((5, 4, 1), (5, 4), n4, n4, "input has the shape (5, 4, 1), but"),
        ((), (), (1,), (1,), "input has the shape (), but the artefact takes (1); reshape it"),
        ((5, 4), (6, 4), n4, n4, "target has the shape (6, 4), but the artefact takes (N, 4) where "
         "N is 5; reshape it"),
        ((5, 4), (1, 4), n4, n4, "target has the shape (1, 4), but the artefact takes (N, 4)"),
        ((3, 4), (3, 4), ("N", "N"), ("N", "N"), "input has the shape (3, 4), but the artefact "
         "takes (N, N) where N is 3;"),
        ((0,), (0,), (3,), (3,), "input has the shape (0,), but the artefact takes (3);"),
    ):  # fmt: skip
        with pytest.raises(InvalidInputError) as caught:
            check(input, target, a, b)
        assert str(caught.value).startswith(text)
        assert str(caught.value).endswith(
            "reshape it, or export with another shape (a target that broadcasts has one of its own)"
        )


def test_shapes_that_can_not_be_broadcast() -> None:
    for a, b in ((None, None), (("N", 4), ("M", 4))):
        with pytest.raises(InvalidInputError) as caught:
            check((5, 4), (3, 4), a, b)
        assert str(caught.value) == (
            "input (5, 4) and target (3, 4) can't be broadcast to one shape"
        )
