"""Cases on worker processes: one that dies or hangs is a fault, and its worker is replaced."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .target import Outcome, Target, buffer_of, check_case, draw, show

_MEMORY = 8 << 30  # bytes a worker may have; more is a fault, not the machine's end
_CHUNK = 25  # cases a worker is given at a time
_TRIES = 20  # times as many buffers as cases, before a target that draws nothing is given up


@dataclass
class Report:
    """What a run found.

    Attributes:
        counts: (target, kind of outcome) -> cases.
        refusals: (target, class of error) -> cases.
        faults: target, index and outcome of each.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    refusals: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[tuple[str, int, Outcome]] = field(default_factory=list)

    def total(self, *kinds: str) -> int:
        """Cases that ended in one of these."""
        return sum(n for (_, kind), n in self.counts.items() if kind in kinds)

    @property
    def cases(self) -> int:
        """All cases; bytes that gave none are left out."""
        return self.total("result", "refused", "fault")

    def __str__(self) -> str:
        refused, faults = self.total("refused"), self.total("fault")
        return f"{self.cases} cases, {refused} refused, {faults} faults"


def targets_of(module: str) -> dict[str, Target]:
    """The targets that a module lists in `TARGETS`, by name."""
    return {target.name: target for target in importlib.import_module(module).TARGETS}


def _work(module: str, connection: Connection, seed: int, home: str) -> None:
    """Run the cases that come through `connection`; say each begin and each end."""
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What a library says on its way down must not tear the progress line.
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    tempfile.tempdir = home
    os.chdir(home)
    targets = targets_of(module)
    drawers = {name: draw(target) for name, target in targets.items()}
    while (job := connection.recv()) is not None:
        name, indices = job
        for index in indices:
            connection.send(index)
            connection.send(_one(targets[name], drawers[name], buffer_of(name, seed, index)))
        connection.send(None)


def _one(target: Target, drawer: Callable[[bytes], list[Any]], buffer: bytes) -> Outcome:
    try:
        cases = drawer(buffer)
    except Exception:  # a strategy raised it: a fault of the fuzzing itself
        return Outcome("fault", traceback.format_exc(), "nothing was drawn")
    return check_case(target, cases[0]) if cases else Outcome()


class _Worker:
    """A process, what is left of its chunk, and when its case began."""

    def __init__(self, module: str, seed: int, home: str) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a threaded library may hang
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(module, theirs, seed, home), daemon=True)
        self.process.start()
        theirs.close()
        self.name = ""
        self.left: list[int] = []
        self.begun: float | None = None

    def give(self, name: str, indices: list[int]) -> None:
        self.name, self.left, self.begun = name, indices, None
        self.connection.send((name, indices))

    def kill(self) -> int:
        self.process.kill()
        self.process.join()
        self.connection.close()
        return self.process.exitcode or 0


class _Pool:
    """The state of a run."""

    def __init__(self, module: str, plan: Mapping[str, int], seed: int, home: str) -> None:
        self.make = lambda: _Worker(module, seed, home)
        self.targets = targets_of(module)
        self.report = Report()
        self.busy: dict[Connection, _Worker] = {}
        self._due = dict(plan)  # target -> cases still to be given out
        self._next = dict.fromkeys(plan, 0)
        self._most = {name: count * _TRIES for name, count in plan.items()}
        self._left: list[tuple[str, list[int]]] = []  # what is left of chunks whose worker died

    def start(self, worker: _Worker) -> None:
        """Give `worker` a chunk; it ends where there is none."""
        job = self._left.pop() if self._left else self._chunk()
        if job is None:
            worker.kill()
            return
        self.busy[worker.connection] = worker
        worker.give(*job)

    def _chunk(self) -> tuple[str, list[int]] | None:
        for name, due in self._due.items():
            if due > 0 and self._next[name] < self._most[name]:
                count, first = min(due, _CHUNK), self._next[name]
                self._due[name] -= count
                self._next[name] += count
                return name, [*range(first, first + count)]
        return None

    def end(self, worker: _Worker, outcome: Outcome) -> None:
        """Book the case that `worker` was on."""
        index = worker.left.pop(0)
        worker.begun = None
        self.report.counts[worker.name, outcome.kind] += 1
        if outcome.kind == "nothing":
            self._due[worker.name] += 1
        elif outcome.kind == "refused":
            self.report.refusals[worker.name, outcome.detail.partition(":")[0]] += 1
        elif outcome.kind == "fault":
            self.report.faults.append((worker.name, index, outcome))

    def lose(self, worker: _Worker, reason: str) -> None:
        """Book a fault, and let another worker go on behind it."""
        del self.busy[worker.connection]
        exit_code = worker.kill()
        self.end(worker, Outcome("fault", reason.format(exit_code=exit_code)))
        if worker.left:
            self._left.append((worker.name, worker.left))
        self.start(self.make())

    def hear(self, worker: _Worker) -> None:
        """Take one message."""
        try:
            message: Any = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(10)
            self.lose(worker, "the interpreter died with the exit code {exit_code}")
            return
        if isinstance(message, int):
            worker.begun = time.monotonic()
        elif message is None:
            del self.busy[worker.connection]
            self.start(worker)
        else:
            self.end(worker, message)

    def look_for_hangs(self) -> None:
        """Lose the workers that are over their target's limit."""
        for worker in [*self.busy.values()]:
            limit = self.targets[worker.name].limit
            if worker.begun is not None and time.monotonic() - worker.begun > limit:
                self.lose(worker, f"still running after {limit:g} seconds")


def run_pool(
    module: str,
    plan: Mapping[str, int],
    seed: int,
    workers: int,
    progress: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Run as many cases of each target as `plan` says, each in a worker process.

    Args:
        module: whose `TARGETS` are meant.
        plan: target -> cases; begun in this order.
        seed: of all cases: case `index` of a target is the same whatever else is run.
        workers: processes.
        progress: called about twice a second.
    """
    home = tempfile.mkdtemp(prefix="fuzz-")
    pool = _Pool(module, plan, seed, home)
    try:
        for _ in range(workers):
            pool.start(pool.make())
        shown = time.monotonic()
        while pool.busy:
            for connection in wait([*pool.busy], timeout=0.5):
                assert isinstance(connection, Connection)
                pool.hear(pool.busy[connection])
            pool.look_for_hangs()
            if time.monotonic() - shown > 0.5:
                shown = time.monotonic()
                progress(pool.report)
    finally:
        for worker in pool.busy.values():
            worker.kill()
        shutil.rmtree(home, ignore_errors=True)
    return pool.report


def save(folder: Path, target: Target, seed: int, index: int, outcome: Outcome) -> Path:
    """Keep a fault: the bytes it was drawn from, what they gave, and how it ended."""
    kept = folder / f"{target.name}-{seed}-{index}"
    kept.mkdir(parents=True, exist_ok=True)
    buffer = buffer_of(target.name, seed, index)
    (kept / "input.bin").write_bytes(buffer)
    # A worker that died could not say what it had.
    case = outcome.case or "\n".join(map(show, draw(target)(buffer)))
    text = f"{case}\n\n{outcome.detail}\n"
    (kept / "case.txt").write_text(text, encoding="utf-8", errors="backslashreplace")
    return kept
