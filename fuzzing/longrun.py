"""`scripts/longrun`: many calls and many sessions with flat memory, and many threads on one runner.

The counts are bounded by the arguments. Memory and file handles are read after a warm-up, since
what is allocated once is no leak, and at the end.
"""

from __future__ import annotations

import argparse
import gc
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import psutil

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy._artefact import read_model
from smoothl1_deploy.backends._base import get_backend
from smoothl1_deploy.backends._runner import Runner

# How much both may grow after the warm-up: a heap moves, and a library opens, a little by itself.
_ALLOWED_MB = 16.0
_ALLOWED_HANDLES = 4


@dataclass(frozen=True)
class Usage:
    """Resident memory in MB and open file handles of this process."""

    rss: float
    handles: int

    @classmethod
    def now(cls) -> Usage:
        """What the system says, after a collection."""
        gc.collect()
        process = psutil.Process()
        return cls(process.memory_info().rss / 2**20, process.num_fds())

    def __str__(self) -> str:
        return f"{self.rss:.1f} MB, {self.handles} handles"


def _measured(name: str, count: int, once: Callable[[int], None]) -> bool:
    """Do `once` `count` times; whether memory and handles stayed as they were after a tenth."""
    warm = max(count // 10, min(count, 100))
    for number in range(warm):
        once(number)
    before, start = Usage.now(), time.monotonic()
    for number in range(warm, count):
        once(number)
        if number % max(count // 10, 1) == 0:
            print(f"{name}: {number:,} of {count:,}", file=sys.stderr)
    seconds = time.monotonic() - start
    after = Usage.now()
    flat = (
        after.rss - before.rss <= _ALLOWED_MB and after.handles - before.handles <= _ALLOWED_HANDLES
    )
    each = seconds / max(count - warm, 1) * 1e6
    print(
        f"{count:,} {name}, {each:.1f} us each: after {warm:,} {before}; at the end {after}; "
        f"{'flat' if flat else 'GROWN'}"
    )
    return flat


def _open(spec: LossSpec) -> Runner:
    """A session on one core: threads that wait for 64 numbers cost more than they bring."""
    return get_backend("ort-cpu", threads=1).load(export(spec, shape=("N", 16)))


def run_calls(count: int) -> bool:
    """Small `run` calls on one session, each answer compared."""
    runner = _open(LossSpec(0.5))
    rng = np.random.default_rng(0)
    pairs = [rng.normal(size=(2, 4, 16)).astype(np.float32) for _ in range(8)]
    expected = [runner.run(*pair)["loss"] for pair in pairs]

    def once(number: int) -> None:
        pair = pairs[number % 8]
        if runner.run(pair[0], pair[1])["loss"] != expected[number % 8]:
            raise AssertionError(f"call {number} has another answer than the same call before")

    return _measured("run calls", count, once)


def open_sessions(count: int) -> bool:
    """Sessions opened from bytes, used once and dropped."""
    data = export(LossSpec(0.5), shape=("N", 16)).SerializeToString(deterministic=True)
    ones = np.ones((4, 16), np.float32)

    def once(number: int) -> None:
        if get_backend("ort-cpu", threads=1).load(read_model(data)).run(ones, ones)["loss"] != 0:
            raise AssertionError(f"session {number} has a loss of equal arrays")

    return _measured("session opens", count, once)


def run_threads(threads: int, calls: int) -> bool:
    """`threads` on one runner, each with arrays of its own, begun together; answers compared."""
    runner = _open(LossSpec(0.5, "none"))
    barrier = threading.Barrier(threads)

    def work(number: int) -> int:
        rng = np.random.default_rng(number)
        pair = rng.normal(size=(2, 1 + number % 7, 16)).astype(np.float32)
        d = pair[0].astype(np.float64) - pair[1]
        exact = np.where(np.abs(d) < 0.5, d * d, np.abs(d) - 0.25)
        barrier.wait()
        answers = (runner.run(*pair)["loss"] for _ in range(calls))
        return sum(not np.allclose(a, exact, rtol=1e-5, atol=1e-6) for a in answers)

    with ThreadPoolExecutor(threads) as pool:
        wrong = sum(pool.map(work, range(threads)))
    print(f"{threads} threads on one runner, {threads * calls:,} calls: {wrong} wrong answers")
    return wrong == 0


def main() -> int:
    """Run all three; 1 where memory or handles grew, or an answer was wrong."""
    parser = argparse.ArgumentParser(prog="scripts/longrun", description=__doc__)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=64)
    given = parser.parse_args()
    fine = [
        run_calls(given.calls),
        open_sessions(given.sessions),
        run_threads(given.threads, max(given.calls // given.threads // 10, 10)),
    ]
    print("long run: " + ("all flat, all right" if all(fine) else "FAILED"))
    return int(not all(fine))


if __name__ == "__main__":
    sys.exit(main())
