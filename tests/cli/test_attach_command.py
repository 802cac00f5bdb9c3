"""`smoothl1-deploy attach`, as a person runs it."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from conftest_cli import Cli, assert_refused
from handmade import model_of, run
from onnx import numpy_helper

from smoothl1_deploy import LossSpec

RELU = "g (float[N, 4] x) => (float[N, 4] boxes) { boxes = Relu(x) }"
ONES = np.ones((3, 4), np.float32)
WORDS = ("attach", "detector.onnx", "--prediction", "boxes", "--target", "gt")


@pytest.fixture(autouse=True)
def _models() -> None:
    """One in this folder, and one with its weights beside it in another."""
    onnx.save(model_of(RELU), "detector.onnx")
    body = "g (float[N, 4] x) => (float[N, 4] boxes) { boxes = MatMul(x, w) }"
    weighted = model_of(body, w=np.arange(16, dtype=np.float32).reshape(4, 4))
    Path("model").mkdir()
    options = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 0}
    onnx.save(weighted, "model/detector.onnx", **options)


def files() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def test_a_new_input_and_a_score_per_row(cli: Cli) -> None:
    done = cli(*WORDS, "--per-sample", "-o", "scored.onnx")
    assert done.code == 0 and "outputs  boxes: float32[N, 4], loss: float32[N]" in done.out
    outputs = run(Path("scored.onnx"), {"x": ONES, "gt": 0 * ONES})
    assert outputs["boxes"].tobytes() == ONES.tobytes()
    assert outputs["loss"].tolist() == [0.5, 0.5, 0.5]


def test_json_is_what_a_person_reads(cli: Cli) -> None:
    done = cli(*WORDS, "--beta", "0.5", "-o", "scored.onnx", "--json")
    found = json.loads(done.out)
    data = Path("scored.onnx").read_bytes()
    assert (found["path"], found["bytes"]) == ("scored.onnx", len(data))
    assert found["sha256"] == hashlib.sha256(data).hexdigest() and found["route"] == "function"
    assert found["spec"] == LossSpec(0.5).to_dict()
    assert [port["name"] for port in found["inputs"]] == ["x", "gt"]
    assert found["outputs"][1] == {"name": "loss", "dtype": "float32", "shape": []}
    assert f"sha256   {found['sha256']}" in cli(*WORDS, "--beta", "0.5", "-o", "scored.onnx").out


def test_a_constant_target_and_only_the_loss(cli: Cli) -> None:
    np.save("gt.npy", 0 * ONES)
    words = ("attach", "detector.onnx", "--prediction", "x", "--target", "gt.npy", "--only-loss")
    assert cli(*words, "-o", "loss.onnx").code == 0
    assert run(Path("loss.onnx"), {"x": ONES}) == {"loss": np.float32(0.5)}


def test_bad_usage_is_a_sentence(cli: Cli) -> None:
    before = files()
    for words, text in (
        ("--prediction bxes --target gt", "no tensor 'bxes' to be the prediction"),
        ("--prediction boxes --target no.npy", "no.npy"),
        ("--prediction boxes --target gt --reduction max", "unknown reduction"),
        ("--prediction x --target g --per-sample --reduction=none", "--per-sample reduces every"),
        ("--prediction x --target g --normalizer count", "without --weight"),
    ):
        assert_refused(cli("attach", "detector.onnx", *words.split(), "-o", "out.onnx"), text)
    assert files() == before


@pytest.mark.parametrize("folder", ["model", "other"])
def test_weights_beside_the_model_stay_beside_it(cli: Cli, folder: str) -> None:
    Path("other").mkdir()
    out = Path(folder, "scored.onnx")
    for route in ("function", "inlined"):  # the copy of the first run is no obstacle
        words = ("attach", "model/detector.onnx", *WORDS[2:], "--route", route, "-o", out)
        assert cli(*words).code == 0
        bare = onnx.load(out, load_external_data=False)
        assert bare.graph.initializer[0].data_location == onnx.TensorProto.EXTERNAL
        assert out.with_name("w.bin").read_bytes() == Path("model/w.bin").read_bytes()
        before = run(Path("model/detector.onnx"), {"x": ONES})["boxes"]
        assert run(out, {"x": ONES, "gt": ONES})["boxes"].tobytes() == before.tobytes()


def test_weights_that_can_t_be_carried(cli: Cli) -> None:
    Path("other").mkdir()
    words = ("attach", "model/detector.onnx", *WORDS[2:], "-o", "other/scored.onnx")
    Path("other/w.bin").write_bytes(b"somebody else's")
    assert_refused(cli(*words), "it exists with other content; choose another folder")
    assert Path("other/w.bin").read_bytes() == b"somebody else's"
    Path("model/w.bin").rename("w.bin")
    assert_refused(cli(*words), "which does not exist")
    bare = onnx.load("model/detector.onnx", load_external_data=False)
    bare.graph.initializer[0].external_data[0].value = "../w.bin"
    Path("model/detector.onnx").write_bytes(bare.SerializeToString())
    assert_refused(cli(*words), "outside of its folder")
    assert not Path("other/scored.onnx").exists()


def test_an_output_that_can_t_be_is_refused_before_anything_is_copied(cli: Cli) -> None:
    Path("other").mkdir()
    before = files()
    for output, text in (
        ("model/w.bin", "and its weights model/w.bin are one file, which is left as it is"),
        ("other/w.bin", "and its weights other/w.bin are one file, which is left as it is"),
        ("other", "it is a folder"),
        ("detector.onnx/scored.onnx", "Not a directory"),
    ):
        assert_refused(cli("attach", "model/detector.onnx", *WORDS[2:], "-o", output), text)
        assert files() == before


def test_the_model_that_is_read_is_written_over_when_that_is_said(cli: Cli) -> None:
    before = files()
    Path("link.onnx").symlink_to("detector.onnx")
    for output in ("detector.onnx", "link.onnx"):
        done = cli(*WORDS, "-o", output)
        assert_refused(done, "and the model, which --overwrite gives up, detector.onnx")
    assert files() == before | {Path("link.onnx"): before[Path("detector.onnx")]}
    assert cli(*WORDS, "-o", "detector.onnx", "--overwrite").code == 0
    assert [o.name for o in onnx.load("detector.onnx").graph.output] == ["boxes", "loss"]


def test_the_arrays_that_are_read_are_never_written_over(cli: Cli) -> None:
    np.save("array.npy", 0 * ONES)
    before = files()
    for operands in (["--target", "array.npy"], ["--target", "gt", "--weight", "array.npy"]):
        done = cli(*WORDS[:4], *operands, "--overwrite", "-o", "array.npy")
        assert_refused(done, f"{operands[-2]} array.npy are one file, which is left as it is")
        assert files() == before


def test_a_new_input_that_looks_like_a_typing_error_is_noted(cli: Cli) -> None:
    for target, noted in (("boxs", True), ("gt", False), ("boxes_gt", False)):
        words = ("attach", "detector.onnx", "--prediction", "x", "--target", target)
        done = cli(*words, "-o", "out.onnx", "--overwrite")
        assert done.code == 0
        text = f"the target {target!r} is a new input; the model has 'boxes' too"
        assert (text in done.err) == noted


def test_a_bfloat16_target_as_numpy_writes_it(cli: Cli) -> None:
    onnx.save(model_of(RELU.replace("float[", "bfloat16[")), "detector.onnx")
    target = np.full((3, 4), 0.5, ml_dtypes.bfloat16)
    with open("gt.NPY", "wb") as file:
        np.save(file, target)
    assert cli(*WORDS[:4], "--target", "gt.NPY", "-o", "scored.onnx").code == 0
    (constant,) = onnx.load("scored.onnx").graph.initializer
    assert numpy_helper.to_array(constant).tobytes() == target.tobytes()


def test_beyond_protobuf_s_limit_nothing_is_written(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is at 2 GB, with the limit brought down to 4 kB."""
    command = importlib.import_module("smoothl1_deploy.cli._attach")
    monkeypatch.setattr(command, "_PROTOBUF_LIMIT", 4096)
    np.save("gt.npy", np.zeros((1024, 4), np.float32))
    done = cli(*WORDS[:4], "--target", "gt.npy", "-o", "scored.onnx")
    assert_refused(done, "protobuf writes less than 2 GiB; keep the model's weights in a file")
    assert not Path("scored.onnx").exists()
