"""One running Triton: started on the mirror of a repository, and ended with nothing left of it."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from .._files import refusal_told
from ..errors import ArtefactError, BackendUnavailableError, ServerError, SpecError, require
from ..ops import library
from . import _onnxruntime_backend as onnxruntime_backend
from ._embedded import Triton, find_triton
from ._private import Mirror, PrivateFolder, is_plain, models_of
from ._transport import HttpTransport

#: The HTTP header that opens the restricted APIs; over gRPC `triton-grpc-protocol-` goes before it.
ADMIN_HEADER = "admin-key"

_RESTRICTED = "model-repository,shared-memory,statistics,trace,logging"
#: A header that no request can have: neither protocol takes a line feed in one.
_CLOSED = "(none opens it without serve --admin-key)\n=\n"

_SILENT_SECONDS = 120.0  # how long the server may load its models without a word in its log
_EXIT_SECONDS = 3  # how long the server waits for requests in flight when it ends
LOAD_SECONDS = 120.0  # how long the server may take to load one model

#: The stack of every thread of the server. On it the server reads JSON by recursion and lists the
#: chunks of a body: with the usual 8 MiB a request of 7.8 MB ends the server (bench/NOTES.md).
STACK_BYTES = 256 << 20

#: A program that becomes Triton, with that stack. Where a parent is named, Triton ends with it;
#: source: prctl(2), PR_SET_PDEATHSIG. The signal of a parent that has ended already never comes,
#: so the program looks whether its parent is still the one that is named.
_BECOME = (
    "import ctypes, os, resource, sys\n"
    "parent, soft, hard, *command = sys.argv[1:]\n"
    "resource.setrlimit(resource.RLIMIT_STACK, (int(soft), int(hard)))\n"
    "if parent != '0': ctypes.CDLL(None).prctl(1, 15)\n"
    "if parent in ('0', str(os.getppid())): os.execv(command[0], command)\n"
)

_LOADED = re.compile(r"\bsuccessfully loaded '(?P<model>[^']+)'")
#: Source: model_repository_manager.cc and model_lifecycle.cc of Triton 2.51.
_REFUSED = re.compile(
    r" E .*?\] \"?(?:[\w ]+: )?(?:(?:failed to load(?: model)?|Poll failed for model directory) "
    r"'(?P<model>[^']+)'(?: version (?P<version>\d+))?:|"
    r"(?:in )?ensemble '?(?P<ensemble>[^', ]+)'?,?) (?P<reason>.*)"
)


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a server listens, each as `host:port`."""

    http: str
    grpc: str
    metrics: str

    def to_dict(self) -> dict[str, str]:
        """The addresses as URLs."""
        return {
            "http": f"http://{self.http}",
            "grpc": f"grpc://{self.grpc}",
            "metrics": f"http://{self.metrics}/metrics",
        }


@dataclass(frozen=True, slots=True)
class Said:
    """What the server said of a model: that it was loaded, or why it was not.

    Attributes:
        model: the name of the model.
        version: the version that was refused; empty where the whole model was.
        reason: the server's reason; empty for a model that was loaded.
    """

    model: str
    version: str = ""
    reason: str = ""


class TritonLog:
    """What one server says of its models in its log: no API tells why a model was refused.

    Args:
        path: the file, which need not be there yet; what it holds already is an earlier server's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = self._read = self.size()

    def size(self) -> int:
        """The length of the log in bytes."""
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
        """The last errors of the server, or else its last lines."""
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
        return Said(name, found["version"] or "", _one_line(found["reason"]))
    return None


def _one_line(text: str) -> str:
    """A text of the server, without the call stack that its Python backend adds."""
    text = re.split(r"(?:\\n|\n){2}At:", text)[0].replace("\\n", " ").removesuffix('"')
    return " ".join(text.split())


class Server:
    """A Triton that serves the models of a repository, and looks for new versions every second.

    Use it as a context manager, or call `start` and `stop`.

    Args:
        repository: the folder of the models.
        triton: what to start; None takes what `find_triton` finds.
        models: the names of the models to serve; by default all that can be.
        ports: the ports of `http`, `grpc` and `metrics`; 0 or none is a free one.
        host: the name or address to listen on.
        log: the file that the server's own log is appended to; None throws it away at the end.
        admin_key: what opens the restricted APIs (header `admin-key`); without a key nothing does.
            Triton takes it on its command line alone, where every user of the machine can read it.
        loading: whether who has the key may load and unload models, files of their own among them,
            which is to run code. New versions are then loaded on request only.
        private: whether the server is for this process alone: gRPC then listens on a socket that no
            other user can reach, and a model is served once `load` has loaded it. The repository's
            path must be plain.
        loss_metrics: have the embedded server count losses; see `onnxruntime_backend.LossMetrics`.
            In a soak with it the server once ended with a segmentation fault while a model was
            loaded under load.

    Attributes:
        models: the names of the models that it serves.
        left_out: the name of each other model -> why it isn't served.
        host: the address that the server listens on.
        addresses: where it listens for what, once it was started.
        mirror: what the server sees of the repository, once it was started.
        log: what the server says, once it was started.

    Raises:
        ArtefactError: for no folder, and as `models_of`.
        SpecError: for a host that is no address of this machine.
    """

    def __init__(
        self,
        repository: str | os.PathLike[str],
        triton: Triton | None = None,
        *,
        models: Iterable[str] | None = None,
        ports: Mapping[str, int] | None = None,
        host: str = "127.0.0.1",
        log: Path | None = None,
        admin_key: str | None = None,
        loading: bool = False,
        private: bool = False,
        loss_metrics: bool = False,
    ) -> None:
        self.repository = Path(repository).resolve()
        if not self.repository.is_dir():
            raise ArtefactError(
                f"{self.repository} is no folder; give a Triton model repository, a folder a model"
            )
        if loading and not admin_key:
            raise SpecError("loading over the network needs a key: give --admin-key too")
        self.triton = triton or find_triton()
        self.models, self.left_out = ([], {}) if private else models_of(self.repository, models)
        self.admin_key = admin_key or None
        self._ports = {name: (ports or {}).get(name, 0) for name in ("http", "grpc", "metrics")}
        self._family, self.host = _resolved(host)
        self._loading = loading
        self._private = private
        self._loss_metrics = loss_metrics
        self._log_file = log
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: PrivateFolder | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The process id of the server."""
        assert self._process is not None, "the server was not started"
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code of the server; None while it runs."""
        return None if self._process is None else self._process.poll()

    def warnings(self) -> Iterator[str]:
        """What somebody who starts the server should know."""
        if not ipaddress.ip_address(self.host).is_loopback:
            yield f"it listens on {self.host}: whoever can reach this machine can ask its models"
        if self.admin_key is not None:
            yield "every user of this machine can read the admin key on the server's command line"
        if 0 <= (soft := _stack()[0]) < STACK_BYTES:
            yield (
                f"the stack stays at {soft >> 20} MiB here (ulimit -Hs, -v and -d): a JSON request "
                f"of {soft >> 21} MB may end the server; send binary"
            )

    def start(self) -> None:
        """Start the server, and return when it answers; a failure or Ctrl-C leaves nothing of it.

        Raises:
            ServerError: when it ends at once or doesn't answer; the message has its last words.
            SpecError: when a port that was asked for is taken, or this machine lacks the address.
        """
        try:
            self._start()
        except BaseException:
            self.stop()  # `with` ends only what it has entered
            raise

    def _start(self) -> None:
        for attempt in range(3):
            ports = self._free_ports()
            self._folder = PrivateFolder(with_socket=self._private)
            self._folder.make()
            host = f"[{self.host}]" if ":" in self.host else self.host
            http, grpc, metrics = (f"{host}:{ports[name]}" for name in ("http", "grpc", "metrics"))
            if self._private:
                grpc = f"unix:{self._folder.path}/grpc:{ports['grpc']}"
            self.addresses = Addresses(http, grpc, metrics)
            self._spawn(self._folder)
            if self._wait_until_live():
                return
            ended = self.exit_code is not None
            words = self.log.last_words()
            self.stop()
            # Between the look for a free port and the server's own, another process may take it.
            if not ended or attempt == 2 or any(self._ports.values()):
                how = "ended" if ended else "fell silent"
                raise ServerError(f"the Triton server {how} while it started: {words}")

    def _free_ports(self) -> dict[str, int]:
        given = [port for port in self._ports.values() if port]
        if len(set(given)) < len(given):
            words = ", ".join(f"--{name}-port {port}" for name, port in self._ports.items())
            raise SpecError(f"two of the ports are the same ({words}); each needs its own")
        with contextlib.ExitStack() as stack:
            chosen = {}
            for name, port in self._ports.items():
                listener = stack.enter_context(socket.socket(self._family))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    listener.bind((self.host, port))
                except (OSError, OverflowError) as exc:
                    remedy = f"choose another --{name}-port, 0 for a free one"
                    if isinstance(exc, OSError) and exc.errno == errno.EADDRNOTAVAIL:
                        remedy = "--host takes a name or an address of this machine"
                    raise SpecError(
                        f"can't listen on {self.host}:{port} ({exc}); {remedy}"
                    ) from exc
                chosen[name] = listener.getsockname()[1]
            return chosen

    def _spawn(self, private: PrivateFolder) -> None:
        folder = private.path
        self.mirror = Mirror(self.repository, folder / "models", self.models)
        self.log = TritonLog(self._log_file or folder / "triton.log")
        # The signal comes when the thread that started the child ends: it must be the main one.
        main = threading.current_thread() is threading.main_thread() and sys.platform == "linux"
        limits = resource.getrlimit(resource.RLIMIT_STACK) if self._private else _stack()
        become = [_BECOME, str(os.getpid() if main else 0), *map(str, limits)]
        command = [sys.executable, "-S", "-c", *become, str(self.triton.binary)]
        command += self._options(private)
        environment = self.triton.environment(folder)
        if self._loss_metrics:
            environment[onnxruntime_backend.COUNT_LOSSES] = "1"
        remedy = "choose a file in a folder that exists and that you may write to"
        with refusal_told(f"can't write {self.log.path}", remedy), open(self.log.path, "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C reaches this process alone, and `stop` ends the children by the group.
                start_new_session=True,
            )

    def _options(self, private: PrivateFolder) -> list[str]:
        shown = self.repository if self._private else self.mirror.folder
        assert is_plain(str(shown))
        options = [
            f"--model-repository={shown}",
            "--disable-auto-complete-config",
            "--exit-on-error=false",  # the models that work are served
            f"--exit-timeout-secs={_EXIT_SECONDS}",
            "--log-format=ISO8601",
            f"--backend-config=python,shm-region-prefix-name={private.shared_memory}",
            "--allow-gpu-metrics=false" if self.triton.embedded else "--allow-gpu-metrics=true",
        ]
        for name, address in asdict(self.addresses).items():
            host, _, port = address.rpartition(":")
            if name != "grpc" and host.startswith("["):
                host = f"ipv6:{host[1:-1]}"
            options += [f"--{name}-address={host}", f"--{name}-port={port}"]
        key = f"{ADMIN_HEADER}={self.admin_key}" if self.admin_key else _CLOSED
        options.append(f"--http-restricted-api={_RESTRICTED}:{key}")
        if not self._private:
            options.append(f"--grpc-restricted-protocol={_RESTRICTED}:{key}")
        if self._private or self._loading:
            options.append("--model-control-mode=explicit")
            options += [f"--load-model={name}" for name in self.models]
        else:
            options += ["--model-control-mode=poll", "--repository-poll-secs=1"]
        if self.triton.home is not None:
            options.append(f"--backend-directory={self._backends(self.triton.home, private.path)}")
        return options

    def _backends(self, home: Path, folder: Path) -> Path:
        """A folder of backends: Triton's for Python with the stub of this Python, ours for ONNX."""
        folder = folder / "backends"
        # These are copies, because Triton refuses a library that a link leads out of the folder.
        shutil.copytree(home / "pytriton/tritonserver/backends/python", folder / "python")
        shutil.copy(self.triton.stub, folder / "python")
        (folder / "onnxruntime").mkdir()
        shutil.copy(onnxruntime_backend.__file__, folder / "onnxruntime" / "model.py")
        with contextlib.suppress(BackendUnavailableError):
            shutil.copy(library(), folder / "onnxruntime" / onnxruntime_backend.OPERATORS)
        return folder

    def _wait_until_live(self) -> bool:
        size, deadline = -1, 0.0
        while self.exit_code is None:
            if self._is_live():
                return True
            if self.log.size() != size:
                size, deadline = self.log.size(), time.monotonic() + _SILENT_SECONDS
            elif time.monotonic() > deadline:
                break
            time.sleep(0.02)
        return False

    def _is_live(self) -> bool:
        # The connection is closed at once: a server that ends waits for those that are open.
        with contextlib.closing(HttpTransport(self.addresses.http, False, 1.0, 0)) as transport:
            if not transport.is_live():
                return False
        with contextlib.suppress(OSError):  # Triton listens on the port of the metrics last
            port = int(self.addresses.metrics.rpartition(":")[2])
            socket.create_connection((self.host, port), 1.0).close()
            return True
        return False

    def leave_out(self, model: str, reason: str) -> None:
        """Serve a model no more, for a reason."""
        self.mirror.drop(model)
        self.models.remove(model)
        self.left_out[model] = reason

    def withhold(self, model: str, version: str) -> bool:
        """Serve the other versions of a model in the place of one, until its files change.

        Returns:
            False where the model has no other version.
        """
        withheld = self.mirror.withhold(model, version)
        if withheld and self._loading:
            with contextlib.suppress(ArtefactError):  # the log tells it too
                self.load(model)
        return withheld

    def reload(self, model: str) -> None:
        """Have a model loaded anew, though its files didn't change; the log tells how it went."""
        if not self._loading:
            self.mirror.touch(model)
            return
        self.unload(model)
        with contextlib.suppress(ArtefactError):
            self.load(model)

    def load(self, model: str) -> None:
        """Load a model, or load it anew, on a server that loads on request.

        Raises:
            ArtefactError: when the server refuses it, with the server's reason.
            ServerError: when the server doesn't answer.
        """
        self._manage("load", model)

    def unload(self, model: str) -> None:
        """Take a model out of service, if it is in service.

        Raises:
            ServerError: when the server doesn't answer.
        """
        self._manage("unload", model)

    def _manage(self, verb: str, model: str) -> None:
        triton = require("tritonclient.grpc", "serve", "serving")
        options = [("grpc.enable_http_proxy", 0)]
        headers = {f"triton-grpc-protocol-{ADMIN_HEADER}": self.admin_key or ""}
        with triton.InferenceServerClient(self.addresses.grpc, channel_args=options) as client:
            manage = getattr(client, f"{verb}_model")
            try:
                manage(model, headers=headers, client_timeout=LOAD_SECONDS)
            except triton.InferenceServerException as exc:
                if exc.status() in ("StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED"):
                    raise ServerError(f"the Triton server does not answer ({exc})") from exc
                reason = _one_line(exc.message())
                raise ArtefactError(
                    f"the Triton server can't {verb} the model {model!r}: {reason}"
                ) from exc

    def stop(self, at_once: bool = False) -> None:
        """End the server and its children, and remove what they left; it may be called twice.

        Args:
            at_once: whether not to wait for requests in flight.
        """
        process, self._process = self._process, None
        try:
            if process is not None:
                process.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_EXIT_SECONDS + 5)
        finally:  # Ctrl-C may come during the wait
            if process is not None:
                with contextlib.suppress(ProcessLookupError):  # the group has the children too
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if self._folder is not None:
                self._folder.remove()


def _resolved(host: str) -> tuple[socket.AddressFamily, str]:
    """The address of a name, since Triton takes a name that it can't read for 255.255.255.255."""
    try:
        if not host:
            raise OSError("it is empty")
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        family, *_, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        if len(address) == 4 and address[3]:
            raise OSError("it holds for one interface alone, which Triton can't be told")
    except (OSError, UnicodeError) as exc:
        raise SpecError(
            f"can't listen on {host!r} ({exc}); --host takes a name or an address of this machine"
        ) from exc
    return family, str(address[0])


def _stack() -> tuple[int, int]:
    """The limits on the server's stack, the soft one raised as far as this machine lets it be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    # Both limits count the stacks of the server's sixty threads, which hardly use them.
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        if resource.getrlimit(kind)[0] != resource.RLIM_INFINITY:
            return soft, hard
    return STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard), hard
