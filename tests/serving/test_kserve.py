"""The InferenceService file: held against the fields that KServe's v1beta1 API publishes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from smoothl1_deploy.errors import OutputError, SpecError
from smoothl1_deploy.serving.kserve import inference_service, write_inference_service

yaml = pytest.importorskip("yaml", reason="the extra serve")

# Written from the v1beta1 Go types of kserve/kserve and the checks of its webhook.
SCHEMA = json.loads(Path(__file__).with_name("inference_service.schema.json").read_text())


@pytest.fixture
def service() -> dict[str, Any]:
    return inference_service("smooth-l1", "pvc://models/smooth_l1")


def valid(document: Any) -> bool:
    return jsonschema.Draft202012Validator(SCHEMA).is_valid(document)  # type: ignore[no-any-return]


@pytest.mark.parametrize("arguments", [{}, {"gpus": 1, "protocol": "grpc-v2", "replicas": (2, 2)}])
def test_the_file_passes_the_schema(tmp_path: Path, arguments: dict[str, Any]) -> None:
    written = inference_service("smooth-l1", "s3://bucket/models", **arguments)
    path = write_inference_service(tmp_path / "isvc.yaml", written)
    read = yaml.safe_load(path.read_text())
    assert read == written
    jsonschema.validate(read, SCHEMA)
    limits = read["spec"]["predictor"]["model"]["resources"]["limits"]
    assert ("nvidia.com/gpu" in limits) == bool(arguments)


def test_what_a_cluster_needs_is_in_it(service: dict[str, Any]) -> None:
    model = service["spec"]["predictor"]["model"]
    assert model["runtimeVersion"] == "25.07-py3"  # the runtime's own default is older
    assert (model["runtime"], model["protocolVersion"]) == ("kserve-tritonserver", "v2")
    assert service["metadata"]["annotations"] == {
        "serving.kserve.io/deploymentMode": "Standard",
        "serving.kserve.io/autoscalerClass": "hpa",
    }


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("apiVersion",), "serving.kserve.io/v1alpha1"),
        (("metadata", "name"), "Smooth_L1"),
        (("spec", "predictor", "scaleMetric"), "gpu"),
        (("spec", "predictor", "minReplicas"), "1"),
        (("spec", "predictor", "model", "runtimeversion"), "25.07-py3"),
        (("spec", "predictor", "model", "modelFormat"), "triton"),
        (("spec", "predictor", "model", "protocolVersion"), "v3"),
        (("spec", "predictor", "model", "resources", "limits", "cpu"), 2),
    ],
)
def test_the_schema_refuses(service: dict[str, Any], place: tuple[str, ...], value: object) -> None:
    assert valid(service)
    broken = copy.deepcopy(service)
    inner = broken
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    assert not valid(broken)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "smooth_l1"}, r"'smooth_l1' can't be the name of an InferenceService; use lower"),
        ({"name": "a" * 64}, "63 characters at most"),
        ({"storage_uri": "models"}, "the storage URI 'models' has no scheme; write where"),
        ({"protocol": "v1"}, "unknown protocol 'v1'; choose one of v2, grpc-v2"),
        ({"replicas": (3, 2)}, "replicas 3 to 2 make no sense"),
        ({"replicas": (0, 2)}, "replicas 0 to 2 make no sense"),
    ],
)
def test_what_kserve_would_refuse(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        inference_service(**{"name": "smooth-l1", "storage_uri": "pvc://models/x", **arguments})


def test_a_file_that_cant_be_written(tmp_path: Path, service: dict[str, Any]) -> None:
    with pytest.raises(OutputError, match="can't write"):
        write_inference_service(tmp_path / "none" / "isvc.yaml", service)
