"""Engines on a device: every version's names, a fake behaviour, the memory of the host.

What this shows is that the runner does what the documentation of the API asks; what a GPU makes of
it is not shown.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from agreement import assert_right, pair
from handmade import model_of
from host_device import HostDevice, on_host_device

from smoothl1_deploy import LossSpec, attach, build_engine, export, load
from smoothl1_deploy.backends import _gpu as gpu
from smoothl1_deploy.backends._trt import TrtBackend
from smoothl1_deploy.backends._whole import ModelRunner
from smoothl1_deploy.errors import (
    ArtefactError,
    BackendUnavailableError,
    InvalidInputError,
    OutputError,
    SpecError,
    UnsupportedError,
)
from smoothl1_deploy.parity._cases import LAYOUTS
from smoothl1_deploy.tensorrt._engine import read_verified, write_engine
from smoothl1_deploy.tensorrt._flavour import current_gpu
from smoothl1_deploy.tensorrt._profile import input_shapes, wide_profile
from smoothl1_deploy.tensorrt._run import Program, _aligned, engine_layers

VERSIONS = ("10.0.1", "10.4.0", "10.9.0", "10.16.1", "11.4.0", "rtx-1.7.1")
SPEC = LossSpec(0.5, "none")


@pytest.fixture(autouse=True)
def tensors_of_the_host_are_on_the_device(monkeypatch):
    monkeypatch.setattr(gpu, "is_on_device", on_host_device)


@pytest.fixture
def running(fake):
    """A fake flavour with a fake GPU."""

    def make(version):
        flavour = fake(version)
        flavour.trt.gpu = True
        return flavour

    return make


@pytest.fixture
def backend(running, tmp_path):
    def make(version="11.4.0", **settings):
        device = HostDevice()
        return TrtBackend(running(version), cache_dir=tmp_path, device=device, **settings)

    return make


@pytest.fixture
def runner(backend):
    """Of `SPEC`."""
    return backend().load(export(SPEC, shape=("N", 4)))


@pytest.mark.parametrize("version", VERSIONS)
def test_an_engine_runs_by_the_names_of_every_version(backend, version):
    """Fails where a call has a name that the version lacks."""
    for spec in (
        SPEC,
        LossSpec(2.0),
        LossSpec(0.5, "sum", "float16"),
        LossSpec(1.0, "none", gradient=True),
    ):
        runner = backend(version).load(export(spec, shape=("N", 4)))
        for rows in (3, 7, 0, 3):
            a, b = pair(spec, (rows, 4))
            outputs = runner.run(a, b)
            assert isinstance(outputs["loss"], np.ndarray)
            assert_right(LossSpec(spec.beta, spec.reduction, spec.dtype), outputs["loss"], a, b)
            assert [*outputs] == [*spec.outputs]


def test_tensors_give_tensors_and_are_read_where_they_lie(runner, monkeypatch):
    a, b = pair(SPEC, (64, 4))
    x, t = runner.device.empty((64, 4), "float32"), runner.device.empty((64, 4), "float32")
    x[:], t[:] = torch.from_numpy(a), torch.from_numpy(b)
    seen = {}
    kind = type(runner.program.new_context()._context)
    put = kind.set_tensor_address
    monkeypatch.setattr(
        kind, "set_tensor_address", lambda self, *given: seen.update([given]) or put(self, *given)
    )
    loss = runner.run(x, t)["loss"]
    assert isinstance(loss, torch.Tensor) and seen["loss"] == loss.data_ptr()
    assert_right(SPEC, loss.numpy(), a, b)
    # Memory of the host is aligned to 64 bytes only; what happens to begin at 256 is not copied.
    for name, tensor in (("input", x), ("target", t)):
        assert (seen[name] == tensor.data_ptr()) == (tensor.data_ptr() % 256 == 0)


def test_a_view_that_begins_between_is_copied():
    block = torch.arange(512.0)
    start = (-block.data_ptr() % 256) // 4
    aligned, between = block[start : start + 8], block[start + 1 : start + 9]
    assert _aligned(aligned) is aligned
    assert _aligned(between).data_ptr() != between.data_ptr()
    assert torch.equal(_aligned(between), between)


def test_tensors_are_promoted_and_refused_as_arrays_are(backend):
    runner = backend().load(export(LossSpec(0.5), shape=("N", 4)))
    x = torch.ones(2, 4)
    whole = torch.zeros(2, 4, dtype=torch.int64)
    for _ in range(2):
        assert runner.run(x, whole)["loss"].item() == 0.75
    # What was right before is not checked again; these are not what was right.
    for given, message in (
        ((whole, whole), "input and target are both integral"),
        ((x, np.zeros((2, 4), np.float32)), "^target is not on the GPU, and another of the ar"),
        ((x, x.double()), "input float32 and target float64 promote to fl"),
        ((x, torch.zeros(3, 4)), r"target has the shape \(3, 4\), but the artefact"),
        ((x, None), "^target is missing; the artefact takes input, ta"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            runner.run(*given)
    with pytest.raises(InvalidInputError, match="the artefact takes input, target, and no beta; l"):
        runner.run(x, whole, beta=0.5)


def test_an_engine_takes_beta_at_run_time(backend):
    spec = LossSpec(reduction="none", runtime_beta=True)
    runner = backend().load(export(spec, shape=("N", 4)))
    a, b = pair(LossSpec(0.25, "none"), (5, 4))
    loss = runner.run(torch.from_numpy(a), torch.from_numpy(b), beta=0.25)["loss"]
    assert_right(LossSpec(0.25, "none"), loss.numpy(), a, b)


def test_shapes_outside_the_profile_are_refused_with_both_shapes(backend):
    runner = backend(profile={"input": (1, 2, 8)}).load(export(SPEC, shape=("N", 4)))
    with pytest.raises(InvalidInputError) as caught:
        runner.run(*pair(SPEC, (9, 4)))
    assert str(caught.value) == (
        "input has the shape (9, 4), and the engine was built for 1x4 to 8x4; "
        "build it with a profile that covers it, as in --profile input=MIN,OPT,MAX"
    )
    assert_right(SPEC, runner.run(*pair(SPEC, (8, 4)))["loss"], *pair(SPEC, (8, 4)))


def test_many_threads_share_few_contexts(backend):
    runner = backend(contexts=3).load(export(SPEC, shape=("N", 4)))

    def work(seed):
        a, b = pair(SPEC, (1 + seed % 5, 4))
        assert_right(SPEC, runner.run(a + 0, b)["loss"], a, b)

    with ThreadPoolExecutor(16) as pool:
        assert len([*pool.map(work, range(200))]) == 200
    made = runner.program._engine._contexts
    assert 1 <= len(made) <= 3
    assert all(context.active_optimization_profile == 0 for context in made)


def test_a_context_that_failed_is_not_used_again(runner):
    a, b = pair(SPEC, (2, 4))
    runner.run(a, b)
    fake = runner.program.flavour.trt
    fake.broken = True
    with pytest.raises(UnsupportedError, match="^tensorrt 11.4.0 failed to run: an illegal memory"):
        runner.run(a, b)
    fake.broken = False
    assert_right(SPEC, runner.run(a, b)["loss"], a, b)
    assert len(runner.program._engine._contexts) == 2


# --- CUDA graphs ------------------------------------------------------------------------------


def test_a_recorded_run_follows_its_tensors(runner):
    a, b = pair(SPEC, (4, 4))
    x, t = torch.from_numpy(a.copy()), torch.from_numpy(b)
    recorded = runner.capture(x, t)
    assert_right(SPEC, recorded.result["loss"].numpy(), a, b)
    x += 1
    assert_right(SPEC, recorded.replay()["loss"].numpy(), x.numpy(), b)
    # Its context is its own: the pool is as empty as before.
    assert runner.program._idle == []


def test_what_a_graph_could_not_follow_is_refused(runner, backend):
    x = torch.zeros(4, 4)
    for other in (x.T, x.half(), torch.zeros(4, 4, dtype=torch.int32)):
        with pytest.raises(InvalidInputError, match="^target would be copied, and the graph go on"):
            runner.capture(x, other)
    rtx = backend("rtx-1.7.1").load(export(SPEC, shape=("N", 4)))
    rtx.program.flavour.trt.never_capturable = True
    with pytest.raises(UnsupportedError, match="this engine can't be recorded in a CUDA graph"):
        rtx.capture(x, x)


# --- kernels compiled by tensorrt_rtx ---------------------------------------------------------


@pytest.fixture
def program(running, mean_model):
    """Runs an engine with a file for its kernels; what the fake compiled is `_content`."""

    def make(path, version="rtx-1.7.1"):
        flavour = running(version)
        engine = build_engine(mean_model, flavour=flavour)
        return Program(engine, flavour, HostDevice(), kernels=path)

    return make


def on(rows):
    return {name: torch.zeros(rows, 16) for name in ("input", "target")}


def test_compiled_kernels_are_kept_where_a_new_shape_is_met(program, tmp_path):
    path = tmp_path / "kernels" / "one.cache"
    made = program(path)
    cache = made._config._cache
    cache._content = b"kernels of 3x16"
    made.run(on(3))
    assert path.read_bytes() == b"kernels of 3x16"
    cache._content = b"kernels and more"
    made.run(on(3))
    assert path.read_bytes() == b"kernels of 3x16"
    made.run(on(4))
    assert path.read_bytes() == b"kernels and more"
    config = program(path)._config
    assert config._cache._content == b"kernels and more"
    assert config._strategy.name == "USER_MANAGED"


def test_kernels_that_do_not_fit_are_compiled_again_and_the_other_flavour_keeps_none(
    program, tmp_path
):
    path = tmp_path / "one.cache"
    path.write_bytes(b"of another GPU")
    program(path).run(on(3))
    assert path.read_bytes() == b"kernels"
    program(tmp_path / "x", "11.4.0").run(on(3))
    assert not (tmp_path / "x").exists()


def test_a_folder_that_kernels_cannot_be_kept_in_is_told(program, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't keep compiled kernels in .*; choose a folder"):
        program(tmp_path / "file" / "one.cache").run(on(3))


# --- what is refused --------------------------------------------------------------------------


def test_an_engine_that_does_not_run_is_refused_with_the_reason_of_tensorrt(
    fake, mean_model, tmp_path
):
    refusing = TrtBackend(fake("10.16.1"), cache_dir=tmp_path, device=HostDevice())
    with pytest.raises(BackendUnavailableError) as caught:
        refusing.load(mean_model)
    assert str(caught.value) == (
        f"tensorrt 10.16.1 can't run the engine of {mean_model.graph.name!r} here: CUDA "
        "initialization failure with error: 35. Build it again on this machine, or for its GPU's "
        "compute capability"
    )


def card(capability):
    device = HostDevice()
    device.capability = capability
    return device


def test_a_card_that_the_flavour_has_no_name_for_is_refused_before_a_build(fake, tmp_path):
    """It builds there and does not run, so doctor had better say it first (seen on an H200)."""
    for capability in ("7.0", "9.0", "10.0"):
        with pytest.raises(BackendUnavailableError) as caught:
            TrtBackend(fake("rtx-1.7.1"), cache_dir=tmp_path, device=card(capability))
        assert str(caught.value) == (
            "tensorrt_rtx 1.7.1 runs no engine on a host, which has compute capability "
            f"{capability}; it knows 7.5, 8.0, 8.6, 8.9, 12.0, 12.1. Hopper (9.0) runs engines of "
            "the flavour tensorrt, and the backends torch-triton and ort-cuda need no engine"
        )
    for capability in ("8.9", "12.0", "13.0"):
        TrtBackend(fake("rtx-1.7.1"), cache_dir=tmp_path, device=card(capability))
    TrtBackend(fake("10.16.1"), cache_dir=tmp_path, device=card("9.0"))


def test_no_contexts_and_float64_are_refused(backend, mean_model):
    with pytest.raises(SpecError, match="^contexts must be at least 1, got 0"):
        backend(contexts=0).load(mean_model)
    assert "TensorRT has no float64" in backend().refuses(LossSpec(dtype="float64"))
    assert backend().refuses(LossSpec(dtype="float16")) is None


# --- engine files -----------------------------------------------------------------------------


@pytest.fixture
def written(running, mean_model, tmp_path, monkeypatch):
    """An engine file, and a backend for which its flavour is installed."""
    flavour = running("11.4.0")
    engine = build_engine(mean_model, flavour=flavour)
    path = tmp_path / "loss.engine"
    write_engine(path, engine.data, engine.sidecar)
    from smoothl1_deploy.tensorrt import _flavour as module

    monkeypatch.setitem(module._usable, "tensorrt", flavour)
    return TrtBackend(flavour, cache_dir=tmp_path, device=HostDevice()), path


def test_an_engine_file_runs(written):
    backend, path = written
    runner = backend.load_engine(path)
    assert runner.spec == LossSpec(0.5)
    assert str(runner.signature.input) == "input: float32[N,16]"
    a, b = pair(LossSpec(0.5), (3, 16))
    assert_right(LossSpec(0.5), runner.run(a, b)["loss"], a, b)


def test_an_engine_that_is_no_loss_is_refused_before_it_is_deserialised(written, monkeypatch):
    backend, path = written
    engine = read_verified(path)
    ports = tuple(replace(port, dtype="int64") for port in engine.sidecar.inputs)
    write_engine(path, engine.data, replace(engine.sidecar, inputs=ports))
    monkeypatch.setattr(backend, "_program", lambda *_: pytest.fail("deserialised"))
    with pytest.raises(ArtefactError, match="'input' has the dtype int64; a loss artefact takes"):
        backend.load_engine(path)


def test_an_engine_of_a_whole_model_runs_by_its_own_names(running, tmp_path, monkeypatch):
    flavour = running("11.4.0")
    text = "g (float[N, 2, 3] images) => (float[N, 6] boxes) {boxes = Flatten(images)}"
    scored = attach(model_of(text), "boxes", "boxes_gt", LossSpec(0.5, per_sample=True))
    backend = TrtBackend(flavour, cache_dir=tmp_path, device=HostDevice())
    data = {"images": np.ones((4, 2, 3), "f4"), "boxes_gt": np.zeros((4, 6), "f4")}
    expected = load(scored, "onnx-reference").run(**data)
    engine = build_engine(scored, flavour=flavour)
    write_engine(tmp_path / "scored.engine", engine.data, engine.sidecar)
    from smoothl1_deploy.tensorrt import _flavour as module

    monkeypatch.setitem(module._usable, "tensorrt", flavour)
    for runner in (
        backend.load_engine(tmp_path / "scored.engine"),
        ModelRunner(scored, backend.open),
    ):
        found = runner.run(**data)
        assert [*found] == ["boxes", "loss"]
        assert all(np.array_equal(found[name], array) for name, array in expected.items())


# --- the engine inspector ---------------------------------------------------------------------


def test_the_layers_of_an_engine_are_those_of_its_inspector(running, mean_model, monkeypatch):
    for version in VERSIONS:
        flavour = running(version)
        engine = build_engine(mean_model, flavour=flavour)
        assert engine_layers(engine, flavour) == ["loss"]  # what the fake makes of its nodes
    for answer in ("Layer 0", '{"Layers": 3}'):
        inspector = flavour.trt.EngineInspector
        monkeypatch.setattr(inspector, "get_engine_information", lambda self, f, a=answer: a)
        with pytest.raises(UnsupportedError, match="gave what can't be read as layers"):
            engine_layers(engine, flavour)


# --- the real TensorRT for RTX, as far as it goes without a GPU -------------------------------


def test_the_default_profile_builds(rtx):
    for layout in ("matrix", "4-d", "broadcast-both"):
        axes = LAYOUTS[layout]
        other = axes.target_axes if axes.target_axes != axes.input_axes else None
        spec = LossSpec(0.5, gradient=True)
        model = export(spec, "function", axes.input_axes, target_shape=other)
        engine = build_engine(model, flavour=rtx, profile=wide_profile(input_shapes(model)))
        assert engine.sidecar.profile.defaults == ()


@pytest.mark.skipif(current_gpu() is not None, reason="about a machine without a GPU")
def test_the_real_runtime_says_why_it_can_not_run(rtx, mean_model, tmp_path):
    backend = TrtBackend(rtx, cache_dir=tmp_path, device=HostDevice())
    with pytest.raises(BackendUnavailableError) as caught:
        backend.load(mean_model)
    start = f"{rtx} can't run the engine of {mean_model.graph.name!r} here: "
    assert str(caught.value).startswith(start) and "CUDA driver version" in str(caught.value)
