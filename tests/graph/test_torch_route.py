"""The `torch` route: torch.onnx.export with our bodies put in. An export takes about a second."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import onnx
import pytest
import torch
from agreement import assert_right, pair
from inside import by_table, run, session_of

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy._model import ELEMENT_TYPE
from smoothl1_deploy.backends._base import load
from smoothl1_deploy.errors import SpecError
from smoothl1_deploy.graph._metadata import read_spec
from smoothl1_deploy.graph._torch_route import _table, kept_registry

#: Every reduction, dtype, and beta that the exporter's optimiser or its types get wrong.
SPECS = [
    LossSpec(0.5, "mean"),
    LossSpec(0.0, "none"),
    LossSpec(0.0, "sum", "float16"),
    LossSpec(0.0, "none", "bfloat16"),
    LossSpec(1 - 1e-6, "none"),
    LossSpec(1 + 1e-6, "none", "float64"),
    LossSpec(2e-8, "sum", "float64"),
    LossSpec(1e39, "none", "float64"),
    LossSpec(1e39, "sum"),
    LossSpec(1000.0, "none", "float16"),
    LossSpec(0.5, "mean", "bfloat16"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_loss_is_right(spec: LossSpec) -> None:
    model = export(spec, "torch", ("N", 7))
    onnx.checker.check_model(model, full_check=True)
    assert read_spec(model) == spec
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == ELEMENT_TYPE[spec.dtype]
    assert {(e.domain, e.version) for e in model.opset_import} == {("", 18)}
    assert len(model.functions) == 0
    for runtime in ("ort-cpu", "onnx-reference"):
        runner = load(model, runtime)
        for rows in (30, 1, 0):
            inputs = pair(spec, (rows, 7))
            assert_right(spec, runner.run(*inputs)["loss"], *inputs, f"{runtime} {rows}")
        a, b = pair(spec, (30, 7), special=True)
        if spec.reduction == "none":
            assert_right(spec, runner.run(a, b)["loss"], a, b, f"{runtime} special")


def test_fixed_and_dynamic_axes_and_broadcasting() -> None:
    for shape, target_shape, sizes in (
        ((), None, [((), ())]),
        ((0,), None, [((0,), (0,))]),
        ((1, 4), None, [((1, 4), (1, 4))]),
        (("N", 4), ("N", 1), [((3, 4), (3, 1)), ((1, 4), (1, 1)), ((0, 4), (0, 1))]),
        (("N",), (), [((5,), ()), ((1,), ())]),
        ((2, 3), ("N", 2, 1), [((2, 3), (5, 2, 1))]),
        (("N", "N", "class", "E"), None, [((4, 4, 1, 2), (4, 4, 1, 2))]),
    ):
        spec = LossSpec(0.5, "mean", "bfloat16" if target_shape else "float32")
        runner = load(export(spec, "torch", shape, target_shape=target_shape))
        assert runner.signature.input.shape == shape
        assert runner.signature.target.shape == (shape if target_shape is None else target_shape)
        for a_shape, b_shape in sizes:
            a, b = pair(spec, a_shape)[0], pair(spec, b_shape)[1]
            assert_right(spec, runner.run(a, b)["loss"], a, b, f"{a_shape} {b_shape}")


def test_axes_that_meet_unknown_and_any_rank_are_refused() -> None:
    for shape, target_shape, axes in (
        (("N", 4), ("M", 4), "'N' with 'M'"),
        (("N", 4), (3, 4), "'N' with 3"),
        ((8, 4), ("N", 4), "8 with 'N'"),
        (("N",), (2, 0), "'N' with 0"),
    ):
        with pytest.raises(SpecError) as caught:
            export(LossSpec(), "torch", shape, target_shape=target_shape)
        assert str(caught.value) == (
            f"the torch route can't broadcast the axis {axes}; give both the same name, or one of "
            "them the size 1, or use the route function"
        )
    with pytest.raises(SpecError) as caught:
        export(LossSpec(), "torch")
    assert str(caught.value) == (
        "the torch route can't export any rank; give a shape, or use the route function"
    )


def test_is_quiet_and_leaves_logging_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    previous = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(LossSpec(0.5), "torch", (2,))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert logging.root.manager.disable == previous


class Model(torch.nn.Module):
    """Somebody's own model, with the loss in it and a layer before."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.loss = torch.nn.SmoothL1Loss(beta=0.5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.loss(self.layer(x), y)  # type: ignore[no-any-return]


def test_a_users_model_by_the_table_leaves_the_functions_as_they_were() -> None:
    """torch.onnx.export writes names into the constants it is given; other files had them then."""
    spec = LossSpec(0.5, per_sample=True)  # whose sums the exporter is given
    before = export(spec).SerializeToString(deterministic=True)
    module, args = Model().eval(), (torch.randn(6, 4), torch.randn(6, 4))
    model = by_table(module, args, dynamic=False, opset_version=18)
    (got,) = run(session_of(model), *args)
    np.testing.assert_allclose(got, module(*args).detach().numpy(), rtol=1e-6)
    assert export(spec).SerializeToString(deterministic=True) == before


def test_the_example_that_is_exported_fixes_no_axis_and_takes_no_memory() -> None:
    """The exporter takes axes that are equal for one: of (N,) against (3, N) it fixed N at 3."""
    model = export(LossSpec(0.5), "torch", ("N",), target_shape=(3, "N"))
    arrays = np.ones(64, np.float32), np.zeros((3, 64), np.float32)
    assert load(model).run(*arrays)["loss"] == 0.75
    model = export(LossSpec(0.5), "torch", (1 << 32,))  # of 2^34 bytes: one zero, expanded
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1 << 32


registration = pytest.importorskip("torch.onnx._internal.exporter._registration")


def test_the_exporter_s_table_is_made_once_for_many_exports() -> None:
    models = [export(LossSpec(0.3), "torch", ("N", 4))]
    before = _table.cache_info().misses
    models.append(export(LossSpec(0.3), "torch", ("N", 4)))
    assert _table.cache_info().misses == before
    assert len({model.SerializeToString(deterministic=True) for model in models}) == 1


def test_what_one_export_adds_to_the_table_the_next_does_not_see() -> None:
    target = torch.ops.aten.abs.default

    def mine(x: object) -> object:
        return x

    with kept_registry():
        first, second = (registration.ONNXRegistry.from_torchlib(opset_version=18) for _ in "12")
        first.register_op(target, mine)
    functions = [[meta.onnx_function for meta in r.get_decomps(target)] for r in (first, second)]
    assert functions[0][0] is mine and mine not in functions[1]


def test_afterwards_pytorch_s_table_is_as_it_was() -> None:
    original = registration.ONNXRegistry.__dict__["from_torchlib"]
    with pytest.raises(ZeroDivisionError), kept_registry():
        assert registration.ONNXRegistry.__dict__["from_torchlib"] is not original
        raise ZeroDivisionError
    assert registration.ONNXRegistry.__dict__["from_torchlib"] is original
