"""Which TensorRT is there, what it lacks, and what it says."""

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
from smoothl1_deploy.tensorrt import flavour as module
from smoothl1_deploy.tensorrt.flavour import available_flavours, get_flavour, missing
from smoothl1_deploy.tensorrt.logger import _record, capture_log, tidy


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
    assert [str(f) for f in available_flavours()] == ["tensorrt 10.16.1", "tensorrt_rtx 1.7.1"]


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
    assert "CUDA initialization failure" in text
    assert "needs a GPU and its driver even to build; flavour='tensorrt_rtx' builds without" in text
    assert caught.value.exit_code == 3
    assert [f.name for f in available_flavours()] == ["tensorrt_rtx"]
    assert "CUDA initialization failure" in missing("tensorrt")
    assert missing("tensorrt_rtx") is None


@pytest.mark.parametrize(("name", "extra"), [("tensorrt", "gpu"), ("tensorrt_rtx", "rtx")])
def test_missing_names_the_extra(installed, name, extra):
    installed()
    with pytest.raises(MissingDependencyError, match=rf"pip install 'smoothl1-deploy\[{extra}\]'"):
        get_flavour(name)


def test_missing_both_names_both_extras(installed):
    installed()
    with pytest.raises(MissingDependencyError, match=r"\[gpu\].*\[rtx\]"):
        get_flavour()
    assert available_flavours() == ()


def test_a_folder_called_tensorrt_is_not_tensorrt(installed):
    # tests/tensorrt on sys.path imports as an empty namespace package.
    installed(tensorrt=types.ModuleType("tensorrt"))
    with pytest.raises(MissingDependencyError, match="is not TensorRT"):
        get_flavour("tensorrt")


def test_a_missing_flag_is_reported_not_raised(fake):
    old = fake("10.4.0")
    assert old.member("BuilderFlag", "STRICT_NANS") is None
    assert old.member("NoSuchEnum", "X") is None
    with pytest.raises(
        UnsupportedError,
        match=r"strict_nans is not supported by tensorrt 10\.4\.0: it has no BuilderFlag\.STRICT_N",
    ):
        old.need("BuilderFlag", "STRICT_NANS", "strict_nans")


def test_flags_have_the_numbers_of_their_version(fake):
    assert int(fake("10.16.1").member("BuilderFlag", "STRICT_NANS")) == 24
    assert int(fake("11.4.0").member("BuilderFlag", "STRICT_NANS")) == 23


def test_one_logger_a_flavour(rtx):
    assert rtx.logger is rtx.logger
    assert get_flavour("tensorrt_rtx").logger is rtx.logger


def test_captures_keep_threads_apart():
    barrier = threading.Barrier(8)
    wrong = []

    def work(number):
        with capture_log("some flavour") as log:
            barrier.wait()
            for i in range(50):
                _record("some flavour", "ERROR", f"{number}:{i}")
        if log.errors != [f"{number}:{i}" for i in range(50)]:
            wrong.append((number, log.errors))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_worker_thread_of_tensorrt_reaches_the_capture():
    with capture_log("some flavour") as log, capture_log("another") as other:
        worker = threading.Thread(target=_record, args=("some flavour", "WARNING", "from below"))
        worker.start()
        worker.join()
    assert (log.warnings, log.errors, other.messages) == (["from below"], [], [])
    assert log.reason() == "TensorRT logged no reason"
    _record("some flavour", "ERROR", "after the end")
    assert log.errors == []


def test_tidy_drops_the_remark_on_the_missing_driver():
    remark = (
        "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at "
        "/_src/x.cpp:250 (cudaError 35: CUDA driver version is insufficient for CUDA runtime "
        "version))"
    )
    assert tidy(f"the true\n cause {remark}") == "the true cause"
