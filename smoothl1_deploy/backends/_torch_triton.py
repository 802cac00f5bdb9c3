"""`torch-triton`: a fused kernel of OpenAI's Triton, the compiler, on torch tensors.

It computes what the artefact says it computes, and not its graph: the fastest honest path on a GPU
where no engine is built. `Triton` here is not the inference server of that name (`triton-http`).

With TRITON_INTERPRET=1 in the environment before Python starts, Triton interprets the kernels on
the CPU, some milliseconds a tile: the numbers can be checked where there is no GPU.
"""

from __future__ import annotations

import importlib
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import numpy as np
import onnx

from .._device import Device, find_device
from .._spec import COMPUTE_DTYPE, LossSpec
from ..errors import BackendUnavailableError, UnsupportedError, require
from ._gpu import Compute, GpuBackend, GpuRunner
from ._runner import REMEMBERED

#: The first whose `div_rn` is IEEE's: it compiled to `div.rn.ftz` in 3.2, 3.4 and 3.5.1 (not in
#: 3.6.0, 3.7.1 and 3.9.0), and a subnormal over a subnormal beta was 0 / 0.
_OLDEST = (3, 6)

_ALIGNED = 16  # bytes; Triton compiles a kernel of its own for addresses that aren't multiples


class InterpretedDevice(Device):
    """The host, with Triton's interpreter in the place of a GPU."""

    kind = "cpu"

    @property
    def name(self) -> str:
        """What it is, for reports."""
        return "the CPU, interpreted (TRITON_INTERPRET=1)"

    @contextmanager
    def selected(self) -> Iterator[None]:
        """One thread at a time: the interpreter patches its own module while it works."""
        with _interpreting, np.errstate(all="ignore"):
            yield


_interpreting = threading.Lock()


class TorchTritonRunner(GpuRunner):
    """Runs what the artefact says it computes, not its graph."""

    def __init__(self, model: onnx.ModelProto, device: Device, fused: ModuleType) -> None:
        super().__init__(model, device)
        self._check_exported("torch-triton", "ort-cuda")
        assert self.spec is not None
        if reason := _refusal(self.spec):
            raise UnsupportedError(reason)
        self._prepare = partial(_prepare, fused, self.spec)
        self._remembered = lru_cache(REMEMBERED)(self._prepare)
        # On the device from the start: no call has to wait for it, and a CUDA graph may read it.
        beta, dtype = self.spec.effective_beta, COMPUTE_DTYPE[self.spec.dtype]
        self._beta = None if self.spec.runtime_beta else device.filled(beta, dtype)

    def _compute(self, feeds: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        input, target = feeds["input"], feeds["target"]
        if not input.shape == target.shape == shape:
            input, target = (each.expand(shape).contiguous() for each in (input, target))
        # Which kernel a launch has compiled must not change; memory of torch's own is aligned.
        aligned = (input.data_ptr() | target.data_ptr()) % _ALIGNED == 0
        launch, out = (self._remembered if aligned else self._prepare)(shape)
        loss = self.device.empty_beside(input, out)
        partial = self.device.empty((launch.scratch,), "float64") if launch.scratch else None
        with self.device.selected():
            launch(input, target, feeds.get("beta", self._beta), loss, partial)
        return {"loss": loss}

    def _recordable(self) -> Compute:
        return self._compute


def _prepare(
    fused: ModuleType, spec: LossSpec, shape: tuple[int, ...]
) -> tuple[Any, tuple[int, ...]]:
    """`fused.Losses` or `fused.Rows` for arrays of a shape, and the shape of their loss."""
    shape = tuple(shape)
    beta = None if spec.runtime_beta else spec.effective_beta
    if spec.reduction == "none":
        return fused.Losses(math.prod(shape), spec.dtype, beta), shape
    rows = shape[0] if spec.per_sample else 1
    how = fused.plan(rows, math.prod(shape[1:] if spec.per_sample else shape))
    launch = fused.Rows(how, spec.dtype, beta, mean=spec.reduction == "mean")
    return launch, spec.loss_shape(shape)


def _refusal(spec: LossSpec) -> str | None:
    if spec.gradient:
        return "the fused kernel of torch-triton computes the loss, and no gradient"
    plain = LossSpec(
        spec.beta, spec.reduction, spec.dtype, spec.per_sample, runtime_beta=spec.runtime_beta
    )
    if spec != plain or spec.beta_shape:
        return (
            "the fused kernel of torch-triton takes one beta and no weight, mask or divisor, and "
            "knows neither Huber's loss nor a constant factor"
        )
    return None


class TorchTritonBackend(GpuBackend):
    """The fused kernel, on the GPU, or interpreted where TRITON_INTERPRET is set.

    Raises:
        MissingDependencyError: when torch or triton is not installed.
        BackendUnavailableError: when triton is too old; without a GPU, when the kernels aren't
            interpreted.
    """

    name = "torch-triton"
    # The operations of the graphs, and sums as exact: what is proved of those holds here. Four
    # half losses added in float32 move the bound by 2^-10 ULP.
    accumulator = "float64"
    of_the_spec = True

    def __init__(self, device: Device | None = None) -> None:
        what = f"the {self.name} backend"
        torch = require("torch", "torch", what)
        version = require("triton", "triton", what).__version__
        if _release(version) < _OLDEST:
            raise BackendUnavailableError(
                f"{what} needs triton {'.'.join(map(str, _OLDEST))} or newer; {version} here takes "
                "subnormal numbers for 0 when it divides. Install it with: pip install -U "
                "'smoothl1-deploy[triton]'"
            )
        self._fused = importlib.import_module("._fused", __package__)
        if (
            self._fused.INTERPRETED
            and _release(version) < (3, 7)
            and _release(np.__version__) >= (2, 4)
        ):
            raise BackendUnavailableError(
                f"{what} interpreted on the CPU needs triton 3.7 or newer with numpy "
                f"{np.__version__}, on which the interpreter of {version} stops. Install it with: "
                "pip install -U 'smoothl1-deploy[triton]'"
            )
        if device is None:
            device = InterpretedDevice(torch, 0) if self._fused.INTERPRETED else _find(what)
        super().__init__(device)
        if self._fused.INTERPRETED:
            self.slow = self._device.name

    def refuses(self, spec: LossSpec) -> str | None:
        """Refuse whatever is more than Smooth L1, its scores and a beta at run time."""
        return _refusal(spec)

    def load(self, model: onnx.ModelProto) -> TorchTritonRunner:
        """Read the spec that `model` carries.

        Raises:
            ArtefactError: for a model that carries none.
            UnsupportedError: as `refuses` says.
        """
        return TorchTritonRunner(model, self._device, self._fused)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _find(what: str) -> Device:
    try:
        return find_device(what)
    except BackendUnavailableError as exc:
        raise BackendUnavailableError(
            f"{exc}; or set TRITON_INTERPRET=1 before Python starts, to have its kernels "
            "interpreted on the CPU, slowly"
        ) from None
