"""A loss over some of the axes: a map over channels, a score of each step and joint."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from handmade import model_of, run

from smoothl1_deploy import LossSpec, attach, export, load, loss_over
from smoothl1_deploy.errors import InvalidInputError, SpecError
from smoothl1_deploy.serving._graph import serve

RNG = np.random.default_rng(22)
X, Y = (RNG.normal(size=(4, 3, 6, 5)).astype("f4") for _ in range(2))
SHAPE = ("N", 3, "H", "W")


def of_torch(axes: tuple[int, ...], reduction: str) -> tuple[np.ndarray, np.ndarray]:
    """The loss and its gradient, as a user of PyTorch reduces the losses of the elements."""
    x = torch.tensor(X, requires_grad=True)
    losses = torch.nn.SmoothL1Loss(reduction="none", beta=0.5)(x, torch.tensor(Y))
    loss = losses.mean(axes) if reduction == "mean" else losses.sum(axes)
    loss.sum().backward()
    assert x.grad is not None
    return loss.detach().numpy(), x.grad.numpy()


@pytest.mark.parametrize("backend", ["ort-cpu", "ort-cpu-bare", "onnx-reference", "torch"])
def test_it_is_what_pytorch_makes_of_the_losses_over_these_axes(backend: str) -> None:
    every = itertools.chain(*(itertools.combinations((0, 1, -2, -1), n) for n in (1, 2, 4)))
    for axes, reduction in itertools.product(every, ("mean", "sum")):
        spec = LossSpec(0.5, reduction, axes=axes, gradient=True)
        loss, gradient = of_torch(axes, reduction)
        for model in (export(spec), export(spec, "inlined", shape=SHAPE)):
            found = load(model, backend).run(X, Y)
            np.testing.assert_allclose(found["loss"], loss, rtol=1e-6)
            np.testing.assert_allclose(found["grad_input"], gradient, rtol=1e-6)


def test_per_sample_is_the_case_where_axis_0_is_kept() -> None:
    for dtype in ("float32", "float16", "float64"):
        rows, axes = (
            load(export(spec, shape=SHAPE)).run(X.astype(dtype), Y.astype(dtype))["loss"]
            for spec in (
                LossSpec(0.5, dtype=dtype, per_sample=True),
                LossSpec(0.5, dtype=dtype, axes=(1, 2, 3)),
            )
        )
        np.testing.assert_allclose(axes, rows, rtol=2 * np.finfo(dtype).eps)


def test_axes_are_counted_from_either_end_and_written_in_any_way() -> None:
    written = (1, (1,), [1], "1", np.int64(1), np.array([1]))
    assert {LossSpec(axes=axes) for axes in written} == {LossSpec(axes=(1,))}  # type: ignore[arg-type]
    assert LossSpec(axes="-1, 1").axes == (-1, 1)  # type: ignore[arg-type]
    assert LossSpec.from_dict(LossSpec(axes=(2, 1)).to_dict()) == LossSpec(axes=(1, 2))
    one, other = (export(LossSpec(axes=axes), shape=(2, 3)) for axes in ((1,), (-1,)))
    assert one.graph.node == other.graph.node


def test_nothing_along_the_axes_or_beside_them() -> None:
    runner = load(export(LossSpec(axes=(-2,))))
    assert np.isnan(runner.run(X[:, :, :0], Y[:, :, :0])["loss"]).all()
    assert runner.run(X[:0], Y[:0])["loss"].shape == (0, 3, 5)


def test_what_makes_no_sense_is_refused() -> None:
    for fields, why in (
        ({"axes": (1,), "per_sample": True}, "give one of the two"),
        ({"axes": (1,), "reduction": "none"}, "the reduction none reduces nothing"),
        *(({"axes": axes}, "different integers") for axes in ((), (1, 1), 1.5, "x", True, {})),
    ):
        with pytest.raises(SpecError, match=why):
            LossSpec(**fields)  # type: ignore[arg-type]
    for axes in ((4,), (-5,), (1, -3)):
        with pytest.raises(SpecError, match="of element losses with 4 axes; give different ones"):
            export(LossSpec(axes=axes), shape=SHAPE)
        with pytest.raises(InvalidInputError, match="with 4 axes"):
            load(export(LossSpec(axes=axes))).run(X, Y)


def test_an_anomaly_map_comes_out_of_the_model_itself() -> None:
    model = model_of("g (float[N,3,H,W] image) => (float[N,3,H,W] again) {again = Neg(image)}")
    scored = attach(model, "again", "image", LossSpec(0.5, axes=(1,)))
    (_, loss) = scored.graph.output
    assert [d.dim_param or d.dim_value for d in loss.type.tensor_type.shape.dim] == ["N", "H", "W"]
    found = run(scored, {"image": X})["loss"]
    elements = load(export(LossSpec(0.5, "none"))).run(-X, X)["loss"]
    np.testing.assert_allclose(found, elements.mean(axis=1), rtol=1e-6)


def test_a_server_batches_rows_that_are_not_mixed() -> None:
    for axes, batches in (((1,), True), ((2, 3), True), ((0,), False), ((-1,), True)):
        served = serve(export(LossSpec(axes=axes), "inlined", shape=("N", "C", 6, 5)))
        assert (served.unbatched is None) == batches, axes


def test_the_loss_over_files_is_that_of_all_their_elements() -> None:
    for spec in (LossSpec(0.5, axes=(1,)), LossSpec(0.5, axes=(0, 2), mask=True, empty="zero")):
        mask = {"mask": RNG.random(X.shape) > 0.4} if spec.mask else {}
        whole = LossSpec(0.5, mask=spec.mask)
        right = load(export(whole)).run(X, Y, **mask)["loss"]  # type: ignore[arg-type]
        batch = {"input": X, "target": Y, **mask}
        for given in ({"spec": spec}, {"artefact": export(spec, shape=SHAPE)}):
            np.testing.assert_allclose(loss_over([batch], **given).loss, right, rtol=1e-6)  # type: ignore[arg-type]
