"""Which TensorRT and which GPU are there, what they lack, and what TensorRT says."""

from __future__ import annotations

import sys
import threading
import types

import pytest

from smoothl1_deploy.errors import (
    BackendUnavailableError,
    MissingDependencyError,
    SpecError,
    UnsupportedError,
)
from smoothl1_deploy.tensorrt import _flavour as module
from smoothl1_deploy.tensorrt._flavour import Gpu, current_gpu, get_flavour, tidy


@pytest.fixture
def installed(monkeypatch):
    """Decide what `import` finds: `installed(tensorrt=..., tensorrt_rtx=...)`, None for nothing."""

    def arrange(**modules):
        monkeypatch.setattr(module, "_usable", {})
        for name in ("tensorrt", "tensorrt_rtx"):
            monkeypatch.setitem(sys.modules, name, modules.get(name))

    return arrange


def test_unknown_name_lists_the_flavours():
    with pytest.raises(SpecError, match=r"'trt'; choose one of auto, tensorrt, tensorrt_rtx"):
        get_flavour("trt")


def test_auto_prefers_tensorrt(installed, fake_trt):
    full, rtx = fake_trt.FakeTensorRT("10.16.1"), fake_trt.FakeTensorRT("rtx-1.7.1")
    installed(tensorrt=full, tensorrt_rtx=rtx)
    assert str(get_flavour()) == "tensorrt 10.16.1"


def test_auto_takes_rtx_where_tensorrt_has_no_gpu(installed, fake_trt):
    full, rtx = fake_trt.FakeTensorRT("10.16.1"), fake_trt.FakeTensorRT("rtx-1.7.1")

    def no_gpu(logger):
        fake_trt.say(logger, "ERROR", "createInferBuilder: CUDA initialization failure")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    full.Builder = no_gpu
    installed(tensorrt=full, tensorrt_rtx=rtx)
    assert get_flavour("auto").name == "tensorrt_rtx"
    with pytest.raises(BackendUnavailableError) as caught:
        get_flavour("tensorrt")
    text = str(caught.value)
    assert "tensorrt 10.16.1 is installed but can't be used here" in text
    assert "CUDA initialization failure; pybind11" in text
    assert "needs a GPU and its driver even to build; tensorrt_rtx builds without" in text
    assert caught.value.exit_code == 3


def test_what_is_missing_names_its_extra(installed):
    installed()
    for name, said in (("tensorrt", r"\[gpu\]"), ("tensorrt_rtx", r"\[rtx\]")):
        with pytest.raises(MissingDependencyError, match=f"pip install 'smoothl1-deploy{said}'"):
            get_flavour(name)
    with pytest.raises(MissingDependencyError, match=r"\[gpu\].*\[rtx\]"):
        get_flavour()


def test_a_folder_called_tensorrt_is_not_tensorrt(installed):
    # tests/tensorrt on sys.path imports as an empty namespace package.
    installed(tensorrt=types.ModuleType("tensorrt"))
    with pytest.raises(MissingDependencyError, match="is not TensorRT"):
        get_flavour("tensorrt")


def test_flags_are_looked_up_by_name(fake):
    assert int(fake("10.16.1").member("BuilderFlag", "STRICT_NANS")) == 24
    assert int(fake("11.4.0").member("BuilderFlag", "STRICT_NANS")) == 23
    old = fake("10.4.0")
    assert old.member("BuilderFlag", "STRICT_NANS") is None
    assert old.member("NoSuchEnum", "X") is None
    with pytest.raises(
        UnsupportedError,
        match=r"strict_nans is not supported by tensorrt 10\.4\.0: it has no BuilderFlag\.STRICT_N",
    ):
        old.need("BuilderFlag", "STRICT_NANS", "strict_nans")


# What TensorRT says


def test_one_logger_a_flavour(rtx):
    assert get_flavour("tensorrt_rtx").logger is rtx.logger


def test_captures_keep_threads_apart(fake, fake_trt):
    flavour, barrier, wrong = fake("11.4.0"), threading.Barrier(8), []

    def work(number):
        with flavour.capture() as log:
            barrier.wait()
            for i in range(50):
                fake_trt.say(flavour.logger, "ERROR", f"{number}:{i}")
        if log.errors != [f"{number}:{i}" for i in range(50)]:
            wrong.append((number, log.errors))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_worker_thread_of_tensorrt_reaches_the_capture(fake, fake_trt):
    flavour, other = fake("11.4.0"), fake("10.16.1")
    with flavour.capture() as log, other.capture() as elsewhere:
        for severity in ("INTERNAL_ERROR", "WARNING"):
            said = flavour.logger, severity, f"{severity} from below"
            worker = threading.Thread(target=fake_trt.say, args=said)
            worker.start()
            worker.join()
    fake_trt.say(flavour.logger, "ERROR", "after the end")
    assert log.errors == ["INTERNAL_ERROR from below"]
    assert elsewhere.reason() == "TensorRT logged no reason"


def test_tidy_drops_the_remark_on_the_missing_driver():
    remark = (
        "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at "
        "/_src/x.cpp:250 (cudaError 35: CUDA driver version is insufficient for CUDA runtime "
        "version))"
    )
    assert tidy(f"the true\n cause {remark}") == "the true cause"


# The GPU


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put a program of that name on PATH."""

    def install(script, visible):
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\n" + script)
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        current_gpu.cache_clear()

    yield install
    current_gpu.cache_clear()


def test_the_gpu_is_read_from_nvidia_smi(nvidia_smi):
    answer = '[ "$3" = --id=2 ] && echo "NVIDIA H100 PCIe, 9.0, 580.65.06"'
    nvidia_smi(answer, "2,3")
    assert current_gpu() == Gpu("NVIDIA H100 PCIe", "9.0", "580.65.06")
    for script, visible in (
        ("exit 9", "0"),
        ("echo", "0"),
        ("echo no devices were found", "0"),
        ("exec sleep 0", "0"),
        (answer.replace("2", "-1"), "-1"),  # hidden
    ):
        nvidia_smi(script, visible)
        assert current_gpu() is None, script
