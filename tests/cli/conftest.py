"""Makes the fixtures of `conftest_cli`, and that module itself, known to the tests beside it."""

from __future__ import annotations

import sys
from pathlib import Path

# importlib mode puts no folder on the path.
sys.path.insert(0, str(Path(__file__).parent))

from conftest_cli import _in_a_folder_of_its_own, cli, pair

__all__ = ["_in_a_folder_of_its_own", "cli", "pair"]
