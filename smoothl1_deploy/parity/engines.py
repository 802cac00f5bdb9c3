"""Engines of the matrix: every artefact TensorRT can hold is built, with its sidecar."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import onnx

from ..errors import SmoothL1DeployError, UnsupportedError
from ..spec import LossSpec
from .report import Build

__all__ = ["build_engines"]


def build_engines(
    spec: LossSpec, models: Mapping[str, onnx.ModelProto], folder: Path, flavour: str
) -> list[Build]:
    """Build one engine a route into `folder`; a refusal is a result, a failure a red one."""
    from ..tensorrt.builder import build_engine

    builds = []
    for route, model in models.items():
        started = time.perf_counter()
        path = folder / f"{model.graph.name}.engine"
        try:
            engine = build_engine(model, path, flavour=flavour)
        except UnsupportedError as exc:
            builds.append(Build(spec, route, flavour, refused=str(exc)))
        except SmoothL1DeployError as exc:
            builds.append(Build(spec, route, flavour, error=f"{type(exc).__name__}: {exc}"))
        else:
            assert engine.sidecar is not None  # built just now
            seconds = time.perf_counter() - started
            size = path.stat().st_size
            builds.append(Build(spec, route, engine.sidecar.flavour, seconds, size))
    return builds
