"""Makes the fixtures of the command line known here too."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# importlib mode puts no folder on the path.
sys.path.insert(0, str(Path(__file__).parent.parent / "cli"))

from conftest_cli import Done, _in_a_folder_of_its_own, cli

__all__ = ["_in_a_folder_of_its_own", "cli", "score"]


@pytest.fixture
def score(cli: Callable[..., Done]) -> Callable[..., Any]:
    """The report of `smoothl1-deploy score --json` on p.npy and t.npy, which says nothing else."""

    def run(*options: str) -> Any:
        done = cli("score", "--input", "p.npy", "--target", "t.npy", *options, "--json")
        assert (done.code, done.err) == (0, "")
        return json.loads(done.out)

    return run
