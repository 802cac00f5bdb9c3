"""What `models/` holds: a Triton model repository of five losses, and of digits that are scored.

The models and their configs are reproducible byte for byte. A certificate is not, since it says
when and where the file was verified; it names the file by its sha256 instead.

    scripts/export_models [output folder]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import onnx

from smoothl1_deploy import LossSpec, attach
from smoothl1_deploy.serving import (
    ServedModel,
    certify_model,
    write_loss,
    write_model,
)

#: A trained autoencoder, `digits` to `reconstruction`.
SOURCE = Path(__file__).with_name("digits_autoencoder.onnx")

#: Name -> spec of the losses of their own, for rows of 16 features.
LOSSES = {
    "smooth_l1_none": LossSpec(reduction="none"),
    "smooth_l1_mean": LossSpec(reduction="mean"),
    "smooth_l1_sum": LossSpec(reduction="sum"),
    "smooth_l1_per_sample": LossSpec(reduction="mean", per_sample=True),
    "smooth_l1_mean_runtime_beta": LossSpec(reduction="mean", runtime_beta=True),
}

#: Name of the model that scores digits, [N, 64] to [N, 1].
AUTOENCODER = "digits_autoencoder"

_SCORE = LossSpec(0.1, "mean", per_sample=True)  # beta in units of a pixel, 0 to 1


def write_catalogue(folder: str | os.PathLike[str]) -> list[ServedModel]:
    """Write every model of the catalogue into a repository, those that are there already anew."""
    written: list[ServedModel] = []
    for name, spec in LOSSES.items():
        written += write_loss(folder, spec, ("N", 16), name=name, overwrite=True)
    scorer = attach(
        onnx.load(SOURCE),
        "reconstruction",
        "digits",
        _SCORE,
        loss_name="score",
        only_loss=True,
        route="inlined",
    )
    written += write_model(folder, scorer, name=AUTOENCODER, overwrite=True)
    return written


if __name__ == "__main__":
    for model in write_catalogue(*sys.argv[1:]):
        print(f"wrote {model.folder}")
        found, certificate = certify_model(model.file)
        assert found, f"{model.file} is wrong: see {certificate}"
        print(f"wrote {certificate}")
