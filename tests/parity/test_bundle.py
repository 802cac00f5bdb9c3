"""The bundle: its script shows the difference in a process that can't see this package."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from smoothl1_deploy import LossSpec, export, load, verify
from smoothl1_deploy.backends.base import get_backend
from smoothl1_deploy.errors import ArtefactError, OutputError
from smoothl1_deploy.floats import NUMPY_DTYPE
from smoothl1_deploy.parity.bundle import Bundle, write_bundle
from smoothl1_deploy.parity.cases import Case, CaseResult, References, check
from smoothl1_deploy.parity.matrix import Matrix, run_matrix
from smoothl1_deploy.parity.report import Report

FILES = {"inputs.npz", "artefact.onnx", "repro.py", "environment.json"}


def run(bundle: Bundle, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, in which importing this package fails."""
    guard = tmp_path / "guard" / "smoothl1_deploy"
    guard.mkdir(parents=True, exist_ok=True)
    (guard / "__init__.py").write_text("raise ImportError('the script must not need this')")
    return subprocess.run(
        [sys.executable, str(bundle.folder / "repro.py")],
        capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(guard.parent)},
        timeout=120,
    )  # fmt: skip


def result_of(model: onnx.ModelProto, spec: LossSpec, case: Case, backend: str) -> CaseResult:
    chosen = get_backend(backend, 1)
    return check(chosen.load(model), case, References.of(spec, case), chosen.accumulator)


@pytest.mark.parametrize(
    ("backend", "dtype", "reduction"),
    [
        ("ort-cpu", "float32", "mean"),
        ("ort-cpu", "float64", "none"),
        ("ort-cpu", "bfloat16", "none"),
        ("onnx-reference", "bfloat16", "sum"),
        ("onnx-reference", "float16", "none"),
        ("torch", "float32", "sum"),
    ],
)
def test_the_script_shows_a_planted_fault(
    tmp_path: Path, backend: str, dtype: str, reduction: str
) -> None:
    spec = LossSpec(0.5, reduction, dtype)
    model = export(LossSpec(0.625, reduction, dtype), shape=("N", 16))
    case = Case.of("normal", "matrix", seed=3)
    red = result_of(model, spec, case, backend)
    assert not red.verdict.ok
    bundle = write_bundle(red, model, tmp_path / "case", spec=spec, backend=backend)
    assert bundle.reproduced and set(bundle.files) == FILES
    assert bundle.verdict == red.verdict
    done = run(bundle, tmp_path)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    numbers = re.fullmatch(
        r"loss at \(.*\): got (\S+), PyTorch (\S+), exact (\S+)",
        done.stdout.splitlines()[0],
    )
    assert numbers
    got, torch, exact = map(float, numbers.groups())
    assert got != exact == pytest.approx(torch, rel=1e-2)
    assert f"ULP from the exact value, {red.verdict.allowed} allowed" in done.stdout
    if (backend, dtype) == ("ort-cpu", "float32"):
        script = (bundle.folder / "repro.py").read_text()
        code = ast.parse(script).body[1:]  # less the doc string
        assert (
            len({line for part in code for line in range(part.lineno, part.end_lineno + 1)}) <= 20
        )


def test_the_script_is_content_with_a_right_artefact(tmp_path: Path) -> None:
    spec = LossSpec(0.5, "none")
    model = export(spec)
    green = result_of(model, spec, Case.of("inf-minus-inf", "matrix"), "ort-cpu")
    bundle = write_bundle(green, model, tmp_path / "case")
    assert not bundle.reproduced
    done = run(bundle, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


#: An artefact of the second spec is wrong where the first is meant.
EXTENDED = {
    "per sample": (
        LossSpec(0.5, "sum", per_sample=True), LossSpec(0.625, "sum", per_sample=True)
    ),
    "gradient": (
        LossSpec(0.5, "none", gradient=True), LossSpec(0.625, "none", gradient=True)
    ),
    "gradient alone": (
        LossSpec(0.5, "mean", gradient=True), LossSpec(0.5, "mean", gradient=True)
    ),
    "weight": (LossSpec(0.5, weight="count"), LossSpec(0.625, weight="count")),
    "all": (
        LossSpec(0.5, dtype="bfloat16", per_sample=True, gradient=True, weight="weights"),
        LossSpec(0.625, dtype="bfloat16", per_sample=True, gradient=True, weight="weights"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXTENDED)
@pytest.mark.parametrize("backend", ["ort-cpu", "onnx-reference"])
def test_the_extensions_are_repeated_too(tmp_path: Path, name: str, backend: str) -> None:
    spec, wrong = EXTENDED[name]
    model = export(wrong, shape=("N", 16))
    if name == "gradient alone":
        _spoil_gradient(model)
    found = result_of(model, spec, Case.of("normal", "matrix"), backend)
    assert not found.verdict.ok and found.sample is not None
    done = run(write_bundle(found, model, tmp_path / "x", spec=spec, backend=backend), tmp_path)
    assert done.returncode == 1 and done.stdout.startswith(found.sample.output), done.stderr
    if name == "gradient alone":
        assert found.sample.output == "grad_input"
    right = export(spec, shape=("N", 16))
    green = result_of(right, spec, Case.of("normal", "matrix"), backend)
    done = run(write_bundle(green, right, tmp_path / "y", spec=spec, backend=backend), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def _spoil_gradient(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if "grad_input" in node.output)
    node.output[list(node.output).index("grad_input")] = "right"
    model.graph.node.append(onnx.helper.make_node("Neg", ["right"], ["grad_input"]))
    del model.metadata_props[:]


def test_a_beta_that_is_fed_is_in_the_bundle(tmp_path: Path) -> None:
    matrix = Matrix(
        ("ort-cpu",), betas=(0.1,), dtypes=("float16",), routes=("function",), plain=False,
        quick=True,
    )  # fmt: skip
    (cell,) = run_matrix(matrix).cells
    assert cell.spec.runtime_beta
    bundle = write_bundle(cell, None, tmp_path / "x")
    assert not bundle.reproduced and bundle.verdict is not None
    assert np.load(bundle.folder / "inputs.npz")["beta"] == np.float32(0.1)
    done = run(bundle, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("family", ["nan", "zeros", "overflow"])
def test_a_wrong_class_is_shown_too(tmp_path: Path, family: str) -> None:
    """A graph that swallows NaN, loses infinity and gives -0: 0 * losses, negated."""
    spec = LossSpec(1.0, "none")
    model = export(spec, "inlined", ("N", 16))
    nodes = model.graph.node
    last = next(node for node in nodes if "loss" in node.output)
    last.output[:] = ["raw"]
    zero = onnx.helper.make_tensor("zero", onnx.TensorProto.FLOAT, [], [0.0])
    nodes.append(onnx.helper.make_node("Constant", [], ["zero"], value=zero))
    nodes.append(onnx.helper.make_node("Max", ["raw", "zero"], ["positive"]))
    nodes.append(onnx.helper.make_node("Min", ["positive", "zero"], ["nothing"]))
    nodes.append(onnx.helper.make_node("Neg", ["nothing"], ["loss"]))
    del model.metadata_props[:]
    red = result_of(model, spec, Case.of(family, "matrix"), "ort-cpu")
    assert red.verdict.wrong_class
    done = run(write_bundle(red, model, tmp_path / "case", spec=spec), tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr


def test_what_is_in_the_files(tmp_path: Path) -> None:
    spec = LossSpec(2.0, "none", "bfloat16")
    model = export(spec, shape=("N", 16))
    case = Case.of("boundary", "matrix")
    result = result_of(model, spec, case, "ort-cpu")
    folder = write_bundle(result, model, tmp_path / "case").folder
    stored = np.load(folder / "inputs.npz")
    refs = References.of(spec, case)
    assert set(stored.files) == {"input", "target", "got", "exact"}
    assert stored["input"].dtype == np.uint16
    assert stored["input"].view(NUMPY_DTYPE["bfloat16"]).tobytes() == refs.input.tobytes()
    facts = json.loads((folder / "environment.json").read_text())
    assert facts["spec"] == spec.to_dict()
    assert facts["bfloat16_as"] == "uint16 bits"
    assert facts["arrays"]["input"] == "bfloat16[64, 16]"
    assert facts["case"]["family"] == "boundary"
    assert facts["environment"]["packages"]["torch"]
    assert "# bfloat16 as its uint16 bits" in (folder / "repro.py").read_text()
    again = load(folder / "artefact.onnx").run(refs.input, refs.target)["loss"]
    assert again.tobytes() == stored["got"].tobytes()


def test_a_cell_of_the_matrix_brings_its_own_artefact(red: Report, tmp_path: Path) -> None:
    """The fault was planted in the backend: the artefact itself is found to be right."""
    cell = next(c for c in red.red if (c.beta, c.spec.reduction) == (1.0, "mean"))
    bundle = write_bundle(cell, None, tmp_path / "cell")
    assert not bundle.reproduced
    facts = json.loads((bundle.folder / "environment.json").read_text())
    assert facts["repeat"].endswith("--backend ort-cpu --no-extensions --seed 7 --no-engines")
    assert facts["case"]["ok"] is False and facts["again"]["ok"] is True
    assert run(bundle, tmp_path).returncode == 0


def test_every_layout_of_the_matrix_can_be_bundled(red: Report, tmp_path: Path) -> None:
    cell = next(c for c in red.red if c.beta == 1.0)
    from smoothl1_deploy.parity.cases import LAYOUTS

    for layout in (name for name in LAYOUTS if "^" not in name):
        result = CaseResult(Case.of("normal", layout, 7), cell.failures[0].verdict, {})
        bundle = write_bundle(
            dataclasses.replace(cell, worst=result), None, tmp_path / layout.replace("-", "")
        )
        assert bundle.verdict is not None and bundle.verdict.ok, layout


def test_an_error_instead_of_an_answer(tmp_path: Path) -> None:
    spec = LossSpec(0.5, "none")
    model = export(spec, shape=(7, 3))
    case = Case("normal", "elsewhere", (4, 4), (4, 4))
    refs = References.of(spec, case)
    failed = CaseResult.failed(case, refs, "InvalidInputError: planted")
    for backend in ("ort-cpu", "torch"):
        bundle = write_bundle(failed, model, tmp_path / backend, backend=backend)
        assert bundle.reproduced and bundle.verdict is None
        assert "input has the shape (4, 4)" in bundle.error
        done = run(bundle, tmp_path)
        assert done.returncode == 1
        assert "(4, 4)" in done.stderr or "Got: 4 Expected: 7" in done.stderr


def test_names_in_a_model_can_t_write_code(tmp_path: Path) -> None:
    spec = LossSpec(0.5, "none")
    model = export(spec, shape=("N", 16))
    del model.metadata_props[:]
    evil = '"""\nraise SystemExit("pwned")\n"""'
    for value in model.graph.input:
        value.name = f"{value.name}{evil}"
    for node in model.graph.node:
        node.input[:] = [f"{n}{evil}" if n in ("input", "target") else n for n in node.input]
    case = Case("normal", evil, (64, 16), (64, 16))
    result = result_of(model, spec, case, "ort-cpu")
    assert result.verdict.ok
    done = run(write_bundle(result, model, tmp_path / "case", spec=spec), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pwned" not in done.stdout + done.stderr


def test_a_case_of_verify(tmp_path: Path) -> None:
    model = export(LossSpec(0.5))
    failure = verify(model, spec=LossSpec(0.6)).failures[0]
    bundle = write_bundle(failure, model, tmp_path / "case", spec=LossSpec(0.6))
    assert bundle.reproduced
    assert run(bundle, tmp_path).returncode == 1


def test_what_can_t_be_bundled(red: Report, tmp_path: Path) -> None:
    refused = next(c for c in red.cells if c.refused is not None)
    with pytest.raises(ArtefactError, match="the cell was not run"):
        write_bundle(refused, None, tmp_path / "x")
    cell = red.red[0]
    assert cell.worst is not None
    with pytest.raises(ArtefactError, match="a single case needs the model"):
        write_bundle(cell.worst, None, tmp_path / "x")
    unnamed = export(cell.spec)
    del unnamed.metadata_props[:]
    with pytest.raises(ArtefactError, match=r"does not say what it computes.*spec=LossSpec"):
        write_bundle(cell.worst, unnamed, tmp_path / "x")
    strange = dataclasses.replace(
        cell, worst=dataclasses.replace(cell.worst, case=Case("normal", "64,16", (64, 16), (16,)))
    )
    with pytest.raises(ArtefactError, match="layout '64,16' is not one of the matrix's"):
        write_bundle(strange, None, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(OutputError, match=r"can't make the folder .* parent exists"):
        write_bundle(cell, None, tmp_path / "no" / "such" / "folder")
