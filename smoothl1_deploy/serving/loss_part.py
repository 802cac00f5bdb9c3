"""The loss inside a served model, cut out as an artefact that `load` and `verify` understand."""

from __future__ import annotations

import onnx
import onnx.utils

from ..errors import ArtefactError
from ..graph.metadata import read_spec, stamp
from ..model import MODEL_ERRORS, Loss, main_tensors
from .served_graph import rename_uses

__all__ = ["loss_part"]


def loss_part(model: onnx.ModelProto, loss: Loss) -> onnx.ModelProto:
    """The part of a served graph from prediction and target to the loss, as an artefact.

    An artefact of its own comes back as it is.

    Raises:
        ArtefactError: when the metadata name tensors that the model doesn't have.
    """
    if read_spec(model) is not None:
        return model
    names = [loss.inputs[role] for role in loss.spec.inputs]
    try:
        part = onnx.utils.Extractor(_typed(model)).extract_model(names, list(loss.outputs.values()))
        del part.graph.value_info[:]
        for role, tensor in {**loss.inputs, **loss.outputs}.items():
            for node in part.graph.node:
                for i, name in enumerate(node.output):
                    if name == tensor:  # others may be no UTF-8, which can't be written
                        node.output[i] = role
            rename_uses(part.graph.node, tensor, role)
            for value in (*part.graph.input, *part.graph.output):
                if value.name == tensor:
                    value.name = role
        onnx.checker.check_model(part, full_check=True)
    except (*MODEL_ERRORS, ValueError) as exc:
        raise ArtefactError(
            f"the loss that the metadata tell of can't be cut out of the model: {exc}"
        ) from exc
    stamp(part, loss.spec, "attached", "served", served=True)
    return part


def _typed(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every tensor is declared: any of them may become an input."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    copy.graph.value_info.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.element, tensor.shape)
        for tensor in main_tensors(model).values()
        if tensor.element
    )
    return copy
