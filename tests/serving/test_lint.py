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
from onnx import TensorProto, helper

from fuzzing.damage import carrying
from smoothl1_deploy import LossSpec, attach, export
from smoothl1_deploy.artefact import sha256
from smoothl1_deploy.errors import ArtefactError
from smoothl1_deploy.serving import lint as lint_module
from smoothl1_deploy.serving.finding import RULES
from smoothl1_deploy.serving.lint import LintReport
from smoothl1_deploy.serving.repository import write_loss

pytest.importorskip("tritonclient", reason="the extra serve")

VARIANTS = {
    "none": LossSpec(reduction="none"),
    "mean": LossSpec(),
    "sum": LossSpec(reduction="sum", dtype="float16"),
    "score": LossSpec(per_sample=True, gradient=True),
    "beta": LossSpec(runtime_beta=True, weight="weights"),
    "beta-none": LossSpec(runtime_beta=True, reduction="none"),
}


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


def edit(model: str, *changes: tuple[str, str]) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / model / "config.pbtxt"
        text = path.read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        path.write_text(text)

    return change


def put(model: str, spec: LossSpec) -> Callable[[Path], None]:
    """An export as it is, without what a server needs."""

    def write(root: Path) -> None:
        onnx.save(export(spec, "inlined", ("N", 16)), root / model / "1" / "model.onnx")

    return write


def foreign(root: Path) -> None:
    """A mean of another maker, without metadata, as PyTorch's exporter writes it."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Sub", ["y_pred", "y_true"], ["d"]),
        helper.make_node("Abs", ["d"], ["a"]),
        helper.make_node("ReduceMean", ["a"], ["m"], keepdims=0),
        helper.make_node("Reshape", ["m", "one"], ["l1"]),
    ]
    graph = helper.make_graph(
        nodes,
        "l1",
        [value(name, TensorProto.FLOAT, ["batch", 16]) for name in ("y_pred", "y_true")],
        [value("l1", TensorProto.FLOAT, [1])],
        [helper.make_tensor("one", TensorProto.INT64, [1], [1])],
    )
    (root / "l1" / "1").mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, root / "l1" / "1" / "model.onnx")
    (root / "l1" / "config.pbtxt").write_text(
        'backend: "onnxruntime"\n'
        'input { name: "y_pred" data_type: TYPE_FP32 dims: [ -1, 16 ] }\n'
        'input { name: "y_true" data_type: TYPE_FP32 dims: [ -1, 16 ] }\n'
        'output { name: "l1" data_type: TYPE_FP32 dims: [ 1 ] }\n'
    )


def foreign_batched(root: Path) -> None:
    foreign(root)
    config = root / "l1" / "config.pbtxt"
    text = config.read_text().replace("[ -1, 16 ]", "[ 16 ]")
    config.write_text(f"max_batch_size: 8\n{text}")


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


def changed(root: Path) -> None:
    path = root / "mean" / "1" / "model.onnx"
    model = onnx.load(path)
    model.doc_string = "another"
    onnx.save(model, path)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def damaged_metadata(root: Path) -> None:
    path = root / "mean" / "1" / "model.onnx"
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"smoothl1_deploy.spec": "{"})
    onnx.save(model, path)


def certificate(model: str, verdict: str = "green") -> Callable[[Path], None]:
    def write(root: Path) -> None:
        from smoothl1_deploy import verify
        from smoothl1_deploy.parity.certificate import certificate_path, certify

        path = root / model / "1" / "model.onnx"
        result = verify(path, drift=False, spec=LossSpec(2.0) if verdict == "red" else None)
        certify(result, path)
        beside = certificate_path(path)
        if verdict == "stale":
            kept = beside.read_bytes()
            write_loss(root, LossSpec(0.5), name=model, overwrite=True)
            beside.write_bytes(kept)
        elif verdict == "edited":
            beside.write_text(beside.read_text().replace('"seeds"', '"seed"'))

    return write


FAULTS = {
    "no config": (
        lambda root: (root / "mean" / "config.pbtxt").unlink(),
        "no-config",
        "there is no config.pbtxt",
    ),
    "a config that can't be parsed": (
        edit("mean", ("platform", "plattform")),
        "bad-config",
        'config.pbtxt: not a model config: 2:1 : Message type "inference.ModelConfig" has no '
        'field named "plattform"',
    ),
    "a config that is a pipe": (
        lambda root: pipe(root / "mean" / "config.pbtxt"),
        "bad-config",
        "config.pbtxt: it is a folder, a pipe or a device",
    ),
    "no model file": (
        lambda root: (root / "mean" / "1" / "model.onnx").rename(root / "mean" / "1" / "mean.onnx"),
        "no-model-file",
        "version 1 has no model.onnx",
    ),
    "no model": (
        lambda root: (root / "mean" / "1" / "model.onnx").write_bytes(b"onnx"),
        "bad-model",
        "model.onnx",
    ),
    "an engine inside": (
        lambda root: onnx.save(carrying("function"), root / "mean" / "1" / "model.onnx"),
        "engine-inside",
        "the model carries an engine (4 bytes) for any provider in the node 'F/engine'",
    ),
    "an input called otherwise": (
        edit("mean", ('name: "target"', 'name: "label"')),
        "unknown-tensor",
        "the config has the input 'label', the model has 'input', 'target'",
    ),
    "an input left out": (
        edit("beta", ('input {\n  name: "beta"\n  data_type: TYPE_FP32\n  dims: 1\n}\n', "")),
        "missing-input",
        "the model takes the input 'beta', and the config doesn't have it",
    ),
    "another dtype": (
        edit("sum", ("TYPE_FP16", "TYPE_FP32")),
        "wrong-dtype",
        "the config has the input 'input' as TYPE_FP32, the model as TYPE_FP16",
    ),
    "another rank": (
        edit("mean", ("  dims: -1\n", "")),
        "wrong-dims",
        "the input 'input' has the dims [16], in the model [-1, 16]",
    ),
    "a loss that isn't served": (
        put("mean", LossSpec()),
        "wrong-dims",
        "the output 'loss' has the dims [1], in the model []",
    ),
    "other dims": (
        edit("none", ("dims: 16", "dims: 8")),
        "wrong-dims",
        "the input 'input' has the dims [-1, 8] with the rows of a batch, in the model [-1, 16]",
    ),
    "a dynamic axis where the graph has none": (
        edit("mean", ("dims: 16", "dims: -1")),
        "wrong-dims",
        "the input 'input' has the dims [-1, -1], in the model [-1, 16]",
    ),
    "a batched mean": (
        edit("mean", ("input {", "max_batch_size: 8\ninput {"), *[("dims: -1\n", "")] * 2),
        "batched-reduction",
        "max_batch_size is 8, but loss is a mean over all rows of a batch: requests of different "
        "callers would be mixed into one number",
    ),
    "a batched sum": (
        edit("sum", ("input {", "dynamic_batching { }\ninput {")),
        "batched-reduction",
        "max_batch_size is 0 and dynamic_batching is on, but loss is a sum over all rows",
    ),
    "a batched mean of another maker": (
        foreign_batched,
        "batched-reduction",
        "max_batch_size is 8, but the output l1 has no axis of rows",
    ),
    "a batched beta": (
        edit("beta-none", ("input {", "max_batch_size: 8\ninput {")),
        "not-batchable",
        "max_batch_size is 8, but beta is one number for a whole batch, and two requests may "
        "differ in it",
    ),
    "a warm-up of too many": (
        edit(
            "none",
            ("dynamic_batching", "model_warmup { name: 'first' batch_size: 65 }\ndynamic_batching"),
        ),
        "warmup-batch",
        "the warm-up 'first' sends 65 requests in one batch, and the model takes 64",
    ),
    "an operator library that isn't there": (
        edit(
            "mean", ("input {", "model_operations { op_library_filename: '/no/ops.so' }\ninput {")
        ),
        "operator-library",
        "the server is to load the library '/no/ops.so'; there is none",
    ),
    "no guard": (
        put("mean", LossSpec()),
        "missing-guard",
        "a 'target' of one row would be broadcast to the rows of 'input'",
    ),
    "no guard of another maker": (
        foreign,
        "missing-guard",
        "a 'y_true' of one row would be broadcast to the rows of 'y_pred'",
    ),
    "no guard of an attached loss": (
        attached,
        "missing-guard",
        "a 'gt' of one row would be broadcast to the rows of 'loss'",
    ),
    "a graph that was changed": (
        changed,
        "changed-model",
        "the model was changed by something else after",
    ),
    "metadata that can't be read": (
        damaged_metadata,
        "damaged-metadata",
        "damaged metadata entry smoothl1_deploy.spec",
    ),
    "a certificate of another file": (
        certificate("mean", "stale"),
        "stale-certificate",
        "the artefact changed since it was certified on",
    ),
    "a certificate that was edited": (
        certificate("mean", "edited"),
        "damaged-certificate",
        "was edited: its content does not match its hash",
    ),
    "a certificate that is red": (
        certificate("mean", "red"),
        "red-certificate",
        "cases were red on",
    ),
}


@pytest.mark.filterwarnings("ignore::smoothl1_deploy.errors.ModelWarning")
def test_a_graph_that_was_changed_is_settled_by_a_green_certificate(repository: Path) -> None:
    changed(repository)
    certificate("mean")(repository)
    assert lint(repository)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_by_name(repository: Path, fault: str) -> None:
    plant, rule, problem = FAULTS[fault]
    plant(repository)
    report = lint(repository)
    assert not report
    found = [finding for finding in report.findings if finding.rule == rule]
    assert any(problem in finding.problem for finding in found), report.findings
    assert all(finding.remedy for finding in report.findings)
    # The other models stay clean.
    assert len({finding.model for finding in report.findings}) == 1


def test_every_rule_is_planted_and_stands_in_the_docs() -> None:
    planted = {rule for _, rule, _ in FAULTS.values()}
    planted |= {"refused", "other-tensorrt", "damaged-plan", "stale-plan"}
    page = (Path(__file__).parents[2] / "docs" / "serving-repository.md").read_text()
    listed = re.findall(r"^\| `([a-z][a-z-]+)` \|", page, re.MULTILINE)
    assert planted == set(RULES) == set(listed)


def test_a_green_certificate_is_shown(repository: Path) -> None:
    certificate("mean")(repository)
    report = lint(repository)
    assert report and report.certificates["mean/1/model.onnx"].state == "matches"
    assert json.dumps(report.to_dict())


@pytest.mark.parametrize(
    "change",
    [
        # Of another maker, and nothing to say against: a difference that is no distance, shapes
        # that are declared to broadcast, a model of a backend that anyone may have written.
        lambda model: model.graph.node[1].__setattr__("op_type", "Exp"),
        lambda model: (
            model.graph.input[1].type.tensor_type.shape.dim[0].__setattr__("dim_value", 1)
        ),
    ],
)
def test_of_a_graph_that_is_no_loss_no_guard_is_asked(
    repository: Path, change: Callable[[onnx.ModelProto], None]
) -> None:
    foreign(repository)
    path = repository / "l1" / "1" / "model.onnx"
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    assert [f for f in lint(repository).findings if f.rule == "missing-guard"] == []


def test_models_of_other_backends(repository: Path) -> None:
    for name, config in {
        "pipeline": 'platform: "ensemble"',
        "custom": 'backend: "mine" max_batch_size: 4',
        "script": 'backend: "python"',
        # A number a row, which Triton shows as [1] and gives the model as [N].
        "rows": 'platform: "onnxruntime_onnx" max_batch_size: 4 '
        'input { name: "x" data_type: TYPE_FP32 dims: [ 1 ] reshape { shape: [ ] } } '
        'output { name: "y" data_type: TYPE_FP32 dims: [ 1 ] reshape { shape: [ ] } }',
        "named": 'backend: "python" default_model_filename: "main.py"',
    }.items():
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "config.pbtxt").write_text(config)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "rows", [x], [y])
    onnx.save(helper.make_model(graph), repository / "rows" / "1" / "model.onnx")
    (repository / "script" / "1" / "model.py").write_text("")
    (repository / "named" / "1" / "main.py").write_text("")
    (repository / ".git").mkdir()
    (repository / "README.md").write_text("")
    assert lint(repository).findings == ()


def test_attached_to_what_it_is_compared_with(repository: Path) -> None:
    """The rows of a target that the prediction was made of are its own: an autoencoder."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        [value("x", TensorProto.FLOAT, ["N", 16])],
        [value("y", TensorProto.FLOAT, ["N", 16])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    grafted = attach(model, "y", "x", LossSpec(per_sample=True), only_loss=True)
    shutil.copytree(repository / "score", repository / "relu")
    onnx.save(grafted, repository / "relu" / "1" / "model.onnx")
    (repository / "relu" / "config.pbtxt").write_text(
        'platform: "onnxruntime_onnx"\n'
        'input { name: "x" data_type: TYPE_FP32 dims: [ -1, 16 ] }\n'
        'output { name: "loss" data_type: TYPE_FP32 dims: [ -1 ] }\n'
    )
    assert lint(repository).findings == ()
    constant = attach(model, "y", np.zeros((1, 16), np.float32), only_loss=True)
    assert constant.graph.initializer
    onnx.save(constant, repository / "relu" / "1" / "model.onnx")
    assert [f.rule for f in lint(repository).findings] == ["wrong-dims"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere", "nowhere is no folder; give that of a Triton model repository"),
        ("models/mean", "is a model; give the folder above it, the repository"),
        ("empty", "holds no model; write one with smoothl1-deploy repository"),
    ],
)
def test_what_is_no_repository(repository: Path, place: str, message: str) -> None:
    (repository.parent / "empty").mkdir()
    with pytest.raises(ArtefactError, match=message):
        lint(repository.parent / place)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a plan, as if tensorrt 10.13 had built it from its model."""
    pytest.importorskip("tensorrt_rtx")
    from smoothl1_deploy import build_engine
    from smoothl1_deploy.tensorrt.engine import read_verified, write_engine

    folder = tmp_path_factory.mktemp("plan")
    (plain,) = write_loss(folder / "models", LossSpec(reduction="none"), name="loss")
    path = folder / "loss.engine"
    build_engine(plain.file, path, flavour="tensorrt_rtx", profile={"input": (1, 8, 64)})
    engine = read_verified(path)
    assert engine.sidecar.onnx_sha256 == sha256(plain.file.read_bytes())
    sidecar = replace(engine.sidecar, flavour="tensorrt", version="10.13.0.35")
    write_engine(path, engine.data, sidecar)
    spec = LossSpec(reduction="none")
    write_loss(folder / "models", spec, name="loss", engine=path, overwrite=True)
    return folder / "models"


def rewrite(root: Path, **fields: object) -> None:
    from smoothl1_deploy.tensorrt.sidecar import Sidecar

    path = root / "loss_trt" / "1" / "model.plan.json"
    path.write_bytes(replace(Sidecar.read(path), **fields).dumps())  # type: ignore[arg-type]


@pytest.fixture
def planned(plan: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plan, tmp_path / "models"))


@pytest.mark.parametrize("version", [None, "10.13", "10.13.0.35", "10"])
def test_a_plan_of_the_servers_tensorrt(plan: Path, version: str | None) -> None:
    assert lint(plan, tensorrt_version=version).findings == ()


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("10.9", "its plan was built by TensorRT 10.13.0.35, the server has 10.9"),
        ("10.14.1", "its plan was built by TensorRT 10.13.0.35, the server has 10.14.1"),
    ],
)
def test_a_plan_of_another_tensorrt(plan: Path, version: str, problem: str) -> None:
    (finding,) = lint(plan, tensorrt_version=version).findings
    assert (finding.model, finding.rule, finding.problem) == ("loss_trt", "other-tensorrt", problem)
    assert finding.remedy.endswith("in the container that serves it")


def test_a_version_compatible_plan_runs_later(planned: Path) -> None:
    from smoothl1_deploy.tensorrt.options import BuildOptions

    rewrite(planned, options=BuildOptions(version_compatible=True))
    assert lint(planned, tensorrt_version="10.14").findings == ()
    assert [f.rule for f in lint(planned, tensorrt_version="10.9").findings] == ["other-tensorrt"]
    assert [f.rule for f in lint(planned, tensorrt_version="11.0").findings] == ["other-tensorrt"]


@pytest.mark.parametrize(
    ("fields", "rule", "problem"),
    [
        (
            {"flavour": "tensorrt_rtx", "version": "1.7.1.116"},
            "other-tensorrt",
            "model.plan was built by tensorrt_rtx 1.7.1.116, and Triton's backend loads plans of "
            "tensorrt alone",
        ),
        (
            {"onnx_sha256": "0" * 64},
            "stale-plan",
            "model.plan was built from another graph than loss/1/model.onnx",
        ),
        ({"engine_bytes": 10**9}, "damaged-plan", "model.plan is truncated"),
    ],
)
def test_what_speaks_against_a_plan(
    planned: Path, fields: dict[str, object], rule: str, problem: str
) -> None:
    rewrite(planned, **fields)
    (finding,) = lint(planned).findings
    assert (finding.model, finding.rule) == ("loss_trt", rule)
    assert problem in finding.problem


def test_plans_of_two_versions(planned: Path) -> None:
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


def test_a_plan_is_held_against_its_config(planned: Path) -> None:
    edit("loss_trt", ("dims: 16", "dims: 8"), ("TYPE_FP32", "TYPE_FP16"))(planned)
    assert {finding.rule for finding in lint(planned).findings} == {"wrong-dims", "wrong-dtype"}


def test_a_plan_without_a_sidecar_is_left_alone(planned: Path) -> None:
    (planned / "loss_trt" / "1" / "model.plan.json").unlink()
    assert lint(planned).findings == ()
