"""Another Python that runs this checkout, for what can't be tried in the process of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_LIMIT = 300  # seconds; a process that hangs fails its test


def _options(given: dict[str, Any]) -> dict[str, Any]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **given.pop("variables", {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return {"env": variables, "text": True, **pipes, **given}


def start(*words: object, **options: Any) -> subprocess.Popen[str]:
    """A Python with these arguments; options as of `Popen`, and `variables` beside the others."""
    return subprocess.Popen([sys.executable, *map(str, words)], **_options(options))


def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The same, once it has ended by itself."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, **{"timeout": _LIMIT, "check": False, **_options(options)})
