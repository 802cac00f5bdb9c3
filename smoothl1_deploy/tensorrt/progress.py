"""A build that can be watched and stopped.

TensorRT builds inside one call. It reports steps to a progress monitor, nearly all of them in
the first few milliseconds, and an exception in a monitor is swallowed (tried with tensorrt_rtx
1.7.1). So the build runs in a thread of its own; the caller waits, is told the elapsed time, and
an interrupt reaches the waiting thread, which asks the monitor to stop the build.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import BuildError

__all__ = [
    "BuildCancelledError",
    "BuildProgress",
    "BuildWatch",
    "is_building",
    "run_watched",
]

_THREAD = "smoothl1-deploy build"
_TICK = 0.05  # seconds between two looks at the clock: a spinner moves, nobody waits
T = TypeVar("T")


class BuildCancelledError(BuildError):
    """The build was stopped on request; nothing was written."""


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """What can be said about a running build.

    Attributes:
        elapsed: seconds since it began.
        phase: TensorRT's name for what it does, None before it says so.
        expected: seconds the last build of the same cache key took, None where none is known.
    """

    elapsed: float
    phase: str | None = None
    expected: float | None = None


class BuildWatch:
    """The request to stop, and the phase: shared by the waiting and the building thread.

    Args:
        cancel: asked between steps, from both threads; true stops the build.
    """

    def __init__(self, cancel: Callable[[], bool] | None = None) -> None:
        self._cancel = cancel
        self._stop = threading.Event()
        self.phase: str | None = None

    def stop(self) -> None:
        """Ask for the end of the build at its next step."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        """Whether the build was asked to end."""
        return self._stop.is_set()

    def poll(self) -> bool:
        """Ask the caller's `cancel`; whether the build is to stop."""
        if self._cancel is not None and not self.stopped and self._cancel():
            self.stop()
        return self.stopped

    def monitor(self, trt: Any) -> Any:
        """An `IProgressMonitor` of the module `trt` that stops the build on request."""
        watch = self

        class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(
                self, phase_name: str, parent_phase: str | None, num_steps: int
            ) -> None:
                watch.phase = phase_name

            def step_complete(self, phase_name: str, step: int) -> bool:
                return not watch.stopped

            def phase_finish(self, phase_name: str) -> None:
                pass

        return Monitor()


def is_building() -> bool:
    """Whether a build that nobody waits for any more, or still does, runs in this process."""
    return any(thread.name == _THREAD and thread.is_alive() for thread in threading.enumerate())


def run_watched(
    work: Callable[[], T],
    watch: BuildWatch,
    on_progress: Callable[[BuildProgress], None] | None = None,
    expected: float | None = None,
) -> T:
    """Run `work` in a thread and wait for it; what it returns or raises is returned or raised.

    An exception in the waiting thread (KeyboardInterrupt, or one of `on_progress` or `cancel`)
    stops the build and is raised when the build has ended; a second interrupt doesn't wait.
    """
    result: list[T] = []
    failure: list[BaseException] = []
    done = threading.Event()

    def body() -> None:
        try:
            result.append(work())
        except BaseException as exc:  # raised again in the waiting thread
            failure.append(exc)
        finally:
            done.set()

    if watch.poll():
        raise BuildCancelledError("the build was cancelled before it began; nothing was written")
    start = time.monotonic()
    thread = threading.Thread(target=body, name=_THREAD, daemon=True)
    thread.start()
    try:
        while not done.wait(_TICK):
            watch.poll()
            if on_progress is not None:
                on_progress(BuildProgress(time.monotonic() - start, watch.phase, expected))
    except BaseException:
        watch.stop()
        done.wait()
        raise
    if failure:
        raise failure[0]
    return result[0]
