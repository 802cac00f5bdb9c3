"""A server in service: started, its models up and tried, looked after, and ended."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import events
from .launcher import Server
from .ready_file import ReadyFile
from .supervise import Supervisor

__all__ = ["keep_up", "ready_facts", "service"]


@contextlib.contextmanager
def service(
    server: Server,
    logs: Path,
    strict: bool = False,
    ready_file: Path | None = None,
    note: Callable[[str], None] = lambda message: None,
) -> Iterator[Supervisor]:
    """Start a server, yield when every model answers its canary, and end it.

    Args:
        server: not started.
        logs: the folder for `events.jsonl`; it exists.
        strict: whether a model that the server refuses is an error; else it is left out.
        ready_file: written, whole, when every model answered right, and when something in it has
            changed; removed at the end. What a server that was killed left there is removed before
            the start.
        note: called with each remark for people, what the server refuses among them.

    Raises:
        ArtefactError: for a repository or model that can't be served.
        ServerError: when the server ends, or a model's answer is wrong.
        OutputError: when a file can't be written.
    """
    file = ReadyFile(ready_file)
    file.claim()
    for name, reason in server.left_out.items():
        note(f"{name} is left out: {reason}")
    handler = events.open_log(logs / "events.jsonl")

    def record(event: str, **fields: Any) -> None:
        events.record(event, **fields)
        if event in events.WARNINGS:
            note(f"{fields['model']}: {event.replace('_', ' ')}: {fields['reason']}")

    def write() -> None:
        file.write(ready_facts(server, supervisor))

    try:
        started = time.perf_counter()
        with server, contextlib.closing(Supervisor(server, record, write)) as supervisor:
            supervisor.bring_up(strict)
            facts = ready_facts(server, supervisor)
            events.record("ready", seconds=time.perf_counter() - started, **facts)
            try:
                write()
                yield supervisor
            finally:
                file.withdraw()
    finally:
        events.record("stopped")
        events.LOGGER.removeHandler(handler)
        handler.close()


def ready_facts(server: Server, supervisor: Supervisor) -> dict[str, Any]:
    """What the ready file holds: addresses as URLs, models, those left out, who serves them."""
    return {
        **server.addresses.to_dict(),
        "pid": os.getpid(),
        "server": {"pid": server.pid, "embedded": server.triton.embedded},
        "repository": str(server.repository),
        "models": [model.to_dict() for model in supervisor.models.values()],
        "left_out": server.left_out,
    }


def keep_up(supervisor: Supervisor, interval: float) -> None:
    """Look after the models every `interval` seconds, until an exception ends it.

    Raises:
        ServerError: when the server itself has ended.
    """
    while True:
        time.sleep(interval)
        supervisor.check()
