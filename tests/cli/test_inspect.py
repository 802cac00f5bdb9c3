"""`inspect`: what a file holds, what speaks against it, and that engines are not executed."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest_cli import Cli, Shown, assert_refused, model
from handmade import model_of

from fuzzing.damage import carrying
from smoothl1_deploy.backends._names import BACKENDS
from smoothl1_deploy.cli._inspect import inspect


def _json(cli: Cli, path: str) -> dict[str, Any]:
    done = cli("inspect", path, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)  # type: ignore[no-any-return]


@pytest.fixture
def engine(cli: Cli) -> Path:
    """An engine for compute capability 8.6, of the model beside it."""
    pytest.importorskip("tensorrt_rtx")
    words = ("build", model(), "--flavour", "tensorrt_rtx", "--compute-capability", "8.6")
    assert cli(*words).code == 0
    return Path("loss.engine")


def test_an_artefact(cli: Cli) -> None:
    path = model(beta=0.5, dtype="float16")
    found = _json(cli, path)
    assert found["kind"] == "onnx"
    assert found["spec"] == {"beta": 0.5, "reduction": "mean", "dtype": "float16"}
    assert found["route"] == "function"
    assert found["sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert found["inputs"][0] == {"name": "input", "dtype": "float16", "shape": ["N", 16]}
    assert found["opsets"] == {"ai.onnx": 18, "smoothl1_deploy": 2}
    assert found["operators"]["graph"] == {"SmoothL1LossMeanFloat16": 1}
    assert found["problems"] == []
    assert set(BACKENDS) <= set(found["runs"])
    assert found["runs"]["ort-cpu"] is None
    text = cli("inspect", path).out
    assert "beta=0.5, reduction=mean, dtype=float16" in text
    assert "input: float16[N, 16], target: float16[N, 16]" in text
    assert re.search("^torch, onnx-reference, ort-cpu,.*: can run it here$", text, re.MULTILINE)
    assert text.startswith(
        "loss.onnx is a Smooth L1 loss (mean, beta 0.5, float16), by the route function; computed "
        "in one pass where our operators are registered\n"
    )


def test_the_layers_of_the_network_tensorrt_makes_of_it(cli: Cli) -> None:
    pytest.importorskip("tensorrt_rtx")
    found = _json(cli, model(reduction="none"))
    assert found["runs"]["build with tensorrt_rtx"] is None
    assert found["operators"]["tensorrt_rtx network"]["ELEMENTWISE"] > 3
    found = _json(cli, model("f64.onnx", dtype="float64"))
    assert "is float64" in found["runs"]["build with tensorrt_rtx"]
    assert "tensorrt_rtx network" not in found["operators"]


def test_the_certificate_beside_it(cli: Cli) -> None:
    path = model()
    absent = "absent: no certificate; smoothl1-deploy verify --certificate writes one"
    assert f"certificate     {absent}" in cli("inspect", path).out
    assert cli("verify", path, "--no-drift", "--certificate").code == 0
    found = _json(cli, path)["certificate"]
    assert (found["state"], found["verdict"]) == ("matches", "green")
    assert re.search(r"certificate     matches: \d+ cases green on", cli("inspect", path).out)

    model(beta=0.5)  # another artefact of that name
    found = _json(cli, path)
    assert found["certificate"]["state"] == "stale"
    problem = "stale certificate: the artefact changed since it was certified on"
    assert problem in found["problems"][0]
    assert f"problem: {problem}" in cli("inspect", path).out


def test_a_model_that_was_changed_since(cli: Cli) -> None:
    path = model()
    changed = onnx.load(path)
    changed.graph.node[0].name = "another"
    onnx.save(changed, path)
    found = _json(cli, path)
    assert found["spec"]["beta"] == 1.0
    assert found["problems"] == []
    assert "the model was changed by something else after" in found["notes"][0]
    assert found["summary"].endswith("; something else has changed it since")
    done = cli("inspect", path)
    assert (done.out + done.err).count("the model was changed by something else") == 1


def test_a_model_of_other_origin(cli: Cli) -> None:
    graph = "g (int64[N, ?] a) => (int64 c) { c = Max(a, b) }"
    other = model_of(graph, b=np.array([3]))
    other.producer_name = "someone"
    onnx.save(other, "other.onnx")
    found = _json(cli, "other.onnx")
    assert (found["spec"], found["route"], found["producer"]) == (None, None, "someone")
    assert found["inputs"] == [{"name": "a", "dtype": "int64", "shape": ["N", -1]}]
    assert found["operators"]["graph"] == {"Max": 1}
    assert found["runs"]["ort-cpu"] is not None
    assert found["summary"] == "an ONNX model without a loss of smoothl1-deploy's"
    text = cli("inspect", "other.onnx").out  # what holds for several is said once
    assert text.count("the model has 1 inputs") == 1


def test_losses_attached_to_a_model(cli: Cli) -> None:
    onnx.save(model_of("g (float[N, 4] x) => (float[N, 4] y) { y = Neg(x) }"), "m.onnx")
    attach = ("attach", "m.onnx", "--prediction", "y", "--target", "x", "-o", "m.onnx",
              "--overwrite")  # fmt: skip
    assert cli(*attach, "--per-sample").code == cli(*attach, "--beta", 0.5).code == 0
    found = _json(cli, "m.onnx")
    assert [loss["outputs"] for loss in found["attached"]] == [{"loss": "loss"}, {"loss": "loss_1"}]
    text = cli("inspect", "m.onnx").out
    assert "; input=y, target=x, loss=loss_1, beta=0.5, reduction=mean, dtype=float32" in text
    assert text.startswith(
        "m.onnx is a model with 2 losses attached: loss, of y and x (mean per sample, beta 1.0, "
        "float32); loss_1, of y and x (mean, beta 0.5, float32)\n"
    )
    verify, run, *others = inspect(Path("m.onnx")) or ()
    assert verify.endswith("verify m.onnx --certificate") and len(others) == 2
    assert run == "smoothl1-deploy run m.onnx --input x=x.npy"
    np.save("x.npy", np.ones((2, 4), np.float32))
    assert cli(*run.split()[1:]).code == 0
    damaged = onnx.load("m.onnx")
    damaged.metadata_props[0].value = "[1"
    onnx.save(damaged, "m.onnx")
    found = _json(cli, "m.onnx")
    assert "entry smoothl1_deploy.attached is damaged" in found["problems"][0]
    assert found["summary"].endswith("whose loss is not known, since its metadata are damaged")


def test_of_a_model_with_a_loss_is_shown_who_runs_the_whole_of_it(cli: Cli) -> None:
    onnx.save(model_of("g (float[N, 4] x) => (float[N, 4] y) { y = Erf(x) }"), "m.onnx")
    attach = ("attach", "m.onnx", "--prediction", "y", "--target", "t", "-o", "scored.onnx")
    assert cli(*attach).code == 0
    found = _json(cli, "scored.onnx")
    # The evaluator of networks knows the layers of losses alone, and PyTorch the loss alone.
    runs = {name for name in found["runs"] if not name.startswith("build")}
    assert {"ort-cpu", "onnx-reference"} <= runs <= {*BACKENDS} - {"torch", "triton-http"}
    assert found["runs"].get("trt-network") is None
    assert "loss, of y and t (mean, beta 1.0, float32)" in found["summary"]


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_breaks_it_between_words_and_no_hash(shown: Shown, width: int) -> None:
    path = model(beta=0.5, gradient=True)
    lines = shown(width, "inspect", path).splitlines()
    assert max(map(len, lines[: lines.index("")])) <= width
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert any(line.endswith(f" {digest}") for line in lines)


def test_a_stranger_s_engine_is_shown_and_nothing_is_loaded(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smoothl1_deploy.backends._base.load", None)
    monkeypatch.setattr("smoothl1_deploy.tensorrt._parse.parse", None)
    onnx.save(carrying("subgraph", "QNNExecutionProvider"), "m.onnx")
    found = _json(cli, "m.onnx")
    engine = {"node": "e/engine", "provider": "QNNExecutionProvider", "bytes": 4}
    assert (found["engines"], found["runs"]) == ([engine] * 2, {})  # of then and else
    assert "for QNNExecutionProvider in the node 'e/engine', and an engine" in str(
        found["problems"]
    )
    text = cli("inspect", "m.onnx").out
    assert "engines         node=e/engine, provider=QNN" in text
    assert text.startswith("m.onnx is an ONNX model that carries 2 engines for QNNExecutionP")


def test_our_engine_inside_is_shown_with_who_can_run_it(cli: Cli) -> None:
    pytest.importorskip("tensorrt_rtx")
    cli("build", model(), "--flavour", "tensorrt_rtx", "--format", "epcontext")
    found = _json(cli, "loss_ctx.onnx")
    assert (found["kind"], found["route"], found["problems"]) == ("onnx", "epcontext", [])
    assert "generated by 'NvTensorRTRTXExecutionProvider'" in found["runs"]["ort-cpu"]


def test_metadata_do_not_reach_the_terminal_as_commands_or_lines(cli: Cli) -> None:
    path = model()
    changed = onnx.load(path)
    changed.producer_name = "\x1b]0;title\x07\x9b2J"
    onnx.helper.set_model_props(changed, {"smoothl1_deploy.route": "ours\nproblem: none"})
    onnx.save(changed, path)
    done = cli("inspect", path)
    assert not [c for c in done.out if (ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160]
    assert "ours␊problem: none\n" in done.out and "␛]0;title" in done.out


def test_an_engine_is_not_deserialised(
    cli: Cli, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorrt_rtx as trt

    def refuse(*_: object) -> None:
        raise AssertionError("an engine is executable code")

    monkeypatch.setattr(trt.Runtime, "deserialize_cuda_engine", refuse)
    Path("loss.onnx.json").write_text("{}")  # JSON beside a model is no sidecar
    assert _json(cli, "loss.onnx")["kind"] == "onnx"
    found = _json(cli, "loss.engine")
    assert found["kind"] == "engine"
    assert found["sha256"] == hashlib.sha256(engine.read_bytes()).hexdigest()
    assert found["onnx_sha256"] == hashlib.sha256(Path("loss.onnx").read_bytes()).hexdigest()
    assert found["flavour"] == f"tensorrt_rtx {trt.__version__}"
    assert found["inputs"][0] == {"name": "input", "dtype": "float32", "shape": ["N", 16]}
    assert found["problems"] == []
    told = f"a TensorRT engine (tensorrt_rtx {trt.__version__}) of a Smooth L1 loss (mean, beta 1.0"
    assert found["summary"].startswith(told)
    text = cli("inspect", "loss.engine").out
    assert "input=1x16,64x16,4096x16" in text
    assert re.search("^flags +STRICT_NANS", text, re.MULTILINE)


def test_where_an_engine_runs_and_its_layers(
    cli: Cli, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import smoothl1_deploy.tensorrt._flavour as gpu
    import smoothl1_deploy.tensorrt._run as layers

    def runs(here: gpu.Gpu | None) -> str | None:
        monkeypatch.setattr(gpu, "current_gpu", lambda: here)
        return _json(cli, "loss.engine")["runs"]["tensorrt_rtx"]

    without = gpu.current_gpu() is None
    assert runs(None) == "this machine has no NVIDIA GPU whose driver answers"
    other = "it was built for compute capability 8.6, the GPU here (H100) has 9.0"
    assert runs(gpu.Gpu("H100", "9.0", "580")) == other
    fits = gpu.Gpu("A10", "8.6", "580")
    if without:  # the runtime itself says that there is none
        said = str(runs(fits))
        assert "tensorrt_rtx 1." in said and "can't run the engine of 'smooth" in said
    monkeypatch.setattr(layers, "engine_layers", lambda engine, flavour: ["one", "two (Reduce)"])
    assert runs(fits) is None
    assert _json(cli, "loss.engine")["layers"] == ["one", "two (Reduce)"]
    assert "one, two (Reduce)" in cli("inspect", "loss.engine").out


def test_what_speaks_against_an_engine(cli: Cli, engine: Path) -> None:
    sidecar, data = Path("loss.engine.json"), engine.read_bytes()
    for path, content, problem in (
        (engine, data[:-5], "loss.engine is truncated"),
        (engine, data[:-1] + b"?", "loss.engine is not the engine its sidecar describes"),
        (engine, b"", "loss.engine is empty"),
        (engine, data, ""),
        (sidecar, b"{}", "loss.engine.json was damaged or changed"),
        (sidecar, None, "loss.engine.json, the engine's sidecar, can't be read"),
    ):
        path.unlink() if content is None else path.write_bytes(content)
        if problem:
            found = _json(cli, "loss.engine")
            assert problem in found["problems"][0]
            assert all(reason is not None for reason in found["runs"].values())
            assert f"problem: {problem}" in cli("inspect", "loss.engine").out
            assert re.search("doesn't fit it|no sidecar vouches for", found["summary"])


def test_files_that_are_neither(cli: Cli) -> None:
    for name, content in (
        ("text.onnx", b"beta: 0.5\n"),
        ("empty.onnx", b""),
        ("l.engine.json", b"{}"),
        ("data.bin.json", b"{}"),
        ("l.engine", b"beta: 0.5\n"),
        ("empty.plan", b""),
        ("data.bin", bytes(40)),
    ):
        Path(name).write_bytes(content)
    for name, message in (
        ("nope", "nope can't be read (No such file or directory); give the path of an .onnx file"),
        (".", ". can't be read (it is a folder, a pipe or a device)"),
        ("text.onnx", "text.onnx"),
        ("empty.onnx", "empty.onnx holds no ONNX graph"),
        ("l.engine.json", "is the sidecar of an engine; give the engine, l.engine"),
        ("l.engine", "l.engine is no engine: it doesn't begin as TensorRT's do, and has no"),
        ("empty.plan", "empty.plan is no engine: "),
        ("data.bin", "data.bin can't be read as an ONNX model"),
    ):
        assert_refused(cli("inspect", name), message)
