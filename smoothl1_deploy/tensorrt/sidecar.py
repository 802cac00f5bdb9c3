"""`Sidecar`: what an engine says about itself, in `<engine>.json` beside it.

An engine is opaque and executable. The sidecar ties it to the ONNX model and the request it was
made from, and to its own bytes by their sha256. It carries a hash of its own too: damage and
careless edits are told apart from the truth; a deliberate forgery needs a signature instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artefact import read_sealed, seal, sidecar_path
from ..errors import ArtefactError
from ..spec import LossSpec
from .flavour import FLAVOURS
from .gpu import Gpu
from .key import BuildKey
from .options import BuildOptions
from .parse import NetworkPort
from .profile import Profile

__all__ = ["Sidecar", "sidecar_path"]

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Sidecar:
    """Where an engine comes from and what it takes.

    Attributes:
        engine_sha256, engine_bytes: of the engine file.
        onnx_sha256: of the serialised ONNX model, before it was prepared for TensorRT.
        spec: what is computed; None for a model of other origin.
        graph_name: the network's.
        flavour, version: of the TensorRT that built it, and that runs it.
        flags: names of the builder flags that were set.
        inputs, outputs: names, dtypes and shapes; -1 is a dynamic axis.
        notes: where TensorRT computes otherwise than the ONNX model says.
        gpu: of the machine that built it, None without one.
        build_seconds: how long the build took.
        built_at: date and time, ISO 8601, UTC.
        tool_version: of this package.
        context_sha256: of the ONNX file that carries the engine, beside which this sidecar lies;
            None where it lies beside the engine.
    """

    engine_sha256: str
    engine_bytes: int
    onnx_sha256: str
    spec: LossSpec | None
    graph_name: str
    flavour: str
    version: str
    options: BuildOptions
    flags: tuple[str, ...]
    profile: Profile
    inputs: tuple[NetworkPort, ...]
    outputs: tuple[NetworkPort, ...]
    notes: tuple[str, ...]
    gpu: Gpu | None
    gpu_dependent: bool
    build_seconds: float
    built_at: str
    tool_version: str
    context_sha256: str | None = None

    @property
    def key(self) -> BuildKey:
        """The request that gives this engine."""
        return BuildKey(
            self.onnx_sha256,
            self.graph_name,
            self.flavour,
            self.version,
            self.options,
            self.profile,
            self.gpu if self.gpu_dependent else None,
            self.tool_version,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the inverse of `from_dict`."""
        return {
            "format": _FORMAT,
            "engine_sha256": self.engine_sha256,
            "engine_bytes": self.engine_bytes,
            "onnx_sha256": self.onnx_sha256,
            "spec": None if self.spec is None else self.spec.to_dict(),
            "graph_name": self.graph_name,
            "flavour": self.flavour,
            "version": self.version,
            "options": self.options.to_dict(),
            "flags": list(self.flags),
            "profile": self.profile.to_dict(),
            "inputs": [port.to_dict() for port in self.inputs],
            "outputs": [port.to_dict() for port in self.outputs],
            "notes": list(self.notes),
            "gpu": None if self.gpu is None else self.gpu.to_dict(),
            "gpu_dependent": self.gpu_dependent,
            "build_seconds": self.build_seconds,
            "built_at": self.built_at,
            "tool_version": self.tool_version,
            **({"context_sha256": self.context_sha256} if self.context_sha256 else {}),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Sidecar:
        """The inverse of `to_dict`.

        Raises:
            ArtefactError: on another format number, a missing entry or a bad value.
        """
        if fields.get("format") != _FORMAT:
            raise ArtefactError(
                f"the sidecar has the format {fields.get('format')!r}, this version of "
                f"smoothl1-deploy reads {_FORMAT}; build the engine again"
            )
        try:
            if fields["flavour"] not in FLAVOURS:
                raise ValueError(f"unknown flavour {fields['flavour']!r}")
            return cls(
                engine_sha256=str(fields["engine_sha256"]),
                engine_bytes=int(fields["engine_bytes"]),
                onnx_sha256=str(fields["onnx_sha256"]),
                spec=None if fields["spec"] is None else LossSpec.from_dict(fields["spec"]),
                graph_name=str(fields["graph_name"]),
                flavour=fields["flavour"],
                version=str(fields["version"]),
                options=BuildOptions.from_dict(fields["options"]),
                flags=tuple(str(flag) for flag in fields["flags"]),
                profile=Profile.from_dict(fields["profile"]),
                inputs=tuple(NetworkPort.from_dict(port) for port in fields["inputs"]),
                outputs=tuple(NetworkPort.from_dict(port) for port in fields["outputs"]),
                notes=tuple(str(note) for note in fields["notes"]),
                gpu=None if fields["gpu"] is None else Gpu(**fields["gpu"]),
                gpu_dependent=bool(fields["gpu_dependent"]),
                build_seconds=float(fields["build_seconds"]),
                built_at=str(fields["built_at"]),
                tool_version=str(fields["tool_version"]),
                context_sha256=fields.get("context_sha256"),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as exc:
            raise ArtefactError(
                f"the sidecar's content makes no sense ({type(exc).__name__}: {exc}); "
                "build the engine again"
            ) from exc

    def dumps(self) -> bytes:
        """The file's content: the entries and their own sha256."""
        return seal(self.to_dict())

    @classmethod
    def read(cls, path: Path) -> Sidecar:
        """Read a sidecar file without trust.

        Raises:
            ArtefactError: when it is missing, damaged, or changed since it was written.
        """
        entries = read_sealed(path, ", or pass allow_unverified=True if you trust it")
        try:
            return cls.from_dict(entries)
        except ArtefactError as exc:
            raise ArtefactError(f"{path}: {exc}") from exc
