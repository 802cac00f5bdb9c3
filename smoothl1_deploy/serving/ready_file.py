"""The ready file: JSON that is there while every model of one server answers, and no longer."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..artefact import write_atomic
from ..errors import OutputError, SpecError, reason_of
from .transport import HttpTransport, open_transport

__all__ = ["ReadyFile"]


class ReadyFile:
    """One such file; with no path every method does nothing.

    Args:
        path: where; None for no file.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._written = b""

    def claim(self) -> None:
        """Make sure that the place is free; what a server that was killed left there goes.

        Raises:
            OutputError: when it belongs to a server that runs, is something else than a ready
                file, or can't be written.
        """
        if self._path is None:
            return
        if self._path.is_symlink() or self._path.exists():
            facts = self._facts()
            if _runs(facts):
                raise OutputError(
                    f"{self._path} is the ready file of a server that runs (process "
                    f"{facts['pid']}, {facts['http']}); end that one, or name another file"
                )
            self._remove()
        # Found out now, not when the models are up; beside it, because a file there means ready.
        beside = self._path.with_name(f"{self._path.name}.claim-{os.getpid()}")
        write_atomic(beside, b"").unlink()

    def write(self, facts: Mapping[str, Any]) -> None:
        """Say that the server is ready; the file appears whole.

        Raises:
            OutputError: when it can't be written.
        """
        if self._path is not None:
            self._written = (json.dumps(facts, indent=1) + "\n").encode()
            write_atomic(self._path, self._written)

    def withdraw(self) -> None:
        """Remove what `write` wrote, if nobody put something else in its place.

        Raises:
            OutputError: when it can't be removed.
        """
        if self._path is None or not self._written:
            return
        with contextlib.suppress(OSError):
            if self._path.read_bytes() != self._written:
                return
        self._remove()

    def _facts(self) -> dict[str, Any]:
        assert self._path is not None
        try:
            facts = json.loads(self._path.read_bytes())
            if isinstance(facts, dict) and {"pid", "http", "models"} <= facts.keys():
                return facts
        except OSError as exc:
            raise OutputError(
                f"can't use {self._path} as the ready file: {reason_of(exc)}; name another file"
            ) from exc
        except ValueError:
            pass
        raise OutputError(
            f"{self._path} is there and no ready file of a server; name another file, or remove it"
        )

    def _remove(self) -> None:
        assert self._path is not None
        try:
            self._path.unlink(missing_ok=True)
        except OSError as exc:
            raise OutputError(
                f"can't remove {self._path}: {reason_of(exc)}; remove it by hand"
            ) from exc


def _runs(facts: Mapping[str, Any]) -> bool:
    """Whether the process lives and its server answers: a number alone may have been used again."""
    try:
        os.kill(int(facts["pid"]), 0)
    except PermissionError:
        pass  # another user's
    except (OSError, ValueError, TypeError, OverflowError):
        return False
    try:
        transport = open_transport(str(facts["http"]), 2, 0)
    except SpecError:
        return False
    return isinstance(transport, HttpTransport) and transport.is_live()
