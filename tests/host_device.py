"""What runs on a GPU, run where there is none: a `Device` whose memory is the host's.

Streams are counted, not had. `HostCuda` is the backend `ort-cuda` on it; and so that the matrix
can run by our kernels for CUDA, PYTHONPATH=tests parity --backend host_device:KernelsOnHost.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smoothl1_deploy import ops
from smoothl1_deploy._device import Captured, Device
from smoothl1_deploy.backends._ort_gpu import OrtCudaBackend


class HostDevice(Device):
    kind = "cpu"
    capability = "8.9"

    def __init__(self) -> None:
        super().__init__(torch, 0)
        self._place = torch.device("cpu")
        self.launches: list[int] = []
        self._streams = itertools.count(1)

    @property
    def name(self) -> str:
        return "a host"

    def new_stream(self) -> Any:
        return SimpleNamespace(cuda_stream=next(self._streams))

    def launch(self, stream: Any, work: Callable[[int], Any]) -> Any:
        self.launches.append(stream.cuda_stream)
        return work(stream.cuda_stream)

    def capture(self, compute: Callable[[], Any]) -> Captured[Any]:
        compute()
        result = compute()

        def replay() -> None:
            for name, tensor in compute().items():
                result[name].copy_(tensor)

        return Captured(result, SimpleNamespace(replay=replay), compute)


def on_host_device(value: Any) -> bool:
    """In the place of `is_on_device`: a torch tensor is on the device, an array is not."""
    return isinstance(value, torch.Tensor)


def operators_on_host(folder: Path) -> Path:
    """The library of the operators for CUDA, its kernels compiled for the CPU, in `folder`."""
    if not (shutil.which("g++") and shutil.which("gcc")):
        pytest.skip("needs gcc and g++")
    tests = Path(__file__).parent
    sources = tests.parent / "smoothl1_deploy" / "ops" / "c"
    flags = "-O1 -Wall -Wextra -Werror -Wno-unknown-pragmas -ffp-contract=off -fPIC "
    flags += "-fvisibility=hidden -DPROVIDER=NULL -fsanitize=undefined -fno-sanitize-recover=all"
    common = [*flags.split(), f"-I{sources}"]
    for command in (
        ["gcc", "-std=gnu11", *common, "-c", sources / "operators.c", "-o", "ort.o"],
        ["g++", *common, "-std=c++17", f"-I{tests / 'ops' / 'host'}", "-x", "c++", "-c",
         sources / "smooth_l1.cu", "-o", "cuda.o"],
        ["g++", "-shared", "-fsanitize=undefined", "ort.o", "cuda.o",
         "-o", "libsmoothl1_deploy_cuda.so"],
    ):  # fmt: skip
        subprocess.run(command, check=True, cwd=folder)
    return folder / "libsmoothl1_deploy_cuda.so"


class HostCuda(OrtCudaBackend):
    """The CPU's provider in the place of CUDA's."""

    name = "ort-cuda on the host"
    provider = "CPUExecutionProvider"

    def __init__(self, device: Device | None = None) -> None:
        super().__init__(device or HostDevice())


class KernelsOnHost(HostCuda):
    """That, with our kernels for CUDA compiled for the CPU; it takes the process's operators."""

    def __init__(self) -> None:
        ops._LIBRARY = _compiled() / "libsmoothl1_deploy.so"
        super().__init__()


@functools.cache
def _compiled() -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return operators_on_host(folder).parent
