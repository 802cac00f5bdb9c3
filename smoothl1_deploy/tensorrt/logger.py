"""What TensorRT says while it works, recorded per call and per thread.

Many of TensorRT's errors reach only its logger, and the first logger of a process is the one it
uses for good. So there is one logger a flavour, made once and never dropped; a caller captures
what is logged around a call.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LogCapture", "LogMessage", "capture_log", "get_logger", "tidy"]

#: Where there is no driver, TensorRT ends unrelated errors with a failed look at the GPU.
_NO_DRIVER = re.compile(r"\[checkMacros\.cpp::catchCudaError.*?cudaError 35:.*?\)\)\.?")


def tidy(text: str) -> str:
    """One line, without the remark that there is no GPU, and without a full stop."""
    return " ".join(_NO_DRIVER.sub("", text).split()).rstrip(".")


@dataclass(frozen=True, slots=True)
class LogMessage:
    """One line of TensorRT's log; `severity` as TensorRT names it: `"ERROR"`, `"WARNING"`, ..."""

    severity: str
    text: str


@dataclass(slots=True)
class LogCapture:
    """The messages logged while a `capture_log` was open, in order."""

    messages: list[LogMessage] = field(default_factory=list)
    _thread: int = field(default_factory=threading.get_ident)

    def of(self, *severities: str) -> list[str]:
        """The texts of these severities."""
        return [message.text for message in self.messages if message.severity in severities]

    @property
    def errors(self) -> list[str]:
        """The texts of errors, internal ones too."""
        return self.of("ERROR", "INTERNAL_ERROR")

    @property
    def warnings(self) -> list[str]:
        """The texts of warnings."""
        return self.of("WARNING")

    def reason(self) -> str:
        """The errors in one line, for the end of a message of ours."""
        texts = [text for text in dict.fromkeys(map(tidy, self.errors)) if text]
        # A logger of the caller's own, made before ours, gets the messages instead.
        return "; ".join(texts) or "TensorRT logged no reason"


_lock = threading.Lock()
_loggers: dict[int, tuple[Any, Any]] = {}  # by the module's id: module, logger
_captures: dict[str, list[LogCapture]] = {}


def _record(name: str, severity: str, text: str) -> None:
    if severity == "VERBOSE":
        return
    thread = threading.get_ident()
    with _lock:
        captures = _captures.get(name, ())
        own = [capture for capture in captures if capture._thread == thread]
        # TensorRT's worker threads belong to no capture: what they say may concern any of them.
        for capture in own or captures:
            capture.messages.append(LogMessage(severity, text))


def get_logger(name: str, trt: Any) -> Any:
    """The logger of the flavour `name`, whose module is `trt`; made on the first call."""
    with _lock:
        if id(trt) not in _loggers:

            class RecordingLogger(trt.ILogger):  # type: ignore[misc]
                def __init__(self) -> None:
                    trt.ILogger.__init__(self)

                def log(self, severity: Any, msg: str) -> None:
                    _record(name, severity.name, msg)

            _loggers[id(trt)] = trt, RecordingLogger()
        return _loggers[id(trt)][1]


@contextlib.contextmanager
def capture_log(name: str) -> Iterator[LogCapture]:
    """Collect what the flavour `name` logs in this thread and in threads of its own."""
    capture = LogCapture()
    with _lock:
        _captures.setdefault(name, []).append(capture)
    try:
        yield capture
    finally:
        with _lock:
            # By identity: two captures with equal messages are equal dataclasses.
            _captures[name] = [other for other in _captures[name] if other is not capture]
