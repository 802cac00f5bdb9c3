"""Makes the fixtures of the command line known here too."""

from __future__ import annotations

import sys
from pathlib import Path

# importlib mode puts no folder on the path.
sys.path.insert(0, str(Path(__file__).parent.parent / "cli"))

from conftest_cli import _in_a_folder_of_its_own, cli

__all__ = ["_in_a_folder_of_its_own", "cli"]
