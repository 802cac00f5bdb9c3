"""What the tests of both exporters share: modules with losses in them, inputs, and the judge."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from agreement import assert_right, difference
from handmade import opened, run_session
from numpy.typing import NDArray
from torch import nn

from smoothl1_deploy import LossSpec, register_torchscript_symbolic, translation_table
from smoothl1_deploy._dlpack import from_torch, to_torch
from smoothl1_deploy._floats import NUMPY_DTYPE, round_to
from smoothl1_deploy.graph._torch_route import quiet

Array = NDArray[Any]
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

#: Every reduction, and every knee that an exporter's optimiser or types get wrong.
LOSSES: list[nn.Module] = [
    *(nn.SmoothL1Loss(beta=0.5, reduction=r) for r in ("none", "mean", "sum")),
    *(nn.SmoothL1Loss(beta=0.0, reduction=r) for r in ("none", "mean", "sum")),
    *(nn.SmoothL1Loss(beta=b, reduction="none") for b in (1 - 1e-6, 1 + 5e-6, 1e-9, 2e-8)),
    *(nn.SmoothL1Loss(beta=b) for b in (1.0, 0.1, 1e39, math.inf)),
    *(nn.HuberLoss(delta=0.5, reduction=r) for r in ("none", "mean", "sum")),
    *(nn.HuberLoss(delta=d, reduction="none") for d in (1 - 1e-6, 1 + 5e-6, 1e-9, 1e4, math.inf)),
    nn.HuberLoss(delta=1.0),
    nn.HuberLoss(delta=0.1),
    nn.L1Loss(),
]


class Inside(nn.Module):
    """Losses inside of somebody's model: of views of its inputs, so that nothing else rounds."""

    def __init__(self, *losses: nn.Module) -> None:
        super().__init__()
        self.losses = nn.ModuleList(losses)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`x` and `y` [N, 2, 4]: a tuple of losses."""
        return tuple(loss(x.flatten(1), y.flatten(1)) for loss in self.losses)


class Narrow(nn.Module):
    """Losses of bfloat16 tensors that broadcast, or were expanded: as they are, and by autocast."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`x` [3, 4] and `y`: losses in bfloat16, then losses in float32."""
        x, y = x.bfloat16(), y.bfloat16()
        own = x.expand(5, 3, 4), y.expand_as(torch.zeros(5, 3, 4))
        losses = nn.functional.smooth_l1_loss, nn.functional.huber_loss, nn.functional.l1_loss
        narrow = [loss(*pair) for loss in losses for pair in ((x, y), own)]
        narrow.append(torch.ops.aten.smooth_l1_loss(*own, 2, 1.0))  # nobody broadcasts before it
        with torch.autocast("cpu", torch.bfloat16):
            cast = [loss(*pair) for loss in losses for pair in ((x, y), (x, y.float()), own)]
        return *narrow, *cast

    @staticmethod
    def assert_right(outputs: list[Array], x: torch.Tensor, y: torch.Tensor) -> None:
        """Each is the loss of the rounded tensors in float32, rounded once where it is narrow."""
        x, y = x.bfloat16().float(), y.bfloat16().float()
        own = x.expand(5, 3, 4), y.expand(5, 3, 4)
        losses = nn.functional.smooth_l1_loss, nn.functional.huber_loss, nn.functional.l1_loss
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broadcasting is meant
            narrow = [loss(*pair) for loss in losses for pair in ((x, y), own)]
            narrow.append(nn.functional.smooth_l1_loss(*own, reduction="sum"))
            cast = [loss(x, y) for loss in losses for _ in range(3)]
        expected = [*(loss.bfloat16().float() for loss in narrow), *cast]
        assert len(outputs) == len(expected)
        for i, (got, wanted) in enumerate(zip(outputs, expected, strict=True)):
            tolerance = torch.finfo(torch.bfloat16 if i < len(narrow) else torch.float32).eps
            got = got.astype(np.float32)
            np.testing.assert_allclose(got, wanted.numpy(), rtol=2 * tolerance, err_msg=f"{i}")


def arrays(dtype: str, rows: int, special: bool = False) -> tuple[Array, Array]:
    """Differences at, below and above every knee of `LOSSES`, of either sign."""
    rng = np.random.default_rng(7)
    shape = (rows, 2, 4)
    knees = np.array([0.1, 0.5, 1.0, 1 - 1e-6, 1 + 5e-6, 1e4, 1e-9, 2e-8])
    around = np.concatenate([knees * k for k in (1, 1 - 1e-3, 1 + 1e-3, 0.3, 2.5)] + [[0.0]])
    d = rng.choice(around, shape) * rng.choice([-1.0, 1.0], shape)
    y = np.where(rng.random(shape) < 0.5, 0.0, rng.standard_normal(shape))
    if special:
        values = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0])
        d, y = rng.choice(values, shape), rng.choice(values, shape)
    with np.errstate(all="ignore"):
        return (y + d).astype(NUMPY_DTYPE[dtype]), y.astype(NUMPY_DTYPE[dtype])


def by_table(
    module: nn.Module | torch.export.ExportedProgram,
    args: tuple[torch.Tensor, ...],
    *,
    ours: bool = True,
    dynamic: bool = True,
    **options: Any,
) -> onnx.ModelProto:
    """The model that PyTorch's newer exporter makes, with our table or without."""
    if dynamic and isinstance(module, nn.Module):
        rows = torch.export.Dim("N")
        options["dynamic_shapes"] = tuple({0: rows} for _ in args)
    if ours:
        options["custom_translation_table"] = translation_table()
    with quiet():
        program = torch.onnx.export(module, args, dynamo=True, verbose=False, **options)
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return model


def by_torchscript(
    module: nn.Module,
    args: tuple[torch.Tensor, ...],
    *,
    ours: bool = True,
    dynamic: bool = True,
    opset_version: int = 17,
) -> onnx.ModelProto:
    """The model of the TorchScript exporter, with what we register or without."""
    file = io.BytesIO()
    options: dict[str, Any] = {"opset_version": opset_version, "input_names": ["x", "y"]}
    if dynamic:
        options["dynamic_axes"] = {"x": {0: "N"}, "y": {0: "N"}}
    with register_torchscript_symbolic() if ours else contextlib.nullcontext(), quiet():
        torch.onnx.export(module, args, file, dynamo=False, **options)
    return onnx.load_model_from_string(file.getvalue())


def example(dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What `Inside` is exported with."""
    return torch.zeros(3, 2, 4, dtype=DTYPES[dtype]), torch.zeros(3, 2, 4, dtype=DTYPES[dtype])


def session_of(model: onnx.ModelProto) -> ort.InferenceSession:
    """ONNX Runtime on the CPU, of a model that is whole."""
    onnx.checker.check_model(model, full_check=True)
    return opened(model)


def run(session: ort.InferenceSession, *inputs: Array | torch.Tensor) -> list[Array]:
    """The outputs of a model of PyTorch's."""
    names = [port.name for port in session.get_inputs()]
    arrays = [from_torch(x) if isinstance(x, torch.Tensor) else x for x in inputs]
    return list(run_session(session, dict(zip(names, arrays, strict=True))).values())


def assert_each_is_right(outputs: list[Array], losses: list[nn.Module], x: Array, y: Array) -> None:
    """Every output is its loss: class and distance to the truth, by PyTorch's own distance."""
    x, y = (a.reshape(len(a), math.prod(a.shape[1:])) for a in (x, y))
    for got, loss in zip(outputs, losses, strict=True):
        if isinstance(loss, nn.HuberLoss):
            _assert_huber(got, loss, x, y)
        else:
            spec = LossSpec(getattr(loss, "beta", 0.0), loss.reduction, x.dtype.name)
            assert_right(spec, got, x, y, str(loss))


def _assert_huber(got: Array, loss: nn.HuberLoss, x: Array, y: Array) -> None:
    dtype = x.dtype.name
    compute = np.float64 if dtype == "float64" else np.float32
    with np.errstate(all="ignore"):
        delta = np.longdouble(compute(loss.delta))
        d = np.abs(x.astype(np.longdouble) - y.astype(np.longdouble))
        exact = np.where(d < delta, 0.5 * d * d, delta * (d - 0.5 * delta))
        if loss.reduction != "none":
            exact = exact.sum()
        if loss.reduction == "mean":
            exact = exact / np.longdouble(x.size)
        exact = round_to(np.asarray(exact).astype(np.longdouble), dtype)
        with torch.no_grad():
            eager = from_torch(loss(to_torch(x.copy()), to_torch(y.copy())))
    reason = difference(got, exact, eager)
    assert not reason, f"{loss} {dtype} delta={loss.delta}: {reason}"
