"""`translation_table`: the losses inside a module, by torch.onnx.export(dynamo=True)."""

from __future__ import annotations

import io
import warnings
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

from smoothl1_deploy import translation_table
from smoothl1_deploy.errors import SpecError
from smoothl1_deploy.floats import ulp_distance
from smoothl1_deploy.graph.elements import ELEMENT_TYPE


def exported(
    module: nn.Module | torch.export.ExportedProgram,
    args: tuple[torch.Tensor, ...],
    *,
    ours: bool = True,
    dynamic: bool = True,
    **options: Any,
) -> onnx.ModelProto:
    """The model that PyTorch's exporter makes, with our table or without."""
    if dynamic and isinstance(module, nn.Module):
        rows = torch.export.Dim("N")
        options["dynamic_shapes"] = tuple({0: rows} for _ in args)
    if ours:
        options["custom_translation_table"] = translation_table()
    with silently():
        program = torch.onnx.export(module, args, dynamo=True, verbose=False, **options)
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return model


def example(dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(3, 2, 4, dtype=DTYPES[dtype]), torch.zeros(3, 2, 4, dtype=DTYPES[dtype])


def assert_all_right(model: onnx.ModelProto, dtype: str, losses: list[nn.Module]) -> None:
    for value in model.graph.output:
        assert value.type.tensor_type.elem_type == ELEMENT_TYPE[dtype], value.name
    session = session_of(model)
    for rows, special in ((40, False), (1, False), (0, False), (40, True)):
        x, y = arrays(dtype, rows, special)
        assert_each_is_right(run(session, x, y), losses, x, y)


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_loss_in_one_model(dtype: str, optimize: bool) -> None:
    model = exported(Inside(*LOSSES).eval(), example(dtype), optimize=optimize)
    assert_all_right(model, dtype, LOSSES)


@pytest.mark.parametrize("strict", [True, False])
def test_strict_and_non_strict_export(strict: bool) -> None:
    rows = torch.export.Dim("N")
    args = example("float32")
    program = torch.export.export(
        Inside(*LOSSES).eval(), args, dynamic_shapes=({0: rows}, {0: rows}), strict=strict
    )
    assert_all_right(exported(program, ()), "float32", LOSSES)


def test_fixed_shapes_and_newer_opsets() -> None:
    x, y = arrays("float32", 5)
    args = torch.from_numpy(x), torch.from_numpy(y)
    for opset in (18, 21):
        model = exported(Inside(*LOSSES).eval(), args, dynamic=False, opset_version=opset)
        assert {e.version for e in model.opset_import if not e.domain} == {opset}
        assert_each_is_right(run(session_of(model), x, y), LOSSES, x, y)


NEAR = [
    nn.SmoothL1Loss(beta=1 + 9e-6, reduction="none"),
    nn.SmoothL1Loss(beta=1 - 9e-6, reduction="none"),
    nn.SmoothL1Loss(beta=1.5e-8, reduction="none"),
    nn.HuberLoss(delta=1 + 9e-6, reduction="none"),
]


@pytest.mark.parametrize("loss", NEAR, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_optimiser_is_wrong_near_1_without_the_table(dtype: str, loss: nn.Module) -> None:
    knee = getattr(loss, "beta", 0) or loss.delta
    d = (knee * np.array([0.5, 0.99, 1.5, 3.0])).astype(dtype).reshape(1, 4, 1)
    x = np.broadcast_to(d, (1, 4, 2)).reshape(1, 2, 4).copy()
    y = np.zeros_like(x)
    args = torch.from_numpy(x), torch.from_numpy(y)
    expected = loss(*args).flatten(1).numpy()
    ulp = {}
    for ours in (False, True):
        model = exported(Inside(loss), args, ours=ours, dynamic=False, optimize=True)
        (got,) = run(session_of(model), x, y)
        ulp[ours] = int(ulp_distance(got, expected).max())
    assert ulp[False] > 30, "the exporter is right by itself now"
    assert ulp[True] <= 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("loss", [nn.SmoothL1Loss(), nn.HuberLoss(), nn.L1Loss()], ids=str)
def test_a_million_equal_elements(loss: nn.Module, dtype: str) -> None:
    x = np.full((2**17, 2, 4), 0.3, dtype)
    model = exported(Inside(loss), example(dtype))
    (got,) = run(session_of(model), x, 0 * x)
    assert_each_is_right([got], [loss], x, 0 * x)


class Pair(nn.Module):
    """Two tensors of unlike dtypes, by function and as an output of the model at once."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        smooth = nn.functional.smooth_l1_loss(x, y, beta=0.5)
        elements = nn.functional.smooth_l1_loss(x, y, reduction="none", beta=0.5)
        return (
            smooth,
            elements,
            nn.functional.smooth_l1_loss(x, y, reduction="none", beta=0.0),
            nn.functional.relu(smooth),
        )


PROMOTED = [
    (torch.float16, torch.float32),
    (torch.float32, torch.float64),
    (torch.float64, torch.float16),
    (torch.bfloat16, torch.float16),
    (torch.float32, torch.int64),
    (torch.int32, torch.float16),
    (torch.float16, torch.int64),
]


def promoted_pair(a: torch.dtype, b: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(3, 8, generator=generator) * 3 for _ in range(2))
    y[0, 0] = 2049.0  # no number of float16, which an integer becomes first
    return x.to(a), y.to(b)


def assert_promoted(model: onnx.ModelProto, pair: tuple[torch.Tensor, ...], module: Any) -> None:
    eager = module(*pair)
    for value, expected in zip(model.graph.output, eager, strict=True):
        name = str(expected.dtype).removeprefix("torch.")
        assert value.type.tensor_type.elem_type == ELEMENT_TYPE[name]
    inputs = [t.float().numpy() if t.dtype == torch.bfloat16 else t.numpy() for t in pair]
    for got, expected in zip(run(session_of(model), *inputs), eager, strict=True):
        tolerance = 2 * torch.finfo(expected.dtype).eps
        np.testing.assert_allclose(
            got.astype(np.float64), expected.double().numpy(), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("dtypes", PROMOTED, ids=str)
def test_dtypes_are_promoted_as_pytorch_has_it(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    pair = promoted_pair(*dtypes)
    assert_promoted(exported(Pair(), pair, dynamic=False), pair, Pair())


def test_the_huber_loss_of_two_dtypes_has_the_one_torch_export_gives_it() -> None:
    """Eager rounds to the dtype of input; torch.export's program says otherwise, and counts."""
    pair = promoted_pair(torch.float32, torch.float64)
    loss = nn.HuberLoss(delta=0.5)
    program = torch.export.export(loss, pair)
    assert next(iter(program.graph.output_node().args[0])).meta["val"].dtype == torch.float64
    model = exported(loss, pair, dynamic=False)
    (got,) = run(session_of(model), *(t.numpy() for t in pair))
    assert got.dtype == np.float64
    assert int(ulp_distance(got, loss(*(t.double() for t in pair)).numpy())) <= 2


class Explicit(nn.Module):
    """A cast of the module's own is no promotion: the loss stays float32."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            nn.functional.smooth_l1_loss(x.float(), y.float()),
            nn.functional.huber_loss(x.float(), y.float()),
        )


def test_a_cast_of_the_module_s_own_stays() -> None:
    pair = promoted_pair(torch.float16, torch.float16)
    assert_promoted(exported(Explicit(), pair, dynamic=False), pair, Explicit())


class Integers(nn.Module):
    """What PyTorch computes of integers."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return nn.functional.l1_loss(x, y, reduction="none"), nn.functional.l1_loss(
            x, y, reduction="sum"
        )


def integer_pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(24).reshape(3, 8), torch.full((3, 8), 7)


def test_the_l1_loss_of_integers_stays_integral() -> None:
    pair = integer_pair()
    session = session_of(exported(Integers(), pair, dynamic=False))
    for got, expected in zip(
        run(session, *(t.numpy() for t in pair)), Integers()(*pair), strict=True
    ):
        assert got.dtype == np.int64
        np.testing.assert_array_equal(got, expected.numpy())


class Broadcast(nn.Module):
    """A target of one row against every row."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.smooth_l1_loss(x, y, reduction="sum", beta=0.3)


def test_a_target_that_broadcasts() -> None:
    rng = np.random.default_rng(1)
    x, y = (rng.standard_normal(s).astype(np.float32) for s in ((9, 4), (1, 4)))
    args = torch.from_numpy(x), torch.from_numpy(y)
    shapes = ({0: torch.export.Dim("N")}, None)
    with silently():
        expected = Broadcast()(*args).numpy()
        program = torch.onnx.export(
            Broadcast(), args, dynamo=True, verbose=False, dynamic_shapes=shapes,
            custom_translation_table=translation_table(),
        )  # fmt: skip
    assert program is not None
    (got,) = run(session_of(program.model_proto), x, y)
    assert int(ulp_distance(got, expected)) <= 2


@pytest.mark.parametrize(("shape", "optimize"), [((1, 4), True), ((), False)], ids=str)
def test_bfloat16_is_never_expanded_as_such(shape: tuple[int, ...], optimize: bool) -> None:
    """ONNX Runtime's CPU provider has no Expand of it, and refuses the file."""
    torch.manual_seed(0)
    args = torch.randn(3, 4), torch.randn(shape)
    model = exported(Narrow(), args, dynamic=False, optimize=optimize)
    Narrow.assert_right(run(session_of(model), *(t.numpy() for t in args)), *args)


class Used(nn.Module):
    """An expansion that something else reads too, which still has its dtype."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own = y.bfloat16().expand(3, 4)
        return nn.functional.smooth_l1_loss(x.bfloat16(), own), own, own.float().sum()


def test_whoever_else_reads_the_expansion_gets_bfloat16() -> None:
    torch.manual_seed(0)
    args = torch.randn(3, 4), torch.randn(1, 4)
    model = exported(Used(), args, dynamic=False)
    assert model.graph.output[1].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    _, own, total = run(session_of(model), *(t.numpy() for t in args))
    expected = args[1].bfloat16().float().expand(3, 4)
    np.testing.assert_array_equal(own, expected.numpy())
    np.testing.assert_allclose(total, expected.sum().numpy(), rtol=1e-6)


def warned(program: torch.export.ExportedProgram) -> list[str]:
    """What the table warns of while it exports."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.onnx.export(
            program, (), dynamo=True, verbose=False, custom_translation_table=translation_table()
        )
    return [str(w.message) for w in caught if "translation_table" in str(w.message)]


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (nn.SmoothL1Loss(beta=0.5), "smooth_l1_loss"),
        (nn.SmoothL1Loss(beta=0.0), "smooth_l1_loss"),
        (nn.HuberLoss(reduction="none"), "huber_loss"),
        (nn.L1Loss(reduction="sum"), "l1_loss"),
    ],
    ids=str,
)
def test_a_program_that_was_decomposed_before_is_warned_of(loss: nn.Module, name: str) -> None:
    pair = torch.randn(3, 4).bfloat16(), torch.randn(3, 4).bfloat16()
    program = torch.export.export(loss, pair)
    file = io.BytesIO()
    torch.export.save(program.run_decompositions(), file)
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
    pair = promoted_pair(torch.float32, torch.float32)
    assert warned(torch.export.export(Magnitude(), pair)) == []
    model = exported(Magnitude(), pair, dynamic=False)
    for got, expected in zip(
        run(session_of(model), *(t.numpy() for t in pair)), Magnitude()(*pair), strict=True
    ):
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


def causes(error: BaseException | None) -> list[BaseException]:
    found = []
    while error is not None:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def test_what_pytorch_refuses_is_refused() -> None:
    args = torch.zeros(3, 4), torch.zeros(3, 4)
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as caught:
        exported(Wrong(-1.0), args, dynamic=False)
    found = [str(e) for e in causes(caught.value) if isinstance(e, SpecError)]
    assert found and "beta must not be negative, got -1.0" in found[0]
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as caught:
        exported(Wrong(0.0), args, dynamic=False)  # PyTorch's own tracing finds this one
    assert any("non-positive values for delta" in str(e) for e in causes(caught.value))


def test_the_table_is_new_each_time_and_changes_nothing_else() -> None:
    one, two = translation_table(), translation_table()
    assert one == two and one is not two
    one.clear()
    assert translation_table() == two
    loss = nn.SmoothL1Loss(beta=1 + 9e-6)
    before = exported(loss, promoted_pair(torch.float32, torch.float32), ours=False, dynamic=False)
    exported(loss, promoted_pair(torch.float32, torch.float32), dynamic=False)
    after = exported(loss, promoted_pair(torch.float32, torch.float32), ours=False, dynamic=False)
    kinds = [[node.op_type for node in model.graph.node] for model in (before, after)]
    assert kinds[0] == kinds[1]
