"""What `models/` holds: the served catalogue, made anew by scripts/export_models.

The models and their configs are reproducible byte for byte. A certificate is not, since it says
when and where the file was verified; it names the file by its sha256 instead.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..artefact import read_model, sha256
from ..graph.attach import attach
from ..parity.certificate import certify
from ..parity.verify import verify
from ..spec import LossSpec
from .loss_part import loss_part
from .repository import ServedModel, write_loss, write_model
from .served_graph import read_losses

__all__ = ["AUTOENCODER", "LOSSES", "certify_model", "write_catalogue"]

#: Name -> spec of the losses of their own, for rows of 16 features.
LOSSES: Mapping[str, LossSpec] = {
    "smooth_l1_none": LossSpec(reduction="none"),
    "smooth_l1_mean": LossSpec(reduction="mean"),
    "smooth_l1_sum": LossSpec(reduction="sum"),
    "smooth_l1_per_sample": LossSpec(reduction="mean", per_sample=True),
    "smooth_l1_mean_runtime_beta": LossSpec(reduction="mean", runtime_beta=True),
}

#: Name of the model that scores digits, [N, 64] to [N, 1].
AUTOENCODER = "digits_autoencoder"

_SCORE = LossSpec(0.1, "mean", per_sample=True)  # beta in units of a pixel, 0 to 1


def write_catalogue(
    folder: str | os.PathLike[str], autoencoder: str | os.PathLike[str]
) -> tuple[ServedModel, ...]:
    """Write every model of the catalogue, those that are there already anew.

    Args:
        folder: the repository.
        autoencoder: ONNX file of a trained autoencoder, `digits` to `reconstruction`.
    """
    written: list[ServedModel] = []
    for name, spec in LOSSES.items():
        written += write_loss(folder, spec, ("N", 16), name=name, overwrite=True)
    scorer = attach(
        read_model(autoencoder),
        "reconstruction",
        "digits",
        _SCORE,
        loss_name="score",
        only_loss=True,
        route="inlined",
    )
    written += write_model(folder, scorer, name=AUTOENCODER, overwrite=True)
    return tuple(written)


def certify_model(path: str | os.PathLike[str], *, drift: bool = True) -> Path:
    """Verify a served model and write its certificate beside it.

    Of a model with a loss attached, the loss is verified, from prediction and target to its
    output: what the rest of the model computes, nothing here can judge.

    Raises:
        ArtefactError: when the file is no model with a loss.
        MissingDependencyError: without torch or ONNX Runtime.
    """
    model = read_model(path)
    (loss,) = read_losses(model)
    part = loss_part(model, loss)
    found = verify(part, drift=drift)
    if part is not model:
        name = f"{model.graph.name}: the loss {loss.outputs['loss']}"
        digest = sha256(model.SerializeToString(deterministic=True))
        found = replace(found, name=name, sha256=digest)
    return certify(found, path)
