"""`trt`: a TensorRT engine on the GPU, built from the model or read from a file.

No GPU has run an engine of this module yet; see `smoothl1_deploy.tensorrt._run`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from .._device import Device
from .._floats import Array
from .._model import ELEMENT_TYPE
from ..errors import ArtefactError, BackendUnavailableError
from ..tensorrt._build import build_engine
from ..tensorrt._cache import EngineCache, default_cache_dir
from ..tensorrt._engine import Engine, read_engine
from ..tensorrt._flavour import ELSEWHERE, Flavour, get_flavour
from ..tensorrt._options import BuildOptions
from ..tensorrt._profile import ProfileRequest, input_shapes, wide_profile
from ..tensorrt._run import Program
from ._base import OfTensorrt
from ._gpu import Compute, GpuBackend, GpuRunner
from ._whole import ModelRunner, Session


class TrtRunner(GpuRunner):
    """One engine; `run` may be called from many threads at once.

    Attributes:
        program: the engine and its contexts; `program.sidecar` says where it comes from.
    """

    def __init__(self, model: onnx.ModelProto, program: Program) -> None:
        super().__init__(model, program.device)
        self.spec = program.sidecar.spec
        self.program = program

    def _compute(self, feeds: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        return self.program.run(self._named(feeds))

    def _recordable(self) -> Compute:
        context = self.program.new_context()
        context.check_recordable()
        return lambda feeds, shape: context.execute(self._named(feeds))


class TrtBackend(OfTensorrt, GpuBackend):
    """TensorRT on the GPU, which needs a fixed rank; `threads` changes nothing here.

    Args:
        flavour: `"tensorrt"`, `"tensorrt_rtx"`, or `"auto"` for the first that can be used.
        profile: the shapes of the engines it builds; by default every dynamic axis from 0 to what
            makes 2^26 elements, tuned for 64.
        options: how it builds them.
        cache_dir: where engines and compiled kernels go; None for the user's cache folder.
        contexts: how many calls may be prepared at a time.

    Raises:
        MissingDependencyError: when torch or the flavour is not installed.
        BackendUnavailableError: when there is no GPU, or the flavour can't be used on it.

    >>> from smoothl1_deploy import LossSpec, export
    >>> from smoothl1_deploy.backends import TrtBackend
    >>> backend = TrtBackend(profile={"input": (1, 64, 4096)})
    >>> backend.load(export(LossSpec(), shape=("N", 16))).spec == LossSpec()
    True
    """

    name = "trt"

    def __init__(
        self,
        flavour: str | Flavour = "auto",
        *,
        profile: ProfileRequest = None,
        options: BuildOptions | None = None,
        cache_dir: str | Path | None = None,
        contexts: int = 4,
        device: Device | None = None,
    ) -> None:
        self._flavour = get_flavour(flavour)
        super().__init__(device)
        card = self._device
        if not self._flavour.knows(card.capability):
            raise BackendUnavailableError(
                f"{self._flavour} runs no engine on {card.name}, which has compute capability "
                f"{card.capability}; it knows {', '.join(self._flavour.capabilities)}. {ELSEWHERE}"
            )
        self._profile = profile
        self._options = options
        self._root = default_cache_dir() if cache_dir is None else Path(cache_dir)
        self._contexts = contexts

    def load(self, model: onnx.ModelProto) -> TrtRunner:
        """Build the engine of `model`, or take it from the cache, and deserialise it.

        Raises:
            UnsupportedError, BuildError, SpecError: as `build_engine` does.
            BackendUnavailableError: when the engine doesn't run on this GPU.
        """
        return TrtRunner(model, self._program(self._built(model), self._flavour))

    def open(self, model: onnx.ModelProto) -> Session:
        """Build the engine of the whole of `model`, as `load` does."""
        return _session(self._program(self._built(model), self._flavour))

    def _built(self, model: onnx.ModelProto) -> Engine:
        profile = wide_profile(input_shapes(model)) if self._profile is None else self._profile
        return build_engine(
            model,
            flavour=self._flavour,
            profile=profile,
            options=self._options,
            cache_dir=EngineCache(self._root),
        )

    def load_engine(self, path: Path) -> TrtRunner | ModelRunner:
        """Deserialise an engine file whose sidecar fits it.

        One whose sidecar tells of no loss is a whole model, which runs by its own names.

        Raises:
            ArtefactError: as `read_engine` does.
            BackendUnavailableError: when the engine doesn't run on this GPU.
        """
        engine = read_engine(path)
        model, flavour = _skeleton(engine), get_flavour(engine.sidecar.flavour)
        if engine.sidecar.spec is None:
            return ModelRunner(model, lambda _: _session(self._program(engine, flavour)))
        return TrtRunner(model, self._program(engine, flavour))

    def _program(self, engine: Engine, flavour: Flavour) -> Program:
        kernels = self._root / "kernels" / f"{engine.sha256}.cache"
        return Program(engine, flavour, self._device, contexts=self._contexts, kernels=kernels)


def _session(program: Program) -> Session:
    """A program by the names of its engine, from arrays to arrays."""
    device = program.device

    def run(feeds: dict[str, Array]) -> dict[str, Array]:
        outputs = program.run({name: device.upload(array) for name, array in feeds.items()})
        return {name: device.download(tensor) for name, tensor in outputs.items()}

    return run


def _skeleton(engine: Engine) -> onnx.ModelProto:
    """A model with the engine's inputs and outputs and nothing in between.

    Raises:
        ArtefactError: for an engine of a loss whose ports are no loss's.
    """
    sidecar = engine.sidecar
    for port in (*sidecar.inputs, *sidecar.outputs):
        if sidecar.spec is not None and port.dtype not in ELEMENT_TYPE:
            raise ArtefactError(
                f"the engine's {port.name!r} has the dtype {port.dtype}; a loss artefact takes and "
                f"gives {', '.join(ELEMENT_TYPE)}"
            )
    inputs, outputs = ([p.to_value() for p in ports] for ports in (sidecar.inputs, sidecar.outputs))
    return helper.make_model(helper.make_graph([], sidecar.graph_name, inputs, outputs))
