"""`verify` of a model with losses attached: the losses, the whole model, and what it was before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from smoothl1_deploy import LossSpec, attach, build_engine, export, load, loss_over, verify
from smoothl1_deploy.backends import BACKENDS
from smoothl1_deploy.errors import ArtefactError, InvalidInputError, SpecError
from smoothl1_deploy.parity._matrix import Matrix
from smoothl1_deploy.parity._whole import ModelVerification, verify_model
from smoothl1_deploy.serving import Client

DETECTOR = """<ir_version: 8, opset_import: ["": 18]>
g (float[N, 3, 8, 8] images) => (float[N, 4] boxes) {
  flat = Flatten(images)
  start = Constant<value_ints=[0]>()
  end = Constant<value_ints=[4]>()
  axis = Constant<value_ints=[1]>()
  raw = Slice(flat, start, end, axis)
  boxes = Tanh(raw)
}"""


IMAGES = np.ones((5, 3, 8, 8), "f4")


def detector(text: str = DETECTOR) -> onnx.ModelProto:
    return onnx.parser.parse_model(text)


@pytest.fixture(scope="module")
def scored() -> onnx.ModelProto:
    """A mean of an output; scores of an internal tensor against a constant, beta at run time."""
    both = attach(detector(), "boxes", "boxes_gt", LossSpec(0.5))
    spec = LossSpec(per_sample=True, gradient=True, runtime_beta=True)
    return attach(both, "raw", np.zeros((1, 4), "f4"), spec, loss_name="scores")


def test_every_loss_the_whole_model_and_what_it_was_before_are_green(
    scored: onnx.ModelProto,
) -> None:
    found = verify(scored, against=detector(), drift=False)
    assert isinstance(found, ModelVerification) and found and found.to_dict()["ok"]
    assert [*found.losses] == ["loss", "scores"] and all(
        len(v.results) > 8 for v in found.losses.values()
    )
    assert [run.same for run in found.runs] == [{"boxes": True}, {"boxes": True}]
    assert {*found.runs[0].losses} == {"loss", "scores", "grad_input"}


def test_what_a_notebook_shows_is_one_line(scored: onnx.ModelProto, tmp_path: Path) -> None:
    loss = export(LossSpec(0.5), "inlined", ("N", 4))
    shown = [
        repr(found)
        for found in (
            verify(loss, drift=False),
            verify(scored, drift=False),
            load(loss),
            load(scored),
            build_engine(loss, tmp_path / "loss.engine"),
            Matrix(tuple(BACKENDS)),
            loss_over([(IMAGES, IMAGES)], LossSpec()),
            Client("http://user:secret@127.0.0.1:8000", "mean"),
        )
    ]
    assert "secret" not in shown[-1] and shown[-1].endswith("mean at http://127.0.0.1:8000>")
    assert all(len(text) < 300 and text.startswith("<") and "\n" not in text for text in shown)
    assert "13 of 13 cases green" in shown[0] and "scores green" in shown[1]
    assert "input: float32[N,4]" in shown[2] and "-> boxes, loss, scores" in shown[3]


def test_a_notebook_shows_every_table_of_a_verification(scored: onnx.ModelProto) -> None:
    page = verify(scored, drift=False)._repr_html_()
    assert page.startswith("<p>&lt;ModelVerification of g on ort-cpu")
    assert page.count("<table") == 3 and page.count("inf-minus-inf") == 2
    assert verify(export(LossSpec()), drift=False)._repr_html_().count("<table") == 1


def test_of_data_that_is_given_that_alone_is_run(scored: onnx.ModelProto) -> None:
    data = {
        "images": np.full((5, 3, 8, 8), np.inf, "f4"),
        "boxes_gt": np.zeros((5, 4), "f4"),
        "beta": np.float32(2),
    }
    (run,) = verify(scored, data=data, drift=False).runs
    assert run.ok and run.data == "given" and run.losses["scores"].elements == 5
    with pytest.raises(InvalidInputError, match="beta is missing; the model takes images"):
        verify_model(
            scored, data={"images": data["images"], "boxes_gt": data["boxes_gt"]}, drift=False
        )


def test_another_beta_in_the_file_is_red_alone_and_in_the_whole() -> None:
    model = attach(detector(), "boxes", "boxes_gt", LossSpec(0.25))
    for entry in model.metadata_props:
        entry.value = entry.value.replace('"beta": 0.25', '"beta": 0.5')
    found = verify(model, drift=False)
    assert not found and not found.losses["loss"]
    assert not any(run.ok for run in found.runs)


def test_an_old_output_with_other_bits_is_red(scored: onnx.ModelProto) -> None:
    other = detector(DETECTOR.replace("Tanh", "Sigmoid"))
    found = verify(scored, against=other, drift=False)
    assert not found and all(found.losses.values())
    assert found.runs[0].same == {"boxes": False} and all(
        v.ok for v in found.runs[0].losses.values()
    )


def test_a_model_that_could_not_be_compared_is_refused(scored: onnx.ModelProto) -> None:
    """Nothing in common would be nothing to differ in, and green."""
    for old, new, kind in (("images", "other", "input"), ("boxes", "others", "output")):
        unlike = detector(DETECTOR.replace(old, new))
        for data in (
            None,
            {"images": IMAGES, "boxes_gt": IMAGES[:, 0, 0, :4], "beta": IMAGES[0, 0, 0, 0]},
        ):
            with pytest.raises(ArtefactError, match=f"the model has no {kind} {new}, which"):
                verify(scored, against=unlike, data=data, drift=False)


def test_an_upstream_gradient_of_rank_0_stays_so() -> None:
    model = attach(detector(), "boxes", "boxes_gt", LossSpec(gradient=True, upstream=True))
    assert verify(model, drift=False)


def test_what_can_not_be_made_up_is_asked_for() -> None:
    with pytest.raises(ArtefactError, match="no loss was attached"):
        verify_model(detector())
    gather = """<ir_version: 8, opset_import: ["": 18]>
    g (float[N, 4] table, float[M, K] size) => (float[N, 4] y) { y = Add(table, size) }"""
    model = attach(detector(gather), "y", "t", LossSpec())
    with pytest.raises(ArtefactError, match=r"(?s)can't be run on what was made up .* give data"):
        verify(model, drift=False)
    with pytest.raises(SpecError, match="a loss of its own; leave them out"):
        verify(export(LossSpec()), against=detector())
