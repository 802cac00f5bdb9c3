"""`smoothl1-deploy inspect`: what is inside an ONNX file or an engine, and whether it runs here."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import open_file, write_atomic
from .._records import Record, plain
from ..errors import (
    ArtefactError,
    BackendUnavailableError,
    InvalidInputError,
    MissingDependencyError,
    ModelWarning,
    SmoothL1DeployError,
    reason_of,
)
from ._console import (
    human_size,
    print_fields,
    print_json,
    print_lines,
    print_prose,
    print_result,
    print_table,
    typed,
)
from ._options import AsJson, Next

if TYPE_CHECKING:
    import onnx

    from .._model import CarriedEngine, Loss
    from .._spec import LossSpec
    from ..tensorrt._engine import Sidecar

EXAMPLE = "smoothl1-deploy inspect loss.onnx"

#: How plans of tensorrt (10.x) and of tensorrt_rtx (1.7) begin.
_ENGINE_MAGIC = (b"ftrt", b"vtrt")


def inspect(file: Path, *, as_json: AsJson = False) -> Next:
    """Show what is inside an ONNX file or an engine, and whether this machine can run it.

    An engine is executable code: only one that fits its sidecar and this machine's GPU is
    deserialised; any other, also one that an ONNX file carries, is measured and not run.

    Options:
        file: An ONNX file, or an engine beside its sidecar.
    """
    found = inspect_engine(file) if _is_engine(file) else inspect_model(file)
    if as_json:
        print_json(found)
        return None
    print_prose(f"{file} is {found.summary}")
    facts = {name: _text(name, value) for name, value in found.facts.items() if name != "options"}
    print_fields({name: text for name, text in facts.items() if text})
    operators = [
        (where, ", ".join(f"{op}×{n}" if n > 1 else op for op, n in counts.items()))
        for where, counts in found.operators.items()
    ]
    if operators:
        print_table(("where", "operators"), operators)
    print_lines([""])
    said: dict[str, list[str]] = {}
    for name, reason in found.runs.items():
        told = reason or ("yes" if name.startswith("build") else "can run it here")
        if name in found.absent:
            told = "not on this machine; smoothl1-deploy doctor says why"
        said.setdefault(told, []).append(name)
    for told, names in said.items():
        print_prose(f"{', '.join(names)}: {told}")
    print_lines([f"problem: {problem}" for problem in found.problems])
    if found.facts.get("attached"):
        names = [port["name"] for port in found.facts["inputs"]]
        arrays = [word for name in names for word in ("--input", f"{name}={name}.npy")]
        return [  # what such a model is for
            typed("verify", file, "--certificate"),
            typed("run", file, *arrays),
            typed("build", file),
            typed("repository", "models", "--model", file),
        ]
    is_loss = found.kind == "onnx" and found.facts["spec"] is not None
    return [typed("verify", file, "--certificate")] if is_loss else None


def _is_engine(path: Path) -> bool:
    from .._artefact import sidecar_path
    from ..backends._base import ENGINE_SUFFIXES
    from ..tensorrt._engine import Sidecar

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
    if start in _ENGINE_MAGIC:
        return True
    with contextlib.suppress(ArtefactError):
        if Sidecar.read(sidecar_path(path)).context_sha256 is None:
            return True
    if path.suffix in ENGINE_SUFFIXES:
        raise InvalidInputError(
            f"{path} is no engine: it doesn't begin as TensorRT's do, and has no sidecar that can "
            "be read; give the path of an .onnx file or an engine"
        )
    return False


def _text(name: str, value: Any) -> str:
    """A fact for people; empty where there is nothing to show."""
    if value is None or value in ("", [], {}):
        return ""
    match name:
        case "inputs" | "outputs":
            return show_ports(value)
        case "attached":
            parts = ("inputs", "outputs", "spec")
            losses = ([_text("", loss.get(part)) for part in parts] for loss in value)
            return "; ".join(map(", ".join, losses))
        case "engines":
            return "; ".join(_text("", engine) for engine in value)
        case "bytes":
            return human_size(value)
        case "certificate":
            return f"{value['state']}: {value['message']}"
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


@dataclass(frozen=True, slots=True)
class Inspection(Record):
    """What a file holds.

    Attributes:
        path: of the file.
        kind: `"onnx"` or `"engine"`.
        summary: what it is, to stand behind "it is".
        facts: name -> what to show, in order; JSON-ready.
        operators: operator or layer type -> how many, by what contains them.
        runs: backend or flavour -> None where it can run the file here, else why not.
        absent: those of them that this machine lacks.
        problems: reasons not to trust the file.
    """

    path: Path
    kind: str
    summary: str
    facts: dict[str, Any]
    operators: dict[str, dict[str, int]] = field(default_factory=dict)
    runs: dict[str, str | None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, the facts among the rest."""
        entries = Record.to_dict(self)
        facts = entries.pop("facts")
        return {**entries, **facts}


@contextlib.contextmanager
def _listed(problems: list[str]) -> Iterator[None]:
    """What speaks against a part of the file is listed, and the rest is shown."""
    try:
        yield
    except ArtefactError as exc:
        problems.append(str(exc))


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
    from .._model import contradiction, engines_in, main_tensors, read_attached
    from ..graph._metadata import CHANGED, content_hash, is_changed, read_route, read_spec

    model = look_at(str(path))
    wrong = contradiction(main_tensors(model).values())
    problems = [] if wrong is None else [wrong]
    engines = engines_in(model)
    attached: Sequence[Any] = ()
    trusted, spec = not engines, None
    if engines:
        with _listed(problems):
            read_model(str(path))
            trusted = True
    with _listed(problems):
        spec = read_spec(model)
    with _listed(problems):
        attached = read_attached(model)
    inputs, outputs = graph_ports(model)
    facts = {
        "spec": spec,
        "attached": attached,
        "engines": engines,
        "route": read_route(model),
        "producer": f"{model.producer_name} {model.producer_version}".strip() or None,
        "graph": model.graph.name,
        "bytes": path.stat().st_size,
        "sha256": sha256(path.read_bytes()),
        "content_sha256": content_hash(model),
        "ir_version": model.ir_version,
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "inputs": inputs,
        "outputs": outputs,
        "certificate": _certificate(path, problems),
        "notes": [CHANGED] if is_changed(model) else [],
    }
    bodies = {"graph": model.graph, **{function.name: function for function in model.functions}}
    operators = {name: dict(Counter(n.op_type for n in body.node)) for name, body in bodies.items()}
    summary = _summary(model, spec, attached, engines)
    found = Inspection(path, "onnx", summary, plain(facts), operators, {}, problems)
    if trusted:
        _load(str(path) if engines else model, found)
    if not engines:
        _parse(model, found)
    return found


def _summary(
    model: onnx.ModelProto,
    spec: LossSpec | None,
    attached: Sequence[Loss],
    engines: Sequence[CarriedEngine],
) -> str:
    """What an ONNX model is."""
    from .._model import ATTACHED, metadata_of
    from ..graph._functions import DOMAIN
    from ..graph._metadata import SPEC, is_changed, is_served, read_route

    if engines:
        providers = ", ".join(dict.fromkeys(e.provider or "any provider" for e in engines))
        carried = "an engine" if len(engines) == 1 else f"{len(engines)} engines"
        said = f"an ONNX model that carries {carried} for {providers}"
        said += f", of a Smooth L1 loss: {_told(spec)}" if spec else ""
    elif attached:
        count = "a loss" if len(attached) == 1 else f"{len(attached)} losses"
        said = f"a model with {count} attached: " + "; ".join(
            f"{loss.outputs['loss']}, of {loss.inputs['input']} and {loss.inputs['target']} "
            f"({_told(loss.spec)})"
            for loss in attached
        )
    elif spec is None:
        damaged = {SPEC, ATTACHED} & metadata_of(model).keys()
        said = "an ONNX model " + (
            "whose loss is not known, since its metadata are damaged"
            if damaged
            else "without a loss of smoothl1-deploy's"
        )
    else:
        kind = "Huber" if spec.loss == "huber" else "Smooth L1"
        said = f"a {kind} loss ({_told(spec)}), by the route {read_route(model)}"
        if is_served(model):
            said += " with the shapes of a server"
        ours = [node.op_type for node in model.graph.node if node.domain == DOMAIN]
        is_whole = len(ours) == len(model.graph.node) == 1
        is_pass = is_whole or any("Elements" in name or "Totals" in name for name in ours)
        if is_pass and not spec.has_subnormal_beta:
            said += "; computed in one pass where our operators are registered"
    return said + ("; something else has changed it since" if is_changed(model) else "")


def _told(spec: LossSpec) -> str:
    """`mean per sample, beta 0.5, float32, with its gradient`."""
    knee = "beta" if spec.delta is None else "delta"
    known = "at run time" if spec.runtime_beta else spec.knee
    if spec.beta_shape:
        known = f"an array {list(spec.beta_shape)}{' at run time' * bool(spec.runtime_beta)}"
    return ", ".join(
        [
            spec.reduction + " per sample" * spec.per_sample,
            *[f"over the axes {', '.join(map(str, spec.axes or ()))}"] * bool(spec.axes),
            f"{knee} {known}",
            spec.dtype,
            *["with weights"] * bool(spec.weight),
            *["of what a mask selects"] * spec.mask,
            *["divided by an input"] * spec.divisor,
            *["0 where a mean is over nothing"] * (spec.empty == "zero"),
            *[f"with the {spec.elements} of its elements"] * bool(spec.elements),
            *["with its gradient"] * spec.gradient,
            *[f"times {spec.loss_weight}"] * (spec.loss_weight != 1.0),
        ]
    )


@contextlib.contextmanager
def _tried(name: str, found: Inspection) -> Iterator[None]:
    """Note under a name whether what is done within can be done with the file."""
    try:
        yield
        found.runs[name] = None
    except SmoothL1DeployError as exc:
        found.runs[name] = str(exc)
        if isinstance(exc, (MissingDependencyError, BackendUnavailableError)):
            found.absent.append(name)


def _load(model: onnx.ModelProto | str, found: Inspection) -> None:
    """Load the model into every backend, or where it is more than a loss, those that run it all."""
    from ..backends._base import Backend, backend_class, load
    from ..backends._names import BACKENDS

    for name in BACKENDS:
        if not found.facts["attached"] or backend_class(name).open is not Backend.open:
            with _tried(name, found), warnings.catch_warnings():
                warnings.simplefilter("ignore", ModelWarning)  # it is among notes and problems
                load(model, name)
    if found.facts["attached"] and found.runs["trt-network"]:
        del found.runs["trt-network"]  # it knows the layers of losses; that others build is below


def _parse(model: onnx.ModelProto, found: Inspection) -> None:
    """Parse the model with every flavour; the layers of the network are among the operators."""
    from ..tensorrt._flavour import FLAVOURS, get_flavour
    from ..tensorrt._parse import parse

    for name in FLAVOURS:
        with _tried(f"build with {name}", found):
            network = parse(model, get_flavour(name)).network
            layers = (network.get_layer(i) for i in range(network.num_layers))
            found.operators[f"{name} network"] = dict(Counter(layer.type.name for layer in layers))


def inspect_engine(path: Path) -> Inspection:
    """Look into an engine's sidecar; where the engine fits it and runs here, into its layers too.

    An engine is executable code: one that doesn't fit its sidecar is hashed and not deserialised.
    An engine whose sidecar is missing or doesn't fit it is shown with that problem.
    """
    from .._artefact import sha256, sidecar_path
    from ..tensorrt._engine import Sidecar, read_verified

    problems: list[str] = []
    with _listed(problems):
        read_verified(path)
    fits = not problems
    data = path.read_bytes()
    facts: dict[str, Any] = {
        "bytes": len(data),
        "sha256": sha256(data),
        "certificate": _certificate(path, problems),
    }
    try:
        sidecar = Sidecar.read(sidecar_path(path))
    except ArtefactError:
        summary = "a TensorRT engine that no sidecar vouches for; it is not used"
        return Inspection(path, "engine", summary, facts, problems=problems)
    layers, reason = _layers(path, sidecar)
    facts = {
        "spec": sidecar.spec,
        "graph": sidecar.graph_name,
        **facts,
        "onnx_sha256": sidecar.onnx_sha256,
        "flavour": f"{sidecar.flavour} {sidecar.version}",
        "compute_capabilities": sidecar.options.compute_capabilities,
        "profile": str(sidecar.profile),
        "flags": sidecar.flags,
        "options": sidecar.options,
        **{
            side: [{"name": port.name, "dtype": port.dtype, "shape": port.dims} for port in ports]
            for side, ports in (("inputs", sidecar.inputs), ("outputs", sidecar.outputs))
        },
        "gpu": sidecar.gpu,
        "built_at": sidecar.built_at,
        "build_seconds": sidecar.build_seconds,
        "tool_version": sidecar.tool_version,
        "notes": sidecar.notes,
        "layers": layers,
    }
    of = f"a Smooth L1 loss ({_told(sidecar.spec)})" if sidecar.spec else sidecar.graph_name
    summary = f"a TensorRT engine ({sidecar.flavour} {sidecar.version}) of {of}"
    if not fits:
        summary += ", says its sidecar, which doesn't fit it"
    runs = {sidecar.flavour: reason}
    return Inspection(path, "engine", summary, plain(facts), {}, runs, problems)


def _layers(path: Path, sidecar: Sidecar) -> tuple[list[str], str | None]:
    """The layers that the engine inspector names; or none, and why the engine can't run here."""
    from ..tensorrt._engine import diagnose, read_engine
    from ..tensorrt._flavour import current_gpu, get_flavour
    from ..tensorrt._run import engine_layers

    gpu = current_gpu()
    if gpu is None:
        return [], "this machine has no NVIDIA GPU whose driver answers"
    built_for = sidecar.options.compute_capabilities
    if built_for and "current" not in built_for and gpu.compute_capability not in built_for:
        return [], (
            f"it was built for compute capability {', '.join(built_for)}, "
            f"the GPU here ({gpu.name}) has {gpu.compute_capability}"
        )
    try:
        engine, flavour = read_engine(path), get_flavour(sidecar.flavour)
        if problems := diagnose(engine.data, flavour):
            return [], f"the runtime says {', '.join(problems)}"
        return engine_layers(engine, flavour), None
    except SmoothL1DeployError as exc:
        return [], str(exc)


def write_shown(
    path: Path, model: onnx.ModelProto, spec: LossSpec, route: str, as_json: bool
) -> None:
    """Write a model whose loss is of `spec`, and say what was written."""
    from .._artefact import sha256

    data = model.SerializeToString(deterministic=True)
    write_atomic(path, data)
    inputs, outputs = graph_ports(model)
    facts = {"route": route, "spec": spec.to_dict(), "inputs": inputs, "outputs": outputs}
    digest = sha256(data)
    told = {name: _text(name, facts[name]) for name in ("spec", "route", "inputs", "outputs")}
    told = {"wrote": f"{path}, {human_size(len(data))}", **told, "sha256": digest}
    found = {"path": path, "bytes": len(data), "sha256": digest, **facts}
    print_result(found, as_json, lambda: print_fields(told))


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
