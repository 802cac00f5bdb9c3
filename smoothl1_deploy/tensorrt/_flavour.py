"""The two TensorRTs behind one name, `tensorrt` (10.x and 11.x) and `tensorrt_rtx`, and the GPU.

They share an API but for some names, and the numbers behind the names differ between versions:
`BuilderFlag.STRICT_NANS` is 24 in 10.16 and 23 in 11.4. So every flag and enumeration is looked
up by name, and a name a version lacks is reported instead of crashing.

`tensorrt` was never run by this package's authors (it needs a GPU even for a Builder): that path
is written against the attribute names of tensorrt 10.0 to 11.4 and tested with a fake made of them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from .._records import Record
from ..errors import (
    BackendUnavailableError,
    MissingDependencyError,
    SpecError,
    UnsupportedError,
    require,
)

#: flavour -> the extra of this package that brings it.
FLAVOURS = {"tensorrt": "gpu", "tensorrt_rtx": "rtx"}
#: flavour -> the provider of ONNX Runtime that runs its engines.
PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt_rtx": "NvTensorRTRTXExecutionProvider",
}

#: What helps on a card that tensorrt_rtx does not know.
ELSEWHERE = (
    "Hopper (9.0) runs engines of the flavour tensorrt, and the backends torch-triton and ort-cuda "
    "need no engine"
)

#: What TensorRT adds to unrelated errors where there is no driver.
_NO_DRIVER = re.compile(r"\[checkMacros\.cpp::catchCudaError.*?cudaError 35:.*?\)\)\.?")

_lock = threading.Lock()
_usable: dict[str, Flavour] = {}


# What TensorRT says


def tidy(text: str) -> str:
    """One line, without the remark that there is no GPU, and without a full stop."""
    return " ".join(_NO_DRIVER.sub("", text).split()).rstrip(".")


@dataclass(slots=True, eq=False)
class LogCapture:
    """The errors that were logged while a capture was open, in order."""

    errors: list[str] = field(default_factory=list)
    thread: int = field(default_factory=threading.get_ident)

    def reason(self) -> str:
        """The errors in one line, for the end of a message of ours."""
        texts = [text for text in dict.fromkeys(map(tidy, self.errors)) if text]
        # Nothing was logged where the caller made a logger before ours: that one gets it all.
        return "; ".join(texts) or "TensorRT logged no reason"


class _Log:
    """The logger of one module, and the captures that are open."""

    def __init__(self, trt: Any) -> None:
        self._captures: list[LogCapture] = []
        self._guard = threading.Lock()
        record = self.record

        class RecordingLogger(trt.ILogger):  # type: ignore[misc]
            def log(self, severity: Any, msg: str) -> None:
                if severity.name in ("ERROR", "INTERNAL_ERROR"):
                    record(msg)

        self.logger = RecordingLogger()

    def record(self, text: str) -> None:
        thread = threading.get_ident()
        with self._guard:
            own = [capture for capture in self._captures if capture.thread == thread]
            # TensorRT's worker threads belong to no capture: what they say may concern any of them.
            for capture in own or self._captures:
                capture.errors.append(text)

    @contextlib.contextmanager
    def capture(self) -> Iterator[LogCapture]:
        capture = LogCapture()
        with self._guard:
            self._captures.append(capture)
        try:
            yield capture
        finally:
            with self._guard:
                self._captures.remove(capture)


#: The log of a module, made once and never dropped: many of TensorRT's errors reach only its
#: logger, and the first logger of a process is the one that it uses for good.
_log_of = functools.cache(_Log)


# Which TensorRT


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
        """The recording logger, one a process and module."""
        return _log_of(self.trt).logger

    def capture(self) -> AbstractContextManager[LogCapture]:
        """Collect what TensorRT logs as errors inside the `with` block.

        The errors are those of this thread and of TensorRT's own threads.
        """
        return _log_of(self.trt).capture()

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

    def builder(self) -> Any:
        """A new `Builder`.

        Raises:
            BackendUnavailableError: when TensorRT can't make one here; `tensorrt` needs a GPU.
        """
        builder, problem = None, ""
        with self.capture() as log:
            try:
                builder = self.trt.Builder(self.logger)
            except (TypeError, RuntimeError) as exc:  # pybind11 says a null pointer by these
                problem = f"; {exc}"
        if builder is None:
            hint = (
                "it needs a GPU and its driver even to build; tensorrt_rtx builds without"
                if self.name == "tensorrt"
                else "reinstall it with: pip install --force-reinstall 'smoothl1-deploy[rtx]'"
            )
            raise BackendUnavailableError(
                f"{self} is installed but can't be used here ({log.reason()}{problem}): {hint}"
            )
        return builder


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
            found.builder()  # a module that can be imported may still be unable to build
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


# Which GPU


@dataclass(frozen=True, slots=True)
class Gpu(Record):
    """Name, compute capability (`"8.6"`) and driver version of a GPU, as nvidia-smi gives them."""

    name: str
    compute_capability: str
    driver: str


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
        return None  # nvidia-smi answers with an error where the driver doesn't run
    return Gpu(name, capability, driver)
