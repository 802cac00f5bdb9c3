"""Artefacts on disk and in memory: read without trust, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from .errors import ArtefactError, OutputError
from .graph.elements import DTYPE_OF_ELEMENT
from .graph.shapes import Shape, describe

__all__ = [
    "ROLES",
    "ModelSource",
    "Port",
    "Signature",
    "read_model",
    "sha256",
    "signature",
    "write_atomic",
]

#: What an input of a loss artefact can be for.
ROLES = ("input", "target", "weight", "beta")

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
            model = onnx.load(what)
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
    # Not tempfile: it makes files for the owner alone, and to learn the umask one has to change
    # it, which two threads must not do at once. open() applies it by itself.
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
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
    """What a loss artefact takes and gives.

    Attributes:
        inputs: role (`input`, `target`, `weight`, `beta`) -> the graph input that plays it.
        outputs: in the order of the graph.
    """

    inputs: Mapping[str, Port]
    outputs: tuple[Port, ...]

    @property
    def input(self) -> Port:
        """The prediction."""
        return self.inputs["input"]

    @property
    def target(self) -> Port:
        """What it is compared with."""
        return self.inputs["target"]


def _port(value: onnx.ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    dtype = DTYPE_OF_ELEMENT.get(tensor.elem_type)
    if dtype is None:
        known = onnx.TensorProto.DataType.DESCRIPTOR.values_by_number.get(tensor.elem_type)
        element = known.name if known else tensor.elem_type
        raise ArtefactError(
            f"{value.name!r} has the element type {element}; "
            f"a loss artefact takes and gives {', '.join(DTYPE_OF_ELEMENT.values())}"
        )
    if not tensor.HasField("shape"):
        return Port(value.name, dtype, None)
    dims = (
        # An axis without a name is like no other, not even one of the same position.
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{value.name}_axis_{i}"
        for i, dim in enumerate(tensor.shape.dim)
    )
    return Port(value.name, dtype, tuple(dims))


def signature(model: onnx.ModelProto) -> Signature:
    """The signature of a loss artefact: inputs called by their roles, or just two inputs.

    Raises:
        ArtefactError: when it can't be told which inputs are which.
    """
    constants = {initializer.name for initializer in model.graph.initializer}
    values = [value for value in model.graph.input if value.name not in constants]
    by_role = {value.name: value for value in values}
    if not ({"input", "target"} <= set(by_role) <= set(ROLES)):
        if len(values) != 2:
            raise ArtefactError(
                f"the model has {len(values)} inputs ({', '.join(by_role) or 'none'}); "
                f"a loss artefact has two, or inputs called {', '.join(ROLES)}"
            )
        by_role = dict(zip(ROLES, values, strict=False))
    inputs = {role: _port(by_role[role]) for role in ROLES if role in by_role}
    return Signature(inputs, tuple(_port(value) for value in model.graph.output))
