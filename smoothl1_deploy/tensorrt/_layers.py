"""What the layers of a TensorRT network compute: those that a loss and its gradients are made of.

Each layer is evaluated in the dtype of its tensors, and its result is the exact one rounded once
to that dtype: arithmetic natively, sums and transcendental functions in float64 with one rounding
at the end. A choice of an order of summation would be a guess; the correctly rounded sum is what
every kernel approximates, and so a difference from the truth is the network's and not this
module's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._floats import NUMPY_DTYPE, Array, dtype_name, round_to
from ..errors import InvalidInputError, UnsupportedError
from ._parse import dtype_of, shape_of

Function = Callable[..., Any]

_DTYPE: dict[str, np.dtype[Any]] = {
    **NUMPY_DTYPE,
    **{name: np.dtype(name) for name in ("int64", "int32", "int8", "uint8", "bool")},
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


def tensor_view(tensor: Any) -> TensorView:
    """Read a tensor.

    Raises:
        UnsupportedError: for a dtype that numpy has no equivalent of, and in a network whose
            shapes contradict each other.
    """
    dtype = dtype_of(tensor)
    if dtype not in _DTYPE:
        raise UnsupportedError(
            f"the tensor {tensor.name!r} has the dtype {dtype}; the evaluator of TensorRT networks "
            f"knows {', '.join(_DTYPE)}; {_ELSEWHERE}"
        )
    try:
        return TensorView(tensor.name, _DTYPE[dtype], shape_of(tensor))
    except RuntimeError as exc:
        raise UnsupportedError(
            f"TensorRT can't infer the shape of the tensor {tensor.name!r} ({exc}): the network is "
            "not well formed; its log has the reason"
        ) from exc


@dataclass(frozen=True, slots=True)
class LayerView:
    """What is known of a layer of any type; each has one output.

    Attributes:
        type: TensorRT's name of the LayerType, for instance `"ELEMENTWISE"`.
        inputs: None where an optional input is left out.
        drops_nan: whether minimum and maximum return the operand that is a number.
    """

    name: str
    type: str
    inputs: tuple[TensorView | None, ...]
    output: TensorView
    drops_nan: bool

    @property
    def first(self) -> TensorView:
        """The input of a layer that has at least one."""
        found = self.inputs[0]
        assert found is not None
        return found

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the output."""
        return self.output.dtype

    @property
    def is_float(self) -> bool:
        """Whether the first input holds floating-point numbers."""
        return _is_float(self.first.dtype)

    @property
    def extrema(self) -> dict[str, np.ufunc]:
        """Minimum and maximum, by the names of TensorRT's operations."""
        fmin, fmax = (np.fmin, np.fmax) if self.drops_nan else (np.minimum, np.maximum)
        return {"MIN": fmin, "MAX": fmax}

    def has(self, index: int) -> bool:
        """Whether the optional input `index` is connected."""
        return len(self.inputs) > index and self.inputs[index] is not None

    def unsupported(self, what: str) -> UnsupportedError:
        """An error that names the layer."""
        return unsupported(self.name, self.type, what)


def unsupported(name: str, type: str, what: str) -> UnsupportedError:
    """An error that names a layer."""
    return UnsupportedError(
        f"the layer {name!r} of type {type} {what}, which the evaluator of TensorRT networks "
        f"doesn't know; {_ELSEWHERE}"
    )


# Rounding


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.name in NUMPY_DTYPE


def _narrow(dtype: np.dtype[Any]) -> Function:
    """Rounds float64 to `dtype` once, to nearest, ties to even."""
    if dtype == np.float32:
        return lambda values: np.asarray(values).astype(np.float32)
    name = dtype_name(dtype)
    return lambda values: round_to(values, name)


def _widened(function: Function, dtype: np.dtype[Any]) -> Function:
    """`function` computed in float64 and rounded once to `dtype`."""
    to_dtype = _narrow(dtype)
    return lambda *arrays: to_dtype(function(*[a.astype(np.float64) for a in arrays]))


# Layers that treat each element alone


def _constant(view: LayerView, layer: Any) -> Function:
    if not isinstance(layer.weights, np.ndarray):
        raise UnsupportedError(
            f"the layer {view.name!r} of type {view.type} holds constants of {view.dtype.name}, "
            "whose values TensorRT's Python interface can't read. Keep the constant in float32 and "
            "cast it in the graph, as the exports of smoothl1-deploy do"
        )
    # A copy: the weights live and die with the network.
    value = np.array(layer.weights, view.dtype).reshape(tuple(layer.shape))
    return lambda: value


def _cast(view: LayerView, layer: Any) -> Function:
    """To nearest; to integers by truncation, saturated, NaN as 0.

    numpy leaves a float that no integer of the target holds undefined; TensorRT 10.16 gives 0
    for NaN and the nearest bound for the rest (NVIDIA/TensorRT#4775).
    """
    source, to = view.first.dtype, view.dtype
    if source == to:
        return lambda x: x
    if to == np.bool_:
        return lambda x: x != 0
    if _is_float(source) and not _is_float(to):
        bounds = np.iinfo(to)

        def saturate(x: Array) -> Array:
            wide = x.astype(np.float64)
            inside = (wide > bounds.min) & (wide < bounds.max)
            bound = np.where(wide > 0, bounds.max, bounds.min).astype(to)
            whole = np.where(inside, wide, 0).astype(to)
            return np.where(inside, whole, np.where(np.isnan(wide), to.type(0), bound))

        return saturate
    if dtype_name(to) in ("float16", "bfloat16") and not _is_float(source):
        return _widened(lambda x: x, to)  # ml_dtypes would round by way of float32
    return lambda x: x.astype(to)


_ELEMENTWISE: dict[str, Function] = {
    "SUM": np.add,
    "PROD": np.multiply,
    "SUB": np.subtract,
    "AND": np.logical_and,
    "OR": np.logical_or,
    "XOR": np.logical_xor,
    "EQUAL": np.equal,
    "GREATER": np.greater,
    "LESS": np.less,
    "POW": np.power,
}


def _elementwise(view: LayerView, layer: Any) -> Function:
    op = layer.op.name
    if op == "DIV":
        return np.divide if view.is_float else _divide_towards_zero
    if op == "FLOOR_DIV" and not view.is_float:
        return np.floor_divide
    if op == "POW" and view.is_float:
        return _widened(np.power, view.dtype)
    known: dict[str, Function] = {**_ELEMENTWISE, **view.extrema}
    if op not in known:
        raise view.unsupported(f"has the operation {op}")
    return known[op]


def _divide_towards_zero(a: Array, b: Array) -> Array:
    """Integer division as C has it; numpy's rounds down."""
    quotient = np.floor_divide(a, b)
    inexact = quotient * b != a
    back: Array = quotient + (inexact & ((a < 0) != (b < 0))).astype(quotient.dtype)
    return back


#: Operations that numpy rounds once in every dtype.
_UNARY: dict[str, Function] = {
    "ABS": np.abs,
    "NEG": np.negative,
    "SQRT": np.sqrt,
    "RECIP": lambda x: np.divide(x.dtype.type(1), x),
    "SIGN": np.sign,
    "NOT": np.logical_not,
    "ISINF": np.isinf,
    "ISNAN": np.isnan,
}


def _unary(view: LayerView, layer: Any) -> Function:
    op = layer.op.name
    if op in _UNARY:
        return _UNARY[op]
    raise view.unsupported(f"has the operation {op}")


def _activation(view: LayerView, layer: Any) -> Function:
    op, kind = layer.type.name, view.dtype.type
    minimum, maximum = view.extrema["MIN"], view.extrema["MAX"]
    if op == "RELU":
        return lambda x: maximum(x, kind(0))
    if op != "CLIP":
        raise view.unsupported(f"has the activation {op}")
    with np.errstate(over="ignore"):  # the parser writes an open bound as FLT_MAX
        low, high = kind(layer.alpha), kind(layer.beta)
    return lambda x: minimum(maximum(x, low), high)


def _select(view: LayerView, layer: Any) -> Function:
    return np.where


# Layers with an accumulator inside


def _reduce(view: LayerView, layer: Any) -> Function:
    """The sum of nothing is 0, and its average NaN (ReduceOperation in NvInfer.h)."""
    op, mask, keep, dtype = layer.op.name, int(layer.axes), bool(layer.keep_dims), view.dtype
    axes = tuple(axis for axis in range(mask.bit_length()) if mask >> axis & 1)
    if op not in ("SUM", "AVG") or (op == "AVG" and not view.is_float):
        raise view.unsupported(f"has the operation {op} on {dtype.name}")
    add: Any = np.add
    if not view.is_float:  # wraps around in its own width
        return lambda x: add.reduce(x, axis=axes, keepdims=keep, dtype=dtype)
    to_dtype = _narrow(dtype)

    def reduce(x: Array) -> Any:
        total = add.reduce(x, axis=axes, keepdims=keep, dtype=np.float64)
        count = np.prod([x.shape[axis] for axis in axes], dtype=np.float64)
        return to_dtype(total if op == "SUM" else np.divide(total, count))

    return reduce


# Layers that move elements and compute shapes


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _shape(view: LayerView, layer: Any) -> Function:
    dtype = view.dtype
    return lambda x: np.array(x.shape, dtype)


def _shuffle(view: LayerView, layer: Any) -> Function:
    """Transpose, reshape, transpose; each part may be missing."""
    # The bindings always give eight entries; those beyond the rank are not initialised.
    before = _transposed(_ints(layer.first_transpose)[: view.first.rank])
    after = _transposed(_ints(layer.second_transpose)[: view.output.rank])
    zero_copies = bool(layer.zero_is_placeholder)
    fixed = None if view.has(1) or layer.reshape_dims is None else _ints(layer.reshape_dims)

    def shuffle(x: Array, wanted: Array | None = None) -> Any:
        x = before(x)
        shape = fixed if wanted is None else _ints(wanted)
        if shape is not None:
            if zero_copies and 0 in shape:
                shape = tuple(x.shape[i] if n == 0 else n for i, n in enumerate(shape))
            x = x.reshape(shape)
        return after(x)

    return shuffle


def _transposed(order: tuple[int, ...]) -> Function:
    if order == tuple(range(len(order))):
        return lambda x: x
    return lambda x: x.transpose(order)


def _squeeze(view: LayerView, layer: Any) -> Function:
    if view.has(1):
        return lambda x, axes: x.squeeze(_ints(axes.reshape(-1)))
    # Not x.squeeze(): a dynamic axis that happens to have length 1 stays.
    ones = tuple(axis for axis, n in enumerate(view.first.shape or ()) if n == 1)
    return lambda x: x.squeeze(ones)


def _unsqueeze(view: LayerView, layer: Any) -> Function:
    return lambda x, axes: np.expand_dims(x, _ints(axes.reshape(-1)))


def _concatenation(view: LayerView, layer: Any) -> Function:
    axis = int(layer.axis)
    return lambda *arrays: np.concatenate(arrays, axis)


def _slice(view: LayerView, layer: Any) -> Function:
    if layer.mode.name != "STRICT_BOUNDS":
        raise view.unsupported(f"has the mode {layer.mode.name}")

    def fixed(input: int, attribute: str) -> tuple[int, ...] | None:
        value = None if view.has(input) else getattr(layer, attribute, None)
        return None if value is None else _ints(value)

    known = [fixed(1, "start"), fixed(2, "shape"), fixed(3, "stride"), fixed(5, "axes")]

    def run(
        x: Array,
        start: Array | None = None,
        size: Array | None = None,
        stride: Array | None = None,
        fill: Array | None = None,
        axes: Array | None = None,
    ) -> Array:
        *ranges, which = (
            fixed if given is None else _ints(given)
            for fixed, given in zip(known, (start, size, stride, axes), strict=True)
        )
        for i, axis in enumerate(range(x.ndim) if which is None else which):
            first, count, step = (values[i] for values in ranges if values is not None)
            if (first, count, step) != (0, x.shape[axis], 1):
                x = _take(view, x, first + step * np.arange(count), axis)
        return x

    return run


def _gather(view: LayerView, layer: Any) -> Function:
    mode, axis, shape = layer.mode.name, int(layer.axis), view.first.shape
    if mode != "DEFAULT" or layer.num_elementwise_dims:
        raise view.unsupported(f"has the mode {mode} and {layer.num_elementwise_dims} dimensions")
    # TensorRT counts from the end where it knows where that is.
    from_the_end = shape is not None and shape[axis] >= 0

    def gather(x: Array, index: Array) -> Array:
        if from_the_end:
            index = np.where(index < 0, index + x.shape[axis], index)
        return _take(view, x, index, axis)

    return gather


def _take(view: LayerView, x: Array, index: Array, axis: int) -> Array:
    length = x.shape[axis]
    if index.size and not (index.min() >= 0 and index.max() < length):
        raise InvalidInputError(
            f"the layer {view.name!r} of type {view.type} reads the indices {index.min()} to "
            f"{index.max()} of axis {axis}, which has the length {length}; give indices that lie "
            "inside"
        )
    return x.take(index, axis)


#: Reads a layer (the bindings' object of its specific class) once, and returns the function that
#: computes its output from its inputs. The function must not hold on to the object.
Handler = Callable[[LayerView, Any], Function]

#: LayerType -> (class of the bindings, handler).
HANDLERS: dict[str, tuple[str, Handler]] = {
    "ACTIVATION": ("IActivationLayer", _activation),
    "CAST": ("ICastLayer", _cast),
    "CONCATENATION": ("IConcatenationLayer", _concatenation),
    "CONSTANT": ("IConstantLayer", _constant),
    "ELEMENTWISE": ("IElementWiseLayer", _elementwise),
    "GATHER": ("IGatherLayer", _gather),
    "IDENTITY": ("IIdentityLayer", _cast),
    "REDUCE": ("IReduceLayer", _reduce),
    "SELECT": ("ISelectLayer", _select),
    "SHAPE": ("IShapeLayer", _shape),
    "SHUFFLE": ("IShuffleLayer", _shuffle),
    "SLICE": ("ISliceLayer", _slice),
    "SQUEEZE": ("ISqueezeLayer", _squeeze),
    "UNARY": ("IUnaryLayer", _unary),
    "UNSQUEEZE": ("IUnsqueezeLayer", _unsqueeze),
}
