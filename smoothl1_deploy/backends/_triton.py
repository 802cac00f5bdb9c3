"""`triton-http` and `triton-grpc`: the artefact behind a real Triton, asked over the wire.

The first run starts one server for this process, on an empty repository; each artefact is written
into it as `serving.repository` writes one, without batching, and loaded when it is first run. The
server ends with the process.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING

import onnx

from .._floats import Array
from .._spec import LossSpec
from ..errors import ArtefactError, UnsupportedError, require
from ._base import Backend
from ._runner import Runner

if TYPE_CHECKING:
    from ..serving._server import Server
    from ..serving._transport import Transport

_TIMEOUT = 60.0


class _Shared:
    """The server of this process."""

    def __init__(self) -> None:
        from ..serving._private import PrivateFolder

        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._server: Server | None = None
        self._unused: deque[str] = deque()
        self._folder = PrivateFolder()
        self._folder.make()
        # Worker processes of multiprocessing run these, and not those of atexit.
        Finalize(None, self._stop, exitpriority=10)

    def load(self, model: onnx.ModelProto) -> str:
        """The name under which a served graph is now loaded."""
        from ..serving._repository import write_model

        with self._lock:
            server = self._running()
            while self._unused:
                server.unload(self._unused.popleft())
            name = f"m{next(self._numbers)}"
            write_model(self._folder.path, model, name=name, max_batch_size=0)
            try:
                server.load(name)
            except ArtefactError as exc:
                raise UnsupportedError(str(exc)) from exc
            return name

    def forget(self, name: str) -> None:
        """Have the process of a model that nobody runs any more ended, at the next load.

        Not at once: the garbage collector calls this, in any thread and at any line.
        """
        self._unused.append(name)

    def transport(self, protocol: str) -> Transport:
        """A connection to the server, by `"http"` or `"grpc"`."""
        from ..serving._transport import GrpcTransport, HttpTransport

        with self._lock:
            addresses = self._running().addresses
        if protocol == "grpc":  # whose address is a socket's, which no URL holds
            return GrpcTransport(addresses.grpc, False, _TIMEOUT, 0)
        return HttpTransport(addresses.http, False, _TIMEOUT, 0)

    def _running(self) -> Server:
        from ..serving._server import Server

        if self._server is None:
            server = Server(self._folder.path, private=True)
            server.start()
            self._server = server
        return self._server

    def _stop(self) -> None:
        with self._lock:
            server, self._server = self._server, None
            if server is not None:
                server.stop(at_once=True)
            self._folder.remove()


_shared: _Shared | None = None
_shared_lock = threading.Lock()


def _of_this_process() -> _Shared:
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = _Shared()
        return _shared


class TritonRunner(Runner):
    """One model on the server; `run` may be called from many threads at once."""

    def __init__(self, model: onnx.ModelProto, protocol: str) -> None:
        super().__init__(model)
        self._model, self._protocol = model, protocol
        self._name = ""
        self._transport: Transport | None = None
        self._lock = threading.Lock()

    def _execute(self, feeds: dict[str, Array], shape: tuple[int, ...]) -> dict[str, Array]:
        with self._lock:
            if self._transport is None:
                shared = _of_this_process()
                self._name = shared.load(self._model)
                self._transport = shared.transport(self._protocol)
                weakref.finalize(self, shared.forget, self._name).atexit = False
        return self._transport.infer(self._name, "", self._named(feeds))


class _TritonBackend(Backend):
    any_rank = False
    over_the_wire = True
    layouts = ("matrix", "no-rows")
    large = False
    protocol: str

    def __init__(self) -> None:
        from ..serving._embedded import find_triton

        require("tritonclient.grpc", "serve", f"the {self.name} backend")
        find_triton()

    def refuses(self, spec: LossSpec) -> str | None:
        """Refuse an upstream gradient, which no request has."""
        return "a server has no gradient to pass back" if spec.upstream else None

    def load(self, model: onnx.ModelProto) -> TritonRunner:
        """The served graph of `model`; the server loads it at the first run.

        Raises:
            ArtefactError: for an unknown rank.
            UnsupportedError: for an opset older than 13.
        """
        from ..serving._graph import serve

        return TritonRunner(serve(model).model, self.protocol)


class TritonHttpBackend(_TritonBackend):
    """A Triton on this machine, over HTTP."""

    name = "triton-http"
    protocol = "http"


class TritonGrpcBackend(_TritonBackend):
    """A Triton on this machine, over gRPC."""

    name = "triton-grpc"
    protocol = "grpc"
