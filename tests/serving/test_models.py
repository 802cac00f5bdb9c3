"""`models/`: what is committed is what scripts/export_models writes, and scores as it should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from smoothl1_deploy import LossSpec, load
from smoothl1_deploy.graph.metadata import read_spec
from smoothl1_deploy.parity.certificate import read_certificate
from smoothl1_deploy.reference.oracle import oracle
from smoothl1_deploy.serving.catalogue import AUTOENCODER, LOSSES, write_catalogue
from smoothl1_deploy.serving.certify import certify_model
from smoothl1_deploy.serving.lint import lint

pytest.importorskip("tritonclient", reason="the extra serve")

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "models"
SOURCE = ROOT / "examples" / "digits_autoencoder.onnx"
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
    write_catalogue(folder, SOURCE)
    return folder


def test_what_is_committed_is_what_the_script_writes(anew: Path) -> None:
    written, committed = files(anew), files(MODELS)
    assert list(written) == list(committed)
    different = [path for path, data in written.items() if data != committed[path]]
    assert different == [], "run scripts/export_models and commit models/"


def test_each_model_has_its_config_and_its_file() -> None:
    expected = {f"{name}/{file}" for name in NAMES for file in ("config.pbtxt", "1/model.onnx")}
    assert set(files(MODELS)) == expected


@pytest.mark.parametrize("name", NAMES)
def test_the_certificate_is_of_this_file_and_green(name: str) -> None:
    status = read_certificate(MODELS / name / "1" / "model.onnx")
    assert status.state == "matches", f"{status.message}; run scripts/export_models"
    if name in LOSSES:
        assert status.content["spec"] == LOSSES[name].to_dict()
        assert read_spec(onnx.load(MODELS / name / "1" / "model.onnx")) == LOSSES[name]
    else:
        assert status.content["graph"] == "digits_autoencoder: the loss score"


def test_the_catalogue_is_clean() -> None:
    report = lint(MODELS)
    assert report.findings == () and set(report.models) == set(NAMES)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_the_catalogue_is_the_loss(name: str) -> None:
    x, t = np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)
    spec, beta = LOSSES[name], 0.5 if LOSSES[name].runtime_beta else None
    loss = load(MODELS / name / "1" / "model.onnx").run(x, t, beta=beta)["loss"]
    spec = spec if beta is None else LossSpec(beta, spec.reduction)
    np.testing.assert_allclose(loss, oracle(spec, x, t), rtol=2e-7)


def test_the_score_of_a_digit_is_the_loss_of_its_reconstruction() -> None:
    digits = np.random.default_rng(0).uniform(size=(3, 64)).astype(np.float32)

    def run(path: Path) -> np.ndarray:
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        return session.run(None, {"digits": digits})[0]  # type: ignore[no-any-return]

    difference = run(SOURCE).astype(np.float64) - digits
    core = np.clip(difference, -0.1, 0.1)
    loss = np.abs(difference - core) + 0.5 * core * core / 0.1
    score = run(MODELS / AUTOENCODER / "1" / "model.onnx")
    assert score.shape == (3, 1)
    np.testing.assert_allclose(score[:, 0], loss.mean(axis=1), rtol=1e-5)


def test_the_score_tells_digits_from_noise() -> None:
    data = pytest.importorskip("sklearn.datasets").load_digits().data
    digits = (data / 16).astype(np.float32)
    noise = np.random.default_rng(0).permuted(digits, axis=1)
    session = ort.InferenceSession(MODELS / AUTOENCODER / "1" / "model.onnx")
    own, other = (session.run(None, {"digits": x})[0][:, 0] for x in (digits, noise))
    assert np.quantile(own, 0.99) < np.quantile(other, 0.01)


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
