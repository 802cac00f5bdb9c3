"""`doctor`: it tells what is there, what is not, and never fails itself."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable

import pytest
from conftest_cli import Done, spawn

import smoothl1_deploy.backends.base as base
from smoothl1_deploy.backends.base import BACKENDS
from smoothl1_deploy.tensorrt.flavour import FLAVOURS


def test_the_report(cli: Callable[..., Done]) -> None:
    done = cli("doctor", "--json")
    assert done.code == 0
    report = json.loads(done.out)
    assert [part["name"] for part in report["backends"]] == [*BACKENDS]
    assert [part["name"] for part in report["flavours"]] == [*FLAVOURS]
    assert report["packages"]["numpy"] == importlib.metadata.version("numpy")
    assert all(part["available"] == (part["reason"] is None) for part in report["backends"])
    text = cli("doctor").out
    for name in (*BACKENDS, *FLAVOURS, *report["packages"]):
        assert name in text


def test_what_is_missing_comes_with_its_install_command() -> None:
    blocked = "onnxruntime,torch,tensorrt,tensorrt_rtx"
    done = spawn("doctor", "--json", without=blocked)
    assert done.code == 0
    report = json.loads(done.out)
    reasons = {part["name"]: part["reason"] for part in report["backends"] + report["flavours"]}
    assert "pip install 'smoothl1-deploy[cpu]'" in reasons["ort-cpu"]
    assert "pip install torch==2.13.0" in reasons["torch"]
    assert "pip install 'smoothl1-deploy[gpu]'" in reasons["tensorrt"]
    assert "pip install 'smoothl1-deploy[rtx]'" in reasons["tensorrt_rtx"]
    assert reasons["onnx-reference"] is None
    text = spawn("doctor", without=blocked).out
    # On a line of its own: a table would cut it.
    assert any(line.endswith("pip install 'smoothl1-deploy[cpu]'") for line in text.splitlines())


def test_a_broken_package_is_reported_not_raised(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(base, "get_backend", broken)
    done = cli("doctor")
    assert done.code == 0
    assert "torch not available: importing it fails (OSError: libcudart.so.13: cann" in done.out


def test_two_builds_of_onnxruntime_in_each_others_way(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    import smoothl1_deploy.environment as environment

    facts = environment.environment()
    both = {**facts["packages"], "onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(environment, "environment", lambda: {**facts, "packages": both})
    assert "warning: onnxruntime and onnxruntime-gpu are both installed" in cli("doctor").out


def test_a_backend_that_is_slow_here(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(base.Backend):
        slow = "the CPU, interpreted"

        def load(self, model: object) -> base.Runner:
            raise NotImplementedError

    real = base.get_backend
    monkeypatch.setattr(
        base, "get_backend", lambda name: Slow() if name == "torch-triton" else real(name)
    )
    (warning,) = json.loads(cli("doctor", "--json").out)["warnings"]
    assert warning == (
        "torch-triton runs on the CPU, interpreted: its numbers are right, and it is slow"
    )
