"""Beside a reduced loss what each element has: its loss, or its difference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from handmade import model_of, run

from smoothl1_deploy import LossSpec, attach, export, load, loss_over, verify
from smoothl1_deploy.errors import SpecError

RNG = np.random.default_rng(23)
X, Y = (RNG.normal(size=(6, 5)).astype("f4") for _ in range(2))
MASK = RNG.random((6, 1)) > 0.4


@pytest.mark.parametrize("backend", ["ort-cpu", "ort-cpu-bare", "onnx-reference", "torch"])
def test_the_priorities_of_replay_come_with_the_loss(backend: str) -> None:
    """The TD errors, whose size is the priority, and the loss of the batch, of one call."""
    spec = LossSpec(elements="differences", gradient=True)
    for model in (export(spec), export(spec, "inlined", shape=("N", 5))):
        found = load(model, backend).run(X, Y)
        assert [*found] == ["loss", "differences", "grad_input"]
        assert np.array_equal(found["differences"], X - Y)
        right = torch.nn.SmoothL1Loss()(torch.tensor(X), torch.tensor(Y)).numpy()
        np.testing.assert_allclose(found["loss"], right, rtol=1e-6)


def test_the_losses_are_those_of_the_reduction_none() -> None:
    weight = RNG.uniform(0.5, 2, (3, 6, 5)).astype("f4")  # by which the pair is repeated
    given = {"weight": weight, "mask": MASK}
    alike = {"mask": True, "weight": "count", "loss_weight": -0.5, "loss": "huber", "delta": 0.5}
    alone = load(export(LossSpec(reduction="none", **alike))).run(X, Y, **given)  # type: ignore[arg-type]
    for fields in ({"reduction": "sum"}, {"divisor": True}, {"axes": (0,), "empty": "zero"}):
        spec = LossSpec(elements="losses", **alike, **fields)  # type: ignore[arg-type]
        more = given | ({"divisor": 3.0} if spec.divisor else {})
        for route in ("function", "inlined"):
            found = load(export(spec, route)).run(X, Y, **more)  # type: ignore[arg-type]
            np.testing.assert_allclose(found["losses"], alone["loss"], rtol=2e-7)
    differences = LossSpec(weight="count", mask=True, elements="differences")
    found = load(export(differences)).run(X, Y, **given)  # type: ignore[arg-type]
    assert np.array_equal(found["differences"], np.broadcast_to((X - Y) * MASK, weight.shape))


def test_it_is_verified_attached_and_scored_beside() -> None:
    spec = LossSpec(0.5, per_sample=True, elements="losses")
    model = export(spec, "inlined", shape=("N", 5))
    assert verify(model)
    (last,) = (node for node in model.graph.node if "losses" in node.output)
    last.input[1], last.input[0] = last.input[0], last.input[0]  # doubles a part of each
    assert not verify(model)
    head = model_of("g (float[N,5] x, float[N,5] t) => (float[N,5] y) {y = Neg(x)}")
    found = run(attach(head, "y", "t", spec), {"x": X, "t": Y})
    right = load(export(LossSpec(0.5, "none"))).run(-X, Y)["loss"]
    np.testing.assert_allclose(found["losses"], right, rtol=2e-7)
    for elements in ("losses", "differences"):
        both = LossSpec(0.5, elements=elements, gradient=True)
        assert verify(attach(head, "y", "t", both))
        scored = loss_over([{"x": X, "t": Y}], artefact=attach(head, "y", "t", both)).loss
        np.testing.assert_allclose(scored, right.mean(), rtol=1e-6)
        assert loss_over([(-X, Y)], LossSpec(0.5, elements=elements)).loss == scored
    batch = [{"input": X, "target": Y}]
    scored = loss_over(batch, artefact=export(spec, shape=("N", 5))).loss
    np.testing.assert_allclose(scored, loss_over(batch, LossSpec(0.5)).loss, rtol=1e-6)


def test_what_makes_no_sense_is_refused() -> None:
    for fields, why in (
        ({"elements": "losses", "reduction": "none"}, "are the loss itself"),
        ({"elements": "all"}, "choose one of losses, differences"),
    ):
        with pytest.raises(SpecError, match=why):
            LossSpec(**fields)  # type: ignore[arg-type]
