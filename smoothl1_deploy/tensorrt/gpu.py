"""Which GPU and driver an engine is built with: they go into its sidecar and its cache key."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Gpu", "current_gpu", "has_driver"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """Name, compute capability (`"8.6"`) and driver version of a GPU, as nvidia-smi gives them."""

    name: str
    compute_capability: str
    driver: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@functools.cache
def current_gpu() -> Gpu | None:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves visible; None without one.

    Asks nvidia-smi, once a process: it comes with the driver, and asking CUDA itself would take
    a context on the GPU for a line in a file.
    """
    program = shutil.which("nvidia-smi")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if program is None or visible in ("", "-1"):
        return None
    query = "--query-gpu=name,compute_cap,driver_version"
    try:
        answer = subprocess.run(
            [program, query, "--format=csv,noheader", f"--id={visible}"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
        name, capability, driver = (part.strip() for part in answer.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None  # a driver that is not running answers with an error: no GPU to build with
    return Gpu(name, capability, driver)


def has_driver() -> bool:
    """Whether CUDA's driver can be loaded, without which no GPU can be used."""
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True
