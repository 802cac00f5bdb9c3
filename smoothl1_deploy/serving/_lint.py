"""The lint of a Triton model repository, of this tool or of anyone.

A Triton says what it refuses (`_lint_server`); the rules here are for what it takes and answers
wrongly. docs/serving-repository.md lists them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx

from .._artefact import read_model, sha256, sidecar_path
from .._files import read_file
from .._model import Loss, engines_in, inlined, inputs_of, main_tensors
from .._records import Record
from ..errors import ArtefactError, CarriedEngineError, reason_of
from ..graph._attach import read_losses
from ..graph._metadata import CHANGED, is_changed
from ..ops import is_library
from ..parity._certificate import CertificateStatus, read_certificate
from ..tensorrt._engine import Sidecar, read_verified
from ._config import (
    CONFIG_FILE,
    ONNX_FILE,
    ModelPorts,
    TensorPort,
    engine_ports,
    kind_of,
    onnx_ports,
    read_config,
)
from ._graph import why_unbatched
from ._lint_server import refusals

#: Rule -> what to do; docs/serving-repository.md says what each rule is about.
RULES: Mapping[str, str] = {
    "refused": "mend what it names",
    "no-config": "write one, or let smoothl1-deploy repository write it",
    "bad-config": "mend the text where it says so",
    "no-model-file": "put it there, or delete the version's folder",
    "bad-model": "write the file again",
    "engine-inside": "serve the model that it was built from",
    "damaged-metadata": "write the model again with smoothl1-deploy repository",
    "changed-model": "smoothl1-deploy verify --certificate; a green certificate settles it",
    "unknown-tensor": "write the names as the model has them",
    "missing-input": "add it, or let smoothl1-deploy repository write the config",
    "wrong-dtype": "write the data_type as the model has it",
    "wrong-dims": "write the dims as the model has them, without the rows where max_batch_size is "
    "above 0; for a number the graph needs the shape [1], which repository --model gives it",
    "batched-reduction": "write max_batch_size: 0, leave dynamic_batching out, and give every dims "
    "its axis of rows (-1); for one score a row export with --per-sample",
    "not-batchable": "write max_batch_size: 0, and give every dims its axis of rows (-1)",
    "missing-guard": "put Reshape(target, Shape(input)) before the loss, as smoothl1-deploy "
    "repository --model does",
    "warmup-batch": "write a batch_size that the model takes",
    "operator-library": "put it there, or lint where the server runs",
    "other-tensorrt": "build it with --flavour tensorrt in the container that serves it",
    "stale-plan": "build it again from that file",
    "damaged-plan": "copy the plan and its sidecar again, or build it again",
    "stale-certificate": "write a new one with smoothl1-deploy verify --certificate",
    "red-certificate": "write a new one with smoothl1-deploy verify --certificate",
    "damaged-certificate": "write a new one with smoothl1-deploy verify --certificate",
}

#: A rule, and what is wrong, with the values.
Fault = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Finding(Record):
    """One thing that is wrong with a model repository, and what to do about it.

    Attributes:
        model: the name of the model's folder.
        rule: a name in `RULES`.
        problem: what is wrong, with the values.
    """

    model: str
    rule: str
    problem: str
    derived: ClassVar = ("remedy",)

    @property
    def remedy(self) -> str:
        """What to do."""
        return RULES[self.rule]


@dataclass(frozen=True, slots=True)
class LintReport(Record):
    """What the lint found; it is true where it found nothing.

    Attributes:
        repository: the folder that was checked.
        models: the names of its models.
        findings: what is wrong, in the order of the models.
        certificates: the path of each model file in the repository -> what its certificate says.
        note: why no Triton was asked what it refuses; empty where one was asked.
    """

    repository: Path
    models: tuple[str, ...]
    findings: tuple[Finding, ...]
    certificates: Mapping[str, CertificateStatus]
    note: str
    derived: ClassVar = ("ok",)

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def __bool__(self) -> bool:
        return self.ok


def lint(
    repository: str | os.PathLike[str], *, tensorrt_version: str | None = None, server: bool = True
) -> LintReport:
    """Check every model of a repository. Nothing in it is run.

    Args:
        repository: a folder of model folders.
        tensorrt_version: the version of TensorRT in the server that is to load the plans, as far as
            it is known; without it the plans are held against each other.
        server: whether to have a Triton of this machine load the configs, where there is one.

    Raises:
        ArtefactError: when there is no such folder, or it holds no model.
        MissingDependencyError: without tritonclient.
    """
    root = Path(repository)
    if not os.path.isdir(root):
        raise ArtefactError(f"{root} is no folder; give that of a Triton model repository")
    if (root / CONFIG_FILE).is_file():
        raise ArtefactError(f"{root} is a model; give the folder above it, the repository")
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != "."]
    if not folders:
        raise ArtefactError(f"{root} holds no model; write one with smoothl1-deploy repository")
    visits = [Visit(folder) for folder in folders]
    findings = [finding for visit in visits for finding in visit.findings]
    sidecars = {visit.name: visit.sidecar for visit in visits if visit.sidecar is not None}
    findings += _check_versions(sidecars, tensorrt_version)
    readable = [visit for visit in visits if visit.config is not None]
    refused, note = refusals(readable) if server else ({}, "it was not asked")
    findings += [Finding(name, "refused", words) for name, words in refused.items()]
    return LintReport(
        root,
        tuple(visit.name for visit in visits),
        tuple(sorted(findings, key=lambda finding: finding.model)),
        {file: status for visit in visits for file, status in visit.certificates.items()},
        note,
    )


class Visit:
    """One model folder, looked through.

    Attributes:
        config: the message of its config; None where the config can't be read.
        kind: the backend, platform and file name that Triton completes the config to; None where
            Triton knows none.
        sidecar: what its plan was built with; None without a plan that has a sidecar.
        certificates: the path of each model file in the repository -> what its certificate says.
        versions: the folders that Triton takes for versions, whose names are numbers from 1 on.
        files: the names of what lies in these folders.
        sound: version -> its ONNX file, where that can be read and asks for no operator library
            but this installation's.
        findings: what is wrong with the model.
    """

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.folder = folder
        self.config: Any = None
        self.kind: tuple[str, str, str] | None = None
        self.sidecar: Sidecar | None = None
        self.certificates: dict[str, CertificateStatus] = {}
        numbers = [
            p for p in folder.iterdir() if re.fullmatch("[1-9][0-9]*", p.name) and p.is_dir()
        ]
        self.versions = sorted(numbers, key=lambda path: int(path.name))
        self.files = {path.name for version in self.versions for path in version.iterdir()}
        self.sound: dict[Path, Path] = {}
        self.findings = [Finding(self.name, *fault) for fault in self._faults()]

    def _faults(self) -> Iterator[Fault]:
        try:
            self.config = config = read_config(read_file(self.folder / CONFIG_FILE))
        except FileNotFoundError:
            yield (
                "no-config",
                f"there is no {CONFIG_FILE}, and a server that guesses one guesses batching too",
            )
            return
        except (OSError, ArtefactError) as exc:
            yield "bad-config", f"{CONFIG_FILE}: {reason_of(exc)}"
            return
        yield from _check_config(config)
        self.kind = kind_of(config, self.files)
        known = config.default_model_filename or (self.kind and self.kind[2])
        # A model may have a plan for each kind of GPU in the place of one file.
        files = sorted(config.cc_model_filenames.values()) or [known]
        for version in self.versions if config.platform != "ensemble" else ():
            for file in filter(None, files):
                if (version / file).exists():
                    yield from self._check_file(version, version / file)
                else:
                    yield "no-model-file", f"version {version.name} has no {file}"

    def _check_file(self, version: Path, path: Path) -> Iterator[Fault]:
        if path.is_file():
            status = read_certificate(path)
            self.certificates[f"{self.name}/{version.name}/{path.name}"] = status
            if status.state not in ("absent", "matches"):
                yield f"{status.state}-certificate", status.message
        if path.suffix == ".onnx":
            yield from self._check_onnx(version, path / path.name if path.is_dir() else path)
        elif path.suffix == ".plan":
            yield from self._check_plan(path)

    def _check_onnx(self, version: Path, path: Path) -> Iterator[Fault]:
        try:
            model = read_model(path)
        except CarriedEngineError as exc:
            yield "engine-inside", str(exc)
            return
        except ArtefactError as exc:
            yield "bad-model", str(exc)
            return
        # The lint's server lacks the provider of an engine, and must not load an unread library.
        libraries = self.config.model_operations.op_library_filename
        if all(map(is_library, libraries)) and not engines_in(model):
            self.sound[version] = path
        losses: tuple[Loss, ...] = ()
        try:
            losses = read_losses(model)
        except ArtefactError as exc:
            yield "damaged-metadata", str(exc)
        if is_changed(model) and read_certificate(path).state != "matches":
            yield "changed-model", CHANGED
        ports = onnx_ports(model)
        yield from _check_against_file(self.config, ports, losses)
        # Where Triton batches, it compares the rows of the inputs itself.
        several = any(port.dims is not None and port.dims.count(-1) > 1 for port in ports.inputs)
        asked = several or not self.config.max_batch_size
        for target, input in unguarded(model, losses) if asked else ():
            yield (
                "missing-guard",
                f"a {target!r} of one row would be broadcast to the rows of {input!r}, and the "
                "answer be wrong with status 200",
            )

    def _check_plan(self, plan: Path) -> Iterator[Fault]:
        """What speaks against a plan by its sidecar; nothing is told of a plan without one."""
        if not sidecar_path(plan).exists():
            return
        try:
            self.sidecar = sidecar = read_verified(plan).sidecar
        except ArtefactError as exc:
            yield "damaged-plan", str(exc)
            return
        if sidecar.flavour != "tensorrt":
            yield (
                "other-tensorrt",
                f"{plan.name} was built by {sidecar.flavour} {sidecar.version}, and Triton's "
                "backend loads plans of tensorrt alone",
            )
        # The graph of the model that this one is named after.
        origin = self.folder.parent / self.name.removesuffix("_trt") / plan.parent.name / ONNX_FILE
        named = self.name.endswith("_trt") and origin.is_file()
        if named and sha256(origin.read_bytes()) != sidecar.onnx_sha256:
            yield (
                "stale-plan",
                f"{plan.name} was built from another graph than {'/'.join(origin.parts[-3:])}, the "
                "model it is named after",
            )
        losses = () if sidecar.spec is None else (Loss.of(sidecar.spec),)
        yield from _check_against_file(self.config, engine_ports(sidecar), losses)


# Plans and the server's TensorRT


def _check_versions(sidecars: Mapping[str, Sidecar], version: str | None) -> Iterator[Finding]:
    """Plans that the server's TensorRT can't load: a TensorRT loads the plans of its own version.

    Args:
        sidecars: model -> the sidecar of its plan.
        version: the version of the server's TensorRT, as far as it is known (`"10.13"`); None holds
            the plans against each other.
    """
    own = {name: car for name, car in sidecars.items() if car.flavour == "tensorrt"}
    versions = sorted({car.version for car in own.values()})
    for model, car in own.items():
        other = None
        if version is not None:
            other = None if _runs(car, version) else f"the server has {version}"
        elif len(versions) > 1:
            other = f"the plans of this repository by {' and '.join(versions)}; a server has one"
        if other:
            problem = f"its plan was built by TensorRT {car.version}, {other}"
            yield Finding(model, "other-tensorrt", problem)


def _runs(sidecar: Sidecar, version: str) -> bool:
    """Whether TensorRT of a version loads the plan of a sidecar."""
    numbers = zip(sidecar.version.split("."), version.split("."), strict=False)
    return all(built == server for built, server in numbers)


# A config: by itself, and against its model file


def _check_config(config: Any) -> Iterator[Fault]:
    """What is wrong with a config whatever the model file is."""
    most = max(config.max_batch_size, 1)
    for sample in config.model_warmup:
        if sample.batch_size > most:
            yield (
                "warmup-batch",
                f"the warm-up {sample.name!r} sends {sample.batch_size} requests in one batch, and "
                f"the model takes {most}; Triton 2.51 hangs or crashes over it",
            )
    for name in config.model_operations.op_library_filename:
        if not os.path.isfile(name):
            yield "operator-library", f"the server is to load the library {name!r}; there is none"


def _check_against_file(
    config: Any, ports: ModelPorts, losses: tuple[Loss, ...]
) -> Iterator[Fault]:
    """Where a config and the inputs and outputs of its model file differ."""
    yield from _check_batching(config, ports, losses)
    inputs = {port.name: port for port in (*ports.inputs, *ports.defaults)}
    outputs = {port.name: port for port in ports.outputs}
    for kind, entries, known in (
        ("input", config.input, inputs),
        ("output", config.output, outputs),
    ):
        for entry in entries:
            if entry.name in known:
                yield from _check_port(kind, entry, known[entry.name], config.max_batch_size > 0)
            else:
                has = ", ".join(map(repr, known)) or "none"
                yield (
                    "unknown-tensor",
                    f"the config has the {kind} {entry.name!r}, the model has {has}",
                )
    for name in sorted({port.name for port in ports.inputs} - set(_fed(config))):
        yield (
            "missing-input",
            f"the model takes the input {name!r}, and the config doesn't have it",
        )


def _fed(config: Any) -> Iterator[str]:
    """The inputs that a server gives a model: those of its callers, and those it makes itself."""
    yield from (port.name for port in config.input)
    yield from (port.name for port in config.sequence_batching.control_input)
    yield from (state.input_name for state in config.sequence_batching.state)
    yield from (name for port in config.batch_input for name in port.target_name)


def _check_batching(config: Any, ports: ModelPorts, losses: tuple[Loss, ...]) -> Iterator[Fault]:
    dynamic = config.HasField("dynamic_batching")
    reason = why_unbatched(losses, ports) if config.max_batch_size > 0 or dynamic else None
    if reason is None:
        return
    reduces = any(loss.spec.mixes_rows for loss in losses)
    reduces |= any(port.without_rows for port in ports.outputs)
    if config.max_batch_size > 0 or reduces:
        yield (
            "batched-reduction" if reduces else "not-batchable",
            f"max_batch_size is {config.max_batch_size}"
            + (" and dynamic_batching is on" if dynamic else "")
            + f", but {reason}",
        )


def _check_port(kind: str, entry: Any, port: TensorPort, batched: bool) -> Iterator[Fault]:
    names = type(entry).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    given = names[entry.data_type].name if entry.data_type in names else str(entry.data_type)
    if given != port.data_type:
        yield (
            "wrong-dtype",
            f"the config has the {kind} {entry.name!r} as {given}, the model as {port.data_type}",
        )
    ragged = kind == "input" and (entry.allow_ragged_batch or entry.is_shape_tensor)
    # A graph without rows is a finding of its own, and Triton refuses a port without dims.
    if port.dims is None or not entry.dims or ragged or (batched and port.without_rows):
        return
    dims = [*[-1] * batched, *(entry.reshape.shape if entry.HasField("reshape") else entry.dims)]
    if len(dims) != len(port.dims) or any(
        own not in (-1, dim) for own, dim in zip(port.dims, dims, strict=True)
    ):
        rows = " with the rows of a batch" if batched else ""
        yield (
            "wrong-dims",
            f"the {kind} {entry.name!r} has the dims {dims}{rows}, in the model {[*port.dims]}",
        )


# Is the target of a loss held against the shape of its input?

#: Operators that leave a tensor's rows as they are.
_TRANSPARENT = ("Cast", "Identity")
_GUARDED = (*_TRANSPARENT, "Reshape")
#: The operators that make a distance of a difference.
_DISTANCE = ("Abs", "Clip", "Mul", "Pow", "ReduceL1", "ReduceL2", "ReduceSumSquare", "Sign")


def unguarded(model: onnx.ModelProto, losses: tuple[Loss, ...]) -> list[tuple[str, str]]:
    """Pairs (target, input) where a target of one row would be broadcast to the input's rows.

    Args:
        model: any model.
        losses: what its metadata say that it computes; empty for a model of other origin.
    """
    graph = _Graph(inlined(model))
    pairs = list(_known(graph, losses)) if losses else list(_recognised(graph))
    return list(dict.fromkeys(pairs))


class _Graph:
    """The nodes of a graph without functions, by what they read and write."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.made_by = {name: node for node in self.nodes for name in node.output}
        self.ports = {value.name for value in inputs_of(model)}
        self.constants = {tensor.name for tensor in model.graph.initializer}
        self._shapes = {
            tensor.name: [dim if isinstance(dim, int) else -1 for dim in tensor.shape or ()]
            for tensor in main_tensors(model).values()
        }

    def origin(self, tensor: str, through: tuple[str, ...] = _TRANSPARENT) -> str:
        """The first tensor with the rows of this one."""
        node = self.made_by.get(tensor)
        if node is None or node.op_type not in through:
            return tensor
        return self.origin(node.input[0], through)

    def ancestors(self, tensor: str) -> set[str]:
        found, waiting = set[str](), [tensor]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                node = self.made_by.get(name)
                waiting += [] if node is None else node.input
        return found

    def alike(self, a: str, b: str) -> bool:
        """Whether both tensors are declared in one shape that has an axis of rows.

        Names of axes don't count, since shape inference invents them.
        """
        shape = self._shapes.get(a) or [0]
        return shape[0] == -1 and shape == self._shapes.get(b)

    def is_guarded(self, tensor: str, like: str) -> bool:
        """Whether a tensor is reshaped to a shape that is made of another's."""
        return any(
            node.op_type == "Reshape"
            and self.origin(node.input[0], _GUARDED) == tensor
            and like in self.ancestors(node.input[1])
            for node in self.nodes
        )


def _known(graph: _Graph, losses: tuple[Loss, ...]) -> Iterator[tuple[str, str]]:
    """The unguarded pairs of the losses that a model says it computes."""
    for loss in losses:
        input = loss.inputs["input"]
        sources = graph.ancestors(input)
        for role in ("target", "weight", "mask"):
            tensor = loss.inputs.get(role)
            if tensor is None or not graph.alike(tensor, input):
                continue
            origin = graph.origin(tensor)
            rowless = origin in graph.constants or origin in sources
            if not rowless and not graph.is_guarded(origin, input):
                yield tensor, input


def _recognised(graph: _Graph) -> Iterator[tuple[str, str]]:
    """The unguarded pairs of inputs whose difference a graph makes into a distance."""
    for node in graph.nodes:
        if node.op_type != "Sub":
            continue
        pair = [graph.origin(name) for name in node.input]
        if pair[0] == pair[1] or not set(pair) <= graph.ports:
            continue
        users = (other.op_type for other in graph.nodes if node.output[0] in other.input)
        if not {*users}.isdisjoint(_DISTANCE) and graph.alike(pair[0], pair[1]):
            yield pair[1], pair[0]
