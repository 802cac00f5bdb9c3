"""Tasks in processes: all of them, or those that the time allows."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import pytest

from smoothl1_deploy.parity._matrix import Matrix, run_matrix
from smoothl1_deploy.parity._pool import each


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_comes_back(workers: int) -> None:
    assert dict(each(abs, [-1, 2, -3], workers)) == {-1: 1, 2: 2, -3: 3}


def test_telemetry_is_off_in_a_worker_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    assert dict(each(os.getenv, ["ORT_DISABLE_TELEMETRY"], 2)) == {"ORT_DISABLE_TELEMETRY": "1"}


def test_nothing_is_begun_after_the_end() -> None:
    assert [*each(abs, [-1], 1, time.monotonic() - 1)] == []


def test_processes_still_at_work_are_ended() -> None:
    before = set(multiprocessing.active_children())
    start = time.monotonic()
    assert [*each(time.sleep, [600.0, 601.0], 2, start + 0.5)] == []
    assert time.monotonic() - start < 500
    for child in set(multiprocessing.active_children()) - before:
        child.join(300)
        assert child.exitcode is not None


def test_an_interrupt_finds_no_lock_that_the_executor_waits_for() -> None:
    """It came while this thread held a future's lock, and `parity` hung where nothing ends it."""
    taken: list[str] = []

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code is threading.Condition.__enter__.__code__:
            taken.append(str(frame.f_back))

    results = each(abs, range(-20, 0), 2)
    next(results)
    sys.setprofile(watch)
    try:
        assert len([*itertools.islice(results, 18)]) == 18  # the rest tidies up, undisturbed
    finally:
        sys.setprofile(None)
        results.close()
    assert not taken


def run_script(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A main module of its own, which `spawn` imports again in each process."""
    (folder / "script.py").write_text(text)
    command = [sys.executable, "script.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


_TIDY = """
import os, sys, threading, time
from contextlib import closing
from multiprocessing.util import Finalize
from pathlib import Path
from smoothl1_deploy.parity._pool import each

lock = threading.Lock()

def tidy(n):
    with lock:
        time.sleep(n - 1)  # the executor ends the others when it sees that one has ended
        Path(f"tidied-{os.getpid()}").touch()

def work(n):
    if n:
        Finalize(None, tidy, (n,), exitpriority=10)
        with lock:
            Path(f"begun-{n}").touch()
            time.sleep(600)
    while len([*Path().glob("begun-*")]) < 2:
        time.sleep(0.01)

if __name__ == "__main__":
    with closing(each(work, range(3), 3)) as found:
        next(found)
    print(len([*Path().glob("tidied-*")]))
"""


def test_a_process_that_is_ended_tidies_up_what_it_started(tmp_path: Path) -> None:
    """A server that it was at is left otherwise, or its shared memory and its files are."""
    done = run_script(_TIDY, tmp_path)
    assert (done.stdout, done.stderr) == ("2\n", "")


_EARLY = """
import multiprocessing, os, signal
from contextlib import closing
from smoothl1_deploy.parity import _pool as pool

real = pool.silence

def silence():  # of the second process, in the middle of its preparation
    real()
    if multiprocessing.current_process().name.endswith("-2"):
        os.kill(os.getpid(), signal.SIGTERM)

pool.silence = silence

if __name__ == "__main__":
    try:
        with closing(pool.each(abs, range(-9, 0), 2)) as found:
            [*found]
    except BaseException as exc:
        print(type(exc).__name__)
"""


def test_a_process_that_is_ended_while_it_prepares_shows_nothing(tmp_path: Path) -> None:
    assert run_script(_EARLY, tmp_path).stderr == ""


_LARGE = """
from contextlib import closing
from smoothl1_deploy.parity._pool import each

def work(n):
    return bytes(3_000_000)

if __name__ == "__main__":
    with closing(each(work, range(1000), 2)) as found:
        next(found)
"""


def test_a_process_ended_while_it_sends_holds_nobody_up(tmp_path: Path) -> None:
    """Half of a large result in a pipe: the interpreter's exit waited for the rest for ever."""
    assert run_script(_LARGE, tmp_path).stderr == ""


def test_what_a_matrix_left_out_is_named() -> None:
    matrix = Matrix(("onnx-reference",), betas=(0.5, float("inf")), dtypes=("float16",))
    report = run_matrix(matrix, seconds=0)
    assert report.cells == ()
    assert report.notes[-1] == "left out after 0 s: float16 beta 0.5, float16 beta inf"
