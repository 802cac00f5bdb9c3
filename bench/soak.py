"""Load and faults: many clients ask a real Triton, and every answer is held against the oracle.

    scripts/soak [--seconds 60 --clients 32 --seed 0]

Sizes are mixed, and so are HTTP and gRPC. Meanwhile a model's process is killed every 10 s, a new
version of a model is loaded, and a broken one is, which must leave the old one serving. The load
stays on this machine and stops by itself. Exit code 1: an answer was wrong, a model did not come
back, or a broken version was taken.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from smoothl1_deploy import LossSpec
from smoothl1_deploy._floats import NUMPY_DTYPE, ulp_distance
from smoothl1_deploy.errors import SmoothL1DeployError
from smoothl1_deploy.reference._oracle import oracle
from smoothl1_deploy.serving import Client
from smoothl1_deploy.serving._repository import write_loss
from smoothl1_deploy.serving._server import Server
from smoothl1_deploy.serving._supervise import Supervisor

#: name -> (spec, most rows of a request).
MODELS = {
    "none": (LossSpec(reduction="none"), 64),
    "scores": (LossSpec(per_sample=True, dtype="bfloat16"), 64),
    "mean": (LossSpec(), 4096),
    "sum": (LossSpec(reduction="sum", dtype="float16"), 4096),
}
#: The model that gets new versions, each of another beta, so that one shows which answered.
VERSIONED = "mean"
BETAS = {"1": 1.0, "2": 0.25, "3": 2.0}
CASES = 40  # of each model, made before the load starts
ULP = 4
CANARY_SECONDS = 0.25
RECOVERY_SECONDS = 30.0  # in which a model must be back


@dataclass(frozen=True)
class Case:
    """A request, and the right answer of each version that may give it."""

    input: np.ndarray
    target: np.ndarray
    answers: dict[str, np.ndarray]


@dataclass
class Tally:
    """What was counted; only right answers have a latency."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    asked_again: int = 0
    outside_of_faults: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # what must not happen, beside wrong answers


def make_cases(seed: int) -> dict[str, list[Case]]:
    """Requests of mixed sizes for every model, some with NaN or inf."""
    rng = np.random.default_rng(seed)
    cases: dict[str, list[Case]] = {}
    for name, (spec, most) in MODELS.items():
        betas = BETAS if name == VERSIONED else {"1": spec.beta}
        cases[name] = []
        for number in range(CASES):
            rows = int(min(most, 1 + rng.geometric(0.02 if most > 64 else 0.1)))
            x, y = (rng.normal(size=(2, rows, 16)) * 2).astype(NUMPY_DTYPE[spec.dtype])
            if number % 8 == 0:
                x[0, 0] = (np.nan, np.inf)[number // 8 % 2]
            answers = {
                version: oracle(LossSpec(beta, spec.reduction, spec.dtype, spec.per_sample), x, y)
                for version, beta in betas.items()
            }
            cases[name].append(Case(x, y, answers))
    return cases


def is_right(got: np.ndarray, exact: np.ndarray) -> bool:
    """The dtype, the shape, NaN where NaN belongs, and the rest within a few ULP."""
    if (got.dtype, got.shape) != (exact.dtype, exact.shape):
        return False
    a, b = got.reshape(-1), exact.reshape(-1)
    nan = np.isnan(b)
    return bool((np.isnan(a) == nan).all() and (ulp_distance(a, b)[~nan] <= ULP).all())


class Soak:
    """The run: clients, faults and what they count."""

    def __init__(self, server: Server, options: argparse.Namespace) -> None:
        self.server, self.options = server, options
        self.tally, self.lock, self.stop = Tally(), threading.Lock(), threading.Event()
        self.cases = make_cases(options.seed)
        #: The versions that a request sent now may be answered by; replaced, never changed.
        self.versions: tuple[str, ...] = ("1",)
        self.down: dict[str, float] = {}  # model -> when its process was killed
        self.last_down: dict[str, float] = {}  # model -> when it came back
        self.refused: set[str] = set()  # versions of the model that gets new ones
        self.supervisor = Supervisor(server, self.record)
        urls = [server.addresses.to_dict()[name] for name in ("http", "grpc")]
        self.clients = {(u, m): Client(u, m, timeout=20) for u in urls for m in MODELS}

    def record(self, event: str, **fields: Any) -> None:
        """What the supervisor sees."""
        name = fields.get("model")
        with self.lock:
            if event == "reloaded" and name in self.down:
                now = time.monotonic()
                self.tally.recoveries.append(now - self.down.pop(name))
                self.last_down[name] = now
            elif event == "version_refused":
                self.refused.add(fields["version"])
            elif event == "reload_failed":
                self.tally.broken.append(f"{name}: {fields['reason']}")

    # Clients

    def client(self, number: int) -> None:
        """Ask until the end; a request that failed is asked again until it is answered."""
        rng = random.Random(f"{self.options.seed} {number}")
        keys = list(self.clients)
        while not self.stop.is_set():
            key = rng.choice(keys)
            case = rng.choice(self.cases[key[1]])
            tries = 0
            while not self.ask(key, case) and not self.stop.is_set():
                # A loss changes nothing on the server: here, unlike in a client, that is known.
                tries += 1
                self.stop.wait(min(0.05 * tries, 0.5))
                with self.lock:
                    self.tally.asked_again += 1

    def ask(self, key: tuple[str, str], case: Case) -> bool:
        """One request; whether there was an answer, right or wrong."""
        name, started, before = key[1], time.monotonic(), self.versions
        try:
            got = self.clients[key].loss(case.input, case.target)
        except SmoothL1DeployError as exc:
            self.failed(name, started, f"{type(exc).__name__}: {exc}")
            return False
        took, after = time.monotonic() - started, self.versions
        allowed = {*before, *after} if name == VERSIONED else {"1"}
        right = any(is_right(got, case.answers[version]) for version in allowed)
        with self.lock:
            if right:
                self.tally.right += 1
                self.tally.latencies.append(took)
            else:
                self.tally.wrong.append(f"{key}, {case.input.shape}: {np.ravel(got)[:3]}")
        return True

    def failed(self, name: str, started: float, reason: str) -> None:
        """Count a failure, and whether no fault explains it."""
        with self.lock:
            self.tally.failed += 1
            self.tally.failures[reason[:110]] += 1
            if name not in self.down and self.last_down.get(name, -1.0) < started:
                self.tally.outside_of_faults.append(f"{name}: {reason}")

    # Faults

    def kill(self, name: str) -> None:
        """End the process of a model, and wait until it is back."""
        stubs = []
        for process in psutil.Process(self.server.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # one that was killed before, and is a zombie
                if f"/{name}/" in " ".join(process.cmdline()):
                    stubs.append(process)
        with self.lock:
            self.down[name] = time.monotonic()
            self.tally.faults.append(f"killed {name}")
        for process in stubs:
            process.kill()
        self.waits(lambda: name not in self.down)
        with self.lock:
            if self.down.pop(name, None) is not None:
                self.tally.broken.append(f"{name} did not come back in {RECOVERY_SECONDS:g} s")

    def new_version(self, version: str) -> None:
        """Put a version beside the old one; it must come to serve."""
        folder = self.server.repository / VERSIONED
        spec = LossSpec(BETAS[version])
        with tempfile.TemporaryDirectory() as made:
            (model,) = write_loss(made, spec, name=VERSIONED)
            (folder / f".{version}").mkdir()
            shutil.copy(model.file, folder / f".{version}")
        self.versions = (*self.versions, version)
        (folder / f".{version}").rename(folder / version)
        if self.waits(lambda: self.supervisor.models[VERSIONED].version == version):
            self.versions = (version,)
            self.tally.faults.append(f"loaded version {version} of {VERSIONED}")
        else:
            self.tally.broken.append(f"version {version} of {VERSIONED} was not loaded")

    def broken_version(self, number: str) -> None:
        """Put a damaged version beside the old one; the server must refuse it."""
        folder = self.server.repository / VERSIONED / number
        folder.mkdir()
        (folder / "model.onnx").write_bytes(b"this is no model")
        if self.waits(lambda: number in self.refused):
            self.tally.faults.append(f"version {number} of {VERSIONED} is broken, and was refused")
        else:
            self.tally.broken.append(f"version {number} of {VERSIONED} is broken, and was taken")

    def waits(self, condition: Callable[[], bool]) -> bool:
        """Whether something comes true in time."""
        deadline = time.monotonic() + RECOVERY_SECONDS
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        return condition()

    def faults(self) -> None:
        """A kill every so often, and between them, in turn, a new and a broken version."""
        victims = itertools.cycle(MODELS)
        number = itertools.count(2)
        between = [
            lambda: self.new_version(str(next(number))),
            lambda: self.broken_version("9"),
            # The broken version still lies there: a kill must bring the old one back.
            lambda: self.kill(VERSIONED),
            lambda: shutil.rmtree(self.server.repository / VERSIONED / "9"),
            lambda: self.new_version(str(next(number))),
        ]
        pause = self.options.kill_every / 2
        while not self.stop.wait(pause):
            self.kill(next(victims))
            if self.stop.wait(pause):
                return
            if between:
                between.pop(0)()

    def supervise(self) -> None:
        """What `smoothl1-deploy serve` does."""
        # A model that was killed just before the end still has to come back.
        while not self.stop.wait(CANARY_SECONDS) or self.down:
            self.supervisor.check()

    def guarded(self, work: Any, *arguments: Any) -> threading.Thread:
        """A thread whose end by an error is counted."""

        def run() -> None:
            try:
                work(*arguments)
            except Exception as exc:  # a bug in this script must not pass for a good run
                self.tally.broken.append(f"{work.__name__}: {type(exc).__name__}: {exc}")
                self.stop.set()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def run(self) -> Tally:
        """Everything at once, for the time that was asked for."""
        self.supervisor.bring_up(strict=True)
        threads = [self.guarded(self.supervise), self.guarded(self.faults)]
        threads += [self.guarded(self.client, n) for n in range(self.options.clients)]
        self.stop.wait(self.options.seconds)
        self.stop.set()
        for thread in threads:
            thread.join(RECOVERY_SECONDS + 30)
        for client in self.clients.values():
            client.close()
        self.supervisor.close()
        return self.tally


def report(tally: Tally, seconds: float, retried: int) -> dict[str, Any]:
    """The figures, JSON-ready."""

    def percentile(values: list[float], share: float) -> float | None:
        return round(float(np.percentile(values, share)) * 1000, 2) if values else None

    requests = tally.right + len(tally.wrong) + tally.failed
    return {
        "seconds": round(seconds, 1),
        "requests": requests,
        "requests_per_second": round(requests / seconds, 1),
        "wrong": len(tally.wrong),
        "failed": tally.failed,
        "failed_outside_of_faults": len(tally.outside_of_faults),
        "asked_again": tally.asked_again,
        "connections_retried": retried,
        "p50_ms": percentile(tally.latencies, 50),
        "p99_ms": percentile(tally.latencies, 99),
        "recoveries_s": [round(value, 2) for value in tally.recoveries],
        "faults": tally.faults,
        "must_not_happen": tally.broken + tally.wrong[:5],
        "failures": dict(tally.failures.most_common(8)),
        "first_failures_outside_of_faults": tally.outside_of_faults[:3],
    }


def main(arguments: list[str] | None = None) -> int:
    """Run it; 0 where nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, prog="scripts/soak")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=60.0, help="at most 600")
    parser.add_argument("--clients", type=int, default=32, help="at most 256")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill-every", type=float, default=10.0, help="seconds")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if not (0 < options.seconds <= 600 and 0 < options.clients <= 256 and options.kill_every > 0):
        parser.error("give --seconds in (0, 600], --clients in [1, 256] and --kill-every > 0")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="smoothl1-soak-")))
        for name, (spec, _) in MODELS.items():
            write_loss(folder / "models", spec, name=name)
        server = Server(folder / "models", log=folder / "triton.log")
        try:
            server.start()
            stack.callback(server.stop, at_once=True)
            soak = Soak(server, options)
            started = time.monotonic()
            tally = soak.run()
        except SmoothL1DeployError as exc:
            print(f"error: {exc}", file=sys.stderr)
            return exc.exit_code
        seconds = time.monotonic() - started
    found = report(tally, seconds, sum(client.retried for client in soak.clients.values()))
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        for key, value in found.items():
            lines = value if isinstance(value, list) and key != "recoveries_s" else [value]
            if isinstance(value, dict):
                lines = [f"{count} x {reason}" for reason, count in value.items()]
            print(f"{key:32}  " + ("\n" + " " * 34).join(map(str, lines)))
    return 1 if tally.wrong or tally.broken or not tally.right else 0


if __name__ == "__main__":
    sys.exit(main())
