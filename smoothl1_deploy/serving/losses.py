"""The losses that a model says it computes, and whether they let requests share a batch."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from ..graph.metadata import read_spec
from ..model import Loss, read_attached
from .ports import ModelPorts

__all__ = ["read_losses", "why_unbatched"]


def read_losses(model: onnx.ModelProto) -> tuple[Loss, ...]:
    """The losses that `model` says it computes: its spec's, or those that were attached.

    Raises:
        ArtefactError: when the metadata are damaged.
    """
    spec = read_spec(model)
    return read_attached(model) if spec is None else (Loss.of(spec),)


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
