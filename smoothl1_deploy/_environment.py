"""What this machine runs: versions and hardware, for reports and `doctor`; and the telemetry of
ONNX Runtime, which processes of ours turn off.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import os
import platform
import re
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from . import __version__

#: From 1.29 on, and not on Windows, ONNX Runtime writes a device id and a queue of events below the
#: user's cache folder when it is imported, and sends them, unless this says no; its function
#: disable_telemetry_events comes too late (microsoft/onnxruntime#27379).
TELEMETRY = "ORT_DISABLE_TELEMETRY"
_silenced = False  # whether we turned it off, and not the user

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


def silence() -> None:
    """Turn ONNX Runtime's telemetry off in a process that is ours, if the user hasn't said a word.

    Before ONNX Runtime is imported; the processes that this one starts inherit it.
    """
    global _silenced
    if TELEMETRY not in os.environ:
        os.environ[TELEMETRY], _silenced = "1", True


def telemetry() -> dict[str, bool] | None:
    """Whether ONNX Runtime's telemetry is on in this `process`, and in the user's `own_sessions`.

    None where no ONNX Runtime is installed.
    """
    if not (version_of("onnxruntime") or version_of("onnxruntime-gpu")):
        return None
    here = os.environ.get(TELEMETRY, "").lower() not in ("1", "true", "yes", "on")
    return {"process": here, "own_sessions": here or _silenced}


def version_of(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    import importlib.metadata

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """Versions (of a package that is not installed: None) and hardware.

    `operators` is the sha256 of the library of `ops`; None where it was not built.
    """
    from .ops import digest

    return {
        "smoothl1_deploy": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "operators": digest(),
        "packages": {package: version_of(package) for package in PACKAGES},
    }


def now() -> str:
    """The date and the time, ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def lowest_versions() -> dict[str, str]:
    """The lowest versions of `PACKAGES` that the tests pass with, as pyproject.toml requires them.

    Empty where this package runs from a folder that was not installed.
    """
    import importlib.metadata

    try:
        wanted = importlib.metadata.requires("smoothl1-deploy") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"([\w.-]+)(?:\[.*\])?>=([\d.]+)", text) for text in wanted)
    lowest = {m[1].replace("-", "_"): m[2] for m in found if m}
    names = {package: package.replace("-", "_") for package in PACKAGES}
    return {package: lowest[name] for package, name in names.items() if name in lowest}


def docstring(function: Callable[..., Any]) -> str:
    """What `function` says of itself to a user, which `python -OO` leaves in its source alone."""
    if function.__doc__ is None:
        with contextlib.suppress(OSError):
            (read,) = ast.parse(inspect.getsource(function)).body
            assert isinstance(read, ast.FunctionDef)
            return ast.get_docstring(read) or ""
    return inspect.getdoc(function) or ""
