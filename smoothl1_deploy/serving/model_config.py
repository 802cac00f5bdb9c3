"""`config.pbtxt`: written and read through Triton's own config messages, never by hand.

Only fields that Triton has had for years are written, so that any server reads the file: name,
platform, max_batch_size, inputs, outputs, dynamic_batching, instance_group, model_operations.
"""

from __future__ import annotations

from typing import Any

from ..errors import ArtefactError, SpecError, require
from .ports import ModelPorts, TensorPort

__all__ = ["CONFIG_FILE", "dump_config", "make_config", "read_config"]

CONFIG_FILE = "config.pbtxt"

#: A request waits this long for others to join its batch. See docs/serving-repository.md.
_QUEUE_DELAY_US = 200


def _messages() -> Any:
    return require("tritonclient.grpc.model_config_pb2", "serve", "a Triton config.pbtxt")


def make_config(
    name: str, platform: str, ports: ModelPorts, max_batch_size: int = 0, library: str = ""
) -> Any:
    """The `ModelConfig` message of a model.

    Args:
        name: of the model, which is that of its folder.
        platform: such as `"onnxruntime_onnx"`.
        ports: of the model file, its axis of rows included.
        max_batch_size: 0 for no batching; otherwise the first axis of every port is left to
            Triton, and rows of different requests are batched together.
        library: of operators, as the server finds it; none by default.

    Raises:
        SpecError: on a max_batch_size that Triton can't hold, and on ports that it can't
            configure.
        MissingDependencyError: without tritonclient.
    """
    if (
        isinstance(max_batch_size, bool) or not 0 <= max_batch_size < 1 << 31
    ):  # Triton's is an int32
        raise SpecError(
            f"max_batch_size must be 0 to {(1 << 31) - 1}, got {max_batch_size!r}; 0 is no batching"
        )
    config = _messages().ModelConfig(name=name, platform=platform, max_batch_size=max_batch_size)
    for field, given in ((config.input, ports.inputs), (config.output, ports.outputs)):
        for port in given:
            dims = _dims(port, max_batch_size)
            field.add(name=port.name, data_type=_number(port), dims=dims)
    if max_batch_size:
        config.dynamic_batching.max_queue_delay_microseconds = _QUEUE_DELAY_US
    # A CPU build starts two otherwise. No kind: Triton takes the GPU where there is one.
    config.instance_group.add(count=1)
    if library:
        config.model_operations.op_library_filename.append(library)
    return config


def _number(port: TensorPort) -> int:
    if port.data_type == "TYPE_INVALID":
        raise SpecError(f"{port.name!r} has an element type that Triton doesn't know")
    return int(_messages().DataType.Value(port.data_type))


def _dims(port: TensorPort, max_batch_size: int) -> tuple[int, ...]:
    if port.dims is None:
        raise SpecError(f"the rank of {port.name!r} is unknown; export with a shape")
    if max_batch_size and (not port.dims or port.dims[0] != -1):
        raise SpecError(
            f"{port.name!r} has the dims {list(port.dims)} and no axis of rows to batch along; "
            "use max_batch_size=0"
        )
    dims = port.dims[1:] if max_batch_size else port.dims
    if not dims:
        raise SpecError(
            f"{port.name!r} would have empty dims, which Triton refuses; give it an axis more"
        )
    return dims


def dump_config(config: Any) -> bytes:
    """The text of a `ModelConfig` message: the same message, the same bytes."""
    text_format = require("google.protobuf.text_format", "serve", "a Triton config.pbtxt")
    text: str = text_format.MessageToString(config)
    return text.encode()


def read_config(text: str | bytes) -> Any:
    """The `ModelConfig` message of a `config.pbtxt`.

    Raises:
        ArtefactError: when it is none; the message holds the parser's line and column.
        MissingDependencyError: without tritonclient.
    """
    messages = _messages()
    text_format = require("google.protobuf.text_format", "serve", "a Triton config.pbtxt")
    try:
        return text_format.Parse(text, messages.ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as exc:
        raise ArtefactError(f"not a model config: {exc}") from exc
