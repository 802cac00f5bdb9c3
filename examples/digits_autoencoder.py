"""A trained autoencoder and its Smooth L1 reconstruction error, from PyTorch to ONNX Runtime.

Trains on scikit-learn's bundled digits (a few seconds on a CPU), then exports three models:

* `digits_autoencoder.onnx`: the autoencoder alone; one such file, trained once, lies beside this
  one, because another machine trains other weights, and models/ is made of it byte for byte;
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
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn

from smoothl1_deploy import LossSpec, SmoothL1Loss, attach, export, load, verify

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


def as_onnx(model: Autoencoder) -> onnx.ModelProto:
    """`digits` float32 [N, 64] to `reconstruction`; the same weights give the same bytes."""
    nodes, weights, tensor = [], [], "digits"
    for i, layer in enumerate(model):
        inputs, output = [tensor], "reconstruction" if i == len(model) - 1 else f"hidden_{i}"
        for name, parameter in layer.named_parameters():
            inputs.append(f"{i}.{name}")
            weights.append(numpy_helper.from_array(parameter.detach().numpy(), inputs[-1]))
        linear = isinstance(layer, nn.Linear)
        kind, options = ("Gemm", {"transB": 1}) if linear else ("Relu", {})
        nodes.append(helper.make_node(kind, inputs, [output], name=output, **options))
        tensor = output
    digits, reconstruction = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 64])
        for name in ("digits", tensor)
    )
    graph = helper.make_graph(nodes, "digits_autoencoder", [digits], [reconstruction], weights)
    opset = helper.make_opsetid("", 18)
    exported = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    onnx.checker.check_model(exported, full_check=True)
    return exported


def main(folder: Path) -> Outcome:
    """Train, export, run, compare."""
    pixels = (load_digits().data / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(pixels))
    training, held_out = pixels[order[:1300]], pixels[order[1300:]]
    shuffled = np.random.default_rng(1).permuted(held_out, axis=1)
    autoencoder = train(torch.from_numpy(training))
    loss = SmoothL1Loss(reduction="none", beta=BETA)

    folder.mkdir(parents=True, exist_ok=True)
    names = ("digits_autoencoder.onnx", "digits_loss.onnx", "digits_scorer.onnx")
    autoencoder_file, loss_file, scorer_file = (folder / name for name in names)
    exported = as_onnx(autoencoder)
    onnx.save(exported, autoencoder_file)
    onnx.save(export(LossSpec.from_module(loss), shape=("N", 64)), loss_file)
    per_digit = LossSpec(BETA, "mean", per_sample=True)
    scorer = attach(exported, "reconstruction", "digits", per_digit, loss_name="score")
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
        loss_ulp=int(np.max(np.abs(exported_loss - eager_loss) / np.spacing(eager_loss))),
        score_error=float(np.max(np.abs(scores - eager_scores) / eager_scores)),
        files=(autoencoder_file, loss_file, scorer_file),
    )


if __name__ == "__main__":
    outcome = main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/examples"))
    print(f"digits against shuffled digits: ROC AUC {outcome.auc:.4f}")
    print(f"loss of the same reconstruction: {outcome.loss_ulp} ULP from PyTorch at most")
    print(f"scores of the whole graph: relative difference to PyTorch {outcome.score_error:.1e}")
    print("wrote", *outcome.files)
