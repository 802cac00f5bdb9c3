"""What `lint_server` has Triton run in the place of a stranger's code, to check the config alone.

It runs inside Triton's stub process, where this package need not be importable. An ONNX file beside
it is loaded by ONNX Runtime, and never asked anything.
"""

from __future__ import annotations

import importlib
import json
import os
from typing import Any


class TritonPythonModel:
    """One instance of a model; the names of class and methods are those Triton calls."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Load the ONNX file, where there is one."""
        path = os.path.join(args["model_repository"], str(args["model_version"]), "model.onnx")
        if os.path.exists(path):
            ort = importlib.import_module("onnxruntime")
            options = ort.SessionOptions()
            options.log_severity_level = 4
            # The config is that of the mirror, which names no library but ours.
            config = json.loads(args["model_config"])
            for library in config.get("model_operations", {}).get("op_library_filename", []):
                options.register_custom_ops_library(library)
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer a warm-up, which is all that comes here: a server crashes over one that fails."""
        pb = importlib.import_module("triton_python_backend_utils")
        return [pb.InferenceResponse([]) for _ in requests]
