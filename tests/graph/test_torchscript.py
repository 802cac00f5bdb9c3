"""`register_torchscript_symbolic`: what it registers and takes back, and what it makes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import child
import numpy as np
import pytest
import torch
from inside import Inside, by_torchscript, example, run, session_of
from torch import nn
from torch.nn.functional import huber_loss, smooth_l1_loss
from torch.onnx import register_custom_op_symbolic, unregister_custom_op_symbolic

from smoothl1_deploy import register_torchscript_symbolic
from smoothl1_deploy._floats import ulp_distance
from smoothl1_deploy.errors import MissingDependencyError, SpecError
from smoothl1_deploy.graph._torchscript import _SYMBOLIC, _registered


def registered() -> list[Callable[..., Any] | None]:
    return [_registered(name, opset) for name in _SYMBOLIC for opset in range(9, 21)]


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Any:
    before = registered()
    yield
    assert registered() == before


class Network(nn.Module):
    """A layer before, an operator after."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return smooth_l1_loss(self.layer(x), y, beta=0.5) * 2 + huber_loss(x, y)


class Expanded(nn.Module):
    """Operands that the module itself has expanded, beyond what they'd broadcast to."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        whole = torch.zeros(5, 3, 4)
        loss = torch.ops.aten.smooth_l1_loss(x.expand_as(whole), y.expand_as(whole), 2, 0.5)
        return loss + smooth_l1_loss(x.expand(5, 3, 4), y, reduction="sum", beta=0.5)


class Rounded(nn.Module):
    """A cast between the broadcast and the loss that changes the numbers."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b = (t.half().float() for t in torch.broadcast_tensors(x, y))
        return torch.ops.aten.smooth_l1_loss(a, b, 0, 0.5)  # type: ignore[no-any-return]


def test_a_module_traced_and_scripted_computes_what_it_did() -> None:
    """Expansions of its own stay, and a cast after the broadcast still rounds."""
    torch.manual_seed(0)
    args = torch.randn(3, 4), torch.randn(1, 4)
    network: Any = Network().eval()
    for module in (network, torch.jit.script(network), Expanded(), Rounded()):
        model = by_torchscript(module, args, dynamic=False)
        (got,) = run(session_of(model), *args)
        np.testing.assert_allclose(got, module(*args).detach().numpy(), rtol=1e-6)
    assert "Expand" not in {node.op_type for node in model.graph.node}


def mine(g: Any, *inputs: Any) -> Any:
    """A symbolic function that was there before."""
    return g.op("Sub", inputs[0], inputs[1])


def test_undo_restores_what_was_there_before() -> None:
    register_custom_op_symbolic("aten::smooth_l1_loss", mine, 14)
    try:
        before = registered()
        registration = register_torchscript_symbolic()
        assert _registered("aten::smooth_l1_loss", 14) is not mine
        for _ in range(2):
            registration.undo()
            assert registered() == before
        with pytest.raises(KeyError), register_torchscript_symbolic():
            raise KeyError
        assert registered() == before
    finally:
        unregister_custom_op_symbolic("aten::smooth_l1_loss", 14)


def test_without_it_and_after_undo_the_exporter_knows_none_of_them() -> None:
    with register_torchscript_symbolic():
        pass
    for loss in (nn.SmoothL1Loss(), nn.HuberLoss(), nn.SmoothL1Loss(beta=0.0)):
        with pytest.raises(torch.onnx.errors.UnsupportedOperatorError):
            by_torchscript(loss, example("float32"), ours=False)


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


def test_what_pytorch_refuses_is_refused() -> None:
    class Negative(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.smooth_l1_loss(x, y, 1, -1.0)  # type: ignore[no-any-return]

    with pytest.raises((SpecError, RuntimeError), match="beta"):
        by_torchscript(Negative(), example("float32"))


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
        "from smoothl1_deploy.graph._torchscript import _registered;"
        "print(_registered('aten::smooth_l1_loss', 17))"
    )
    done = child.run("-c", code, check=True)
    assert done.stdout.strip() == "None"


def test_the_loss_of_one_number() -> None:
    loss = nn.SmoothL1Loss(beta=1 + 9e-6, reduction="none")
    for dtype in (torch.float32, torch.float64):
        args = torch.tensor(0.5, dtype=dtype), torch.tensor(0.1, dtype=dtype)
        model = by_torchscript(loss, args, dynamic=False)
        (got,) = run(session_of(model), *args)
        expected = loss(*args).numpy()
        assert (got.dtype, got.shape) == (expected.dtype, ())
        assert int(ulp_distance(got, expected)) <= 1


def test_a_mean_whose_sum_overflows_float32() -> None:
    x = np.full((4, 2, 4), 3e38, np.float32)
    session = session_of(by_torchscript(Inside(nn.SmoothL1Loss()), example("float32")))
    assert run(session, x, 0 * x)[0] == np.float32(3e38)


class Autocast(Inside):
    """Casts what the loss has broadcast."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x, y)


def test_the_pair_is_not_added_up_to_learn_its_shape() -> None:
    for module, dtype in ((Inside, "float32"), (Autocast, "bfloat16")):
        model = by_torchscript(module(nn.SmoothL1Loss()), example(dtype))
        assert not {"Expand", "ConstantOfShape"} & {node.op_type for node in model.graph.node}
