"""`torch-cuda`: PyTorch's kernels by way of the artefact's spec, on memory of the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from agreement import pair
from host_device import HostDevice, on_host_device

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy.backends import _gpu as gpu
from smoothl1_deploy.backends._torch import TorchCudaBackend
from smoothl1_deploy.reference._module import eager_outputs


@pytest.fixture(autouse=True)
def tensors_of_the_host_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "is_on_device", on_host_device)


def test_it_is_pytorch_eager() -> None:
    device = HostDevice()
    for spec in (
        LossSpec(0.5, "none", "bfloat16"),
        LossSpec(0.5, "sum", gradient=True),
        LossSpec(0.0, "mean", "float64", per_sample=True, weight="weights"),
    ):
        runner = TorchCudaBackend(device).load(export(spec, shape=("N", 4)))
        arrays = pair(spec, (5, 4))
        given = dict(zip(("input", "target"), arrays, strict=True))
        if spec.weight:
            given["weight"] = np.full((5, 4), 0.5, arrays[0].dtype)
        on_host = runner.run(**given)
        on_device = runner.run(**{name: device.upload(array) for name, array in given.items()})
        expected = eager_outputs(spec, *given.values())
        assert {*on_host} == {*on_device} == {*expected}
        for name, array in expected.items():
            np.testing.assert_array_equal(on_host[name], array)
            np.testing.assert_array_equal(device.download(on_device[name]), array)


def test_a_negative_beta_at_run_time_gives_nan() -> None:
    runner = TorchCudaBackend(HostDevice()).load(
        export(LossSpec(reduction="none", runtime_beta=True), shape=("N", 4))
    )
    x = torch.ones(2, 4)
    assert runner.run(x, 0 * x, beta=-1.0)["loss"].isnan().all()
    assert runner.run(x, 0 * x, beta=0.5)["loss"].tolist() == [[0.75] * 4] * 2
