"""`compare`: what is read, what is shown, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest_cli import Cli, assert_refused, model
from handmade import model_of

FILES = ("--input", "input.npy", "--target", "target.npy")


def test_the_same_file_on_two_backends_from_files_names_or_an_archive(
    cli: Cli, pair: tuple[np.ndarray, np.ndarray]
) -> None:
    np.savez("pair.npz", input=pair[0], target=pair[1], other=np.zeros(1))
    named = ("--input", "input=input.npy", "--input", "target=target.npy")
    words = ("compare", model(), "loss.onnx", "--backend", "ort-cpu", "--backend", "onnx-reference")
    said = {cli(*words, *given).out for given in (FILES, named, ("--data", "pair.npz"))}
    assert len(said) == 1 and "the same bits" in said.pop()


def test_a_distance_is_shown_and_is_too_far_where_that_is_asked(
    cli: Cli, pair: tuple[np.ndarray, np.ndarray]
) -> None:
    words = ("compare", model(reduction="none"), model("other.onnx", reduction="none", beta=0.5))
    done = cli(*words, *FILES)
    assert done.code == 0 and "the same IEEE classes" in done.out and "ULP apart" in done.out
    done = cli(*words, *FILES, "--ulp", 1)
    assert done.code == 1 and "too different: loss" in done.out
    done = cli(*words, *FILES, "--ulp", 1, "--json")
    assert done.code == 1
    found = json.loads(done.out)
    assert found["limit"] == 1 and not found["ok"] and found["outputs"]["loss"]["ulp"] > 1
    at, values = found["outputs"]["loss"]["at"], found["outputs"]["loss"]["values"]
    assert len(at) == 2 and values[0] != values[1]


def test_another_class_ends_with_1_and_what_one_gives_alone_is_said(
    cli: Cli, pair: tuple[np.ndarray, np.ndarray]
) -> None:
    text = "g (float[N, 16] input) => (float[N, 16] y, float[N, 16] z) {y = OP(input) z = Abs(y)}"
    onnx.save(model_of(text.replace("OP", "Relu")), "a.onnx")
    fewer = text.replace("OP", "Neg").replace(", float[N, 16] z", "").replace("z = Abs(y)", "")
    onnx.save(model_of(fewer), "b.onnx")
    done = cli("compare", "a.onnx", "b.onnx", "--input", "input=input.npy")
    below = np.count_nonzero(pair[0] < 0)  # 0 and a number
    assert done.code == 1 and f"too different: y ({below} of another class)" in done.out
    assert "note: a.onnx alone gives z" in done.err


def test_what_is_not_given_rightly_is_told(cli: Cli, pair: tuple[np.ndarray, np.ndarray]) -> None:
    model()
    words = ("compare", "loss.onnx", "loss.onnx")
    ways = "give the arrays by --input A.npy --target B.npy, by --input NAME=A.npy"
    for given, text in (
        ((), ways),
        (FILES[:2], ways),
        (FILES[2:], ways),
        ((*FILES, "--data", "pair.npz"), ways),
        ((*FILES, "--input", "input=input.npy"), ways),
        ((*FILES, *("--backend", "ort-cpu") * 3), "--backend 3 times"),
        (("--input", "a=input.npy"), "no input a; the two take input, target"),
        (("--input", "input=input.npy"), "target is missing; the artefact takes input, target"),
    ):
        assert_refused(cli(*words, *given), text)
    assert_refused(cli("compare", "loss.onnx", "no.onnx", *FILES), "no.onnx does not exist")
    onnx.save(model_of("g (float[N, 16] x) => (float[N, 16] y) {y = Abs(x)}"), "whole.onnx")
    second = ("whole.onnx", "--input", "x=input.npy", "--backend", "ort-cpu", "--backend", "torch")
    assert_refused(cli("compare", "whole.onnx", *second), "the backend torch runs losses alone")


def test_an_engine_is_run_by_trt_whatever_the_backend(
    cli: Cli, pair: tuple[np.ndarray, np.ndarray]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert cli("build", model(), "-o", "loss.engine").code == 0
    done = cli("compare", "loss.onnx", "loss.engine", *FILES, "--backend", "onnx-reference")
    if done.code == 3:
        assert "GPU" in done.err
        Path("loss.engine.json").unlink()
        assert cli("compare", "loss.onnx", "loss.engine", *FILES).code == 2
    else:
        assert done.code == 0
