"""Engines on disk: the request they answer, their sidecars, and ONNX files that carry them.

An engine is opaque and executable. The sidecar, `<engine>.json` beside it, ties it to the ONNX
model and the request it was made from, and to its own bytes by their sha256. It carries a hash of
its own too: damage and careless edits are told apart from the truth; a deliberate forgery needs a
signature instead. An engine is read only when everything fits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from .. import __version__
from .._artefact import read_sealed, seal, sha256, sidecar_path
from .._files import read_file, write_atomic
from .._model import ENGINE_OPERATOR, opset_of
from .._records import Record, plain
from .._spec import LossSpec
from ..errors import (
    ArtefactError,
    BackendUnavailableError,
    MissingDependencyError,
    OutputError,
    UnsupportedError,
    reason_of,
)
from ..graph._assemble import IR_VERSION
from ..graph._metadata import is_changed, is_served, stamp
from ._flavour import FLAVOURS, PROVIDERS, Flavour, Gpu, get_flavour
from ._options import BuildOptions
from ._parse import NetworkPort
from ._profile import Profile

_FORMAT = 1
_PROTOBUF_LIMIT = 2**31 - 2**20  # with room for what is beside the engine

#: The diagnostics that are about the file itself; the others are about the machine.
_OF_THE_FILE = ("MALFORMED_ENGINE", "VERSION_MISMATCH")


# What an engine is, and where it comes from


@dataclass(frozen=True, slots=True)
class BuildKey(Record):
    """Everything an engine depends on. Two builds of one key give one engine.

    Attributes:
        onnx_sha256: the sha256 of the serialised model.
        graph_name: the name of the network.
        flavour, version: the TensorRT that builds.
        gpu: that of this machine where the engine depends on it, else None: `tensorrt_rtx` builds
            for the compute capabilities that it is told.
        tool_version: the version of this package, which prepares the model.
    """

    onnx_sha256: str
    graph_name: str
    flavour: str
    version: str
    options: BuildOptions
    profile: Profile
    gpu: Gpu | None = None
    tool_version: str = __version__

    def parts(self) -> dict[str, Any]:
        """One flat, JSON-ready mapping: the parts a changed key can differ in."""
        parts = {**self.to_dict(), "profile": self.profile.to_dict()["ranges"]}
        options = parts.pop("options")
        return {**parts, **{f"option {name}": value for name, value in options.items()}}

    @property
    def digest(self) -> str:
        """sha256 (hex) of the parts: the name of the engine in a cache."""
        return sha256(json.dumps(self.parts(), sort_keys=True).encode())

    def changes(self, since: BuildKey) -> tuple[str, ...]:
        """What differs from an older key, for instance `"version: 10.9 -> 10.16"`."""
        old, new = since.parts(), self.parts()
        return tuple(
            f"{part}: {_short(old[part])} -> {_short(new[part])}"
            for part in sorted(new)
            if old[part] != new[part]
        )


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:  # a sha256
        return value[:12]
    if isinstance(value, Mapping):
        return " ".join(f"{k}={_short(v)}" for k, v in value.items())
    if isinstance(value, list) and value and all(isinstance(shape, list) for shape in value):
        return ",".join("x".join(map(str, shape)) for shape in value)
    return str(value)


@dataclass(frozen=True, slots=True)
class Sidecar(Record):
    """Where an engine comes from and what it takes.

    Attributes:
        engine_sha256, engine_bytes: the sha256 and the size of the engine file.
        onnx_sha256: the sha256 of the ONNX model, before it was prepared for TensorRT.
        spec: what is computed; None for a model of other origin.
        graph_name: the name of the network.
        flavour, version: the TensorRT that built it, and that runs it.
        flags: names of the builder flags that were set.
        inputs, outputs: names, dtypes and shapes; -1 is a dynamic axis.
        notes: where TensorRT computes otherwise than the ONNX model says.
        gpu: that of the machine that built it, None without one.
        gpu_dependent: whether the engine depends on it.
        build_seconds: how long the build took.
        built_at: date and time, ISO 8601, UTC.
        tool_version: the version of this package.
        context_sha256: the sha256 of the ONNX file that carries the engine, where this sidecar lies
            beside such a file; None where it lies beside the engine.
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
        shared = {field.name: getattr(self, field.name) for field in fields(BuildKey)}
        return BuildKey(**{**shared, "gpu": self.gpu if self.gpu_dependent else None})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the inverse of `from_dict`."""
        entries = {"format": _FORMAT, **Record.to_dict(self)}
        if self.context_sha256 is None:
            del entries["context_sha256"]
        return entries

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Sidecar:
        """The inverse of `to_dict`.

        Raises:
            ArtefactError: on another format number, a missing entry or a bad value.
        """
        if entries.get("format") != _FORMAT:
            raise ArtefactError(
                f"the sidecar has the format {entries.get('format')!r}, this version of "
                f"smoothl1-deploy reads {_FORMAT}; build the engine again"
            )
        entries = {"context_sha256": None, **entries}
        try:
            if entries["flavour"] not in FLAVOURS:
                raise ValueError(f"unknown flavour {entries['flavour']!r}")
            values = {field.name: entries[field.name] for field in fields(cls)}
            return cls(**{name: _READ.get(name, str)(value) for name, value in values.items()})
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as exc:
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
        entries = read_sealed(path)
        try:
            return cls.from_dict(entries)
        except ArtefactError as exc:
            raise ArtefactError(f"{path}: {exc}") from exc


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(map(str, values))


def _ports(values: Any) -> tuple[NetworkPort, ...]:
    return tuple(map(NetworkPort.from_dict, values))


#: Entry of a sidecar -> what reads it from JSON; the other entries are text.
_READ: dict[str, Callable[[Any], Any]] = {
    "engine_bytes": int,
    "spec": lambda spec: None if spec is None else LossSpec.from_dict(spec),
    "options": BuildOptions.from_dict,
    "flags": _texts,
    "profile": Profile.from_dict,
    "inputs": _ports,
    "outputs": _ports,
    "notes": _texts,
    "gpu": lambda gpu: None if gpu is None else Gpu(**gpu),
    "gpu_dependent": bool,
    "build_seconds": float,
    "context_sha256": lambda digest: digest,
}


@dataclass(frozen=True, slots=True)
class Engine:
    """A built engine that fits its sidecar.

    Attributes:
        path: where its file is; None for an engine that was never written.
        sidecar: where it comes from and what it takes.
        data: the bytes that were verified; deserialise these, the file may have changed since.
        cached: True when a cache had it.
        changed: where a cache had only a near relative, what differs from that one's key.

    >>> from smoothl1_deploy import LossSpec, build_engine, export
    >>> engine = build_engine(export(LossSpec(), shape=("N", 16)), "mean.engine")
    >>> engine.path.name, engine.cached, engine.to_dict()["sha256"] == engine.sha256
    ('mean.engine', False, True)
    """

    path: Path | None
    sidecar: Sidecar
    data: bytes = field(repr=False)
    cached: bool = False
    changed: tuple[str, ...] = ()

    def __repr__(self) -> str:
        where = "" if self.path is None else f" in {self.path}"
        of = self.sidecar
        built = f"{of.flavour} {of.version}, {len(self.data):,} bytes"
        return f"<Engine of {of.graph_name}{where}: {built}>"

    @property
    def sha256(self) -> str:
        """The sha256 of `data`, in hex."""
        return self.sidecar.engine_sha256

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the bytes."""
        shown = ("path", "sha256", "sidecar", "cached", "changed")
        return {name: plain(getattr(self, name)) for name in shown}


# Files


def write_engine(path: Path, data: bytes, sidecar: Sidecar) -> None:
    """Write an engine, then its sidecar, each whole or not at all.

    Whatever is interrupted in between, a new engine beside an old sidecar doesn't match it and is
    refused by `read_engine`.

    Raises:
        OutputError: when the folder is missing or can't be written, and for what is no file.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OutputError(f"can't write {path}: an engine is a file with another beside it")
    write_atomic(path, data)
    write_atomic(sidecar_path(path), sidecar.dumps())


def read_engine(path: str | Path, flavour: str | Flavour = "auto") -> Engine:
    """Read an engine and check it against its sidecar and the TensorRT that is installed.

    Args:
        path: where the engine is; its sidecar is `<path>.json`.
        flavour: the one that is to run the engine; `"auto"` takes the one that its sidecar names.

    Raises:
        ArtefactError: when the engine or its sidecar is missing, damaged or changed, when they
            don't belong together, or when the engine is of another flavour or version.
        MissingDependencyError, BackendUnavailableError: when the TensorRT that is to run it is not
            installed, or can't be used here.
    """
    engine = read_verified(Path(path))
    here = _runtime_flavour(engine, flavour)
    # That this machine's GPU is another is nothing wrong with the file.
    if found := [name for name in diagnose(engine.data, here) if name in _OF_THE_FILE]:
        raise ArtefactError(
            f"{path} is no engine of {here}: {', '.join(found)}; build it again for this version"
        )
    return engine


def read_verified(path: Path) -> Engine:
    """Read an engine that fits its sidecar, whatever flavour it is of.

    Raises:
        ArtefactError: as `read_engine` does for the files.
    """
    try:
        data = read_file(path)
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        raise ArtefactError(
            f"{path} can't be read as an engine ({reason_of(exc)}); give the path of a built engine"
        ) from exc
    if not data:
        raise ArtefactError(f"{path} is empty; build the engine again")
    sidecar = Sidecar.read(sidecar_path(path))
    remedy = "copy both files again, or build the engine again"
    if len(data) < sidecar.engine_bytes:
        raise ArtefactError(
            f"{path} is truncated, or not the engine its sidecar describes: it has {len(data)} "
            f"bytes, not {sidecar.engine_bytes}; {remedy}"
        )
    digest = sha256(data)
    if digest != sidecar.engine_sha256:
        raise ArtefactError(
            f"{path} is not the engine its sidecar describes: its sha256 is {digest[:12]}..., not "
            f"{sidecar.engine_sha256[:12]}...; it was damaged or replaced: {remedy}"
        )
    return Engine(path, sidecar, data)


def _runtime_flavour(engine: Engine, asked: str | Flavour) -> Flavour:
    """The installed flavour that is to run the engine; refuses one that can't."""
    sidecar = engine.sidecar
    built = f"{engine.path} was built with {sidecar.flavour} {sidecar.version}"
    remedy = "build it again here"
    try:
        here = get_flavour(sidecar.flavour if asked == "auto" else asked)
    except (MissingDependencyError, BackendUnavailableError) as exc:
        raise type(exc)(f"{built}, which can't be used here; {remedy}. {exc}") from exc
    if here.name != sidecar.flavour:
        raise ArtefactError(f"{built}, and {here} can't run it; {remedy}")
    if here.version.split(".")[:3] != sidecar.version.split(".")[:3]:
        raise ArtefactError(f"{built}, here is {here}, and engines don't carry over; {remedy}")
    return here


def diagnose(data: bytes, flavour: Flavour) -> tuple[str, ...]:
    """What the runtime holds against an engine on this machine, by its own names.

    For instance `"UNSUPPORTED_CC"`; empty where nothing does, or where it can't be asked. On a
    machine without a GPU a sound engine too is INVALID, with no diagnostics, so only these say
    anything. Payload damage is not seen (tried with tensorrt_rtx 1.7.1).
    """
    if flavour.member("Runtime", "get_engine_validity") is None:
        return ()
    _, diagnostics = flavour.trt.Runtime(flavour.logger).get_engine_validity(data)
    names = flavour.trt.EngineInvalidityDiagnostics.__members__
    return tuple(sorted(name for name, bit in names.items() if int(diagnostics) & int(bit)))


# ONNX files that carry an engine


def context_engine(path: Path) -> Path:
    """`loss_ctx.onnx` -> `loss_ctx.engine`, the engine beside a file that only names it."""
    return path.with_suffix(".engine")


def write_context(
    path: Path, engine: Engine, model: onnx.ModelProto, file: str, embed_mode: int
) -> Engine:
    """Write an ONNX file whose one node is `engine`, then its sidecar.

    Source of the attributes: ONNX Runtime's EP context design, and what its two providers for
    TensorRT write and read.

    Args:
        path: where the ONNX file goes; its sidecar goes to `<path>.json`.
        engine: the one that was built from `model`.
        model: the one whose metadata the file repeats.
        file: the name of the model's file, for a provider that refits weights.
        embed_mode: 1 puts the engine inside; 0 writes it to `context_engine(path)`, with a sidecar
            of its own.

    Returns:
        `engine` with its new path and sidecar.

    Raises:
        UnsupportedError: for an engine of 2 GiB or more inside a file.
        OutputError: as `write_engine` does.
    """
    sidecar, content = engine.sidecar, engine.data
    if embed_mode == 0:
        beside = context_engine(path)
        write_engine(beside, engine.data, sidecar)
        content = beside.name.encode()
    elif len(content) > _PROTOBUF_LIMIT:
        raise UnsupportedError(
            f"the engine has {len(content)} bytes, and an ONNX file holds 2 GiB at most; leave the "
            "engine beside it with embed_mode 0"
        )
    node = helper.make_node(
        ENGINE_OPERATOR,
        [port.name for port in sidecar.inputs],
        [port.name for port in sidecar.outputs],
        name=sidecar.graph_name,
        domain="com.microsoft",
        source=PROVIDERS[sidecar.flavour],
        main_context=1,
        embed_mode=embed_mode,
        ep_cache_context=content,
        ep_sdk_version=sidecar.version,
        hardware_architecture=_architecture(sidecar),
        partition_name=sidecar.graph_name,
        onnx_model_filename=file,
    )
    inputs, outputs = ([p.to_value() for p in ports] for ports in (sidecar.inputs, sidecar.outputs))
    graph = helper.make_graph([node], sidecar.graph_name, inputs, outputs)
    opsets = [helper.make_opsetid("", opset_of(model)), helper.make_opsetid("com.microsoft", 1)]
    context = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    if sidecar.spec is not None:
        served, changed = is_served(model), is_changed(model)
        stamp(context, sidecar.spec, "epcontext", sidecar.flavour, served=served, changed=changed)
    data = context.SerializeToString(deterministic=True)
    sidecar = replace(sidecar, context_sha256=sha256(data))
    write_engine(path, data, sidecar)
    return replace(engine, path=path, sidecar=sidecar)


def _architecture(sidecar: Sidecar) -> str:
    """The compute capabilities as the providers write them: `"86"`, or `"80+"` for any from 8.0."""
    built_for = sidecar.options.compute_capabilities
    if sidecar.flavour == "tensorrt":
        built_for = ("current",)
    here = "" if sidecar.gpu is None else sidecar.gpu.compute_capability
    named = (here if name == "current" else name for name in built_for)
    return ",".join(name.replace(".", "") for name in named) or "80+"
