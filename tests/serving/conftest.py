"""Makes the fixtures of `conftest_serving`, and that module itself, known to the tests here."""

from __future__ import annotations

import sys
from pathlib import Path

# importlib mode puts no folder on the path.
sys.path.insert(0, str(Path(__file__).parent))

from conftest_serving import repository, server, triton

__all__ = ["repository", "server", "triton"]
