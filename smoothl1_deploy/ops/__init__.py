"""The loss as operators of ONNX Runtime: one pass over the inputs, in anyone's session.

A file of the route `function` is one node of the domain `smoothl1_deploy` and carries its body.
Where this library is registered, ONNX Runtime runs its kernel of that name instead; everywhere else
the body runs, as it always did. `c/` says what the kernels promise.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
from pathlib import Path
from typing import Any

from ..errors import BackendUnavailableError, UnsupportedError

__all__ = ["digest", "is_built", "is_library", "library", "register"]

_REGISTERED = "smoothl1_deploy.ops"
#: Where setup.py puts it; beside this file, Python would take it for a module.
_LIBRARY = Path(__file__).parent / "c" / "libsmoothl1_deploy.so"


def is_built() -> bool:
    """Whether this installation has the library."""
    return _LIBRARY.is_file()


def library() -> Path:
    """The shared library, to be registered by its path: C++, Triton's `model_operations`.

    Raises:
        BackendUnavailableError: where this installation is without it, as one is that was built
            where no C compiler is.

    >>> library().suffix
    '.so'
    """
    if is_built():
        return _LIBRARY
    raise BackendUnavailableError(
        "the operators were not built with this installation; install a C compiler (on Debian: "
        "gcc) and then smoothl1-deploy again with pip install --force-reinstall --no-deps. "
        "Without them every file runs by its own graph"
    )


def digest() -> str | None:
    """The sha256 of the library, in hex; None where this installation is without it."""
    try:
        return hashlib.sha256(_LIBRARY.read_bytes()).hexdigest()
    except OSError:
        return None


def is_library(path: str | os.PathLike[str]) -> bool:
    """Whether a file, wherever it lies, is byte for byte this installation's library."""
    try:
        return filecmp.cmp(path, _LIBRARY, shallow=False)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return False


def register(options: Any) -> None:
    """Let the sessions opened with `options` run losses in one pass.

    Args:
        options: an `onnxruntime.SessionOptions`, to which they were not registered before.

    Raises:
        BackendUnavailableError: as `library` does.
        UnsupportedError: where ONNX Runtime refuses the library, and at the second time: it would
            open no session any more.

    >>> import onnxruntime
    >>> options = onnxruntime.SessionOptions()
    >>> register(options)
    """
    path = str(library())
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
