"""`halved`: a model with losses attached, its own nodes in float16, for `build --fp16`.

TensorRT for RTX, and TensorRT from 11.0 on, take the types of a network from the graph: there is no
flag that builds float32 nodes in float16. So the graph is converted before, all but the losses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import LiftConstantsToInitializersPass, TopologicalSortPass

from .._artefact import sha256
from .._model import Loss, inlined, main_tensors, read_attached
from ..errors import ArtefactError, SpecError, UnsupportedError, is_shortage, require
from ..graph._attach import prune, rename_uses
from ..graph._metadata import read_spec
from ._parse import serialized

_CONVERTER = "onnxruntime.transformers.float16"
PRECISIONS = ("float16", "bfloat16")


def halved(model: onnx.ModelProto, precision: str) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """`model` with its own nodes in float16, and the notes on that, each a sentence.

    Inputs and outputs keep their types, and so does every tensor that a loss reads: the prediction
    is cast to float32 once more. The nodes of the losses, and their constants, are not touched.

    Raises:
        SpecError: for a loss alone, whose precision is its spec's dtype; for a model in which
            nothing is known to be a loss, or is float32; for bfloat16.
        UnsupportedError: where the converter makes no valid model.
        MissingDependencyError: without onnxruntime, which has the converter.
    """
    losses = read_attached(model)
    _check(model, losses, precision)
    own, of_loss = _split(model.graph, losses)
    host = _host(model, losses, own, of_loss)
    if all(tensor.element != TensorProto.FLOAT for tensor in main_tensors(host).values()):
        raise SpecError(
            "nothing of the model but its losses is float32, so there is nothing to put in "
            f"{precision}; build it as it is"
        )
    converter = require(_CONVERTER, "cpu", "the conversion to float16")
    by = f"{_CONVERTER} ({require('onnxruntime', 'cpu', 'the conversion').__version__})"
    names = ", ".join(loss.outputs["loss"] for loss in losses)
    notes = [
        f"the model's own nodes were put in float16 by {by}; the model had the sha256 "
        f"{sha256(serialized(model))}, and its losses ({names}) are computed as they were attached"
    ]
    # The converter knows of no constant but a tensor, and puts its casts behind who reads them.
    lift = LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
    try:
        host = ir.to_proto(lift(ir.from_proto(host)).model)
        converted = ir.from_proto(converter.convert_float_to_float16(host, keep_io_types=True))
        graph = ir.to_proto(TopologicalSortPass()(converted).model).graph
        whole = _joined(model, host, graph, of_loss)
        onnx.checker.check_model(whole, full_check=True)
    except Exception as exc:  # of whatever class: the model is anyone's, and so is the converter
        if is_shortage(exc):
            raise
        raise UnsupportedError(
            f"{by} makes no valid model of this one ({exc}); export the model in float16 and "
            "attach the loss to that file"
        ) from exc
    if clipped := [*_clipped(host.graph, graph)]:
        notes.append(f"constants beyond the range of float16 became +-65504: {', '.join(clipped)}")
    return whole, tuple(notes)


def _check(model: onnx.ModelProto, losses: tuple[Loss, ...], precision: str) -> None:
    """Refuse what has its precision from elsewhere, or where nobody knows what must not be half."""
    if precision not in PRECISIONS:
        raise SpecError(f"unknown precision {precision!r}; choose {' or '.join(PRECISIONS)}")
    spec = read_spec(model)
    if spec is not None:
        remedy = (
            "build it as it is"
            if spec.dtype == precision
            else f"type smoothl1-deploy export --dtype {precision} with the rest of its options "
            f"({precision} inputs, computed in float32 and rounded once), and build that"
        )
        raise SpecError(
            f"the precision of a loss alone is the dtype of its spec, here {spec.dtype}; {remedy}"
        )
    if not losses:
        raise SpecError(
            f"the model says of no node that it is a loss, which {precision} would ruin; convert "
            f"it yourself ({_CONVERTER}) and build that file, or attach the loss first: "
            "smoothl1-deploy attach"
        )
    if precision == "bfloat16":
        raise SpecError(
            "no converter here writes bfloat16 into a finished model; export the model in it "
            "(module.bfloat16(), and torch.onnx.export with opset_version=22), attach the loss to "
            "that file and build it as it is"
        )


def _split(
    graph: onnx.GraphProto, losses: tuple[Loss, ...]
) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """The nodes of the model, and those between what its losses read and what they give."""
    maker = {name: i for i, node in enumerate(graph.node) for name in node.output}
    given = {name for loss in losses for name in loss.inputs.values()}
    wanted = [name for loss in losses for name in loss.outputs.values()]
    found: set[int] = set()
    while wanted:
        place = maker.get(wanted.pop())
        if place is not None and place not in found:
            found.add(place)
            wanted += [name for name in graph.node[place].input if name not in given]
    own = [node for i, node in enumerate(graph.node) if i not in found]
    return own, [graph.node[i] for i in sorted(found)]


def _host(
    model: onnx.ModelProto,
    losses: tuple[Loss, ...],
    own: list[onnx.NodeProto],
    of_loss: list[onnx.NodeProto],
) -> onnx.ModelProto:
    """The model without its losses; what they read of its nodes is an output."""
    made = {name for node in own for name in node.output}
    outputs = {value.name: value for value in model.graph.output if value.name in made}
    known = main_tensors(model)
    for name in [name for loss in losses for name in loss.inputs.values() if name in made]:
        tensor = known.get(name)
        if tensor is None or not tensor.element:
            raise ArtefactError(f"the type of {name!r}, which a loss reads, can't be inferred")
        value = helper.make_tensor_value_info(name, tensor.element, tensor.shape)
        outputs.setdefault(name, value)
    host = _changed(model, node=own, output=outputs.values(), value_info=())
    prune(host.graph)
    read = {name for node in of_loss for name in node.input}
    for constant in host.graph.initializer:
        if constant.name in read:  # the loss keeps its own, in float32
            name = f"{constant.name}/of_the_model"
            rename_uses(host.graph.node, constant.name, name)
            constant.name = name
    return inlined(host)  # the converter looks into no function


def _changed(model: onnx.ModelProto, **fields: Iterable[Any]) -> onnx.ModelProto:
    """A copy of the model, these fields of its graph with other content."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for name, content in fields.items():
        copy.graph.ClearField(name)
        getattr(copy.graph, name).extend(content)
    return copy


def _clipped(host: onnx.GraphProto, converted: onnx.GraphProto) -> Iterator[str]:
    """The constants in float16 of which a finite number was beyond its range."""
    narrow = {t.name for t in converted.initializer if t.data_type == TensorProto.FLOAT16}
    for tensor in host.initializer:
        if tensor.name in narrow and tensor.data_type == TensorProto.FLOAT:
            values = np.abs(numpy_helper.to_array(tensor))
            if np.any((values > np.finfo(np.float16).max) & np.isfinite(values)):
                yield tensor.name


def _joined(
    model: onnx.ModelProto,
    host: onnx.ModelProto,
    converted: onnx.GraphProto,
    of_loss: list[onnx.NodeProto],
) -> onnx.ModelProto:
    """The converted nodes, then those of the losses, with the ports and metadata of `model`."""
    read = {name for node in of_loss for name in node.input}
    of_losses = (tensor for tensor in model.graph.initializer if tensor.name in read)
    nodes, constants = [*converted.node, *of_loss], [*converted.initializer, *of_losses]
    whole = _changed(model, node=nodes, initializer=constants, value_info=())
    domains = {entry.domain for entry in whole.opset_import}
    whole.opset_import.extend(e for e in host.opset_import if e.domain not in domains)
    return whole
