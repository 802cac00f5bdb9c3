"""A forecast of scikit-learn, exported by skl2onnx, that also gives its own loss.

A gradient-boosted forecast of how diabetes progresses (scikit-learn's bundled data) becomes ONNX
by skl2onnx. Two attachments later the same file gives the forecast, bit for bit, the Smooth L1
loss of every patient, and the mean over the batch with an outlier-proof beta: what a monitor of a
deployed model reads.

    python examples/diabetes_forecast.py [output folder]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from skl2onnx import to_onnx
from sklearn.datasets import load_diabetes
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.model_selection import train_test_split

from smoothl1_deploy import LossSpec, SmoothL1Loss, attach

BETA = 50.0  # in units of the disease's progression, which is 25 to 346


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the example found.

    Attributes:
        unchanged: the forecasts are bit for bit those of the file that skl2onnx wrote.
        mean_loss: over the held-out patients.
        difference: largest relative difference of any loss to PyTorch's.
    """

    unchanged: bool
    mean_loss: float
    difference: float
    files: tuple[Path, ...]


def main(folder: Path) -> Outcome:
    """Train, export, attach twice, run, compare."""
    features, progression = load_diabetes(return_X_y=True)
    parts = train_test_split(features, progression, test_size=0.3, random_state=0)
    training, held_out, known, truth = (part.astype(np.float32) for part in parts)
    model = GradientBoostingRegressor(loss="huber", n_estimators=60, random_state=0)
    model.fit(training, known)

    forecast = to_onnx(model, held_out[:1], target_opset={"": 18, "ai.onnx.ml": 3})
    each = attach(
        forecast, "variable", "progression", LossSpec(BETA, per_sample=True), loss_name="loss_each"
    )
    both = attach(each, "variable", "progression", LossSpec(BETA), loss_name="loss_mean")
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "diabetes_forecast.onnx", folder / "diabetes_scored.onnx"
    onnx.save(forecast, files[0])
    onnx.save(both, files[1])

    first, second = (
        ort.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in files
    )
    (before,) = first.run(None, {"X": held_out})
    feeds = {"X": held_out, "progression": truth[:, None]}
    after, losses, mean = second.run(["variable", "loss_each", "loss_mean"], feeds)
    pair = torch.from_numpy(before), torch.from_numpy(truth[:, None])
    expected = SmoothL1Loss(beta=BETA, reduction="none")(*pair).squeeze(1).numpy()
    off = np.abs(losses - expected) / expected
    return Outcome(
        unchanged=before.tobytes() == after.tobytes(),
        mean_loss=float(mean),
        difference=float(max(off.max(), abs(mean - expected.mean()) / expected.mean())),
        files=files,
    )


if __name__ == "__main__":
    outcome = main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/examples"))
    print(f"the forecast is {'as it was' if outcome.unchanged else 'another'}, bit for bit")
    print(f"mean Smooth L1 loss of the held-out patients, beta {BETA:g}: {outcome.mean_loss:.2f}")
    print(f"relative difference of the losses to PyTorch {outcome.difference:.1e}")
    print("wrote", *outcome.files)
