"""A CUDA device through torch: found or not, and the order in which streams wait."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from host_device import HostDevice

from smoothl1_deploy._device import Device, find_device, is_on_device
from smoothl1_deploy.errors import (
    BackendUnavailableError,
    InvalidInputError,
    MissingDependencyError,
)


def test_what_is_on_a_device() -> None:
    assert not is_on_device(torch.zeros(2)) and not is_on_device(np.zeros(2))
    assert not is_on_device([1.0]) and not is_on_device(None)
    assert is_on_device(SimpleNamespace(__dlpack_device__=lambda: (2, 0)))


def test_no_torch_none_with_cuda_and_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        with pytest.raises(MissingDependencyError, match="^the trt backend needs the package 'tor"):
            find_device("the trt backend")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BackendUnavailableError) as caught:
        find_device("the trt backend")
    assert str(caught.value) == (
        f"the trt backend needs an NVIDIA GPU and a torch built for CUDA; torch "
        f"{torch.__version__} here is built without. On a machine with a GPU, install the CUDA "
        "build of torch"
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="built for CUDA 13.0, finds none. Run it on"):
        find_device("the trt backend")


def test_arrays_go_there_and_back() -> None:
    device = HostDevice()
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64):
        array = np.arange(6).reshape(2, 3).astype(dtype)
        tensor = device.upload(array)
        back = device.download(tensor)
        assert back.dtype == array.dtype and (back == array).all()
        tensor.zero_()
        assert array[1, 2] == 5  # a copy
    empty = device.download(device.upload(np.zeros((0, 4), ml_dtypes.bfloat16)))
    assert empty.shape == (0, 4)


def test_tensors_are_adopted_without_a_copy() -> None:
    device = HostDevice()
    x = torch.arange(6.0, requires_grad=True)
    assert device.adopt(x, "input").data_ptr() == x.data_ptr()
    array = np.arange(4.0)
    assert device.adopt(array, "input").data_ptr() == array.ctypes.data  # by __dlpack__
    assert device.adopt(torch.ones(2, 3).T, "input").is_contiguous()
    device._place = torch.device("cuda", 0)
    with pytest.raises(InvalidInputError, match="^input is on cpu, and the artefact was loaded on"):
        device.adopt(x, "input")


class Stream:
    """Notes who waits for whom."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log, self.cuda_stream = name, log, 42

    def wait_stream(self, other: Stream) -> None:
        self._log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def recorded() -> tuple[Device, list[str]]:
    """A device of a torch.cuda that notes what is asked of it."""
    log: list[str] = []
    current = Stream("caller", log)

    @contextlib.contextmanager
    def entered(what: str) -> Any:
        log.append(f"enter {what}")
        yield
        log.append(f"leave {what}")

    cuda = SimpleNamespace(
        current_stream=lambda place: current,
        Stream=lambda place: Stream("side", log),
        stream=lambda stream: entered(stream.name),
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: log.append("replay")),
        graph=lambda graph: entered("graph"),
    )
    return Device(SimpleNamespace(cuda=cuda, device=lambda *place: place), 0), log


def test_a_launch_waits_and_is_waited_for(recorded: tuple[Device, list[str]]) -> None:
    device, log = recorded
    own = device.new_stream()
    assert device.launch(own, lambda handle: log.append("work") or handle) == 42
    assert log == ["side waits for caller", "work", "caller waits for side"]
    log.clear()
    with pytest.raises(ZeroDivisionError):
        device.launch(own, lambda handle: handle / 0)
    assert log[-1] == "caller waits for side"  # what was launched before the error runs


def test_a_capture_is_warmed_up_first(recorded: tuple[Device, list[str]]) -> None:
    device, log = recorded
    captured = device.capture(lambda: log.append("compute") or "result")
    warm = ["side waits for caller", "enter side", "compute", "leave side", "caller waits for side"]
    assert log == [*warm, "enter graph", "compute", "leave graph"]
    assert captured.replay() == "result" and log[-1] == "replay"


def test_kernels_are_launched_on_this_device_whichever_is_current() -> None:
    chosen: list[int] = []

    @contextlib.contextmanager
    def device(index: int) -> Any:
        chosen.append(index)
        yield
        chosen.append(-1)

    cuda = SimpleNamespace(device=device, current_device=lambda: 0)
    fake = SimpleNamespace(device=lambda kind, index: (kind, index), cuda=cuda)
    with Device(fake, 3).selected():
        assert chosen == [3]
    assert chosen == [3, -1]
    with Device(fake, 0).selected():
        assert chosen == [3, -1]  # it is current


def test_what_is_taken_as_it_is() -> None:
    device, tensor = HostDevice(), torch.ones(4, 6)
    assert device.as_it_is(tensor) == ((4, 6), torch.float32)
    freed = torch.ones(4, 6)[1:]
    freed.untyped_storage().resize_(0)
    for other in (
        tensor.numpy(),
        tensor.t(),
        tensor.to_sparse(),
        tensor.clone().requires_grad_(),
        torch.nn.Parameter(tensor),
        torch._neg_view(tensor),
        tensor.to("meta"),
        freed,
    ):
        assert device.as_it_is(other) is None


def test_room_beside_a_tensor() -> None:
    tensor = torch.ones(4, 6, dtype=torch.bfloat16)
    for shape in ((4, 6), (4,), ()):
        room = HostDevice().empty_beside(tensor, shape)
        assert room.shape == shape and room.dtype == torch.bfloat16 and room.is_contiguous()
