"""`torch-cuda`: PyTorch's kernels by way of the artefact's spec, on memory of the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from agreement import pair
from host_device import HostDevice, on_host_device

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy.backends import base, gpu
from smoothl1_deploy.backends.torch_cuda import TorchCudaBackend
from smoothl1_deploy.errors import ArtefactError
from smoothl1_deploy.reference.module import eager_outputs


@pytest.fixture(autouse=True)
def tensors_of_the_host_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "is_on_device", on_host_device)


@pytest.mark.parametrize(
    "spec",
    [
        LossSpec(0.5, "none", "bfloat16"),
        LossSpec(0.5, "sum", gradient=True),
        LossSpec(0.0, "mean", "float64", per_sample=True, weight="weights"),
    ],
    ids=lambda spec: spec.name,
)
def test_it_is_pytorch_eager(spec: LossSpec) -> None:
    device = HostDevice()
    runner = TorchCudaBackend(device).load(export(spec, shape=("N", 4)))
    a, b = pair(spec, (5, 4))
    weight = np.full((5, 4), 0.5, a.dtype) if spec.weight else None
    expected = eager_outputs(spec, a, b, weight)
    got = runner.run(a, b, weight=weight)
    assert {*got} == {*expected}
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array)
    tensors = runner.run(device.upload(a), device.upload(b),
                         weight=None if weight is None else device.upload(weight))  # fmt: skip
    for name, array in expected.items():
        np.testing.assert_array_equal(device.download(tensors[name]), array)


def test_a_negative_beta_at_run_time_gives_nan() -> None:
    runner = TorchCudaBackend(HostDevice()).load(
        export(LossSpec(reduction="none", runtime_beta=True), shape=("N", 4))
    )
    x = torch.ones(2, 4)
    assert runner.run(x, 0 * x, beta=-1.0)["loss"].isnan().all()
    assert runner.run(x, 0 * x, beta=0.5)["loss"].tolist() == [[0.75] * 4] * 2


def test_a_model_without_a_spec() -> None:
    model = export(LossSpec(), shape=("N", 4))
    del model.metadata_props[:]
    with pytest.raises(ArtefactError, match="carries none; use a backend that runs the graph, suc"):
        TorchCudaBackend(HostDevice()).load(model)


def test_engines_are_for_trt_alone(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from smoothl1_deploy.errors import UnsupportedError

    with pytest.raises(UnsupportedError) as caught:
        base.load(tmp_path / "loss.engine", "ort-cpu")
    assert str(caught.value) == (
        f"{tmp_path / 'loss.engine'} is a TensorRT engine, and the backend ort-cpu runs ONNX "
        "models; use backend='trt', or give the model it was built from"
    )
