"""Ctrl-C on each command that runs long: one sentence at once, and nothing left behind."""

from __future__ import annotations

import _thread
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from conftest_cli import _ROOT, model
from embedded import embedded_triton

from smoothl1_deploy import LossSpec
from smoothl1_deploy.cli import _console as console
from smoothl1_deploy.cli._console import interrupts_told, on_interrupt

#: All takes for ever but float32 in the matrix; worker processes import this too. The files say how
#: far it is: no test waits for a time.
_SCRIPT = """
import os, sys, time
from pathlib import Path
from smoothl1_deploy.backends._runner import Runner
from smoothl1_deploy.bench import _cpu as cpu
from smoothl1_deploy.cli import main
from smoothl1_deploy.parity import _matrix as matrix
from smoothl1_deploy.tensorrt import _build as builder
from smoothl1_deploy.tensorrt._build import BuildWatch, run_watched

run, each = Runner.run, matrix.each

def begin():
    Path(f"begun-{os.getpid()}").touch()

def slow(self, *given, **named):
    if sys.argv[1] == "parity" and self.spec.dtype == "float32":
        return run(self, *given, **named)
    begin()
    time.sleep(600)

def counted(*given):
    for found in each(*given):
        yield found
        Path("done").touch()

def build(*given, **named):
    run_watched(lambda: (begin(), time.sleep(600)), BuildWatch())

def bench(*given, **named):
    begin()
    time.sleep(600)

Runner.run, matrix.each, builder.build_engine, cpu.measure = slow, counted, build, bench

if __name__ == "__main__":
    sys.exit(main())
"""
_ONCE = "note: interrupted; once more ends it at once\n"
_PARITY = (
    "parity --quick -o out --backend onnx-reference --no-extensions --beta 0.5 "
    "--route function --reduction mean --dtype float32 --dtype float16 --workers 2"
)
#: The command, and what is said.
COMMANDS = {
    "parity": (_PARITY, _ONCE),
    "verify": ("verify loss.onnx", _ONCE),
    "bench": ("bench --quick -o out", _ONCE),
    "score": (
        "score --input input.npy --target target.npy",
        "note: interrupted with 0 % done; the same command goes on from there\n",
    ),
    "build": ("build loss.onnx", _ONCE),
}


@contextmanager
def started(
    command: str, *patterns: str, script: str = _SCRIPT
) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A process group of its own, as a terminal's, once there are files of these patterns.

    With it come its children, which end with it.
    """
    Path("script.py").write_text(script)
    Path("temporary").mkdir()
    temporary = str(Path("temporary").absolute())
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "TMPDIR": temporary}
    children: list[psutil.Process] = []
    with open("out.txt", "w") as out:
        process = subprocess.Popen(
            [sys.executable, *command.split()], start_new_session=True, env=environment,
            text=True, stdout=out, stderr=subprocess.PIPE,
        )  # fmt: skip
    try:
        while not all([*Path().glob(pattern)] for pattern in patterns):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.02)
        children += psutil.Process(process.pid).children(recursive=True)
        yield process, children
    finally:
        for left in (*children, process):
            if left.is_running() if isinstance(left, psutil.Process) else left.poll() is None:
                left.kill()
        process.communicate()


@pytest.fixture
def sent_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[object, ...]]]:
    """What would be sent again in a moment. By the clock it could come between two lines of a test.

    The interrupts here are Python's alone. A contestant of the benchmark may have left a stack for
    the system's signals that is gone, and such a one would end the process.
    """
    sends: list[tuple[object, ...]] = []

    class Timer:
        def __init__(self, _: float, *what: object) -> None:
            sends.append(what)

        def start(self) -> None: ...

    monkeypatch.setattr(console.threading, "Timer", Timer)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield sends
    signal.signal(signal.SIGINT, before)


_SENT = (os.kill, (os.getpid(), signal.SIGINT))


def interrupt_and_wait() -> None:
    _thread.interrupt_main()
    time.sleep(60)


def test_a_second_interrupt_while_the_first_is_told_is_not_lost_in_it(
    sent_again: list[tuple[object, ...]],
) -> None:
    with interrupts_told():
        on_interrupt(lambda: _thread.interrupt_main() or "told")
        with pytest.raises(KeyboardInterrupt):
            interrupt_and_wait()
        assert sent_again == [_SENT]
        with pytest.raises(KeyboardInterrupt):
            interrupt_and_wait()


def test_an_interrupt_that_comes_within_a_destructor_comes_again(
    sent_again: list[tuple[object, ...]], capfd: pytest.CaptureFixture[str]
) -> None:
    """Python drops what is raised there; the command would go on, and a traceback be shown."""

    class Dying:
        def __del__(self) -> None:
            interrupt_and_wait()

    with interrupts_told():
        Dying()
        assert sent_again == [_SENT]
    assert capfd.readouterr().err == _ONCE


_DISTURBED = """
from smoothl1_deploy.parity import _pool as pool
undisturbed, entered = pool._undisturbed, []
def disturbed():
    entered.append(1)
    if len(entered) == 2:
        raise KeyboardInterrupt
    return undisturbed()
pool._undisturbed = disturbed

if __name__"""


def test_an_interrupt_that_keeps_the_matrix_from_tidying_up() -> None:
    """The second may come before the first thing that is done about the first."""
    script = _SCRIPT.replace("\nif __name__", _DISTURBED)
    with started(f"script.py {_PARITY}", "begun-*", "done", script=script) as (process, children):
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
        assert_nothing_is_left(children)


def assert_nothing_is_left(children: list[psutil.Process]) -> None:
    assert psutil.wait_procs(children, timeout=60)[1] == []
    names = {path.name for path in Path("temporary").iterdir()}
    assert not [name for name in names if name.startswith(("tmp", "smoothl1"))]


def interrupt_until_it_ends(process: subprocess.Popen[str]) -> None:
    """Once more ends it; one that comes while the first is still on its way up is one with it."""
    for _ in range(30):
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
            return


@pytest.mark.parametrize(("name", "times"), [("parity", 1), *((name, 2) for name in COMMANDS)])
def test_ctrl_c(name: str, times: int, pair: object) -> None:
    command, sentence = COMMANDS[name]
    model()
    patterns = ["begun-*", *(["done"] if name == "parity" else [])]
    with started(f"script.py {command}", *patterns) as (process, children):
        assert len(children) >= (2 if name == "parity" else 0)
        os.killpg(process.pid, signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.readline() == sentence
        if times == 2:
            interrupt_until_it_ends(process)
        _, more = process.communicate(timeout=300)
        assert more == ""
        # The second may come when all is done but the interpreter's own end.
        assert process.returncode in ([130] if times == 1 else [130, -signal.SIGINT])
        assert_nothing_is_left(children)
    if times == 1:
        report = json.loads(Path("out/report.json").read_text())
        assert {cell["spec"]["dtype"] for cell in report["cells"]} == {"float32"}
        assert report["notes"][-1].startswith("left out interrupted after ")
        assert report["notes"][-1].endswith(" s: float16 beta 0.5")
        assert "wrote out/report.json" in Path("out.txt").read_text()


def test_a_killed_parity_takes_its_workers_along() -> None:
    with started(f"script.py {_PARITY}", "begun-*", "done") as (process, children):
        process.kill()
        assert psutil.wait_procs(children, timeout=60)[1] == []


def test_ctrl_c_twice_on_a_server() -> None:
    embedded_triton()
    from smoothl1_deploy.serving._repository import write_loss

    write_loss(Path("models"), LossSpec(), name="mean")
    command = "-m smoothl1_deploy serve models --ready-file ready.json --logs logs"
    with started(command, "ready.json") as (process, children):
        assert children
        for _ in range(2):
            os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=300)[1] == ""
        assert process.returncode == 0 and Path("out.txt").read_text().endswith("stopped\n")
        assert_nothing_is_left(children)
