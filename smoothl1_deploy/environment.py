"""What this machine runs: versions and hardware, for reports and `doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from functools import lru_cache
from typing import Any

from . import __version__

__all__ = ["environment", "lowest_versions"]

PACKAGES = (
    "numpy",
    "ml_dtypes",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-ep-nv-tensorrt-rtx",
    "torch",
    "triton",
    "tensorrt",
    "tensorrt_rtx_cu13",
)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """Versions (of a package that is not installed: None) and hardware."""
    return {
        "smoothl1_deploy": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "packages": {package: _version(package) for package in PACKAGES},
    }


def lowest_versions() -> dict[str, str]:
    """The lowest versions of `PACKAGES` that the tests pass with, as pyproject.toml requires them.

    Empty where this package runs from a folder that was not installed.
    """
    try:
        wanted = importlib.metadata.requires("smoothl1-deploy") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"([\w.-]+)(?:\[.*\])?>=([\d.]+)", text) for text in wanted)
    lowest = {m[1].replace("-", "_"): m[2] for m in found if m}
    names = {package: package.replace("-", "_") for package in PACKAGES}
    return {package: lowest[name] for package, name in names.items() if name in lowest}
