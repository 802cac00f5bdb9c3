"""A server in service: started, its models up and tried, looked after, and ended."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from . import events
from .launcher import Server
from .ready_file import ReadyFile
from .supervise import Supervisor, models_of

__all__ = ["keep_up", "ready_facts", "service"]


@contextlib.contextmanager
def service(
    server: Server,
    logs: Path,
    models: Iterable[str] | None = None,
    ready_file: Path | None = None,
    note: Callable[[str], None] = lambda message: None,
) -> Iterator[Supervisor]:
    """Start a server, yield when every model answers its canary, and end it.

    Args:
        server: not started.
        logs: the folder for `events.jsonl`; it exists.
        models: names; all that the server can serve by default.
        ready_file: written, whole, when every model answered right; removed at the end. What a
            server that was killed left there is removed before the start.
        note: called with each remark for people.

    Raises:
        ArtefactError: for a repository or model that can't be served.
        ServerError: when the server ends, or a model's answer is wrong.
        OutputError: when a file can't be written.
    """
    file = ReadyFile(ready_file)
    names, notes = models_of(server, models)
    file.claim()
    for message in notes:
        note(message)
    handler = events.open_log(logs / "events.jsonl")
    try:
        started = time.perf_counter()
        with server, contextlib.closing(Supervisor(server, events.record)) as supervisor:
            supervisor.bring_up(names)
            facts = ready_facts(server, supervisor)
            events.record("ready", seconds=time.perf_counter() - started, **facts)
            try:
                file.write(facts)
                yield supervisor
            finally:
                file.withdraw()
    finally:
        events.record("stopped")
        events.LOGGER.removeHandler(handler)
        handler.close()


def ready_facts(server: Server, supervisor: Supervisor) -> dict[str, Any]:
    """What the ready file holds: the addresses as URLs, the models, who serves them."""
    return {
        **server.addresses.to_dict(),
        "pid": os.getpid(),
        "server": {"pid": server.pid, "embedded": server.triton.embedded},
        "repository": str(server.repository),
        "models": [model.to_dict() for model in supervisor.models.values()],
    }


def keep_up(supervisor: Supervisor, interval: float) -> None:
    """Look after the models every `interval` seconds, until an exception ends it.

    Raises:
        ServerError: when the server itself has ended.
    """
    while True:
        time.sleep(interval)
        supervisor.check()
