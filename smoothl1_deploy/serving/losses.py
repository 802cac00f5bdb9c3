"""The losses that a model says it computes, and whether they let requests share a batch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx

from ..errors import ArtefactError
from ..graph.attach import ATTACHED
from ..graph.metadata import read_spec
from ..spec import LossSpec
from .ports import ModelPorts

__all__ = ["Loss", "read_losses", "why_unbatched"]


@dataclass(frozen=True, slots=True)
class Loss:
    """One loss of a graph: its spec, and the tensor that plays each role."""

    spec: LossSpec
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    @classmethod
    def of(cls, spec: LossSpec) -> Loss:
        """That of an artefact, whose tensors are called what the spec calls them."""
        return cls(spec, {name: name for name in spec.inputs}, {n: n for n in spec.outputs})


def read_losses(model: onnx.ModelProto) -> tuple[Loss, ...]:
    """The losses that `model` says it computes: its spec's, or those that were attached.

    Raises:
        ArtefactError: when the metadata are damaged.
    """
    spec = read_spec(model)
    if spec is not None:
        return (Loss.of(spec),)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    try:
        return tuple(
            Loss(LossSpec.from_dict(loss["spec"]), loss["inputs"], loss["outputs"])
            for loss in json.loads(properties.get(ATTACHED, "[]"))
        )
    except (ValueError, TypeError, KeyError) as exc:
        raise ArtefactError(
            f"the model's metadata entry {ATTACHED} is damaged ({exc}); attach the loss again"
        ) from exc


def why_unbatched(losses: Iterable[Loss], ports: ModelPorts) -> str | None:
    """Why the rows of two requests must not go into one batch; None where they may."""
    for loss in losses:
        spec = loss.spec
        if spec.reduction != "none" and not spec.per_sample:
            return (
                f"{loss.outputs['loss']} is a {spec.reduction} over all rows of a batch: requests "
                "of different callers would be mixed into one number"
            )
        if spec.runtime_beta:
            return "beta is one number for a whole batch, and two requests may differ in it"
    for kind, given in (("input", ports.inputs), ("output", ports.outputs)):
        for port in given:
            if port.dims is None:
                continue
            if not port.dims or port.dims[0] != -1:
                return f"the {kind} {port.name} has no axis of rows"
    return None
