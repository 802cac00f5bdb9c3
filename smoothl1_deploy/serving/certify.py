"""Certificates of served models: of a loss of its own, or of the loss inside a larger model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ..artefact import ModelSource, read_model, sha256
from ..errors import ArtefactError
from ..model import Loss
from ..parity.certificate import certify
from ..parity.verify import Verification, verify
from .loss_part import loss_part
from .losses import read_losses

__all__ = ["certify_model", "only_loss"]


def only_loss(model: ModelSource) -> Loss:
    """The one loss of a model.

    Raises:
        ArtefactError: when it has none, or several, which one certificate can't vouch for.
    """
    losses = read_losses(read_model(model))
    if len(losses) != 1:
        raise ArtefactError(
            f"the model says of {len(losses)} losses that it computes them, and a certificate is "
            "of one; attach one loss, or leave the certificate out"
        )
    return losses[0]


def certify_model(
    path: str | os.PathLike[str], *, drift: bool = True, backend: str = "ort-cpu"
) -> tuple[Verification, Path]:
    """Verify a served model and write its certificate beside it, green or red.

    Of a model with a loss attached, the loss is verified, from prediction and target to its
    output: what the rest of the model computes, nothing here can judge.

    Raises:
        ArtefactError: when the file is no model with one loss.
        MissingDependencyError: without torch or ONNX Runtime.
    """
    model = read_model(path)
    loss = only_loss(model)
    part = loss_part(model, loss)
    found = verify(part, backend, drift=drift)
    if part is not model:
        name = f"{model.graph.name}: the loss {loss.outputs['loss']}"
        digest = sha256(model.SerializeToString(deterministic=True))
        found = replace(found, name=name, sha256=digest)
    return found, certify(found, path)
