"""What the tests of the commands share: one way to call them, in this process or in their own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import child
import numpy as np
import pytest

import smoothl1_deploy
from smoothl1_deploy import LossSpec, export
from smoothl1_deploy.cli import main

_ROOT = Path(smoothl1_deploy.__file__).parent.parent

#: Runs the command line where the packages named in its first argument can't be imported.
_WITHOUT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from smoothl1_deploy.cli import main
sys.exit(main(sys.argv[2:]))
"""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


#: Calls the command line in this process.
Cli = Callable[..., Done]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.delenv("SMOOTHL1_DEPLOY_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")  # nothing is wrapped that a test looks for


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Call the command line in this process; no test ever sees a traceback."""

    def call(*arguments: object) -> Done:
        code = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return Done(code, out, err)

    return call


#: What the command line shows on a terminal of so many columns, without its colours.
Shown = Callable[..., str]


@pytest.fixture
def shown(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Shown:
    """Call the command line as on a terminal of a width."""

    def call(width: int, *arguments: object) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich's word for a terminal
        return re.sub(r"\x1b\[[0-9;]*m", "", cli(*arguments).out)

    return call


def assert_refused(done: Done, message: str) -> None:
    """One sentence that says what is wrong, and nothing on stdout."""
    assert (done.code, done.out) == (2, ""), done
    assert done.err.startswith("error: ") and message in done.err, done.err


def spawn(*arguments: object, without: str = "", code: str = _WITHOUT) -> Done:
    """Call the command line in a process of its own, without some packages."""
    done = child.run("-c", code, without, *arguments)
    assert "Traceback" not in done.stdout + done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """float32 arrays of shape (5, 16) in input.npy and target.npy, target a few beta away."""
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(2, 5, 16)).astype(np.float32)
    np.save(tmp_path / "input.npy", arrays[0])
    np.save(tmp_path / "target.npy", arrays[1])
    return arrays[0], arrays[1]


def model(name: str = "loss.onnx", **spec: Any) -> str:
    """Write an artefact for inputs of shape (N, 16); returns its name."""
    exported = export(LossSpec(**spec), shape=("N", 16))
    Path(name).write_bytes(exported.SerializeToString(deterministic=True))
    return name
