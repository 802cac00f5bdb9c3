"""`scripts/mutate`: one-line changes of the package, each with the tests that have to see it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

_ROOT = Path(__file__).parents[1]
_LIMIT = 900  # seconds for the tests of one change: a change may make a loop endless
_COPIED = ("smoothl1_deploy", "tests", "fuzzing", "scripts", "docs", "models", "examples")
_COPIED += ("bench", "proofs")


@dataclass(frozen=True)
class Mutation:
    """A line of `file` changed from `old` to `new`; `tests` must turn red."""

    file: str
    old: str
    new: str
    tests: str

    def __str__(self) -> str:
        return f"{self.file}: {self.old.strip()}  ->  {self.new.strip()}"

    @property
    def text(self) -> str:
        """The file with the change.

        Raises:
            ValueError: where `old` is not there exactly once, or is no part of a line.
        """
        source = (_ROOT / self.file).read_text()
        if source.count(self.old) != 1 or "\n" in self.old or self.old == self.new:
            raise ValueError(f"{self}: is there {source.count(self.old)} times")
        return source.replace(self.old, self.new)


def mutations() -> list[Mutation]:
    """The mutations of `mutations.toml`."""
    data = tomllib.loads((_ROOT / "tests" / "mutations.toml").read_text())
    return [
        Mutation(f"smoothl1_deploy/{file}", old, new, " ".join(f"tests/{t}" for t in tests.split()))
        for file, entries in data.items()
        for old, new, tests in entries
    ]


def survives(mutation: Mutation, copy: Path) -> bool:
    """Whether the tests stay green in `copy`, a copy of the repository, with the change in it."""
    changed = copy / mutation.file
    is_compiled = changed.suffix in (".c", ".h")
    libraries = changed.parent.glob("*.so") if is_compiled else ()
    before = {path: path.read_bytes() for path in (changed, *libraries)}
    changed.write_text(mutation.text)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    try:
        if is_compiled:
            _build(copy)
        done = subprocess.run(
            [*command, *mutation.tests.split()],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            timeout=_LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    finally:
        for path, content in before.items():
            path.write_bytes(content)
    if done.returncode not in (0, 1):  # no tests, or none that could be collected
        raise RuntimeError(f"{mutation}: {done.stdout.decode()[-2000:]}")
    return done.returncode == 0


def _build(copy: Path) -> None:
    """Compile the operators for the CPU again."""
    words = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
    subprocess.run(words, cwd=copy, env={**os.environ, "NVCC": ""}, capture_output=True, check=True)


def main(wanted: Iterable[str]) -> int:
    """Try every change; 1 where one survives."""
    parts = list(wanted)
    chosen = [m for m in mutations() if not parts or any(part in m.file for part in parts)]
    workers = len(os.sched_getaffinity(0))
    free: SimpleQueue[Path] = SimpleQueue()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        for index in range(workers):
            copy = Path(folder, str(index))
            for name in _COPIED:
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(_ROOT / name, copy / name, ignore=ignored)
            for pattern in ("*.toml", "*.md", "*.txt", "setup.py"):
                for path in _ROOT.glob(pattern):
                    shutil.copy(path, copy)
            free.put(copy)

        def tried(mutation: Mutation) -> bool:
            copy = free.get()
            try:
                lives = survives(mutation, copy)
            finally:
                free.put(copy)
            print(f"{'SURVIVES' if lives else 'killed  '}  {mutation}", flush=True)
            return lives

        alive = sum(pool.map(tried, chosen))
    print(f"{len(chosen) - alive} of {len(chosen)} changes are killed by the tests that they name")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
