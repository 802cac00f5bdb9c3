"""`torch` and `torch-cuda`: PyTorch eager, from the spec that the artefact carries.

They run what an artefact says it computes, not its graph: on the CPU the contract that the others
are compared with, on a GPU a further reference. Where PyTorch's CUDA kernel differs from the CPU's
(its half formats, its gradient): docs/tensorrt.md.
"""

from __future__ import annotations

from typing import Any

import onnx

from .._device import Device
from .._floats import Array
from ..errors import require
from ._base import Backend
from ._gpu import Compute, GpuBackend, GpuRunner
from ._runner import Runner


class TorchRunner(Runner):
    """PyTorch eager on the CPU."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        self._check_exported("torch", "ort-cpu")

    def _execute(self, feeds: dict[str, Array], shape: tuple[int, ...]) -> dict[str, Array]:
        from ..reference._module import eager_outputs

        assert self.spec is not None
        if "beta" in feeds:
            feeds["beta"] = feeds["beta"].reshape(self.spec.beta_shape)  # [1] in a served graph
        return eager_outputs(self.spec, **feeds)


class TorchBackend(Backend):
    """PyTorch eager on the CPU."""

    name = "torch"
    accumulator = None
    of_the_spec = True
    large = False

    def __init__(self) -> None:
        require("torch", "torch", "the torch backend")

    def load(self, model: onnx.ModelProto) -> Runner:
        """Read the spec that `model` carries."""
        return TorchRunner(model)


class TorchCudaRunner(GpuRunner):
    """PyTorch eager on the GPU."""

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
    of_the_spec = True

    def load(self, model: onnx.ModelProto) -> TorchCudaRunner:
        """Read the spec that `model` carries."""
        return TorchCudaRunner(model, self._device)
