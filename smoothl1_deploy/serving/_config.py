"""What a model takes and gives, in Triton's words, and the `config.pbtxt` that says so.

A config is written and read through Triton's own messages, never by hand. Only fields that Triton
has had for years are written, so that any server reads the file: name, platform, max_batch_size,
inputs, outputs, dynamic_batching, instance_group, model_operations.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import onnx

from .._model import Port, inputs_of, outputs_of
from ..errors import ArtefactError, SpecError, require
from ..tensorrt._engine import Sidecar

CONFIG_FILE = "config.pbtxt"
ONNX_FILE, PLAN_FILE = "model.onnx", "model.plan"
ONNX_PLATFORM, PLAN_PLATFORM = "onnxruntime_onnx", "tensorrt_plan"

#: A backend, its platform, and the file that it looks for in a version's folder. A backend without
#: a platform takes any. Source: `AutoCompleteBackendFields` of Triton's model_config_utils.cc.
_KINDS = (
    ("onnxruntime", ONNX_PLATFORM, ONNX_FILE),
    ("tensorrt", PLAN_PLATFORM, PLAN_FILE),
    ("tensorflow", "tensorflow_savedmodel", "model.savedmodel"),
    ("tensorflow", "tensorflow_graphdef", "model.graphdef"),
    ("pytorch", "pytorch_libtorch", "model.pt"),
    ("pytorch", "torch_aoti", "model.pt2"),
    ("openvino", "", "model.xml"),
    ("python", "", "model.py"),
)
#: The backends whose files are known; any other may be anyone's.
BACKENDS = frozenset(backend for backend, _, _ in _KINDS)

#: How long a request waits for others to join its batch.
_QUEUE_DELAY_US = 200

#: The element types that Triton has. Source: `DataType` of its model_config.proto.
_TYPES = re.compile(r"BOOL|STRING|FP(16|32|64)|BF16|U?INT(8|16|32|64)")


@dataclass(frozen=True, slots=True)
class TensorPort:
    """One input or output.

    Attributes:
        data_type: Triton's, such as `"TYPE_FP32"`; `"TYPE_INVALID"` for one that it doesn't have.
        dims: with the axis of rows, -1 for a dynamic axis; None for any rank.
    """

    name: str
    data_type: str
    dims: tuple[int, ...] | None

    @property
    def without_rows(self) -> bool:
        """Whether its first axis, if it has one, is of one size: rows can't be batched along it."""
        return self.dims is not None and (not self.dims or self.dims[0] != -1)


@dataclass(frozen=True, slots=True)
class ModelPorts:
    """The inputs and outputs of a model file.

    Attributes:
        inputs: those that a caller must give.
        outputs: all of them.
        defaults: further inputs, for which the file has values.
    """

    inputs: tuple[TensorPort, ...]
    outputs: tuple[TensorPort, ...]
    defaults: tuple[TensorPort, ...] = ()


def _data_type(dtype: str) -> str:
    """Triton's name of an element type, from numpy's or ONNX' name of it."""
    long = {"FLOAT": "FLOAT32", "DOUBLE": "FLOAT64"}.get(dtype, dtype.upper())
    name = long.replace("FLOAT", "FP").replace("BFP", "BF")
    return f"TYPE_{name if _TYPES.fullmatch(name) else 'INVALID'}"


def _onnx_port(value: onnx.ValueInfoProto) -> TensorPort:
    port = Port.of(value)
    axes = port.axes
    dims = None if axes is None else tuple(d if isinstance(d, int) else -1 for d in axes)
    dtype = "STRING" if port.dtype == "object" else port.dtype
    return TensorPort(port.name, _data_type(dtype), dims)


def onnx_ports(model: onnx.ModelProto) -> ModelPorts:
    """The inputs and outputs of an ONNX graph."""
    inputs = tuple(map(_onnx_port, inputs_of(model)))
    everything = map(_onnx_port, model.graph.input)
    outputs = tuple(map(_onnx_port, outputs_of(model)))
    return ModelPorts(inputs, outputs, tuple(port for port in everything if port not in inputs))


def engine_ports(sidecar: Sidecar) -> ModelPorts:
    """The inputs and outputs of a TensorRT engine, as its sidecar says."""
    inputs, outputs = (
        tuple(TensorPort(port.name, _data_type(port.dtype), port.shape) for port in ports)
        for ports in (sidecar.inputs, sidecar.outputs)
    )
    return ModelPorts(inputs, outputs)


def _messages() -> Any:
    return require("tritonclient.grpc.model_config_pb2", "serve", "a Triton config.pbtxt")


def _text_format() -> Any:
    return require("google.protobuf.text_format", "serve", "a Triton config.pbtxt")


def make_config(
    name: str, platform: str, ports: ModelPorts, max_batch_size: int = 0, library: str = ""
) -> Any:
    """The `ModelConfig` message of a model.

    Args:
        name: the model's, and its folder's.
        platform: Triton's, such as `"onnxruntime_onnx"`.
        ports: the model file's, with the axis of rows.
        max_batch_size: 0 for no batching; otherwise the first axis of every port is left to
            Triton, and rows of different requests are batched together.
        library: the path of a library of operators, as the server finds it; none by default.

    Raises:
        SpecError: on a max_batch_size that Triton can't hold, and on ports that it can't
            configure.
        MissingDependencyError: without tritonclient.
    """
    most = (1 << 31) - 1  # Triton's is an int32
    if isinstance(max_batch_size, bool) or not 0 <= max_batch_size <= most:
        raise SpecError(
            f"max_batch_size must be 0 to {most}, got {max_batch_size!r}; 0 is no batching"
        )
    messages = _messages()
    config = messages.ModelConfig(name=name, platform=platform, max_batch_size=max_batch_size)
    for field, given in ((config.input, ports.inputs), (config.output, ports.outputs)):
        for port in given:
            if port.data_type == "TYPE_INVALID":
                raise SpecError(f"{port.name!r} has an element type that Triton doesn't know")
            dims = (port.dims or ())[max_batch_size > 0 :]
            if not dims:
                raise SpecError(
                    f"{port.name!r} would have empty dims, which Triton refuses; give it an axis "
                    "more"
                )
            number = messages.DataType.Value(port.data_type)
            field.add(name=port.name, data_type=number, dims=dims)
    if max_batch_size:
        config.dynamic_batching.max_queue_delay_microseconds = _QUEUE_DELAY_US
    # A CPU build starts two otherwise. No kind: Triton takes the GPU where there is one.
    config.instance_group.add(count=1)
    if library:
        config.model_operations.op_library_filename.append(library)
    return config


def dump_config(config: Any) -> bytes:
    """The text of a `ModelConfig` message; the same message gives the same bytes."""
    return str(_text_format().MessageToString(config)).encode()


def read_config(text: str | bytes) -> Any:
    """The `ModelConfig` message of a `config.pbtxt`.

    Raises:
        ArtefactError: when the text is no config; the message holds the parser's line and column.
        MissingDependencyError: without tritonclient.
    """
    messages, text_format = _messages(), _text_format()
    try:
        return text_format.Parse(text, messages.ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as exc:
        raise ArtefactError(f"not a model config: {exc}") from exc


def kind_of(config: Any, files: Container[str]) -> tuple[str, str, str] | None:
    """The backend, platform and file name that Triton completes a config to; None where it can't.

    Args:
        config: its message.
        files: the names in a version's folder, which count where the config leaves the kind open.
    """
    given = config.default_model_filename
    if config.backend:
        pairs = (config.backend, config.platform)
        fits = [kind for kind in _KINDS if pairs in ((kind[0], kind[1] or pairs[1]), (kind[0], ""))]
    elif config.platform:
        fits = [kind for kind in _KINDS if config.platform == kind[1]]
    else:
        fits = [kind for kind in _KINDS if kind[2] in ((given,) if given else files)]
    return next((kind for kind in fits if kind[2] in files), fits[0] if fits else None)
