"""A small detector head whose loss is part of the module, exported by both exporters of PyTorch.

Trains on generated boxes (seconds on a CPU): a filled rectangle in a noisy image, to be found as
four numbers. The module gives the boxes and, for every image, the weighted Smooth L1 loss that
Fast R-CNN trains on; so the exported graph can watch the loss of a deployed detector.

* `detector_dynamo.onnx`: `torch.onnx.export(dynamo=True)` with `translation_table()`;
* `detector_torchscript.onnx`: `torch.onnx.export(dynamo=False)` within
  `register_torchscript_symbolic()`.

    python examples/detector_head.py [output folder]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from smoothl1_deploy import register_torchscript_symbolic, translation_table

SIZE = 24  # pixels a side
BETA = 1 / 9  # of Fast R-CNN's and Mask R-CNN's box loss, in units of the image


class Detector(nn.Module):
    """An image to a box, and a box with its truth to a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(16 * (SIZE // 4) ** 2, 4)
        self.loss = nn.SmoothL1Loss(beta=BETA, reduction="none")

    def forward(
        self, image: torch.Tensor, truth: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`image` [N, 1, 24, 24] and `truth` [N, 4] (left, top, right, bottom, 0 to 1).

        Gives boxes [N, 4] and losses [N].
        """
        boxes = self.head(self.features(image)).sigmoid()
        return boxes, self.loss(boxes, truth).sum(dim=1)


def generated(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of one bright rectangle each, and the rectangles."""
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.integers(0, SIZE + 1, (count, 2, 2)), axis=1)
    corners[:, 1] = np.maximum(corners[:, 1], corners[:, 0] + 1)
    images = rng.normal(0, 0.1, (count, 1, SIZE, SIZE))
    for image, ((left, top), (right, bottom)) in zip(images, corners, strict=True):
        image[0, top:bottom, left:right] += 1
    boxes = corners.reshape(count, 4) / SIZE
    return torch.tensor(images, dtype=torch.float32), torch.tensor(boxes, dtype=torch.float32)


def train(steps: int = 150) -> Detector:
    """A detector that finds most of a rectangle."""
    torch.manual_seed(0)
    detector = Detector()
    optimizer = torch.optim.Adam(detector.parameters(), lr=3e-3)
    images, truth = generated(1024, seed=0)
    for step in range(steps):
        batch = torch.arange(64) + 64 * (step % 16)
        optimizer.zero_grad()
        detector(images[batch], truth[batch])[1].mean().backward()
        optimizer.step()
    return detector.eval()


def overlap(boxes: torch.Tensor, truth: torch.Tensor) -> float:
    """The mean intersection over union."""
    low = torch.maximum(boxes[:, :2], truth[:, :2])
    high = torch.minimum(boxes[:, 2:], truth[:, 2:])
    shared = (high - low).clamp(min=0).prod(dim=1)
    areas = [(b[:, 2:] - b[:, :2]).clamp(min=0).prod(dim=1) for b in (boxes, truth)]
    return float((shared / (areas[0] + areas[1] - shared)).mean())


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the example found.

    Attributes:
        overlap: mean intersection over union on held-out images.
        differences: exporter -> largest relative difference of the losses to PyTorch's.
    """

    overlap: float
    differences: dict[str, float]
    files: tuple[Path, ...]


def main(folder: Path) -> Outcome:
    """Train, export twice, run, compare."""
    detector = train()
    images, truth = generated(200, seed=1)
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "detector_dynamo.onnx", folder / "detector_torchscript.onnx"
    names = {"input_names": ["image", "truth"], "output_names": ["boxes", "loss"]}

    rows = torch.export.Dim("N")
    torch.onnx.export(
        detector, (images, truth), files[0], **names, dynamic_shapes=({0: rows}, {0: rows}),
        custom_translation_table=translation_table(),
        dynamo=True, external_data=False, verbose=False,
    )  # fmt: skip
    with register_torchscript_symbolic():
        torch.onnx.export(
            detector, (images, truth), files[1], **names, opset_version=17, dynamo=False,
            dynamic_axes={name: {0: "N"} for name in ("image", "truth", "boxes", "loss")},
        )  # fmt: skip

    with torch.no_grad():
        boxes, losses = detector(images, truth)
    differences = {}
    for exporter, path in zip(("dynamo", "torchscript"), files, strict=True):
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        (got,) = session.run(["loss"], {"image": images.numpy(), "truth": truth.numpy()})
        differences[exporter] = float(np.max(np.abs(got - losses.numpy()) / losses.numpy()))
    return Outcome(overlap(boxes, truth), differences, files)


if __name__ == "__main__":
    outcome = main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/examples"))
    print(f"held-out boxes: mean intersection over union {outcome.overlap:.3f}")
    for name, difference in outcome.differences.items():
        print(f"losses of the graph by {name}: relative difference to PyTorch {difference:.1e}")
    print("wrote", *outcome.files)
