"""Structured logs: one JSON object a line, for each thing that happened to a server."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import OutputError

__all__ = ["LOGGER", "WARNINGS", "JsonFormatter", "open_log", "record"]

#: Its records carry `fields`, a mapping; whoever uses the package may add handlers of their own.
LOGGER = logging.getLogger("smoothl1_deploy.serving")

#: Those that say that something is wrong; each has `model` and `reason`.
WARNINGS = ("canary_failed", "refused", "reload_failed", "version_refused")


class JsonFormatter(logging.Formatter):
    """`{"time": ..., "level": ..., "event": ..., "pid": ..., and the event's own fields}`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; times are UTC, durations seconds."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = {
            "time": time,
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "pid": os.getpid(),
            **getattr(record, "fields", {}),
        }
        return json.dumps(fields, default=str)


def record(event: str, **fields: Any) -> None:
    """Log one event with its fields."""
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in fields.items()}
    level = logging.WARNING if event in WARNINGS else logging.INFO
    LOGGER.log(level, event, extra={"fields": rounded})


def open_log(path: Path) -> logging.Handler:
    """Append the events to a file, until the handler is closed and removed from `LOGGER`.

    Raises:
        OutputError: when the file can't be written.
    """
    try:
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as exc:
        raise OutputError(
            f"can't write {path}: {exc.strerror or exc}; choose another folder with --logs"
        ) from exc
    handler.setFormatter(JsonFormatter())
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    return handler
