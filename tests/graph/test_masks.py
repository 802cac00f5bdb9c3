"""A mask selects, a mean is divided by what is given, and over nothing it is what was asked for."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from handmade import model_of, run

from smoothl1_deploy import LossSpec, attach, export, load, loss_over, verify
from smoothl1_deploy._floats import ulp_distance
from smoothl1_deploy.errors import ArtefactError, InvalidInputError, SpecError, UnsupportedError
from smoothl1_deploy.reference._module import eager_outputs
from smoothl1_deploy.reference._oracle import exact_outputs
from smoothl1_deploy.serving._graph import serve

RNG = np.random.default_rng(21)
X, Y = (RNG.normal(size=(6, 5)).astype("f4") for _ in range(2))
MASK = RNG.random((6, 5)) > 0.4
MASK[2] = False
HOLES = np.where(MASK, Y, np.float32("nan"))


def loss_of_selected(spec: LossSpec) -> np.ndarray:
    """The loss that a user of PyTorch writes: of the elements that the mask picks out."""
    x, y, mask = map(torch.tensor, (X, Y, MASK))
    return torch.nn.SmoothL1Loss(reduction=spec.reduction, beta=spec.beta)(x[mask], y[mask]).numpy()


@pytest.mark.parametrize("backend", ["ort-cpu", "ort-cpu-bare", "onnx-reference", "torch"])
def test_it_is_the_loss_of_what_is_selected_whatever_the_rest_holds(backend: str) -> None:
    for reduction in ("mean", "sum"):
        spec = LossSpec(0.5, reduction, mask=True)
        found = load(export(spec, shape=("N", 5)), backend).run(X, HOLES, mask=MASK)["loss"]
        assert ulp_distance(found, loss_of_selected(spec)) <= 2
    spec = LossSpec(0.5, "none", mask=True, gradient=True)
    found = load(export(spec, shape=("N", 5)), backend).run(X, HOLES, mask=MASK)
    for name, array in load(export(LossSpec(0.5, "none", gradient=True))).run(X, Y).items():
        assert np.array_equal(found[name], np.where(MASK, array, np.float32(0)))
        assert not np.signbit(found[name][~MASK]).any()


def test_the_references_agree_on_what_is_selected() -> None:
    """PyTorch's is the loss of x[mask], y[mask]; the exact one is beside it."""
    for reduction in ("mean", "sum"):
        spec = LossSpec(0.5, reduction, mask=True)
        eager = eager_outputs(spec, X, HOLES, mask=MASK)["loss"]
        exact = exact_outputs(spec, X, HOLES, mask=MASK)["loss"]
        for found in (eager, exact):
            assert ulp_distance(found, loss_of_selected(spec)) <= 2


def test_a_row_divides_by_what_is_selected_of_it() -> None:
    counts, found = MASK.sum(axis=1), {}
    for empty in ("nan", "zero"):
        spec = LossSpec(0.5, mask=True, per_sample=True, gradient=True, empty=empty)
        found[empty] = load(export(spec, shape=("N", 5))).run(X, HOLES, mask=MASK)
        assert not found[empty]["grad_input"][2].any()
    elements = load(export(LossSpec(0.5, "none"))).run(X, Y)["loss"].astype("f8")
    means = np.where(MASK, elements, 0).sum(axis=1) / np.maximum(counts, 1)
    np.testing.assert_allclose(found["zero"]["loss"], means, rtol=1e-6)
    assert np.isnan(found["nan"]["loss"][2]) and found["zero"]["loss"][2] == 0
    assert np.array_equal(found["nan"]["loss"][counts > 0], found["zero"]["loss"][counts > 0])


def test_weights_outside_count_for_nothing() -> None:
    weight = np.where(MASK, RNG.uniform(0.5, 2, MASK.shape), np.inf).astype("f4")
    inside = np.where(MASK, weight, 0).astype("f8")
    losses = load(export(LossSpec(0.5, "none"))).run(X, Y)["loss"].astype("f8")
    for normalizer, divisor in (("count", MASK.sum()), ("weights", inside.sum())):
        spec = LossSpec(0.5, weight=normalizer, mask=True)
        found = load(export(spec)).run(X, HOLES, weight=weight, mask=MASK)["loss"]
        np.testing.assert_allclose(found, (inside * losses).sum() / divisor, rtol=1e-6)


def test_a_mask_broadcasts_and_may_select_an_input_many_times() -> None:
    """The mask [6, 1] of steps, and one [3, 6, 5] by which the pair is repeated."""
    for mask in (MASK[:, :1], np.stack([MASK, ~MASK, MASK])):
        spec = LossSpec(0.5, "sum", mask=True, gradient=True)
        shapes = {"shape": ("N", 5), "mask_shape": tuple(mask.shape)}
        for model in (export(spec), export(spec, "inlined", **shapes)):
            found = load(model).run(X, Y, mask=mask)
            x = torch.tensor(X, requires_grad=True)
            losses = torch.nn.SmoothL1Loss(reduction="none", beta=0.5)(x, torch.tensor(Y))
            right = torch.where(torch.tensor(mask), losses, 0).sum()
            right.backward()
            np.testing.assert_allclose(found["loss"], right.detach(), rtol=1e-6)
            np.testing.assert_allclose(found["grad_input"], x.grad, rtol=1e-6)


def test_a_mean_is_divided_by_what_is_given() -> None:
    for dtype in ("float32", "float16", "float64"):
        spec = LossSpec(0.5, dtype=dtype, divisor=True, gradient=True, weight="count")
        runner = load(export(spec, shape=("N", 5)))
        x, y, weight = (array.astype(dtype) for array in (X, Y, np.abs(Y)))
        sums = load(export(LossSpec(0.5, "sum", "float64", weight="count", gradient=True))).run(
            *(array.astype("f8") for array in (x, y)), weight=weight.astype("f8")
        )
        for divisor in (37, 0.125, 70_000):  # which no float16 holds
            found = runner.run(x, y, weight=weight, divisor=divisor)
            for name, array in sums.items():
                limit = 2 * np.finfo(dtype).eps
                tiny = np.finfo(dtype).smallest_subnormal
                np.testing.assert_allclose(found[name], array / divisor, rtol=limit, atol=tiny)
        assert np.isinf(runner.run(x, y, weight=weight, divisor=0)["loss"])


def test_zero_is_for_a_mean_over_nothing_and_hides_no_nan() -> None:
    plain = load(export(LossSpec(empty="zero"), shape=("N", 5)))
    assert plain.run(X[:0], Y[:0])["loss"] == 0 and np.isnan(plain.run(HOLES, Y)["loss"])
    given = load(export(LossSpec(divisor=True, empty="zero", gradient=True), shape=("N", 5)))
    found = given.run(X, Y, divisor=0)
    assert found["loss"] == 0 and not found["grad_input"].any()
    assert np.isnan(given.run(HOLES, Y, divisor=0)["loss"])


def test_no_beta_makes_nan_of_what_is_not_selected_too() -> None:
    for reduction, empty in (("none", "nan"), ("sum", "nan"), ("mean", "zero")):
        spec = LossSpec(reduction=reduction, mask=True, runtime_beta=True, empty=empty)
        spec = LossSpec.from_dict({**spec.to_dict(), "gradient": True})
        for route, backend in (("function", "ort-cpu"), ("inlined", "onnx-reference")):
            runner = load(export(spec, route, shape=("N", 5)), backend)
            for name, array in runner.run(X, Y, mask=MASK & False, beta=-1.0).items():
                assert np.isnan(array).all(), (reduction, name)


def test_what_makes_no_sense_is_refused() -> None:
    for fields, why in (
        ({"divisor": True, "reduction": "sum"}, "the reduction sum takes none"),
        ({"divisor": True, "weight": "weights"}, "the weight 'weights' takes none"),
        ({"empty": "zero", "reduction": "none"}, "no mean"),
        ({"empty": "one"}, "choose one of nan, zero"),
        ({"mask": 1}, "mask must be True or False"),
    ):
        with pytest.raises(SpecError, match=why):
            LossSpec(**fields)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="mask_shape for a spec without mask"):
        export(LossSpec(), shape=("N", 5), mask_shape=("N", 1))
    with pytest.raises(UnsupportedError, match="the torch route"):
        export(LossSpec(mask=True), "torch", shape=("N", 5))
    runner = load(export(LossSpec(mask=True), shape=("N", 5)))
    with pytest.raises(InvalidInputError, match="mask is missing"):
        runner.run(X, Y)
    with pytest.raises(InvalidInputError, match="give booleans that select, as in mask != 0"):
        runner.run(X, Y, mask=MASK.astype("f4"))
    with pytest.raises(InvalidInputError, match="divisor must be one number"):
        load(export(LossSpec(divisor=True))).run(X, Y, divisor=[1, 2])  # type: ignore[arg-type]
    model = export(LossSpec(mask=True), shape=("N", 5))
    model.graph.input[2].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    with pytest.raises(ArtefactError, match="a mask is boolean"):
        load(model)


def test_verify_sees_a_mask_that_is_not_looked_at() -> None:
    for spec in (LossSpec(mask=True), LossSpec(reduction="none", mask=True, gradient=True)):
        model = export(spec, "inlined", shape=("N", 5))
        assert verify(model)
        (node, *_) = (node for node in model.graph.node if "mask" in node.input)
        constant = onnx.numpy_helper.from_array(np.array([True]), "everything")
        model.graph.initializer.append(constant)
        node.input[list(node.input).index("mask")] = "everything"
        assert not verify(model)


def test_a_model_s_own_mask_of_integers_selects() -> None:
    model = model_of(
        "g (float[N,5] x, float[N,5] t, int64[N,5] keep) => (float[N,5] y) { y = Neg(x) }"
    )
    spec = LossSpec(0.5, mask=True)
    scored = attach(model, "y", "t", spec, mask="keep")
    found = run(scored, {"x": -X, "t": HOLES, "keep": MASK.astype("i8")})
    assert ulp_distance(found["loss"], loss_of_selected(spec)) <= 2
    new = attach(model, "y", "t", spec, mask="selected")
    assert new.graph.input[-1].type.tensor_type.elem_type == onnx.TensorProto.BOOL
    for lacking, why in (
        (spec, "the spec has a mask"),
        (LossSpec(0.5), "give the spec a mask too"),
    ):
        with pytest.raises(SpecError, match=why):
            attach(model, "y", "t", lacking, mask=None if lacking.mask else "keep")
    with pytest.raises(SpecError, match="numbers that multiply the losses are a weight"):
        attach(model, "y", "t", spec, mask="x")


def test_scoring_counts_what_is_selected_in_all_batches() -> None:
    parts = [
        {"input": X[i:j], "target": HOLES[i:j], "mask": MASK[i:j]} for i, j in ((0, 4), (4, 6))
    ]
    for spec, artefact in product(
        (LossSpec(0.5, mask=True), LossSpec(0.5, mask=True, per_sample=True)), (False, True)
    ):
        given = {"artefact": export(spec, shape=("N", 5))} if artefact else {"spec": spec}
        found = loss_over(parts, **given).loss  # type: ignore[arg-type]
        np.testing.assert_allclose(found, loss_of_selected(LossSpec(0.5)), rtol=1e-6)
    nothing = [{"input": X, "target": HOLES, "mask": MASK & False}]
    assert np.isnan(loss_over(nothing, LossSpec(mask=True)).loss)
    assert loss_over(nothing, LossSpec(mask=True, empty="zero")).loss == 0
    with pytest.raises(SpecError, match="for files there is none"):
        loss_over(parts, LossSpec(divisor=True))


def test_a_server_takes_masks_and_divisors(tmp_path: Path) -> None:
    rows = LossSpec(0.5, mask=True, per_sample=True)
    served = serve(export(rows, "inlined", shape=("N", 5)))
    assert served.unbatched is None
    found = load(served.model).run(X, HOLES, mask=MASK)["loss"]
    assert np.array_equal(
        found, load(export(rows)).run(X, HOLES, mask=MASK)["loss"], equal_nan=True
    )
    with pytest.raises(InvalidInputError):
        load(served.model, "ort-cpu").run(X, HOLES, mask=MASK[:1])
    divided = serve(export(LossSpec(divisor=True, per_sample=True), "inlined", shape=("N", 5)))
    assert "divisor is one number for a whole batch" in str(divided.unbatched)
    assert load(divided.model).run(X, Y, divisor=2.0)["loss"].shape == (6,)
