"""TensorRT 8.5.3.1 as a backend: `parity --backend bench.tensorrt85.engine:Tensorrt85`.

Real engines of real kernels, where a GPU is that they run on; `pack.py` says how the process that
runs them is had, and the environment variable TENSORRT85 where it lies. What 8.5 can't carry out is
refused: bfloat16 and float64, which it doesn't have, and gradients, whose `IsInf` its parser lacks.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bench.tensorrt85 import worker
from smoothl1_deploy import LossSpec, Runner
from smoothl1_deploy._floats import Array
from smoothl1_deploy._model import inlined
from smoothl1_deploy.backends import Backend
from smoothl1_deploy.errors import BackendUnavailableError, UnsupportedError
from smoothl1_deploy.tensorrt._prepare import prepare
from smoothl1_deploy.tensorrt._profile import input_shapes, wide_profile

IR_VERSION = 8  # of ONNX 1.10 to 1.12: what was current when this parser was made


def unpacked() -> tuple[list[str], dict[str, str]]:
    """The command and the environment of the worker.

    Raises:
        BackendUnavailableError: where TENSORRT85 doesn't name a folder with one.
    """
    folder = Path(os.environ.get("TENSORRT85", ""))
    python = folder / "bin" / "python3.10"
    if not python.is_file():
        raise BackendUnavailableError(
            "TensorRT 8.5 is not unpacked here: the environment variable TENSORRT85 has to name "
            "the folder that bench/pack.py fills"
        )
    paths = {"PYTHONHOME": folder, "PYTHONPATH": folder / "site", "LD_LIBRARY_PATH": folder / "lib"}
    settings = {"CUDA_MODULE_LOADING": "LAZY", **{name: str(path) for name, path in paths.items()}}
    return [str(python), "-S", worker.__file__], {**os.environ, **settings}


class Worker:
    """A process that builds and runs engines; it ends with this one, whose pipe it reads.

    Args:
        command: what to start.
        environment: for it; None for this process's.
    """

    def __init__(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        self._guard = threading.Lock()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def ask(self, do: str, *buffers: Any, **request: Any) -> tuple[dict[str, Any], list[bytes]]:
        """The answer to one request.

        Raises:
            UnsupportedError: with what the worker tells of an error.
            BackendUnavailableError: where the worker has ended.
        """
        with self._guard:
            try:
                worker.send(self._process.stdin, {"do": do, **request}, *buffers)
                answer, made = worker.receive(self._process.stdout)
            except BrokenPipeError:
                answer, made = None, []
        if answer is None:
            raise BackendUnavailableError(
                f"the process with TensorRT 8.5 ended at {do!r} (exit code {self._process.wait()})"
            )
        if "error" in answer:
            raise UnsupportedError(answer["error"])
        return answer, made


class EngineRunner(Runner):
    """One engine of the worker.

    Attributes:
        said: TensorRT's warnings at its build.
        data: the bytes of the engine.
    """

    def __init__(self, model: onnx.ModelProto, asked: Worker) -> None:
        super().__init__(model)
        self._asked = asked
        made = inlined(prepare(model)[0])
        made.ir_version = IR_VERSION
        profile = wide_profile(input_shapes(made))
        content = made.SerializeToString()
        try:
            answer, (self.data,) = asked.ask("build", content, profile=profile)
        except UnsupportedError:
            if self.signature.input.dtype != "float16":
                raise
            answer, (self.data,) = asked.ask("build", content, profile=profile, half=True)
        self._engine, self.said = answer["engine"], answer["said"]

    def _execute(self, feeds: dict[str, Array], shape: tuple[int, ...]) -> dict[str, Array]:
        return self.measure(feeds)[0]

    def measure(
        self, feeds: Mapping[str, Array], repeats: int = 0
    ) -> tuple[dict[str, Array], float]:
        """The outputs for arrays by role, and the milliseconds of one of `repeats` calls."""
        arrays = {self.signature.inputs[role].name: array for role, array in feeds.items()}
        answer, made = self._asked.ask(
            "run",
            *(array.tobytes() for array in arrays.values()),
            engine=self._engine,
            inputs=[(name, array.shape) for name, array in arrays.items()],
            repeats=repeats,
        )
        outputs = {
            name: np.frombuffer(data, dtype).reshape(shape)
            for (name, dtype, shape), data in zip(answer["outputs"], made, strict=True)
        }
        return outputs, answer.get("milliseconds", 0.0)


@cache
def _worker() -> Worker:
    """The one worker of this process: a CUDA context takes seconds and half a gigabyte."""
    return Worker(*unpacked())


class Tensorrt85(Backend):
    """TensorRT 8.5.3.1 on this machine's GPU.

    Raises:
        BackendUnavailableError: where it is not unpacked.
    """

    name = "tensorrt-8.5"
    any_rank = False
    accumulator = "float32"
    layouts = ("matrix", "no-rows", "2^20", "2^24")  # one engine a loss: a build takes seconds

    def __init__(self) -> None:
        self.worker = _worker()

    def refuses(self, spec: LossSpec) -> str | None:
        """Dtypes that it doesn't have, and gradients."""
        if spec.dtype in ("bfloat16", "float64"):
            return f"TensorRT 8.5 has no {spec.dtype}"
        return "TensorRT 8.5 has no IsInf, which a gradient needs" if spec.gradient else None

    def load(self, model: onnx.ModelProto) -> EngineRunner:
        """Build the engine of `model`.

        Raises:
            UnsupportedError: with the reason of the parser, the builder or the runtime.
        """
        return EngineRunner(model, self.worker)
