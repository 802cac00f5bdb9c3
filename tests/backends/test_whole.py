"""A model with losses attached, run whole: `load(scored).run(images=..., boxes_gt=...)`."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from handmade import detector

from smoothl1_deploy import LossSpec, attach, load
from smoothl1_deploy.errors import ArtefactError, InvalidInputError, UnsupportedError
from smoothl1_deploy.reference import oracle

FOUR = np.array([4])


@pytest.mark.parametrize("backend", ["ort-cpu", "ort-cpu-bare", "onnx-reference"])
def test_every_output_comes_by_its_name_the_losses_right(backend: str) -> None:
    runner = load(detector(), backend)
    assert [loss.outputs["loss"] for loss in runner.losses] == ["loss", "scores"]
    images = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype("f4")
    gt = np.zeros((2, 4), "f4")
    found = runner.run(boxes_gt=gt, wide=FOUR, images=images)
    assert [*found] == ["boxes", "loss", "scores"] == [*runner.outputs]
    boxes = found["boxes"]
    np.testing.assert_array_equal(boxes, images.reshape(2, -1)[:, :4])
    assert abs(found["loss"] - oracle(LossSpec(0.5), boxes, gt)) < 1e-7
    assert found["scores"].shape == (2,)


def test_bfloat16_goes_in_and_comes_out_and_so_does_nothing_at_all() -> None:
    from smoothl1_deploy._floats import NUMPY_DTYPE

    runner = load(detector("bfloat16", "none"))
    for rows in (2, 0):
        images = np.ones((rows, 3, 8, 8), NUMPY_DTYPE["bfloat16"])
        found = runner.run(images=images, boxes_gt=images.reshape(rows, 192)[:, :4], wide=FOUR)
        assert found["loss"].dtype == images.dtype and found["loss"].shape == (rows, 4)
        assert (found["boxes"] == images.reshape(rows, 192)[:, :4]).all()
        assert (found["loss"] == 0).all()


IMAGES, GT = np.zeros((2, 3, 8, 8), "f4"), np.zeros((2, 4), "f4")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"boxes_gt": None}, r"boxes_gt is missing; the model takes images: float32\[N,3,8,8\]"),
        ({"image": IMAGES}, "no input 'image'; the model takes"),
        ({"images": IMAGES[:, :2]}, r"images has the shape \(2, 2, 8, 8\), and the model takes"),
        ({"images": IMAGES[0]}, r"images has the shape \(3, 8, 8\)"),
        ({"boxes_gt": GT[:1]}, "N is 2 in images and 1 in boxes_gt"),
        ({"images": IMAGES.astype("f8")}, "images is float64, .*; convert it to float32"),
        ({"boxes_gt": [[0.0]]}, "boxes_gt is a list; give a numpy array"),
        ({"wide": np.array([99])}, "ONNX Runtime refused the inputs"),
    ],
)
def test_arrays_that_do_not_fit_are_told_of_by_the_model_s_names(
    changed: dict[str, Any], message: str
) -> None:
    given = {"images": IMAGES, "boxes_gt": GT, "wide": FOUR, **changed}
    with pytest.raises(InvalidInputError, match=message):
        load(detector()).run(**{name: array for name, array in given.items() if array is not None})


def test_what_can_not_be_run_whole_is_refused_with_what_can() -> None:
    with pytest.raises(UnsupportedError, match=r"losses alone.*use the backend ort-cpu"):
        load(detector(), "torch")
    with pytest.raises(UnsupportedError, match="can't be pickled"):
        copy.copy(load(detector()))
    named = detector()
    named.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.STRING
    with pytest.raises(ArtefactError, match="'wide' is STRING, and only tensors of numbers"):
        load(named)


def test_by_the_names_of_its_ports_the_loss_alone_is_run() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> g (float[N] x) => (float[N] y) {y = Relu(x)}'
    )
    runner = load(attach(model, "y", "t", LossSpec()), input_name="x", target_name="t")
    assert runner.run(np.ones(2, "f4"), np.zeros(2, "f4"))["loss"].shape == ()
