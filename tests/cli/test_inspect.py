"""`inspect`: what a file holds, what speaks against it, and that engines are not executed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from conftest_cli import Done, model
from onnx import TensorProto, helper

from fuzzing.damage import carrying
from smoothl1_deploy.backends.base import BACKENDS


def _json(cli: Callable[..., Done], path: str) -> dict[str, object]:
    done = cli("inspect", path, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)  # type: ignore[no-any-return]


def test_an_artefact(cli: Callable[..., Done]) -> None:
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
    assert "ort-cpu: can run it here" in text


def test_the_layers_of_the_network_tensorrt_makes_of_it(cli: Callable[..., Done]) -> None:
    pytest.importorskip("tensorrt_rtx")
    found = _json(cli, model(reduction="none"))
    assert found["runs"]["build with tensorrt_rtx"] is None
    assert found["operators"]["tensorrt_rtx network"]["ELEMENTWISE"] > 3
    found = _json(cli, model("f64.onnx", dtype="float64"))
    assert "is float64" in found["runs"]["build with tensorrt_rtx"]
    assert "tensorrt_rtx network" not in found["operators"]


def test_the_certificate_beside_it(cli: Callable[..., Done]) -> None:
    path = model()
    absent = "absent: no certificate; smoothl1-deploy verify --certificate writes one"
    assert f"certificate     {absent}" in cli("inspect", path).out
    assert cli("verify", path, "--no-drift", "--certificate").code == 0
    found = _json(cli, path)["certificate"]
    assert (found["state"], found["verdict"]) == ("matches", "green")  # type: ignore[index]
    assert re.search(r"certificate     matches: \d+ cases green on", cli("inspect", path).out)

    model(beta=0.5)  # another artefact of that name
    found = _json(cli, path)
    assert found["certificate"]["state"] == "stale"  # type: ignore[index]
    problem = "stale certificate: the artefact changed since it was certified on"
    assert problem in found["problems"][0]  # type: ignore[index]
    assert f"problem: {problem}" in cli("inspect", path).out


def test_a_model_that_was_changed_since(cli: Callable[..., Done]) -> None:
    path = model()
    changed = onnx.load(path)
    changed.graph.node[0].name = "another"
    onnx.save(changed, path)
    found = _json(cli, path)
    assert found["spec"]["beta"] == 1.0  # type: ignore[index]
    assert found["problems"] == []
    assert "the model was changed by something else after" in found["notes"][0]  # type: ignore[index]
    done = cli("inspect", path)
    assert (done.out + done.err).count("the model was changed by something else") == 1


def test_a_model_of_other_origin(cli: Callable[..., Done]) -> None:
    ports = [
        helper.make_tensor_value_info(name, TensorProto.INT64, shape)
        for name, shape in (("a", ["N", None]), ("b", None), ("c", []))
    ]
    node = helper.make_node("Max", ["a", "b"], ["c"])
    constant = helper.make_tensor("b", TensorProto.INT64, [1], [3])
    graph = helper.make_graph([node], "maximum", ports[:2], ports[2:], [constant])
    onnx.save(helper.make_model(graph, producer_name="someone"), "other.onnx")
    found = _json(cli, "other.onnx")
    assert (found["spec"], found["route"], found["producer"]) == (None, None, "someone")
    assert found["inputs"] == [{"name": "a", "dtype": "int64", "shape": ["N", -1]}]
    assert found["operators"]["graph"] == {"Max": 1}
    assert found["runs"]["ort-cpu"] is not None


def test_losses_attached_to_a_model(cli: Callable[..., Done]) -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y) { y = Neg(x) }"
    head = '<ir_version: 8, opset_import: ["" : 18]>'
    onnx.save(onnx.parser.parse_model(f"{head} {text}"), "m.onnx")
    attach = ("attach", "m.onnx", "--prediction", "y", "--target", "x", "-o", "m.onnx",
              "--overwrite")  # fmt: skip
    assert cli(*attach, "--per-sample").code == cli(*attach, "--beta", 0.5).code == 0
    found = _json(cli, "m.onnx")
    assert [loss["outputs"] for loss in found["attached"]] == [{"loss": "loss"}, {"loss": "loss_1"}]  # type: ignore[union-attr]
    second = "; input=y, target=x, loss=loss_1, beta=0.5, reduction=mean, dtype=float32"
    assert second in cli("inspect", "m.onnx").out
    damaged = onnx.load("m.onnx")
    damaged.metadata_props[0].value = "[1"
    onnx.save(damaged, "m.onnx")
    assert "entry smoothl1_deploy.attached is damaged" in _json(cli, "m.onnx")["problems"][0]  # type: ignore[index]


def test_a_stranger_s_engine_is_shown_and_nothing_is_loaded(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smoothl1_deploy.backends.base.load", None)
    monkeypatch.setattr("smoothl1_deploy.tensorrt.parse.parse", None)
    onnx.save(carrying("subgraph", "QNNExecutionProvider"), "m.onnx")
    found = _json(cli, "m.onnx")
    engine = {"node": "e/engine", "provider": "QNNExecutionProvider", "bytes": 4}
    assert (found["engines"], found["runs"]) == ([engine] * 2, {})  # of then and else
    assert "for QNNExecutionProvider in the node 'e/engine', and an engine" in str(
        found["problems"]
    )
    assert "engines         node=e/engine, provider=QNN" in cli("inspect", "m.onnx").out


def test_our_engine_inside_is_shown_with_who_can_run_it(cli: Callable[..., Done]) -> None:
    pytest.importorskip("tensorrt_rtx")
    cli("build", model(), "--flavour", "tensorrt_rtx", "--format", "epcontext")
    found = _json(cli, "loss_ctx.onnx")
    assert (found["kind"], found["route"], found["problems"]) == ("onnx", "epcontext", [])
    assert "generated by 'NvTensorRTRTXExecutionProvider'" in found["runs"]["ort-cpu"]  # type: ignore[index]


def test_metadata_do_not_reach_the_terminal_as_commands_or_lines(cli: Callable[..., Done]) -> None:
    path = model()
    changed = onnx.load(path)
    changed.producer_name = "\x1b]0;title\x07\x9b2J"
    onnx.helper.set_model_props(changed, {"smoothl1_deploy.route": "ours\nproblem: none"})
    onnx.save(changed, path)
    done = cli("inspect", path)
    assert not [c for c in done.out if (ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160]
    assert "ours␊problem: none\n" in done.out and "␛]0;title" in done.out


def test_json_beside_a_model_is_no_sidecar(cli: Callable[..., Done]) -> None:
    path = model()
    Path(f"{path}.json").write_text("{}")
    assert _json(cli, path)["kind"] == "onnx"


def test_an_engine_is_not_deserialised(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    assert cli("build", model(), "--flavour", "tensorrt_rtx").code == 0

    def refuse(*_: object) -> None:
        raise AssertionError("an engine is executable code")

    monkeypatch.setattr(trt.Runtime, "deserialize_cuda_engine", refuse)
    found = _json(cli, "loss.engine")
    data = Path("loss.engine").read_bytes()
    assert found["kind"] == "engine"
    assert found["sha256"] == hashlib.sha256(data).hexdigest()
    assert found["onnx_sha256"] == hashlib.sha256(Path("loss.onnx").read_bytes()).hexdigest()
    assert found["flavour"] == f"tensorrt_rtx {trt.__version__}"
    assert found["inputs"][0] == {"name": "input", "dtype": "float32", "shape": ["N", 16]}
    assert found["problems"] == []
    text = cli("inspect", "loss.engine").out
    assert "input=1x16,64x16,4096x16" in text
    assert "flags          STRICT_NANS" in text


def test_an_engine_without_a_gpu_here(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    import smoothl1_deploy.tensorrt.flavour as gpu

    cli("build", model(), "--flavour", "tensorrt_rtx", "--compute-capability", "8.6")
    monkeypatch.setattr(gpu, "current_gpu", lambda: None)
    runs = _json(cli, "loss.engine")["runs"]
    assert runs == {"tensorrt_rtx": "this machine has no NVIDIA GPU whose driver answers"}
    monkeypatch.setattr(gpu, "current_gpu", lambda: gpu.Gpu("H100", "9.0", "580"))
    runs = _json(cli, "loss.engine")["runs"]
    assert runs["tensorrt_rtx"] == (
        "it was built for compute capability 8.6, the GPU here (H100) has 9.0"
    )


def test_the_layers_of_an_engine_that_runs_here(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    import smoothl1_deploy.tensorrt.flavour as gpu
    import smoothl1_deploy.tensorrt.run as layers

    cli("build", model(), "--flavour", "tensorrt_rtx", "--compute-capability", "8.6")
    without = gpu.current_gpu() is None
    monkeypatch.setattr(gpu, "current_gpu", lambda: gpu.Gpu("A10", "8.6", "580"))
    if without:  # the runtime itself says that there is none
        runs = _json(cli, "loss.engine")["runs"]
        assert "tensorrt_rtx 1." in str(runs) and "can't run the engine of 'smooth" in str(runs)
    monkeypatch.setattr(layers, "engine_layers", lambda engine, flavour: ["one", "two (Reduce)"])
    found = _json(cli, "loss.engine")
    assert found["layers"] == ["one", "two (Reduce)"]
    assert found["runs"] == {"tensorrt_rtx": None}
    assert "one, two (Reduce)" in cli("inspect", "loss.engine").out


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda e, s: s.unlink(), "loss.engine.json, the engine's sidecar, can't be read"),
        (lambda e, s: s.write_text("{}"), "loss.engine.json was damaged or changed"),
        (lambda e, s: e.write_bytes(e.read_bytes()[:-5]), "loss.engine is truncated"),
        (
            lambda e, s: e.write_bytes(e.read_bytes()[:-1] + b"?"),
            "loss.engine is not the engine its sidecar describes",
        ),
        (lambda e, s: e.write_bytes(b""), "loss.engine is empty"),
    ],
)
def test_what_speaks_against_an_engine(
    cli: Callable[..., Done], damage: Callable[[Path, Path], object], problem: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    cli("build", model(), "--flavour", "tensorrt_rtx")
    damage(Path("loss.engine"), Path("loss.engine.json"))
    found = _json(cli, "loss.engine")
    assert problem in found["problems"][0]
    assert all(reason is not None for reason in found["runs"].values())
    assert f"problem: {problem}" in cli("inspect", "loss.engine").out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope", "nope can't be read (No such file or directory); give the path of an .onnx file"),
        (".", ". can't be read (it is a folder, a pipe or a device)"),
        ("text.onnx", "text.onnx"),
        ("empty.onnx", "empty.onnx holds no ONNX graph"),
        ("l.engine.json", "is the sidecar of an engine; give the engine, l.engine"),
        ("l.engine", "l.engine is no engine: it doesn't begin as TensorRT's do, and has no"),
        ("empty.plan", "empty.plan is no engine: "),
        ("data.bin", "data.bin can't be read as an ONNX model"),
    ],
)
def test_files_that_are_neither(cli: Callable[..., Done], name: str, message: str) -> None:
    Path("text.onnx").write_text("beta: 0.5\n")
    Path("empty.onnx").write_bytes(b"")
    for beside in ("l.engine.json", "data.bin.json"):
        Path(beside).write_text("{}")
    Path("l.engine").write_text("beta: 0.5\n")
    Path("empty.plan").write_bytes(b"")
    Path("data.bin").write_bytes(bytes(40))
    done = cli("inspect", name)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
