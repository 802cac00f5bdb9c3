"""The scripts in examples/, run to their ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from script import module_at

FOLDER = Path(__file__).parents[2] / "examples"


def outcome_of(name: str, folder: Path) -> Any:
    """What `examples/<name>.py` gives; on one thread, which suffices and shares the machine."""
    torch.set_num_threads(1)
    outcome = module_at(FOLDER / f"{name}.py").main(folder)
    for path in outcome.files:
        onnx.checker.check_model(onnx.load(path), full_check=True)
    return outcome


def test_both_exporters_give_pytorch_s_losses(tmp_path: Path) -> None:
    outcome = outcome_of("detector_head", tmp_path)
    assert outcome.overlap > 0.3
    assert set(outcome.differences) == {"dynamo", "torchscript"}
    assert all(difference < 1e-4 for difference in outcome.differences.values())
    for path in outcome.files:
        graph = onnx.load(path).graph
        assert [value.name for value in graph.output] == ["boxes", "loss"]
        assert "Clip" in {node.op_type for node in graph.node}, "not this package's graph"


def test_the_forecast_is_untouched_and_the_losses_are_pytorch_s(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the example trains on scikit-learn's data")
    pytest.importorskip("skl2onnx", reason="the example exports by skl2onnx")
    outcome = outcome_of("diabetes_forecast", tmp_path)
    assert outcome.unchanged
    assert 10 < outcome.mean_loss < 40  # the progression varies by 77
    assert outcome.difference < 1e-6


def test_the_scores_separate_digits_from_noise_and_equal_pytorch(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the example trains on scikit-learn's digits")
    outcome = outcome_of("digits_autoencoder", tmp_path)
    assert outcome.auc > 0.99
    assert outcome.loss_ulp <= 3
    assert outcome.score_error < 1e-5
    scorer = onnx.load(outcome.files[-1]).graph
    assert [value.name for value in scorer.input] == ["digits"]
    assert [value.name for value in scorer.output] == ["reconstruction", "score"]
    files = FOLDER / "digits_autoencoder.onnx", outcome.files[0]
    kept, trained = (onnx.load(path).graph for path in files)
    assert [node.op_type for node in kept.node] == [node.op_type for node in trained.node]
    assert [t.dims for t in kept.initializer] == [t.dims for t in trained.initializer]
