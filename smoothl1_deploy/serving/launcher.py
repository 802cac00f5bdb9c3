"""One running Triton: started on a repository, its models loaded and unloaded, ended whole."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import ArtefactError, OutputError, ServerError, SpecError, require
from . import loss_metrics, onnxruntime_backend
from .admin import ADMIN_HEADER, Admin
from .install import Triton, find_triton

__all__ = ["Addresses", "Server"]

_RESTRICTED = "model-repository,shared-memory,statistics,trace,logging"

_START_SECONDS = 60.0
_EXIT_SECONDS = 3  # for requests in flight

#: Ends the server when this process is killed; source: prctl(2), PR_SET_PDEATHSIG. The signal of a
#: parent that ended before it was asked for never comes.
_DIE_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); "
    "os.getppid() == int(sys.argv[1]) and os.execv(sys.argv[2], sys.argv[2:])"
)


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a server listens, each as `host:port`."""

    http: str
    grpc: str
    metrics: str

    def to_dict(self) -> dict[str, str]:
        """As URLs."""
        return {
            "http": f"http://{self.http}",
            "grpc": f"grpc://{self.grpc}",
            "metrics": f"http://{self.metrics}/metrics",
        }


class Server:
    """A Triton in explicit mode: no model is loaded until `load` is called.

    Use it as a context manager, or call `start` and `stop`.

    Args:
        repository: the folder of the models.
        triton: None takes the one `find_triton` finds.
        ports: of `http`, `grpc` and `metrics`; 0 or absent is a free one.
        host: the address to listen on.
        log: the file that the server's own log is appended to; None throws it away.
        admin_key: for the restricted APIs; None makes up a secret one.
        loss_metrics: have the embedded server count losses; see `loss_metrics`. In a soak with it
            the server once ended with a segmentation fault while a model was loaded under load.
    """

    def __init__(
        self,
        repository: str | os.PathLike[str],
        triton: Triton | None = None,
        *,
        ports: Mapping[str, int] | None = None,
        host: str = "127.0.0.1",
        log: Path | None = None,
        admin_key: str | None = None,
        loss_metrics: bool = False,
    ) -> None:
        self.repository = Path(repository).resolve()
        if not self.repository.is_dir():
            raise ArtefactError(
                f"{self.repository} is no folder; give a Triton model repository, a folder a model"
            )
        self.triton = triton or find_triton()
        self.admin_key = admin_key or secrets.token_urlsafe(24)
        self._ports = {name: (ports or {}).get(name, 0) for name in ("http", "grpc", "metrics")}
        self._host = host
        self._loss_metrics = loss_metrics
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._state: Path | None = None
        self._prefix = ""
        self._log_start = 0
        self._addresses: Addresses | None = None
        self._http: Any = require("urllib3", "serve", "serving").PoolManager(retries=False)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def addresses(self) -> Addresses:
        """Where it listens, once it was started."""
        assert self._addresses is not None, "the server was not started"
        return self._addresses

    @property
    def pid(self) -> int:
        """The process id of the server."""
        assert self._process is not None, "the server was not started"
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        """Start it, and return when it answers; where it doesn't, Ctrl-C included, nothing is left.

        Raises:
            ServerError: when it ends at once or doesn't answer; the message has its last words.
            SpecError: when a port that was asked for is taken, or the address is none of ours.
        """
        try:
            self._start()
        except BaseException:
            self.stop()  # `with` ends only what it has entered
            raise

    def _start(self) -> None:
        for attempt in range(3):
            ports = self._free_ports()
            self._spawn(ports)
            self._addresses = Addresses(
                *(f"{self._host}:{ports[name]}" for name in ("http", "grpc", "metrics"))
            )
            if self._wait_until_live():
                return
            words = self._last_words()
            self.stop()
            # Between the look for a free port and the server's own, another process may take it.
            if attempt == 2 or not all(port == 0 for port in self._ports.values()):
                break
        raise ServerError(f"the Triton server ended while it started: {words}")

    def _free_ports(self) -> dict[str, int]:
        given = [port for port in self._ports.values() if port]
        if len(set(given)) < len(given):
            words = ", ".join(f"--{name}-port {port}" for name, port in self._ports.items())
            raise SpecError(f"two of the ports are the same ({words}); each needs its own")
        with contextlib.ExitStack() as stack:
            chosen = {}
            for name, port in self._ports.items():
                listener = stack.enter_context(socket.socket())
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    listener.bind((self._host, port))
                except socket.gaierror as exc:
                    raise SpecError(
                        f"can't listen on {self._host!r} ({exc.strerror}); --host takes a name or "
                        "an IPv4 address of this machine"
                    ) from exc
                except (OSError, OverflowError) as exc:
                    raise SpecError(
                        f"can't listen on {self._host}:{port} ({exc}); choose another --{name}-port"
                        ", 0 for a free one"
                    ) from exc
                chosen[name] = listener.getsockname()[1]
            return chosen

    def _spawn(self, ports: Mapping[str, int]) -> None:
        # Named before it is made: Ctrl-C within mkdtemp would leave a folder that nobody knows.
        self._state = Path(tempfile.gettempdir(), f"smoothl1-deploy-serve-{secrets.token_hex(8)}")
        self._state.mkdir(mode=0o700)
        self._log_start = self._log.stat().st_size if self._log and self._log.exists() else 0
        self._prefix = f"smoothl1_{secrets.token_hex(6)}_"
        command = [str(self.triton.binary), *self._options(ports)]
        # The signal comes when the thread that started the child ends: only the main one will do.
        if threading.current_thread() is threading.main_thread() and sys.platform == "linux":
            command = [sys.executable, "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
        try:
            with open(self._log or os.devnull, "ab") as log:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self.triton.environment(),
                    start_new_session=True,  # Ctrl-C is ours to handle, and its children are found
                )
        except OSError as exc:
            raise OutputError(
                f"can't write {self._log}: {exc.strerror or exc}; choose a file in a folder that "
                "exists and that you may write to"
            ) from exc

    def _options(self, ports: Mapping[str, int]) -> list[str]:
        options = [
            f"--model-repository={self.repository}",
            "--model-control-mode=explicit",
            "--disable-auto-complete-config",
            f"--exit-timeout-secs={_EXIT_SECONDS}",
            "--log-format=ISO8601",
            f"--backend-config=python,shm-region-prefix-name={self._prefix}",
            "--allow-gpu-metrics=false" if self.triton.embedded else "--allow-gpu-metrics=true",
            f"--http-restricted-api={_RESTRICTED}:{ADMIN_HEADER}={self.admin_key}",
            f"--grpc-restricted-protocol={_RESTRICTED}:{ADMIN_HEADER}={self.admin_key}",
        ]
        for name, port in ports.items():
            options += [f"--{name}-address={self._host}", f"--{name}-port={port}"]
        if self.triton.home is not None:
            options.append(f"--backend-directory={self._backends(self.triton.home)}")
        return options

    def _backends(self, home: Path) -> Path:
        """A backend directory with the stub of this Python, and with a backend for ONNX."""
        assert self._state is not None
        folder = self._state / "backends"
        # Copies: Triton refuses a library that a link leads out of the folder.
        shutil.copytree(home / "pytriton/tritonserver/backends/python", folder / "python")
        shutil.copy(self.triton.stub, folder / "python")
        (folder / "onnxruntime").mkdir()
        shutil.copy(onnxruntime_backend.__file__, folder / "onnxruntime" / "model.py")
        if self._loss_metrics:
            shutil.copy(loss_metrics.__file__, folder / "onnxruntime" / "loss_metrics.py")
        return folder

    def _wait_until_live(self) -> bool:
        deadline = time.monotonic() + _START_SECONDS
        while self.exit_code is None and time.monotonic() < deadline:
            with contextlib.suppress(ServerError):
                if self._admin().is_live():
                    return True
            time.sleep(0.02)
        return False

    def _last_words(self) -> str:
        if self._log is None:
            return "its log was thrown away; give it a log file"
        text = self._log.read_bytes()[self._log_start :].decode(errors="replace")
        lines = text.splitlines()
        errors = [line for line in lines if " E " in line or line.startswith("error")]
        return " ".join((errors or lines)[-5:]) or f"{self._log} is empty"

    def load(self, model: str, version: str = "") -> None:
        """Load a model, or load it anew; see `Admin.load`."""
        self._admin().load(model, version)

    def unload(self, model: str) -> None:
        """Take a model out of service; see `Admin.unload`."""
        self._admin().unload(model)

    def metadata(self, model: str) -> dict[str, Any]:
        """Name, versions, inputs and outputs of a loaded model, as the server tells them."""
        return self._admin().metadata(model)

    def _admin(self) -> Admin:
        return Admin(self._http, self.addresses.http, self.admin_key, self.repository)

    def stop(self, at_once: bool = False) -> None:
        """End the server and its children, and remove what they left; may be called twice.

        Args:
            at_once: don't wait for requests in flight.
        """
        process, self._process = self._process, None
        try:
            self._http.clear()  # the server waits for open connections
            if process is not None:
                process.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_EXIT_SECONDS + 5)
        finally:  # Ctrl-C may come while it waits
            if process is not None:
                with contextlib.suppress(ProcessLookupError):  # the children too
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if self._prefix:
                for region in Path("/dev/shm").glob(f"{self._prefix}*"):
                    region.unlink(missing_ok=True)
            if self._state is not None:
                shutil.rmtree(self._state, ignore_errors=True)
