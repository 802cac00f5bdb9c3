"""The example, run to its end."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from example import load_example

pytest.importorskip("sklearn", reason="the example trains on scikit-learn's digits")

_FILE = Path(__file__).parents[2] / "examples" / "digits_autoencoder.onnx"


def test_the_scores_separate_digits_from_noise_and_equal_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = load_example("digits_autoencoder", monkeypatch).main(tmp_path)
    assert outcome.auc > 0.99
    assert outcome.loss_ulp <= 3
    assert outcome.score_error < 1e-5
    for path in outcome.files:
        onnx.checker.check_model(onnx.load(path))
    scorer = onnx.load(outcome.files[-1])
    assert [value.name for value in scorer.graph.input] == ["digits"]
    assert [value.name for value in scorer.graph.output] == ["reconstruction", "score"]
    kept, trained = (onnx.load(path) for path in (_FILE, outcome.files[0]))
    assert [node.op_type for node in kept.graph.node] == [n.op_type for n in trained.graph.node]
    assert [t.dims for t in kept.graph.initializer] == [t.dims for t in trained.graph.initializer]
