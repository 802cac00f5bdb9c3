"""The losses inside somebody's module, by both of PyTorch's exporters with what we give them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from inside import (
    DTYPES,
    LOSSES,
    Inside,
    Narrow,
    arrays,
    assert_each_is_right,
    by_table,
    by_torchscript,
    example,
    run,
    session_of,
)
from torch import nn
from torch.nn.functional import l1_loss, relu, smooth_l1_loss

from smoothl1_deploy._floats import ulp_distance
from smoothl1_deploy._model import ELEMENT_TYPE
from smoothl1_deploy.graph._torchscript import OPSETS

Exporter = Callable[..., onnx.ModelProto]
both = pytest.mark.parametrize("exporter", [by_table, by_torchscript])
#: Their own ways to go about it, optimised or not and every opset; an opset changes no dtype.
WAYS = [(by_table, {"optimize": o}, DTYPES) for o in (True, False)]
WAYS += [
    (by_torchscript, {"opset_version": opset}, DTYPES if opset == 17 else ("float32",))
    for opset in OPSETS
]


@pytest.mark.parametrize(
    ("exporter", "options", "dtypes"), WAYS, ids=lambda way: getattr(way, "__name__", str(way))
)
def test_every_loss_in_one_model(
    exporter: Exporter, options: dict[str, Any], dtypes: Sequence[str]
) -> None:
    for dtype in dtypes:
        model = exporter(Inside(*LOSSES).eval(), example(dtype), **options)
        opset = {entry.version for entry in model.opset_import if not entry.domain}
        assert opset == {options.get("opset_version", *opset)}
        for value in model.graph.output:
            assert value.type.tensor_type.elem_type == ELEMENT_TYPE[dtype], value.name
        session = session_of(model)
        for rows, special in ((40, False), (1, False), (0, False), (40, True)):
            x, y = arrays(dtype, rows, special)
            assert_each_is_right(run(session, x, y), LOSSES, x, y)


@both
def test_a_million_equal_elements(exporter: Exporter) -> None:
    losses = [nn.SmoothL1Loss(), nn.HuberLoss(), nn.L1Loss()]
    for dtype in ("float32", "float64"):
        x = np.full((2**17, 2, 4), 0.3, dtype)
        outputs = run(session_of(exporter(Inside(*losses), example(dtype))), x, 0 * x)
        assert_each_is_right(outputs, losses, x, 0 * x)


class Promoted(nn.Module):
    """Two tensors of unlike dtypes, by function and as an output of the model at once."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mean = smooth_l1_loss(x, y, beta=0.5)
        betas = (smooth_l1_loss(x, y, reduction="none", beta=beta) for beta in (0.5, 0.0, 1.0))
        return mean, *betas, l1_loss(x, y), relu(mean)


class Explicit(nn.Module):
    """A cast of the module's own is no promotion: the loss stays float32."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return smooth_l1_loss(x.float(), y.float()), nn.functional.huber_loss(x.float(), y.float())


@both
def test_dtypes_are_promoted_as_pytorch_has_it(exporter: Exporter) -> None:
    for module, a, b in (
        (Promoted(), torch.float16, torch.float32),
        (Promoted(), torch.float32, torch.float64),
        (Promoted(), torch.float64, torch.float16),
        (Promoted(), torch.bfloat16, torch.float16),
        (Promoted(), torch.float32, torch.int64),
        (Promoted(), torch.int32, torch.float16),
        (Promoted(), torch.float16, torch.int64),
        (Explicit(), torch.float16, torch.float16),
    ):
        generator = torch.Generator().manual_seed(3)
        x, y = (torch.randn(3, 8, generator=generator) * 3 for _ in range(2))
        y[0, 0] = 2049.0  # no number of float16, which an integer becomes first
        pair = x.to(a), y.to(b)
        model, eager = exporter(module, pair, dynamic=False), module(*pair)
        for value, expected in zip(model.graph.output, eager, strict=True):
            name = str(expected.dtype).removeprefix("torch.")
            assert value.type.tensor_type.elem_type == ELEMENT_TYPE[name]
        for got, expected in zip(run(session_of(model), *pair), eager, strict=True):
            wide, eps = expected.double().numpy(), 2 * torch.finfo(expected.dtype).eps
            np.testing.assert_allclose(got.astype(np.float64), wide, rtol=eps, atol=eps)


class Integers(nn.Module):
    """What PyTorch computes of integers."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return l1_loss(x, y, reduction="none"), l1_loss(x, y, reduction="sum")


@both
def test_the_l1_loss_of_integers_stays_integral(exporter: Exporter) -> None:
    pair = torch.arange(24).reshape(3, 8), torch.full((3, 8), 7)
    found = run(session_of(exporter(Integers(), pair, dynamic=False)), *pair)
    for got, expected in zip(found, Integers()(*pair), strict=True):
        assert got.dtype == np.int64
        np.testing.assert_array_equal(got, expected.numpy())


@both
def test_bfloat16_is_never_expanded_as_such(exporter: Exporter) -> None:
    """ONNX Runtime's CPU provider has no Expand of it, and refuses the file."""
    torch.manual_seed(0)
    for shape in ((3, 4), (1, 4), ()):
        args = torch.randn(3, 4), torch.randn(shape)
        options = {"optimize": shape != ()} if exporter is by_table else {}
        model = exporter(Narrow(), args, dynamic=False, **options)
        Narrow.assert_right(run(session_of(model), *args), *args)


@both
def test_a_target_that_broadcasts_and_fixed_shapes(exporter: Exporter) -> None:
    x, y = arrays("float32", 5)
    args = torch.from_numpy(x), torch.from_numpy(y[:1].copy())
    loss = nn.SmoothL1Loss(reduction="sum", beta=0.3)
    (got,) = run(session_of(exporter(loss, args, dynamic=False)), x, y[:1])
    assert int(ulp_distance(got, loss(*args).numpy())) <= 2
