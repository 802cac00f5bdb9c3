"""`score --model` of a model with losses attached: files of its own inputs, one loss of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest_cli import Done, assert_refused
from handmade import detector, model_of

from smoothl1_deploy import LossSpec, attach, load, loss_over
from smoothl1_deploy.errors import ArtefactError, InvalidInputError, SpecError
from smoothl1_deploy.scoring import _shards as shards
from smoothl1_deploy.scoring import locate, make_job, score_files

Cli = Callable[..., Done]
HEAD = "g (float[N, 2, 3] images) => (float[N, 6] boxes) {boxes = Flatten(images)}"
FILES = ("--input", "images=im.npy", "--input", "boxes_gt=gt.npy")
ROWS = 100


@pytest.fixture(autouse=True)
def _small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BATCH_ELEMENTS", 42)  # 7 rows
    monkeypatch.setattr(shards, "TASK_ELEMENTS", 120)


@pytest.fixture
def data() -> dict[str, np.ndarray]:
    """In im.npy and gt.npy; the prediction has the very numbers of the images."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(ROWS, 2, 3)).astype("f4")
    gt = rng.normal(size=(ROWS, 6)).astype("f4")
    np.save("im.npy", images)
    np.save("gt.npy", gt)
    return {"images": images, "boxes_gt": gt}


def saved(*specs: LossSpec, **options: Any) -> onnx.ModelProto:
    model = model_of(HEAD)
    for spec in specs:
        model = attach(model, "boxes", "boxes_gt", spec, **options)
    onnx.save(model, "scored.onnx")
    return model


def plain(data: dict[str, np.ndarray], spec: LossSpec, weight: Any = None) -> Any:
    """The same data scored by the loss alone, which the tests beside this one prove."""
    batch = {"input": data["images"].reshape(ROWS, 6), "target": data["boxes_gt"]}
    return loss_over([batch if weight is None else {**batch, "weight": weight}], spec)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_result_is_exact_whatever_the_batch_and_the_reduction_of_the_file(
    cli: Cli, data: dict[str, np.ndarray], reduction: str
) -> None:
    saved(LossSpec(0.5, reduction, gradient=True))
    expected = plain(data, LossSpec(0.5, "sum" if reduction == "sum" else "mean"))
    for words in ((), ("--batch", 1), ("--batch", 64)):
        done = cli("score", "--model", "scored.onnx", *FILES, *words, "--json")
        assert (done.code, done.err) == (0, "")
        found = json.loads(done.out)
        assert (found["loss"], found["sum"]) == (expected.loss, expected.sum)
        assert found["count"] == data["boxes_gt"].size


def test_of_several_losses_one_is_chosen_and_its_scores_are_those_of_load(
    cli: Cli, data: dict[str, np.ndarray]
) -> None:
    model = saved(LossSpec(0.5), LossSpec(0.25, per_sample=True))
    words = ("score", "--model", "scored.onnx", *FILES)
    assert_refused(cli(*words), "the model has several losses; choose one of loss, loss_1")
    assert_refused(cli(*words, "--loss", "x"), "no loss 'x' attached; choose one of loss, loss_1")
    assert json.loads(cli(*words, "--loss", "loss", "--json").out)["spec"]["beta"] == 0.5
    assert cli(*words, "--loss", "loss_1", "-o", "s.npy").code == 0
    np.testing.assert_array_equal(np.load("s.npy"), load(model).run(**data)["loss_1"])
    with pytest.raises(SpecError, match="choose one of loss, loss_1 with loss="):
        make_job(artefact=model)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("normalizer", ["count", "weights"])
def test_weights_are_an_input_or_a_constant_of_the_model(
    data: dict[str, np.ndarray], normalizer: str, per_sample: bool
) -> None:
    weight = np.random.default_rng(1).random((ROWS, 6)).astype("f4")
    spec = LossSpec(0.5, weight=normalizer, per_sample=per_sample)
    given = saved(spec, weight="weight")
    row = weight[:1]
    constant = saved(spec, weight=row)
    for model, beside, used in (
        (given, {"weight": weight}, weight),
        (constant, {}, np.tile(row, (ROWS, 1))),
    ):
        every = {**data, **beside}
        batches = ({n: a[i : i + 9] for n, a in every.items()} for i in range(0, ROWS, 9))
        assert loss_over(batches, artefact=model).loss == plain(data, spec, used).loss


def test_a_beta_of_run_time_is_given_as_a_number(cli: Cli, data: dict[str, np.ndarray]) -> None:
    saved(LossSpec(runtime_beta=True))
    words = ("score", "--model", "scored.onnx", *FILES)
    found = json.loads(cli(*words, "--beta", 0.25, "--json").out)
    assert found["loss"] == plain(data, LossSpec(0.25)).loss
    assert_refused(cli(*words), "beta is missing in the loss loss; give it")
    with pytest.raises(SpecError, match="beta is fixed in the loss loss; leave it out"):
        make_job(artefact=saved(LossSpec()), beta=0.5)


def test_folders_and_archives_and_a_fixed_number_of_rows(
    cli: Cli, data: dict[str, np.ndarray]
) -> None:
    one = model_of(HEAD.replace("N", "1"))
    onnx.save(attach(one, "boxes", "boxes_gt", LossSpec(0.5)), "scored.onnx")
    np.savez("both.npz", **data)
    for name, array in data.items():
        Path(name).mkdir()
        for i in range(0, ROWS, 30):
            np.save(f"{name}/{i}.npy", array[i : i + 30])
    expected = plain(data, LossSpec(0.5)).loss
    for files in (("images", "boxes_gt"), ("both.npz", "both.npz")):
        words = [
            part for pair in zip(data, files, strict=True) for part in ("--input", "=".join(pair))
        ]
        done = cli("score", "--model", "scored.onnx", *words, "--json")
        assert json.loads(done.out)["loss"] == expected


def test_what_was_done_before_an_interrupt_is_not_done_again(data: dict[str, np.ndarray]) -> None:
    job = make_job(artefact=saved(LossSpec(0.5)))
    located = locate({"images": Path("im.npy"), "boxes_gt": Path("gt.npy")}, {})

    def stop(progress: Any) -> None:
        if progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_files(job, located, on_progress=stop)
    again = score_files(job, located)
    assert again.resumed and again.loss == plain(data, LossSpec(0.5)).loss


def test_what_does_not_fit_is_told_by_the_names_of_the_model(
    cli: Cli, data: dict[str, np.ndarray]
) -> None:
    saved(LossSpec())
    takes = "images: float32[N,2,3], boxes_gt: float32[N,6]"
    words = ("score", "--model", "scored.onnx")
    np.save("wide.npy", data["images"].astype("f8"))
    np.save("short.npy", data["boxes_gt"][:9])
    for given, text in (
        (FILES[:2], f"boxes_gt is missing; the model takes {takes}"),
        ((*FILES, "--input", "x=im.npy"), f"no input 'x'; the model takes {takes}"),
        (("--input", "im.npy", "--target", "gt.npy"), f"for each of its inputs; it takes {takes}"),
        ((*FILES, "--input-name", "a"), f"for each of its inputs; it takes {takes}"),
        (("--input", "images=wide.npy", *FILES[2:]), "images is float64, and the model takes"),
        ((*FILES[:2], "--input", "boxes_gt=short.npy"), "they need the same number of rows"),
        ((*FILES, "-o", "s.npy"), "s.npy is for one score a row"),
        ((*FILES[:2], "--input", "boxes_gt=no.npy"), "boxes_gt: no.npy does not exist"),
    ):
        assert_refused(cli(*words, *given), text)
    assert_refused(cli("score", *FILES), "give the arrays of a loss by --input FILE --target FILE")
    np.save("p.npy", data["boxes_gt"])
    alone = ("score", "--input", "p.npy", "--target", "p.npy", "--loss", "x")
    assert_refused(cli(*alone), "unknown loss 'x'; choose one of smooth_l1, huber, l1")


def test_what_has_no_rows_or_another_number_of_them_is_refused(
    data: dict[str, np.ndarray],
) -> None:
    """Of an input that is no row's, a batch of its file would be something else each time."""
    with pytest.raises(ArtefactError, match=r"wide: int64\[1\].*their first axes have to be dyn"):
        make_job(artefact=detector(), loss="scores")
    model = model_of("""g (float[N, 2, 3] images) => (float[M, 3] boxes) {
        shape = Constant<value_ints=[-1, 3]>() boxes = Reshape(images, shape) }""")
    scores = attach(model, "boxes", np.zeros((1, 3), "f4"), LossSpec(per_sample=True))
    with pytest.raises(InvalidInputError, match="200 scores for 100 rows; its loss is not"):
        loss_over([{"images": data["images"]}], artefact=scores)
    with pytest.raises(InvalidInputError, match="batch 1: a tuple is no batch of this model"):
        loss_over([(data["images"], data["boxes_gt"])], artefact=saved(LossSpec()))
