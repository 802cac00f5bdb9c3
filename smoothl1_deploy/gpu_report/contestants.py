"""Who is timed: PyTorch eager and compiled, and every GPU backend that can be used here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..device import Device
from ..spec import LossSpec
from .plan import COLUMNS, TWIN

__all__ = ["BACKENDS", "TORCH", "Call", "in_two_stages", "prepare", "record", "usable_backends"]

TORCH = ("torch-eager", "torch-compile")
BACKENDS = ("torch-triton", "trt", "ort-cuda", "ort-tensorrt", "ort-tensorrt-rtx")

#: The loss of two CUDA tensors.
Call = Callable[[Any, Any], Any]

_ROWS = 1 << 22  # of the largest size


def usable_backends() -> tuple[tuple[str, ...], dict[str, str]]:
    """The GPU backends that run a small model here, and why the others don't.

    They are tried, not asked: an engine may be built on a card that can't run it, and the exact
    answer is worth a line in the report.
    """
    try:
        from ..backends.base import load
        from ..graph.export import export

        model = export(LossSpec(), shape=("N", COLUMNS))
    except ImportError as exc:  # onnx, onnxscript or what they need
        return (), dict.fromkeys(BACKENDS, f"no model can be exported here: {exc}")
    import numpy as np

    found, reasons = [], {}
    for name in BACKENDS:
        try:
            ones = np.ones((2, COLUMNS), np.float32)
            load(model, name).run(ones, ones)
            found.append(name)
        except Exception as exc:  # whatever a driver or a runtime raises, the others go on
            reasons[name] = f"{type(exc).__name__}: {exc}"
    return tuple(found), reasons


def prepare(name: str, reduction: str, dtype: str, *, small: bool = False) -> tuple[Call, Any]:
    """A contestant's call, and its runner (None for PyTorch's).

    Args:
        name: of `TORCH` or `BACKENDS`, or the twin of one of these (`plan.twin_of`).
        reduction: `none`, `mean` or `sum`; beta is 1.
        dtype: `float32` or `float16`.
        small: whether the engine is tuned for 64 rows instead of 2^22.
    """
    if name in TORCH:
        from ..errors import require

        torch = require("torch", "torch", "the report")

        def eager(x: Any, t: Any) -> Any:
            return torch.nn.functional.smooth_l1_loss(x, t, reduction=reduction)

        return (eager if name == "torch-eager" else torch.compile(eager)), None
    from ..backends.base import get_backend
    from ..graph.export import export

    model = export(LossSpec(1.0, reduction, dtype), shape=("N", COLUMNS))
    name, _, twin = name.partition(TWIN)
    if twin == "two stages":
        model = in_two_stages(model)
    backend = _backend(name, get_backend(name), small)
    if twin == "one launch":
        from ..backends.torch_triton import TorchTritonBackend

        backend = TorchTritonBackend(one_launch=True)
    runner: Any = backend.load(model)
    return lambda x, t: runner.run(x, t), runner


def in_two_stages(model: Any) -> Any:
    """A full reduction along the last axis first, and then of what that leaves."""
    import onnx
    from onnx import helper

    from ..backends.ort_nodes import inlined
    from ..graph.metadata import read_spec, stamp

    spec = read_spec(model)
    found: onnx.ModelProto = inlined(model)
    nodes = list(found.graph.node)
    made = {name: node for node in nodes for name in node.output}
    total = next(node for node in nodes if node.op_type == "ReduceSum")
    flat = made[total.input[0]]
    if flat.op_type != "Reshape" or spec is None:
        raise ValueError(f"{found.graph.name} doesn't flatten what it adds up")
    axis = helper.make_node("Constant", [], ["last_axis"], "last_axis", value_ints=[-1])
    rows = helper.make_node("ReduceSum", [flat.input[0], "last_axis"], ["rows"], "rows", keepdims=0)
    flat.input[0] = "rows"
    nodes[nodes.index(flat) : nodes.index(flat)] = [axis, rows]
    del found.graph.node[:]
    found.graph.node.extend(nodes)
    stamp(found, spec, "inlined", "two_stages")
    return found


def _backend(name: str, backend: Any, small: bool) -> Any:
    """The backend, its engines tuned for the largest size where it lets one choose."""
    if name != "trt" or small:
        return backend
    from ..backends.trt import TrtBackend

    return TrtBackend(profile={"input": (1, _ROWS, _ROWS)})


def record(device: Device, call: Call, runner: Any, x: Any, t: Any) -> Callable[[], Any]:
    """The call on these tensors as a CUDA graph.

    Raises:
        UnsupportedError: for a backend that can't be recorded.
    """
    captured = device.capture(lambda: call(x, t)) if runner is None else runner.capture(x, t)
    return captured.replay
