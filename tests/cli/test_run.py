"""`run`: the numbers are those of the API, and no file of arrays is trusted."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from conftest_cli import Done, model

from smoothl1_deploy import load
from smoothl1_deploy.backends.base import BACKENDS
from smoothl1_deploy.errors import InvalidInputError
from smoothl1_deploy.npy import read_archive, read_array

Pair = tuple[np.ndarray, np.ndarray]
FILES = ("--input", "input.npy", "--target", "target.npy")


@pytest.mark.parametrize("backend", ["ort-cpu", "onnx-reference", "torch"])
def test_a_scalar_is_a_bare_number_in_full_precision(
    cli: Callable[..., Done], pair: Pair, backend: str
) -> None:
    path = model()
    expected = load(path, backend).run(*pair)["loss"]
    done = cli("run", path, *FILES, "--backend", backend)
    assert (done.code, done.err) == (0, "")
    assert np.float32(done.out) == expected
    assert done.out == str(expected[()]) + "\n"  # numpy prints all the digits it takes


def test_threads_change_nothing(cli: Callable[..., Done], pair: Pair) -> None:
    path = model()
    outputs = {cli("run", path, *FILES, "--threads", threads).out for threads in (0, 1, 2)}
    assert len(outputs) == 1 and "" not in outputs
    assert cli("run", path, *FILES, "--threads", -1).code == 2


def test_json_of_a_scalar(cli: Callable[..., Done], pair: Pair) -> None:
    path = model()
    report = json.loads(cli("run", path, *FILES, "--json").out)
    loss = report["outputs"]["loss"]
    assert loss == {"dtype": "float32", "shape": [], "value": loss["value"]}
    assert np.float32(loss["value"]) == load(path).run(*pair)["loss"]
    assert report["path"] is None


def test_a_summary_where_nothing_is_reduced(cli: Callable[..., Done], pair: Pair) -> None:
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


@pytest.mark.parametrize(("value", "shown"), [(np.inf, "inf"), (np.nan, "nan")])
def test_what_json_has_no_number_for_is_a_string(
    cli: Callable[..., Done], pair: Pair, value: float, shown: str
) -> None:
    pair[0][0, 0] = value
    np.save("input.npy", pair[0])
    done = cli("run", model(reduction="sum"), *FILES, "--json")
    assert json.loads(done.out)["outputs"]["loss"]["value"] == shown
    done = cli("run", model("n.onnx", reduction="none"), *FILES, "--json")
    assert done.code == 0
    assert cli("run", "loss.onnx", *FILES).out == f"{shown}\n"


def test_nothing_to_summarise(cli: Callable[..., Done]) -> None:
    for name in ("input", "target"):
        np.save(f"{name}.npy", np.zeros((0, 16), np.float32))
    done = cli("run", model(reduction="none"), *FILES, "--json")
    report = json.loads(done.out)["outputs"]["loss"]
    assert (report["shape"], report["nan"], report["min"]) == ([0, 16], 0, None)
    assert cli("run", model(), *FILES).out == "nan\n"


@pytest.mark.parametrize("name", ["out.npy", "out.npz"])
def test_the_result_as_a_file(cli: Callable[..., Done], pair: Pair, name: str) -> None:
    path = model(reduction="none")
    done = cli("run", path, *FILES, "-o", name)
    assert (done.code, done.err) == (0, f"note: wrote {name}\n")
    stored = np.load(name, allow_pickle=False)
    stored = stored["loss"] if name.endswith("z") else stored
    np.testing.assert_array_equal(stored, load(path).run(*pair)["loss"])


def test_bfloat16_in_and_out(cli: Callable[..., Done], pair: Pair) -> None:
    """numpy writes bfloat16 as raw items of two bytes."""
    path = model(reduction="none", dtype="bfloat16")
    low = [array.astype(ml_dtypes.bfloat16) for array in pair]
    np.save("input.npy", low[0])
    np.save("target.npy", low[1])
    assert np.load("input.npy").dtype == np.dtype("V2")
    done = cli("run", path, *FILES, "-o", "out.npy", "--json")
    assert done.code == 0
    assert json.loads(done.out)["outputs"]["loss"]["dtype"] == "bfloat16"
    assert "numpy.load(path).view(ml_dtypes.bfloat16)" in done.err
    expected = load(path).run(*low)["loss"]
    np.testing.assert_array_equal(np.load("out.npy").view(np.uint16), expected.view(np.uint16))


def test_both_arrays_in_one_file(cli: Callable[..., Done], pair: Pair) -> None:
    path = model()
    np.savez("pair.npz", input=pair[0], target=pair[1])
    assert cli("run", path, "--data", "pair.npz").out == cli("run", path, *FILES).out
    low = {k: a.astype(ml_dtypes.bfloat16) for k, a in zip(("input", "target"), pair, strict=True)}
    np.savez_compressed("low.npz", **low)
    assert cli("run", model("b.onnx", dtype="bfloat16"), "--data", "low.npz").code == 0


def test_weight_and_beta_where_the_artefact_takes_them(
    cli: Callable[..., Done], pair: Pair
) -> None:
    spec = {"runtime_beta": True, "weight": "count", "per_sample": True, "gradient": True}
    path = model(**spec)
    weight = np.linspace(0, 2, 80, dtype=np.float32).reshape(5, 16)
    np.save("weight.npy", weight)
    np.savez("all.npz", input=pair[0], target=pair[1], weight=weight)
    expected = load(path).run(*pair, weight=weight, beta=0.25)
    for arguments in ([*FILES, "--weight", "weight.npy"], ["--data", "all.npz"]):
        done = cli("run", path, *arguments, "--beta", 0.25, "-o", "out.npz", "--json")
        assert done.code == 0, done.err
        assert list(json.loads(done.out)["outputs"]) == ["loss", "grad_input"]
        for name, array in np.load("out.npz").items():
            np.testing.assert_array_equal(array, expected[name])
    done = cli("run", path, *FILES, "--weight", "weight.npy")
    assert (done.code, done.err.startswith("error: beta is missing")) == (2, True)
    done = cli("run", model("plain.onnx"), *FILES, "--beta", 2)
    assert done.code == 2
    assert "the artefact takes input, target, and no beta; leave it out" in done.err
    done = cli("run", path, *FILES, "--beta", 2, "--weight", "weight.npy", "-o", "out.npy")
    assert "can't write 2 outputs to out.npy; choose a name with .npz" in done.err


def test_integers_promote_and_layouts_do_not_matter(cli: Callable[..., Done], pair: Pair) -> None:
    path = model()
    expected = cli("run", path, *FILES).out
    np.save("input.npy", np.asfortranarray(pair[0]))
    np.save("target.npy", pair[1].astype(">f4"))
    assert cli("run", path, *FILES).out == expected
    np.save("target.npy", np.zeros((5, 16), np.int64))
    assert cli("run", path, *FILES).code == 0


@pytest.mark.parametrize("name", ["input.npy", "loss.npy"])
def test_what_is_read_is_not_written_over(cli: Callable[..., Done], pair: Pair, name: str) -> None:
    Path(model()).rename("loss.npy")
    before = Path(name).read_bytes()
    done = cli("run", "loss.npy", *FILES, "-o", name)
    assert done.code == 2 and "are one file, which is left as it is" in done.err
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


def _write(name: str, content: bytes) -> str:
    Path(name).write_bytes(content)
    return name


def _npy(array: np.ndarray, **options: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


_GOOD = _npy(np.zeros((5, 16), np.float32))
_OBJECTS = _npy(np.array([{}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_GOOD[:200], "bad.npy is truncated or damaged (72 bytes where its header says 320)"),
        (_GOOD[:20], "bad.npy is truncated or damaged (EOF: reading array header"),
        (b"", "bad.npy is not a .npy file"),
        (b"1.0 2.0\n", "bad.npy is not a .npy file; write it with numpy.save(path, array)"),
        (pickle.dumps([1.0]), "It looks like a pickle, which is not loaded: it can run any code"),
        (_OBJECTS, "bad.npy holds Python objects, which are not loaded"),
        (_npy(np.zeros((5, 16), "V2")), "which is how numpy writes bfloat16, but the artefact is"),
        (_npy(np.zeros((5, 16), "U3")), "input has the dtype <U3"),
        (_npy(np.zeros((5, 16), np.complex64)), "input has the dtype complex64"),
        (_npy(np.zeros((5, 16), np.float64)), "promote to float64, but the artefact is float32"),
        (_npy(np.zeros((5, 4), np.float32)), "input has the shape (5, 4), but the artefact takes"),
        (_npy(np.zeros((5, 16, 1), np.float32)), "input has the shape (5, 16, 1)"),
        (_npy(np.zeros((3, 16), np.float32)), "target has the shape (5, 16)"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_arrays(cli: Callable[..., Done], pair: Pair, content: bytes, message: str) -> None:
    _write("bad.npy", content)
    done = cli("run", model(), "--input", "bad.npy", "--target", "target.npy", "-o", "out.npy")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ") and message in done.err
    assert not Path("out.npy").exists()


def test_arrays_that_are_missing(cli: Callable[..., Done], pair: Pair) -> None:
    path = model()
    Path("folder").mkdir()
    for name, reason in (
        ("nope.npy", "No such file"),
        ("folder", "it is a folder, a pipe or a device"),
    ):
        done = cli("run", path, "--input", name, "--target", "target.npy")
        assert done.code == 2
        assert f"{name} can't be read ({reason}" in done.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04rest", "pair.npz is truncated or damaged (File is not a zip file)"),
        (_GOOD, "pair.npz is not an .npz file; write it with numpy.savez"),
        (b"", "pair.npz is not an .npz file"),
    ],
)
def test_bad_archives(cli: Callable[..., Done], content: bytes, message: str) -> None:
    _write("pair.npz", content)
    done = cli("run", model(), "--data", "pair.npz")
    assert done.code == 2
    assert message in done.err


class _Bomb:
    """Pickles into an order to write a file."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("exploded"),)  # type: ignore[return-value]


def test_a_pickle_in_an_archive_is_not_loaded(cli: Callable[..., Done], pair: Pair) -> None:
    bomb = np.array([_Bomb()], dtype=object)
    np.savez("pair.npz", input=bomb, target=pair[1])
    np.save("bomb.npy", bomb)
    path = model()
    for arguments in (["--data", "pair.npz"], ["--input", "bomb.npy", "--target", "target.npy"]):
        done = cli("run", path, *arguments)
        assert done.code == 2
        assert not Path("exploded").exists()
    np.load("bomb.npy", allow_pickle=True)
    assert Path("exploded").exists()  # it would have worked


def test_an_archive_without_the_two_names(cli: Callable[..., Done], pair: Pair) -> None:
    np.savez("pair.npz", x=pair[0], target=pair[1])
    done = cli("run", model(), "--data", "pair.npz")
    assert done.code == 2
    assert "pair.npz has no array called input, only x, target" in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--input", "input.npy"],
        ["--target", "target.npy"],
        [*FILES, "--data", "pair.npz"],
        ["--data", "pair.npz", "--weight", "weight.npy"],
    ],
)
def test_the_arrays_come_in_one_of_two_ways(
    cli: Callable[..., Done], pair: Pair, arguments: list[str]
) -> None:
    done = cli("run", model(), *arguments)
    assert done.code == 2
    assert "--input A.npy --target B.npy or --data PAIR.npz" in done.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "loss.onnx does not exist; give the path of an .onnx file"),
        (b"input,target\n1,2\n", "loss.onnx"),
        (b"", "loss.onnx holds no ONNX graph"),
        (b"\x08\x0a\x12", "loss.onnx can't be read as an ONNX model"),
    ],
)
def test_a_model_that_is_none(
    cli: Callable[..., Done], pair: Pair, content: bytes | None, message: str
) -> None:
    if content is not None:
        _write("loss.onnx", content)
    done = cli("run", "loss.onnx", *FILES)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_a_truncated_model(cli: Callable[..., Done], pair: Pair) -> None:
    data = Path(model()).read_bytes()
    _write("loss.onnx", data[: len(data) // 2])
    done = cli("run", "loss.onnx", *FILES)
    assert done.code == 2
    assert "loss.onnx" in done.err


def test_a_model_that_something_else_has_changed_runs_with_one_note(
    cli: Callable[..., Done], pair: Pair
) -> None:
    path = model(beta=0.5)
    changed = onnx.load(path)
    changed.producer_name = "an optimiser"
    onnx.save(changed, path)
    done = cli("run", path, *FILES)
    assert done.code == 0
    assert done.out == cli("run", model("as_it_was.onnx", beta=0.5), *FILES).out
    assert done.err.count("note: the model was changed by something else after") == 1


def test_an_unknown_backend(cli: Callable[..., Done], pair: Pair) -> None:
    done = cli("run", model(), *FILES, "--backend", "abacus")
    assert done.code == 2
    assert f"unknown backend 'abacus'; choose one of {', '.join(BACKENDS)}" in done.err


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("out.txt", "can't write out.txt: choose a name that ends in .npy or .npz"),
        ("input.npy/out.npy", "can't write input.npy/out.npy: Not a directory"),
        ("nowhere/out.npz", "can't write nowhere/out.npz: No such file or directory"),
    ],
)
def test_an_output_that_cannot_be_written(
    cli: Callable[..., Done], pair: Pair, output: str, message: str
) -> None:
    done = cli("run", model(), *FILES, "-o", output)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


@pytest.mark.filterwarnings("ignore")  # numpy warns about headers it can still read
def test_damaged_files_are_refused_whatever_is_damaged(pair: Pair) -> None:
    """Random damage surfaces in numpy, zipfile, zlib and tokenize; all of it as our error."""
    np.savez_compressed("good.npz", input=pair[0], target=pair[1])
    good = {"bad.npy": Path("input.npy").read_bytes(), "bad.npz": Path("good.npz").read_bytes()}
    rng = random.Random(0)
    refused = dict.fromkeys(good, 0)
    for _ in range(300):
        for name, content in good.items():
            data = bytearray(content)
            end = 128 if name == "bad.npy" else len(data)  # the header, or anything
            for _ in range(rng.choice((1, 2, 8))):
                data[rng.randrange(2, end)] = rng.randrange(256)
            Path(name).write_bytes(data)
            try:
                if name == "bad.npy":
                    read_array(Path(name), "float32")
                else:
                    read_archive(Path(name), "float32")
            except (InvalidInputError, MemoryError):  # a header may claim any size
                refused[name] += 1
    assert min(refused.values()) > 100
