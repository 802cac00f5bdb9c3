"""Artefacts on disk and in memory: read without trust, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from .errors import ArtefactError, OutputError
from .graph.elements import DTYPE_OF_ELEMENT
from .graph.metadata import forget_hash
from .graph.shapes import Shape, describe

__all__ = [
    "ModelSource",
    "Port",
    "Signature",
    "read_model",
    "select_ports",
    "sha256",
    "signature",
    "write_atomic",
]

ModelSource = onnx.ModelProto | bytes | str | os.PathLike[str]


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def read_model(source: ModelSource) -> onnx.ModelProto:
    """An ONNX model from a `ModelProto`, its bytes, or a path.

    Raises:
        ArtefactError: when there is no such file or its content is no ONNX model.
    """
    if isinstance(source, onnx.ModelProto):
        return source
    if isinstance(source, bytes):
        what = f"{len(source)} bytes"
    elif isinstance(source, (str, os.PathLike)):
        what = str(source)
        if not Path(source).is_file():
            kind = "is a folder" if Path(source).is_dir() else "does not exist"
            raise ArtefactError(f"{what} {kind}; give the path of an .onnx file")
    else:
        raise ArtefactError(
            f"expected an onnx.ModelProto, bytes or a path, got {type(source).__name__}"
        )
    try:
        if isinstance(source, bytes):
            model = onnx.load_model_from_string(source)
        else:
            model = onnx.load(os.fspath(source))
    except Exception as exc:  # protobuf, the checker and the file system each raise their own
        raise ArtefactError(
            f"{what} can't be read as an ONNX model ({exc}); it is damaged, or of another format"
        ) from exc
    # Protobuf reads some text files as a message without content.
    if not model.ir_version or not model.graph.output:
        raise ArtefactError(f"{what} holds no ONNX graph; it is damaged, or of another format")
    return model


def write_atomic(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write beside the target, then rename: the file is there whole, or as it was before.

    Raises:
        OutputError: when the folder is missing or can't be written.
    """
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files for the owner alone
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as exc:
        raise OutputError(
            f"can't write {path}: {exc.strerror or exc}; choose a file in a folder that exists "
            "and that you may write to"
        ) from exc
    return path


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output of a graph; `shape` is None for any rank."""

    name: str
    dtype: str
    shape: Shape | None

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{describe(self.shape)}]"


@dataclass(frozen=True, slots=True)
class Signature:
    """What a loss artefact takes and gives."""

    input: Port
    target: Port
    outputs: tuple[Port, ...]

    @property
    def loss(self) -> Port:
        """The output that is the loss: the one of that name, or the first."""
        return next((port for port in self.outputs if port.name == "loss"), self.outputs[0])


def _port(value: onnx.ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    dtype = DTYPE_OF_ELEMENT.get(tensor.elem_type)
    if dtype is None:
        element = onnx.TensorProto.DataType.Name(tensor.elem_type)
        raise ArtefactError(
            f"{value.name!r} has the element type {element}; "
            f"a loss artefact takes and gives {', '.join(DTYPE_OF_ELEMENT.values())}"
        )
    if not tensor.HasField("shape"):
        return Port(value.name, dtype, None)
    dims = (
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"axis_{i}"
        for i, dim in enumerate(tensor.shape.dim)
    )
    return Port(value.name, dtype, tuple(dims))


#: Names that say of one of two inputs, declared in any order, that it is the target.
_TARGET_NAMES = {"target", "targets", "label", "labels", "y_true", "gt", "ground_truth"}
#: Outputs that mean something here; a loss beside others is found by its name.
_OUTPUT_NAMES = ("loss", "grad_input")


def _fed(graph: onnx.GraphProto) -> dict[str, onnx.ValueInfoProto]:
    """The inputs that a caller must give; old models list their constants among the inputs."""
    constants = {initializer.name for initializer in graph.initializer}
    return {value.name: value for value in graph.input if value.name not in constants}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _default_pair(names: Sequence[str]) -> list[str]:
    if {"input", "target"} <= set(names):
        return ["input", "target"]
    if len(names) != 2:
        raise ArtefactError(
            f"the model has {len(names)} inputs ({_listed(names)}); a loss artefact has two, input "
            "and target. Say which they are with input_name= and target_name=, on the command line "
            "--input-name and --target-name"
        )
    return list(names)


def signature(model: onnx.ModelProto) -> Signature:
    """The signature of a loss artefact: inputs called `input` and `target`, or just two inputs.

    Raises:
        ArtefactError: when it can't be told which inputs are which, or they differ in dtype.
    """
    fed = _fed(model.graph)
    input, target = (_port(fed[name]) for name in _default_pair(list(fed)))
    if input.dtype != target.dtype:
        raise ArtefactError(
            f"the model takes {input.name!r} as {input.dtype} and {target.name!r} as "
            f"{target.dtype}; a loss artefact takes both in one dtype"
        )
    return Signature(input, target, tuple(_port(value) for value in model.graph.output))


def select_ports(
    model: onnx.ModelProto,
    input_name: str | None = None,
    target_name: str | None = None,
    output_name: str | None = None,
) -> onnx.ModelProto:
    """`model` with its inputs in the order input, target, and no output but those compared.

    A model that is so already comes back as it is. Otherwise the result is a copy, so that
    every backend finds the same inputs and outputs without being told.

    Args:
        model: anyone's.
        input_name: of a graph input; None takes the one called `input`, or the first of two,
            or the second where the first has a target's name (`label`, `y_true`, ...).
        target_name: likewise.
        output_name: of the loss; None takes the one called `loss`, or the only one.

    Raises:
        ArtefactError: on a name the graph doesn't have, and where a name is missing to choose.
    """
    graph = model.graph
    fed, outputs = _fed(graph), {value.name: value for value in graph.output}
    for option, name, known in (
        ("input_name", input_name, fed),
        ("target_name", target_name, fed),
        ("output_name", output_name, outputs),
    ):
        if name is not None and name not in known:
            kind = "output" if known is outputs else "input"
            raise ArtefactError(
                f"{option}={name!r} is no {kind} of the model; it has {_listed(known)}"
            )
    pair = _choose_pair(list(fed), input_name, target_name)
    chosen = _choose_outputs(list(outputs), output_name)
    if [name for name in fed if name in pair] == pair and chosen == list(outputs):
        return model

    copy = forget_hash(model)
    values = {value.name: value for value in graph.input}
    order = [*pair, *(name for name in values if name not in pair)]
    del copy.graph.input[:], copy.graph.output[:]
    copy.graph.input.extend(values[name] for name in order)
    copy.graph.output.extend(outputs[name] for name in chosen)
    return copy


def _choose_pair(names: list[str], input_name: str | None, target_name: str | None) -> list[str]:
    if input_name is None and target_name is None:
        pair = _default_pair(names)
        is_target = [name.lower() in _TARGET_NAMES for name in pair]
        return pair[::-1] if is_target == [True, False] else pair
    if input_name == target_name:
        raise ArtefactError(f"input_name and target_name are both {input_name!r}; give two inputs")
    others = [name for name in names if name not in (input_name, target_name)]
    if input_name is None or target_name is None:
        if len(others) != 1:
            raise ArtefactError(
                f"besides {input_name or target_name!r} the model has {len(others)} inputs "
                f"({_listed(others)}); give input_name= and target_name= both"
            )
        return [input_name or others[0], target_name or others[0]]
    if (input_name, target_name) == ("target", "input"):
        raise ArtefactError(
            "the model's inputs are called 'input' and 'target' and are taken by these names; "
            "leave input_name and target_name out"
        )
    if others and (input_name, target_name) != ("input", "target"):
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
            f"the model has {len(names)} outputs ({_listed(names)}); say which one is the loss "
            "with output_name=, on the command line --output-name"
        )
    return [name for name in names if name in _OUTPUT_NAMES] if len(names) > 1 else names
