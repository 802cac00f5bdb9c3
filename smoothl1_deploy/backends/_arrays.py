"""What arrays `run` takes: promoted as PyTorch promotes, of shapes that fit, or refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .._artefact import Port
from .._floats import NUMPY_DTYPE, Array
from ..errors import InvalidInputError


def _kind(name: str) -> str:
    """`float`, `integer`, `bool`, or what can't be used, of a dtype's name."""
    if name in NUMPY_DTYPE:
        return "float"
    if name == "bool":
        return "bool"
    return "integer" if re.fullmatch(r"u?int(8|16|32|64)", name) else "other"


def promote(arrays: dict[str, Array], dtype: str) -> dict[str, Array]:
    """All arrays in the artefact's dtype, where PyTorch's promotion has that result.

    Raises:
        InvalidInputError: as `check_promotion` does.
    """
    check_promotion({name: str(array.dtype) for name, array in arrays.items()}, dtype)
    wanted = NUMPY_DTYPE[dtype]
    with np.errstate(all="ignore"):  # 70000 is inf in float16, in PyTorch without a word
        return {name: array.astype(wanted, copy=False) for name, array in arrays.items()}


def check_promotion(given: Mapping[str, str], dtype: str) -> None:
    """Hold the dtypes given (by name, for each input) against the artefact's.

    ================  ================  =======================================
    input             target            result
    ================  ================  =======================================
    dtype             dtype             as they are
    dtype             integer or bool   the integers become dtype (and reversed)
    dtype             narrower float    the narrower becomes dtype (and reversed)
    anything else                       refused
    ================  ================  =======================================

    float16 beside bfloat16 promotes to float32; a weight counts like a target. Source:
    `torch.promote_types`; the rank of the arrays plays no part, as after the explicit broadcast
    in `torch.nn.functional`.

    Raises:
        InvalidInputError: where the result would be another dtype.
    """
    kinds = {name: _kind(each) for name, each in given.items()}
    for name, kind in kinds.items():
        if kind == "other":
            raise InvalidInputError(
                f"{name} has the dtype {given[name]}, which is not a number format of a loss"
            )
    floats = {given[name] for name, kind in kinds.items() if kind == "float"}
    if "float" not in (kinds["input"], kinds["target"]):
        raise InvalidInputError(
            f"input and target are both integral ({given['input']}, "
            f"{given['target']}); PyTorch refuses that too. Convert one of them: "
            f"input.astype({dtype!r})"
        )
    result = max(floats, key=lambda name: NUMPY_DTYPE[name].itemsize)
    if {"float16", "bfloat16"} <= floats and NUMPY_DTYPE[result].itemsize == 2:
        result = "float32"
    if result != dtype:
        listed = " and ".join(f"{name} {each}" for name, each in given.items())
        raise InvalidInputError(
            f"{listed} promote to {result}, but the artefact is {dtype}; convert them, or export "
            f"with dtype={result!r}"
        )


def as_beta(value: Any) -> Array:
    """A run-time beta as the float32 of rank 0 that artefacts take.

    Raises:
        InvalidInputError: for anything but one number.
    """
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError("a string")
        with np.errstate(over="ignore"):
            return np.asarray(np.float32(float(value)))
    except Exception as exc:  # the caller's `__float__`, a tensor's without a number among them
        raise InvalidInputError(f"beta must be one number, got {value!r} ({exc})") from exc


def check_shapes(arrays: Mapping[str, Any], ports: Mapping[str, Port]) -> tuple[int, ...]:
    """The broadcast shape of all arrays (or tensors), after each was held against its port.

    Raises:
        InvalidInputError: on a rank, a fixed axis or a repeated axis name that doesn't fit.
    """
    sizes: dict[str, int] = {}
    shapes = {key: tuple(array.shape) for key, array in arrays.items()}
    for key, shape in shapes.items():
        port = ports[key]
        if port.shape is None:
            continue
        fits = len(port.shape) == len(shape)
        for dim, size in zip(port.shape, shape, strict=False):
            fits &= (sizes.setdefault(dim, size) if isinstance(dim, str) else dim) == size
        if not fits:
            known = {name: size for name, size in sizes.items() if name in port.shape}
            where = f" with {', '.join(f'{k}={v}' for k, v in known.items())}" if known else ""
            raise InvalidInputError(
                f"{key} has the shape {shape}, but the artefact takes "
                f"({', '.join(map(str, port.shape))}){where}; reshape it, or export with another "
                "shape (target_shape= for a target that broadcasts)"
            )
    try:
        return np.broadcast_shapes(*shapes.values())
    except ValueError:
        given = " and ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise InvalidInputError(f"{given} can't be broadcast to one shape") from None
