"""`smoothl1-deploy serve`: a Triton Inference Server on a model repository."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._files import make_folder
from ..errors import InvalidInputError
from ._console import print_fields, print_lines, print_note, print_table

if TYPE_CHECKING:
    from ..serving._supervise import Supervisor

EXAMPLE = "smoothl1-deploy serve models --ready-file ready.json"

_PORTS = "Where it listens (0: a free port)"


def _port(use: str) -> Any:
    return typer.Option(min=0, max=65535, rich_help_panel=_PORTS, help=f"The port for {use}.")


def serve(
    repository: Annotated[
        Path | None, typer.Argument(help="A Triton model repository, a folder a model.")
    ] = None,
    install: Annotated[
        bool,
        typer.Option(
            "--install", help="Set up the embedded Triton (55 MB, pinned by its hash), and end."
        ),
    ] = False,
    http_port: Annotated[int, _port("HTTP")] = 0,
    grpc_port: Annotated[int, _port("gRPC")] = 0,
    metrics_port: Annotated[int, _port("Prometheus")] = 0,
    host: Annotated[
        str,
        typer.Option(
            rich_help_panel=_PORTS,
            help="A name or address of this machine; any but loopback opens it to the network.",
        ),
    ] = "127.0.0.1",
    ready_file: Annotated[
        Path | None,
        typer.Option(help="JSON with addresses and models, there while every model answers."),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Serve this one; repeat for more. All by default.")
    ] = None,
    logs: Annotated[
        Path | None,
        typer.Option(help="Folder for triton.log and events.jsonl; the user's log folder."),
    ] = None,
    interval: Annotated[
        float, typer.Option(min=0.05, help="Seconds between two canaries of every model.")
    ] = 2.0,
    loss_metrics: Annotated[
        bool,
        typer.Option(
            "--loss-metrics",
            help="Experimental: the distribution of the losses among the metrics (embedded only).",
        ),
    ] = False,
    admin_key: Annotated[
        str | None,
        typer.Option(
            envvar="SMOOTHL1_DEPLOY_ADMIN_KEY",
            show_envvar=True,
            help="Open the admin APIs to who has it (header admin-key); closed by default.",
        ),
    ] = None,
    loading: Annotated[
        bool,
        typer.Option(
            "--loading",
            help="Who has the admin key may load models over the network: code of theirs runs.",
        ),
    ] = False,
) -> None:
    """Serve a model repository with the tritonserver on PATH, or else the embedded one.

    It is ready when every model answered a request with the right number. Ctrl-C or SIGTERM ends
    it. A model whose process dies is loaded again.
    """
    if install:
        from ..serving._embedded import install as set_up

        print_lines([f"the embedded Triton is in {set_up().home}"])
        if repository is None:
            return
    if repository is None:
        raise InvalidInputError(
            "say which model repository to serve: smoothl1-deploy serve REPOSITORY"
        )

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
            _show({**server.addresses.to_dict(), "logs": str(logs)}, supervisor)
            while True:
                time.sleep(interval)
                supervisor.check()
    print_lines(["stopped"])


@contextlib.contextmanager
def _signals_as_interrupt() -> Iterator[None]:
    """Make a KeyboardInterrupt of the first signal to end, and nothing of those that follow."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(number: int, frame: FrameType | None) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(fields: dict[str, str], supervisor: Supervisor) -> None:
    rows = [
        (model.name, model.version, model.certificate.state, model.certificate.message)
        for model in supervisor.models.values()
    ]
    print_table(("model", "version", "certificate", ""), rows)
    print_fields(fields)
    print_lines(["ready; Ctrl-C stops it"])
