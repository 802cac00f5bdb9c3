"""`smoothl1-deploy attach`, as a person runs it."""

from __future__ import annotations

import importlib
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper, parser

from smoothl1_deploy.cli import main

MODEL = """<ir_version: 8, opset_import: ["" : 18]>
g (float[N, 4] x) => (float[N, 4] boxes) { boxes = Relu(x) }"""


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    path = tmp_path / "detector.onnx"
    onnx.save(parser.parse_model(MODEL), path)
    return path


def test_a_new_input_and_a_score_per_row(detector: Path, capsys: pytest.CaptureFixture) -> None:
    scored = detector.with_name("scored.onnx")
    words = ["attach", str(detector), "--prediction", "boxes", "--target", "gt", "--per-sample"]
    assert main([*words, "-o", str(scored)]) == 0
    assert "outputs  boxes, loss" in capsys.readouterr().out
    x, gt = np.ones((3, 4), np.float32), np.zeros((3, 4), np.float32)
    boxes, loss = ort.InferenceSession(scored).run(None, {"x": x, "gt": gt})
    assert boxes.tobytes() == x.tobytes()
    assert loss.tolist() == [0.5, 0.5, 0.5]


def test_a_constant_target_and_only_the_loss(detector: Path) -> None:
    np.save(detector.with_name("gt.npy"), np.zeros((3, 4), np.float32))
    out = detector.with_name("loss.onnx")
    words = ["attach", str(detector), "--prediction", "x", "--only-loss", "-o", str(out)]
    assert main([*words, "--target", str(detector.with_name("gt.npy"))]) == 0
    session = ort.InferenceSession(out)
    assert [o.name for o in session.get_outputs()] == ["loss"]
    assert session.run(None, {"x": np.ones((3, 4), np.float32)})[0] == 0.5


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--prediction", "bxes", "--target", "gt"], "no tensor 'bxes' to be the prediction"),
        (["--prediction", "boxes", "--target", "no.npy"], "no.npy"),
        (["--prediction", "boxes", "--target", "gt", "--reduction", "max"], "unknown reduction"),
        (["--prediction", "x", "--target", "g", "--per-sample", "--reduction=none"], "per_sample"),
        (["--prediction", "x", "--target", "g", "--normalizer", "count"], "without --weight"),
    ],
)  # fmt: skip
def test_bad_usage_is_a_sentence(
    detector: Path, words: list[str], text: str, capsys: pytest.CaptureFixture
) -> None:
    out = detector.with_name("out.onnx")
    assert main(["attach", str(detector), *words, "-o", str(out)]) == 2
    err = capsys.readouterr().err
    assert text in err and "Traceback" not in err
    assert not out.exists()


def _with_weights_beside(folder: Path, location: str = "w.bin") -> Path:
    folder.mkdir(exist_ok=True)
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]>'
        "g (float[N, 4] x) => (float[N, 4] boxes) { boxes = MatMul(x, w) }"
    )
    weights = np.arange(16, dtype=np.float32).reshape(4, 4)
    model.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    path = folder / "detector.onnx"
    onnx.save(
        model, path, save_as_external_data=True, location=location, size_threshold=0
    )  # fmt: skip
    return path


@pytest.mark.parametrize("route", ["function", "inlined"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_weights_beside_the_model_stay_beside_it(
    tmp_path: Path, elsewhere: bool, route: str
) -> None:
    detector = _with_weights_beside(tmp_path / "model")
    out = (tmp_path / "other" if elsewhere else detector.parent) / "scored.onnx"
    out.parent.mkdir(exist_ok=True)
    words = ["attach", str(detector), "--prediction", "boxes", "--target", "gt", "--route", route]
    assert main([*words, "-o", str(out)]) == 0
    assert main([*words, "-o", str(out)]) == 0  # the copy of the first run is no obstacle
    bare = onnx.load(out, load_external_data=False)
    assert bare.graph.initializer[0].data_location == onnx.TensorProto.EXTERNAL
    assert (out.parent / "w.bin").read_bytes() == (detector.parent / "w.bin").read_bytes()
    x, gt = np.ones((3, 4), np.float32), np.zeros((3, 4), np.float32)
    (before,) = ort.InferenceSession(detector).run(None, {"x": x})
    boxes, _ = ort.InferenceSession(out).run(None, {"x": x, "gt": gt})
    assert boxes.tobytes() == before.tobytes()


def test_weights_that_can_t_be_carried(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    detector = _with_weights_beside(tmp_path / "model")
    other = tmp_path / "other"
    other.mkdir()
    words = ["attach", str(detector), "--prediction", "boxes", "--target", "gt"]
    (other / "w.bin").write_bytes(b"somebody else's")
    assert main([*words, "-o", str(other / "scored.onnx")]) == 2
    assert "it exists with other content; choose another folder" in capsys.readouterr().err
    assert (other / "w.bin").read_bytes() == b"somebody else's"
    (detector.parent / "w.bin").rename(tmp_path / "w.bin")
    assert main([*words, "-o", str(other / "scored.onnx")]) == 2
    assert "which does not exist" in capsys.readouterr().err
    bare = onnx.load(detector, load_external_data=False)
    bare.graph.initializer[0].external_data[0].value = "../w.bin"
    detector.write_bytes(bare.SerializeToString())
    assert main([*words, "-o", str(other / "scored.onnx")]) == 2
    assert "outside of its folder" in capsys.readouterr().err
    assert not (other / "scored.onnx").exists()


@pytest.mark.parametrize(
    ("output", "text"),
    [
        ("model/w.bin", "holds its weights; give another name"),
        ("other/w.bin", "holds its weights; give another name"),
        ("other", "is a folder"),
        ("nowhere/scored.onnx", "lies in a folder that doesn't exist"),
    ],
)
def test_an_output_that_can_t_be_is_refused_before_anything_is_copied(
    tmp_path: Path, output: str, text: str, capsys: pytest.CaptureFixture
) -> None:
    detector = _with_weights_beside(tmp_path / "model")
    (tmp_path / "other").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    words = ["attach", str(detector), "--prediction", "boxes", "--target", "gt"]
    assert main([*words, "-o", str(tmp_path / output)]) == 2
    assert text in capsys.readouterr().err
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_the_model_that_is_read_is_written_over_when_that_is_said(
    detector: Path, capsys: pytest.CaptureFixture
) -> None:
    before = detector.read_bytes()
    link = detector.with_name("link.onnx")
    link.symlink_to(detector)
    for output in (detector, link):
        words = ["attach", str(detector), "--prediction", "boxes", "--target", "gt"]
        words += ["-o", str(output)]
        assert main(words) == 2
        assert "is the one that is read; give another name, or say --overwrite" in (
            capsys.readouterr().err
        )
        assert detector.read_bytes() == before
    assert main([*words[:-1], str(detector), "--overwrite"]) == 0
    assert [output.name for output in onnx.load(detector).graph.output] == ["boxes", "loss"]


@pytest.mark.parametrize("role", ["target", "weight"])
def test_the_arrays_that_are_read_are_never_written_over(
    detector: Path, role: str, capsys: pytest.CaptureFixture
) -> None:
    array = detector.with_name("array.npy")
    np.save(array, np.zeros((3, 4), np.float32))
    before = array.read_bytes()
    operands = {"target": "gt", role: str(array)}
    words = [word for name, given in operands.items() for word in (f"--{name}", given)]
    words = ["attach", str(detector), "--prediction", "boxes", *words, "--overwrite"]
    assert main([*words, "-o", str(array)]) == 2
    assert "is an array of it; give another name" in capsys.readouterr().err
    assert array.read_bytes() == before


@pytest.mark.parametrize(("target", "noted"), [("boxs", True), ("gt", False), ("boxes_gt", False)])
def test_a_new_input_that_looks_like_a_typing_error_is_noted(
    detector: Path, target: str, noted: bool, capsys: pytest.CaptureFixture
) -> None:
    words = ["attach", str(detector), "--prediction", "x", "--target", target]
    assert main([*words, "-o", str(detector.with_name("out.onnx"))]) == 0
    text = f"the target {target!r} is a new input; the model has 'boxes' too"
    assert (text in capsys.readouterr().err) == noted


def test_a_bfloat16_target_as_numpy_writes_it(tmp_path: Path) -> None:
    model = parser.parse_model(MODEL.replace("float[", "bfloat16["))
    onnx.save(model, tmp_path / "half.onnx")
    target = np.full((3, 4), 0.5, ml_dtypes.bfloat16)
    np.save(tmp_path / "gt.NPY", target)
    (tmp_path / "gt.NPY.npy").rename(tmp_path / "gt.NPY")  # numpy appends its own suffix
    out = tmp_path / "scored.onnx"
    words = ["attach", str(tmp_path / "half.onnx"), "--prediction", "boxes", "-o", str(out)]
    assert main([*words, "--target", str(tmp_path / "gt.NPY")]) == 0
    (constant,) = onnx.load(out).graph.initializer
    assert numpy_helper.to_array(constant).tobytes() == target.tobytes()


def test_beyond_protobuf_s_limit_the_weights_go_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is at 2 GB, with the limit brought down to 4 kB."""
    command = importlib.import_module("smoothl1_deploy.cli.attach")
    monkeypatch.setattr(command, "_PROTOBUF_LIMIT", 4096)
    detector = tmp_path / "detector.onnx"
    model = parser.parse_model(MODEL)
    weights = np.arange(4096, dtype=np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weights, "unused"))
    onnx.save(model, detector)
    out = tmp_path / "scored.onnx"
    words = ["attach", str(detector), "--prediction", "boxes", "--target", "gt", "-o", str(out)]
    assert main(words) == 0
    assert (tmp_path / "scored.onnx.data").stat().st_size >= weights.nbytes
    x = np.ones((3, 4), np.float32)
    boxes, loss = ort.InferenceSession(out).run(None, {"x": x, "gt": 0 * x})
    assert loss == 0.5 and boxes.tobytes() == x.tobytes()
