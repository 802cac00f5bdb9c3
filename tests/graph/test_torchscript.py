"""`register_torchscript_symbolic`: the losses inside, by torch.onnx.export(dynamo=False)."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
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
    run,
    session_of,
    silently,
)
from torch import nn
from torch.onnx import register_custom_op_symbolic, unregister_custom_op_symbolic

from smoothl1_deploy import register_torchscript_symbolic
from smoothl1_deploy.errors import MissingDependencyError, SpecError
from smoothl1_deploy.floats import ulp_distance
from smoothl1_deploy.graph.elements import ELEMENT_TYPE
from smoothl1_deploy.graph.torchscript import _SYMBOLIC, OPSETS, _registered

NAMES = tuple(_SYMBOLIC)


def exported(
    module: nn.Module, args: tuple[torch.Tensor, ...], opset: int = 17, *, dynamic: bool = True
) -> onnx.ModelProto:
    """The model of the TorchScript exporter, as it is registered."""
    file = io.BytesIO()
    axes = {"dynamic_axes": {"x": {0: "N"}, "y": {0: "N"}}} if dynamic else {}
    with silently():
        torch.onnx.export(
            module, args, file, dynamo=False, opset_version=opset, input_names=["x", "y"], **axes
        )
    return onnx.load_model_from_string(file.getvalue())


def example(dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(3, 2, 4, dtype=DTYPES[dtype]), torch.zeros(3, 2, 4, dtype=DTYPES[dtype])


def registered() -> list[Callable[..., Any] | None]:
    return [_registered(name, opset) for name in NAMES for opset in range(9, 21)]


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Any:
    before = registered()
    yield
    assert registered() == before


def test_without_it_the_exporter_knows_none_of_them() -> None:
    for loss in (nn.SmoothL1Loss(), nn.HuberLoss(), nn.SmoothL1Loss(beta=0.0)):
        with pytest.raises(torch.onnx.errors.UnsupportedOperatorError):
            exported(loss, example("float32"))


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_loss_in_one_model(dtype: str, opset: int) -> None:
    with register_torchscript_symbolic():
        model = exported(Inside(*LOSSES).eval(), example(dtype), opset)
    assert {e.version for e in model.opset_import if not e.domain} == {opset}
    for value in model.graph.output:
        assert value.type.tensor_type.elem_type == ELEMENT_TYPE[dtype]
    session = session_of(model)
    for rows, special in ((40, False), (1, False), (0, False), (40, True)):
        x, y = arrays(dtype, rows, special)
        assert_each_is_right(run(session, x, y), LOSSES, x, y)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("loss", [nn.SmoothL1Loss(), nn.HuberLoss(), nn.L1Loss()], ids=str)
def test_a_million_equal_elements(loss: nn.Module, dtype: str) -> None:
    with register_torchscript_symbolic():
        model = exported(Inside(loss), example(dtype))
    x = np.full((2**17, 2, 4), 0.3, dtype)
    (got,) = run(session_of(model), x, 0 * x)
    assert_each_is_right([got], [loss], x, 0 * x)


class Network(nn.Module):
    """A layer before, a branch on a flag, an operator after."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.smooth_l1_loss(
            self.layer(x), y, beta=0.5
        ) * 2 + nn.functional.huber_loss(x, y)


@pytest.mark.parametrize("script", [False, True])
def test_a_network_traced_and_scripted(script: bool) -> None:
    torch.manual_seed(0)
    args = torch.randn(6, 4), torch.randn(6, 4)
    network: Any = Network().eval()
    with register_torchscript_symbolic(), silently():
        model = exported(torch.jit.script(network) if script else network, args)
    (got,) = run(session_of(model), *(t.numpy() for t in args))
    np.testing.assert_allclose(got, network(*args).detach().numpy(), rtol=1e-6)


class Promotion(nn.Module):
    """Two tensors of unlike dtypes."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mean = nn.functional.smooth_l1_loss(x, y, beta=0.5)
        return (
            mean,
            nn.functional.smooth_l1_loss(x, y, reduction="none"),
            nn.functional.l1_loss(x, y),
        )


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float16),
        (torch.float32, torch.int64),
        (torch.int32, torch.float16),
    ],
    ids=str,
)
def test_dtypes_are_promoted_as_pytorch_has_it(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(3, 8, generator=generator) * 3 for _ in range(2))
    y[0, 0] = 2049.0  # no number of float16, which an integer becomes first
    args = x.to(dtypes[0]), y.to(dtypes[1])
    with register_torchscript_symbolic():
        session = session_of(exported(Promotion(), args))
    for got, expected in zip(
        run(session, *(t.numpy() for t in args)), Promotion()(*args), strict=True
    ):
        assert got.dtype == expected.numpy().dtype
        tolerance = 2 * torch.finfo(expected.dtype).eps
        np.testing.assert_allclose(
            got.astype(np.float64), expected.double().numpy(), rtol=tolerance, atol=tolerance
        )


class Integers(nn.Module):
    """What PyTorch computes of integers, and what it refuses."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.l1_loss(x, y, reduction=self.reduction)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_the_l1_loss_of_integers_stays_integral(reduction: str) -> None:
    args = torch.arange(24).reshape(3, 8), torch.full((3, 8), 7)
    with register_torchscript_symbolic():
        session = session_of(exported(Integers(reduction), args))
    (got,) = run(session, *(t.numpy() for t in args))
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, Integers(reduction)(*args).numpy())


def mine(g: Any, *inputs: Any) -> Any:
    """A symbolic function that was there before."""
    return g.op("Sub", inputs[0], inputs[1])


def test_undo_restores_what_was_there_before() -> None:
    register_custom_op_symbolic("aten::smooth_l1_loss", mine, 14)
    try:
        before = registered()
        registration = register_torchscript_symbolic()
        assert _registered("aten::smooth_l1_loss", 14) is not mine
        registration.undo()
        assert registered() == before
        assert _registered("aten::smooth_l1_loss", 14) is mine
        registration.undo()
        assert registered() == before
    finally:
        unregister_custom_op_symbolic("aten::smooth_l1_loss", 14)


def test_an_export_after_undo_ends_as_one_before() -> None:
    with register_torchscript_symbolic():
        pass
    for loss in (nn.SmoothL1Loss(), nn.HuberLoss(), nn.SmoothL1Loss(beta=0.0)):
        with pytest.raises(torch.onnx.errors.UnsupportedOperatorError):
            exported(loss, example("float32"))


def test_twice_is_once() -> None:
    before = registered()
    first = register_torchscript_symbolic()
    once = registered()
    second = register_torchscript_symbolic()
    assert registered() == once
    second.undo()
    assert registered() == once, "the inner of two takes nothing away"
    first.undo()
    assert registered() == before


def test_an_error_in_the_with_undoes_too() -> None:
    before = registered()
    with pytest.raises(KeyError), register_torchscript_symbolic():
        raise KeyError
    assert registered() == before


def test_what_pytorch_refuses_is_refused() -> None:
    class Negative(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.smooth_l1_loss(x, y, 1, -1.0)  # type: ignore[no-any-return]

    with register_torchscript_symbolic(), pytest.raises((SpecError, RuntimeError), match="beta"):
        exported(Negative(), example("float32"))


def test_a_pytorch_that_keeps_its_registry_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.8 has no such folder."""
    folder = "torch.onnx._internal.torchscript_exporter"
    monkeypatch.setitem(sys.modules, folder, None)
    monkeypatch.setitem(sys.modules, f"{folder}.registration", None)
    with monkeypatch.context() as old:
        old.setattr(torch, "__version__", "2.8.0")
        with pytest.raises(MissingDependencyError) as caught:
            register_torchscript_symbolic()
    text = str(caught.value)
    assert text.startswith("register_torchscript_symbolic, with torch 2.8.0, needs the package")
    assert text.endswith("Install it with: pip install torch==2.13.0")
    monkeypatch.undo()


def test_importing_the_package_registers_nothing() -> None:
    code = (
        "import smoothl1_deploy as s; s.register_torchscript_symbolic;"
        "from smoothl1_deploy.graph.torchscript import _registered;"
        "print(_registered('aten::smooth_l1_loss', 17))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_loss_of_one_number(dtype: str) -> None:
    loss = nn.SmoothL1Loss(beta=1 + 9e-6, reduction="none")
    args = torch.tensor(0.5, dtype=DTYPES[dtype]), torch.tensor(0.1, dtype=DTYPES[dtype])
    with register_torchscript_symbolic():
        model = exported(loss, args, dynamic=False)
    (got,) = run(session_of(model), *(t.numpy() for t in args))
    expected = loss(*args).numpy()
    assert (got.dtype, got.shape) == (expected.dtype, ())
    assert int(ulp_distance(got, expected)) <= 1


def test_a_mean_whose_sum_overflows_float32() -> None:
    x = np.full((4, 2, 4), 3e38, np.float32)
    with register_torchscript_symbolic():
        session = session_of(exported(Inside(nn.SmoothL1Loss()), example("float32")))
    assert run(session, x, 0 * x)[0] == np.float32(3e38)


class Autocast(Inside):
    """Casts what the loss has broadcast."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x, y)


@pytest.mark.parametrize(("module", "dtype"), [(Inside, "float32"), (Autocast, "bfloat16")])
def test_the_pair_is_not_added_up_to_learn_its_shape(module: type[Inside], dtype: str) -> None:
    with register_torchscript_symbolic():
        model = exported(module(nn.SmoothL1Loss()), example(dtype))
    assert not {"Expand", "ConstantOfShape"} & {node.op_type for node in model.graph.node}


class Expanded(nn.Module):
    """Operands that the module itself has expanded, beyond what they'd broadcast to."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        whole = torch.zeros(5, 3, 4)
        loss = torch.ops.aten.smooth_l1_loss(x.expand_as(whole), y.expand_as(whole), 2, 0.5)
        return loss + nn.functional.smooth_l1_loss(x.expand(5, 3, 4), y, reduction="sum", beta=0.5)


def test_an_expansion_of_the_module_s_own_stays() -> None:
    torch.manual_seed(0)
    args = torch.randn(3, 4), torch.randn(1, 4)
    with register_torchscript_symbolic():
        session = session_of(exported(Expanded(), args, dynamic=False))
    (got,) = run(session, *(t.numpy() for t in args))
    np.testing.assert_allclose(got, Expanded()(*args).numpy(), rtol=1e-6)


class Rounded(nn.Module):
    """A cast between the broadcast and the loss that changes the numbers."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b = (t.half().float() for t in torch.broadcast_tensors(x, y))
        return torch.ops.aten.smooth_l1_loss(a, b, 0, 0.5)  # type: ignore[no-any-return]


def test_a_cast_after_the_broadcast_still_rounds() -> None:
    torch.manual_seed(0)
    args = torch.randn(3, 4), torch.randn(1, 4)
    with register_torchscript_symbolic():
        model = exported(Rounded(), args, dynamic=False)
    assert "Expand" not in {node.op_type for node in model.graph.node}
    (got,) = run(session_of(model), *(t.numpy() for t in args))
    np.testing.assert_allclose(got, Rounded()(*args).numpy(), rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 4), (1, 4), ()], ids=str)
def test_bfloat16_is_never_expanded_as_such(shape: tuple[int, ...]) -> None:
    """ONNX Runtime's CPU provider has no Expand of it, and refuses the file."""
    torch.manual_seed(0)
    args = torch.randn(3, 4), torch.randn(shape)
    with register_torchscript_symbolic():
        model = exported(Narrow(), args, dynamic=False)
    Narrow.assert_right(run(session_of(model), *(t.numpy() for t in args)), *args)
