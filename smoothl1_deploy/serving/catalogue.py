"""What `models/` holds: the served catalogue, made anew by scripts/export_models.

The models and their configs are reproducible byte for byte. A certificate is not, since it says
when and where the file was verified; it names the file by its sha256 instead.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..artefact import read_model
from ..graph.attach import attach
from ..spec import LossSpec
from .repository import ServedModel, write_loss, write_model

__all__ = ["AUTOENCODER", "LOSSES", "write_catalogue"]

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
