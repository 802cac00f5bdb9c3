"""A `Device` whose memory is the host's: what runs on a GPU, run where there is none.

It stands in for the CUDA device alone; streams are counted, not had.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from smoothl1_deploy._device import Captured, Device


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
