"""Certificates: green, red, absent, stale, damaged; never green for what was not verified."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.numpy_helper
import pytest

from smoothl1_deploy import LossSpec, __version__, export, ops, verify
from smoothl1_deploy.errors import ArtefactError, BackendUnavailableError, ModelWarning, OutputError
from smoothl1_deploy.parity._certificate import (
    CertificateStatus,
    _content_hash,
    certificate_path,
    certify,
    read_certificate,
)
from smoothl1_deploy.parity._families import FAMILIES
from smoothl1_deploy.parity._verify import Verification

SPEC = LossSpec(0.5)


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    path = tmp_path / "loss.onnx"
    onnx.save(export(SPEC, shape=("N",)), path)
    return path


@pytest.fixture(scope="module")
def green() -> Verification:
    return verify(export(SPEC, shape=("N",)), seed=7)


@pytest.fixture(scope="module")
def red() -> Verification:
    return verify(export(SPEC, shape=("N",)), spec=LossSpec(0.6), drift=False)


def strict(path: Path) -> dict[str, object]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert isinstance(content, dict)
    return content


def test_a_green_certificate_holds_what_was_found(artefact: Path, green: Verification) -> None:
    path = certify(green, artefact)
    assert path == certificate_path(artefact) == artefact.with_name("loss.onnx.certificate.json")
    content = strict(path)
    assert content["verdict"] == "green"
    assert content["artefact"] == {
        "file": "loss.onnx",
        "sha256": hashlib.sha256(artefact.read_bytes()).hexdigest(),
        "bytes": artefact.stat().st_size,
    }
    assert LossSpec.from_dict(content["spec"]) == SPEC  # type: ignore[arg-type]
    assert content["families"] == list(FAMILIES)
    assert content["seeds"] == [7]
    assert content["backend"] == "ort-cpu"
    assert content["tool"] == {"name": "smoothl1-deploy", "version": __version__}
    assert content["cases"] == len(green.results) + len(green.drift) and not content["red_cases"]
    assert len(content["worst"]) == 5 and len(content["drift"]) == 12  # type: ignore[arg-type]
    assert content["environment"]["packages"]["onnxruntime"]  # type: ignore[index]
    status = read_certificate(artefact)
    assert status and status.state == "matches"
    message = f"{content['cases']} cases green on {content['date']}, measured on samples"
    assert status.message == message and content["certainty"] == "measured on samples"
    assert status.to_dict()["verdict"] == "green" and status.content["seeds"] == [7]


def test_a_certificate_from_before_the_word_is_read_as_what_it_was(
    artefact: Path, green: Verification
) -> None:
    path = certify(green, artefact)
    content = {name: value for name, value in strict(path).items() if name != "certainty"}
    content["content_sha256"] = _content_hash(content)
    path.write_text(json.dumps(content))
    status = read_certificate(artefact)
    assert status and status.message.endswith(", measured on samples")


def test_a_certificate_by_the_operators_says_of_which_library(artefact: Path) -> None:
    try:
        built = ops.library()
    except BackendUnavailableError as exc:
        pytest.skip(str(exc))
    content = strict(certify(verify(artefact, drift=False), artefact))
    assert content["backend"] == "ort-cpu"
    digest = hashlib.sha256(built.read_bytes()).hexdigest()
    assert content["environment"]["operators"] == digest  # type: ignore[index]


def test_a_red_certificate_says_so(artefact: Path, red: Verification) -> None:
    content = strict(certify(red, artefact))
    assert content["verdict"] == "red" and content["red_cases"]
    assert content["worst"][0]["ok"] is False  # type: ignore[index]
    assert content["diagnoses"][0]["fault"] == "wrong beta"  # type: ignore[index]
    status = read_certificate(artefact)
    assert not status and status.state == "red"
    assert "cases were red" in status.message


def test_an_infinite_beta_and_nan_evidence_are_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "loss.onnx"
    model = export(LossSpec(float("inf")), shape=("N",))
    onnx.save(model, path)
    strict(certify(verify(model, drift=False), path))
    strict(certify(verify(model, spec=LossSpec(1.0), drift=False), path))


def test_absent_and_stale(artefact: Path, green: Verification) -> None:
    status = read_certificate(artefact)
    assert not status and status.state == "absent"
    assert "verify --certificate" in status.message
    certify(green, artefact)
    onnx.save(export(LossSpec(0.25), shape=("N",)), artefact)
    status = read_certificate(artefact)
    assert not status and status.state == "stale"
    assert "changed since it was certified on" in status.message


def without_artefact(text: str) -> str:
    content = json.loads(text)
    del content["artefact"]
    return json.dumps(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-40], "can't be read"),
        (without_artefact, "can't be read"),
        (lambda text: "[1, 2]", "can't be read"),
        (lambda text: "\xff\xfe\x00", "can't be read"),
        (lambda text: text.replace('"verdict": "red"', '"verdict": "green"'), "was edited"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "another version's"),
    ],
)
def test_damaged(
    artefact: Path, red: Verification, damage: Callable[[str], str], message: str
) -> None:
    path = certify(red, artefact)
    path.write_text(damage(path.read_text()), encoding="latin-1")
    status = read_certificate(artefact)
    assert not status and status.state == "damaged"
    assert message in status.message
    assert isinstance(status, CertificateStatus) and not status.content


def test_a_file_that_was_not_verified_is_not_certified(tmp_path: Path, green: Verification) -> None:
    path = tmp_path / "other.onnx"
    onnx.save(export(LossSpec(0.25), shape=("N",)), path)
    with pytest.raises(ArtefactError, match="is not the model that was verified"):
        certify(green, path)
    assert not certificate_path(path).exists()


def test_weights_in_another_file_are_certified_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch.onnx.export writes every model that has some."""
    model = export(SPEC, shape=("N",))
    tensor = onnx.numpy_helper.from_array(np.zeros(2000, np.float32), "big")
    model.graph.initializer.append(tensor)
    path = tmp_path / "loss.onnx"
    onnx.save_model(
        model, path, save_as_external_data=True, location="loss.onnx.data", size_threshold=0
    )
    with pytest.warns(ModelWarning, match="changed by something else"):  # the tensor was added
        found = verify(path, drift=False)
    certify(found, path)
    assert read_certificate(path).state == "matches"

    def refuse(*given: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("smoothl1_deploy.parity._certificate.open", refuse, raising=False)
        assert read_certificate(path).state == "stale"
    weights = tmp_path / "loss.onnx.data"
    weights.write_bytes(b"\x01" + weights.read_bytes()[1:])
    assert read_certificate(path).state == "stale"
    weights.unlink()
    assert read_certificate(path).state == "stale"


def test_a_missing_artefact(tmp_path: Path, green: Verification) -> None:
    for call in (lambda p: certify(green, p), read_certificate):
        with pytest.raises(ArtefactError, match=r"can't read the artefact .*No such file"):
            call(tmp_path / "none.onnx")


def test_a_folder_that_can_t_be_written_leaves_nothing(
    artefact: Path, green: Verification, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("smoothl1_deploy._files.os.replace", refuse)
    with pytest.raises(OutputError, match=r"can't write .*certificate\.json"):
        certify(green, artefact)
    assert list(artefact.parent.iterdir()) == [artefact]
