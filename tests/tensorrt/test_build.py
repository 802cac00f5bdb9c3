"""Real builds with TensorRT for RTX: what is built, that it is the same each time, stopping it."""

from __future__ import annotations

import _thread
import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import onnx
import pytest

from smoothl1_deploy import LossSpec, build_engine, export
from smoothl1_deploy._artefact import sha256
from smoothl1_deploy.errors import (
    BuildError,
    ModelWarning,
    OutputError,
    SpecError,
    UnsupportedError,
)
from smoothl1_deploy.graph._metadata import CHANGED
from smoothl1_deploy.tensorrt import _build as build
from smoothl1_deploy.tensorrt._engine import read_engine
from smoothl1_deploy.tensorrt._flavour import current_gpu
from smoothl1_deploy.tensorrt._options import BuildOptions

DTYPES = ("float32", "float16", "bfloat16")


def check_build(rtx, path, spec, route="function"):
    model = export(spec, route, ("N", 16))
    engine = build_engine(model, path, rtx)
    assert read_engine(path) == engine
    assert engine.sha256 == sha256(path.read_bytes())
    sidecar = engine.sidecar
    assert (sidecar.spec, sidecar.graph_name) == (spec, model.graph.name)
    assert sidecar.onnx_sha256 == sha256(model.SerializeToString(deterministic=True))
    assert [p.name for p in sidecar.inputs] == [*spec.inputs]
    assert str(sidecar.inputs[1]) == f"target: {spec.dtype}[N, 16]"
    assert [p.name for p in sidecar.outputs] == [*spec.outputs]
    shape = "N, 16" if spec.reduction == "none" else "N" if spec.per_sample else ""
    assert str(sidecar.outputs[0]) == f"loss: {spec.dtype}[{shape}]"
    assert set(sidecar.profile.ranges) == {"input", "target"}
    assert sidecar.flags == ("STRICT_NANS",)
    narrowed = any("computes in float32" in note for note in sidecar.notes)
    assert narrowed == (spec.reduction != "none")
    assert 0 < sidecar.build_seconds < 60


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_beta_reduction_and_extension_builds(rtx, tmp_path, dtype):
    path = tmp_path / "loss.engine"
    for beta, reduction in itertools.product((0.0, 0.5, math.inf), ("none", "mean", "sum")):
        check_build(rtx, path, LossSpec(beta, reduction, dtype))
    check_build(rtx, path, LossSpec(0.5, "mean", dtype), "inlined")
    for extension in ("per_sample", "gradient", "runtime_beta"):
        check_build(rtx, path, LossSpec(dtype=dtype, **{extension: True}))


def test_the_torch_route_builds(rtx, tmp_path):
    check_build(rtx, tmp_path / "loss.engine", LossSpec(0.5, "mean", "float16"), "torch")


def test_other_ranks_build(rtx):
    for shape in ((), (4,), (0,), ("N",), ("A", "B", 3)):
        ranges = build_engine(export(LossSpec(), shape=shape), flavour=rtx).sidecar.profile.ranges
        dynamic = any(isinstance(dim, str) for dim in shape)
        assert set(ranges) == ({"input", "target"} if dynamic else set()), shape


def test_a_foreign_model_has_no_spec(rtx):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> abs (float[N] x) => (float[N] y) { y = Abs(x) }'
    )
    sidecar = build_engine(model, flavour=rtx).sidecar
    assert (sidecar.spec, sidecar.graph_name, sidecar.notes) == (None, "abs", ())


def test_every_way_to_give_the_model(rtx, built, mean_model, tmp_path):
    path = tmp_path / "loss.onnx"
    onnx.save(mean_model, path)
    # Not the engine's bytes: TensorRT for RTX 1.7 builds two variants of this network by chance.
    for model in (mean_model.SerializeToString(), str(path), path):
        assert build_engine(model, flavour=rtx).sidecar.key == built.sidecar.key
    assert build_engine(mean_model).sidecar.flavour in ("tensorrt", "tensorrt_rtx")


def test_the_same_engine_from_many_threads(rtx, mean_model):
    none = export(LossSpec(reduction="none"), shape=("N", 16))
    alone = [build_engine(m, flavour=rtx) for m in (mean_model, none)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(build_engine, m, flavour=rtx) for m in (mean_model, none) * 4]
    for job, wanted in zip(jobs, alone * 4, strict=True):
        engine = job.result()
        assert engine.sidecar.key == wanted.sidecar.key
        assert engine.sidecar.engine_bytes == wanted.sidecar.engine_bytes


def test_what_is_asked_for_changes_the_bytes(rtx, built, mean_model):
    engines = [
        built,
        build_engine(mean_model, flavour=rtx, profile={"input": (1, 2, 3)}),
        build_engine(mean_model, flavour=rtx, options=BuildOptions(["8.6"])),
        build_engine(mean_model, flavour=rtx, options=BuildOptions(["8.6", "12.0"])),
        build_engine(export(LossSpec(beta=0.25), shape=("N", 16)), flavour=rtx),
    ]
    assert len({engine.sha256 for engine in engines}) == len(engines)


# What is refused


def test_float64_is_refused_and_nothing_is_written(rtx, tmp_path):
    for route, reduction in itertools.product(("function", "inlined"), ("none", "mean")):
        model = export(LossSpec(dtype="float64", reduction=reduction), route, ("N",))
        with pytest.raises(UnsupportedError, match="TensorRT has no float64 and would silently"):
            build_engine(model, tmp_path / "loss.engine", rtx)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_path_is_refused_before_the_build(rtx, mean_model, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_build", lambda *args: pytest.fail("it was built"))
    (tmp_path / "file").touch()
    for name, problem in (("", "it is a folder"), ("file/l.engine", "Not a directory")):
        with pytest.raises(OutputError, match=problem):
            build_engine(mean_model, tmp_path / name, rtx)


def test_a_changed_model_is_built_as_it_is_and_the_sidecar_says_so(rtx, built):
    model = export(LossSpec(), shape=("N",))
    model.graph.node[0].attribute[0].f = 0.75
    with pytest.warns(ModelWarning, match="was changed by something else after"):
        changed = build_engine(model, flavour=rtx)
    assert CHANGED in changed.sidecar.notes
    assert CHANGED not in built.sidecar.notes


def test_a_bad_profile_or_option_is_refused(rtx, mean_model):
    with pytest.raises(SpecError, match="0 <= min <= opt <= max"):
        build_engine(mean_model, flavour=rtx, profile={"input": (4, 2, 8)})
    with pytest.raises(SpecError, match="options must be BuildOptions, got dict"):
        build_engine(mean_model, flavour=rtx, options={"compute_capabilities": []})


@pytest.mark.skipif(current_gpu() is not None, reason="about a machine without a GPU")
def test_what_needs_a_gpu_says_so_and_nothing_on_stderr(rtx, mean_model, tmp_path, capfd):
    with pytest.raises(BuildError, match="'current' needs a GPU: name one, as in '8.6'"):
        build_engine(mean_model, tmp_path / "e.engine", rtx, options=BuildOptions("current"))
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


# Watching and stopping


@pytest.fixture
def fast_tick(monkeypatch):
    monkeypatch.setattr(build, "_TICK", 0.001)


def test_progress_is_told_in_the_waiting_thread(rtx, mean_model, fast_tick):
    seen = []

    def on_progress(elapsed, phase):
        assert threading.current_thread() is threading.main_thread()
        seen.append(elapsed)

    build_engine(mean_model, flavour=rtx, on_progress=on_progress)
    assert seen and seen == sorted(seen)


def test_the_monitor_stops_tensorrt_itself_and_learns_the_phase(rtx, mean_model):
    watch = build.BuildWatch()
    parsed = build.parse(mean_model, rtx)
    config = parsed.builder.create_builder_config()
    profile = build.resolve_profile(None, build.input_shapes(mean_model))
    build._add_profile(config, parsed, profile)
    config.progress_monitor = watch.monitor(rtx.trt)
    watch.stopped = True
    with rtx.capture() as log:
        assert parsed.builder.build_serialized_network(parsed.network, config) is None
    assert "canceled by user" in log.reason()
    assert watch.phase


def test_ctrl_c_stops_the_build(rtx, mean_model, tmp_path, fast_tick):
    with pytest.raises(KeyboardInterrupt):
        build_engine(
            mean_model,
            tmp_path / "loss.engine",
            rtx,
            cache_dir=tmp_path,
            on_progress=lambda *report: _thread.interrupt_main(),
        )
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert all(name.endswith(".lock") for name in left)
    # The lock was given back: the same key can be built.
    assert not build_engine(mean_model, flavour=rtx, cache_dir=tmp_path).cached


def test_an_error_of_the_hook_stops_the_build(rtx, mean_model, fast_tick):
    def on_progress(elapsed, phase):
        raise ZeroDivisionError("the spinner fell over")

    with pytest.raises(ZeroDivisionError, match="the spinner fell over"):
        build_engine(mean_model, flavour=rtx, on_progress=on_progress)
    assert not build.is_building()
