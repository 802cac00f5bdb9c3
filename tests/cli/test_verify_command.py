"""`smoothl1-deploy verify` and `parity`, as a person runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.parser
import pytest
from conftest_cli import Done, spawn

import smoothl1_deploy.backends._base as base
from smoothl1_deploy import LossSpec, export
from smoothl1_deploy.cli import main


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "loss.onnx"
    onnx.save(export(LossSpec(0.5), "inlined", ("N", 4)), path)
    return path


def test_a_good_model_and_its_certificate(model: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["verify", str(model), "--certificate"]) == 0
    out = capsys.readouterr().out
    assert "equal to PyTorch, or nearer to the truth" in out
    certificate = json.loads(Path(f"{model}.certificate.json").read_text())
    assert certificate["verdict"] == "green"


def test_a_wrong_beta_is_red_and_named(model: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["verify", str(model), "--beta", "0.25", "--no-drift", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert found["diagnoses"][0]["fault"] == "wrong beta"


def test_a_model_of_other_origin(model: Path, capsys: pytest.CaptureFixture) -> None:
    proto = onnx.load(model)
    del proto.metadata_props[:]
    _, sub = (node for node in proto.graph.node if node.op_type == "Sub")
    sub.op_type = "Add"  # a planted fault: half of the core more than the difference
    onnx.save(proto, model)
    assert main(["verify", str(model)]) == 2
    assert "--beta and --reduction" in capsys.readouterr().err
    options = ["--beta", "0.5", "--reduction", "mean", "--no-drift"]
    assert main(["verify", str(model), *options]) == 1
    assert main(["verify", str(model), *options, "--input-name", "inptu"]) == 2
    assert "no input of the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"per_sample": True}, ["--beta", "0.5", "--per-sample"]),
        ({"gradient": True, "upstream": True}, ["--beta", "0.5", "--gradient", "--upstream"]),
        ({"weight": "weights"}, ["--beta", "0.5", "--weight", "weights"]),
        ({"beta": 1.0, "runtime_beta": True}, ["--runtime-beta"]),
        ({"beta": 0.0, "reduction": "sum"}, ["--beta", "0", "--reduction", "sum"]),
    ],
)
def test_a_stranger_s_model_is_given_every_field_of_its_spec(
    fields: dict[str, object], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    spec = LossSpec(**{"beta": 0.5, **fields})  # type: ignore[arg-type]
    proto = export(spec, "inlined", ("N", 4))
    del proto.metadata_props[:]
    path = tmp_path / "theirs.onnx"
    onnx.save(proto, path)
    assert main(["verify", str(path), *words, "--no-drift", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["spec"] == spec.to_dict()
    assert main(["verify", str(path), *words, "--dtype", "float16"]) == 2
    assert "takes float32, the spec says float16" in capsys.readouterr().err


def test_a_model_that_something_else_has_changed(
    model: Path, capsys: pytest.CaptureFixture
) -> None:
    """It is held against the spec in its metadata, or one of the options, with one note."""
    proto = onnx.load(model)
    proto.producer_name = "an optimiser"
    onnx.save(proto, model)
    assert main(["verify", str(model), "--no-drift", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["changed"] is True
    assert err.count("note: the model was changed by something else after smoothl1-deploy") == 1
    assert ".py" not in err  # no line of source, as Python shows a warning
    options = ["--beta", "0.25", "--reduction", "mean", "--no-drift"]
    assert main(["verify", str(model), *options]) == 1
    assert "wrong beta" in capsys.readouterr().out


def test_a_changed_model_of_another_dtype_is_held_against_that_by_an_option(
    model: Path, capsys: pytest.CaptureFixture
) -> None:
    """A converter leaves the metadata as they were."""
    proto = export(LossSpec(0.5, dtype="float16"), "inlined", ("N", 4))
    onnx.helper.set_model_props(
        proto, {entry.key: entry.value for entry in onnx.load(model).metadata_props}
    )
    onnx.save(proto, model)
    assert main(["verify", str(model)]) == 2
    message = "the model takes float16, the spec says float32; give the spec of what the model com"
    assert message in capsys.readouterr().err
    assert main(["verify", str(model), "--dtype", "float16", "--no-drift"]) == 0


_WITH_A_GRADIENT = """<ir_version: 10, opset_import: ["" : 18]>
g (float[N,4] pred, float[N,4] gt) => (float[N,4] loss, float[N,4] grad_input) {{
    high = Constant<value_float=1.0>() low = Neg(high) half = Constant<value_float=0.5>()
    d = Sub(pred, gt) size = Abs(d) square = Mul(d, d) quadratic = Mul(half, square)
    linear = Sub(size, half) inside = {comparison}(size, high)
    loss = Where(inside, quadratic, linear)
    other = Sub({order}) core = Clip(other, low, high) no = IsNaN(d) grad_input = Where(no, d, core)
}}"""


def test_a_gradient_that_is_there_is_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "theirs.onnx"
    command = ["verify", str(path), "--beta", "1", "--reduction", "none", "--json"]
    for order, status, faults in (
        ("pred, gt", 0, []),
        ("gt, pred", 1, ["input and target swapped in the gradient"]),
    ):
        text = _WITH_A_GRADIENT.format(comparison="Less", order=order)
        onnx.save(onnx.parser.parse_model(text), path)
        assert main(command) == status
        assert [d["fault"] for d in json.loads(capsys.readouterr().out)["diagnoses"]] == faults


def test_parity_refuses_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for words, text in (
        (["--beta", "-1"], "beta must not be negative"),
        (["--beta", "x"], "Invalid value"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
        (["--route", "onnx"], "unknown route 'onnx'"),
        (["--backend", "gpu"], "unknown backend 'gpu'"),
    ):
        assert main(["parity", *words, "-o", str(tmp_path / "out")]) == 2
        captured = capsys.readouterr()
        assert text in captured.err
        assert "Traceback" not in captured.err


def test_parity_of_one_cell(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--beta", "0.5", "--reduction", "mean", "--dtype", "float16", "--route", "function"]
    words += ["--backend", "ort-cpu", "--no-extensions", "--no-engines", "--workers", "1"]
    assert main(["parity", *words, "-o", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["summary"]["cells"] == 1 and report["ok"] is True
    assert "1 cells, " in capsys.readouterr().out


def test_absent_backends_stand_in_the_report(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = base.missing
    monkeypatch.setattr(
        base, "missing", lambda name: real(name) if name == "onnx-reference" else f"no {name}"
    )
    done = cli(
        "parity", "--quick", "--beta", "0.5", "--reduction", "none", "--dtype", "float32",
        "--route", "function", "--no-extensions", "-o", "out", "--workers", "1",
    )  # fmt: skip
    assert done.code == 0, done.err
    notes = json.loads(Path("out/report.json").read_text())["notes"]
    for name in ("trt", "ort-cuda", "ort-tensorrt", "ort-tensorrt-rtx", "trt-network"):
        assert f"{name} not available: no {name}" in notes
        assert f"{name} not available: no {name}" in " ".join(done.err.split())
    # PyTorch is what they are compared with, on either device.
    assert not any(note.startswith(("torch not", "torch-cuda not")) for note in notes)
    assert "sampled: trt" not in done.out
    assert "trt not available: no trt" in Path("out/report.md").read_text()


def test_parity_into_a_folder_that_cannot_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["parity", "--quick", "-o", str(tmp_path / "file" / "out")]) == 2
    assert "can't make the folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["verify", "parity"])
def test_without_pytorch_they_say_what_to_install(
    command: str, model: Path, tmp_path: Path
) -> None:
    words = ["verify", model] if command == "verify" else ["parity", "--quick", "-o", tmp_path]
    done = spawn(*words, *(["--workers", "1"] if command == "parity" else []), without="torch")
    assert done.code == 3
    assert "pip install torch==2.13.0" in done.err
