"""What a Triton says of its models, read from its log: no API tells why one was refused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Said", "TritonLog"]

_LOADED = re.compile(r"\bsuccessfully loaded '(?P<model>[^']+)'")
#: Source: model_repository_manager.cc and model_lifecycle.cc of Triton 2.51.
_REFUSED = re.compile(
    r" E .*?\] \"?(?:[\w ]+: )?(?:(?:failed to load(?: model)?|Poll failed for model directory) "
    r"'(?P<model>[^']+)'(?: version (?P<version>\d+))?:|"
    r"(?:in )?ensemble '?(?P<ensemble>[^', ]+)'?,?) (?P<reason>.*)"
)


@dataclass(frozen=True, slots=True)
class Said:
    """That a model was loaded, or why not.

    Attributes:
        version: the one that was refused; empty where it is none alone.
        reason: the server's; empty for one that was loaded.
    """

    model: str
    version: str = ""
    reason: str = ""


class TritonLog:
    """The log of one server, from now on.

    Args:
        path: it need not be there yet; what stands in it already is another server's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = self._read = self.size()

    def size(self) -> int:
        """In bytes."""
        return self.path.stat().st_size if self.path.exists() else 0

    def news(self) -> list[Said]:
        """What was said of models since the last call."""
        with self.path.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")
        text = b"".join(whole[:2])
        self._read += len(text)
        return [said for line in text.decode(errors="replace").split("\n") if (said := _said(line))]

    def last_words(self) -> str:
        """Its last errors, or else its last lines."""
        with self.path.open("rb") as file:
            file.seek(self._start)
            lines = file.read().decode(errors="replace").splitlines()
        errors = [line for line in lines if re.search(r" E |\berror\b", line)]
        return " ".join((errors or lines)[-5:]) or f"{self.path} is empty"


def _said(line: str) -> Said | None:
    if found := _LOADED.search(line):
        return Said(found["model"])
    if found := _REFUSED.search(line):
        name = found["model"] or found["ensemble"]
        return Said(name, found["version"] or "", one_line(found["reason"]))
    return None


def one_line(text: str) -> str:
    """A text of the server's without the call stack of the Python backend."""
    text = re.split(r"(?:\\n|\n){2}At:", text)[0].replace("\\n", " ").removesuffix('"')
    return " ".join(text.split())
