"""`torch-cuda`: PyTorch's own CUDA kernel, a further reference beside the one on the CPU.

Where it differs from the CPU's (its half formats, its gradient): docs/tensorrt.md.
"""

from __future__ import annotations

from typing import Any

import onnx

from .._device import Device
from ._gpu import Compute, GpuBackend, GpuRunner


class TorchCudaRunner(GpuRunner):
    """Runs what the artefact says it computes, not its graph."""

    def __init__(self, model: onnx.ModelProto, device: Device) -> None:
        super().__init__(model, device)
        self._check_exported("torch-cuda", "ort-cuda")

    def _compute(self, feeds: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        from ..reference._module import eager_tensors

        assert self.spec is not None
        return eager_tensors(self.spec, **feeds)

    def _recordable(self) -> Compute:
        return self._compute


class TorchCudaBackend(GpuBackend):
    """PyTorch eager on the GPU."""

    name = "torch-cuda"
    accumulator = None

    def load(self, model: onnx.ModelProto) -> TorchCudaRunner:
        """Read the spec that `model` carries."""
        return TorchCudaRunner(model, self._device)
