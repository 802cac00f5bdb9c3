"""ONNX Runtime's GPU providers: real sessions and bindings on memory of the host.

The CPU's provider plays the GPU's. What a real onnxruntime-gpu says where there is no GPU was
tried by hand; what it does on one is not shown here.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from agreement import assert_right, pair
from handmade import model_of
from host_device import HostCuda, HostDevice

from smoothl1_deploy import LossSpec, export, ops
from smoothl1_deploy.backends import _ort_tensorrt as ort_tensorrt
from smoothl1_deploy.backends._ort_gpu import OrtCudaBackend, host_nodes, inlined
from smoothl1_deploy.backends._ort_tensorrt import OrtTensorrtBackend, OrtTensorrtRtxBackend
from smoothl1_deploy.backends._torch import TorchCudaBackend
from smoothl1_deploy.errors import BackendUnavailableError, OutputError, UnsupportedError
from smoothl1_deploy.serving._graph import serve

CPU = "CPUExecutionProvider"
SPEC = LossSpec(0.5, "none")


@pytest.fixture(autouse=True)
def _no_operators(monkeypatch: pytest.MonkeyPatch, tensors_are_on_the_device: None) -> None:
    # The operators for CUDA can't be registered here (tests/ops/test_cuda_source.py).
    monkeypatch.setattr(ops, "_LIBRARY", Path("none.so"))


class Absent(OrtCudaBackend):
    """As where CUDA's libraries are missing: the provider is known, and can't be made."""

    def _check_provider(self) -> None:
        pass


def test_arrays_and_tensors() -> None:
    half, double = LossSpec(0.5, "none", "bfloat16"), LossSpec(0.5, "mean", "float64")
    for spec in (SPEC, LossSpec(0.5), LossSpec(2.0, "sum", "float16"), half, double):
        for shape in (("N", 4), None):
            device = HostDevice()
            runner = HostCuda(device).load(export(spec, shape=shape))
            for rows in (5, 0):
                a, b = pair(spec, (rows, 4))
                loss = runner.run(a, b)["loss"]
                assert_right(spec, loss, a, b)
                tensors = runner.run(device.upload(a), device.upload(b))
                assert isinstance(tensors["loss"], torch.Tensor)
                np.testing.assert_array_equal(device.download(tensors["loss"]), loss)
            assert set(device.launches) == {1}  # all on the session's own stream


def test_nothing_is_computed_without_the_gpu() -> None:
    """CUDA's ReduceSum refuses an axis of length 0, where the sum is 0 and the mean NaN."""
    rows, half = LossSpec(0.5, per_sample=True), LossSpec(0.5, "sum", "bfloat16")
    every = LossSpec(runtime_beta=True, weight="weights", gradient=True)
    for spec in (LossSpec(0.5), half, rows, every):
        device = HostDevice()
        runner = HostCuda(device).load(export(spec, shape=("N", 4)))
        a, b = pair(spec, (0, 4))
        more: dict[str, Any] = {"beta": 1.0, "weight": device.upload(a)} if spec is every else {}
        found = runner.run(device.upload(a), device.upload(b), **more)
        if not more:
            assert_right(spec, device.download(found["loss"]), a, b)
        assert all(isinstance(each, torch.Tensor) for each in found.values())
        assert device.launches == []


@pytest.mark.parametrize("backend", [HostCuda, TorchCudaBackend])
def test_a_served_graph_gives_the_shapes_of_its_spec(backend: Any) -> None:
    device = HostDevice()
    half = LossSpec(dtype="bfloat16")
    for spec in (LossSpec(runtime_beta=True), LossSpec(per_sample=True), half):
        model = export(spec, shape=("N", 4))
        plain, served = (backend(device).load(m) for m in (model, serve(model).model))
        a, b = pair(spec, (6, 4))
        x, t = device.upload(a), device.upload(b)
        beta = 0.25 if spec.runtime_beta else None
        expected = plain.run(a, b, beta=beta)["loss"]
        on_host, on_device = (served.run(*each, beta=beta)["loss"] for each in ((a, b), (x, t)))
        for loss in (on_host, device.download(on_device)):
            assert loss.shape == expected.shape
            np.testing.assert_array_equal(loss, expected)
        if backend is TorchCudaBackend:
            assert served.capture(x, t, beta=beta).result["loss"].shape == expected.shape


def test_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}
    real = onnxruntime.IOBinding

    def noted(put: Any) -> Any:
        def bind(self: Any, name: str, *place: Any) -> None:
            seen[name] = place[-1]
            put(self, name, *place)

        return bind

    for method in ("bind_input", "bind_output"):
        monkeypatch.setattr(real, method, noted(getattr(real, method)))
    runner = HostCuda(HostDevice()).load(export(SPEC, shape=("N", 4)))
    x, t = torch.zeros(3, 4), torch.ones(3, 4)
    loss = runner.run(x, t)["loss"]
    assert seen == {"input": x.data_ptr(), "target": t.data_ptr(), "loss": loss.data_ptr()}


def test_recording_is_refused() -> None:
    runner = HostCuda(HostDevice()).load(export(SPEC, shape=("N", 4)))
    with pytest.raises(UnsupportedError, match="can't be recorded in a CUDA graph; use the backe"):
        runner.capture(torch.zeros(2, 4), torch.zeros(2, 4))


# Silent fall-backs, made loud


def test_an_onnxruntime_without_the_provider() -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    with pytest.raises(BackendUnavailableError) as caught:
        OrtCudaBackend(HostDevice())
    assert str(caught.value) == (
        "the ort-cuda backend needs an onnxruntime with the CUDAExecutionProvider; version "
        f"{onnxruntime.__version__} here has "
        f"{', '.join(onnxruntime.get_available_providers())}. Exchange it: pip uninstall "
        "onnxruntime, then pip install 'smoothl1-deploy[gpu]'"
    )


def test_a_provider_that_can_not_be_made_and_a_node_that_is_left_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = export(SPEC, shape=("N", 4))
    with pytest.raises(BackendUnavailableError) as caught:
        Absent(HostDevice()).load(model)
    start = f"ONNX Runtime {onnxruntime.__version__} could not make its CUDAExecutionProvider here"
    assert str(caught.value).startswith(f"{start} and would run on CPUExecutionProvider. It needs")
    # The provider is there and takes nothing: `get_providers` alone would not tell.
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(session, "get_providers", lambda self: ["CUDAExecutionProvider", CPU])
    text = r"didn't take the whole graph; ONNX Runtime gave \w+ \(Sub\) to CPUEx"
    with pytest.raises(UnsupportedError, match=f"^CUDAExecutionProvider.*{text}"):
        Absent(HostDevice()).load(model)


def test_what_the_cpu_may_have() -> None:
    for spec, operators in (
        (LossSpec(0.5, "none"), set()),
        (LossSpec(0.5), {"Size", "Cast"}),
        (LossSpec(0.5, per_sample=True), {"Shape", "Gather", "Max", "Size", "Div", "Cast"}),
        (LossSpec(weight="weights"), {"Shape", "Cast"}),  # the cast of a 0
    ):
        model = inlined(export(spec, shape=("N", 4)))
        free = host_nodes(model)
        taken = [node.op_type for node in model.graph.node if node.name in free]
        # The rest prepares a beta that is a constant.
        assert set(taken) - {"Constant", "Equal", "Greater", "Where", "Neg"} == operators
        assert taken.count("Cast") <= 1  # the cast of the count, not those of data


def test_nodes_without_names_get_some() -> None:
    model = inlined(model_of("g (float[N] a) => (float[N] c) { b = Abs(a) c = Abs(b) }"))
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == 2 and "" not in names
    assert host_nodes(model) == frozenset()


# The caches of the TensorRT providers


class Tensorrt(OrtTensorrtBackend):
    provider = CPU


def settings(backend: Any, model: onnx.ModelProto) -> dict[str, str]:
    found: dict[str, str] = backend._settings(backend._graph(model))
    return found


def test_no_two_engines_share_a_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Tensorrt(HostDevice(), cache_dir=tmp_path)
    models = [
        export(LossSpec(beta, reduction), route, shape)
        for beta in (0.5, 0.1)
        for reduction in ("none", "mean")
        for route in ("function", "inlined")
        for shape in (("N", 4), ("N", 8))
    ]
    for model in models:
        model.graph.name = "main_graph"  # what torch calls every graph
        del model.metadata_props[:]
    found = [settings(backend, model) for model in models]
    assert settings(backend, models[0]) == found[0]
    monkeypatch.setattr(onnxruntime, "__version__", "1.99.0")
    found.append(settings(backend, models[0]))
    assert len({each["trt_engine_cache_path"] for each in found}) == len(models) + 1
    assert len({each["trt_engine_cache_prefix"] for each in found[:-1]}) == len(models)
    assert found[0]["trt_profile_min_shapes"] == "input:0x4,target:0x4"
    assert found[0]["trt_profile_max_shapes"] == "input:16777216x4,target:16777216x4"


def test_a_cache_that_can_t_be_written_is_said(tmp_path: Any) -> None:
    (tmp_path / "file").write_text("in the way")
    backend = Tensorrt(HostDevice(), cache_dir=tmp_path / "file")
    with pytest.raises(OutputError, match=r"can't make the folder .*another with cache_dir="):
        backend.load(export(SPEC, shape=("N", 4)))


def test_float64_is_refused(tmp_path: Any) -> None:
    backend = Tensorrt(HostDevice(), cache_dir=tmp_path)
    assert "TensorRT has no float64" in str(backend.refuses(LossSpec(dtype="float64")))
    runner = backend.load(export(LossSpec(0.5), shape=("N", 4)))
    a, b = pair(LossSpec(0.5), (3, 4))
    assert_right(LossSpec(0.5), runner.run(a, b)["loss"], a, b)


# The plugin provider


RTX = "NvTensorRTRTXExecutionProvider"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """onnxruntime with a plugin provider that is the CPU's; `plugin` holds what was asked of it."""
    import sys

    asked = SimpleNamespace(libraries=[], devices=[], settings=[], fails=None)

    class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
        def add_provider_for_devices(self, devices: Any, settings: dict[str, str]) -> None:
            asked.devices.append(devices)
            asked.settings.append(settings)

    class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
        def get_providers(self) -> list[str]:
            return [RTX, CPU]

        def get_provider_graph_assignment_info(self) -> list[Any]:
            parts = super().get_provider_graph_assignment_info()
            return [SimpleNamespace(ep_name=RTX, get_nodes=part.get_nodes) for part in parts]

    def register(name: str, library: str) -> None:
        if asked.fails:
            raise RuntimeError(asked.fails)
        asked.libraries.append((name, library))

    module = ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    module.__version__ = "0.5.0"  # type: ignore[attr-defined]
    module.get_library_path = lambda: "libplugin.so"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", register)
    asked.here = [SimpleNamespace(ep_name=CPU), SimpleNamespace(ep_name=RTX)]
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: asked.here)
    monkeypatch.setattr(ort_tensorrt, "_registered", set())
    return asked


def test_the_plugin_is_registered_once_and_chosen_by_device(
    plugin: SimpleNamespace, tmp_path: Any
) -> None:
    for _ in range(2):
        runner = OrtTensorrtRtxBackend(HostDevice(), cache_dir=tmp_path).load(
            export(SPEC, shape=("N", 4))
        )
    a, b = pair(SPEC, (3, 4))
    assert_right(SPEC, runner.run(a, b)["loss"], a, b)
    assert plugin.libraries == [(RTX, "libplugin.so")]
    assert plugin.devices[0] == plugin.here[1:]
    given = plugin.settings[0]
    assert given["user_compute_stream"] == "1" and given["has_user_compute_stream"] == "1"
    assert given["nv_profile_opt_shapes"] == "input:64x4,target:64x4"
    assert given["nv_runtime_cache_path"].startswith(str(tmp_path / "ort-tensorrt-rtx"))


def test_a_plugin_that_can_not_be_loaded(plugin: SimpleNamespace) -> None:
    plugin.fails = "libcuda.so.1: cannot open shared object file"
    with pytest.raises(BackendUnavailableError) as caught:
        OrtTensorrtRtxBackend(HostDevice())
    assert str(caught.value) == (
        "the ort-tensorrt-rtx backend's plugin onnxruntime_ep_nv_tensorrt_rtx 0.5.0 can't be "
        "loaded here (libcuda.so.1: cannot open shared object file): it needs a GPU and its driver"
    )


def test_a_gpu_the_plugin_does_not_know(plugin: SimpleNamespace, tmp_path: Any) -> None:
    plugin.here = plugin.here[:1]
    backend = OrtTensorrtRtxBackend(HostDevice(), cache_dir=tmp_path)
    with pytest.raises(BackendUnavailableError, match="0.5.0 finds no GPU that it supports; it ru"):
        backend.load(export(SPEC, shape=("N", 4)))
