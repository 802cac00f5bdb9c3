"""Arrays of anyone: numpy's, torch's, and what has `__dlpack__`; with their numbers, or refused.

A tensor may have a shape and no memory: torch's FakeTensor and meta tensors, a storage that was
freed. numpy takes the empty pointer of its DLPack capsule for an order of new memory, and random
numbers come out (numpy 2.4); a pointer with an offset ends the process.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from ._floats import NUMPY_DTYPE, Array
from .errors import InvalidInputError

#: The name of a capsule -> how many bytes into its struct the pointer to the data lies. Source:
#: DLManagedTensor and DLManagedTensorVersioned of dlpack.h 1.0, with pointers of 64 bits.
_DATA_AT = {b"dltensor": 0, b"dltensor_versioned": 32}
# Prototypes of our own: to declare the types of `ctypes.pythonapi` would declare them for everyone.
_name_of = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(
    ("PyCapsule_GetName", ctypes.pythonapi)
)
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class _Exporter:
    """An exporter of DLPack, and whether the capsule it gave has data."""

    has_data = True

    def __init__(self, value: Any) -> None:
        self._value = value

    def __dlpack__(self, **asked: Any) -> Any:
        capsule = self._value.__dlpack__(**asked)
        name = _name_of(capsule)
        if name in _DATA_AT:  # the importer has words of its own for any other
            address = _pointer_of(capsule, name) + _DATA_AT[name]
            self.has_data = bool(ctypes.c_void_p.from_address(address).value)
        return capsule

    def __dlpack_device__(self) -> Any:
        return self._value.__dlpack_device__()


def as_array(value: Any, what: str) -> Array:
    """`value` as a C-contiguous numpy array in native byte order, without a copy where possible.

    Raises:
        InvalidInputError: for anything that isn't a numeric array on the CPU, its data there.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise InvalidInputError(
            f"{what} is a masked array, and a loss knows no mask; fill it or select what counts: "
            f"{what}.filled(...) or {what}.compressed()"
        )
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
    elif hasattr(value, "__dlpack__"):
        array = adopted(value, what, from_torch, np.from_dlpack)
    else:
        raise InvalidInputError(
            f"{what} is a {type(value).__name__}; give a numpy array or a tensor with __dlpack__"
        )
    # order="C" instead of ascontiguousarray, which makes a rank of 0 into 1.
    return np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")


def from_torch(tensor: Any) -> Array:
    """A torch tensor of the CPU as an array, over the same memory."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype != torch.bfloat16:
        return np.asarray(tensor.numpy())
    bits = np.asarray(tensor.contiguous().view(torch.int16).numpy())  # numpy knows no bfloat16
    return bits.view(NUMPY_DTYPE["bfloat16"])


def to_torch(array: Array) -> Any:
    """The inverse of `from_torch`."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        if array.dtype == NUMPY_DTYPE["bfloat16"]:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def adopted(
    value: Any, what: str, of_torch: Callable[[Any], Any], of_dlpack: Callable[[Any], Any]
) -> Any:
    """What `of_torch` makes of a torch tensor, or `of_dlpack` of anything else.

    Args:
        value: a tensor, or what has `__dlpack__`; the code behind that is the caller's.
        what: the name of `value` in messages.
        of_torch: takes a torch tensor without gradient and lazy negation.
        of_dlpack: takes an exporter.

    Raises:
        InvalidInputError: for what can't be imported, whatever it ends in, and for elements
            without data.
    """
    torch = sys.modules.get("torch")
    try:
        if torch is not None and isinstance(value, torch.Tensor):
            if isinstance(value, torch.masked.MaskedTensor):
                raise TypeError("its mask would be lost")
            # DLPack refuses a tensor that requires grad, and drops the sign of a negated one.
            tensor = value.detach().resolve_neg()
            if _has_memory(tensor):
                return of_torch(tensor)
        else:
            exporter = _Exporter(value)
            found = of_dlpack(exporter)
            if exporter.has_data or 0 in found.shape:
                return found
    except Exception as exc:
        raise InvalidInputError(
            f"{what} can't be read through DLPack ({str(exc) or type(exc).__name__}); move it to "
            "the CPU, or give a numpy array"
        ) from exc
    raise InvalidInputError(
        f"{what} is a {type(value).__name__} without data; give one that holds its numbers: no "
        "FakeTensor, no meta tensor, none whose storage was freed"
    )


def _has_memory(tensor: Any) -> bool:
    """Whether the storage of a torch tensor reaches as far as its elements."""
    storage = tensor.untyped_storage()
    if storage.device.type == "meta":  # a FakeTensor's too, which names another device
        return False
    if not tensor.numel():
        return True
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * step for size, step in steps)
    return bool((last + 1) * tensor.element_size() <= storage.nbytes())
