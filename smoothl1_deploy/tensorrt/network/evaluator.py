"""`plan` reads a parsed network once; `Plan.run` evaluates it as often as you like."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any

import numpy as np

from ...errors import InvalidInputError, SpecError, UnsupportedError
from ...floats import Array
from ..parse import ParsedNetwork
from .accumulate import ACCUMULATE
from .layer import Handler, LayerView, TensorView, read_weights, tensor_view
from .movement import MOVEMENT
from .pointwise import POINTWISE

__all__ = ["Plan", "evaluate", "plan"]

#: LayerType -> (class of the bindings, handler); constants are read by `_read_constant`.
_HANDLERS: dict[str, tuple[str, Handler]] = {**POINTWISE, **MOVEMENT, **ACCUMULATE}

_ABSENT = 0  # the slot of an optional input that is left out


@dataclass(frozen=True, slots=True)
class _Step:
    """One layer: which slots it reads, which it fills, which nobody reads after it."""

    view: LayerView
    function: Callable[..., Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    frees: tuple[int, ...] = ()

    def apply(self, values: list[Any]) -> None:
        try:
            result = self.function(*[values[slot] for slot in self.inputs])
        except InvalidInputError:
            raise
        except (ValueError, IndexError) as exc:
            shapes = [values[slot].shape for slot in self.inputs if slot != _ABSENT]
            raise InvalidInputError(
                f"the layer {self.view.name!r} of type {self.view.type} can't be evaluated on "
                f"inputs of the shapes {', '.join(map(str, shapes))} ({exc}); give inputs whose "
                "shapes fit together"
            ) from exc
        results = result if len(self.outputs) > 1 else (result,)
        for slot, tensor, value in zip(self.outputs, self.view.outputs, results, strict=True):
            array = np.asarray(value)
            # TensorRT's own inference: where it differs, this evaluator has the layer wrong.
            if array.dtype != tensor.dtype or tensor.rank not in (-1, array.ndim):
                raise UnsupportedError(
                    f"the layer {self.view.name!r} of type {self.view.type} was evaluated to "
                    f"{array.dtype} of rank {array.ndim}, TensorRT makes it {tensor.dtype} of "
                    f"rank {tensor.rank}: the evaluator misreads this layer, please report it"
                )
            values[slot] = array
        for slot in self.frees:
            values[slot] = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A network ready to be evaluated; it holds no object of TensorRT's.

    `run` keeps nothing between calls and may be called from many threads at once.

    Attributes:
        inputs, outputs: the ports, in the network's order.
        clip_drops_nan: see `plan`.
    """

    inputs: tuple[TensorView, ...]
    outputs: tuple[TensorView, ...]
    clip_drops_nan: bool
    _names: tuple[tuple[str | None, ...], ...]  # of the axes of each input
    _steps: tuple[_Step, ...]
    _initial: tuple[Any, ...]  # every slot: constants where they are known, else None
    _in_slots: tuple[int, ...]
    _out_slots: tuple[int, ...]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs, by name.

        Args:
            feeds: an array for every input, of its dtype (ml_dtypes for bfloat16) and shape.

        Raises:
            InvalidInputError: when an array is missing, or its dtype or shape doesn't fit.
        """
        self._check(feeds)
        values = list(self._initial)
        for tensor, slot in zip(self.inputs, self._in_slots, strict=True):
            values[slot] = feeds[tensor.name]
        with np.errstate(all="ignore"):  # overflow and NaN are results here, not accidents
            for step in self._steps:
                step.apply(values)
        # A copy, because an output may be a view of an input or of a constant.
        return {
            tensor.name: np.array(values[slot], order="C")
            for tensor, slot in zip(self.outputs, self._out_slots, strict=True)
        }

    def _check(self, feeds: Mapping[str, Array]) -> None:
        expected = [tensor.name for tensor in self.inputs]
        if set(feeds) != set(expected):
            raise InvalidInputError(
                f"the network takes {', '.join(expected) or 'no inputs'}; "
                f"got {', '.join(sorted(feeds)) or 'nothing'}"
            )
        sizes: dict[str, int] = {}
        for tensor, names in zip(self.inputs, self._names, strict=True):
            array, shape = feeds[tensor.name], tensor.shape or ()
            fits = array.dtype == tensor.dtype and array.ndim == len(shape)
            for name, wanted, got in zip(names, shape, array.shape, strict=False):
                if wanted == -1:
                    wanted = sizes.setdefault(name, got) if name else got
                fits = fits and got == wanted
            if not fits:
                dims = [name or str(n) for name, n in zip(names, shape, strict=True)]
                raise InvalidInputError(
                    f"the input {tensor.name!r} of the network takes {tensor.dtype} of the shape "
                    f"({', '.join(dims)}), one size for each name; got {array.dtype} of the shape "
                    f"{array.shape}"
                )


def evaluate(
    parsed: ParsedNetwork, feeds: Mapping[str, Array], *, clip_drops_nan: bool = True
) -> dict[str, Array]:
    """Evaluate a network once; `plan(parsed).run(feeds)` is the form for many times.

    Raises:
        UnsupportedError, InvalidInputError: as `plan` and `Plan.run`.
    """
    return plan(parsed, clip_drops_nan=clip_drops_nan).run(feeds)


def plan(
    parsed: ParsedNetwork,
    *,
    clip_drops_nan: bool = True,
    constants: Mapping[str, Array] | None = None,
) -> Plan:
    """Read every layer of `parsed` once; what depends on constants alone is evaluated here.

    Args:
        parsed: from `smoothl1_deploy.tensorrt.parse`; not needed any more once the plan is made.
        clip_drops_nan: whether Clip, Relu, HardSigmoid, Min, Max, ReduceMin and ReduceMax swallow
            NaN, so that clip(NaN) is a bound. TensorRT's kernels may or may not, depending on the
            order of operands and the dtype (NVIDIA/TensorRT#4758 and #4773, both open). The
            pessimistic choice is the default, because a loss must survive it; False is IEEE's.
        constants: values to use in place of the network's own, by the name of the CONSTANT layer:
            for seeing that a check notices a wrong constant.

    Raises:
        UnsupportedError: for a layer, an operation or a dtype that the evaluator doesn't know;
            names the layer and its type.
        SpecError: for a name in `constants` that no CONSTANT layer has.
        InvalidInputError: for a value in `constants` of another dtype or shape.
    """
    network = parsed.network
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    views = [_view(parsed.trt, layer, clip_drops_nan) for layer in layers]
    inputs = tuple(tensor_view(network.get_input(i)) for i in range(network.num_inputs))
    outputs = tuple(tensor_view(network.get_output(i)) for i in range(network.num_outputs))
    known = {view.name for view in views if view.type == "CONSTANT"}
    unknown = sorted(set(constants or ()) - known)
    if unknown:
        raise SpecError(
            f"no CONSTANT layer is called {', '.join(unknown)}; "
            f"there are {', '.join(sorted(known)) or 'none'}"
        )

    slots: dict[str, int] = {}
    for tensor in [*inputs, *(tensor for view in views for tensor in view.outputs)]:
        if tensor.name in slots:
            raise UnsupportedError(
                f"two tensors of the network are called {tensor.name!r}; give the nodes and "
                "values of the ONNX graph unique names"
            )
        slots[tensor.name] = len(slots) + 1  # slot 0 stays empty
    initial: list[Any] = [None] * (len(slots) + 1)

    steps: list[_Step] = []
    for index in _order(views):
        view, layer = views[index], layers[index]
        out_slots = tuple(slots[tensor.name] for tensor in view.outputs)
        if view.type == "CONSTANT":
            initial[out_slots[0]] = _read_constant(view, layer, constants or {})
            continue
        in_slots = tuple(_ABSENT if t is None else slots[t.name] for t in view.inputs)
        step = _Step(view, _HANDLERS[view.type][1](view, layer), in_slots, out_slots)
        if all(slot == _ABSENT or initial[slot] is not None for slot in in_slots):
            with np.errstate(all="ignore"):
                step.apply(initial)
        else:
            steps.append(step)
    in_slots = tuple(slots[tensor.name] for tensor in inputs)
    final = tuple(slots[tensor.name] for tensor in outputs)
    names = tuple(port.names or (None,) * len(port.shape) for port in parsed.inputs)
    return Plan(
        inputs,
        outputs,
        clip_drops_nan,
        names,
        _with_frees(steps, initial, final),
        tuple(initial),
        in_slots,
        final,
    )


def _view(trt: Any, layer: Any, drops_nan: bool) -> LayerView:
    """Read what all layers have, and give the bindings' object its specific class."""
    # Read the type by ILayer's property: IActivationLayer and IPoolingLayer hide it by their own.
    kind = trt.ILayer.type.fget(layer).name
    if kind != "CONSTANT" and kind not in _HANDLERS:
        raise LayerView(layer.name, kind, (), (), drops_nan).unsupported("is of a kind")
    layer.__class__ = getattr(trt, "IConstantLayer" if kind == "CONSTANT" else _HANDLERS[kind][0])
    found = [layer.get_input(i) for i in range(layer.num_inputs)]
    return LayerView(
        layer.name,
        kind,
        tuple(None if tensor is None else tensor_view(tensor) for tensor in found),
        tuple(tensor_view(layer.get_output(i)) for i in range(layer.num_outputs)),
        drops_nan,
    )


def _read_constant(view: LayerView, layer: Any, replaced: Mapping[str, Array]) -> Array:
    dtype, shape = view.dtype, tuple(layer.shape)
    if view.name not in replaced:
        return read_weights(view, layer.weights, dtype, shape)
    value = np.array(replaced[view.name])
    if value.dtype != dtype or value.shape != shape:
        raise InvalidInputError(
            f"the constant {view.name!r} is {dtype} of the shape {shape}; the value to replace it "
            f"is {value.dtype} of the shape {value.shape}"
        )
    return value


def _order(views: Sequence[LayerView]) -> Iterable[int]:
    """The layers, each after those whose outputs it reads; the parser adds some out of order."""
    maker = {tensor.name: i for i, view in enumerate(views) for tensor in view.outputs}
    needs = {
        i: [maker[tensor.name] for tensor in view.inputs if tensor and tensor.name in maker]
        for i, view in enumerate(views)
    }
    return TopologicalSorter(needs).static_order()


def _with_frees(
    steps: Sequence[_Step], initial: Sequence[Any], outputs: Sequence[int]
) -> tuple[_Step, ...]:
    """Let go of a tensor after its last reader: at 2^24 elements each takes 64 MiB."""
    kept = {slot for slot, value in enumerate(initial) if value is not None} | {*outputs, _ABSENT}
    done: list[_Step] = []
    for step in reversed(steps):
        last = {*step.inputs, *step.outputs} - kept
        kept |= last
        done.append(_Step(step.view, step.function, step.inputs, step.outputs, tuple(last)))
    return tuple(reversed(done))
