"""What docs/security.md says: title of a table -> first column -> second."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "security.md"


def table(title: str) -> dict[str, str]:
    """The rows of the table below the heading `title`."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {title}\n", 1)[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \| (.*?) \|$", section, re.MULTILINE)
    assert len(rows) > 2, title
    return dict(rows[2:])  # without the head and the line below it
