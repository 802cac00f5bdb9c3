"""Every error this package raises on purpose, the exit code the command line gives it, a warning.

Each message says the problem, the values, and the remedy. Exit codes: 2 for bad usage or bad
input, 3 for something that is not installed (the message then holds the install command).
"""

from __future__ import annotations

import errno
import importlib
import os
import re
from types import ModuleType

__all__ = [
    "ArtefactError",
    "BackendUnavailableError",
    "BuildError",
    "CarriedEngineError",
    "InvalidInputError",
    "MissingDependencyError",
    "ModelWarning",
    "OutputError",
    "ServerError",
    "SmoothL1DeployError",
    "SpecError",
    "UnsupportedError",
    "is_shortage",
    "reason_of",
    "require",
    "shortage",
]


_LONGEST = 4000  # characters of a message


class SmoothL1DeployError(Exception):
    """Base class of every error this package raises on purpose.

    Attributes:
        exit_code: of the command that ends with it.
        told: the message in the words of the command line, once that has found them.
    """

    exit_code = 2
    told: str | None = None

    def __str__(self) -> str:
        """The message; the middle is left out where a name in it has millions of letters."""
        text = self.told or super().__str__()
        if len(text) <= _LONGEST:
            return text
        left_out = len(text) - _LONGEST
        return f"{text[: _LONGEST * 3 // 4]} ...({left_out:,} more)... {text[-_LONGEST // 4 :]}"


class SpecError(SmoothL1DeployError, ValueError):
    """A loss specification, shape or route that makes no sense."""


class InvalidInputError(SmoothL1DeployError, ValueError):
    """Input data (an array, a file of arrays) that can't be used as it is."""


class ArtefactError(SmoothL1DeployError, ValueError):
    """A model, engine or sidecar that can't be read, or that doesn't say what it computes."""


class CarriedEngineError(ArtefactError):
    """An ONNX model that carries an engine, which is executable code, where none is taken."""


class ModelWarning(UserWarning):
    """A model that is used as it is, though something speaks against it.

    It was exported by this package and something else has changed it since, or it declares a shape
    that its nodes contradict. The command line shows it as a note.
    """


class UnsupportedError(SmoothL1DeployError):
    """A valid request that the chosen backend or flavour can't carry out faithfully."""


class BuildError(SmoothL1DeployError):
    """A runtime refused to build an engine from a valid model."""


class OutputError(SmoothL1DeployError, OSError):
    """A result that can't be written where it was asked for."""


class BackendUnavailableError(SmoothL1DeployError):
    """A backend that is installed but can't run here (for instance, no GPU)."""

    exit_code = 3


class ServerError(BackendUnavailableError):
    """A server that can't be reached, did not answer in time, or failed while it answered."""


class MissingDependencyError(SmoothL1DeployError, ImportError):
    """A package that the request needs and that is not installed."""

    exit_code = 3


def reason_of(exc: OSError | ValueError) -> str:
    """Why a file can't be used; a ValueError is of a name that no file can have."""
    return str(getattr(exc, "strerror", None) or exc)


_SHORTAGES = {
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO
}  # fmt: skip
#: The same in the words of the dynamic linker, whose errors carry no number, and of threading.
_SHORTAGE_SAID = re.compile(
    "|".join(map(os.strerror, _SHORTAGES))
    + "|cannot allocate memory|failed to map segment|can't start new thread"
)


def is_shortage(exc: BaseException) -> bool:
    """Whether `exc` tells of what the machine lacks (memory, files, room): no fault of the input.

    Whoever takes exceptions of any class for damage lets these through; the command line says what
    they are.
    """
    if isinstance(exc, OSError) and exc.errno:
        return exc.errno in _SHORTAGES
    said = type(exc) in (RuntimeError, OSError) or isinstance(exc, ImportError)
    return isinstance(exc, MemoryError) or (said and bool(_SHORTAGE_SAID.search(str(exc))))


def shortage(exc: BaseException) -> str:
    """The reason in what `is_shortage` is true of; numpy has a page of advice before it."""
    return (str(exc).strip() or type(exc).__name__).splitlines()[-1]


def install_command(*extras: str) -> str:
    """What installs what the extras of this package name; of torch there are builds to choose from.

    >>> install_command("cpu", "torch")
    "pip install torch==2.13.0 'smoothl1-deploy[cpu]'"
    """
    ours = ",".join(extra for extra in extras if extra != "torch")
    words = ["torch==2.13.0"] if "torch" in extras else []
    return " ".join(["pip install", *words, *([f"'smoothl1-deploy[{ours}]'"] if ours else [])])


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import `module`, or say which extra of this package brings it.

    Raises:
        MissingDependencyError: when the import fails; the message holds the install command.
        BackendUnavailableError: where this process gets too little memory or too few files.
    """
    try:
        return importlib.import_module(module)
    # A package may load its own libraries by ctypes, which raises OSError.
    except (ImportError, OSError, MemoryError) as exc:
        if is_shortage(exc):
            raise BackendUnavailableError(
                f"{purpose} needs the package {module!r}, for which this process gets too little "
                f"memory or too few files ({shortage(exc)}); raise its limits (see ulimit -a)"
            ) from exc
        raise MissingDependencyError(
            f"{purpose} needs the package {module!r}, which can't be imported ({exc}). "
            f"Install it with: {install_command(extra)}"
        ) from exc
