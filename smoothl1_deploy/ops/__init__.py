"""The loss as operators of ONNX Runtime: one pass over the inputs, in anyone's session.

A file of the route `function` is one node of the domain `smoothl1_deploy` and carries its body.
Where this library is registered, ONNX Runtime runs its kernel of that name instead; everywhere else
the body runs, as it always did. `c/` says what the kernels promise. A second library has
operators for ONNX Runtime's CUDA provider.
"""

from __future__ import annotations

import ctypes
import filecmp
import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import BackendUnavailableError, UnsupportedError

__all__ = ["digest", "is_built", "is_library", "library", "operators", "register"]

_REGISTERED = "smoothl1_deploy.ops"
#: The library, where setup.py puts it; beside this file, Python would take it for a module.
_LIBRARY = Path(__file__).parent / "c" / "libsmoothl1_deploy.so"


def _path(provider: str) -> Path:
    if provider not in ("cpu", "cuda"):
        raise UnsupportedError(
            f"there are no operators for the provider {provider!r}; choose 'cpu' or 'cuda'"
        )
    return _LIBRARY if provider == "cpu" else _LIBRARY.with_name("libsmoothl1_deploy_cuda.so")


def is_built(provider: str = "cpu") -> bool:
    """Whether this installation has the library.

    >>> is_built()
    True
    """
    return _path(provider).is_file()


def library(provider: str = "cpu") -> Path:
    """The shared library, to be registered by its path: C++, Triton's `model_operations`.

    Args:
        provider: `"cpu"`, or `"cuda"` for sessions of ONNX Runtime's CUDA provider.

    Raises:
        BackendUnavailableError: where this installation is without it, as one is that was built
            where no compiler for it is.
        UnsupportedError: for another provider.

    >>> library().suffix
    '.so'
    """
    if is_built(provider):
        return _path(provider)
    what, compiler = (
        ("", "a C compiler (on Debian: gcc)")
        if provider == "cpu"
        else (" for CUDA", "nvcc, of NVIDIA's CUDA toolkit,")
    )
    raise BackendUnavailableError(
        f"the operators{what} were not built with this installation; install {compiler} and then "
        "smoothl1-deploy again with pip install --force-reinstall --no-deps. "
        "Without them every file runs by its own graph"
    )


@cache
def operators(provider: str = "cpu") -> frozenset[str]:
    """The names of the operators that a library has; raises what `library` does.

    >>> "SmoothL1LossMean" in operators()
    True
    """
    name = ctypes.CDLL(str(library(provider))).smoothl1_deploy_operator
    name.argtypes, name.restype = [ctypes.c_size_t], ctypes.c_char_p
    found: list[str] = []
    while (known := name(len(found))) is not None:
        found.append(known.decode())
    return frozenset(found)


def digest() -> str | None:
    """The sha256 of the library, in hex; None where this installation is without it.

    >>> len(digest())
    64
    """
    try:
        return hashlib.sha256(_LIBRARY.read_bytes()).hexdigest()
    except OSError:
        return None


def is_library(path: str | os.PathLike[str]) -> bool:
    """Whether a file, wherever it lies, is byte for byte this installation's library.

    >>> is_library(library()), is_library("another.so")
    (True, False)
    """
    try:
        return filecmp.cmp(path, _LIBRARY, shallow=False)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return False


def register(options: Any, provider: str = "cpu") -> None:
    """Let the sessions opened with `options` run losses in one pass.

    Args:
        options: an `onnxruntime.SessionOptions`, to which they were not registered before.
        provider: the sessions' one, `"cpu"` or `"cuda"`.

    Raises:
        BackendUnavailableError: as `library` does.
        UnsupportedError: where ONNX Runtime refuses the library, as that for CUDA where there is no
            GPU, and at the second time: it would open no session any more.

    >>> import onnxruntime
    >>> options = onnxruntime.SessionOptions()
    >>> register(options)
    """
    path = str(library(provider))
    try:
        options.get_session_config_entry(_REGISTERED)
    except RuntimeError:  # there is none
        options.add_session_config_entry(_REGISTERED, "1")
    else:
        raise UnsupportedError(
            "the operators are registered with these SessionOptions already; register them once"
        )
    try:
        options.register_custom_ops_library(path)
    except Exception as exc:  # pybind raises a class of its own for each status code
        raise UnsupportedError(
            f"ONNX Runtime can't register {path}: {exc}. Install smoothl1-deploy again; without "
            "the file, every model runs by its own graph"
        ) from exc
