"""A beta for each channel, or any array of them that broadcasts with the element losses."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from handmade import model_of, run
from onnx import numpy_helper

from smoothl1_deploy import LossSpec, attach, export, load, loss_over, verify
from smoothl1_deploy.errors import InvalidInputError, SpecError, UnsupportedError
from smoothl1_deploy.graph._metadata import read_spec
from smoothl1_deploy.serving._graph import serve

RNG = np.random.default_rng(33)
X, Y = (RNG.normal(size=(4, 3, 6, 5)).astype("f4") for _ in range(2))
SHAPE = ("N", 3, "H", "W")
CHANNELS = np.array([0.0, 0.5, math.inf])[:, None, None]
BACKENDS = ["ort-cpu", "ort-cpu-bare", "onnx-reference", "trt-network", "torch"]


def of_torch(loss: str, knees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The losses and their gradient: a module of PyTorch's for each channel of its own."""
    x, module = torch.tensor(X, requires_grad=True), torch.nn.SmoothL1Loss
    name = "beta"
    if loss == "huber":
        module, name = torch.nn.HuberLoss, "delta"
    losses = torch.stack(
        [
            module(reduction="none", **{name: float(knee)})(x[:, i], torch.tensor(Y[:, i]))
            for i, knee in enumerate(knees.ravel())
        ],
        dim=1,
    )
    losses.sum().backward()
    assert x.grad is not None
    return losses.detach().numpy(), x.grad.numpy()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["smooth_l1", "huber"])
def test_each_channel_has_the_loss_of_its_own_beta(loss: str, backend: str) -> None:
    knees = CHANNELS + 0.25 * (loss == "huber")
    losses, gradient = of_torch(loss, knees)
    fields = {"delta": knees} if loss == "huber" else {"beta": knees}
    spec = LossSpec(loss=loss, reduction="none", gradient=True, **fields)
    for route in ("function", "inlined"):
        found = load(export(spec, route, SHAPE), backend).run(X, Y)
        np.testing.assert_allclose(found["loss"], losses, rtol=1e-6)
        np.testing.assert_allclose(found["grad_input"], gradient, rtol=1e-6)
        mean = load(export(LossSpec(loss=loss, **fields), route, SHAPE), backend).run(X, Y)
        np.testing.assert_allclose(mean["loss"], losses.mean(dtype="f8"), rtol=1e-6)


def test_a_slope_of_negative_zero_keeps_its_sign() -> None:
    """In PyTorch's too: a sum over the modules of each beta would be 0."""
    zeros = np.float32([-0.0, -0.0])
    for backend in ("ort-cpu", "torch"):
        model = export(LossSpec([0.5, 2.0], "none", gradient=True))
        assert np.signbit(load(model, backend).run(zeros, -zeros)["grad_input"]).all()


def test_betas_that_are_all_one_number_have_its_loss_in_every_bit() -> None:
    for dtype, beta in (("float32", 0.3), ("float64", 0.3), ("float16", 1e-42), ("float32", 0.0)):
        pair = X.astype(dtype), Y.astype(dtype)
        for fields in ({"reduction": "none"}, {"mask": True}, {"axes": (1,)}):
            one = LossSpec(beta, dtype=dtype, gradient=True, **fields)  # type: ignore[arg-type]
            each = one.at(np.full((3, 1, 1), beta))
            mask = {"mask": X > 0} if one.mask else {}
            for route in ("function", "inlined"):
                right, found = (load(export(s, route)).run(*pair, **mask) for s in (one, each))
                for name in right:
                    assert right[name].tobytes() == found[name].tobytes(), (one.name, route, name)


def test_they_are_what_the_operators_have_a_kernel_for() -> None:
    nodes = [node.op_type for node in export(LossSpec(CHANNELS), shape=SHAPE).graph.node]
    assert nodes == ["Constant", "Constant", "SmoothL1LossTotals", "Div", "Cast"]


def test_betas_may_enlarge_the_losses_as_an_operand_does() -> None:
    spec = LossSpec([[0.0], [1.0]], "none", gradient=True, upstream=True)
    x, y = np.float32([3, -0.5, 0.25]), np.zeros(3, np.float32)
    whole = load(export(LossSpec([[0.0], [1.0]], "sum"))).run(x, y)["loss"]
    assert whole == 3.75 + 2.65625
    for model in (export(spec), export(spec, "inlined", shape=(3,)), export(spec, shape=("N",))):
        found = load(model).run(x, y, grad_output=np.ones((2, 3), np.float32))
        np.testing.assert_array_equal(found["loss"], [[3, 0.5, 0.25], [2.5, 0.125, 0.03125]])
        np.testing.assert_array_equal(found["grad_input"], [2, -1.5, 1.25])


def test_the_elements_beside_a_loss_have_its_whole_shape() -> None:
    for elements in ("losses", "differences"):
        spec = LossSpec([[0.0], [1.0]], elements=elements, mask=True, weight="count")
        assert verify(export(spec), drift=False), elements
        found = load(export(spec, shape=("N",))).run(
            np.float32([2, 1, 0.5]),
            np.zeros(3, "f4"),
            weight=np.ones(3, "f4"),
            mask=X[0, 0, 0, :3] < 9,
        )
        right = {"losses": [[2, 1, 0.5], [1.5, 0.5, 0.125]], "differences": [[2, 1, 0.5]] * 2}
        np.testing.assert_array_equal(found[elements], right[elements])


def test_verify_holds_them_against_pytorch_and_sees_where_one_is_another() -> None:
    spec = LossSpec([0.0, 0.5, 1.0, math.inf], per_sample=True, gradient=True)
    for model in (export(spec), export(spec, "inlined", shape=("N", "C"))):
        assert verify(model)
    model = export(spec, "inlined", shape=("N", 4))
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].t.dims == [4]:
            values = numpy_helper.to_array(node.attribute[0].t)
            wrong = np.where(values == 0.5, 0.75, values).astype(values.dtype)
            node.attribute[0].t.CopyFrom(numpy_helper.from_array(wrong))
    with pytest.warns(match="was changed"):
        found = verify(model, drift=False)
    assert not found
    assert "an array of betas has no probes" in found.diagnoses[0].explanation


def test_a_spec_takes_every_array_and_keeps_numbers() -> None:
    written = (
        [0.5, math.inf], (0.5, math.inf), np.array([0.5, math.inf]), np.float16([0.5, math.inf]),
        torch.tensor([0.5, math.inf], requires_grad=True), [np.float32(0.5), math.inf],
    )  # fmt: skip
    specs = {LossSpec(beta=beta) for beta in written}
    assert specs == {LossSpec(beta=(0.5, math.inf))}
    (spec,) = specs
    assert LossSpec(np.array(0.5)) == LossSpec(torch.tensor(0.5)) == LossSpec(0.5)
    assert spec.to_dict()["beta"] == (0.5, "inf")
    assert LossSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert read_spec(export(spec)) == spec
    betas = (0.5, [0.5, 1.0], [0.5, math.inf], [[0.5, math.inf]], [[0.5], [math.inf]])
    assert len({LossSpec(beta=beta).name for beta in betas}) == len(betas)
    assert all(len(LossSpec(np.full(n, 0.1)).name) < 60 for n in (1, 10_000))


def test_what_is_no_array_of_betas_is_refused() -> None:
    nested: list[object] = []
    nested.append(nested)
    for fields, why in (
        ({"beta": [0.5, -1]}, "must not be negative, got -1.0"),
        ({"beta": [[0.5], [math.nan]]}, "must not be NaN"),
        ({"beta": ["0.5"]}, "must be a real number, got '0.5'"),
        ({"beta": []}, "an array of at least one"),
        ({"beta": np.zeros((2, 0))}, "an array of at least one"),
        ({"beta": [1, [2]]}, "rows are as long as each other"),
        ({"beta": nested}, "more than 64 axes"),
        ({"beta": [0.5], "runtime_beta": True}, "leave beta at its default"),
        ({"runtime_beta": (3, 0)}, "sizes above 0, got \\(3, 0\\)"),
        ({"runtime_beta": "3"}, "runtime_beta must be a sequence"),
        ({"beta": [0.0], "loss": "l1"}, "the loss l1 is smooth_l1 with beta 0"),
        ({"beta": [0.5], "loss": "huber"}, "call it delta"),
        ({"delta": [1.0, 0.0], "loss": "huber"}, "delta must be above 0"),
    ):
        with pytest.raises(SpecError, match=why):
            LossSpec(**fields)  # type: ignore[arg-type]


def test_a_file_that_takes_betas_at_run_time_gives_what_one_gives_that_has_them() -> None:
    for loss, dtype in (("smooth_l1", "float32"), ("huber", "float16"), ("smooth_l1", "float64")):
        spec = LossSpec(
            loss=loss,
            dtype=dtype,
            mask=True,
            gradient=True,
            elements="losses",
            runtime_beta=[3, 1, 1],
        )
        assert LossSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
        betas = CHANNELS + 0.25 * (loss == "huber")
        for route, backend in (
            ("function", "ort-cpu"),
            ("inlined", "ort-cpu"),
            ("function", "torch"),
        ):
            runner, known = (
                load(export(each, route, SHAPE), backend) for each in (spec, spec.at(betas))
            )
            arrays: dict[str, Any] = {"input": X.astype(dtype), "target": Y.astype(dtype)}
            arrays["mask"] = X > 0
            right = known.run(**arrays)
            for given in (betas, betas.tolist(), torch.tensor(betas)):
                found = runner.run(**arrays, beta=given)
                assert all(found[name].tobytes() == right[name].tobytes() for name in right)
            for wrong, why in (
                (betas[:2], r"has the shape \(2, 1, 1\), and the artefact takes \(3, 1, 1\)"),
                (0.5, "must be an array of the shape"),
                ([1, [2]], "must be an array of the shape"),
                (None, "beta is missing"),
            ):
                with pytest.raises(InvalidInputError, match=why):
                    runner.run(**arrays, beta=wrong)
        assert verify(export(spec, shape=SHAPE), drift=False)
    model = model_of("g (float[N,3] x) => (float[N,3] y) {y = Neg(x)}")
    scored = attach(model, "y", "t", LossSpec(runtime_beta=(3,), per_sample=True))
    assert verify(scored, drift=False)
    given = {"x": X[:, :, 0, 0], "t": Y[:, :, 0, 0], "beta": np.float32([0, 0.5, 2])}
    served = load(serve(scored).model).run(**given)["loss"]
    np.testing.assert_array_equal(served[:, 0], load(scored).run(**given)["loss"])


def test_what_is_no_beta_among_those_of_a_run_makes_nan_where_it_counts() -> None:
    for backend in ("ort-cpu", "ort-cpu-bare"):
        by_row = load(export(LossSpec(per_sample=True, runtime_beta=(3, 1))), backend)
        whole = load(export(LossSpec(reduction="sum", runtime_beta=(3, 1))), backend)
        rows, nothing = np.ones((3, 4), "f4"), np.ones((3, 0), "f4")
        for no_beta in (-1.0, math.nan):
            betas = np.array([[1], [no_beta], [0]])
            for found, right in (
                (by_row.run(rows, 0 * rows, beta=betas), [0.5, math.nan, 1]),
                (whole.run(rows, 0 * rows, beta=betas), math.nan),
                (whole.run(nothing, nothing, beta=betas), math.nan),
                (whole.run(nothing, nothing, beta=abs(CHANNELS[:, 0])), 0),
            ):
                np.testing.assert_array_equal(found["loss"], right)


def test_betas_that_do_not_broadcast_are_refused() -> None:
    spec = LossSpec([0.5, 1.0])
    with pytest.raises(SpecError, match=r"beta has the shape \(2,\), the element losses \('N', 3"):
        export(spec, shape=("N", 3))
    with pytest.raises(InvalidInputError, match=r"beta has the shape \(2,\)"):
        load(export(spec)).run(X[0, 0], Y[0, 0])
    with pytest.raises(UnsupportedError, match="knows nothing of a spec's extensions"):
        export(spec, "torch", shape=("N", 2))
    with pytest.raises(SpecError, match=r"beta has the shape \(2,\)"):
        attach(model_of("g (float[N,3] x) => (float[N,3] y) {y = Neg(x)}"), "y", "t", spec)


def test_they_go_with_a_model_its_files_and_its_server() -> None:
    spec = LossSpec(CHANNELS, per_sample=True)
    rows = of_torch("smooth_l1", CHANNELS)[0].mean(axis=(1, 2, 3), dtype="f8")
    model = model_of("g (float[N,3,6,5] x) => (float[N,3,6,5] y) {y = Neg(x)}")
    scored = attach(model, "y", "t", spec)
    np.testing.assert_allclose(run(scored, {"x": -X, "t": Y})["loss"], rows, rtol=1e-6)
    assert verify(scored, drift=False)
    batches = [{"input": X, "target": Y}, {"input": X[:1], "target": Y[:1]}]
    expected = np.mean([*rows, rows[0]])
    for given in ({"spec": LossSpec(CHANNELS)}, {"artefact": export(LossSpec(CHANNELS))}):
        assert math.isclose(loss_over(batches, **given).loss, expected, rel_tol=1e-6)  # type: ignore[arg-type]
    served = serve(export(spec, shape=("N", 3, 6, 5)))
    assert served.unbatched is None
    np.testing.assert_allclose(load(served.model).run(X, Y)["loss"], rows, rtol=1e-6)
    for betas in (np.ones((2, 1)), np.ones((2, 1, 1))):
        with pytest.raises(UnsupportedError, match="a number for each row of a batch"):
            serve(export(LossSpec(betas, "none"), shape=("N", 4)))


def test_two_losses_of_one_model_may_have_other_betas() -> None:
    model = model_of("g (float[N,3] x) => (float[N,3] y) {y = Neg(x)}")
    for beta in (0.5, [0.5, 1.0, 2.0], [[0.25]]):
        model = attach(model, "y", "t", LossSpec(beta, mask=True), mask="m")
    onnx.checker.check_model(model, full_check=True)
    x, t, m = X[:, :, 0, 0], Y[:, :, 0, 0], X[:, :, 0, 0] > 0
    found = run(model, {"x": -x, "t": t, "m": m})
    for name, beta in (("loss", 0.5), ("loss_1", [0.5, 1.0, 2.0]), ("loss_2", 0.25)):
        right = load(export(LossSpec(beta, mask=True))).run(x, t, mask=m)["loss"]
        np.testing.assert_allclose(found[name], right, rtol=1e-6)
