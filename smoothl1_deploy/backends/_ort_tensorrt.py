"""`ort-tensorrt` and `ort-tensorrt-rtx`: ONNX Runtime's providers that build TensorRT engines.

What happens where there is no GPU was tried with onnxruntime-gpu 1.31.1 and
onnxruntime-ep-nv-tensorrt-rtx 0.5.0; no GPU has run this module yet.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from .._artefact import sha256
from .._device import Device
from .._files import make_folder
from ..errors import BackendUnavailableError, require
from ..tensorrt._cache import default_cache_dir
from ..tensorrt._flavour import PROVIDERS
from ..tensorrt._prepare import prepare
from ..tensorrt._profile import Profile, input_shapes, resolve_profile, wide_profile
from ._base import OfTensorrt
from ._ort_gpu import OrtGpuBackend, inlined

_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
_registering = threading.Lock()
_registered: set[str] = set()


class _EngineBackend(OfTensorrt, OrtGpuBackend):
    """A provider that builds TensorRT engines of the graph.

    Args:
        cache_dir: where its engines go; None for the user's cache folder. Each graph with its
            profile, options and versions has a folder of its own there.
    """

    prefix: str  # what the names of its options begin with

    def __init__(
        self, device: Device | None = None, *, cache_dir: str | Path | None = None
    ) -> None:
        super().__init__(device)
        self._root = default_cache_dir() if cache_dir is None else Path(cache_dir)

    def _graph(self, model: onnx.ModelProto) -> onnx.ModelProto:
        return inlined(prepare(model)[0])

    def _settings(self, graph: onnx.ModelProto) -> dict[str, str]:
        shapes = input_shapes(graph)
        profile = resolve_profile(wide_profile(shapes), shapes)
        settings = {
            f"{self.prefix}_profile_{which}_shapes": _profile_text(profile, index)
            for index, which in enumerate(("min", "opt", "max"))
            if profile.ranges
        }
        key = self._key(graph, settings)
        folder = make_folder(self._root / self.name / key, "cache_dir=")
        return {**settings, **self._caching(folder, key)}

    def _key(self, graph: onnx.ModelProto, settings: Mapping[str, str]) -> str:
        """The digest of all that an engine depends on: graphs of one name give unlike engines.

        The providers look an engine up by the graph's name and node names (and one was handed
        back for other shapes: onnxruntime#32254), so each key has a folder and a prefix.
        """
        parts = {
            "graph": sha256(graph.SerializeToString(deterministic=True)),
            "settings": dict(settings),
            "versions": [self._ort.__version__, self._version()],
            "device": [self._device.name, self._device.index],
        }
        return sha256(json.dumps(parts, sort_keys=True).encode())[:32]

    def _version(self) -> str:
        return ""

    def _caching(self, folder: Path, key: str) -> dict[str, str]:
        raise NotImplementedError


class OrtTensorrtBackend(_EngineBackend):
    """ONNX Runtime's TensorRT provider; it links libnvinfer 10, so it needs `tensorrt` 10.x."""

    name = "ort-tensorrt"
    provider = PROVIDERS["tensorrt"]
    prefix = "trt"

    def _caching(self, folder: Path, key: str) -> dict[str, str]:
        return {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(folder),
            "trt_engine_cache_prefix": key,
        }


class OrtTensorrtRtxBackend(_EngineBackend):
    """TensorRT for RTX as ONNX Runtime's plugin provider, which is registered, not built in."""

    name = "ort-tensorrt-rtx"
    provider = PROVIDERS["tensorrt_rtx"]
    extra = "cpu"
    prefix = "nv"

    def _check_provider(self) -> None:
        self._plugin = require(_PLUGIN, "ort-rtx", f"the {self.name} backend")
        with _registering:
            if self.provider not in _registered:
                try:
                    library = self._plugin.get_library_path()
                    self._ort.register_execution_provider_library(self.provider, library)
                except Exception as exc:
                    raise BackendUnavailableError(
                        f"the {self.name} backend's plugin {_PLUGIN} "
                        f"{self._version()} can't be loaded here ({exc}): it needs a GPU and its "
                        "driver"
                    ) from exc
                _registered.add(self.provider)

    def _version(self) -> str:
        return str(getattr(self._plugin, "__version__", ""))

    def _caching(self, folder: Path, key: str) -> dict[str, str]:
        return {"nv_runtime_cache_path": str(folder)}

    def _open(self, data: bytes, options: Any, settings: dict[str, str]) -> Any:
        # Named in `providers=`, a plugin is passed over with a warning.
        devices = [d for d in self._ort.get_ep_devices() if d.ep_name == self.provider]
        if not devices:
            raise BackendUnavailableError(
                f"{_PLUGIN} {self._version()} finds no GPU that it supports; it runs on "
                "compute capability 8.6, 8.9 and 12.0 or later"
            )
        settings = {key: value for key, value in settings.items() if key != "device_id"}
        options.add_provider_for_devices([devices[self._device.index]], settings)
        return self._ort.InferenceSession(data, options, enable_fallback=0)


def _profile_text(profile: Profile, index: int) -> str:
    """`input:1x16,target:1x16`, as both TensorRT providers read the shapes of a profile."""
    return ",".join(
        f"{name}:{'x'.join(map(str, ranges[index]))}" for name, ranges in profile.ranges.items()
    )
