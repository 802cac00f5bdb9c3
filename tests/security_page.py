"""What docs/security.md says: the rows of its tables, each with the function that tries it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "security.md"

#: Gets an empty folder, which is the current one.
Trial = Callable[[Path], object]


class Table:
    """The table below a heading.

    Attributes:
        rows: first column -> second.
        trials: first column -> the function that makes it happen.
    """

    def __init__(self, heading: str) -> None:
        section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1].split("\n## ")[0]
        _head, _line, *rows = re.findall(r"^\| (.*?) \| (.*?) \|$", section, re.MULTILINE)
        self.rows = dict(rows)
        self.trials: dict[str, Trial] = {}

    def row(self, title: str, needs: str | None = None) -> Callable[[Trial], Trial]:
        """Enter a function under its row, and the package that it can't be tried without."""

        def enter(trial: Trial) -> Trial:
            def tried(folder: Path) -> None:
                if needs:
                    pytest.importorskip(needs)
                trial(folder)

            assert title not in self.trials
            self.trials[title] = tried
            return trial

        return enter
