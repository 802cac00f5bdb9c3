"""`torch`: PyTorch eager on the CPU, from the spec that the artefact carries."""

from __future__ import annotations

import onnx

from .._floats import Array
from ..errors import require
from ._base import Backend
from ._runner import Runner


class TorchRunner(Runner):
    """Runs what the artefact says it computes, not its graph: the contract to compare with."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        self._check_exported("torch", "ort-cpu")

    def _execute(self, feeds: dict[str, Array], shape: tuple[int, ...]) -> dict[str, Array]:
        from ..reference._module import eager_outputs

        assert self.spec is not None
        if "beta" in feeds:
            feeds["beta"] = feeds["beta"].reshape(())  # [1] in a served graph
        return eager_outputs(self.spec, **feeds)


class TorchBackend(Backend):
    """PyTorch eager."""

    name = "torch"
    accumulator = None

    def __init__(self) -> None:
        require("torch", "torch", "the torch backend")

    def load(self, model: onnx.ModelProto) -> Runner:
        """Read the spec that `model` carries."""
        return TorchRunner(model)
