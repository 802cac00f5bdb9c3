"""What the evaluator sees of a layer: its name, its type, its tensors, and its own attributes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import UnsupportedError
from ...floats import NUMPY_DTYPE, Array

__all__ = ["Handler", "LayerView", "TensorView", "axes_of", "read_weights", "tensor_view"]

#: The name of TensorRT's DataType -> numpy dtype.
_DTYPE: dict[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": NUMPY_DTYPE["bfloat16"],
    "INT64": np.dtype(np.int64),
    "INT32": np.dtype(np.int32),
    "INT8": np.dtype(np.int8),
    "UINT8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

_ELSEWHERE = "run the model on another backend: 'ort-cpu' here, or 'trt' where there is a GPU"


@dataclass(frozen=True, slots=True)
class TensorView:
    """A tensor of the network; `shape` has -1 for a dynamic axis, None for an unknown rank."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...] | None

    @property
    def rank(self) -> int:
        """Number of axes; -1 where it isn't known."""
        return -1 if self.shape is None else len(self.shape)


@dataclass(frozen=True, slots=True)
class LayerView:
    """What is known of a layer of any type.

    Attributes:
        type: TensorRT's name of the LayerType, for instance `"ELEMENTWISE"`.
        inputs: None where an optional input is left out.
        drops_nan: whether minimum and maximum return the operand that is a number.
    """

    name: str
    type: str
    inputs: tuple[TensorView | None, ...]
    outputs: tuple[TensorView, ...]
    drops_nan: bool

    @property
    def first(self) -> TensorView:
        """The input of a layer that has at least one."""
        found = self.inputs[0]
        assert found is not None
        return found

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the first output."""
        return self.outputs[0].dtype

    @property
    def is_float(self) -> bool:
        """Whether the first input holds floating-point numbers."""
        return self.first.dtype.name in NUMPY_DTYPE

    def has(self, index: int) -> bool:
        """Whether the optional input `index` is connected."""
        return len(self.inputs) > index and self.inputs[index] is not None

    def unsupported(self, what: str) -> UnsupportedError:
        """An error that names the layer."""
        return UnsupportedError(
            f"the layer {self.name!r} of type {self.type} {what}, which the evaluator of TensorRT "
            f"networks doesn't know; {_ELSEWHERE}"
        )


#: Reads a layer (the bindings' object of its specific class) once, and returns the function that
#: computes its outputs from its inputs. The function must not hold on to the object.
Handler = Callable[[LayerView, Any], Callable[..., Any]]


def tensor_view(tensor: Any) -> TensorView:
    """Read a tensor.

    Raises:
        UnsupportedError: for a dtype that numpy has no equivalent of, and in a network whose
            shapes contradict each other.
    """
    name = tensor.dtype.name
    if name not in _DTYPE:
        raise UnsupportedError(
            f"the tensor {tensor.name!r} has the dtype {name}; the evaluator of TensorRT networks "
            f"knows {', '.join(_DTYPE)}; {_ELSEWHERE}"
        )
    try:
        shape: tuple[int, ...] | None = tuple(tensor.shape)
    except ValueError:  # the bindings' answer for a rank that is not known
        shape = None
    except RuntimeError as exc:
        raise UnsupportedError(
            f"TensorRT can't infer the shape of the tensor {tensor.name!r} ({exc}): the network is "
            "not well formed; its log has the reason"
        ) from exc
    return TensorView(tensor.name, _DTYPE[name], shape)


def read_weights(
    view: LayerView, weights: Any, dtype: np.dtype[Any], shape: Sequence[int]
) -> Array:
    """A copy of `weights`, which otherwise live and die with the network.

    Raises:
        UnsupportedError: for bfloat16, whose values the Python bindings don't hand out.
    """
    if not isinstance(weights, np.ndarray):
        raise UnsupportedError(
            f"the layer {view.name!r} of type {view.type} holds constants of {dtype.name}, whose "
            "values TensorRT's Python interface can't read. Keep the constant in float32 and cast "
            "it in the graph, as the exports of smoothl1-deploy do"
        )
    return np.array(weights, dtype).reshape(tuple(shape))


def axes_of(mask: int) -> tuple[int, ...]:
    """The axes of a bit mask, lowest first.

    >>> axes_of(0b1010)
    (1, 3)
    """
    return tuple(axis for axis in range(mask.bit_length()) if mask >> axis & 1)
