"""How tensors travel: the Open Inference Protocol over HTTP and gRPC, in binary, never in JSON.

A request is sent again only where no connection could be made, so that the server can't have
counted it; one whose connection broke later is an error. The time-out is one for the whole answer,
however its bytes come. An answer is read without trust: nothing that is compressed, no more bytes
than it can have, and only what the model's metadata declare.

tritonclient carries gRPC. Its HTTP client is bound to one thread, waits anew for each byte, and
unpacks whatever comes; here the standard library's connections do (bench/NOTES.md).
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import math
import selectors
import socket
import ssl
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from .._floats import Array
from ..errors import (
    ArtefactError,
    InvalidInputError,
    ServerError,
    SmoothL1DeployError,
    SpecError,
    require,
)

_FIRST_WAIT = 0.1  # seconds before the second try; doubled for each further one
_BESIDE = 2**20  # bytes, the most of a request or an answer beside its numbers
_JSON_SIZE = "Inference-Header-Content-Length"
_READ = 2**16  # bytes that are read at once
#: The most bytes of a request: protobuf counts them in an int32, and so does Triton's HTTP
#: (triton-inference-server/server#5649).
_MOST = 2**31 - 1

#: What a model's metadata say of an output: its data type, and its shape with -1 for any length.
Declared = tuple[str, list[int]]

#: The class of an error by the status that the server gave; it is ServerError for any other.
_KINDS: dict[int | str, type[SmoothL1DeployError]] = {
    **dict.fromkeys((400, 413, "INVALID_ARGUMENT"), InvalidInputError),
    **dict.fromkeys((404, "NOT_FOUND"), ArtefactError),
}


class _NotConnectedError(Exception):
    """No connection could be made: the request was not sent, and may be sent again."""


class Transport(ABC):
    """A connection to one server; every method may be called from many threads at once.

    Args:
        address: `host:port`, for HTTP with a base path after it if there is one.
        tls: whether to encrypt, and to check the server's certificate.
        timeout: seconds for one whole answer, with the tries to connect.
        retries: how many further tries to connect there are.

    Attributes:
        retried: how many further tries to connect there have been.
    """

    def __init__(self, address: str, tls: bool, timeout: float, retries: int) -> None:
        self.address, self.timeout, self.retries = address, timeout, retries
        self.retried = 0
        self._utils = require("tritonclient.utils", "serve", "the client")

    def metadata(self, model: str, version: str) -> dict[str, Any]:
        """Inputs and outputs of a model: `name`, `datatype` and `shape` of each."""
        found = self._tried(self._metadata, model, version)
        try:
            ports = {kind: [_port(port) for port in found[kind]] for kind in ("inputs", "outputs")}
            if not ports["outputs"]:
                raise ValueError("outputs")
        except (LookupError, TypeError, ValueError, OverflowError) as exc:
            raise self._senseless(f"metadata without {exc}") from exc
        return {**found, **ports}

    def infer(
        self,
        model: str,
        version: str,
        arrays: Mapping[str, Array],
        request_id: str = "",
        declared: Mapping[str, Declared] | None = None,
    ) -> dict[str, Array]:
        """Every output of a model.

        Args:
            model: the name of the model.
            version: the version of the model; empty for the one that the server takes.
            arrays: the model's inputs, C-contiguous.
            request_id: what the server's logs and traces call the request.
            declared: name -> what the output must be; None takes any outputs.

        Raises:
            InvalidInputError: for arrays that can't be sent, and for what the server refuses.
            ArtefactError: when the server has no such model.
            ServerError: when there is no answer, or one that no answer to this request can be.
        """
        for name, array in arrays.items():
            if self._utils.np_to_triton_dtype(array.dtype) is None:
                raise InvalidInputError(f"{name} is {array.dtype}, which no server takes")
        size = sum(array.nbytes for array in arrays.values())
        if size > _MOST - _BESIDE:
            raise InvalidInputError(
                f"the arrays have {size:,} bytes, and a request {_MOST:,} at most; send fewer rows"
            )
        most = self._most(declared)
        outputs = self._tried(self._infer, model, version, arrays, request_id, most)
        try:
            found = {output[0]: self._array(declared, *output) for output in outputs}
            for name in declared or ():
                found[name]
        except LookupError as exc:
            raise self._senseless(f"no {exc}") from exc
        except (TypeError, ValueError, OverflowError, struct.error) as exc:
            raise self._senseless(exc) from exc
        return found

    @abstractmethod
    def _metadata(self, due: float, model: str, version: str) -> Any:
        """What the server says of a model."""

    @abstractmethod
    def _infer(
        self, due: float, model: str, version: str, arrays: Any, request_id: str, most: float
    ) -> Iterable[tuple[Any, ...]]:
        """Name, data type, shape and bytes of every output, from an answer of `most` bytes."""

    @abstractmethod
    def close(self) -> None:
        """Give the connections back."""

    def _tried(self, ask: Callable[..., Any], *args: Any) -> Any:
        """What `ask` gives, called again while there is no connection; all of it within the time.

        Args:
            ask: takes the time when the answer is due, by `time.monotonic`, and then `args`.
            args: the other arguments of `ask`.
        """
        due = time.monotonic() + self.timeout
        for attempt in itertools.count():
            try:
                return ask(due, *args)
            except _NotConnectedError as exc:
                pause = _FIRST_WAIT * 2**attempt
                if attempt == self.retries or time.monotonic() + pause >= due:
                    raise ServerError(
                        f"no connection to {self.address} after {attempt + 1} tries ({exc}); is a "
                        "server running there? smoothl1-deploy serve starts one"
                    ) from exc
            self.retried += 1
            time.sleep(pause)

    def _most(self, declared: Mapping[str, Declared] | None) -> float:
        """The most bytes that an answer can have; infinite where a length is not known."""
        if declared is None:
            return math.inf
        most = _BESIDE
        for datatype, shape in declared.values():
            if datatype == "BYTES" or min(shape, default=0) < 0:
                return math.inf
            most += math.prod(shape) * self.dtype(datatype).itemsize
        return most

    def dtype(self, datatype: str) -> np.dtype[Any]:
        """numpy's dtype of a data type of the protocol.

        Raises:
            ServerError: for one that the protocol doesn't have.
        """
        found = self._utils.triton_to_np_dtype(datatype)
        if found is None:
            raise self._senseless(f"the data type {datatype!r}")
        kind: np.dtype[Any] = np.dtype(found)
        return kind

    def _array(self, declared: Any, name: Any, datatype: Any, shape: Any, data: Any) -> Array:
        """An output as an array, if it is what was declared."""
        if declared is not None:
            if name not in declared:
                raise ValueError(f"the output {name!r}, which the model does not have")
            wanted, dims = declared[name]
            fits = len(dims) == len(shape) and all(
                want in (-1, got) for want, got in zip(dims, shape, strict=True)
            )
            if datatype != wanted or not fits:
                raise ValueError(
                    f"{name} is {datatype} {list(shape)}, and should be {wanted} {dims}"
                )
        if any(type(dim) is not int or dim < 0 for dim in shape):
            raise ValueError(f"{name} has the shape {list(shape)}")
        if datatype == "BYTES":
            return np.asarray(self._utils.deserialize_bytes_tensor(bytes(data))).reshape(shape)
        return np.frombuffer(data, self.dtype(datatype)).reshape(shape)

    def _late(self) -> ServerError:
        return ServerError(
            f"{self.address} gave no answer within {self.timeout:g} s; it was not asked again, "
            "since it may still be at work. Raise the timeout"
        )

    def _senseless(self, reason: object) -> ServerError:
        return ServerError(
            f"{self.address} answered what no Open Inference server does ({reason}); is it the "
            "right address?"
        )

    def _lost(self, reason: object) -> ServerError:
        return ServerError(
            f"the connection to {self.address} was lost ({reason}); the request was not "
            "repeated, since the server may have counted it"
        )


def open_transport(url: str, timeout: float, retries: int) -> Transport:
    """The transport of a URL: `http://`, `https://`, `grpc://` or `grpcs://`.

    Raises:
        SpecError: for any other URL, a timeout that is not > 0 and finite, and retries that are no
            whole number >= 0.
        MissingDependencyError: without tritonclient.
    """
    known = False
    with contextlib.suppress(ValueError):  # of half an IPv6 address, or a port that can't be
        parts = urlsplit(url)
        known = parts.port != 0 and parts.hostname is not None
        known = known and parts.scheme in ("http", "https", "grpc", "grpcs")
    if not known:
        raise SpecError(
            f"{url!r} is no address of a server; write http://HOST:PORT or grpc://HOST:PORT "
            "(https:// or grpcs:// for TLS)"
        )
    if not 0 < timeout <= threading.TIMEOUT_MAX or retries < 0 or retries % 1:
        raise SpecError(
            f"timeout={timeout!r} must be > 0 and finite, and retries={retries!r} a whole number, "
            "0 at least"
        )
    if parts.scheme.startswith("http"):
        address = parts.netloc + quote(parts.path.rstrip("/"), safe="/%")
        return HttpTransport(address, parts.scheme == "https", timeout, retries)
    return GrpcTransport(parts.netloc, parts.scheme == "grpcs", timeout, retries)


def _port(said: Any) -> dict[str, Any]:
    shape = [int(dim) for dim in said["shape"]]
    return {"name": str(said["name"]), "datatype": str(said["datatype"]), "shape": shape}


def _refusal(status: int | str, text: str) -> Exception:
    return _KINDS.get(status, ServerError)(f"the server says ({status}): {text}")


def _path(model: str, version: str) -> str:
    path = f"models/{quote(model, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}" if version else path


class _Timed:
    """A socket whose every wait ends when the whole answer is due, by `time.monotonic`."""

    due = math.inf

    def within(self, wait: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method that waits for the other side.

        Raises:
            TimeoutError: when the answer is due, and the method has not returned.
        """
        left = self.due - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self.settimeout(left)  # type: ignore[attr-defined]
        return wait(*args, **kwargs)

    def recv_into(self, *args: Any) -> Any:
        return self.within(super().recv_into, *args)  # type: ignore[misc]

    def send(self, *args: Any) -> Any:
        return self.within(super().send, *args)  # type: ignore[misc]

    def sendall(self, *args: Any) -> None:
        self.within(super().sendall, *args)  # type: ignore[misc]


class _Socket(_Timed, socket.socket):
    """The socket of an HTTP connection; its sendall is one wait."""


class _TlsSocket(_Timed, ssl.SSLSocket):
    """The socket of an HTTPS connection; its sendall calls send, and its recv_into is one wait."""


class HttpTransport(Transport):
    """HTTP without proxies and compression; connections are kept and used again."""

    def __init__(self, address: str, tls: bool, timeout: float, retries: int) -> None:
        super().__init__(address, tls, timeout, retries)
        parts = urlsplit(f"//{address}")
        self._host, self._port = parts.hostname or "", parts.port or (443 if tls else 80)
        self._root = f"{parts.path}/v2"
        self._context = ssl.create_default_context() if tls else None
        if self._context is not None:
            self._context.sslsocket_class = _TlsSocket
        self._idle: deque[Any] = deque()

    def is_live(self) -> bool:
        """Whether there is a server that says it lives."""
        with contextlib.suppress(ArtefactError, InvalidInputError, ServerError):
            self._tried(self._ask, "GET", "health/live")
            return True
        return False

    def _metadata(self, due: float, model: str, version: str) -> Any:
        return self._json(self._ask(due, "GET", _path(model, version))[0])

    def _infer(
        self, due: float, model: str, version: str, arrays: Any, request_id: str, most: float
    ) -> Iterable[tuple[Any, ...]]:
        data = {name: self._bytes(array) for name, array in arrays.items()}
        inputs = [
            {
                "name": name,
                "shape": array.shape,
                "datatype": self._utils.np_to_triton_dtype(array.dtype),
                "parameters": {"binary_data_size": len(data[name])},
            }
            for name, array in arrays.items()
        ]
        asked = {"id": request_id, "inputs": inputs, "parameters": {"binary_data_output": True}}
        head = json.dumps(asked).encode()
        body = [head, *data.values()]
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(sum(map(len, body))),
            _JSON_SIZE: str(len(head)),
        }
        path = f"{_path(model, version)}/infer"
        return self._outputs(*self._ask(due, "POST", path, most, body, headers))

    def _bytes(self, array: Array) -> Any:
        if array.dtype.hasobject or array.dtype.kind == "S":
            return self._utils.serialize_byte_tensor(array).item() if array.size else b""
        return array.reshape(-1).view(np.uint8).data

    def _outputs(self, data: bytearray, size: str | None) -> Iterable[tuple[Any, ...]]:
        """What the JSON at the beginning of an answer says of the bytes behind it."""
        start = len(data) if size is None else int(size)
        if not 0 <= start <= min(len(data), _BESIDE):
            raise ValueError(f"{len(data)} bytes, {start} of them JSON")
        for output in self._json(data[:start])["outputs"]:
            length = output["parameters"]["binary_data_size"]
            if not 0 <= length <= len(data) - start:
                raise ValueError(f"{length} bytes of {output['name']}, which are not there")
            numbers = memoryview(data)[start : start + length]
            yield output["name"], output["datatype"], output["shape"], numbers
            start += length
        if start != len(data):
            raise ValueError(f"{len(data) - start} bytes that belong to no output")

    def _json(self, data: bytes | bytearray) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as exc:
            raise self._senseless(exc) from exc

    def _ask(
        self, due: float, method: str, path: str, most: float = _BESIDE, *sent: Any
    ) -> tuple[bytearray, str | None]:
        """The body of a good answer of `most` bytes, and the size of the JSON in it.

        Args:
            due: the time when the answer is due, by `time.monotonic`.
            method: GET or POST.
            path: what follows `/v2/`.
            most: the most bytes that the body may have.
            sent: the body and the headers of the request.
        """
        connection = self._connection(due)
        keep = False
        try:
            with contextlib.suppress(BrokenPipeError):  # an answer may come before all was sent
                connection.request(method, f"{self._root}/{path}", *sent)
            response = connection.getresponse()
            if response.status != 200:
                most = _BESIDE
            elif response.getheader("Content-Encoding", "identity") != "identity":
                raise self._senseless("a compressed answer, which nobody asked for")
            data = _read(response, most)
            keep = response.isclosed() and connection.sock is not None
        except TimeoutError as exc:
            raise self._late() from exc
        except (OSError, http.client.HTTPException) as exc:
            raise self._lost(exc) from exc
        finally:
            if keep:
                self._idle.append(connection)
            else:
                connection.close()
        if response.status != 200:
            raise _refusal(response.status, _error_text(data))
        if len(data) > most:
            raise self._senseless(f"more than {most:,} bytes, which is all that was asked for")
        return data, response.getheader(_JSON_SIZE)

    def _connection(self, due: float) -> Any:
        """A connection that is open, or else a new one, which waits until `due` at the longest."""
        with contextlib.suppress(IndexError):  # no idle one is left
            while True:
                connection = self._idle.pop()
                with selectors.DefaultSelector() as selector:
                    selector.register(connection.sock, selectors.EVENT_READ)
                    if not selector.select(0):
                        connection.sock.due = due
                        return connection
                connection.close()  # the server has closed it: there is no answer to wait for
        connection = http.client.HTTPConnection(self._host, self._port)
        try:
            connection.sock = self._connect(due)
        except (OSError, UnicodeError) as exc:  # a name can be too long to be looked up
            raise _NotConnectedError(exc) from exc
        return connection

    def _connect(self, due: float) -> Any:
        """A socket to the first address of the host that takes a connection."""
        failed: OSError = OSError("the host has no address")
        found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in found:
            sock: Any = _Socket(family, kind, protocol)
            sock.due = due
            try:
                sock.within(sock.connect, address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._context is not None:
                    wrap = self._context.wrap_socket
                    sock = sock.within(wrap, sock, server_hostname=self._host)
                    sock.due = due
                return sock
            except OSError as exc:
                sock.close()
                failed = exc
        raise failed

    def close(self) -> None:
        """Give the connections back."""
        while self._idle:
            self._idle.pop().close()


def _read(response: http.client.HTTPResponse, most: float) -> bytearray:
    """The body, as far as the first bytes that are too many: a claimed length takes no memory."""
    data, read = bytearray(), memoryview(bytearray(_READ))
    while len(data) <= most and (size := response.readinto(read)):
        data += read[:size]
    if response.length and len(data) <= most:
        raise http.client.IncompleteRead(b"", response.length)
    return data


def _error_text(data: bytearray) -> str:
    text = data.decode(errors="replace")
    try:
        return str(json.loads(text)["error"])
    except (LookupError, TypeError, ValueError, RecursionError):
        return text[:500]


class GrpcTransport(Transport):
    """gRPC by tritonclient's own client, without proxies and compression."""

    def __init__(self, address: str, tls: bool, timeout: float, retries: int) -> None:
        super().__init__(address, tls, timeout, retries)
        self._triton = require("tritonclient.grpc", "serve", "the gRPC client")
        self._client = self._triton.InferenceServerClient(
            address,
            ssl=tls,
            channel_args=[
                ("grpc.max_send_message_length", _MOST),
                ("grpc.max_receive_message_length", _MOST),
                ("grpc.enable_http_proxy", 0),
                ("grpc.compression_enabled_algorithms_bitset", 1),  # none: answers can't unpack
            ],
        )

    def _metadata(self, due: float, model: str, version: str) -> Any:
        return self._call(self._client.get_model_metadata, due, model, version, as_json=True)

    def _infer(
        self, due: float, model: str, version: str, arrays: Any, request_id: str, most: float
    ) -> Iterable[tuple[Any, ...]]:
        inputs = []
        for name, array in arrays.items():
            kind = self._utils.np_to_triton_dtype(array.dtype)
            inputs.append(self._triton.InferInput(name, list(array.shape), kind))
            inputs[-1].set_data_from_numpy(array)
        options = {"model_version": version, "request_id": request_id}
        result = self._call(self._client.infer, due, model, inputs, **options).get_response()
        pairs = zip(result.outputs, result.raw_output_contents, strict=True)
        return ((output.name, output.datatype, output.shape, data) for output, data in pairs)

    def _call(self, method: Any, due: float, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, client_timeout=due - time.monotonic(), **kwargs)
        except self._utils.InferenceServerException as exc:
            status = (exc.status() or "").removeprefix("StatusCode.")
            text = exc.message() or ""
            # gRPC says UNAVAILABLE for a lost connection too; these words, for one never made.
            if status == "UNAVAILABLE" and "failed to connect to all addresses" in text:
                raise _NotConnectedError(text) from exc
            if status == "DEADLINE_EXCEEDED":
                raise self._late() from exc
            # What the server itself says of a model that isn't loaded is UNAVAILABLE as well.
            if status == "UNAVAILABLE" and "unknown model" not in text.lower():
                raise self._lost(text) from exc
            raise _refusal(status, text) from exc

    def close(self) -> None:
        """Give the connections back."""
        self._client.close()
