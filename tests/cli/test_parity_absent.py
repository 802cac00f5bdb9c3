"""`parity`: a backend that can't be used here is named with the reason, in the report too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest_cli import Done

import smoothl1_deploy.backends.base as base


def test_absent_backends_stand_in_the_report(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = base.missing
    monkeypatch.setattr(
        base, "missing", lambda name: real(name) if name == "onnx-reference" else f"no {name}"
    )
    done = cli(
        "parity", "--quick", "--beta", "0.5", "--reduction", "none", "--dtype", "float32",
        "--route", "function", "--no-extensions", "-o", "out", "--workers", "1",
    )  # fmt: skip
    assert done.code == 0, done.err
    notes = json.loads(Path("out/report.json").read_text())["notes"]
    for name in ("trt", "ort-cuda", "ort-tensorrt", "ort-tensorrt-rtx", "trt-network"):
        assert f"{name} not available: no {name}" in notes
        assert f"{name} not available: no {name}" in " ".join(done.err.split())
    # PyTorch is what they are compared with, on either device.
    assert not any(note.startswith(("torch not", "torch-cuda not")) for note in notes)
    assert "sampled: trt" not in done.out
    assert "trt not available: no trt" in Path("out/report.md").read_text()
