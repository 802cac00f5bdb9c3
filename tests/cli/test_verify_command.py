"""`smoothl1-deploy verify` and `parity`, as a person runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from conftest_cli import Cli, assert_refused, model, spawn

import smoothl1_deploy.backends._base as base
from smoothl1_deploy import LossSpec, export

QUICK = ("--no-drift", "--json")
ONE_CELL = (
    "--beta 0.5 --reduction mean --dtype float16 --route function --backend ort-cpu "
    "--no-extensions --no-engines --workers 1"
)


def theirs(spec: LossSpec, route: str = "inlined") -> onnx.ModelProto:
    """A loss of a stranger's making, which says nothing of itself."""
    proto = export(spec, route, ("N", 4))
    del proto.metadata_props[:]
    return proto


def test_a_good_model_and_its_certificate(cli: Cli) -> None:
    done = cli("verify", model(beta=0.5), "--certificate")
    assert done.code == 0 and "equal to PyTorch, or nearer to the truth" in done.out
    assert json.loads(Path("loss.onnx.certificate.json").read_text())["verdict"] == "green"


def test_what_was_found_is_a_page_and_markdown_too(cli: Cli) -> None:
    done = cli("verify", model(beta=0.5), "--no-drift", "--html", "a.html", "--md", "a.md")
    assert done.code == 0 and done.out.endswith("wrote a.html, a.md\n")
    for name in ("a.html", "a.md"):
        text = Path(name).read_text()
        assert "13 of 13 cases equal" in text and "inf-minus-inf" in text and "GPU kernels" in text
    done = spawn("verify", model(), "--html", "b.html", without="jinja2")
    assert done.code == 3 and "[report]" in done.err and not Path("b.html").exists()


def test_a_wrong_beta_is_red_and_named(cli: Cli) -> None:
    done = cli("verify", model(beta=0.5), "--beta", "0.25", *QUICK)
    found = json.loads(done.out)
    assert (done.code, found["ok"]) == (1, False)
    assert found["diagnoses"][0]["fault"] == "wrong beta"


def test_a_model_of_other_origin_is_described_by_options(cli: Cli) -> None:
    proto = theirs(LossSpec(0.5))
    _, sub = (node for node in proto.graph.node if node.op_type == "Sub")
    sub.op_type = "Add"  # a planted fault: half of the core more than the difference
    onnx.save(proto, "theirs.onnx")
    assert_refused(cli("verify", "theirs.onnx"), "say it by a spec: beta, reduction")
    words = ("verify", "theirs.onnx", "--beta", "0.5", "--reduction", "mean", "--no-drift")
    assert cli(*words).code == 1
    assert_refused(cli(*words, "--input-name", "inptu"), "no input of the model")


def test_a_stranger_s_model_is_given_every_field_of_its_spec(cli: Cli) -> None:
    fields: list[dict[str, Any]] = [
        {"beta": 0.5, "per_sample": True},
        {"beta": 0.5, "gradient": True, "upstream": True},
        {"beta": 0.5, "weight": "weights"},
        {"runtime_beta": True},
        {"beta": 0.0, "reduction": "sum"},
    ]
    for given in fields:
        spec = LossSpec(**given)
        onnx.save(theirs(spec), "theirs.onnx")
        words = ["verify", "theirs.onnx"]
        for name, value in given.items():
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        done = cli(*words, *QUICK)
        assert done.code == 0 and json.loads(done.out)["spec"] == spec.to_dict(), given
        done = cli(*words, "--dtype", "float16")
        assert_refused(done, "takes float32, the spec says float16")


def test_a_model_that_something_else_has_changed_is_held_against_its_metadata_or_the_options(
    cli: Cli,
) -> None:
    proto = onnx.load(model(beta=0.5))
    proto.producer_name = "an optimiser"
    onnx.save(proto, "loss.onnx")
    done = cli("verify", "loss.onnx", *QUICK)
    assert done.code == 0 and json.loads(done.out)["changed"] is True
    assert done.err.count("note: the model was changed by something else after smoothl1-dep") == 1
    assert ".py" not in done.err  # no line of source, as Python shows a warning
    done = cli("verify", "loss.onnx", "--beta", "0.25", "--no-drift")
    assert done.code == 1 and "wrong beta" in done.out
    # A converter to another dtype leaves the metadata as they were.
    half = export(LossSpec(0.5, dtype="float16"), shape=("N", 16))
    del half.metadata_props[:]
    half.metadata_props.extend(proto.metadata_props)
    onnx.save(half, "loss.onnx")
    message = "the model takes float16, the spec says float32; give the spec of what the model com"
    assert message in cli("verify", "loss.onnx").err
    assert cli("verify", "loss.onnx", "--dtype", "float16", "--no-drift").code == 0


_WITH_A_GRADIENT = """<ir_version: 10, opset_import: ["" : 18]>
g (float[N,4] pred, float[N,4] gt) => (float[N,4] loss, float[N,4] grad_input) {{
    high = Constant<value_float=1.0>() low = Neg(high) half = Constant<value_float=0.5>()
    d = Sub(pred, gt) size = Abs(d) square = Mul(d, d) quadratic = Mul(half, square)
    linear = Sub(size, half) inside = Less(size, high)
    loss = Where(inside, quadratic, linear)
    other = Sub({order}) core = Clip(other, low, high) no = IsNaN(d) grad_input = Where(no, d, core)
}}"""


def test_a_stranger_s_gradient_is_looked_at_though_nobody_named_it(cli: Cli) -> None:
    for order, code, faults in (
        ("pred, gt", 0, []),
        ("gt, pred", 1, ["input and target swapped in the gradient"]),
    ):
        onnx.save(onnx.parser.parse_model(_WITH_A_GRADIENT.format(order=order)), "theirs.onnx")
        done = cli("verify", "theirs.onnx", "--beta", "1", "--reduction", "none", "--json")
        assert done.code == code
        assert [found["fault"] for found in json.loads(done.out)["diagnoses"]] == faults


def test_parity_refuses_bad_usage(cli: Cli) -> None:
    Path("file").touch()
    for words, text in (
        (["--beta", "-1"], "beta must not be negative"),
        (["--beta", "x"], "Invalid value"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
        (["--route", "onnx"], "unknown route 'onnx'"),
        (["--backend", "gpu"], "unknown backend 'gpu'"),
        (["-o", "file/out"], "can't write file/out/report.json: Not a directory"),
    ):
        done = cli("parity", "--quick", *words)
        assert done.code == 2 and text in done.err


def test_parity_of_one_cell(cli: Cli) -> None:
    done = cli("parity", *ONE_CELL.split(), "-o", "out")
    assert done.code == 0 and "1 cells, " in done.out
    report = json.loads(Path("out/report.json").read_text())
    assert report["summary"]["cells"] == 1 and report["ok"] is True


def test_absent_backends_stand_in_the_report(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_without_pytorch_they_say_what_to_install() -> None:
    for words in (("verify", model()), ("parity", "--quick", "--workers", "1")):
        done = spawn(*words, without="torch")
        assert done.code == 3 and "pip install torch==2.13.0" in done.err
