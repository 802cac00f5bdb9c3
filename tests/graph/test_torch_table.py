"""`translation_table`: what torch.onnx.export(dynamo=True) does with it, and without."""

from __future__ import annotations

import io
import warnings

import numpy as np
import onnx
import pytest
import torch
from inside import (
    LOSSES,
    Inside,
    arrays,
    assert_each_is_right,
    by_table,
    example,
    run,
    session_of,
)
from torch import nn

from smoothl1_deploy import translation_table
from smoothl1_deploy._floats import ulp_distance
from smoothl1_deploy.errors import SpecError


def test_strict_programs_fixed_shapes_and_newer_opsets() -> None:
    x, y = arrays("float32", 40)
    rows = {0: torch.export.Dim("N")}
    program = torch.export.export(
        Inside(*LOSSES).eval(), example("float32"), dynamic_shapes=(rows, rows), strict=True
    )
    args = torch.from_numpy(x), torch.from_numpy(y)
    fixed = by_table(Inside(*LOSSES).eval(), args, dynamic=False, opset_version=21)
    assert {e.version for e in fixed.opset_import if not e.domain} == {21}
    for model in (by_table(program, ()), fixed):
        assert_each_is_right(run(session_of(model), x, y), LOSSES, x, y)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_optimiser_is_wrong_near_1_without_the_table(dtype: str) -> None:
    for loss in (
        nn.SmoothL1Loss(beta=1 + 9e-6, reduction="none"),
        nn.SmoothL1Loss(beta=1 - 9e-6, reduction="none"),
        nn.SmoothL1Loss(beta=1.5e-8, reduction="none"),
        nn.HuberLoss(delta=1 + 9e-6, reduction="none"),
    ):
        knee = getattr(loss, "beta", 0) or loss.delta
        x = (knee * np.array([[0.5, 0.99, 1.5, 3.0]])).astype(dtype)
        args = torch.from_numpy(x), torch.zeros(1, 4, dtype=getattr(torch, dtype))
        ulp = []
        for ours in (False, True):
            model = by_table(loss, args, ours=ours, dynamic=False, optimize=True)
            (got,) = run(session_of(model), x, 0 * x)
            ulp.append(int(ulp_distance(got, loss(*args).numpy()).max()))
        assert ulp[0] > 30, "the exporter is right by itself now"
        assert ulp[1] <= 1, loss


def test_the_huber_loss_of_two_dtypes_has_the_one_torch_export_gives_it() -> None:
    """Eager rounds to the dtype of input; torch.export's program says otherwise, and counts."""
    pair = torch.randn(3, 8), torch.randn(3, 8).double()
    loss = nn.HuberLoss(delta=0.5)
    program = torch.export.export(loss, pair)
    assert next(iter(program.graph.output_node().args[0])).meta["val"].dtype == torch.float64
    (got,) = run(session_of(by_table(loss, pair, dynamic=False)), *pair)
    assert got.dtype == np.float64
    assert int(ulp_distance(got, loss(*(t.double() for t in pair)).numpy())) <= 2


class Used(nn.Module):
    """An expansion that something else reads too, which still has its dtype."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own = y.bfloat16().expand(3, 4)
        return nn.functional.smooth_l1_loss(x.bfloat16(), own), own, own.float().sum()


def test_whoever_else_reads_the_expansion_gets_bfloat16() -> None:
    torch.manual_seed(0)
    args = torch.randn(3, 4), torch.randn(1, 4)
    model = by_table(Used(), args, dynamic=False)
    assert model.graph.output[1].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    _, own, total = run(session_of(model), *args)
    expected = args[1].bfloat16().float().expand(3, 4)
    np.testing.assert_array_equal(own.astype(np.float32), expected.numpy())
    np.testing.assert_allclose(total, expected.sum().numpy(), rtol=1e-6)


def warned(program: torch.export.ExportedProgram) -> list[str]:
    """What the table warns of while it exports."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.onnx.export(
            program, (), dynamo=True, verbose=False, custom_translation_table=translation_table()
        )
    return [str(w.message) for w in caught if "translation_table" in str(w.message)]


def test_a_program_that_was_decomposed_before_is_warned_of() -> None:
    pair = torch.randn(3, 4).bfloat16(), torch.randn(3, 4).bfloat16()
    for loss, name in (
        (nn.SmoothL1Loss(beta=0.5), "smooth_l1_loss"),
        (nn.SmoothL1Loss(beta=0.0), "smooth_l1_loss"),
        (nn.HuberLoss(reduction="none"), "huber_loss"),
        (nn.L1Loss(reduction="sum"), "l1_loss"),
    ):
        file = io.BytesIO()
        torch.export.save(torch.export.export(loss, pair).run_decompositions(), file)
        file.seek(0)
        (text,) = warned(torch.export.load(file))
        assert text == (
            f"the program has its {name} in plain operators: it was decomposed before "
            "(run_decompositions), and translation_table() finds no loss to replace. The exported "
            "loss is PyTorch's decomposition, whose sums drift and whose beta near 1 is dropped; "
            "give torch.onnx.export the module, or the program as torch.export.export made it"
        )


class Magnitude(nn.Module):
    """An abs of the module's own, beside a loss."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return nn.functional.l1_loss(x, y), (x - y).abs(), torch.complex(x, y).abs()


def test_an_abs_of_the_module_s_own_is_no_loss() -> None:
    pair = torch.randn(3, 8), torch.randn(3, 8)
    assert warned(torch.export.export(Magnitude(), pair)) == []
    found = run(session_of(by_table(Magnitude(), pair, dynamic=False)), *pair)
    for got, expected in zip(found, Magnitude()(*pair), strict=True):
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)


class Wrong(nn.Module):
    """What PyTorch refuses when it runs, and an exporter does not."""

    def __init__(self, knee: float) -> None:
        super().__init__()
        self.knee = knee

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.knee < 0:
            return nn.functional.smooth_l1_loss(x, y, beta=self.knee)
        return nn.functional.huber_loss(x, y, delta=self.knee)


def test_what_pytorch_refuses_is_refused() -> None:
    args = torch.zeros(3, 4), torch.zeros(3, 4)
    for knee, kind, text in (
        (-1.0, SpecError, "beta must not be negative, got -1.0"),
        (0.0, Exception, "non-positive values for delta"),  # PyTorch's own tracing finds it
    ):
        with pytest.raises(torch.onnx.errors.OnnxExporterError) as caught:
            by_table(Wrong(knee), args, dynamic=False)
        error: BaseException | None = caught.value
        found = []
        while error is not None:
            found += [str(error)] if isinstance(error, kind) else []
            error = error.__cause__ or error.__context__
        assert any(text in each for each in found), found


def test_the_table_is_new_each_time_and_changes_nothing_else() -> None:
    one, two = translation_table(), translation_table()
    assert one == two and one is not two
    one.clear()
    assert translation_table() == two
    loss, pair = nn.SmoothL1Loss(beta=1 + 9e-6), (torch.randn(3, 8), torch.randn(3, 8))
    kinds = []
    for ours in (False, True, False):
        model = by_table(loss, pair, ours=ours, dynamic=False)
        kinds.append([node.op_type for node in model.graph.node])
    assert kinds[0] == kinds[2] != kinds[1]
