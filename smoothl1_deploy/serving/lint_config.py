"""What Triton accepts and is wrong in a `config.pbtxt`: by itself, and against its model file."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from typing import Any

from ..model import Loss
from .finding import Fault
from .losses import why_unbatched
from .ports import ModelPorts, TensorPort
from .repository import ONNX_FILE, PLAN_FILE

__all__ = ["BACKENDS", "check_against_file", "check_config", "kind_of"]

#: Backend, platform, and the file it looks for in a version folder. A backend without a platform
#: takes any. Source: `AutoCompleteBackendFields` of Triton's model_config_utils.cc.
_KINDS = (
    ("onnxruntime", "onnxruntime_onnx", ONNX_FILE),
    ("tensorrt", "tensorrt_plan", PLAN_FILE),
    ("tensorflow", "tensorflow_savedmodel", "model.savedmodel"),
    ("tensorflow", "tensorflow_graphdef", "model.graphdef"),
    ("pytorch", "pytorch_libtorch", "model.pt"),
    ("pytorch", "torch_aoti", "model.pt2"),
    ("openvino", "", "model.xml"),
    ("python", "", "model.py"),
)
#: The backends whose files are known; others may be anyone's.
BACKENDS = frozenset(backend for backend, _, _ in _KINDS)


def kind_of(config: Any, files: Container[str]) -> tuple[str, str, str] | None:
    """Backend, platform and file name of a config, as Triton completes it; None where it can't.

    Args:
        config: its message.
        files: names of what lies in a version folder; they count where the config leaves it open.
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


def check_config(config: Any) -> Iterator[Fault]:
    """What is wrong with a config by itself."""
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


def check_against_file(config: Any, ports: ModelPorts, losses: tuple[Loss, ...]) -> Iterator[Fault]:
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
    """The inputs that a server gives a model: its callers', and those that it makes itself."""
    yield from (port.name for port in config.input)
    yield from (port.name for port in config.sequence_batching.control_input)
    yield from (state.input_name for state in config.sequence_batching.state)
    yield from (name for port in config.batch_input for name in port.target_name)


def _check_batching(config: Any, ports: ModelPorts, losses: tuple[Loss, ...]) -> Iterator[Fault]:
    dynamic = config.HasField("dynamic_batching")
    reason = why_unbatched(losses, ports) if config.max_batch_size > 0 or dynamic else None
    if reason is None:
        return
    reduces = any(
        loss.spec.reduction != "none" and not loss.spec.per_sample for loss in losses
    ) or any(_without_rows(port) for port in ports.outputs)
    if config.max_batch_size > 0 or reduces:
        yield (
            "batched-reduction" if reduces else "not-batchable",
            f"max_batch_size is {config.max_batch_size}"
            + (" and dynamic_batching is on" if dynamic else "")
            + f", but {reason}",
        )


def _without_rows(port: TensorPort) -> bool:
    return port.dims is not None and (not port.dims or port.dims[0] != -1)


def _check_port(kind: str, entry: Any, port: TensorPort, batched: bool) -> Iterator[Fault]:
    names = type(entry).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    given = names[entry.data_type].name if entry.data_type in names else str(entry.data_type)
    if given != port.data_type:
        yield (
            "wrong-dtype",
            f"the config has the {kind} {entry.name!r} as {given}, the model as {port.data_type}",
        )
    ragged = kind == "input" and (entry.allow_ragged_batch or entry.is_shape_tensor)
    # A graph without rows is a finding of its own, and Triton refuses what has no dims.
    if port.dims is None or not entry.dims or ragged or (batched and _without_rows(port)):
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
