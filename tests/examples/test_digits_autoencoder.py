"""The example, run to its end."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import onnx
import pytest

pytest.importorskip("sklearn", reason="the example trains on scikit-learn's digits")

_FILE = Path(__file__).parents[2] / "examples" / "digits_autoencoder.py"


def test_the_scores_separate_digits_from_noise_and_equal_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("digits_autoencoder", _FILE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, example)  # dataclasses looks its module up
    spec.loader.exec_module(example)
    outcome = example.main(tmp_path)
    assert outcome.auc > 0.99
    assert outcome.loss_ulp <= 3
    assert outcome.score_error < 1e-5
    for path in outcome.files:
        onnx.checker.check_model(onnx.load(path))
    kept, trained = (onnx.load(path) for path in (_FILE.with_suffix(".onnx"), outcome.files[0]))
    assert [node.op_type for node in kept.graph.node] == [n.op_type for n in trained.graph.node]
    assert [t.dims for t in kept.graph.initializer] == [t.dims for t in trained.graph.initializer]
