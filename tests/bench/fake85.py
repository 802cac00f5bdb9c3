"""The other end of `bench/tensorrt85/engine.py` without TensorRT: ONNX Runtime in its place.

It refuses what TensorRT 8.5's parser refuses, and ends where it is asked to build `b"end"`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench.tensorrt85 import worker


class Engines:
    """Sessions as engines."""

    def __init__(self) -> None:
        print("a library prints where the answers go")
        self._sessions: list[Any] = []

    def build(self, model: bytes, profile: Any, half: bool = False) -> Any:
        if model == b"end":
            os._exit(3)
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        if "float16" in session.get_inputs()[0].type and not half:
            raise ValueError("no engine: inputs of float16")
        assert {port.name for port in session.get_inputs()} >= set(profile)
        self._sessions.append(session)
        return {"engine": len(self._sessions) - 1, "said": [f"half={half}"]}, (model,)

    def run(self, *arrays: bytes, engine: int, inputs: Any, repeats: int = 0) -> Any:
        session = self._sessions[engine]
        dtypes = {port.name: port.type for port in session.get_inputs()}
        feeds = {}
        for (name, shape), data in zip(inputs, arrays, strict=True):
            dtype = np.float16 if "float16" in dtypes[name] else np.float32
            feeds[name] = np.frombuffer(data, dtype).reshape(shape)
        made = session.run(None, feeds)
        ports = [
            (port.name, array.dtype.name, array.shape)
            for port, array in zip(session.get_outputs(), made, strict=True)
        ]
        return {"outputs": ports, "milliseconds": 1.0 * repeats}, [a.tobytes() for a in made]

    def copy(self, size: int, repeats: int) -> Any:
        return {"milliseconds": float(size > 0)}, ()


if __name__ == "__main__":
    worker.serve(Engines)
