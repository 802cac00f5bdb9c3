"""The example, run to its end."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from example import load_example

pytest.importorskip("sklearn", reason="the example trains on scikit-learn's data")
pytest.importorskip("skl2onnx", reason="the example exports by skl2onnx")


def test_the_forecast_is_untouched_and_the_losses_are_pytorch_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = load_example("diabetes_forecast", monkeypatch).main(tmp_path)
    assert outcome.unchanged
    assert 10 < outcome.mean_loss < 40  # the progression varies by 77
    assert outcome.difference < 1e-6
    for path in outcome.files:
        onnx.checker.check_model(onnx.load(path))
