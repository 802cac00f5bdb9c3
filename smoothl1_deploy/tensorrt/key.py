"""`BuildKey`: everything an engine depends on. Two builds of one key give one engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import __version__
from .flavour import Flavour
from .gpu import Gpu, current_gpu
from .options import BuildOptions
from .profile import Profile

__all__ = ["BuildKey"]


@dataclass(frozen=True, slots=True)
class BuildKey:
    """What goes into a build.

    Attributes:
        onnx_sha256: of the serialised model.
        graph_name: name of the network.
        flavour, version: of TensorRT.
        options: all but the timing cache's path.
        gpu: of this machine where the engine depends on it, else None: `tensorrt_rtx` builds for
            the compute capabilities it is told.
        tool_version: of this package, which prepares the model.
    """

    onnx_sha256: str
    graph_name: str
    flavour: str
    version: str
    options: BuildOptions
    profile: Profile
    gpu: Gpu | None = None
    tool_version: str = __version__

    @classmethod
    def of(
        cls,
        onnx_sha256: str,
        graph_name: str,
        flavour: Flavour,
        options: BuildOptions,
        profile: Profile,
    ) -> BuildKey:
        """The key of a build on this machine."""
        local = flavour.name == "tensorrt" or "current" in options.compute_capabilities
        gpu = current_gpu() if local else None
        return cls(onnx_sha256, graph_name, flavour.name, flavour.version, options, profile, gpu)

    def parts(self) -> dict[str, Any]:
        """One flat, JSON-ready mapping: the parts a changed key can differ in."""
        options = {
            f"option {k}": v for k, v in self.options.to_dict().items() if k != "timing_cache"
        }
        return {
            "onnx": self.onnx_sha256,
            "graph name": self.graph_name,
            "flavour": self.flavour,
            "version": self.version,
            "profile": self.profile.to_dict()["ranges"],
            "gpu": None if self.gpu is None else self.gpu.to_dict(),
            "tool version": self.tool_version,
            **options,
        }

    @property
    def digest(self) -> str:
        """sha256 (hex) of the parts: the name of the engine in a cache."""
        text = json.dumps(self.parts(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def changes(self, since: BuildKey) -> tuple[str, ...]:
        """What differs from an older key, for instance `"version: 10.9 -> 10.16"`."""
        old, new = since.parts(), self.parts()
        return tuple(
            f"{part}: {_short(old.get(part))} -> {_short(new.get(part))}"
            for part in sorted({*old, *new})
            if old.get(part) != new.get(part)
        )


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:  # a sha256
        return value[:12]
    if isinstance(value, Mapping):
        return " ".join(f"{k}={_short(v)}" for k, v in value.items())
    if isinstance(value, list) and value and all(isinstance(shape, list) for shape in value):
        return ",".join("x".join(map(str, shape)) for shape in value)
    return str(value)
