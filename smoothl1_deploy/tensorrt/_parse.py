"""`parse`: an ONNX model through NVIDIA's own parser, checked on the way in and on the way out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import TensorProto, helper

from .._artefact import sha256
from .._model import axes_of, contradiction, element_name, inputs_of, main_tensors, outputs_of
from .._records import Record
from ..errors import ArtefactError, BuildError, UnsupportedError
from ._flavour import Flavour, tidy
from ._prepare import prepare

#: The names that TensorRT's DataType and ONNX' have in common.
_ALIKE = ("FLOAT", "INT8", "UINT8", "INT32", "INT64", "BOOL", "INT4")
#: ONNX element type -> the name of TensorRT's DataType.
_DATA_TYPE: dict[int, str] = {
    **{TensorProto.DataType.Value(name): name for name in _ALIKE},
    TensorProto.FLOAT16: "HALF",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.FLOAT8E4M3FN: "FP8",
    TensorProto.FLOAT4E2M1: "FP4",
}


#: The names of TensorRT's DataType that differ from numpy's by more than case.
_NUMPY_NAME = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
#: The dtype of a port -> ONNX element type.
_ELEMENT = {_NUMPY_NAME.get(name, name.lower()): element for element, name in _DATA_TYPE.items()}


@dataclass(frozen=True, slots=True)
class NetworkPort(Record):
    """An input or output of the network.

    Attributes:
        dtype: for instance `"float32"`, `"bfloat16"`, `"int64"`.
        shape: -1 for a dynamic axis.
        names: the dimension names of the ONNX graph, None for an axis without one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    names: tuple[str | None, ...]

    @property
    def dims(self) -> list[int | str]:
        """The names of the axes that have one, and the sizes of the others."""
        return [name or size for name, size in zip(self.names, self.shape, strict=True)]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.dims))}]"

    def to_value(self) -> onnx.ValueInfoProto:
        """Its declaration in an ONNX graph."""
        dims = [None if dim == -1 else dim for dim in self.dims]
        return helper.make_tensor_value_info(self.name, _ELEMENT[self.dtype], dims)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> NetworkPort:
        """The inverse of `to_dict`; raises KeyError, TypeError or ValueError on other content."""
        if fields["dtype"] not in _ELEMENT:
            raise ValueError(f"unknown dtype {fields['dtype']!r}")
        return cls(
            str(fields["name"]),
            str(fields["dtype"]),
            tuple(int(size) for size in fields["shape"]),
            tuple(None if name is None else str(name) for name in fields["names"]),
        )


@dataclass(frozen=True, slots=True)
class ParsedNetwork:
    """A network and what must outlive it.

    A parser whose network was dropped ends the process with a segmentation fault, so builder,
    network and parser stay in one object.

    Attributes:
        notes: what `prepare` changed, and what the model declares that isn't so; each a
            sentence.
        inputs, outputs: the ports, in the order of the ONNX graph.
    """

    builder: Any = field(repr=False)
    network: Any = field(repr=False)
    parser: Any = field(repr=False)
    flavour: Flavour
    notes: tuple[str, ...]
    inputs: tuple[NetworkPort, ...]
    outputs: tuple[NetworkPort, ...]


def parse(model: onnx.ModelProto, flavour: Flavour) -> ParsedNetwork:
    """Parse `model` into a strongly typed network of `flavour`.

    Args:
        model: as it was exported; it is prepared here.
        flavour: the one whose parser reads it.

    Raises:
        UnsupportedError: for what `prepare` refuses, and where the network's inputs or outputs
            differ from the graph's in number, element type, rank or size.
        BuildError: when the parser refuses; names the node, its operator and the remedy.
        BackendUnavailableError: when TensorRT can't be used here.
    """
    prepared, notes = prepare(model)
    inputs = inputs_of(prepared)
    for value in inputs:  # the parser's own error doesn't say which input it means
        element = value.type.tensor_type.elem_type
        if element not in (*_DATA_TYPE, TensorProto.DOUBLE):  # `prepare` refuses float64
            raise UnsupportedError(
                f"the graph input {value.name!r} is {element_name(element)}, which TensorRT has "
                "no tensors of; cast it before the model, or run the model on ONNX Runtime "
                "(the backend ort-cpu)"
            )
    data = serialized(prepared)
    # Types are fixed by the graph in every version: 10.x wants the flag, 11.x ignores it.
    typed = flavour.need(
        "NetworkDefinitionCreationFlag", "STRONGLY_TYPED", "a strongly typed network"
    )
    builder = flavour.builder()
    with flavour.capture() as log:
        network = builder.create_network(1 << int(typed))
        parser = flavour.trt.OnnxParser(network, flavour.logger)
        parsed = parser.parse(data)
        if not parsed or parser.num_errors:
            raise _parser_error(parser, flavour, log.reason())
    network.name = network_name(model)
    wrong = contradiction(main_tensors(prepared).values())
    made = [network.get_input(i) for i in range(network.num_inputs)]
    given = [network.get_output(i) for i in range(network.num_outputs)]
    return ParsedNetwork(
        builder,
        network,
        parser,
        flavour,
        notes if wrong is None else (*notes, wrong),
        _checked("input", inputs, made),
        _checked("output", outputs_of(prepared), given),
    )


def network_name(model: onnx.ModelProto) -> str:
    """The name of the network of `model`: its graph's, or one of its own.

    TensorRT numbers nameless networks, and two builds of one model then differ in a byte.
    """
    return model.graph.name or f"graph_{sha256(serialized(model))[:16]}"


def serialized(model: onnx.ModelProto) -> bytes:
    """The bytes of `model`, the same each time.

    Raises:
        ArtefactError: for more than protobuf's 2 GiB.
    """
    try:
        return bytes(model.SerializeToString(deterministic=True))
    except ValueError as exc:
        raise ArtefactError(f"the model can't be serialised for TensorRT's parser: {exc}") from exc


def _parser_error(parser: Any, flavour: Flavour, logged: str) -> BuildError:
    parts = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        stack = error.local_function_stack() if error.local_function_stack_size() else []
        inside = f", inside {' / '.join(stack)}" if stack else ""
        where = (
            f"node {error.node_name() or error.node()!r} (operator {error.node_operator()}{inside})"
        )
        if error.node() < 0:
            where = "before any node"
        parts.append(f"{where}: {error.code().name}: {tidy(str(error.desc()))}")
    remedy = "Express the node in operators TensorRT supports"
    if "at least 1 dimensions" in "".join(parts):
        remedy = "TensorRT can't reduce a tensor of rank 0: Reshape it to (-1,) first"
    elif "must have same input types" in "".join(parts):
        remedy = "TensorRT promotes nothing: cast both inputs of the node to one dtype"
    elif "operator NonZero" in "".join(parts):
        remedy = (
            "TensorRT has no NonZero. Where it is our gradient's, which finds by it the axes that "
            "were broadcast, export with a size of 1 or one name for the axes that meet"
        )
    return BuildError(
        f"{flavour} can't parse the model: {'; '.join(dict.fromkeys(parts)) or logged}. {remedy}, "
        "or run the model on ONNX Runtime (the backend ort-cpu)"
    )


def dtype_of(tensor: Any) -> str:
    """The dtype of a network's tensor by numpy's name, where numpy has one."""
    name: str = tensor.dtype.name
    return _NUMPY_NAME.get(name, name.lower())


def shape_of(tensor: Any) -> tuple[int, ...] | None:
    """The shape of a network's tensor, -1 for a dynamic axis; None for an unknown rank."""
    try:
        return tuple(tensor.shape)
    except ValueError:  # the bindings raise it where the rank is not known
        return None


def _checked(kind: str, values: Any, tensors: list[Any]) -> tuple[NetworkPort, ...]:
    """The network's ports; TensorRT's parser ignores a declaration it doesn't follow."""
    wanted, got = [value.name for value in values], [tensor.name for tensor in tensors]
    if wanted != got:
        raise UnsupportedError(
            f"the graph's {kind}s are {wanted}, those of the network TensorRT made of it are "
            f"{got}; the model is damaged, or has an {kind} that TensorRT drops"
        )
    return tuple(_port(kind, *pair) for pair in zip(values, tensors, strict=True))


def _port(kind: str, value: onnx.ValueInfoProto, tensor: Any) -> NetworkPort:
    declared = value.type.tensor_type
    dtype = tensor.dtype.name
    if _DATA_TYPE.get(declared.elem_type) != dtype:
        element = element_name(declared.elem_type)
        raise UnsupportedError(
            f"the graph declares the {kind} {value.name!r} as {element}, TensorRT made it {dtype}; "
            "export the model with an element type TensorRT has, and declare what it computes"
        )
    shape, axes = shape_of(tensor), axes_of(value)
    if shape is None or (axes is not None and not _fits(axes, shape)):
        asked = ["?" if axis is None else axis for axis in axes or ()]
        raise UnsupportedError(
            f"the graph declares the {kind} {value.name!r} with the shape {asked}, TensorRT made "
            f"it {'of unknown rank' if shape is None else list(shape)}; declare the shape the "
            "graph computes (onnx.shape_inference.infer_shapes finds it)"
        )
    names = tuple(axis if isinstance(axis, str) else None for axis in axes or shape)
    return NetworkPort(value.name, dtype_of(tensor), shape, names)


def _fits(axes: tuple[int | str | None, ...], shape: tuple[int, ...]) -> bool:
    """Whether a network's shape, with -1 for a dynamic axis, has the sizes that are declared."""
    return len(axes) == len(shape) and not any(
        isinstance(axis, int) and axis != size != -1 for axis, size in zip(axes, shape, strict=True)
    )
