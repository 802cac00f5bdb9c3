"""`smoothl1-deploy serve`: a Triton Inference Server on a model repository."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from .._files import make_folder
from ..errors import InvalidInputError, require
from ._console import print_fields, print_lines, print_next, print_note, print_table, typed
from ._options import Next

if TYPE_CHECKING:
    from ..serving._supervise import Supervisor

EXAMPLE = "smoothl1-deploy serve models --ready-file ready.json"

_Port = Annotated[int, typer.Option(min=0, max=65535)]
_Key = typer.Option(envvar="SMOOTHL1_DEPLOY_ADMIN_KEY", show_envvar=True)


def serve(
    repository: Path | None = None,
    *,
    install: bool = False,
    ready_file: Path | None = None,
    model: list[str] | None = None,
    logs: Path | None = None,
    interval: Annotated[float, typer.Option(min=0.05)] = 2.0,
    loss_metrics: bool = False,
    admin_key: Annotated[str | None, _Key] = None,
    loading: bool = False,
    http_port: _Port = 0,
    grpc_port: _Port = 0,
    metrics_port: _Port = 0,
    host: str = "127.0.0.1",
) -> Next:
    """Serve a model repository with the tritonserver on PATH, or else the embedded one.

    It is ready when every model answered a request with the right number. Ctrl-C or SIGTERM ends
    it. A model whose process dies is loaded again.

    Options:
        repository: A Triton model repository, a folder a model.
        install: Set up the embedded Triton (55 MB, pinned by its hash), and end.
        ready_file: JSON with addresses and models, there while every model answers.
        model: Serve this one; repeat for more. All by default.
        logs: Folder for triton.log and events.jsonl; the user's log folder.
        interval: Seconds between two canaries of every model.
        loss_metrics: Experimental: the distribution of the losses among the metrics (embedded
            only).
        admin_key: Open the admin APIs to who has it (header admin-key); closed by default.
        loading: Who has the admin key may load models over the network: code of theirs runs.

    Where it listens (0: a free port):
        http_port: The port for HTTP.
        grpc_port: The port for gRPC.
        metrics_port: The port for Prometheus.
        host: A name or address of this machine; any but loopback opens it to the network.
    """
    if install:
        from ..serving._embedded import install as set_up

        print_lines([f"the embedded Triton is in {set_up().home}"])
        if repository is None:
            return [typed("repository", "models", "--per-sample", "--name", "score")]
    if repository is None:
        raise InvalidInputError(
            "say which model repository to serve: smoothl1-deploy serve REPOSITORY"
        )

    require("psutil", "serve", "serving")  # before anything is said of the repository

    from platformdirs import user_log_path

    from ..serving._server import Server
    from ..serving._supervise import service

    logs = make_folder(logs or user_log_path("smoothl1-deploy") / "serve", "--logs")
    ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
    with _signals_as_interrupt(), contextlib.suppress(KeyboardInterrupt):
        server = Server(
            repository,
            models=model,
            ports=ports,
            host=host,
            log=logs / "triton.log",
            admin_key=admin_key,
            loading=loading,
            loss_metrics=loss_metrics,
        )
        for text in server.warnings():
            print_note(text)
        with service(server, logs, model is not None, ready_file, print_note) as supervisor:
            addresses = server.addresses.to_dict()
            _show({**addresses, "logs": str(logs)}, supervisor)
            served = next(iter(supervisor.models))
            print_next(typed("run", served, "--url", addresses["http"], "--data", "pair.npz"))
            while True:
                time.sleep(interval)
                supervisor.check()
    print_lines(["stopped"])
    return None


@contextlib.contextmanager
def _signals_as_interrupt() -> Iterator[None]:
    """Make a KeyboardInterrupt of the first signal to end, and nothing of those that follow."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(number: int, frame: FrameType | None) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    with contextlib.ExitStack() as before:
        for number in numbers:
            before.callback(signal.signal, number, signal.signal(number, interrupt))
        yield


def _show(fields: dict[str, str], supervisor: Supervisor) -> None:
    rows = [
        (model.name, model.version, model.certificate.state, model.certificate.message)
        for model in supervisor.models.values()
    ]
    print_table(("model", "version", "certificate", ""), rows)
    print_fields(fields)
    print_lines(["ready; Ctrl-C stops it"])
