"""Evaluate, on the CPU, the network that NVIDIA's own ONNX parser made of a model.

It is to TensorRT what `onnx.reference.ReferenceEvaluator` is to ONNX: it shows on any machine
what the parser made of the graph (constants, casts, broadcasts, axes, decompositions) before a
GPU sees it. **The network is checked, the GPU's kernels are not**: how the builder fuses layers,
which kernel it picks and in which order that kernel adds up is not modelled.

`plan` reads a parsed network once; `Plan.run` evaluates it as often as you like. What each layer
computes stands in `layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from typing import Any

import numpy as np

from .._floats import Array
from ..errors import InvalidInputError, UnsupportedError
from ._layers import HANDLERS, LayerView, tensor_view, unsupported
from ._parse import NetworkPort, ParsedNetwork

#: The arrays of a run by the names of their tensors; None is an optional input that is left out.
_Values = dict[str | None, Any]


@dataclass(frozen=True, slots=True)
class _Step:
    """One layer of a plan: what it reads and computes, and what nobody reads after it."""

    view: LayerView
    function: Callable[..., Any]
    frees: tuple[str, ...] = ()

    @property
    def reads(self) -> list[str | None]:
        return [None if tensor is None else tensor.name for tensor in self.view.inputs]

    def apply(self, values: _Values) -> None:
        arrays = [values[name] for name in self.reads]
        try:
            result = self.function(*arrays)
        except InvalidInputError:
            raise
        except (ValueError, IndexError) as exc:
            shapes = ", ".join(str(array.shape) for array in arrays if array is not None)
            raise InvalidInputError(
                f"the layer {self.view.name!r} of type {self.view.type} can't be evaluated on "
                f"inputs of the shapes {shapes} ({exc}); give inputs whose shapes fit together"
            ) from exc
        tensor, array = self.view.output, np.asarray(result)
        # TensorRT inferred dtype and rank by itself: where they differ, this evaluator is wrong.
        if array.dtype != tensor.dtype or tensor.rank not in (-1, array.ndim):
            raise UnsupportedError(
                f"the layer {self.view.name!r} of type {self.view.type} was evaluated to "
                f"{array.dtype} of rank {array.ndim}, TensorRT makes it {tensor.dtype} of "
                f"rank {tensor.rank}: the evaluator misreads this layer, please report it"
            )
        values[tensor.name] = array
        for name in self.frees:
            del values[name]


@dataclass(frozen=True, slots=True)
class Plan:
    """A network ready to be evaluated; it holds no object of TensorRT's.

    `run` keeps nothing between calls and may be called from many threads at once.

    Attributes:
        inputs: the ports, in the network's order.
        dtypes: of the inputs, as numpy has them.
        outputs: the names of the outputs.
    """

    inputs: tuple[NetworkPort, ...]
    dtypes: tuple[np.dtype[Any], ...]
    outputs: tuple[str, ...]
    _steps: tuple[_Step, ...]
    _constants: _Values

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs, by name.

        Args:
            feeds: an array for every input, of its dtype (ml_dtypes for bfloat16) and shape.

        Raises:
            InvalidInputError: when an array is missing, or its dtype or shape doesn't fit.
        """
        self._check(feeds)
        values: _Values = {**self._constants}
        values.update(feeds)
        with np.errstate(all="ignore"):  # overflow and NaN are results here, not accidents
            for step in self._steps:
                step.apply(values)
        # A copy, because an output may be a view of an input or of a constant.
        return {name: np.array(values[name], order="C") for name in self.outputs}

    def _check(self, feeds: Mapping[str, Array]) -> None:
        expected = [port.name for port in self.inputs]
        if set(feeds) != set(expected):
            raise InvalidInputError(
                f"the network takes {', '.join(expected) or 'no inputs'}; "
                f"got {', '.join(sorted(feeds)) or 'nothing'}"
            )
        sizes: dict[str, int] = {}
        for port, dtype in zip(self.inputs, self.dtypes, strict=True):
            array = feeds[port.name]
            fits = array.dtype == dtype and array.ndim == len(port.shape)
            for name, wanted, got in zip(port.names, port.shape, array.shape, strict=False):
                if wanted == -1:
                    wanted = sizes.setdefault(name, got) if name else got
                fits = fits and got == wanted
            if not fits:
                raise InvalidInputError(
                    f"the input {port.name!r} of the network takes {dtype} of the shape "
                    f"({', '.join(map(str, port.dims))}), one size for each name; got "
                    f"{array.dtype} of the shape {array.shape}"
                )


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
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    views = [_view(trt, layer, clip_drops_nan) for layer in layers]
    inputs = [tensor_view(network.get_input(i)) for i in range(network.num_inputs)]
    outputs = tuple(network.get_output(i).name for i in range(network.num_outputs))

    taken: set[str] = set()
    for tensor in (*inputs, *(view.output for view in views)):
        if tensor.name in taken:
            raise UnsupportedError(
                f"two tensors of the network are called {tensor.name!r}; give the nodes and "
                "values of the ONNX graph unique names"
            )
        taken.add(tensor.name)

    constants: _Values = {None: None}
    steps = []
    for index in _order(views):
        view, layer = views[index], layers[index]
        step = _Step(view, HANDLERS[view.type][1](view, layer))
        if all(name in constants for name in step.reads):
            with np.errstate(all="ignore"):
                step.apply(constants)
        else:
            steps.append(step)
    dtypes = tuple(tensor.dtype for tensor in inputs)
    return Plan(parsed.inputs, dtypes, outputs, _freeing(steps, {*constants, *outputs}), constants)


def _view(trt: Any, layer: Any, drops_nan: bool) -> LayerView:
    """Read what all layers have, and give the bindings' object its specific class."""
    # Read the type by ILayer's property: IActivationLayer hides it by its own.
    kind = trt.ILayer.type.fget(layer).name
    if kind not in HANDLERS:
        raise unsupported(layer.name, kind, "is of a kind")
    layer.__class__ = getattr(trt, HANDLERS[kind][0])
    found = [layer.get_input(i) for i in range(layer.num_inputs)]
    inputs = tuple(None if tensor is None else tensor_view(tensor) for tensor in found)
    return LayerView(layer.name, kind, inputs, tensor_view(layer.get_output(0)), drops_nan)


def _order(views: Sequence[LayerView]) -> Iterable[int]:
    """The layers, each after those whose outputs it reads; the parser adds some out of order."""
    maker = {view.output.name: i for i, view in enumerate(views)}
    needs = {
        i: [maker[tensor.name] for tensor in view.inputs if tensor and tensor.name in maker]
        for i, view in enumerate(views)
    }
    return TopologicalSorter(needs).static_order()


def _freeing(steps: Sequence[_Step], kept: set[str | None]) -> tuple[_Step, ...]:
    """Let go of a tensor after its last reader: at 2^24 elements each takes 64 MiB."""
    done: list[_Step] = []
    for step in reversed(steps):
        last = {*step.reads, step.view.output.name} - kept
        kept = kept | last
        done.append(replace(step, frees=tuple(name for name in last if name is not None)))
    return tuple(reversed(done))
