"""`smoothl1-deploy inspect`: what is inside an ONNX file or an engine, and whether it runs here."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ArtefactError, InvalidInputError, SmoothL1DeployError, reason_of
from .console import human_size, print_fields, print_json, print_lines, print_table

if TYPE_CHECKING:
    import onnx

    from ..spec import LossSpec
    from ..tensorrt.parse import NetworkPort
    from ..tensorrt.sidecar import Sidecar

__all__ = ["EXAMPLE", "Inspection", "inspect", "inspect_engine", "inspect_model"]

EXAMPLE = "smoothl1-deploy inspect loss.onnx"

#: How plans of tensorrt (10.x) and of tensorrt_rtx (1.7) begin.
_ENGINE_MAGIC = (b"ftrt", b"vtrt")


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a file holds.

    Attributes:
        kind: `"onnx"` or `"engine"`.
        facts: name -> what to show, in order; JSON-ready.
        operators: operator or layer type -> how many, by what contains them.
        runs: backend or flavour -> None where it can run the file here, else why not.
        problems: reasons not to trust the file.
    """

    path: Path
    kind: str
    facts: dict[str, Any]
    operators: dict[str, dict[str, int]] = field(default_factory=dict)
    runs: dict[str, str | None] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            **self.facts,
            "operators": self.operators,
            "runs": self.runs,
            "problems": list(self.problems),
        }


def _spec_facts(spec: LossSpec | None) -> dict[str, Any]:
    return {"spec": None if spec is None else spec.to_dict()}


def _certificate(path: Path, problems: list[str]) -> dict[str, Any]:
    """What the certificate beside a file says; one that speaks against the file is a problem."""
    from ..parity.certificate import read_certificate

    status = read_certificate(path)
    if status.state not in ("absent", "matches"):
        problems.append(f"{status.state} certificate: {status.message}")
    return status.to_dict()


def inspect_model(path: Path) -> Inspection:
    """Look into an ONNX file; a model of other origin is shown as far as it goes.

    Raises:
        ArtefactError: when it is missing or is no ONNX model.
    """
    from ..artefact import read_model, sha256
    from ..graph.metadata import content_hash, read_route, read_spec
    from .ports import graph_ports

    model = read_model(str(path))
    problems = []
    spec = None
    try:
        spec = read_spec(model)
    except ArtefactError as exc:
        problems.append(str(exc))
    graph = model.graph
    inputs, outputs = graph_ports(model)
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    facts = {
        **_spec_facts(spec),
        "route": read_route(model),
        "producer": f"{model.producer_name} {model.producer_version}".strip() or None,
        "graph": graph.name,
        "bytes": path.stat().st_size,
        "sha256": sha256(path.read_bytes()),
        "content_sha256": content_hash(model),
        "ir_version": model.ir_version,
        "opsets": opsets,
        "inputs": inputs,
        "outputs": outputs,
        "certificate": _certificate(path, problems),
    }
    operators = {"graph": dict(Counter(node.op_type for node in graph.node))}
    for function in model.functions:
        operators[function.name] = dict(Counter(node.op_type for node in function.node))
    runs = _backends(model)
    runs.update(_flavours(model, operators))
    return Inspection(path, "onnx", facts, operators, runs, tuple(problems))


def _backends(model: onnx.ModelProto) -> dict[str, str | None]:
    """Load the model into every backend of this machine."""
    from ..backends.base import BACKENDS, load

    runs: dict[str, str | None] = {}
    for name in BACKENDS:
        try:
            load(model, name)
            runs[name] = None
        except SmoothL1DeployError as exc:
            runs[name] = str(exc)
    return runs


def _flavours(
    model: onnx.ModelProto, operators: dict[str, dict[str, int]]
) -> dict[str, str | None]:
    """Parse the model with every flavour; the layers of the network go into `operators`."""
    from ..tensorrt.flavour import FLAVOURS, get_flavour
    from ..tensorrt.parse import parse

    runs: dict[str, str | None] = {}
    for name in FLAVOURS:
        key = f"build with {name}"
        try:
            network = parse(model, get_flavour(name)).network
            layers = (network.get_layer(i) for i in range(network.num_layers))
            operators[f"{name} network"] = dict(Counter(layer.type.name for layer in layers))
            runs[key] = None
        except SmoothL1DeployError as exc:
            runs[key] = str(exc)
    return runs


def inspect_engine(path: Path) -> Inspection:
    """Look into an engine's sidecar; where the engine fits it and runs here, into its layers too.

    An engine is executable code: one that doesn't fit its sidecar is hashed and not deserialised.
    An engine whose sidecar is missing or doesn't fit it is shown with that problem.
    """
    from ..artefact import sha256
    from ..tensorrt.engine import read_verified
    from ..tensorrt.sidecar import Sidecar, sidecar_path

    problems = []
    try:
        read_verified(path)
    except ArtefactError as exc:
        problems.append(str(exc))
    data = path.read_bytes()
    facts: dict[str, Any] = {
        "bytes": len(data),
        "sha256": sha256(data),
        "certificate": _certificate(path, problems),
    }
    try:
        sidecar = Sidecar.read(sidecar_path(path))
    except ArtefactError:
        return Inspection(path, "engine", facts, problems=tuple(problems))
    facts = {
        **_spec_facts(sidecar.spec),
        "graph": sidecar.graph_name,
        **facts,
        "onnx_sha256": sidecar.onnx_sha256,
        "flavour": f"{sidecar.flavour} {sidecar.version}",
        "compute_capabilities": list(sidecar.options.compute_capabilities),
        "profile": str(sidecar.profile),
        "flags": list(sidecar.flags),
        "options": sidecar.options.to_dict(),
        "inputs": [_engine_port(port) for port in sidecar.inputs],
        "outputs": [_engine_port(port) for port in sidecar.outputs],
        "gpu": None if sidecar.gpu is None else sidecar.gpu.to_dict(),
        "built_at": sidecar.built_at,
        "build_seconds": sidecar.build_seconds,
        "tool_version": sidecar.tool_version,
        "notes": list(sidecar.notes),
    }
    reason = _cannot_run(path, sidecar)
    if reason is None:
        facts["layers"], reason = _layers(path)
    runs = {sidecar.flavour: reason}
    return Inspection(path, "engine", facts, runs=runs, problems=tuple(problems))


def _layers(path: Path) -> tuple[list[str], str | None]:
    """The layers that the engine inspector names, or why the engine can't be deserialised here."""
    from ..tensorrt.engine import read_engine
    from ..tensorrt.flavour import get_flavour
    from ..tensorrt.layers import engine_layers

    try:
        engine = read_engine(path)
        return engine_layers(engine, get_flavour(engine.sidecar.flavour)), None
    except SmoothL1DeployError as exc:
        return [], str(exc)


def _engine_port(port: NetworkPort) -> dict[str, Any]:
    shape = [name or size for name, size in zip(port.names, port.shape, strict=True)]
    return {"name": port.name, "dtype": port.dtype, "shape": shape}


def _cannot_run(path: Path, sidecar: Sidecar) -> str | None:
    """Why a sound engine can't run here; None where nothing speaks against it."""
    from ..tensorrt.engine import diagnose, read_engine
    from ..tensorrt.flavour import get_flavour
    from ..tensorrt.gpu import current_gpu

    gpu = current_gpu()
    if gpu is None:
        return "this machine has no NVIDIA GPU whose driver answers"
    built_for = sidecar.options.compute_capabilities
    if built_for and "current" not in built_for and gpu.compute_capability not in built_for:
        return (
            f"it was built for compute capability {', '.join(built_for)}, "
            f"the GPU here ({gpu.name}) has {gpu.compute_capability}"
        )
    try:
        problems = diagnose(read_engine(path).data, get_flavour(sidecar.flavour))
    except SmoothL1DeployError as exc:
        return str(exc)
    return f"the runtime says {', '.join(problems)}" if problems else None


def _is_engine(path: Path) -> bool:
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(0, "it is a folder, a pipe or a device")  # a pipe would wait for ever
        with path.open("rb") as file:
            start = file.read(4)
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        raise InvalidInputError(
            f"{path} can't be read ({reason_of(exc)}); give the path of an .onnx file or an engine"
        ) from exc
    beside = path.with_name(path.name + ".json")
    return start in _ENGINE_MAGIC or path.suffix in (".engine", ".plan") or os.path.isfile(beside)


def inspect(
    file: Annotated[Path, typer.Argument(help="An ONNX file, or an engine beside its sidecar.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is inside an ONNX file or an engine, and whether this machine can run it.

    An engine is executable code: only one that fits its sidecar and this machine's GPU is
    deserialised, to show its layers; any other is hashed and its sidecar read.
    """
    found = inspect_engine(file) if _is_engine(file) else inspect_model(file)
    if as_json:
        print_json(found.to_dict())
        return
    print_fields({"file": f"{file} ({found.kind})", **{k: _text(k, v) for k, v in _shown(found)}})
    if found.operators:
        print_table(
            ("where", "operators"),
            [
                (where, ", ".join(f"{n} {op}" if n > 1 else op for op, n in counts.items()))
                for where, counts in found.operators.items()
            ],
        )
    for name, reason in found.runs.items():
        can = "yes" if name.startswith("build") else "can run it here"
        print_lines([f"{name}: {can if reason is None else reason}"])
    print_lines([f"problem: {problem}" for problem in found.problems])


def _shown(found: Inspection) -> list[tuple[str, Any]]:
    """The facts without those that are empty, or that another says too."""
    return [(k, v) for k, v in found.facts.items() if k != "options" and v not in (None, [], "")]


def _text(name: str, value: Any) -> str:
    if name in ("inputs", "outputs"):
        from .ports import show_ports

        return show_ports(value)
    if name == "bytes":
        return human_size(value)
    if name == "certificate":
        return f"{value['state']}: {value['message']}"
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
