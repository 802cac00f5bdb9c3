"""Real builds with TensorRT for RTX: what is built, that it is the same each time, stopping it."""

from __future__ import annotations

import itertools
import math
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import onnx
import pytest

import smoothl1_deploy
from smoothl1_deploy import LossSpec, build_engine, export
from smoothl1_deploy.artefact import sha256
from smoothl1_deploy.errors import (
    BuildError,
    ModelWarning,
    OutputError,
    SpecError,
    UnsupportedError,
)
from smoothl1_deploy.graph.metadata import CHANGED
from smoothl1_deploy.tensorrt import builder, progress
from smoothl1_deploy.tensorrt.engine import read_engine
from smoothl1_deploy.tensorrt.gpu import current_gpu
from smoothl1_deploy.tensorrt.options import BuildOptions
from smoothl1_deploy.tensorrt.progress import BuildCancelledError, BuildProgress

DTYPES = ("float32", "float16", "bfloat16")
REDUCTIONS = ("none", "mean", "sum")
BUILT = [
    *itertools.product(("function", "inlined"), (0.5,), REDUCTIONS, DTYPES),
    *itertools.product(("function",), (0.0, math.inf), REDUCTIONS, DTYPES),
    # An export by the torch route takes a second: each dtype, reduction and beta once.
    ("torch", 0.0, "none", "float32"),
    ("torch", 0.5, "mean", "float16"),
    ("torch", math.inf, "sum", "bfloat16"),
]


@pytest.mark.parametrize(("route", "beta", "reduction", "dtype"), BUILT)
def test_builds(rtx, tmp_path, route, beta, reduction, dtype):
    spec = LossSpec(beta=beta, reduction=reduction, dtype=dtype)
    model = export(spec, route, ("N", 16))
    path = tmp_path / "loss.engine"
    engine = build_engine(model, path, rtx)
    assert read_engine(path) == engine
    assert engine.sha256 == sha256(path.read_bytes())
    sidecar = engine.sidecar
    assert (sidecar.spec, sidecar.graph_name) == (spec, model.graph.name)
    assert sidecar.onnx_sha256 == sha256(model.SerializeToString(deterministic=True))
    assert [str(p) for p in sidecar.inputs] == [f"{n}: {dtype}[N, 16]" for n in ("input", "target")]
    assert [str(p) for p in sidecar.outputs] == [
        f"loss: {dtype}[{'N, 16' if reduction == 'none' else ''}]"
    ]
    assert sidecar.flags == ("STRICT_NANS",)
    assert any("computes in float32" in note for note in sidecar.notes) == (reduction != "none")
    assert 0 < sidecar.build_seconds < 60


@pytest.mark.parametrize("shape", [(), (4,), (0,), ("N",), ("A", "B", 3)], ids=str)
def test_builds_other_shapes(rtx, shape):
    engine = build_engine(export(LossSpec(), shape=shape), flavour=rtx)
    assert set(engine.sidecar.profile.ranges) == (
        {"input", "target"} if any(isinstance(d, str) for d in shape) else set()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("extension", "inputs", "outputs"),
    [
        ({"per_sample": True}, ["input", "target"], ["loss"]),
        ({"gradient": True}, ["input", "target"], ["loss", "grad_input"]),
        ({"runtime_beta": True}, ["input", "target", "beta"], ["loss"]),
    ],
)
def test_builds_extensions(rtx, dtype, extension, inputs, outputs):
    spec = LossSpec(reduction="mean", dtype=dtype, **extension)
    sidecar = build_engine(export(spec, shape=("N", 16)), flavour=rtx).sidecar
    assert [port.name for port in sidecar.inputs] == inputs
    assert [port.name for port in sidecar.outputs] == outputs
    assert sidecar.spec == spec
    assert set(sidecar.profile.ranges) == {"input", "target"}


@pytest.mark.parametrize("route", ["function", "inlined"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_float64_is_refused(rtx, tmp_path, route, reduction):
    model = export(LossSpec(dtype="float64", reduction=reduction), route, ("N",))
    with pytest.raises(UnsupportedError, match="TensorRT has no float64 and would silently"):
        build_engine(model, tmp_path / "loss.engine", rtx)
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_model_has_no_spec(rtx):
    x, y = (onnx.helper.make_tensor_value_info(n, 1, ("N",)) for n in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Abs", ["x"], ["y"])], "abs", [x], [y])
    opset = [onnx.helper.make_opsetid("", 18)]
    sidecar = build_engine(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), flavour=rtx
    ).sidecar
    assert (sidecar.spec, sidecar.graph_name, sidecar.notes) == (None, "abs", ())


def test_every_way_to_give_the_model(rtx, mean_model, tmp_path):
    path = tmp_path / "loss.onnx"
    onnx.save(mean_model, path)
    given = [mean_model, mean_model.SerializeToString(), str(path), path]
    # Not the engine's bytes: TensorRT for RTX 1.7 builds two variants of this network by chance.
    assert len({build_engine(model, flavour=rtx).sidecar.key.digest for model in given}) == 1


def test_auto_finds_a_flavour(rtx, mean_model):
    assert build_engine(mean_model).sidecar.flavour in ("tensorrt", "tensorrt_rtx")
    assert smoothl1_deploy.build_engine is build_engine


# --- the same each time ----------------------------------------------------------------------


def test_the_same_engine_from_many_threads(rtx, mean_model):
    none = export(LossSpec(reduction="none"), shape=("N", 16))
    alone = [build_engine(m, flavour=rtx) for m in (mean_model, none)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(build_engine, m, flavour=rtx) for m in (mean_model, none) * 4]
    for job, wanted in zip(jobs, alone * 4, strict=True):
        engine = job.result()
        assert engine.sidecar.key == wanted.sidecar.key
        assert engine.sidecar.engine_bytes == wanted.sidecar.engine_bytes


def test_what_is_asked_for_changes_the_bytes(rtx, mean_model):
    engines = [
        build_engine(mean_model, flavour=rtx),
        build_engine(mean_model, flavour=rtx, profile={"input": (1, 2, 3)}),
        build_engine(mean_model, flavour=rtx, options=BuildOptions(["8.6"])),
        build_engine(mean_model, flavour=rtx, options=BuildOptions(["8.6", "12.0"])),
        build_engine(mean_model, flavour=rtx, options=BuildOptions(tf32=True)),
        build_engine(mean_model, flavour=rtx, options=BuildOptions(strip_plan=True)),
        build_engine(export(LossSpec(beta=0.25), shape=("N", 16)), flavour=rtx),
    ]
    assert len({engine.sha256 for engine in engines}) == len(engines)
    assert engines[5].sidecar.notes[-1].startswith("the weights were left out: refit")


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "missing/loss.engine"])
def test_a_bad_path_is_refused_before_the_build(rtx, mean_model, tmp_path, name, monkeypatch):
    monkeypatch.setattr(builder, "_build", lambda *args: pytest.fail("it was built"))
    with pytest.raises(OutputError, match=r"is a folder|lies in a folder that doesn't exist"):
        build_engine(mean_model, tmp_path / name, rtx)


def test_a_changed_model_is_built_as_it_is_and_the_sidecar_says_so(rtx, mean_model):
    model = export(LossSpec(), shape=("N",))
    model.graph.node[0].attribute[0].f = 0.75
    with pytest.warns(ModelWarning, match="was changed by something else after"):
        built = build_engine(model, flavour=rtx)
    assert CHANGED in built.sidecar.notes
    assert CHANGED not in build_engine(mean_model, flavour=rtx).sidecar.notes


def test_a_bad_profile_is_refused(rtx, mean_model):
    with pytest.raises(SpecError, match="0 <= min <= opt <= max"):
        build_engine(mean_model, flavour=rtx, profile={"input": (4, 2, 8)})


def test_options_of_another_type_are_refused(rtx, mean_model):
    with pytest.raises(SpecError, match="options must be BuildOptions, got dict"):
        build_engine(mean_model, flavour=rtx, options={"tf32": True})


@pytest.mark.skipif(current_gpu() is not None, reason="about a machine without a GPU")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuildOptions(refit=True), "refit needs a GPU to build"),
        (BuildOptions("current"), "'current' needs a GPU: name one, as in '8.6'"),
    ],
)
def test_what_needs_a_gpu_says_so_and_nothing_on_stderr(
    rtx, mean_model, tmp_path, options, message, capfd
):
    with pytest.raises(BuildError, match=message):
        build_engine(mean_model, tmp_path / "loss.engine", rtx, options=options)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


# --- watching and stopping -------------------------------------------------------------------


@pytest.fixture
def fast_tick(monkeypatch):
    monkeypatch.setattr(progress, "_TICK", 0.001)


def test_progress_tells_time_and_phase(rtx, mean_model, tmp_path, fast_tick):
    seen: list[BuildProgress] = []
    thread = []

    def on_progress(report):
        seen.append(report)
        thread.append(threading.current_thread())

    build_engine(mean_model, flavour=rtx, on_progress=on_progress)
    times = [report.elapsed for report in seen]
    assert len(times) > 3 and times == sorted(times)
    assert seen[-1].phase and seen[-1].expected is None
    assert set(thread) == {threading.current_thread()}


def test_cancel_before_the_build(rtx, mean_model, tmp_path):
    with pytest.raises(BuildCancelledError, match="cancelled before it began; nothing was written"):
        build_engine(mean_model, tmp_path / "loss.engine", rtx, cancel=lambda: True)
    assert list(tmp_path.iterdir()) == []


def test_cancel_during_the_build(rtx, mean_model, tmp_path, fast_tick):
    asked = []

    def cancel():
        asked.append(True)
        return len(asked) > 2

    with pytest.raises(BuildCancelledError, match=r"was cancelled after \d+\.\d s; nothing was wr"):
        build_engine(mean_model, tmp_path / "loss.engine", rtx, cancel=cancel)
    assert list(tmp_path.iterdir()) == []
    assert build_engine(mean_model, flavour=rtx).data


def test_the_monitor_stops_tensorrt_itself(rtx, mean_model):
    watch = progress.BuildWatch()
    parsed = builder.parse(mean_model, rtx)
    config = parsed.builder.create_builder_config()
    builder._add_profile(
        config, parsed, builder.resolve_profile(None, builder.input_shapes(mean_model))
    )
    config.progress_monitor = watch.monitor(rtx.trt)
    watch.stop()
    with rtx.capture() as log:
        assert parsed.builder.build_serialized_network(parsed.network, config) is None
    assert "canceled by user" in log.reason()


def test_ctrl_c_stops_the_build(rtx, mean_model, tmp_path, fast_tick):
    with pytest.raises(KeyboardInterrupt):
        build_engine(
            mean_model,
            tmp_path / "loss.engine",
            rtx,
            cache_dir=tmp_path,
            on_progress=lambda report: signal.raise_signal(signal.SIGINT),
        )
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert all(name.endswith(".lock") for name in left)
    # The lock was given back: the same key can be built.
    assert not build_engine(mean_model, flavour=rtx, cache_dir=tmp_path).cached


def test_an_error_of_the_hook_stops_the_build(rtx, mean_model, fast_tick):
    def on_progress(report):
        raise ZeroDivisionError("the spinner fell over")

    with pytest.raises(ZeroDivisionError, match="the spinner fell over"):
        build_engine(mean_model, flavour=rtx, on_progress=on_progress)
    names = [thread.name for thread in threading.enumerate()]
    assert "smoothl1-deploy build" not in names
