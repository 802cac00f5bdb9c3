"""A loss graph as a server takes it: no rank 0, `[N, 1]` for a score a row, no silent broadcast.

A Triton model has no tensor of rank 0, and Triton compares the rows of two inputs only where it
batches. So a served graph has

* the loss in the shape [1] for `mean` and `sum`, and [N, 1] per sample; `beta`, `divisor` in [1];
* a guard, `Reshape(target, Shape(input))`: it makes an error of a target with another number of
  rows, which would be broadcast otherwise. Empty batches pass.

Inside, nothing changes: the same nodes compute the same number. `loss_part` cuts a loss out again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper

from .._artefact import NUMBERS
from .._model import (
    MODEL_ERRORS,
    Loss,
    check_engines,
    correct,
    inputs_of,
    main_tensors,
    metadata_of,
    opset_of,
    restate,
)
from .._shapes import Shape, describe
from ..errors import ArtefactError, ModelWarning, UnsupportedError
from ..graph._attach import read_losses, rename, rename_uses
from ..graph._metadata import SERVED, is_changed, is_served, read_route, read_spec, stamp
from ._config import ModelPorts, onnx_ports

_PROTOBUF_LIMIT = 2**31 - 2**20  # with room for what is added
_ALLOWZERO = 14  # the first opset whose Reshape takes a size of 0 as it is
_AXES_AS_INPUT = 13  # the first opset whose Squeeze and Unsqueeze take their axes as an input


@dataclass(frozen=True, slots=True)
class ServedGraph:
    """A graph for a server.

    Attributes:
        model: the graph, with its metadata.
        unbatched: why the rows of two requests must not go into one batch; None where they may.
    """

    model: onnx.ModelProto
    unbatched: str | None


def serve(model: onnx.ModelProto) -> ServedGraph:
    """The served graph of a loss artefact, of a model with losses attached, or of any model.

    A graph that is served already comes back as it is.

    Raises:
        ArtefactError: when the rank of an input or output can't be told, metadata are damaged, or
            the graph is no valid one.
        UnsupportedError: on an opset older than 13, on a model of 2 GiB or more, and on a loss with
            an upstream gradient or with a beta for each row.

    Warns:
        ModelWarning: where the model declares a shape that its nodes contradict; the served graph
            declares what they make.
    """
    if model.ByteSize() >= _PROTOBUF_LIMIT:
        raise UnsupportedError(
            "the model has 2 GiB or more, and a served one is written as a single file; keep the "
            "weights outside and write its folder by hand, then check it with repository --lint"
        )
    check_engines(model, "serve the model that it was built from, and the engine with --engine")
    losses = read_losses(model)
    if any(loss.spec.upstream for loss in losses):
        raise UnsupportedError(
            "a server has no gradient to pass back, and grad_output, in the shape of the loss, no "
            "rows of a request; serve the loss without upstream"
        )
    spec, route, done = read_spec(model), read_route(model), is_served(model)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    editor = _Editor(copy)
    if editor.contradiction is not None:
        warnings.warn(editor.contradiction, ModelWarning, stacklevel=2)
    ports = onnx_ports(copy)
    unbatched = why_unbatched(losses, ports) or _rows_alone(ports)
    if done:
        return ServedGraph(copy, unbatched)
    for loss in losses:
        betas, rank = loss.spec.beta_shape, len(editor.dims(loss.inputs["input"]))
        if any(size != 1 for size in betas[: max(len(betas) - rank + 1, 0)]):
            raise UnsupportedError(
                f"beta has the shape {betas}, and so a number for each row of a batch, and batches "
                "of a server have any number of rows; give numbers for the axes behind it alone"
            )
        for role in ("target", "weight", "mask"):
            if role in loss.inputs:
                editor.guard(loss.inputs[role], loss.inputs["input"])
    for value in inputs_of(copy):
        if not editor.dims(value.name):
            editor.widen_input(value)
    reduced = (loss for loss in losses if loss.spec.reduction != "none")
    scores = {loss.outputs["loss"] for loss in reduced if loss.spec.keeps_axes}
    for value in copy.graph.output:
        dims = editor.dims(value.name)
        if not dims or (len(dims) == 1 and (unbatched is None or value.name in scores)):
            editor.widen_output(value, dims)
    if spec is not None:
        shape = editor.dims("input")
        name, changed = f"served_{describe(shape)}", is_changed(model)
        stamp(copy, spec, route or "unknown", name, served=True, changed=changed)
    else:
        helper.set_model_props(copy, {**metadata_of(copy), SERVED: "1"})
    try:
        onnx.checker.check_model(copy, full_check=True)
    except (*MODEL_ERRORS, ValueError) as exc:
        raise ArtefactError(f"the model is no valid ONNX graph: {exc}") from exc
    return ServedGraph(copy, unbatched)


def why_unbatched(losses: Iterable[Loss], ports: ModelPorts) -> str | None:
    """Why the rows of two requests must not go into one batch; None where they may."""
    for loss in losses:
        spec = loss.spec
        if spec.mixes_rows:
            return (
                f"{loss.outputs['loss']} is a {spec.reduction} over all rows of a batch: requests "
                "of different callers would be mixed into one number"
            )
        for number in NUMBERS:
            if number in spec.inputs:
                return (
                    f"{number} is one number for a whole batch, and two requests may differ in it"
                )
    for kind, given in (("input", ports.inputs), ("output", ports.outputs)):
        for port in given:
            if port.without_rows:
                return f"the {kind} {port.name} has no axis of rows"
    return None


def _rows_alone(ports: ModelPorts) -> str | None:
    for port in ports.inputs:
        if len(port.dims or ()) == 1:  # in the config its dims would be empty
            return f"the input {port.name} has no axis beside its rows"
    return None


class _Editor:
    """A graph, what is known of its tensors' shapes, and the few edits that a server asks for."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._guarded: list[tuple[str, str]] = []
        self._opset = opset_of(model)
        if self._opset < _AXES_AS_INPUT:
            raise UnsupportedError(
                f"the model is of opset {self._opset}, and a served graph needs "
                f"{_AXES_AS_INPUT}; convert it with onnx.version_converter"
            )
        self._tensors = main_tensors(model)
        self.contradiction = correct(model, self._tensors)

    def dims(self, name: str) -> Shape:
        """The shape of a tensor: sizes, and names of dynamic axes.

        Raises:
            ArtefactError: for a tensor of unknown rank.
        """
        dims = self._known(name)
        if dims is None:
            raise ArtefactError(
                f"the rank of {name!r} is unknown, and a server needs it; export with a shape, "
                "as in --shape N,16"
            )
        return dims

    def _known(self, name: str) -> Shape | None:
        return self._tensors[name].shape if name in self._tensors else None

    def guard(self, tensor: str, like: str) -> None:
        """Make an error of a `tensor` whose rows aren't those of `like`, its declared equal.

        A tensor that is declared to broadcast is left as it is. Names of axes don't count, since
        shape inference invents them.
        """
        dims, own = (self._known(name) for name in (like, tensor))
        if tensor == like or dims is None or own is None or _sizes(dims) != _sizes(own):
            return
        if (tensor, like) in self._guarded:  # another loss compares the same two tensors
            return
        self._guarded.append((tensor, like))
        nodes = self.model.graph.node
        made = {name: i for i, node in enumerate(nodes) for name in node.output}
        start = max(made.get(tensor, -1), made.get(like, -1)) + 1
        before = sum(other == tensor for other, _ in self._guarded) - 1
        prefix = f"{tensor}/{before}" if before else tensor
        guarded, shape = f"{prefix}/guarded", f"{prefix}/shape"
        added = [_node("Shape", [like], shape)]
        if sum(isinstance(dim, str) for dim in dims) > 1:
            # A Reshape looks at the number of elements alone, and takes [4, 6] for [6, 4].
            added += self._equal_or_zero(tensor, shape, prefix)
            shape = added[-1].output[0]
        zero: dict[str, Any] = {"allowzero": 1} if self._opset >= _ALLOWZERO else {}
        added.append(_node("Reshape", [tensor, shape], guarded, **zero))
        rename_uses(nodes[start:], tensor, guarded)
        for node in reversed(added):
            nodes.insert(start, node)

    @staticmethod
    def _equal_or_zero(tensor: str, shape: str, prefix: str) -> list[onnx.NodeProto]:
        """Nodes for `shape` where `tensor` has it too, else for zeros, which no element fits."""
        own, equal, number, every, wanted = (
            f"{prefix}/{what}" for what in ("own", "equal", "number", "every", "wanted")
        )
        return [
            _node("Shape", [tensor], own),
            _node("Equal", [own, shape], equal),
            _node("Cast", [equal], number, to=TensorProto.INT64),
            _node("ReduceMin", [number], every, keepdims=1),
            _node("Mul", [shape, every], wanted),
        ]

    def widen_input(self, value: onnx.ValueInfoProto) -> None:
        """Have an input of rank 0 take a tensor of the shape [1]."""
        scalar, axes = f"{value.name}/scalar", self._axes(value.name, 0)
        rename_uses(self.model.graph.node, value.name, scalar)
        self.model.graph.node.insert(0, _node("Squeeze", [value.name, axes], scalar))
        restate(value, [1])

    def widen_output(self, value: onnx.ValueInfoProto, dims: Shape) -> None:
        """Give an output of rank 0 in the shape [1], and one of [N] in [N, 1]."""
        narrow, axes = f"{value.name}/narrow", self._axes(value.name, len(dims))
        nodes = self.model.graph.node
        rename(nodes, value.name, narrow)
        # A node may be called after its output; two nodes of one name are refused.
        for node in nodes:
            if node.name == value.name:  # another name may be no UTF-8, which can't be written
                node.name = narrow
        nodes.append(_node("Unsqueeze", [narrow, axes], value.name))
        restate(value, [*dims, 1])

    def _axes(self, name: str, axis: int) -> str:
        tensor = helper.make_tensor(f"{name}/served_axes", TensorProto.INT64, [1], [axis])
        self.model.graph.initializer.append(tensor)
        return str(tensor.name)


def _node(operator: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    """A node that is called after its one output."""
    return helper.make_node(operator, inputs, [output], name=output, **attributes)


def _sizes(dims: Shape) -> list[int]:
    return [-1 if isinstance(dim, str) else dim for dim in dims]
