"""A KServe `InferenceService` for a model repository: Triton on a cluster, scaled by load.

Source of the fields: the v1beta1 types and the webhook's checks of kserve/kserve,
`pkg/apis/serving/v1beta1`. The file passes a schema of these fields; it was never applied to a
cluster by this package's authors.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..artefact import write_atomic
from ..errors import SpecError, require

__all__ = ["PROTOCOLS", "RUNTIME_VERSION", "inference_service", "write_inference_service"]

#: Tag of the Triton container. The runtime that KServe ships names 23.05; before 25.07 Triton has
#: CVE-2025-23319.
RUNTIME_VERSION = "25.07-py3"

PROTOCOLS = ("v2", "grpc-v2")

_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_URI = re.compile(r"[a-z][a-z0-9+.-]*://\S+")
_CPU_TARGET = 80  # per cent of the requested CPU above which a replica is added


def inference_service(
    name: str,
    storage_uri: str,
    *,
    runtime_version: str = RUNTIME_VERSION,
    protocol: str = "v2",
    replicas: tuple[int, int] = (1, 4),
    gpus: int = 0,
) -> dict[str, Any]:
    """The `InferenceService` that serves a whole repository.

    Args:
        name: lower-case letters, digits and `-`, a letter first; 63 characters at most.
        storage_uri: where the cluster finds the repository, as in `pvc://models/smooth_l1`.
        runtime_version: tag of the Triton container.
        protocol: `"v2"` (HTTP) or `"grpc-v2"`.
        replicas: the least and the most.
        gpus: for each replica; TensorRT plans need one.

    Raises:
        SpecError: on values that KServe would refuse.
    """
    if not _NAME.fullmatch(name) or len(name) > 63:
        raise SpecError(
            f"{name!r} can't be the name of an InferenceService; use lower-case letters, digits "
            "and '-', a letter first, 63 characters at most"
        )
    if not _URI.fullmatch(storage_uri):
        raise SpecError(
            f"the storage URI {storage_uri!r} has no scheme; write where the cluster finds the "
            "repository, as in pvc://CLAIM/FOLDER or s3://BUCKET/FOLDER"
        )
    if protocol not in PROTOCOLS:
        raise SpecError(f"unknown protocol {protocol!r}; choose one of {', '.join(PROTOCOLS)}")
    least, most = replicas
    if not 1 <= least <= most:
        raise SpecError(
            f"replicas {least} to {most} make no sense; at least 1, and no more than the most"
        )
    limits = {"cpu": "2", "memory": "4Gi", **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": name,
            "annotations": {
                "serving.kserve.io/deploymentMode": "Standard",
                "serving.kserve.io/autoscalerClass": "hpa",
            },
        },
        "spec": {
            "predictor": {
                "minReplicas": least,
                "maxReplicas": most,
                "scaleMetric": "cpu",
                "scaleTarget": _CPU_TARGET,
                "model": {
                    "modelFormat": {"name": "triton"},
                    "runtime": "kserve-tritonserver",
                    "runtimeVersion": runtime_version,
                    "protocolVersion": protocol,
                    "storageUri": storage_uri,
                    # The autoscaler measures use against what is requested.
                    "resources": {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": limits},
                },
            }
        },
    }


def write_inference_service(path: str | os.PathLike[str], service: dict[str, Any]) -> Path:
    """Write an `InferenceService` as YAML.

    Raises:
        OutputError: when the file can't be written.
        MissingDependencyError: without pyyaml.
    """
    yaml = require("yaml", "serve", "the InferenceService file")
    text: str = yaml.safe_dump(service, sort_keys=False)
    return write_atomic(path, text.encode())
