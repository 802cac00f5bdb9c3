"""`smoothl1-deploy attach`, as a person runs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import parser

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
