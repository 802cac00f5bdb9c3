"""`torch` and `torch-cuda`: PyTorch by way of the artefact's spec, on memory of the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from agreement import pair
from handmade import model_of
from host_device import HostDevice

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy.backends._base import get_backend, load
from smoothl1_deploy.backends._torch import TorchCudaBackend
from smoothl1_deploy.errors import ArtefactError
from smoothl1_deploy.reference._module import eager, eager_outputs
from smoothl1_deploy.reference._oracle import oracle


@pytest.mark.parametrize(("name", "other"), [("torch", "ort-cpu"), ("torch-cuda", "ort-cuda")])
def test_torch_refuses_a_model_without_a_spec(name: str, other: str) -> None:
    backend = get_backend("torch") if name == "torch" else TorchCudaBackend(HostDevice())
    with pytest.raises(ArtefactError) as caught:
        backend.load(model_of("g (float[N] a, float[N] b) => (float[N] c) { c = Sub(a, b) }"))
    assert str(caught.value) == (
        f"the {name} backend computes what an artefact's spec says, and this model carries none; "
        f"use a backend that runs the graph, such as {other}"
    )


def test_torch_rounds_where_pytorch_does_and_not_where_the_oracle_does() -> None:
    spec = LossSpec(1000.0, "none", "float16")
    a = np.array([500.0], np.float16)
    got = load(export(spec), "torch").run(a, 0 * a)["loss"]
    assert got.tobytes() == eager(spec, a, 0 * a).tobytes() != oracle(spec, a, 0 * a).tobytes()


@pytest.mark.usefixtures("tensors_are_on_the_device")
def test_torch_cuda_is_pytorch_eager_on_arrays_and_tensors() -> None:
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
        expected = eager_outputs(spec, **given)
        assert {*on_host} == {*on_device} == {*expected}
        for name, array in expected.items():
            np.testing.assert_array_equal(on_host[name], array)
            np.testing.assert_array_equal(device.download(on_device[name]), array)


@pytest.mark.usefixtures("tensors_are_on_the_device")
def test_a_negative_beta_at_run_time_gives_nan() -> None:
    runner = TorchCudaBackend(HostDevice()).load(
        export(LossSpec(reduction="none", runtime_beta=True), shape=("N", 4))
    )
    x = torch.ones(2, 4)
    assert runner.run(x, 0 * x, beta=-1.0)["loss"].isnan().all()
    assert runner.run(x, 0 * x, beta=0.5)["loss"].tolist() == [[0.75] * 4] * 2
