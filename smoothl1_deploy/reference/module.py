"""The torch reference module, and PyTorch eager as a function of numpy arrays: the contract."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from ..floats import NUMPY_DTYPE, Array
from ..spec import LossSpec

__all__ = ["SmoothL1Loss", "eager", "from_torch", "to_torch"]


class SmoothL1Loss(torch.nn.SmoothL1Loss):
    """`torch.nn.SmoothL1Loss` itself, every argument included, that knows its `LossSpec`.

    Unlike its parent it refuses a nonsensical beta when it is made, not when it is called.

    >>> SmoothL1Loss(beta=0.5, size_average=False).spec().reduction
    'sum'
    """

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        beta: float = 1.0,
    ) -> None:
        super().__init__(size_average, reduce, reduction, beta)
        self.spec()

    def spec(self, dtype: Any = "float32") -> LossSpec:
        """This module as a `LossSpec` for tensors of `dtype`."""
        return LossSpec.from_module(self, dtype)

    @classmethod
    def from_spec(cls, spec: LossSpec) -> SmoothL1Loss:
        """The module that a spec describes."""
        return cls(reduction=spec.reduction, beta=spec.beta)


def to_torch(array: Array) -> torch.Tensor:
    """A tensor over the same memory; bfloat16, which torch can't read from numpy, by its bits."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        if array.dtype == NUMPY_DTYPE["bfloat16"]:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def from_torch(tensor: torch.Tensor) -> Array:
    """The inverse of `to_torch`, for tensors on any device."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(NUMPY_DTYPE["bfloat16"])
    return tensor.numpy()


def eager(spec: LossSpec, input: Array, target: Array) -> Array:
    """What PyTorch eager computes on the CPU, in the spec's dtype."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using a target size")  # broadcasting is meant
        return from_torch(SmoothL1Loss.from_spec(spec)(to_torch(input), to_torch(target)))
