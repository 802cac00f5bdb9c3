"""The model that the lint has Triton run in the place of a stranger's code, to check the config.

This file runs inside Triton's stub process, where this package need not be importable. An ONNX
file beside it is loaded by ONNX Runtime, and never asked anything.
"""

from __future__ import annotations

import importlib
import json
import os
from typing import Any


class TritonPythonModel:
    """One instance of a model; Triton calls the class and the methods by these names."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Load the ONNX file, if there is one."""
        path = os.path.join(args["model_repository"], str(args["model_version"]), "model.onnx")
        if os.path.exists(path):
            ort = importlib.import_module("onnxruntime")
            options = ort.SessionOptions()
            options.log_severity_level = 4
            # This is the mirror's config, which names no library but ours.
            config = json.loads(args["model_config"])
            for library in config.get("model_operations", {}).get("op_library_filename", []):
                options.register_custom_ops_library(library)
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer a warm-up, the only request that comes: a server crashes over one that fails."""
        pb = importlib.import_module("triton_python_backend_utils")
        return [pb.InferenceResponse([]) for _ in requests]
