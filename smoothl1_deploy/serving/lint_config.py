"""What the lint asks of a `config.pbtxt`: by itself, and against the file it configures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..model import Loss
from .finding import Finding
from .losses import why_unbatched
from .ports import ModelPorts, TensorPort
from .repository import ONNX_FILE, PLAN_FILE

__all__ = ["PLATFORM_FILES", "check_against_file", "check_config", "model_file"]

#: Platform of Triton's -> the file it looks for in a version folder; None for none.
PLATFORM_FILES: dict[str, str | None] = {
    "onnxruntime_onnx": ONNX_FILE,
    "tensorrt_plan": PLAN_FILE,
    "tensorflow_graphdef": "model.graphdef",
    "tensorflow_savedmodel": "model.savedmodel",
    "pytorch_libtorch": "model.pt",
    "ensemble": None,
}
#: Backends may be anyone's; of these the file is known.
_BACKEND_FILES = {
    "onnxruntime": ONNX_FILE,
    "tensorrt": PLAN_FILE,
    "python": "model.py",
    "openvino": "model.xml",
}


def model_file(config: Any) -> str | None:
    """The file a version folder must hold; None where there is none, or none that we know."""
    if config.platform == "ensemble":
        return None
    known = PLATFORM_FILES.get(config.platform) or _BACKEND_FILES.get(config.backend)
    return str(config.default_model_filename) or known


def check_config(model: str, config: Any) -> Iterator[Finding]:
    """What is wrong with a config by itself; `model` is the name of its folder."""
    if config.name and config.name != model:
        yield Finding(
            model,
            "wrong-name",
            f"the config says name: {config.name!r}, and the folder is called {model!r}",
            "rename one of them; Triton refuses a model whose names differ",
        )
    if config.platform and config.platform not in PLATFORM_FILES:
        yield Finding(
            model,
            "unknown-platform",
            f"Triton has no platform {config.platform!r}",
            f"write one of {', '.join(PLATFORM_FILES)}, or name a backend instead",
        )
    if not config.platform and not config.backend:
        yield Finding(
            model,
            "unknown-platform",
            "the config names neither a platform nor a backend",
            'write platform: "onnxruntime_onnx" for a model.onnx',
        )
    batch = config.max_batch_size
    if batch < 0:
        yield Finding(
            model,
            "negative-max-batch-size",
            f"max_batch_size is {batch}",
            "write 0 for no batching, or the number of rows a batch may have",
        )
    for port in (*config.input, *config.output):
        if not port.dims:
            yield Finding(
                model,
                "empty-dims",
                f"{port.name!r} has no dims, and Triton refuses them",
                "give the graph a tensor of shape [1] in the place of a number (smoothl1-deploy "
                "repository does), and write dims: [ 1 ]",
            )
        elif port.HasField("reshape") and not port.reshape.shape and batch == 0:
            yield Finding(
                model,
                "empty-dims",
                f"{port.name!r} is reshaped to no dims, which Triton refuses without batching",
                "give the graph a tensor of shape [1] and leave reshape out",
            )
    preferred = [n for n in config.dynamic_batching.preferred_batch_size if not 0 < n <= batch]
    if preferred and batch >= 0:
        yield Finding(
            model,
            "preferred-above-maximum",
            f"preferred_batch_size {', '.join(map(str, preferred))} lies outside 1 to "
            f"max_batch_size, which is {batch}",
            "leave preferred_batch_size out: a queue delay alone batches what waits",
        )


def check_against_file(
    model: str, config: Any, ports: ModelPorts, losses: tuple[Loss, ...]
) -> Iterator[Finding]:
    """Where a config and the inputs and outputs of its model file differ."""
    yield from _check_batching(model, config, ports, losses)
    for kind, field, known in (
        ("input", config.input, ports.inputs),
        ("output", config.output, ports.outputs),
    ):
        by_name = {port.name: port for port in known}
        for entry in field:
            port = by_name.get(entry.name)
            if port is None:
                yield Finding(
                    model,
                    "unknown-tensor",
                    f"the config has the {kind} {entry.name!r}, the model has "
                    f"{', '.join(map(repr, by_name)) or 'none'}",
                    "write the names as the model has them",
                )
            else:
                yield from _check_port(model, kind, entry, port, config.max_batch_size)
        missing = set(by_name) - {entry.name for entry in field}
        for name in sorted(missing) if kind == "input" else ():
            yield Finding(
                model,
                "missing-input",
                f"the model takes the input {name!r}, and the config doesn't have it",
                "add it, or let smoothl1-deploy repository write the config",
            )


def _check_batching(
    model: str, config: Any, ports: ModelPorts, losses: Iterable[Loss]
) -> Iterator[Finding]:
    if config.max_batch_size <= 0 and not config.HasField("dynamic_batching"):
        return
    losses = tuple(losses)
    reason = why_unbatched(losses, ports)
    if reason is None:
        return
    reduces = any(
        loss.spec.reduction != "none" and not loss.spec.per_sample for loss in losses
    ) or any(_without_rows(port) for port in ports.outputs)
    if config.max_batch_size > 0 or reduces:
        yield Finding(
            model,
            "batched-reduction" if reduces else "not-batchable",
            f"max_batch_size is {config.max_batch_size}"
            + (" and dynamic_batching is on" if config.HasField("dynamic_batching") else "")
            + f", but {reason}",
            "write max_batch_size: 0, leave dynamic_batching out, and give every dims its axis of "
            "rows (-1); for one score a row export with --per-sample",
        )


def _without_rows(port: TensorPort) -> bool:
    return port.dims is not None and (not port.dims or port.dims[0] != -1)


def _check_port(
    model: str, kind: str, entry: Any, port: TensorPort, max_batch_size: int
) -> Iterator[Finding]:
    names = type(entry).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    given = names[entry.data_type].name if entry.data_type in names else str(entry.data_type)
    if given != port.data_type:
        yield Finding(
            model,
            "wrong-dtype",
            f"the config has the {kind} {entry.name!r} as {given}, the model as {port.data_type}",
            f"write data_type: {port.data_type}",
        )
    ragged = kind == "input" and (entry.allow_ragged_batch or entry.is_shape_tensor)
    batched = max_batch_size > 0
    # No dims and no rows are findings of their own.
    if port.dims is None or not entry.dims or ragged or (batched and _without_rows(port)):
        return
    dims = list(entry.reshape.shape if entry.HasField("reshape") else entry.dims)
    whole = [-1, *dims] if batched else dims
    rows = " after the rows of a batch" if batched else ""
    shown = list(port.dims[1:] if batched else port.dims)
    if len(whole) != len(port.dims):
        yield Finding(
            model,
            "wrong-rank",
            f"the {kind} {entry.name!r} has the dims {dims}{rows}, in the model {shown}",
            f"write dims: {shown}"
            if shown
            else "give the graph a tensor of shape [1] in its place: smoothl1-deploy repository "
            "--model does",
        )
    elif any(own not in (-1, dim) for own, dim in zip(port.dims, whole, strict=True)):
        yield Finding(
            model,
            "wrong-dims",
            f"the {kind} {entry.name!r} has the dims {dims}{rows}, in the model {shown}",
            f"write dims: {shown}",
        )
