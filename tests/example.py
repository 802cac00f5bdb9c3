"""The scripts in examples/, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


def load_example(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of `examples/<name>.py`; on one thread, which suffices and shares the machine."""
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, example)  # dataclasses looks its module up
    torch.set_num_threads(1)
    spec.loader.exec_module(example)
    return example
