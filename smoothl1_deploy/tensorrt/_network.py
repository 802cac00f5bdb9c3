"""Evaluate, on the CPU, the network that NVIDIA's own ONNX parser made of a model.

It is to TensorRT what `onnx.reference.ReferenceEvaluator` is to ONNX: it shows on any machine
what the parser made of the graph (constants, casts, broadcasts, axes, decompositions) before a
GPU sees it. **The network is checked, the GPU's kernels are not**: how the builder fuses layers,
which kernel it picks and in which order that kernel adds up is not modelled.

`plan` reads a parsed network once; `Plan.run` evaluates it as often as you like.

Each layer is evaluated in the dtype of its tensors, and its result is the exact one rounded once
to that dtype: arithmetic natively, sums and transcendental functions in float64 with one rounding
at the end. A choice of an order of summation would be a guess; the correctly rounded sum is what
every kernel approximates, and so a difference from the truth is the network's and not this
module's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from typing import Any

import numpy as np

from .._floats import NUMPY_DTYPE, Array, dtype_name, round_to
from ..errors import InvalidInputError, UnsupportedError
from ._parse import ParsedNetwork, dtype_of, shape_of

#: The arrays of a run by the names of their tensors; None stands for an input that is left out.
_Values = dict[str | None, Any]
_Function = Callable[..., Any]

_DTYPE: dict[str, np.dtype[Any]] = {
    **NUMPY_DTYPE,
    **{name: np.dtype(name) for name in ("int64", "int32", "int8", "uint8", "bool")},
}
_ELSEWHERE = "run the model on another backend: 'ort-cpu' here, or 'trt' where there is a GPU"


# A network as it is read


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the network; `shape` has -1 for a dynamic axis, None for an unknown rank."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...] | None

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)

    @property
    def is_float(self) -> bool:
        return self.dtype.name in NUMPY_DTYPE


def _tensor(tensor: Any) -> _Tensor:
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
        return _Tensor(tensor.name, _DTYPE[dtype], shape_of(tensor))
    except RuntimeError as exc:
        raise UnsupportedError(
            f"TensorRT can't infer the shape of the tensor {tensor.name!r} ({exc}): the network is "
            "not well formed; its log has the reason"
        ) from exc


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of any type, which has one output.

    Attributes:
        type: TensorRT's name of the LayerType, for instance `"ELEMENTWISE"`.
        inputs: None where an optional input is left out.
        drops_nan: whether minimum and maximum return the operand that is a number.
        function: computes the output from the inputs.
        frees: names of the tensors that no later layer reads.
    """

    name: str
    type: str
    inputs: tuple[_Tensor | None, ...]
    output: _Tensor
    drops_nan: bool
    function: _Function | None = None
    frees: tuple[str, ...] = ()

    @property
    def first(self) -> _Tensor:
        """The input of a layer that has at least one."""
        found = self.inputs[0]
        assert found is not None
        return found

    @property
    def reads(self) -> list[str | None]:
        """The names of its inputs."""
        return [None if tensor is None else tensor.name for tensor in self.inputs]

    @property
    def extrema(self) -> dict[str, _Function]:
        """Minimum and maximum, by the names of TensorRT's operations."""
        fmin, fmax = (np.fmin, np.fmax) if self.drops_nan else (np.minimum, np.maximum)
        return {"MIN": fmin, "MAX": fmax}

    def unsupported(self, what: str) -> UnsupportedError:
        """An error that names the layer."""
        return UnsupportedError(
            f"the layer {self.name!r} of type {self.type} {what}, which the evaluator of TensorRT "
            f"networks doesn't know; {_ELSEWHERE}"
        )

    def operation(self, known: Mapping[str, _Function], name: str) -> _Function:
        """The function of an operation by TensorRT's name of it."""
        if name not in known:
            raise self.unsupported(f"has the operation {name}")
        return known[name]

    def apply(self, values: _Values) -> None:
        """Put its output into `values`, and take out what nobody reads any more."""
        assert self.function is not None
        arrays = [values[name] for name in self.reads]
        try:
            array = np.asarray(self.function(*arrays))
        except InvalidInputError:
            raise
        except (ValueError, IndexError) as exc:
            shapes = ", ".join(str(array.shape) for array in arrays if array is not None)
            raise InvalidInputError(
                f"the layer {self.name!r} of type {self.type} can't be evaluated on inputs of the "
                f"shapes {shapes} ({exc}); give inputs whose shapes fit together"
            ) from exc
        tensor = self.output
        # TensorRT inferred dtype and rank by itself: where they differ, this evaluator is wrong.
        if array.dtype != tensor.dtype or tensor.rank not in (None, array.ndim):
            raise UnsupportedError(
                f"the layer {self.name!r} of type {self.type} was evaluated to {array.dtype} of "
                f"rank {array.ndim}, TensorRT makes it {tensor.dtype} of rank {tensor.rank}: the "
                "evaluator misreads this layer, please report it"
            )
        values[tensor.name] = array
        for name in self.frees:
            del values[name]


# Plans


@dataclass(frozen=True, slots=True)
class Plan:
    """A network ready to be evaluated; it holds no object of TensorRT's.

    `run` keeps nothing between calls and may be called from many threads at once.

    Attributes:
        outputs: the names of the outputs.
    """

    outputs: tuple[str, ...]
    _layers: tuple[Layer, ...]
    _constants: _Values

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs, by name.

        Args:
            feeds: an array for every input, of its dtype (ml_dtypes for bfloat16) and shape, which
                a `Runner` checks.

        Raises:
            InvalidInputError: when a layer can't compute on shapes of these sizes.
        """
        values: _Values = {**self._constants}
        values.update(feeds)
        with np.errstate(all="ignore"):  # overflow and NaN are results here, not accidents
            for layer in self._layers:
                layer.apply(values)
        # A copy, because an output may be a view of an input or of a constant.
        return {name: np.array(values[name], order="C") for name in self.outputs}


def plan(parsed: ParsedNetwork, *, clip_drops_nan: bool = True) -> Plan:
    """Read every layer of `parsed` once; what depends on constants alone is evaluated here.

    Args:
        parsed: from `smoothl1_deploy.tensorrt._parse`; not needed any more once the plan is made.
        clip_drops_nan: whether Clip, Relu, Min and Max swallow NaN, so that clip(NaN) is a bound.
            TensorRT's kernels may or may not, depending on the order of operands and the dtype
            (NVIDIA/TensorRT#4758 and #4773, both open). The pessimistic choice is the default,
            because a loss must survive it; False is IEEE's.

    Raises:
        UnsupportedError: for a layer, an operation or a dtype that the evaluator doesn't know;
            names the layer and its type.
    """
    network, trt = parsed.network, parsed.flavour.trt
    layers = [_layer(trt, network.get_layer(i), clip_drops_nan) for i in range(network.num_layers)]
    constants: _Values = {None: None}
    steps = []
    for layer in _sorted(layers):
        if all(name in constants for name in layer.reads):
            with np.errstate(all="ignore"):
                layer.apply(constants)
        else:
            steps.append(layer)
    outputs = tuple(network.get_output(i).name for i in range(network.num_outputs))
    return Plan(outputs, _freeing(steps, {*constants, *outputs}), constants)


def _layer(trt: Any, layer: Any, drops_nan: bool) -> Layer:
    """Read what all layers have; then the bindings' object gets its specific class, and is read."""
    # Read the type by ILayer's property: IActivationLayer hides it by its own.
    kind = trt.ILayer.type.fget(layer).name
    found = [layer.get_input(i) for i in range(layer.num_inputs)]
    inputs = tuple(None if tensor is None else _tensor(tensor) for tensor in found)
    view = Layer(layer.name, kind, inputs, _tensor(layer.get_output(0)), drops_nan)
    if kind not in HANDLERS:
        raise view.unsupported("is of a kind")
    cls, handler = HANDLERS[kind]
    layer.__class__ = getattr(trt, cls)
    return replace(view, function=handler(view, layer))


def _sorted(layers: Sequence[Layer]) -> Iterable[Layer]:
    """The layers, each after those whose outputs it reads; the parser adds some out of order."""
    maker = {layer.output.name: i for i, layer in enumerate(layers)}
    needs = {
        i: [maker[name] for name in layer.reads if name in maker] for i, layer in enumerate(layers)
    }
    return (layers[i] for i in TopologicalSorter(needs).static_order())


def _freeing(layers: Sequence[Layer], kept: set[str | None]) -> tuple[Layer, ...]:
    """The layers, each of which lets go of the tensors that it is the last to read.

    A tensor of 2^24 elements takes 64 MiB.
    """
    done: list[Layer] = []
    for layer in reversed(layers):
        last = {*layer.reads, layer.output.name} - kept
        kept = kept | last
        done.append(replace(layer, frees=tuple(name for name in last if name is not None)))
    return tuple(reversed(done))


# Layers that treat each element alone


def _widened(function: _Function, dtype: np.dtype[Any]) -> _Function:
    """A function that computes `function` in float64 and rounds once to `dtype`."""
    name = dtype_name(dtype)
    return lambda *arrays: round_to(function(*[a.astype(np.float64) for a in arrays]), name)


def _constant(view: Layer, layer: Any) -> _Function:
    if not isinstance(layer.weights, np.ndarray):
        raise UnsupportedError(
            f"the layer {view.name!r} of type {view.type} holds constants of "
            f"{view.output.dtype.name}, whose values TensorRT's Python interface can't read. Keep "
            "the constant in float32 and cast it in the graph, as the exports of smoothl1-deploy do"
        )
    # A copy: the weights live and die with the network.
    value = np.array(layer.weights, view.output.dtype).reshape(tuple(layer.shape))
    return lambda: value


def _cast(view: Layer, layer: Any) -> _Function:
    """A cast to nearest; to integers by truncation, saturated, with 0 for NaN.

    numpy leaves a float that no integer of the target holds undefined; TensorRT 10.16 gives 0
    for NaN and the nearest bound for the rest (NVIDIA/TensorRT#4775).
    """
    source, to = view.first, view.output
    if source.dtype == to.dtype:
        return lambda x: x
    if to.dtype == np.bool_:
        return lambda x: x != 0
    if source.is_float and not to.is_float:
        return lambda x: _saturated(x.astype(np.float64), to.dtype)
    if to.dtype.name in ("float16", "bfloat16") and not source.is_float:
        return _widened(lambda x: x, to.dtype)  # ml_dtypes rounds twice, by way of float32
    return lambda x: x.astype(to.dtype)


def _saturated(x: Array, to: np.dtype[Any]) -> Array:
    bounds = np.iinfo(to)
    inside = (x > bounds.min) & (x < bounds.max)
    bound = np.where(x > 0, bounds.max, bounds.min).astype(to)
    outside = np.where(np.isnan(x), to.type(0), bound)
    return np.where(inside, np.where(inside, x, 0).astype(to), outside)


_ELEMENTWISE: dict[str, _Function] = {
    "SUM": np.add,
    "PROD": np.multiply,
    "SUB": np.subtract,
    "AND": np.logical_and,
    "OR": np.logical_or,
    "XOR": np.logical_xor,
    "EQUAL": np.equal,
    "GREATER": np.greater,
    "LESS": np.less,
}


def _elementwise(view: Layer, layer: Any) -> _Function:
    known = {**_ELEMENTWISE, **view.extrema}
    if view.first.is_float:
        known |= {"DIV": np.divide, "POW": _widened(np.power, view.output.dtype)}
    else:
        known |= {"DIV": _divide_towards_zero, "FLOOR_DIV": np.floor_divide, "POW": np.power}
    return view.operation(known, layer.op.name)


def _divide_towards_zero(a: Array, b: Array) -> Array:
    """Integer division as C has it; numpy's rounds down."""
    quotient = np.floor_divide(a, b)
    inexact = quotient * b != a
    return np.asarray(quotient + (inexact & ((a < 0) != (b < 0))).astype(quotient.dtype))


#: Operations that numpy rounds once in every dtype.
_UNARY: dict[str, _Function] = {
    "ABS": np.abs,
    "NEG": np.negative,
    "SQRT": np.sqrt,
    "RECIP": lambda x: np.divide(x.dtype.type(1), x),
    "SIGN": np.sign,
    "NOT": np.logical_not,
    "ISINF": np.isinf,
    "ISNAN": np.isnan,
}


def _unary(view: Layer, layer: Any) -> _Function:
    return view.operation(_UNARY, layer.op.name)


def _activation(view: Layer, layer: Any) -> _Function:
    op, kind = layer.type.name, view.output.dtype.type
    minimum, maximum = view.extrema["MIN"], view.extrema["MAX"]
    if op == "RELU":
        return lambda x: maximum(x, kind(0))
    if op != "CLIP":
        raise view.unsupported(f"has the activation {op}")
    with np.errstate(over="ignore"):  # the parser writes an open bound as FLT_MAX
        low, high = kind(layer.alpha), kind(layer.beta)
    return lambda x: minimum(maximum(x, low), high)


def _select(view: Layer, layer: Any) -> _Function:
    return np.where


# Layers with an accumulator inside


def _reduce(view: Layer, layer: Any) -> _Function:
    """The sum of nothing is 0, and its average NaN (ReduceOperation in NvInfer.h)."""
    op, mask, dtype = layer.op.name, int(layer.axes), view.output.dtype
    axes = tuple(axis for axis in range(mask.bit_length()) if mask >> axis & 1)
    add: Any = np.add
    how = {"axis": axes, "keepdims": bool(layer.keep_dims)}
    if op == "SUM" and not view.first.is_float:  # a sum of integers wraps around in their width
        return lambda x: add.reduce(x, dtype=dtype, **how)
    if op not in ("SUM", "AVG") or not view.first.is_float:
        raise view.unsupported(f"has the operation {op} on {dtype.name}")

    def reduce(x: Array) -> Any:
        total = add.reduce(x, dtype=np.float64, **how)
        count = np.prod([x.shape[axis] for axis in axes], dtype=np.float64)
        return round_to(total if op == "SUM" else np.divide(total, count), dtype_name(dtype))

    return reduce


# Layers that move elements and compute shapes


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _shape(view: Layer, layer: Any) -> _Function:
    dtype = view.output.dtype
    return lambda x: np.array(x.shape, dtype)


def _shuffle(view: Layer, layer: Any) -> _Function:
    """Transpose, then reshape; each may be missing. The parser makes no second transpose."""
    # The bindings always give eight entries; those beyond the rank are not initialised.
    order = _ints(layer.first_transpose)[: view.first.rank]
    again = _ints(layer.second_transpose)[: view.output.rank]
    if again != tuple(range(len(again))):
        raise view.unsupported("transposes twice")
    zero_copies = bool(layer.zero_is_placeholder)
    given = len(view.inputs) > 1 or layer.reshape_dims is None
    fixed = None if given else _ints(layer.reshape_dims)

    def shuffle(x: Array, wanted: Array | None = None) -> Any:
        x = x.transpose(order)
        shape = fixed if wanted is None else _ints(wanted)
        if shape is None:
            return x
        if zero_copies and 0 in shape:
            shape = tuple(x.shape[i] if n == 0 else n for i, n in enumerate(shape))
        return x.reshape(shape)

    return shuffle


def _squeeze(view: Layer, layer: Any) -> _Function:
    if len(view.inputs) > 1:
        return lambda x, axes: x.squeeze(_ints(axes.reshape(-1)))
    # x.squeeze() would take a dynamic axis too that happens to have length 1.
    ones = tuple(axis for axis, n in enumerate(view.first.shape or ()) if n == 1)
    return lambda x: x.squeeze(ones)


def _unsqueeze(view: Layer, layer: Any) -> _Function:
    return lambda x, axes: np.expand_dims(x, _ints(axes.reshape(-1)))


def _concatenation(view: Layer, layer: Any) -> _Function:
    axis = int(layer.axis)
    return lambda *arrays: np.concatenate(arrays, axis)


def _slice(view: Layer, layer: Any) -> _Function:
    """Start, size and stride of every axis, each an attribute or an input."""
    mode = layer.mode.name
    if mode != "STRICT_BOUNDS" or len(view.inputs) > 4:
        raise view.unsupported(f"has the mode {mode} and {len(view.inputs)} inputs")
    attributes = (layer.start, layer.shape, layer.stride)
    fixed = [None if value is None else _ints(value) for value in attributes]

    def run(x: Array, *given: Array | None) -> Array:
        arrays = (*given, None, None, None)[:3]
        ranges = [
            own if array is None else _ints(array) for own, array in zip(fixed, arrays, strict=True)
        ]
        for axis, (start, count, step) in enumerate(zip(*ranges, strict=True)):
            if (start, count, step) != (0, x.shape[axis], 1):
                x = _take(view, x, start + step * np.arange(count), axis)
        return x

    return run


def _gather(view: Layer, layer: Any) -> _Function:
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


def _take(view: Layer, x: Array, index: Array, axis: int) -> Array:
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
Handler = Callable[[Layer, Any], _Function]

#: LayerType -> (class of the bindings, handler): what a loss and its gradients are made of.
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
