"""Artefacts on disk and in memory: read without trust, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from ._files import read_file
from ._model import (
    DTYPE_OF_ELEMENT,
    ENGINE_OPERATOR,
    Port,
    check_trust,
    element_name,
    engines_in,
    external,
    inputs_of,
    metadata_of,
    outputs_of,
)
from ._shapes import check_size
from ._spec import ELEMENTS, LossSpec
from .errors import ArtefactError, CarriedEngineError, SpecError, is_shortage, reason_of
from .graph._metadata import HASH, is_changed, read_spec, sign

#: What an input of a loss artefact can be for.
ROLES = ("input", "target", "weight", "mask", "beta", "divisor", "grad_output")
#: Those that are one number.
NUMBERS: tuple[str, ...] = ("beta", "divisor")

ModelSource = onnx.ModelProto | bytes | str | os.PathLike[str]


def sha256(data: bytes) -> str:
    """The sha256 of `data`, in hex."""
    return hashlib.sha256(data).hexdigest()


def seal(entries: Mapping[str, Any]) -> bytes:
    """The JSON of `entries` and of their own sha256, by which `read_sealed` knows damage."""
    return _text({**entries, "sha256": sha256(_text(entries))})


def _text(entries: Mapping[str, Any]) -> bytes:
    return (json.dumps(entries, indent=1, sort_keys=True) + "\n").encode()


def sidecar_path(engine: Path) -> Path:
    """The path of an engine's sidecar: `loss.engine.json` of `loss.engine`."""
    return engine.with_name(engine.name + ".json")


def read_sealed(path: Path) -> dict[str, Any]:
    """The entries of an engine's sidecar, read without trust.

    Raises:
        ArtefactError: when it is missing, damaged, or changed since it was written.
    """
    try:
        raw = read_file(path)
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        raise ArtefactError(
            f"{path}, the engine's sidecar, can't be read ({reason_of(exc)}). An engine is "
            "executable code: build it again"
        ) from exc
    try:
        entries = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise ArtefactError(f"{path} is no JSON ({exc}); build the engine again") from exc
    if not isinstance(entries, dict):
        raise ArtefactError(f"{path} holds no JSON object; build the engine again")
    claimed = entries.pop("sha256", None)
    if claimed != sha256(_text(entries)):
        raise ArtefactError(
            f"{path} was damaged or changed: its content doesn't match its own sha256 entry; "
            "build the engine again"
        )
    return entries


def read_model(source: ModelSource) -> onnx.ModelProto:
    """An ONNX model from a `ModelProto`, its bytes, or a path.

    A file that carries an engine (the operator EPContext of ONNX Runtime) is read where it is of
    this package's making and fits its sidecar. The engine is then inside the model, also where the
    file only names it: the very bytes that were verified.

    Raises:
        ArtefactError: when there is no such file or its content is no ONNX model, and for one that
            nests without end; a `CarriedEngineError` for any other engine.
        MemoryError, OSError: where the machine lacks memory or files for it.
    """
    model = look_at(source)
    for engine in engines_in(model):
        problem = "bytes and messages have none beside them; give the path of the file"
        if isinstance(source, (str, os.PathLike)):
            try:
                return _with_own_engine(Path(source))
            except ArtefactError as exc:
                problem = str(exc)
        raise CarriedEngineError(
            f"the model carries {engine}, and an engine is executable code. It is not used unless "
            "smoothl1-deploy build --format epcontext wrote it and its sidecar fits: " + problem
        )
    return model


def _with_own_engine(path: Path) -> onnx.ModelProto:
    """The model at `path` with its engine inside; raises ArtefactError where they don't fit.

    An engine that is only named would be looked for once more by whoever gets the model as a
    message, and in the current folder.
    """
    entries = read_sealed(sidecar_path(path))
    model = look_at(_fitting(path, entries.get("context_sha256")))
    engines = engines_in(model)
    if len(engines) > 1 or [node.op_type for node in model.graph.node] != [ENGINE_OPERATOR]:
        raise ArtefactError(f"{path} holds more than the node of one engine")
    content, digest = engines[0].content, entries.get("engine_sha256")
    if not engines[0].inside:
        content = _fitting(path.parent / os.fsdecode(content), digest)
        for attribute in model.graph.node[0].attribute:
            if attribute.name == "embed_mode":
                attribute.i = 1
            elif attribute.name == "ep_cache_context":
                attribute.s = content
        if HASH in metadata_of(model):
            sign(model)
    elif sha256(content) != digest:
        raise ArtefactError(f"the engine in {path} is another than its sidecar describes")
    return model


def _fitting(path: Path, digest: object) -> bytes:
    """The content of a file whose sidecar knows its sha256."""
    try:
        data = read_file(path)
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        if is_shortage(exc):
            raise
        raise ArtefactError(f"{path} can't be read ({reason_of(exc)}); build it again") from exc
    if sha256(data) != digest:
        raise ArtefactError(
            f"{path} is not what its sidecar describes: it was damaged or replaced; build it again"
        )
    return data


def look_at(source: ModelSource) -> onnx.ModelProto:
    """What `read_model` reads, and any engine that it would refuse: not to be run, nor passed on.

    Raises:
        ArtefactError: as `read_model` does for all but engines.
    """
    model = source if isinstance(source, onnx.ModelProto) else _read(source)
    check_trust(model)
    for name, _ in external(model):  # loading leaves none
        raise ArtefactError(
            f"the data of {name!r} lie in another file and were not loaded: bytes and messages "
            "have no folder to look in; give the path of the model, or read it with onnx.load(path)"
        )
    return model


def _read(source: bytes | str | os.PathLike[str]) -> onnx.ModelProto:
    if isinstance(source, bytes):
        what = f"{len(source)} bytes"
    elif isinstance(source, (str, os.PathLike)):
        what = os.fspath(source)
        if not os.path.isfile(what):  # unlike Path.is_file, False for every impossible name
            kind = "is a folder" if os.path.isdir(what) else "does not exist"
            raise ArtefactError(f"{what} {kind}; give the path of an .onnx file")
    else:
        raise ArtefactError(
            f"expected an onnx.ModelProto, bytes or a path, got {type(source).__name__}"
        )
    try:
        if isinstance(source, bytes):
            model = onnx.load_model_from_string(source)
        else:
            model = onnx.load(what, load_external_data=False)
            _load_weights(model, what)
    except ArtefactError:
        raise
    except Exception as exc:  # protobuf, the checker and the file system each raise their own
        if is_shortage(exc):
            raise
        raise ArtefactError(
            f"{what} can't be read as an ONNX model ({exc}); it is damaged, or of another format"
        ) from exc
    # Protobuf reads some text files as a message without content.
    if not model.ir_version or not model.graph.output:
        raise ArtefactError(f"{what} holds no ONNX graph; it is damaged, or of another format")
    return model


_LARGE = 1 << 30  # bytes of weights; fewer are no harm, however often a file is read for them
_MOST_TIMES = 4  # how often a file is read; tensors that share their weights read it twice


def _load_weights(model: onnx.ModelProto, what: str) -> None:
    """Read the weights that lie in other files, once it is known that there is room for them.

    protobuf (6.33) ends the process where it gets no memory for them.
    """
    folder = os.path.dirname(what)
    files: dict[tuple[int, int], int] = {}
    asked = largest = 0
    for _, said in external(model):
        path = os.path.join(folder, said.get("location", ""))
        if os.path.isfile(path):  # what is wrong with any other, onnx says
            there = os.stat(path)
            files[there.st_dev, there.st_ino] = there.st_size
            rest = there.st_size - int(said.get("offset", 0))
            size = min(int(said.get("length", rest)), rest)
            asked, largest = asked + size, max(largest, size)
    held = sum(files.values())
    if asked > _LARGE and asked > _MOST_TIMES * held:
        raise ArtefactError(
            f"the tensors of {what} ask for {asked:,} bytes of files that have {held:,}; it is "
            "damaged or made to harm"
        )
    if asked:
        try:
            mmap.mmap(-1, asked + largest).close()  # a message takes a copy of what was read
        except OSError as exc:
            raise MemoryError(f"the weights of {what} take {asked:,} bytes") from exc
    onnx.load_external_data_for_model(model, folder)


@dataclass(frozen=True, slots=True)
class Signature:
    """What a loss artefact takes and gives.

    Attributes:
        inputs: role (one of `ROLES`) -> the graph input that plays it.
        outputs: in the order of the graph.
    """

    inputs: Mapping[str, Port]
    outputs: tuple[Port, ...]

    @property
    def input(self) -> Port:
        """The port of the prediction."""
        return self.inputs["input"]

    @property
    def target(self) -> Port:
        """The port of what it is compared with."""
        return self.inputs["target"]

    @property
    def loss(self) -> Port:
        """The output that is the loss: the one of that name, or the first."""
        return next((port for port in self.outputs if port.name == "loss"), self.outputs[0])


def _port(value: onnx.ValueInfoProto, role: str = "") -> Port:
    port, element = Port.of(value), value.type.tensor_type.elem_type
    if role == "mask" and port.dtype != "bool":
        raise ArtefactError(
            f"{value.name!r} has the element type {port.dtype}; a mask is boolean, and an input "
            "of numbers that multiply the losses is called weight"
        )
    if element not in DTYPE_OF_ELEMENT and role != "mask":
        named = element_name(element).removeprefix("element type ")
        raise ArtefactError(
            f"{value.name!r} has the element type {named}; "
            f"a loss artefact takes and gives {', '.join(DTYPE_OF_ELEMENT.values())}"
        )
    try:
        check_size(port.shape or (), f"the shape of {value.name!r}")
    except SpecError as exc:
        raise ArtefactError(str(exc)) from exc
    return port


#: Names that say of one of two inputs, declared in any order, that it is the target.
_TARGET_NAMES = {"target", "targets", "label", "labels", "y_true", "gt", "ground_truth"}
#: Outputs that mean something here; a loss beside others is found by its name.
_OUTPUT_NAMES = ("loss", *ELEMENTS, "grad_input")


def _roles(names: Iterable[str]) -> dict[str, str]:
    """The graph input that plays each role."""
    known = list(names)
    if {"input", "target"} <= set(known) <= set(ROLES):
        return {role: role for role in ROLES if role in known}
    if len(known) != 2:
        raise ArtefactError(
            f"the model has {len(known)} inputs ({_listed(known)}); a loss artefact has two, or "
            f"inputs called {', '.join(ROLES)}. verify can be told which are compared "
            "(input_name, target_name)"
        )
    return dict(zip(ROLES, known, strict=False))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def signature(model: onnx.ModelProto) -> Signature:
    """The signature of a loss artefact: inputs called by their roles, or just two inputs.

    Raises:
        ArtefactError: when it can't be told which inputs are which, or they differ in dtype.
    """
    fed = {value.name: value for value in inputs_of(model)}
    ports = {role: _port(fed[name], role) for role, name in _roles(fed).items()}
    input, target = ports["input"], ports["target"]
    if input.dtype != target.dtype:
        raise ArtefactError(
            f"the model takes {input.name!r} as {input.dtype} and {target.name!r} as "
            f"{target.dtype}; a loss artefact takes both in one dtype"
        )
    return Signature(ports, tuple(map(_port, outputs_of(model))))


def check_spec(signature: Signature, spec: LossSpec) -> None:
    """Refuse a spec, anyone's or of a model's metadata, that doesn't fit the model's ports.

    Raises:
        ArtefactError: where dtype, inputs or the output of the gradient differ.
    """
    if signature.input.dtype != spec.dtype:
        raise ArtefactError(
            f"the model takes {signature.input.dtype}, the spec says {spec.dtype}; give the spec "
            f"of what the model computes, with the dtype {signature.input.dtype}"
        )
    if set(signature.inputs) != set(spec.inputs):
        raise ArtefactError(
            f"the model takes {', '.join(signature.inputs)}, the spec {', '.join(spec.inputs)}; "
            "give the spec of what the model computes"
        )
    for name in spec.outputs[1:]:
        if all(port.name != name for port in signature.outputs):
            raise ArtefactError(f"the spec has an output {name}, and the model none of that name")


def select_ports(
    model: onnx.ModelProto,
    input_name: str | None = None,
    target_name: str | None = None,
    output_name: str | None = None,
) -> onnx.ModelProto:
    """`model` with its inputs in the order input, target, and no output but those compared.

    A model that is so already comes back as it is, and so does one that carries its spec: its
    names are its roles, until something else has changed it. Otherwise the result is a copy, so
    that every backend finds the same inputs and outputs without being told.

    Args:
        model: anyone's.
        input_name: the graph input to compare; None takes the one called `input`, or the first
            of two, or the second where the first has a target's name (`label`, `y_true`, ...).
        target_name: the one to compare it with, likewise.
        output_name: the output that is the loss; None takes the one called `loss`, or the only one.

    Raises:
        ArtefactError: on a name the graph doesn't have, and where a name is missing to choose.
    """
    graph = model.graph
    fed = {value.name: value for value in inputs_of(model)}
    given = {value.name: value for value in graph.output}
    for option, name, known in (
        ("input_name", input_name, fed),
        ("target_name", target_name, fed),
        ("output_name", output_name, given),
    ):
        if name is not None and name not in known:
            kind = "output" if known is given else "input"
            raise ArtefactError(
                f"{option} {name!r} is no {kind} of the model; it has {_listed(known)}"
            )
    if read_spec(model) is not None and not is_changed(model):
        named = (input_name or "input", target_name or "target", output_name or "loss")
        if named != ("input", "target", "loss"):
            raise ArtefactError(
                "the model was exported by smoothl1-deploy, and its inputs and outputs are called "
                "by what they are; leave input_name, target_name and output_name out"
            )
        return model
    pair = _choose_pair(list(fed), input_name, target_name)
    chosen = _choose_outputs(list(given), output_name)
    if [name for name in fed if name in pair] == pair and chosen == list(given):
        return model

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    values = {value.name: value for value in graph.input}
    order = [*pair, *(name for name in values if name not in pair)]
    del copy.graph.input[:], copy.graph.output[:]
    copy.graph.input.extend(values[name] for name in order)
    copy.graph.output.extend(given[name] for name in chosen)
    return copy


def _choose_pair(names: list[str], input_name: str | None, target_name: str | None) -> list[str]:
    if input_name is None and target_name is None:
        roles = _roles(names)
        pair = [roles["input"], roles["target"]]
        is_target = [name.lower() in _TARGET_NAMES for name in pair]
        return pair[::-1] if is_target == [True, False] else pair
    if input_name == target_name:
        raise ArtefactError(f"input_name and target_name are both {input_name!r}; give two inputs")
    others = [name for name in names if name not in (input_name, target_name)]
    if input_name is None or target_name is None:
        if len(others) != 1:
            raise ArtefactError(
                f"besides {input_name or target_name!r} the model has {len(others)} inputs "
                f"({_listed(others)}); give input_name and target_name both"
            )
        return [input_name or others[0], target_name or others[0]]
    if (input_name, target_name) == ("target", "input"):
        raise ArtefactError(
            "the model's inputs are called 'input' and 'target' and are taken by these names; "
            "leave input_name and target_name out"
        )
    if others and not {input_name, target_name, *others} <= set(ROLES):
        raise ArtefactError(
            f"beside its input and target the model takes {_listed(others)}, which nothing here "
            "can feed; make it a constant, or cut the loss out with onnx.utils.extract_model"
        )
    return [input_name, target_name]


def _choose_outputs(names: list[str], output_name: str | None) -> list[str]:
    if output_name is not None:
        return [output_name]
    if len(names) > 1 and "loss" not in names:
        raise ArtefactError(
            f"the model has {len(names)} outputs ({_listed(names)}); verify can be told which "
            "one is the loss (output_name)"
        )
    return [name for name in names if name in _OUTPUT_NAMES] if len(names) > 1 else names
