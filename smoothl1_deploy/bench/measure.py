"""One benchmark: a spec at a shape, everyone in turn; and what happens once a process."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ..backends.ort_cpu import default_threads
from ..environment import environment
from ..errors import SmoothL1DeployError
from ..floats import NUMPY_DTYPE, Array
from ..reference.oracle import oracle
from ..spec import LossSpec
from .contestants import BARE, OURS, PLAIN, contestants, read
from .memory import peak_ratio
from .timing import Timing, interleaved

__all__ = ["READ", "Row", "measure", "once", "provenance"]

#: The name of the row of the machine's own read bandwidth.
READ = "reading the inputs"

_CHUNK = 1 << 18  # elements the oracle is asked at a time


@dataclass(frozen=True, slots=True)
class Row:
    """One contestant at one shape.

    Attributes:
        spec: what is computed.
        shape: of input and target.
        contestant: who.
        threads: it was allowed.
        timing: of its calls, in seconds.
        speedup: how many times faster than each of the others, by the medians.
        gigabytes_per_second: of input read (and output written), by the median.
        error: relative, the largest of an element; None where nothing is computed.
        load: of the machine (1 minute) when it was measured.
        peak: memory of a call over that of its inputs; None where it wasn't measured.
    """

    spec: LossSpec
    shape: tuple[int, ...]
    contestant: str
    threads: int
    timing: Timing
    speedup: Mapping[str, float]
    gigabytes_per_second: float
    error: float | None
    load: float
    peak: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        error = self.error if self.error is None or math.isfinite(self.error) else str(self.error)
        return {
            **{name: getattr(self, name) for name in self.__slots__},
            "spec": self.spec.to_dict(),
            "shape": list(self.shape),
            "timing": asdict(self.timing),
            "speedup": dict(self.speedup),
            "error": error,
        }


def provenance() -> dict[str, Any]:
    """When and where a row was measured."""
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment()}


def _error(spec: LossSpec, got: Array, input: Array, target: Array) -> float:
    """The largest relative distance to the exact loss; of a sum, the exact sum of exact parts."""
    if spec.reduction == "none" or spec.per_sample:
        rows = max(1, _CHUNK // max(1, input[0].size))
        parts = [oracle(spec, input[i : i + rows], target[i : i + rows])
                 for i in range(0, len(input), rows)]  # fmt: skip
        exact = np.concatenate(parts).astype(np.float64)
    else:
        wide = LossSpec(spec.effective_beta, "sum", "float64")
        pairs = zip(*(np.array_split(a.reshape(-1), -(-a.size // _CHUNK)) for a in (input, target)),
                    strict=True)  # fmt: skip
        total = math.fsum(float(oracle(wide, *(x.astype(np.float64) for x in p))) for p in pairs)
        exact = np.asarray(total / input.size if spec.reduction == "mean" else total)
        exact = exact.astype(NUMPY_DTYPE[spec.dtype]) if spec.dtype == "float16" else exact
    found = np.asarray(got, np.float64)
    if found.shape != exact.shape or (np.isfinite(found) != np.isfinite(exact)).any():
        return math.inf
    scale = np.where(exact == 0, 1, np.abs(exact))
    with np.errstate(invalid="ignore"):
        return float(np.nan_to_num(np.abs(found - exact) / scale).max())


def data(spec: LossSpec, shape: tuple[int, ...], kind: str) -> tuple[Array, Array]:
    """Input and target: `normal`, or `constant`, which shows what a sum loses on its way."""
    if kind == "constant":
        dtype = NUMPY_DTYPE[spec.dtype]
        return np.full(shape, 0.1, dtype), np.zeros(shape, dtype)
    rng = np.random.default_rng(0)
    narrow = np.float64 if spec.dtype == "float64" else np.float32
    pair = (rng.standard_normal(shape, dtype=narrow) for _ in range(2))
    input, target = (array.astype(NUMPY_DTYPE[spec.dtype], copy=False) for array in pair)
    return input, target


def measure(
    spec: LossSpec,
    shape: tuple[int, ...],
    *,
    threads: int = 0,
    kind: str = "normal",
    memory: bool = False,
    rounds: int = 15,
    turn: float = 0.01,
    without: Collection[str] = (),
) -> tuple[list[Row], dict[str, str]]:
    """Every contestant at one shape, and why others are missing.

    Args:
        spec: float16, float32 or float64; no extension but `per_sample`.
        shape: two axes.
        threads: for each contestant; 0 for this tool's default.
        kind: of the data.
        memory: measure the peak memory too, each in a process of its own.
        rounds: turns of each contestant.
        turn: seconds of a turn.
        without: contestants to leave out.
    """
    threads = threads or default_threads()
    found, missing = contestants(spec, shape[1], threads, without)
    _limit_torch(threads)
    input, target = data(spec, shape, kind)
    errors: dict[str, float | None] = {READ: None}
    for who in list(found):
        try:
            got = np.asarray(who.call(input, target)).copy()
        except Exception as exc:  # of a contestant, which raises what it likes
            missing[who.name] = f"it fails: {type(exc).__name__}: {str(exc).splitlines()[0]}"
            found.remove(who)
            continue
        errors[who.name] = _error(spec, got, input, target)
    calls = [lambda call=who.call: call(input, target) for who in found]
    names = [*(who.name for who in found), READ]
    timings = interleaved([*calls, lambda: read(input, target)], rounds=rounds, turn=turn)
    load = os.getloadavg()[0]
    median = {name: timing.median for name, timing in zip(names, timings, strict=True)}
    written = {"none": input.nbytes}.get(spec.reduction, 0)
    rows = [
        Row(
            spec,
            shape,
            name,
            threads,
            timing,
            {other: median[other] / timing.median for other in names if other != name},
            (input.nbytes + target.nbytes + (0 if name == READ else written)) / timing.median / 1e9,
            errors[name],
            load,
            peak_ratio(name, input.size, threads)
            if memory and name in (OURS, BARE, "load().run", PLAIN, "torch eager")
            else None,
        )
        for name, timing in zip(names, timings, strict=True)
    ]
    return rows, missing


def _limit_torch(threads: int) -> None:
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def once(repeats: int = 5) -> dict[str, Timing | str]:
    """What is paid once: imports, an export, a session, an engine, the command line; by name."""
    from ..backends.base import load
    from ..graph.export import export

    def python(code: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    package = __name__.partition(".")[0]
    model = export(LossSpec(), shape=("N", 16))
    steps: dict[str, Callable[[], Any]] = {
        "python that does nothing": python("pass"),
        "import smoothl1_deploy": python(f"import {package}"),
        "command line: --help": python(f"from {package}.cli import main; main(['--help'])"),
        "export from a cold start": python(
            f"from {package} import LossSpec, export; export(LossSpec(), shape=('N', 16))"
        ),
        "export, function": lambda: export(LossSpec(), "function", ("N", 16)),
        "export, inlined": lambda: export(LossSpec(), "inlined", ("N", 16)),
        "session start": lambda: load(model),
        "engine build": lambda: _build(model),
    }
    found: dict[str, Timing | str] = {}
    for name, step in steps.items():
        seconds = []
        try:
            for _ in range(repeats):
                started = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - started)
        except (SmoothL1DeployError, subprocess.CalledProcessError) as exc:
            found[name] = f"left out: {exc}"
        else:
            found[name] = Timing.of(seconds)
    return found


def _build(model: Any) -> None:
    import tempfile
    from pathlib import Path

    from ..tensorrt.builder import build_engine

    with tempfile.TemporaryDirectory() as folder:
        build_engine(model, str(Path(folder) / "loss.engine"), profile={"input": (1, 64, 1024)})
