"""`models/`: what is committed is what scripts/export_models writes, and scores as it should."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import onnx
import pytest
from handmade import run
from onnx import numpy_helper

from smoothl1_deploy.graph._metadata import read_spec
from smoothl1_deploy.parity._certificate import read_certificate
from smoothl1_deploy.serving._lint import lint
from smoothl1_deploy.serving._repository import certify_model

pytest.importorskip("tritonclient", reason="the extra serve")

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "models"
CATALOGUE = runpy.run_path(str(ROOT / "examples" / "catalogue.py"))
AUTOENCODER, LOSSES, SOURCE = (CATALOGUE[name] for name in ("AUTOENCODER", "LOSSES", "SOURCE"))
NAMES = [*LOSSES, AUTOENCODER]


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".certificate.json")
    }


@pytest.fixture(scope="module")
def anew(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalogue") / "models"
    CATALOGUE["write_catalogue"](folder)
    return folder


def test_what_is_committed_is_what_the_script_writes(anew: Path) -> None:
    written, committed = files(anew), files(MODELS)
    assert {*written} == {f"{n}/{file}" for n in NAMES for file in ("config.pbtxt", "1/model.onnx")}
    assert list(written) == list(committed)
    different = [path for path, data in written.items() if data != committed[path]]
    assert different == [], "run scripts/export_models and commit models/"


def test_each_certificate_is_of_its_file_and_green() -> None:
    for name in NAMES:
        file = MODELS / name / "1" / "model.onnx"
        status = read_certificate(file)
        assert status.state == "matches", f"{status.message}; run scripts/export_models"
        if name in LOSSES:
            assert status.content["spec"] == LOSSES[name].to_dict()
            assert read_spec(onnx.load(file)) == LOSSES[name]
        else:
            assert status.content["graph"] == "digits_autoencoder: the loss score"


def test_the_catalogue_is_clean() -> None:
    report = lint(MODELS)
    assert report.findings == () and set(report.models) == set(NAMES)


def test_the_score_of_a_digit_is_the_loss_of_its_reconstruction() -> None:
    digits = np.random.default_rng(0).uniform(size=(3, 64)).astype(np.float32)
    (made,) = run(SOURCE, {"digits": digits}).values()
    difference = made.astype(np.float64) - digits
    core = np.clip(difference, -0.1, 0.1)
    loss = np.abs(difference - core) + 0.5 * core * core / 0.1
    score, *_ = run(MODELS / AUTOENCODER / "1" / "model.onnx", {"digits": digits}).values()
    assert score.shape == (3, 1)
    np.testing.assert_allclose(score[:, 0], loss.mean(axis=1), rtol=1e-5)


def test_a_wrong_loss_gets_a_red_certificate(anew: Path, tmp_path: Path) -> None:
    model = onnx.load(anew / AUTOENCODER / "1" / "model.onnx")
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if numpy_helper.to_array(attribute.t).tolist() == float(np.float32(0.1)):
                attribute.t.CopyFrom(numpy_helper.from_array(np.float32(0.2)))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    found, _ = certify_model(path, drift=False)
    assert not found and found.diagnoses
    assert read_certificate(path).state == "red"
