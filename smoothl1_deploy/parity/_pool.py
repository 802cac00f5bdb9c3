"""The same work on many tasks, in this process or in several, until they or the time are done."""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar

from .._environment import silence

_GRACE = 3  # seconds for a process to end in: what it is at may be a long call

Task = TypeVar("Task")
Result = TypeVar("Result")


def each(
    work: Callable[[Task], Result], tasks: Sequence[Task], workers: int, until: float = math.inf
) -> Generator[tuple[Task, Result], None, None]:
    """Each task with what `work` made of it, in the order of finishing.

    Args:
        work: a function that a process can be sent.
        tasks: hashable, each once.
        workers: processes; 1 works in this one.
        until: by `time.monotonic`; no task is begun after it, and processes still at work are
            ended. What is not yielded was left out.

    After an interrupt, or where the caller takes no more, the processes are ended, and nothing of
    them is left. They also end when this process does, however that comes.
    """
    if workers <= 1:
        for task in tasks:
            if time.monotonic() >= until:
                return
            yield task, work(task)
        return
    others = set(active_children())
    # spawn: torch's and ONNX Runtime's threads don't survive a fork.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_prepare)
    futures: list[Future[str]] = []
    finished: SimpleQueue[tuple[Task, BaseException | None, str]] = SimpleQueue()

    def tell(task: Task, future: Future[str]) -> None:
        if not future.cancelled():
            error = future.exception()
            finished.put((task, error, "" if error else future.result()))

    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    try:
        with _undisturbed():  # each task that is handed in may start a process
            for task in tasks:
                futures.append(pool.submit(_filed, work, task, folder.name))
                futures[-1].add_done_callback(partial(tell, task))
        # Not by as_completed, nor by asking the futures here: an interrupt that comes while this
        # thread holds a future's lock leaves it held, and the executor waits for it for ever.
        for _ in tasks:
            try:
                left = None if math.isinf(until) else max(0.0, until - time.monotonic())
                task, error, path = finished.get(timeout=left)
            except Empty:
                return
            if error is not None:
                raise error
            result: Result = pickle.loads(Path(path).read_bytes())
            os.unlink(path)
            yield task, result
    finally:
        with _undisturbed():
            unfinished = not all(future.done() for future in futures)
            if unfinished:
                _end(set(active_children()) - others)
            # Where the processes have ended there are Python's own threads to wait for.
            pool.shutdown(wait=unfinished, cancel_futures=True)
            folder.cleanup()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """An interrupt meanwhile comes afterwards, and never to a process that is started meanwhile."""
    came: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    if is_main:
        handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    # A new process takes over what is blocked; a handler would be Python's own again.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if is_main:
            signal.signal(signal.SIGINT, handler)
            if came:
                signal.raise_signal(signal.SIGINT)


def _filed(work: Callable[[Task], Result], task: Task, folder: str) -> str:
    """Where the result lies.

    A process that is ended while it sends a large one leaves half of it in the pipe, and Python
    waits at its exit for the other half. A path is written in one piece.
    """
    try:
        # Not from the start: while a process still imports torch there is nothing to tidy up, and
        # what is raised there the executor shows with a traceback.
        signal.signal(signal.SIGTERM, _leave)
        result = work(task)
    except SystemExit:  # `_leave` raised it; handed on, the executor would take it for a result
        atexit._run_exitfuncs()  # a server that was started ends, temporary folders go
        os._exit(0)
    handle, path = tempfile.mkstemp(dir=folder)
    with os.fdopen(handle, "wb") as file:
        pickle.dump(result, file)
    return path


def _end(children: Iterable[BaseProcess]) -> None:
    for child in children:
        child.terminate()
    until = time.monotonic() + _GRACE
    for child in children:
        child.join(max(0.0, until - time.monotonic()))
        child.kill()


def _prepare() -> None:
    """In each process: one thread for PyTorch, and an end that leaves nothing."""
    threading.Thread(target=_watch, daemon=True).start()

    import torch

    silence()
    torch.set_num_threads(1)


def _leave(number: int, frame: object) -> None:
    """Raise: what is under way lets go of its locks, which those who tidy up may need."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the executor sends one more
    raise SystemExit


def _watch() -> None:
    """A killed parent tells nobody, and its processes would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os._exit(1)
