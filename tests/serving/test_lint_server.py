"""What Triton says of a repository, asked once for all of it; nothing that lies in it is run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import onnx
import pytest
from handmade import model_of

from smoothl1_deploy import LossSpec
from smoothl1_deploy.errors import BackendUnavailableError, MissingDependencyError
from smoothl1_deploy.ops import library
from smoothl1_deploy.serving import _lint_server as lint_server
from smoothl1_deploy.serving._embedded import Triton
from smoothl1_deploy.serving._lint import LintReport, lint
from smoothl1_deploy.serving._repository import write_loss

pytest.importorskip("tritonclient", reason="the extra serve")


def port(name: str, dtype: str = "FP32", dims: str = "4", more: str = "") -> str:
    return f'{{ name: "{name}" data_type: TYPE_{dtype} dims: [ {dims} ] {more} }} '


X, Y = f"input {port('x')}", f"output {port('y')}"
NAMES = 'label_filename: "names"'
HEAD = 'backend: "python" max_batch_size: 8 '
PYTHON = HEAD + X + Y
ONNX = 'platform: "onnxruntime_onnx" '
RESHAPE, BATCHING = "reshape { shape: %s }", "dynamic_batching { %s }"
SEQUENCE = "sequence_batching { %s }"
CONTROL = "control_input { name: 'a' control { } }"
ENSEMBLE = f'platform: "ensemble" max_batch_size: 8 {X}{Y}'


def warmup(name: str = "x", dtype: str = "FP32", data: str = "zero_data: true") -> str:
    value = f"data_type: TYPE_{dtype} dims: [ 4 ] {data}"
    inputs = f'inputs {{ key: "{name}" value {{ {value} }} }}'
    return f'{HEAD}{X}{Y}model_warmup {{ name: "w" batch_size: 1 {inputs} }}'


def steps(*steps: str, head: str = ENSEMBLE) -> str:
    return f"{head}ensemble_scheduling {{ {' '.join(steps)} }}"


def step(x: str = "x", y: str = "y", model: str = "good", version: int = -1) -> str:
    return (
        f'step {{ model_name: "{model}" model_version: {version} '
        f'input_map {{ key: "x" value: "{x}" }} output_map {{ key: "y" value: "{y}" }} }}'
    )


OTHER, LARGER = ENSEMBLE.replace("4", "5"), ENSEMBLE.replace("8", "16")
#: A model -> its config and a part of the words with which Triton refuses it: of each kind of thing
#: that the mirror copies, renames or leaves out, what Triton can only say if that is done right.
REFUSED = {
    # Ensembles.
    "no_scheduling": (ENSEMBLE, "ensemble scheduling must be set"),
    "no_such_step": (steps(step(model="nobody")), "not available or ambiguous: nobody"),
    "no_such_version": (steps(step(version=7)), "'good' whose required version 7 is not loaded"),
    "input_not_mapped": (steps(step(model="pair")), "input x2 in model pair is not mapped"),
    "other_dims": (steps(step(), head=OTHER), "inconsistent shape"),
    "larger_batch": (steps(step(), head=LARGER), "only allows maximum batch size to be 8"),
    "ring": (steps(step(model="second_of_ring")), "circular dependency between ensembles"),
    "second_of_ring": (steps(step(model="ring")), "second_of_ring"),
    "refused_step": (steps(step(model="zero")), "not available or ambiguous: zero"),
    "instances": (f"{steps(step())} instance_group {{ }}", "instance group should not be"),
    "with_backend": (f'backend: "mine" {steps(step())}', "empty backend type"),
    # Warm-ups.
    "warmup_input": (warmup("z"), "missing required input(s) ['x']"),
    "warmup_dtype": (warmup(dtype="FP16"), "data-type is 'FP16', but model"),
    "warmup_file": (warmup(data='input_data_file: "rows"'), "read warmup_file/warmup/rows: No"),
    # Tensors.
    "zero": (f"{HEAD}{X}output {port('y', dims='0')}", "must be integer >= 1, or -1"),
    "no_dims": (f"{HEAD}{X}output {port('y', dims='')}", "must specify 'dims'"),
    "no_name": (f"{HEAD}{X}output {port('')}", "model output must specify 'name'"),
    "volume": (f"{HEAD}{Y}input {port('x', more=RESHAPE % '3')}", "different size for dims"),
    "label": (f"{HEAD}{X}output {port('y', more=NAMES)}", "read label/names: No"),
    # The rest of a config.
    "another": (f'name: "one" {PYTHON}', "'another' for model 'one', directory name must equal"),
    "unknown_platform": (f'platform: "onnx" {X}{Y}', "unexpected platform type 'onnx'"),
    "no_platform": (f"{X}{Y}", "Could not determine backend for model 'no_platform'"),
    "not_its_platform": (f'backend: "onnxruntime" platform: "a" {X}{Y}', "and 'backend' pair"),
    "versionless": (f"{PYTHON}version_policy {{ specific {{ }} }}", "at least one version must be"),
    "negative": (f"{HEAD.replace('8', '-1')}{X}{Y}", "'max_batch_size' must be non-negative"),
    "preferred": (f"{PYTHON}{BATCHING % 'preferred_batch_size: 9'}", "must be <= max batch size"),
    "cpu_gpus": (
        f"{PYTHON}instance_group {{ kind: KIND_CPU gpus: [ 0 ] }}",
        "has kind KIND_CPU but specifies one or more GPUs",
    ),
    "control": (f"{PYTHON}{SEQUENCE % CONTROL}", "must specify either 'int32_false_true'"),
    # ONNX Runtime's own.
    "operator": (f"{ONNX}{X}{Y}", "Frob"),
}

START = (
    "control_input { name: 'START' control { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ]"
    " } }"
)
STATE = "state { input_name: 'START' output_name: 'END' data_type: TYPE_FP32 dims: [ 4 ] }"
COUNT = "batch_input { kind: BATCH_ELEMENT_COUNT target_name: 'START' data_type: TYPE_FP32 %s }"
SOURCE = "source_input: 'x'"
ANY_X, ANY_Y = X.replace("4", "-1, 4"), Y.replace("4", "-1, 4")
#: Models that Triton loads, and that are as they should be, whatever machine looks at them.
SOUND = {
    "good": PYTHON,
    "half": PYTHON.replace("FP32", "FP16"),
    "pair": f"{PYTHON}input {port('x2')}",
    "above": steps(step(model="chain")),
    "chain": steps(step(y="t"), step("t")),
    "gpu": f"{PYTHON}instance_group {{ kind: KIND_GPU gpus: [ 0, 1 ] count: 4 }}",
    "warm": warmup(data='input_data_file: "rows"'),
    "labelled": f"{HEAD}{X}output {port('y', more=NAMES)}",
    # What used to be found wrong, from NVIDIA's own examples.
    "control_input": f"{ONNX}max_batch_size: 8 {X}{Y}{SEQUENCE % START}",
    "state": f"{ONNX}max_batch_size: 8 {X}{Y}{SEQUENCE % STATE}",
    "batch_input": f"{ONNX}max_batch_size: 8 {X}{Y}{COUNT % SOURCE}",
    "initialiser": f'backend: "onnxruntime" {ANY_X}{ANY_Y}input {port("START", dims="1, 4")}',
    "by_capability": 'backend: "tensorrt" cc_model_filenames { key: "8.0" value: "a.plan" } '
    + f"{Y}input {port('x', more='is_shape_tensor: true')}",
    "any_platform": f'backend: "mine" platform: "whatever" {X}{Y}',
    "guessed": ANY_X + ANY_Y,
    "newer": f"{PYTHON}model_metrics {{ metric_control {{ metric_identifier {{ }} }} }}",
}

LOADS = f"{ONNX}max_batch_size: 8 {X}{Y}model_operations "
SOUND["strangers_operators"] = f'{LOADS}{{ op_library_filename: "{__file__}" }}'
with suppress(BackendUnavailableError):
    SOUND["operators"] = f'{LOADS}{{ op_library_filename: "{library()}" }}'


def graph(more: str = "", operator: str = "Abs") -> onnx.ModelProto:
    """`x` to `y`, rows of four, where asked with an input `START` of which it may have a value."""
    inputs, value = {
        "": ("", ""),
        "input": (", float[N, 4] START", ""),
        "value": (", float[1, 4] START", "<float[1, 4] START = {0, 0, 0, 0}>"),
    }[more]
    end = "END = Abs(START)" if more else ""
    text = f"g (float[N, 4] x{inputs}) => (float[N, 4] y) {value} {{ y = {operator}(x) {end} }}"
    return model_of(text, imports=', "smoothl1_deploy": 2')


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, triton: Triton) -> Iterator[LintReport]:
    """All of them in one repository, in which whatever is run leaves a file `ran`."""
    root = tmp_path_factory.mktemp("asked")
    models = root / "models"
    ran = f"open({str(root / 'ran')!r}, 'w')\n"
    configs = SOUND | {name: config for name, (config, _) in REFUSED.items()}
    # A name, a version that no int64 holds, and fields that would have a server run something.
    configs[f"$(touch {root.name}-ran)"] = HEAD + X + Y
    configs["too_many"] = HEAD + X + Y
    configs["too_large"] = warmup().replace("dims: [ 4 ] zero", "dims: [ 99999999999 ] zero")
    configs["runs"] = (
        f'backend: "../../mine" {X}{Y}model_repository_agents {{ agents {{ name: "mine" }} }}'
        f'parameters {{ key: "EXECUTION_ENV_PATH" value {{ string_value: "{root}/env.tar.gz" }} }}'
        'model_operations { op_library_filename: "/no/ops.so" } runtime: "libtriton_mine.so"'
    )
    configs["outside"] = steps(step(model="../outside"))
    (root / "outside" / "1").mkdir(parents=True)
    (root / "outside" / "config.pbtxt").write_text(HEAD + X + Y)
    (root / "outside" / "1" / "model.py").write_text(ran)
    for name, config in configs.items():
        version = models / name / ("1" if name != "too_many" else "9" * 20)
        version.mkdir(parents=True)
        (models / name / "config.pbtxt").write_text(config)
        if "ensemble" not in config and name not in ("guessed", "no_platform"):
            (version / "model.py").write_text(ran)
            (version / "libtriton_mine.so").write_bytes(b"\x7fELF")
        (version / "a.plan").write_bytes(b"plan")
    for name in ("control_input", "state", "batch_input"):
        onnx.save(graph("input"), models / name / "1" / "model.onnx")
    onnx.save(graph("value"), models / "initialiser" / "1" / "model.onnx")
    onnx.save(graph(), models / "guessed" / "1" / "model.onnx")
    for name in ("operator", "strangers_operators"):
        onnx.save(graph(operator="Frob"), models / name / "1" / "model.onnx")
    if "operators" in SOUND:  # a node whose body is in the library alone
        model = graph(operator="smoothl1_deploy.SmoothL1Loss<beta = 1.0>")
        model.graph.node[0].input.append("x")
        onnx.save(model, models / "operators" / "1" / "model.onnx")
    (models / "labelled" / "names").write_text("a\nb\n")
    (models / "warm" / "warmup").mkdir()
    (models / "warm" / "warmup" / "rows").write_bytes(bytes(16))
    with pytest.MonkeyPatch.context() as patch:  # others leave theirs in the system's own folder
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
        report = lint(models)
        left = os.listdir(tempfile.gettempdir())
    yield report
    assert not (root / "ran").exists()
    assert not Path(f"{root.name}-ran").exists()
    assert not [name for name in left if name.startswith("smoothl1-deploy")]


def test_each_config_that_triton_refuses_is_found_with_its_words(asked: LintReport) -> None:
    found = {f.model: f.problem for f in asked.findings if f.rule == "refused"}
    missed = {
        name: found.get(name)
        for name, (_, words) in REFUSED.items()
        if words not in found.get(name, "") or not found[name].startswith("Triton says: ")
    }
    assert not missed
    assert asked.note == ""


def test_what_triton_loads_is_refused_for_nothing(asked: LintReport) -> None:
    assert [finding for finding in asked.findings if finding.model in SOUND] == []


def test_a_model_over_which_the_server_crashes_is_told_and_the_others_are_asked(
    asked: LintReport,
) -> None:
    found = {finding.model: finding.problem for finding in asked.findings}
    for name in ("too_many", "too_large"):
        assert found[name].startswith("Triton says: nothing, and crashes or hangs"), name


def test_nothing_of_a_stranger_is_run_or_named_in_a_path(asked: LintReport) -> None:
    """The fixture looks for what a run would have left."""
    found = {finding.model: finding.rule for finding in asked.findings}
    assert not [name for name in found if name.startswith("$(")]
    assert found["runs"] == "operator-library"
    (outside,) = [finding for finding in asked.findings if finding.model == "outside"]
    assert "not available or ambiguous: ../outside" in outside.problem


def test_without_a_server_the_lint_says_what_it_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Triton:
        raise MissingDependencyError("there is no Triton Inference Server")

    monkeypatch.setattr(lint_server, "find_triton", none)
    write_loss(tmp_path, LossSpec(), name="mean")
    report = lint(tmp_path)
    assert report and report.note == "there is no Triton Inference Server"
