"""The lint: faults planted one at a time into a clean repository, and each found by its name."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest_serving import SPECS, tensorrt_engine
from handmade import model_of

from fuzzing.damage import carrying
from smoothl1_deploy import LossSpec, attach, export
from smoothl1_deploy.errors import ArtefactError
from smoothl1_deploy.serving import _lint as lint_module
from smoothl1_deploy.serving._lint import RULES, LintReport
from smoothl1_deploy.serving._repository import write_loss

pytest.importorskip("tritonclient", reason="the extra serve")

VARIANTS = {**SPECS, "beta-none": LossSpec(runtime_beta=True, reduction="none")}

Plant = Callable[[Path], object]


def lint(root: Path, **options: str) -> LintReport:
    """By our own rules alone, which need no server."""
    return lint_module.lint(root, server=False, **options)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clean") / "models"
    for name, spec in VARIANTS.items():
        write_loss(root, spec, name=name)
    return root


@pytest.fixture
def repository(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "models"))


def test_what_this_tool_writes_is_clean(clean: Path) -> None:
    report = lint(clean)
    assert report.findings == () and report
    assert report.models == tuple(sorted(VARIANTS))
    assert {status.state for status in report.certificates.values()} == {"absent"}


def write(root: Path, name: str, config: str) -> Path:
    """A model's folder with its config, and the path of its ONNX file, which is still to come."""
    (root / name / "1").mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(config)
    return root / name / "1" / "model.onnx"


def edit(model: str, *changes: tuple[str, str]) -> Plant:
    def change(root: Path) -> None:
        path = root / model / "config.pbtxt"
        text = path.read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        path.write_text(text)

    return change


def plain_mean(root: Path) -> None:
    onnx.save(export(LossSpec(), "inlined", ("N", 16)), root / "mean" / "1" / "model.onnx")


def foreign(root: Path, batch: int = 0) -> None:
    """A mean of another maker, without metadata, as PyTorch's exporter writes it."""
    port = f"data_type: TYPE_FP32 dims: [ {'16' if batch else '-1, 16'} ]"
    path = write(
        root,
        "l1",
        f'backend: "onnxruntime" max_batch_size: {batch} '
        f'input {{ name: "y_pred" {port} }} input {{ name: "y_true" {port} }} '
        'output { name: "l1" data_type: TYPE_FP32 dims: [ 1 ] }',
    )
    onnx.save(
        model_of("""g
            (float[batch, 16] y_pred, float[batch, 16] y_true) => (float[1] l1)
            <int64[1] one = {1}> {
                d = Sub(y_pred, y_true)
                a = Abs(d)
                m = ReduceMean<keepdims = 0>(a)
                l1 = Reshape(m, one)
            }"""),
        path,
    )


def attached(root: Path) -> None:
    """A loss attached to a model of two inputs, and served without its guard."""
    model = onnx.load(root / "none" / "1" / "model.onnx")
    del model.metadata_props[:]
    grafted = attach(model, "loss", "gt", LossSpec(), loss_name="mean", only_loss=True)
    shutil.copytree(root / "mean", root / "grafted")
    onnx.save(grafted, root / "grafted" / "1" / "model.onnx")
    edit(
        "grafted",
        ('name: "mean"', 'name: "grafted"'),
        ('name: "loss"', 'name: "mean"'),
        ("output {", 'input { name: "gt" data_type: TYPE_FP32 dims: [ -1, 16 ] }\noutput {'),
    )(root)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def carry(path: Path) -> None:
    onnx.save(carrying("function"), path)


def rewritten(path: Path) -> None:
    model = onnx.load(path)
    model.doc_string = "another"
    onnx.save(model, path)


def with_damaged_metadata(path: Path) -> None:
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"smoothl1_deploy.spec": "{"})
    onnx.save(model, path)


def certificate(verdict: str) -> Plant:
    def write(root: Path) -> None:
        from smoothl1_deploy import verify
        from smoothl1_deploy.parity._certificate import certificate_path, certify

        path = root / "mean" / "1" / "model.onnx"
        result = verify(path, drift=False, spec=LossSpec(2.0) if verdict == "red" else None)
        certify(result, path)
        beside = certificate_path(path)
        if verdict == "stale":
            kept = beside.read_bytes()
            write_loss(root, LossSpec(0.5), name="mean", overwrite=True)
            beside.write_bytes(kept)
        elif verdict == "edited":
            beside.write_text(beside.read_text().replace('"seeds"', '"seed"'))

    return write


def in_mean(change: Callable[[Path], object], file: str = "1/model.onnx") -> Plant:
    return lambda root: change(root / "mean" / file)


BETA = 'input {\n  name: "beta"\n  data_type: TYPE_FP32\n  dims: 1\n}\n'
BATCHES = ("input {", "max_batch_size: 8\ninput {")
DYNAMIC = ("input {", "dynamic_batching { }\ninput {")
LIBRARY = ("input {", "model_operations { op_library_filename: '/no/ops.so' }\ninput {")
WARMUP = ("dynamic", "model_warmup { name: 'first' batch_size: 65 }\ndynamic")
LABEL, ROWS = ('name: "target"', 'name: "label"'), [("dims: -1\n", "")] * 2
#: What is planted, the rule that finds it, and a part of what it says.
FAULTS: list[tuple[Plant, str, str]] = [
    (in_mean(Path.unlink, "config.pbtxt"), "no-config", "there is no config.pbtxt"),
    (
        edit("mean", ("platform", "plattform")),
        "bad-config",
        "config.pbtxt: not a model config: 2:1",
    ),
    (in_mean(pipe, "config.pbtxt"), "bad-config", "it is a folder, a pipe or a device"),
    (in_mean(lambda path: path.rename(f"{path}.old")), "no-model-file", "1 has no model.onnx"),
    (in_mean(lambda path: path.write_bytes(b"onnx")), "bad-model", "model.onnx"),
    (in_mean(carry), "engine-inside", "carries an engine (4 bytes) for any provider in the node"),
    (edit("mean", LABEL), "unknown-tensor", "the input 'label', the model has 'input', 'target'"),
    (edit("beta", (BETA, "")), "missing-input", "takes the input 'beta', and the config doesn't"),
    (edit("sum", ("FP16", "FP32")), "wrong-dtype", "'input' as TYPE_FP32, the model as TYPE_FP16"),
    (edit("mean", ("  dims: -1\n", "")), "wrong-dims", "dims [16], in the model [-1, 16]"),
    # An export as it is, without what a server needs.
    (plain_mean, "wrong-dims", "the output 'loss' has the dims [1], in the model []"),
    (plain_mean, "missing-guard", "a 'target' of one row would be broadcast to the rows of 'in"),
    (edit("none", ("16", "8")), "wrong-dims", "[-1, 8] with the rows of a batch, in the model [-1"),
    (edit("mean", ("16", "-1")), "wrong-dims", "the dims [-1, -1], in the model [-1, 16]"),
    (
        edit("mean", BATCHES, *ROWS),
        "batched-reduction",
        "is 8, but loss is a mean over all rows of",
    ),
    (
        edit("sum", DYNAMIC),
        "batched-reduction",
        "is 0 and dynamic_batching is on, but loss is a sum",
    ),
    (
        lambda root: foreign(root, 8),
        "batched-reduction",
        "is 8, but the output l1 has no axis of ro",
    ),
    (edit("beta-none", BATCHES), "not-batchable", "and two requests may differ in it"),
    (edit("none", WARMUP), "warmup-batch", "'first' sends 65 requests in one batch, and the model"),
    (edit("mean", LIBRARY), "operator-library", "library '/no/ops.so'; there is none"),
    (foreign, "missing-guard", "a 'y_true' of one row would be broadcast to the rows of 'y_pred'"),
    (attached, "missing-guard", "a 'gt' of one row would be broadcast to the rows of 'loss'"),
    (in_mean(rewritten), "changed-model", "the model was changed by something else after"),
    (in_mean(with_damaged_metadata), "damaged-metadata", "metadata entry smoothl1_deploy.spec"),
    (certificate("stale"), "stale-certificate", "the artefact changed since it was certified on"),
    (certificate("edited"), "damaged-certificate", "was edited: its content does not match its"),
    (certificate("red"), "red-certificate", "cases were red on"),
]


@pytest.mark.filterwarnings("ignore::smoothl1_deploy.errors.ModelWarning")
def test_a_green_certificate_is_shown_and_settles_that_a_graph_was_changed(
    repository: Path,
) -> None:
    in_mean(rewritten)(repository)
    certificate("green")(repository)
    report = lint(repository)
    assert report and report.certificates["mean/1/model.onnx"].state == "matches"
    assert json.loads(json.dumps(report.to_dict()))["ok"]


@pytest.mark.parametrize(("plant", "rule", "problem"), FAULTS)
def test_a_planted_fault_is_found_by_name(
    repository: Path, plant: Plant, rule: str, problem: str
) -> None:
    plant(repository)
    report = lint(repository)
    assert not report
    found = [finding for finding in report.findings if finding.rule == rule]
    assert any(problem in finding.problem for finding in found), report.findings
    assert all(finding.remedy for finding in report.findings)
    # The other models stay clean.
    assert len({finding.model for finding in report.findings}) == 1


def test_every_rule_is_planted_and_stands_in_the_docs() -> None:
    planted = {rule for _, rule, _ in FAULTS}
    planted |= {"refused", "other-tensorrt", "damaged-plan", "stale-plan"}
    page = (Path(__file__).parents[2] / "docs" / "serving-repository.md").read_text()
    listed = re.findall(r"^\| `([a-z][a-z-]+)` \|", page, re.MULTILINE)
    assert planted == set(RULES) == set(listed)


def test_of_a_graph_that_is_no_loss_no_guard_is_asked(repository: Path) -> None:
    foreign(repository)
    path = repository / "l1" / "1" / "model.onnx"

    def asked(model: onnx.ModelProto) -> bool:
        onnx.save(model, path)
        return any(finding.rule == "missing-guard" for finding in lint(repository).findings)

    model = onnx.load(path)
    assert asked(model)
    model.graph.node[1].op_type = "Exp"  # no distance
    assert not asked(model)
    model.graph.node[1].op_type = "Abs"
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 1  # declared to broadcast
    assert not asked(model)


def test_models_of_other_backends_are_left_alone(repository: Path) -> None:
    port = "data_type: TYPE_FP32 dims: [ 1 ] reshape { shape: [ ] }"
    files = {
        name: write(repository, name, config)
        for name, config in {
            "pipeline": 'platform: "ensemble"',
            "custom": 'backend: "mine" max_batch_size: 4',
            "script": 'backend: "python"',
            # A number a row, which Triton shows as [1] and gives the model as [N].
            "rows": 'platform: "onnxruntime_onnx" max_batch_size: 4 '
            f'input {{ name: "x" {port} }} output {{ name: "y" {port} }}',
            "named": 'backend: "python" default_model_filename: "main.py"',
        }.items()
    }
    onnx.save(model_of("g (float[N] x) => (float[N] y) { y = Relu(x) }"), files["rows"])
    files["script"].with_name("model.py").write_text("")
    files["named"].with_name("main.py").write_text("")
    (repository / ".git").mkdir()
    (repository / "README.md").write_text("")
    assert lint(repository).findings == ()


def test_a_target_that_the_prediction_was_made_of_needs_no_guard(repository: Path) -> None:
    """The rows of a target that the prediction was made of are its own: an autoencoder."""
    path = write(
        repository,
        "relu",
        'platform: "onnxruntime_onnx" '
        'input { name: "x" data_type: TYPE_FP32 dims: [ -1, 16 ] }'
        'output { name: "loss" data_type: TYPE_FP32 dims: [ -1 ] }',
    )
    model = model_of("g (float[N, 16] x) => (float[N, 16] y) { y = Relu(x) }")
    onnx.save(attach(model, "y", "x", LossSpec(per_sample=True), only_loss=True), path)
    assert lint(repository).findings == ()
    onnx.save(attach(model, "y", np.zeros((1, 16), np.float32), only_loss=True), path)
    assert [f.rule for f in lint(repository).findings] == ["wrong-dims"]


def test_what_is_no_repository_is_refused(repository: Path) -> None:
    (repository.parent / "empty").mkdir()
    for place, message in (
        ("nowhere", "nowhere is no folder; give that of a Triton model repository"),
        ("models/mean", "is a model; give the folder above it, the repository"),
        ("empty", "holds no model; write one with smoothl1-deploy repository"),
    ):
        with pytest.raises(ArtefactError, match=message):
            lint(repository.parent / place)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a plan, as if tensorrt 10.13 had built it from its model."""
    folder, spec = tmp_path_factory.mktemp("plan"), LossSpec(reduction="none")
    (plain,) = write_loss(folder / "models", spec, name="loss")
    path = tensorrt_engine(plain.file, folder / "loss.engine")
    write_loss(folder / "models", spec, name="loss", engine=path, overwrite=True)
    return folder / "models"


def rewrite(root: Path, **fields: object) -> None:
    from smoothl1_deploy.tensorrt._engine import Sidecar

    path = root / "loss_trt" / "1" / "model.plan.json"
    path.write_bytes(replace(Sidecar.read(path), **fields).dumps())  # type: ignore[arg-type]


@pytest.fixture
def planned(plan: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plan, tmp_path / "models"))


def rules(root: Path, version: str | None = None) -> list[str]:
    return [finding.rule for finding in lint(root, tensorrt_version=version).findings]


def test_a_plan_of_the_servers_tensorrt_and_of_another(plan: Path) -> None:
    for version in (None, "10.13", "10.13.0.35", "10"):
        assert rules(plan, version) == [], version
    for version in ("10.9", "10.14.1"):
        (finding,) = lint(plan, tensorrt_version=version).findings
        assert (finding.model, finding.rule) == ("loss_trt", "other-tensorrt")
        assert finding.problem.endswith(f"by TensorRT 10.13.0.35, the server has {version}")
        assert finding.remedy.endswith("in the container that serves it")


def test_each_fault_of_a_plan_is_found(planned: Path) -> None:
    sidecar = planned / "loss_trt" / "1" / "model.plan.json"
    sound = sidecar.read_bytes()
    for fields, rule, problem in (
        (
            {"flavour": "tensorrt_rtx", "version": "1.7.1.116"},
            "other-tensorrt",
            "built by tensorrt_rtx 1.7.1.116, and Triton's backend loads plans of tensorrt alone",
        ),
        ({"onnx_sha256": "0" * 64}, "stale-plan", "another graph than loss/1/model.onnx"),
        ({"engine_bytes": 10**9}, "damaged-plan", "model.plan is truncated"),
    ):
        rewrite(planned, **fields)
        (finding,) = lint(planned).findings
        assert (finding.model, finding.rule) == ("loss_trt", rule)
        assert problem in finding.problem
        sidecar.write_bytes(sound)
    edit("loss_trt", ("dims: 16", "dims: 8"), ("TYPE_FP32", "TYPE_FP16"))(planned)
    assert {*rules(planned)} == {"wrong-dims", "wrong-dtype"}  # it is held against its config


def test_plans_of_two_versions_are_held_against_each_other(planned: Path) -> None:
    shutil.copytree(planned / "loss", planned / "b")
    shutil.copytree(planned / "loss_trt", planned / "b_trt")
    for name in ("b", "b_trt"):
        config = planned / name / "config.pbtxt"
        config.write_text(config.read_text().replace('"loss', '"b', 1))
    assert lint(planned).findings == ()
    rewrite(planned, version="10.9.0.34")
    findings = lint(planned).findings
    assert {finding.model for finding in findings} == {"loss_trt", "b_trt"}
    assert "by 10.13.0.35 and 10.9.0.34; a server has one" in findings[0].problem


def test_a_plan_without_a_sidecar_is_left_alone(planned: Path) -> None:
    (planned / "loss_trt" / "1" / "model.plan.json").unlink()
    assert lint(planned).findings == ()
