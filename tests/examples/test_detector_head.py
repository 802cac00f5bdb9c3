"""The example, run to its end."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from example import load_example


def test_both_exporters_give_pytorch_s_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = load_example("detector_head", monkeypatch).main(tmp_path)
    assert outcome.overlap > 0.3
    assert set(outcome.differences) == {"dynamo", "torchscript"}
    assert all(difference < 1e-4 for difference in outcome.differences.values())
    for path in outcome.files:
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        assert [value.name for value in model.graph.output] == ["boxes", "loss"]
        assert "Clip" in {node.op_type for node in model.graph.node}, "not this package's graph"
