"""Scores of files: the loss of PyTorch's definition, exactly combined, whatever the files are."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from conftest_cli import Done, spawn
from hypothesis import given
from hypothesis import strategies as st

from smoothl1_deploy import LossSpec, export, load, loss_over
from smoothl1_deploy.errors import InvalidInputError, SpecError
from smoothl1_deploy.scoring import _shards as shards

Cli = Callable[..., Done]
Report = Callable[..., Any]
Pair = tuple[np.ndarray, np.ndarray]
FILES = ("--input", "p.npy", "--target", "t.npy")


def pair(rows: int = 100, width: int = 3, dtype: str = "float32", seed: int = 0) -> Pair:
    rng = np.random.default_rng(seed)
    p, t = rng.standard_normal((2, rows, width)).astype(dtype)
    return p, t


def elements(p: np.ndarray, t: np.ndarray, beta: float = 1.0) -> Fraction:
    """The exact sum of the element losses of the artefact."""
    spec = LossSpec(beta, "none", p.dtype.name)
    losses = load(export(spec)).run(p, t)["loss"].astype(np.float64)
    return sum(map(Fraction, losses.ravel().tolist()), Fraction(0))


@pytest.fixture(autouse=True)
def _small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BATCH_ELEMENTS", 16)
    monkeypatch.setattr(shards, "TASK_ELEMENTS", 64)


@pytest.fixture
def saved() -> Pair:
    p, t = pair()
    np.save("p.npy", p)
    np.save("t.npy", t)
    return p, t


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_result_is_the_exact_sum_rounded_once(
    score: Report, dtype: str, reduction: str
) -> None:
    p, t = pair(dtype=dtype)
    np.save("p.npy", p)
    np.save("t.npy", t)
    found = score("--beta", "0.5", "--reduction", reduction)
    exact = elements(p, t, 0.5)
    assert found["loss"] == float(exact / p.size if reduction == "mean" else exact)
    assert found["sum"] == float(exact)
    assert (found["count"], found["shards"], found["resumed"]) == (300, 1, 0)
    assert found["spec"] == {"beta": 0.5, "reduction": reduction, "dtype": dtype}
    assert found["seconds"] > 0 and found["rate"] > 0
    assert list(Path("user-cache/smoothl1-deploy/score").iterdir()) == []


def test_scores_that_nobody_asked_to_be_written_are_said_to_be_lost(cli: Cli, saved: Pair) -> None:
    note = "note: no scores were written; -o scores.npy writes them\n"
    assert cli("score", *FILES, "--per-sample").err == note
    assert cli("score", *FILES, "--per-sample", "-o", "s.npy").err == ""


@given(st.integers(1, 400), st.booleans())
def test_the_size_and_order_of_batches_do_not_matter(size: int, backwards: bool) -> None:
    p, t = pair(400, 1)
    batches = [(p[i : i + size], t[i : i + size]) for i in range(0, 400, size)]
    assert loss_over(batches[::-1] if backwards else batches, LossSpec(0.5)).loss == float(
        elements(p, t, 0.5) / 400
    )


def test_people_read_the_exact_loss_and_the_number_of_elements(cli: Cli, saved: Pair) -> None:
    done = cli("score", *FILES)
    assert done.err == ""  # no bar where there is no terminal
    assert f"loss      {float(elements(*saved) / 300)}" in done.out
    assert "elements  300 in 1 shard(s)" in done.out


def test_scores_are_those_of_the_artefact(score: Report, saved: Pair) -> None:
    expected = load(export(LossSpec(0.5, per_sample=True))).run(*saved)["loss"]
    found = score("--beta", "0.5", "--per-sample", "-o", "scores.npy")
    scores = np.load("scores.npy")
    assert scores.dtype == np.float32 and np.array_equal(scores, expected)
    exact = sum(map(Fraction, scores.astype(float).tolist()), Fraction(0))
    assert found["loss"] == float(exact / 100)
    assert found["output"] == "scores.npy"
    assert {path.name for path in Path().glob("*")} >= {"scores.npy"}
    assert list(Path().glob(".scores*")) == []


def test_nan_and_infinity_flow(score: Report, saved: Pair) -> None:
    p, _ = saved
    p[50, 1] = np.inf
    np.save("p.npy", p)
    assert score()["loss"] == "inf"
    p[3, 0] = np.nan
    np.save("p.npy", p)
    assert score()["loss"] == "nan"
    score("--per-sample", "-o", "s.npy")
    scores = np.load("s.npy")
    assert np.isnan(scores[3]) and scores[50] == np.inf and np.isfinite(scores[4:50]).all()


def test_a_spec_with_gradients_is_scored_by_its_loss(saved: Pair) -> None:
    """The gradient and what would flow into it are left out together; one alone is no spec."""
    spec = LossSpec(0.5, gradient=True, upstream=True)
    assert loss_over([saved], spec).loss == loss_over([saved], LossSpec(0.5)).loss


def test_no_rows_at_all_have_a_mean_of_nan_and_a_sum_of_zero(score: Report) -> None:
    for name in ("p", "t"):
        np.save(f"{name}.npy", np.zeros((0, 3), np.float32))
    assert score()["loss"] == "nan"
    assert score("--reduction", "sum")["loss"] == 0.0
    score("--per-sample", "-o", "s.npy")
    assert np.load("s.npy").shape == (0,)


@pytest.mark.parametrize("normalizer", ["count", "weights"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_weighted_losses_are_combined_as_the_spec_says(
    score: Report, saved: Pair, normalizer: str, per_sample: bool
) -> None:
    weight = np.random.default_rng(1).random((100, 1)).astype(np.float32)
    np.save("w.npy", weight)
    options = ["--per-sample", "-o", "s.npy"] if per_sample else []
    found = score("--weight", "w.npy", "--normalizer", normalizer, *options)
    spec = LossSpec(weight=normalizer, dtype="float64")
    wide = (array.astype(np.float64) for array in (*saved, weight))
    expected = load(export(spec)).run(*list(wide)[:2], weight=weight)["loss"]
    assert found["loss"] == pytest.approx(float(expected), rel=2e-7)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_an_artefact_runs_itself(score: Report, saved: Pair, reduction: str) -> None:
    model = export(LossSpec(0.5, reduction), shape=("N", 3))
    Path("loss.onnx").write_bytes(model.SerializeToString())
    found = score("--model", "loss.onnx")
    exact = elements(*saved, 0.5)
    wanted = float(exact if reduction == "sum" else exact / 300)
    assert found["loss"] == pytest.approx(wanted, rel=2e-7)
    runner, total = load(model), Fraction(0)
    for i in range(0, 100, 5):  # 16 elements are 5 rows of 3
        out = runner.run(saved[0][i : i + 5], saved[1][i : i + 5])["loss"].astype(float)
        part = sum(map(Fraction, out.ravel().tolist()), Fraction(0))
        total += part * 15 if reduction == "mean" else part
    assert found["sum"] == float(total)


def test_an_artefact_with_a_fixed_number_of_rows(cli: Cli, score: Report, saved: Pair) -> None:
    Path("loss.onnx").write_bytes(export(LossSpec(), shape=(20, 3)).SerializeToString())
    found = score("--model", "loss.onnx")
    assert found["loss"] == pytest.approx(float(elements(*saved) / 300), rel=1e-7)
    done = cli("score", *FILES, "--model", "loss.onnx", "--batch", "7")
    assert "error: the artefact takes 20 rows at a time, not 7" in done.err
    for name, array in zip("pt", saved, strict=True):
        np.save(f"{name}.npy", array[:30])
    done = cli("score", *FILES, "--model", "loss.onnx")
    assert done.code == 2
    assert "shard p.npy, rows 20 to 30: input has the shape (10, 3)" in done.err


def test_an_artefact_gets_its_beta_at_run_time(cli: Cli, score: Report, saved: Pair) -> None:
    Path("loss.onnx").write_bytes(export(LossSpec(runtime_beta=True)).SerializeToString())
    found = score("--model", "loss.onnx", "--beta", "0.5")
    assert found["loss"] == pytest.approx(float(elements(*saved, 0.5) / 300), rel=1e-7)
    assert "beta is missing" in cli("score", *FILES, "--model", "loss.onnx").err


def test_a_fortran_file_and_one_long_row(score: Report, saved: Pair) -> None:
    exact = float(elements(*saved) / 300)
    np.save("p.npy", np.asfortranarray(saved[0]))
    assert score()["loss"] == exact
    for name, array in zip("pt", saved, strict=True):
        np.save(f"{name}.npy", array.reshape(1, 300))
    assert score()["loss"] == exact


def test_a_target_of_another_dtype_and_width(score: Report, saved: Pair) -> None:
    target = np.arange(100)[:, None] % 3
    np.save("t.npy", target)
    found = score()
    wide = np.broadcast_to(target.astype(np.float32), (100, 3))
    assert found["loss"] == float(elements(saved[0], wide) / 300)


def test_loss_over_takes_mappings_and_says_which_batch_is_wrong() -> None:
    p, t = pair()
    both = {"input": p, "target": t}
    assert loss_over([both], LossSpec()).loss == loss_over([(p, t)], LossSpec()).loss
    weighted = loss_over([(p, t, np.ones_like(p))], LossSpec(weight="weights"))
    assert weighted.loss == float(elements(p, t) / 300)
    with pytest.raises(InvalidInputError, match="^batch 2: a ndarray is no batch; give"):
        loss_over([both, p], LossSpec())
    with pytest.raises(InvalidInputError, match="^batch 1: it has masks; a mapping has input"):
        loss_over([{**both, "masks": p}], LossSpec())
    with pytest.raises(InvalidInputError, match=r"^batch 1: .*\(99, 3\).* can't be broadcast"):
        loss_over([(p, t[1:])], LossSpec())
    with pytest.raises(InvalidInputError, match="^batch 1: target is missing"):
        loss_over([{"input": p}], LossSpec())
    with pytest.raises(SpecError, match="^give spec=LossSpec"):
        loss_over([(p, t)])
    with pytest.raises(SpecError, match="the reduction none combines nothing; use mean"):
        loss_over([(p, t)], LossSpec(reduction="none"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reduction", "none"], "the reduction none combines nothing"),
        (["-o", "s.npy"], "s.npy is for one score a row; give --per-sample"),
        (["--per-sample", "-o", "s.csv"], "choose a name that ends in .npy or .parquet"),
        (["--per-sample", "-o", "p.npy/s.npy"], "can't write p.npy/s.npy: Not a directory"),
        (["--engine", "spark"], "unknown engine 'spark'; choose one of local, ray"),
        (["--workers", "2"], "--ray-address and --workers are for --engine ray; give that too"),
        (["--batch", "0"], "a batch of 0 rows; give at least one"),
        (["--dtype", "float16"], "promote to float32, but the artefact is float16"),
        (["--target", "none.npy"], "target: none.npy does not exist; give a file or a folder"),
        (["--target", "."], "p.npy is a file beside a folder; give folders, or files"),
    ],
)
def test_bad_usage_is_told_and_leaves_no_file(
    cli: Cli, saved: Pair, options: list[str], message: str
) -> None:
    done = cli("score", *FILES, *options)
    assert done.code == 2 and message in done.err
    assert {path.name for path in Path().iterdir()} <= {"p.npy", "t.npy", "user-cache"}
    assert not list(Path("user-cache").rglob("*.journal*"))


@pytest.mark.parametrize(
    ("without", "options", "message"),
    [
        ("ray", ["--engine", "ray"], "--engine ray needs the package 'ray"),
        (
            "pyarrow",
            ["--per-sample", "-o", "s.parquet"],
            "writing Parquet needs the package 'pyarr",
        ),
    ],
)
def test_a_missing_package_is_said_with_its_command(
    saved: Pair, without: str, options: list[str], message: str
) -> None:
    done = spawn("score", *FILES, *options, without=without)
    extra = "ray" if without == "ray" else "score"
    assert done.code == 3 and message in done.err
    assert f"pip install 'smoothl1-deploy[{extra}]'" in done.err
    assert not list(Path().glob(".s.*"))


def test_a_model_of_other_origin(cli: Cli, score: Report, saved: Pair) -> None:
    text = """<ir_version: 8, opset_import: ["" : 18]> g (float[N, 3] y, float[N, 3] y_true)
    => (float l) { d = Sub(y, y_true) a = Abs(d) l = ReduceMean<keepdims=0>(a) }"""
    onnx.save(onnx.parser.parse_model(text), "l1.onnx")
    done = cli("score", *FILES, "--model", "l1.onnx")
    assert done.code == 2 and "the model doesn't say what it computes; give the spec" in done.err
    found = score("--model", "l1.onnx", "--beta", "0", "--reduction", "mean")
    assert found["loss"] == pytest.approx(np.abs(saved[0] - saved[1]).mean(dtype=float), rel=1e-6)
    done = cli("score", *FILES, "--model", "l1.onnx", "--reduction", "sum", "--per-sample")
    assert done.code == 2 and "its metadata or the given reduction is wrong" in done.err


def test_a_changed_artefact_is_scored_as_it_is_with_a_note(cli: Cli, saved: Pair) -> None:
    model = export(LossSpec(0.5, "sum"), shape=("N", 3))
    model.graph.node[0].attribute[0].f = 0.0  # its metadata still say 0.5
    onnx.save(model, "changed.onnx")
    done = cli("score", *FILES, "--model", "changed.onnx", "--json")
    assert "note: the model was changed by something else after" in done.err
    assert json.loads(done.out)["loss"] == pytest.approx(
        np.abs(saved[0] - saved[1]).sum(dtype=float)
    )


def test_a_model_that_is_asked_for_what_it_is_not(cli: Cli, saved: Pair) -> None:
    Path("loss.onnx").write_bytes(export(LossSpec(0.5)).SerializeToString())
    for options, message in (
        (["--per-sample"], "'per_sample': True}; ask for what it computes, or leave the artefact"),
        (["--beta", "1"], "the artefact computes {'beta': 0.5, "),
        (["--reduction", "sum"], "the artefact computes {'beta': 0.5, 'reduction': 'mean'"),
        (["--dtype", "float32"], "--dtype is the model's own; leave it out"),
    ):
        done = cli("score", *FILES, "--model", "loss.onnx", *options)
        assert done.code == 2 and message in done.err
