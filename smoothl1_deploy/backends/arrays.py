"""What `run` takes: numpy arrays and DLPack tensors, promoted as PyTorch promotes, or refused."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ..artefact import Port
from ..errors import InvalidInputError
from ..floats import NUMPY_DTYPE, Array, dtype_name

__all__ = ["as_array", "check_shapes", "promote"]


def as_array(value: Any, what: str) -> Array:
    """`value` as a C-contiguous numpy array in native byte order, without a copy where possible.

    Raises:
        InvalidInputError: for anything that isn't a numeric array on the CPU.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise InvalidInputError(
            f"{what} is a masked array, and a loss knows no mask; fill it or select what counts: "
            f"{what}.filled(...) or {what}.compressed()"
        )
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
    elif hasattr(value, "__dlpack__"):
        array = _from_dlpack(value, what)
    else:
        raise InvalidInputError(
            f"{what} is a {type(value).__name__}; give a numpy array or a tensor with __dlpack__"
        )
    # order="C" instead of ascontiguousarray, which makes a rank of 0 into 1.
    return np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")


def _from_dlpack(value: Any, what: str) -> Array:
    torch = sys.modules.get("torch")
    try:
        if torch is not None and isinstance(value, torch.Tensor):
            # DLPack hands out the memory of a lazily negated tensor without its sign.
            value = value.detach().resolve_neg()
            # numpy's DLPack knows no bfloat16: carry the bits.
            if value.dtype == torch.bfloat16 and value.device.type == "cpu":
                bits = value.contiguous().view(torch.int16).numpy()
                return np.asarray(bits).view(NUMPY_DTYPE["bfloat16"])
        return np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as exc:
        raise InvalidInputError(
            f"{what} can't be read through DLPack ({exc}); move it to the CPU, "
            "or give a numpy array"
        ) from exc


def _kind(array: Array) -> str:
    """`float`, `integer`, `bool`, or what can't be used."""
    if dtype_name(array.dtype) in NUMPY_DTYPE:
        return "float"
    return {"i": "integer", "u": "integer", "b": "bool"}.get(array.dtype.kind, "other")


def promote(input: Array, target: Array, dtype: str) -> tuple[Array, Array]:
    """Both arrays in the artefact's dtype, where PyTorch's promotion has that result.

    ================  ================  =======================================
    input             target            result
    ================  ================  =======================================
    dtype             dtype             as they are
    dtype             integer or bool   the integers become dtype (and reversed)
    dtype             narrower float    the narrower becomes dtype (and reversed)
    anything else                       refused
    ================  ================  =======================================

    float16 beside bfloat16 promotes to float32. Source: `torch.promote_types`; the rank of the
    arrays plays no part, as after the explicit broadcast in `torch.nn.functional`.

    Raises:
        InvalidInputError: where the result would be another dtype.
    """
    kinds = _kind(input), _kind(target)
    for what, array, kind in (("input", input, kinds[0]), ("target", target, kinds[1])):
        if kind == "other":
            raise InvalidInputError(f"{what} has the dtype {array.dtype}, which is not a number format of a loss")
    floats = {dtype_name(a.dtype) for a, kind in zip((input, target), kinds, strict=True) if kind == "float"}
    if not floats:
        raise InvalidInputError(
            f"input and target are both integral ({input.dtype}, {target.dtype}); PyTorch refuses "
            f"that too. Convert one of them: input.astype({dtype!r})"
        )
    result = max(floats, key=lambda name: NUMPY_DTYPE[name].itemsize)
    if floats == {"float16", "bfloat16"}:
        result = "float32"
    if result != dtype:
        raise InvalidInputError(
            f"input {dtype_name(input.dtype)} and target {dtype_name(target.dtype)} promote to "
            f"{result}, but the artefact is {dtype}; convert them, or export with dtype={result!r}"
        )
    wanted = NUMPY_DTYPE[dtype]
    with np.errstate(all="ignore"):  # 70000 is inf in float16, in PyTorch without a word
        return input.astype(wanted, copy=False), target.astype(wanted, copy=False)


def check_shapes(arrays: dict[str, Array], ports: dict[str, Port]) -> tuple[int, ...]:
    """The broadcast shape, after every array has been held against its port.

    Raises:
        InvalidInputError: on a rank, a fixed axis or a repeated axis name that doesn't fit.
    """
    sizes: dict[str, int] = {}
    for key, array in arrays.items():
        port = ports[key]
        if port.shape is None:
            continue
        fits = len(port.shape) == array.ndim
        for dim, size in zip(port.shape, array.shape, strict=False):
            fits &= (sizes.setdefault(dim, size) if isinstance(dim, str) else dim) == size
        if not fits:
            known = {name: size for name, size in sizes.items() if name in port.shape}
            where = f" with {', '.join(f'{k}={v}' for k, v in known.items())}" if known else ""
            raise InvalidInputError(
                f"{key} has the shape {array.shape}, but the artefact takes "
                f"({', '.join(map(str, port.shape))}){where}; reshape it, or export with another "
                "shape (target_shape= for a target that broadcasts)"
            )
    shapes = [array.shape for array in arrays.values()]
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        raise InvalidInputError(
            f"input {shapes[0]} and target {shapes[1]} can't be broadcast to one shape"
        ) from None
