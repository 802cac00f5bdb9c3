"""The two TensorRTs behind one name: `tensorrt` (10.x and 11.x) and `tensorrt_rtx`.

They share an API but for some names, and the numbers behind the names differ between versions:
`BuilderFlag.STRICT_NANS` is 24 in 10.16 and 23 in 11.4. So every flag and enumeration is looked
up by name, and a name a version lacks is reported instead of crashing.

`tensorrt` was never run by this package's authors (it needs a GPU even for a Builder): that path
is written against the attribute names of tensorrt 10.0 to 11.4 and tested with a fake made of them.
"""

from __future__ import annotations

import re
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from ..errors import (
    BackendUnavailableError,
    MissingDependencyError,
    SpecError,
    UnsupportedError,
    require,
)
from .logger import LogCapture, capture_log, get_logger

__all__ = [
    "ELSEWHERE",
    "FLAVOURS",
    "PROVIDERS",
    "Flavour",
    "available_flavours",
    "get_flavour",
    "missing",
]

#: flavour -> the extra of this package that brings it.
FLAVOURS = {"tensorrt": "gpu", "tensorrt_rtx": "rtx"}
#: flavour -> the provider of ONNX Runtime that runs its engines.
PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt_rtx": "NvTensorRTRTXExecutionProvider",
}

#: What helps on a card that tensorrt_rtx does not know.
ELSEWHERE = (
    "Hopper (9.0) runs engines of flavour='tensorrt', and the backends torch-triton and ort-cuda "
    "need no engine"
)

_lock = threading.Lock()
_usable: dict[str, Flavour] = {}


@dataclass(frozen=True, slots=True)
class Flavour:
    """An imported TensorRT.

    Attributes:
        name: `"tensorrt"` or `"tensorrt_rtx"`.
        version: as the module reports it, for instance `"1.7.1.116"`.
        trt: the module.
    """

    name: str
    version: str
    trt: Any = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def logger(self) -> Any:
        """The recording logger, one a process and flavour."""
        return get_logger(self.name, self.trt)

    def capture(self) -> AbstractContextManager[LogCapture]:
        """Collect what TensorRT logs inside the `with` block, in this thread."""
        return capture_log(self.name)

    def member(self, enum: str, name: str) -> Any | None:
        """A member of an enumeration (or an attribute of a class), None where there is none."""
        return getattr(getattr(self.trt, enum, None), name, None)

    def need(self, enum: str, name: str, what: str) -> Any:
        """Like `member`, for what can't be done without.

        Raises:
            UnsupportedError: names the flavour, its version and `what` asked for the member.
        """
        found = self.member(enum, name)
        if found is None:
            raise UnsupportedError(
                f"{what} is not supported by {self}: it has no {enum}.{name}. "
                f"Leave {what} out, or use another flavour or version"
            )
        return found

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The compute capabilities it has a name for (`"8.9"`), in order; () without such names.

        A runtime takes newer cards than these too, and none between them (tensorrt_rtx 1.7.1).
        """
        names = dir(getattr(self.trt, "ComputeCapability", None))
        numbers = sorted(int(name[2:]) for name in names if re.fullmatch(r"SM\d+", name))
        return tuple(f"{number // 10}.{number % 10}" for number in numbers)

    def knows(self, capability: str) -> bool:
        """Whether it may run engines on a card of this compute capability."""
        known = self.capabilities
        return not known or capability in known or float(capability) > float(known[-1])

    def flags(self) -> dict[str, Any]:
        """Every builder flag of this version, by name."""
        return dict(self.trt.BuilderFlag.__members__)

    def builder(self) -> Any:
        """A new `Builder`.

        Raises:
            BackendUnavailableError: when TensorRT can't make one here; `tensorrt` needs a GPU.
        """
        with self.capture() as log:
            try:
                builder = self.trt.Builder(self.logger)
            except (TypeError, RuntimeError) as exc:  # pybind's words for a null pointer
                raise self._unusable(f"{log.reason()}; {exc}") from exc
        if builder is None:
            raise self._unusable(log.reason())
        return builder

    def _unusable(self, reason: str) -> BackendUnavailableError:
        hint = (
            "it needs a GPU and its driver even to build; flavour='tensorrt_rtx' builds without"
            if self.name == "tensorrt"
            else "reinstall it with: pip install --force-reinstall 'smoothl1-deploy[rtx]'"
        )
        return BackendUnavailableError(
            f"{self} is installed but can't be used here ({reason}): {hint}"
        )


def _load(name: str) -> Flavour:
    with _lock:
        if name not in _usable:
            module = require(name, FLAVOURS[name], f"the flavour {name}")
            version = getattr(module, "__version__", None)
            if version is None or not hasattr(module, "Builder"):
                # A folder of that name on sys.path imports as an empty namespace package.
                raise MissingDependencyError(
                    f"the module {name!r} that Python finds is not TensorRT (it has no Builder). "
                    f"Install it with: pip install 'smoothl1-deploy[{FLAVOURS[name]}]'"
                )
            found = Flavour(name, str(version), module)
            found.builder()  # importing works without a GPU, building may not
            _usable[name] = found
        return _usable[name]


def get_flavour(name: str | Flavour = "auto") -> Flavour:
    """The flavour called `name`; `"auto"` is `tensorrt` where it can be used, else `tensorrt_rtx`.

    Raises:
        SpecError: for an unknown name.
        MissingDependencyError: when it is not installed; the message holds the install command.
        BackendUnavailableError: when it is installed and can't be used on this machine.
    """
    if isinstance(name, Flavour):
        return name
    if name == "auto":
        reasons = []
        for candidate in FLAVOURS:
            try:
                return _load(candidate)
            except (MissingDependencyError, BackendUnavailableError) as exc:
                reasons.append(str(exc))
        raise MissingDependencyError("no flavour of TensorRT can be used. " + ". ".join(reasons))
    if name not in FLAVOURS:
        raise SpecError(f"unknown flavour {name!r}; choose one of auto, {', '.join(FLAVOURS)}")
    return _load(name)


def available_flavours() -> tuple[Flavour, ...]:
    """The flavours that can be used on this machine, `tensorrt` first."""
    return tuple(get_flavour(name) for name in FLAVOURS if missing(name) is None)


def missing(name: str) -> str | None:
    """Why the flavour `name` can't be used on this machine; None where it can."""
    try:
        get_flavour(name)
    except (MissingDependencyError, BackendUnavailableError) as exc:
        return str(exc)
    return None
