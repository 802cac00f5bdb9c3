"""`run`: the numbers are those of the API, and no file of arrays is trusted."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from conftest_cli import Cli, Done, assert_refused, model

from smoothl1_deploy import LossSpec, load
from smoothl1_deploy._npy import read_array
from smoothl1_deploy.backends._base import BACKENDS
from smoothl1_deploy.errors import InvalidInputError

Pair = tuple[np.ndarray, np.ndarray]
FILES = ("--input", "input.npy", "--target", "target.npy")


@pytest.mark.parametrize("backend", ["ort-cpu", "onnx-reference", "torch"])
def test_a_scalar_is_a_bare_number_in_full_precision(cli: Cli, pair: Pair, backend: str) -> None:
    path = model()
    expected = load(path, backend).run(*pair)["loss"]
    done = cli("run", path, *FILES, "--backend", backend)
    # numpy prints all the digits it takes
    assert done == Done(0, f"{expected[()]!s}\n", "") and np.float32(done.out) == expected
    report = json.loads(cli("run", path, *FILES, "--backend", backend, "--json").out)
    loss = report["outputs"]["loss"]
    assert loss == {"dtype": "float32", "shape": [], "value": loss["value"]}
    assert np.float32(loss["value"]) == expected
    assert report["path"] is None


def test_threads_change_nothing(cli: Cli, pair: Pair) -> None:
    path = model()
    outputs = {cli("run", path, *FILES, "--threads", threads).out for threads in (0, 1, 2)}
    assert len(outputs) == 1 and "" not in outputs
    assert cli("run", path, *FILES, "--threads", -1).code == 2


def test_a_summary_where_nothing_is_reduced(cli: Cli, pair: Pair) -> None:
    path = model(reduction="none")
    pair[0][1, 3] = np.nan
    np.save("input.npy", pair[0])
    losses = load(path).run(*pair)["loss"]
    report = json.loads(cli("run", path, *FILES, "--json").out)["outputs"]["loss"]
    assert report["shape"] == [5, 16]
    assert report["nan"] == 1
    assert np.float32(report["min"]) == np.nanmin(losses)
    assert np.float32(report["max"]) == np.nanmax(losses)
    assert report["mean"] == pytest.approx(np.nanmean(losses.astype(np.float64)), rel=1e-12)
    text = cli("run", path, *FILES).out
    assert "shape   [5, 16]" in text and "nan     1" in text


def test_what_json_has_no_number_for_is_a_string(cli: Cli, pair: Pair) -> None:
    for value, shown in ((np.inf, "inf"), (np.nan, "nan")):
        pair[0][0, 0] = value
        np.save("input.npy", pair[0])
        done = cli("run", model(reduction="sum"), *FILES, "--json")
        assert json.loads(done.out)["outputs"]["loss"]["value"] == shown
        assert cli("run", "loss.onnx", *FILES).out == f"{shown}\n"
        assert cli("run", model("n.onnx", reduction="none"), *FILES, "--json").code == 0
    for name in ("input", "target"):
        np.save(f"{name}.npy", np.zeros((0, 16), np.float32))
    done = cli("run", model(reduction="none"), *FILES, "--json")
    report = json.loads(done.out)["outputs"]["loss"]  # nothing to summarise
    assert (report["shape"], report["nan"], report["min"]) == ([0, 16], 0, None)
    assert cli("run", model(), *FILES).out == "nan\n"


def test_the_result_as_a_file(cli: Cli, pair: Pair) -> None:
    path = model(reduction="none")
    for name in ("out.npy", "out.npz"):
        done = cli("run", path, *FILES, "-o", name)
        assert (done.code, done.err) == (0, f"note: wrote {name}\n")
        stored = np.load(name, allow_pickle=False)
        stored = stored["loss"] if name.endswith("z") else stored
        np.testing.assert_array_equal(stored, load(path).run(*pair)["loss"])


def test_bfloat16_in_and_out(cli: Cli, pair: Pair) -> None:
    """numpy writes bfloat16 as raw items of two bytes."""
    path = model(reduction="none", dtype="bfloat16")
    low = dict(zip(("input", "target"), (a.astype(ml_dtypes.bfloat16) for a in pair), strict=True))
    for name, array in low.items():
        np.save(f"{name}.npy", array)
    np.savez_compressed("low.npz", **low)
    assert np.load("input.npy").dtype == np.dtype("V2")
    expected = load(path).run(**low)["loss"].view(np.uint16)
    for arguments in (FILES, ("--data", "low.npz")):
        done = cli("run", path, *arguments, "-o", "out.npy", "--json")
        assert done.code == 0
        assert json.loads(done.out)["outputs"]["loss"]["dtype"] == "bfloat16"
        assert "view what is read from out.npy as ml_dtypes.bfloat16" in done.err
        np.testing.assert_array_equal(np.load("out.npy").view(np.uint16), expected)


def test_archives_integers_and_layouts_make_no_difference(cli: Cli, pair: Pair) -> None:
    path = model()
    expected = cli("run", path, *FILES)
    np.savez("pair.npz", input=pair[0], target=pair[1])
    assert cli("run", path, "--data", "pair.npz") == expected
    np.save("input.npy", np.asfortranarray(pair[0]))
    np.save("target.npy", pair[1].astype(">f4"))
    assert cli("run", path, *FILES) == expected
    np.save("target.npy", np.zeros((5, 16), np.int64))
    assert cli("run", path, *FILES).code == 0


def test_weight_and_beta_where_the_artefact_takes_them(cli: Cli, pair: Pair) -> None:
    path = model(runtime_beta=True, weight="count", per_sample=True, gradient=True)
    weight = np.linspace(0, 2, 80, dtype=np.float32).reshape(5, 16)
    np.save("weight.npy", weight)
    np.savez("all.npz", input=pair[0], target=pair[1], weight=weight)
    expected = load(path).run(*pair, weight=weight, beta=0.25)
    weighted = [*FILES, "--weight", "weight.npy"]
    for arguments in (weighted, ["--data", "all.npz"]):
        done = cli("run", path, *arguments, "--beta", 0.25, "-o", "out.npz", "--json")
        assert done.code == 0, done.err
        assert list(json.loads(done.out)["outputs"]) == ["loss", "grad_input"]
        for name, array in np.load("out.npz").items():
            np.testing.assert_array_equal(array, expected[name])
    assert_refused(cli("run", path, *weighted), "error: beta is missing")
    done = cli("run", path, *weighted, "--beta", 2, "-o", "out.npy")
    assert_refused(done, "can't write 2 outputs to out.npy; choose a name with .npz")
    done = cli("run", model("plain.onnx"), *FILES, "--beta", 2)
    assert_refused(done, "the artefact takes input, target, and no beta; leave it out")


def test_an_array_of_betas_is_written_as_json(cli: Cli, pair: Pair) -> None:
    betas = [0.5, 2] * 8
    known = LossSpec(betas, reduction="none")
    done = cli("export", "--beta", betas, "--reduction", "none", "--shape", "N,16", "-o", "a.onnx")
    assert done.code == 0 and load("a.onnx").spec == known
    taken = model("taken.onnx", runtime_beta=(16,), reduction="none")
    for words in (["a.onnx"], [taken, "--beta", betas]):
        assert cli("run", *words, *FILES, "-o", "out.npy").code == 0
        np.testing.assert_array_equal(np.load("out.npy"), load("a.onnx").run(*pair)["loss"])
    assert_refused(cli("run", taken, *FILES, "--beta", [1]), "the artefact takes (16,)")
    for text in ("x", "[0.5,x]"):
        done = cli("export", "--beta", text)
        assert done.code == 2 and f"'{text}' is no number" in done.err


def test_what_is_read_is_not_written_over(cli: Cli, pair: Pair) -> None:
    Path(model()).rename("loss.npy")
    for name in ("input.npy", "loss.npy"):
        before = Path(name).read_bytes()
        assert_refused(cli("run", "loss.npy", *FILES, "-o", name), "are one file, which is left")
        assert Path(name).read_bytes() == before


def test_a_file_that_is_cut_while_it_is_read_is_refused(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped into memory, it ended the process by SIGBUS where it was used."""
    read = np.fromfile

    def late(*arguments: Any) -> np.ndarray:
        os.truncate("input.npy", 200)
        return read(*arguments)

    monkeypatch.setattr(np, "fromfile", late)
    with pytest.raises(InvalidInputError, match=r"^input.npy was cut off while it was read; "):
        read_array(Path("input.npy"), "float32")


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


_GOOD = _npy(np.zeros((5, 16), np.float32))


def test_bad_arrays(cli: Cli, pair: Pair) -> None:
    path = model()
    Path("folder").mkdir()
    for content, message in (
        (_GOOD[:200], "bad.npy is truncated or damaged (72 bytes where its header says 320)"),
        (_GOOD[:20], "bad.npy is truncated or damaged (EOF: reading array header"),
        (b"1.0 2.0\n", "bad.npy is not a .npy file; write it with numpy.save"),
        (_npy(np.zeros((5, 16), "V2")), "which is how numpy writes bfloat16, but the artefact is"),
        (_npy(np.zeros((5, 16), "U3")), "input has the dtype <U3"),
        (_npy(np.zeros((5, 16), np.float64)), "promote to float64, but the artefact is float32"),
        (_npy(np.zeros((5, 4), np.float32)), "input has the shape (5, 4), but the artefact takes"),
        (_npy(np.zeros((3, 16), np.float32)), "target has the shape (5, 16)"),
    ):
        Path("bad.npy").write_bytes(content)
        arguments = ("--input", "bad.npy", "--target", "target.npy", "-o", "out.npy")
        assert_refused(cli("run", path, *arguments), message)
        assert not Path("out.npy").exists()
    for name, reason in (("nope.npy", "No such file"), ("folder", "it is a folder, a pipe or a d")):
        done = cli("run", path, "--input", name, "--target", "target.npy")
        assert_refused(done, f"{name} can't be read ({reason}")


def test_bad_archives(cli: Cli, pair: Pair) -> None:
    path, buffer = model(), io.BytesIO()
    np.savez(buffer, x=pair[0], target=pair[1])
    for content, message in (
        (b"PK\x03\x04rest", "pair.npz is truncated or damaged (File is not a zip file)"),
        (_GOOD, "pair.npz is not an .npz file; write it with numpy.savez"),
        (buffer.getvalue(), "pair.npz has no array called input, only x, target"),
    ):
        Path("pair.npz").write_bytes(content)
        assert_refused(cli("run", path, "--data", "pair.npz"), message)


def test_the_arrays_come_in_one_of_two_ways(cli: Cli, pair: Pair) -> None:
    path = model()
    for arguments in (
        [],
        ["--input", "input.npy"],
        [*FILES, "--data", "pair.npz"],
        ["--data", "pair.npz", "--weight", "weight.npy"],
    ):
        done = cli("run", path, *arguments)
        assert_refused(done, "--input A.npy --target B.npy or --data PAIR.npz")


def test_a_model_that_something_else_has_changed_runs_with_one_note(cli: Cli, pair: Pair) -> None:
    path = model(beta=0.5)
    changed = onnx.load(path)
    changed.producer_name = "an optimiser"
    onnx.save(changed, path)
    done = cli("run", path, *FILES)
    assert done.code == 0
    assert done.out == cli("run", model("as_it_was.onnx", beta=0.5), *FILES).out
    assert done.err.count("note: the model was changed by something else after") == 1


def test_no_such_backend_no_such_model_and_an_output_that_cannot_be_written(
    cli: Cli, pair: Pair
) -> None:
    path = model()
    text = f"unknown backend 'abacus'; choose one of {', '.join(BACKENDS)}"
    assert_refused(cli("run", path, *FILES, "--backend", "abacus"), text)
    assert_refused(cli("run", "l.onnx", *FILES), "l.onnx does not exist; give the path of an .onnx")
    for output, message in (
        ("out.txt", "can't write out.txt: choose a name that ends in .npy or .npz"),
        ("input.npy/out.npy", "can't write input.npy/out.npy: Not a directory"),
    ):
        assert_refused(cli("run", path, *FILES, "-o", output), message)
