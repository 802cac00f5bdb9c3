"""A few threads that share the parts of one call."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

__all__ = ["Crew", "default_threads"]

#: Of a large machine one loss takes a part: beyond it Python hands out parts no faster.
_MOST_THREADS = 8


def default_threads() -> int:
    """Every core this process may run on, but `_MOST_THREADS` at most."""
    try:
        found = len(os.sched_getaffinity(0))
    except AttributeError:  # not every system has affinities
        found = os.cpu_count() or 1
    return min(found, _MOST_THREADS)


class Crew:
    """Threads for the parts of a call, the calling one among them; the others sleep in between.

    Args:
        threads: that work on a call; 1 starts none.

    `share` may be called from many threads at once: each goes on with its own parts, and the
    crew's threads help whoever asked first.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(max(1, threads - 1), "smoothl1")

    def share(self, parts: int, begin: Callable[[], Callable[[int], None]]) -> None:
        """Do the parts 0 to `parts` - 1, each once, and return when all are done.

        Args:
            parts: their number.
            begin: called once in each thread; gives the function that does a part.

        Raises:
            Exception: the first that a part raised; no further part is begun then.
        """
        left = count()
        failed: list[BaseException] = []

        def work() -> None:
            do = begin()
            for index in left:  # one step of the interpreter: a part goes to one thread
                if index >= parts or failed:
                    return
                try:
                    do(index)
                except BaseException as exc:
                    failed.append(exc)
                    raise

        if self._threads == 1 or parts == 1:
            work()
            return
        helpers: list[Future[None]] = []
        with contextlib.suppress(RuntimeError):  # at the interpreter's exit nobody helps any more
            for _ in range(min(self._threads, parts) - 1):
                helpers.append(self._pool.submit(work))
        try:
            work()
        finally:
            # Those that other calls kept from starting are not waited for.
            errors = [helper.exception() for helper in helpers if not helper.cancel()]
        for error in errors:
            if error is not None:
                raise error
