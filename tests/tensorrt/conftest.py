"""Fixtures: the real TensorRT for RTX where it is installed, fakes of the other versions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from script import module_at

from smoothl1_deploy import LossSpec, build_engine, export
from smoothl1_deploy.tensorrt._engine import Engine
from smoothl1_deploy.tensorrt._flavour import Flavour, get_flavour


@pytest.fixture(scope="session")
def fake_trt() -> Any:
    """The module fake_trt; under --import-mode=importlib test modules can't import one another."""
    return module_at(Path(__file__).with_name("fake_trt.py"))


@pytest.fixture(scope="session")
def fake(fake_trt: Any) -> Callable[[str], Flavour]:
    """`fake("10.16.1")`: a flavour whose module is a fake of that version."""

    def make(version: str) -> Flavour:
        name = "tensorrt_rtx" if version.startswith("rtx") else "tensorrt"
        module = fake_trt.FakeTensorRT(version)
        return Flavour(name, module.__version__, module)

    return make


@pytest.fixture(scope="session")
def rtx() -> Flavour:
    """TensorRT for RTX, or a skip."""
    pytest.importorskip(
        "tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'smoothl1-deploy[rtx]'"
    )
    return get_flavour("tensorrt_rtx")


@pytest.fixture(scope="session")
def mean_model() -> onnx.ModelProto:
    """The mean of float32 with a dynamic first axis."""
    return export(LossSpec(beta=0.5, reduction="mean"), shape=("N", 16))


@pytest.fixture(scope="session")
def built(rtx: Flavour, mean_model: onnx.ModelProto) -> Engine:
    """An engine of `mean_model`."""
    return build_engine(mean_model, flavour=rtx)
