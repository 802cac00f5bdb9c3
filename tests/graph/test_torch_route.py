"""The `torch` route: torch.onnx.export with our bodies put in. An export takes about a second."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from agreement import assert_right, pair

import smoothl1_deploy
from smoothl1_deploy import LossSpec, export, translation_table
from smoothl1_deploy.backends.base import load
from smoothl1_deploy.errors import SpecError
from smoothl1_deploy.floats import ulp_distance
from smoothl1_deploy.graph.elements import ELEMENT_TYPE
from smoothl1_deploy.graph.metadata import read_spec
from smoothl1_deploy.reference.oracle import oracle

#: Every reduction, dtype, and beta that the exporter's optimiser or its types get wrong.
SPECS = [
    LossSpec(0.5, "mean"),
    LossSpec(0.0, "none"),
    LossSpec(0.0, "sum", "float16"),
    LossSpec(0.0, "none", "bfloat16"),
    LossSpec(1 - 1e-6, "none"),
    LossSpec(1 + 1e-6, "none", "float64"),
    LossSpec(1e-9, "none"),
    LossSpec(2e-8, "sum", "float64"),
    LossSpec(0.1, "mean", "float64"),
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


@pytest.mark.parametrize("shape", [(), (0,), (1, 4)])
def test_fixed_shapes(shape: tuple[int, ...]) -> None:
    spec = LossSpec(0.5, "mean")
    runner = load(export(spec, "torch", shape))
    assert runner.signature.input.shape == shape
    assert_right(spec, runner.run(*pair(spec, shape))["loss"], *pair(spec, shape))


@pytest.mark.parametrize(
    ("shape", "target_shape", "sizes"),
    [
        (("N", 4), ("N", 1), [((3, 4), (3, 1)), ((1, 4), (1, 1)), ((0, 4), (0, 1))]),
        (("N",), (), [((5,), ()), ((1,), ())]),
        ((2, 3), ("N", 2, 1), [((2, 3), (5, 2, 1))]),
        (("N", "N", "class", "E"), None, [((4, 4, 1, 2), (4, 4, 1, 2))]),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dynamic_axes_and_broadcasting(
    dtype: str,
    shape: tuple[int | str, ...],
    target_shape: tuple[int | str, ...] | None,
    sizes: list[tuple[tuple[int, ...], tuple[int, ...]]],
) -> None:
    spec = LossSpec(0.5, "mean", dtype)
    runner = load(export(spec, "torch", shape, target_shape=target_shape))
    assert runner.signature.input.shape == shape
    assert runner.signature.target.shape == (shape if target_shape is None else target_shape)
    for a_shape, b_shape in sizes:
        a, b = pair(spec, a_shape)[0], pair(spec, b_shape)[1]
        assert_right(spec, runner.run(a, b)["loss"], a, b, f"{a_shape} {b_shape}")


@pytest.mark.parametrize(
    ("shape", "target_shape", "axes"),
    [
        (("N", 4), ("M", 4), "'N' with 'M'"),
        (("N", 4), (3, 4), "'N' with 3"),
        ((8, 4), ("N", 4), "8 with 'N'"),
        (("N",), (2, 0), "'N' with 0"),
    ],
)
def test_axes_that_meet_unknown_are_refused(
    shape: tuple[int | str, ...], target_shape: tuple[int | str, ...], axes: str
) -> None:
    with pytest.raises(SpecError) as caught:
        export(LossSpec(), "torch", shape, target_shape=target_shape)
    assert str(caught.value) == (
        f"the torch route can't broadcast the axis {axes}; give both the same name, or one of "
        "them the size 1, or use route='function'"
    )


def test_any_rank_is_refused() -> None:
    with pytest.raises(SpecError) as caught:
        export(LossSpec(), "torch")
    assert str(caught.value) == (
        "the torch route can't export any rank; give a shape such as ('N', 16), "
        "or use route='function'"
    )


def test_2_to_the_24_constant_elements() -> None:
    spec = LossSpec(0.5, "mean")
    a = np.full(2**24, 0.3, np.float32)
    got = load(export(spec, "torch", ("N",))).run(a, 0 * a)["loss"]
    assert ulp_distance(got, oracle(spec, a, 0 * a)) <= 2


def test_bytes_are_deterministic_and_hold_no_path() -> None:
    """The exporter notes stack traces with the paths of this machine on every node."""
    first, second = (export(LossSpec(0.5), "torch", ("N", 4)).SerializeToString() for _ in range(2))
    assert first == second
    for folder in (Path(smoothl1_deploy.__file__).parents[1], Path(sys.prefix), Path.home()):
        assert str(folder).encode() not in first
    for note in (b"pkg.torch", b"stack_trace", b".py"):
        assert note not in first


def test_is_quiet_and_leaves_logging_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    previous = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(LossSpec(0.5), "torch", (2,))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert logging.root.manager.disable == previous


class _Model(torch.nn.Module):
    """Somebody's own model, with the loss in it and a layer before."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.loss = torch.nn.SmoothL1Loss(beta=beta)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.loss(self.layer(x), y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_translation_table_serves_a_model_of_the_users(beta: float) -> None:
    torch.manual_seed(0)
    module = _Model(beta).eval()
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (x, y),
            opset_version=18,
            dynamo=True,
            verbose=False,
            custom_translation_table=translation_table(),
        )
    assert program is not None
    model = program.model_proto
    assert "DOUBLE" in {
        onnx.TensorProto.DataType.Name(a.i)
        for node in model.graph.node
        for a in node.attribute
        if node.op_type == "Cast" and a.name == "to"
    }
    import onnxruntime as ort

    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    (got,) = session.run(None, dict(zip(names, (x.numpy(), y.numpy()), strict=True)))
    np.testing.assert_allclose(got, module(x, y).detach().numpy(), rtol=1e-6)


def test_an_export_by_torch_leaves_the_functions_as_they_were() -> None:
    """torch.onnx.export writes names into the constants it is given; other files had them then."""
    spec = LossSpec(0.5, per_sample=True)  # whose sums the exporter is given
    before = export(spec).SerializeToString(deterministic=True)
    test_the_translation_table_serves_a_model_of_the_users(0.5)
    assert export(spec).SerializeToString(deterministic=True) == before


def test_an_example_is_as_long_as_no_fixed_axis() -> None:
    """The exporter takes axes that are equal for one: of (N,) against (3, N) it fixed N at 3."""
    model = export(LossSpec(0.5), "torch", ("N",), target_shape=(3, "N"))
    arrays = np.ones(64, np.float32), np.zeros((3, 64), np.float32)
    assert load(model).run(*arrays)["loss"] == 0.75


def test_an_example_takes_no_memory() -> None:
    """Of a fixed shape of 2^34 bytes the exporter is given one zero, expanded."""
    model = export(LossSpec(0.5), "torch", (1 << 32,))
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1 << 32
