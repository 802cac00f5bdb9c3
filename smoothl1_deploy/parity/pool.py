"""The same work on many units, in this process or in several, until they or the time are done."""

from __future__ import annotations

import math
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

from ..environment import silence

__all__ = ["each"]

Unit = TypeVar("Unit")
Result = TypeVar("Result")


def each(
    work: Callable[[Unit], Result], units: Sequence[Unit], workers: int, until: float = math.inf
) -> Iterator[tuple[Unit, Result]]:
    """Each unit with what `work` made of it, in the order of finishing.

    Args:
        work: a function that a process can be sent.
        units: hashable, each once.
        workers: processes; 1 works in this one.
        until: by `time.monotonic`; no unit is begun after it, and processes still at work are
            ended. What is not yielded was left out.
    """
    if workers <= 1:
        for unit in units:
            if time.monotonic() >= until:
                return
            yield unit, work(unit)
        return
    others = set(active_children())
    # spawn: torch's and ONNX Runtime's threads don't survive a fork.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_prepare)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            futures = {pool.submit(_filed, work, unit, folder): unit for unit in units}
            left = None if math.isinf(until) else max(0.0, until - time.monotonic())
            finished = as_completed(futures, timeout=left)
            while True:
                try:
                    future = next(finished)
                except StopIteration:
                    return
                except TimeoutError:
                    pool.shutdown(wait=False, cancel_futures=True)
                    _end(others)
                    return
                file = Path(future.result())
                result: Result = pickle.loads(file.read_bytes())
                file.unlink()
                yield futures[future], result
        finally:
            # After an interrupt the units that have not begun are dropped; the others take seconds.
            pool.shutdown(wait=False, cancel_futures=True)


def _filed(work: Callable[[Unit], Result], unit: Unit, folder: str) -> str:
    """Where the result lies.

    A process that is ended while it sends a large one leaves half of it in the pipe, and Python
    waits at its exit for the other half. A path is written in one piece.
    """
    result = work(unit)
    handle, path = tempfile.mkstemp(dir=folder)
    with os.fdopen(handle, "wb") as file:
        pickle.dump(result, file)
    return path


def _end(others: set[BaseProcess]) -> None:
    """End the processes that are not among `others`; one may just be starting, so look again."""
    until = time.monotonic() + 10
    while (left := set(active_children()) - others) and time.monotonic() < until:
        for child in left:
            child.terminate()
        time.sleep(0.05)


def _prepare() -> None:
    import signal

    import torch

    silence()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)
