"""`smoothl1-deploy inspect`: what is inside an ONNX file or an engine, and whether it runs here."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import open_file
from ..errors import (
    ArtefactError,
    InvalidInputError,
    ModelWarning,
    SmoothL1DeployError,
    reason_of,
)
from ._console import human_size, print_fields, print_json, print_lines, print_table
from ._options import AsJson

if TYPE_CHECKING:
    import onnx

    from ..tensorrt._engine import Sidecar
    from ..tensorrt._parse import NetworkPort

EXAMPLE = "smoothl1-deploy inspect loss.onnx"

#: How plans of tensorrt (10.x) and of tensorrt_rtx (1.7) begin.
_ENGINE_MAGIC = (b"ftrt", b"vtrt")


def _is_engine(path: Path) -> bool:
    from ..backends._base import ENGINE_SUFFIXES

    try:
        with open_file(path) as file:
            start = file.read(4)
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        raise InvalidInputError(
            f"{path} can't be read ({reason_of(exc)}); give the path of an .onnx file or an engine"
        ) from exc
    if path.suffix == ".json" and path.with_suffix("").suffix in ENGINE_SUFFIXES:
        raise InvalidInputError(
            f"{path} is the sidecar of an engine; give the engine, {path.with_suffix('')}"
        )
    if start in _ENGINE_MAGIC or _has_sidecar(path):
        return True
    if path.suffix in ENGINE_SUFFIXES:
        raise InvalidInputError(
            f"{path} is no engine: it doesn't begin as TensorRT's do, and has no sidecar that can "
            "be read; give the path of an .onnx file or an engine"
        )
    return False


def _has_sidecar(path: Path) -> bool:
    from .._artefact import sidecar_path
    from ..tensorrt._engine import Sidecar

    with contextlib.suppress(ArtefactError):
        return Sidecar.read(sidecar_path(path)).context_sha256 is None
    return False


def inspect(file: Path, *, as_json: AsJson = False) -> None:
    """Show what is inside an ONNX file or an engine, and whether this machine can run it.

    An engine is executable code: only one that fits its sidecar and this machine's GPU is
    deserialised; any other, also one that an ONNX file carries, is measured and not run.

    Options:
        file: An ONNX file, or an engine beside its sidecar.
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
        return show_ports(value)
    if name == "attached":
        parts = ("inputs", "outputs", "spec")
        return "; ".join(", ".join(_text("", loss.get(part)) for part in parts) for loss in value)
    if name == "engines":
        return "; ".join(_text("", engine) for engine in value)
    if name == "bytes":
        return human_size(value)
    if name == "certificate":
        return f"{value['state']}: {value['message']}"
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


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
        """JSON-ready, the facts among the rest."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            **self.facts,
            "operators": self.operators,
            "runs": self.runs,
            "problems": list(self.problems),
        }


def _attached(model: onnx.ModelProto, problems: list[str]) -> list[dict[str, Any]]:
    """The losses that `attach` grafted onto the model, as it notes them."""
    from .._model import read_attached

    try:
        return [loss.to_dict() for loss in read_attached(model)]
    except ArtefactError as exc:
        problems.append(str(exc))
        return []


def _certificate(path: Path, problems: list[str]) -> dict[str, Any]:
    """What the certificate beside a file says; one that speaks against the file is a problem."""
    from ..parity._certificate import read_certificate

    status = read_certificate(path)
    if status.state not in ("absent", "matches"):
        problems.append(f"{status.state} certificate: {status.message}")
    return status.to_dict()


def inspect_model(path: Path) -> Inspection:
    """Look into an ONNX file; a model of other origin is shown as far as it goes.

    Raises:
        ArtefactError: when it is missing or is no ONNX model.
    """
    from .._artefact import look_at, read_model, sha256
    from .._model import contradiction, engines_in, main_tensors
    from ..graph._metadata import CHANGED, content_hash, is_changed, read_route, read_spec

    model = look_at(str(path))
    wrong = contradiction(main_tensors(model).values())
    problems = [] if wrong is None else [wrong]
    engines, trusted, spec = engines_in(model), True, None
    if engines:
        try:
            read_model(str(path))
        except ArtefactError as exc:
            trusted = False
            problems.append(str(exc))
    try:
        spec = read_spec(model)
    except ArtefactError as exc:
        problems.append(str(exc))
    graph = model.graph
    inputs, outputs = graph_ports(model)
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    facts = {
        "spec": spec and spec.to_dict(),
        "attached": _attached(model, problems),
        "engines": [engine.to_dict() for engine in engines],
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
        "notes": [CHANGED] if is_changed(model) else [],
    }
    operators = {"graph": dict(Counter(node.op_type for node in graph.node))}
    for function in model.functions:
        operators[function.name] = dict(Counter(node.op_type for node in function.node))
    runs = {}
    if trusted:
        runs = _backends(str(path) if engines else model)
    if not engines:
        runs.update(_flavours(model, operators))
    return Inspection(path, "onnx", facts, operators, runs, tuple(problems))


def _backends(model: onnx.ModelProto | str) -> dict[str, str | None]:
    """Load the model into every backend of this machine."""
    from ..backends._base import BACKENDS, load

    runs: dict[str, str | None] = {}
    for name in BACKENDS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ModelWarning)  # it is among notes and problems
                load(model, name)
            runs[name] = None
        except SmoothL1DeployError as exc:
            runs[name] = str(exc)
    return runs


def _flavours(
    model: onnx.ModelProto, operators: dict[str, dict[str, int]]
) -> dict[str, str | None]:
    """Parse the model with every flavour; the layers of the network go into `operators`."""
    from ..tensorrt._flavour import FLAVOURS, get_flavour
    from ..tensorrt._parse import parse

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
    from .._artefact import sha256, sidecar_path
    from ..tensorrt._engine import Sidecar, read_verified

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
        "spec": sidecar.spec and sidecar.spec.to_dict(),
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
    from ..tensorrt._engine import read_engine
    from ..tensorrt._flavour import get_flavour
    from ..tensorrt._run import engine_layers

    try:
        engine = read_engine(path)
        return engine_layers(engine, get_flavour(engine.sidecar.flavour)), None
    except SmoothL1DeployError as exc:
        return [], str(exc)


def _engine_port(port: NetworkPort) -> dict[str, Any]:
    return {"name": port.name, "dtype": port.dtype, "shape": port.dims}


def _cannot_run(path: Path, sidecar: Sidecar) -> str | None:
    """Why a sound engine can't run here; None where nothing speaks against it."""
    from ..tensorrt._engine import diagnose, read_engine
    from ..tensorrt._flavour import current_gpu, get_flavour

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


def graph_ports(model: onnx.ModelProto) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Inputs (constants left out) and outputs: `name`, `dtype`, `shape` (None for any rank)."""
    from .._model import inputs_of, outputs_of

    return [*map(_port, inputs_of(model))], [*map(_port, outputs_of(model))]


def _port(value: onnx.ValueInfoProto) -> dict[str, Any]:
    from .._model import Port

    port = Port.of(value)
    shape = None if port.axes is None else [-1 if axis is None else axis for axis in port.axes]
    return {"name": port.name, "dtype": port.dtype, "shape": shape}


def show_ports(ports: Iterable[Mapping[str, Any]]) -> str:
    """`"input: float32[N, 16], target: float32[N, 16]"`."""
    return ", ".join(
        f"{port['name']}: {port['dtype']}"
        + (" of any rank" if port["shape"] is None else f"[{', '.join(map(str, port['shape']))}]")
        for port in ports
    )
