"""A trained autoencoder and its Smooth L1 reconstruction error, from PyTorch to ONNX Runtime.

Trains on scikit-learn's bundled digits (a few seconds on a CPU), then exports two artefacts:

* `digits_loss.onnx`: the loss alone, `LossSpec(beta, reduction="none")`;
* `digits_scorer.onnx`: autoencoder and loss in one graph, one score a digit, by `attach`.

Both run under ONNX Runtime on held-out digits and on the same digits with their pixels
shuffled, and every number is held against PyTorch's.

    python examples/digits_autoencoder.py [output folder]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn

from smoothl1_deploy import LossSpec, SmoothL1Loss, attach, export, load, verify
from smoothl1_deploy.floats import ulp_distance

BETA = 0.1  # in units of a pixel, which is 0 (paper) to 1 (ink)


class Autoencoder(nn.Sequential):
    """64 pixels through a bottleneck of 16."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16), nn.ReLU(),
            nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 64),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the example found.

    Attributes:
        auc: how well the score tells digits from shuffled ones (0.5: not at all, 1: always).
        loss_ulp: largest distance between exported and PyTorch's loss of the same reconstruction.
        score_error: largest relative difference of the scores of the whole exported graph, whose
            matrix products ONNX Runtime adds up in another order than PyTorch.
    """

    auc: float
    loss_ulp: int
    score_error: float
    files: tuple[Path, ...]


def train(digits: torch.Tensor, epochs: int = 60) -> Autoencoder:
    """Fit an autoencoder to `digits` [N, 64] with the loss that is deployed later."""
    torch.manual_seed(0)
    model = Autoencoder()
    loss = SmoothL1Loss(beta=BETA)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in digits[torch.randperm(len(digits))].split(64):
            optimizer.zero_grad()
            loss(model(batch), batch).backward()
            optimizer.step()
    return model.eval()


def main(folder: Path) -> Outcome:
    """Train, export, run, compare."""
    pixels = (load_digits().data / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(pixels))
    training, held_out = pixels[order[:1300]], pixels[order[1300:]]
    shuffled = np.random.default_rng(1).permuted(held_out, axis=1)
    autoencoder = train(torch.from_numpy(training))
    loss = SmoothL1Loss(reduction="none", beta=BETA)

    folder.mkdir(parents=True, exist_ok=True)
    loss_file, scorer_file = folder / "digits_loss.onnx", folder / "digits_scorer.onnx"
    onnx.save(export(LossSpec.from_module(loss), shape=("N", 64)), loss_file)
    program = torch.onnx.export(
        autoencoder, (torch.from_numpy(held_out),),
        input_names=["digits"], output_names=["reconstruction"],
        dynamic_shapes=({0: torch.export.Dim("N")},), dynamo=True, verbose=False,
    )  # fmt: skip
    assert program is not None
    per_digit = LossSpec(BETA, "mean", per_sample=True)
    scorer = attach(program.model_proto, "reconstruction", "digits", per_digit, loss_name="score")
    onnx.save(scorer, scorer_file)

    with torch.no_grad():
        reconstruction = autoencoder(torch.from_numpy(held_out))
        eager_loss = loss(reconstruction, torch.from_numpy(held_out)).numpy()
        eager_scores = eager_loss.mean(axis=1)
    assert verify(loss_file), "the exported loss differs from PyTorch's"
    exported_loss = load(loss_file).run(reconstruction, held_out)["loss"]

    session = ort.InferenceSession(scorer_file, providers=["CPUExecutionProvider"])
    scores = session.run(["score"], {"digits": held_out})[0]
    shuffled_scores = session.run(["score"], {"digits": shuffled})[0]
    truth = np.repeat([0, 1], [len(scores), len(shuffled_scores)])
    return Outcome(
        auc=float(roc_auc_score(truth, np.concatenate([scores, shuffled_scores]))),
        loss_ulp=int(ulp_distance(exported_loss, eager_loss).max()),
        score_error=float(np.max(np.abs(scores - eager_scores) / eager_scores)),
        files=(loss_file, scorer_file),
    )


if __name__ == "__main__":
    outcome = main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/examples"))
    print(f"digits against shuffled digits: ROC AUC {outcome.auc:.4f}")
    print(f"loss of the same reconstruction: {outcome.loss_ulp} ULP from PyTorch at most")
    print(f"scores of the whole graph: relative difference to PyTorch {outcome.score_error:.1e}")
    print("wrote", *outcome.files)
