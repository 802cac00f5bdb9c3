"""A target on the client of a server: what it sends, and what it makes of any answer at all."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from smoothl1_deploy.serving import Client

from .damage import BYTE_EDITS, damage_bytes
from .target import Target
from .values import ARRAYS, JSON, NAMES, mostly, some

_SIZE = "Inference-Header-Content-Length"
_PORT = {"datatype": "FP32", "shape": [-1, 16]}
#: What the server says of a model that gives the loss of each element.
METADATA: dict[str, Any] = {
    "name": "m",
    "inputs": [{"name": "input", **_PORT}, {"name": "target", **_PORT}],
    "outputs": [{"name": "loss", **_PORT}],
}
#: What an answer says of the losses of one row.
OUTPUT: dict[str, Any] = {
    "name": "loss",
    "datatype": "FP32",
    "shape": [1, 16],
    "parameters": {"binary_data_size": 64},
}


def answer(body: bytes, *headers: str) -> bytes:
    """An answer of HTTP, the last on its connection."""
    lines = ["HTTP/1.1 200 OK", "Connection: close", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def inferred(outputs: Any, data: bytes, *headers: str) -> bytes:
    """An answer that says `outputs` of `data`."""
    head = json.dumps({"outputs": outputs}).encode()
    return answer(head + data, f"{_SIZE}: {len(head)}", *headers)


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        self._say(self.server.metadata)

    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self._say(self.server.answers)

    def _say(self, pieces: bytes | Callable[[], Iterable[bytes]]) -> None:
        try:
            for piece in [pieces] if isinstance(pieces, bytes) else pieces():
                self.wfile.write(piece)
        except OSError:  # the client had enough
            pass
        self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


class FakeServer(ThreadingHTTPServer):
    """A server on 127.0.0.1 that answers to the letter what it was told, in a thread.

    Attributes:
        metadata: what a GET is answered, or a function that gives it in pieces.
        answers: what a POST is answered, likewise.
        bodies: what each POST held.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.metadata: bytes | Callable[[], Iterable[bytes]] = answer(json.dumps(METADATA).encode())
        self.answers: bytes | Callable[[], Iterable[bytes]] = b""
        self.bodies: list[bytes] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        """Where it is asked."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@functools.cache
def _server() -> FakeServer:
    return FakeServer()


@st.composite
def _edited(draw: st.DrawFn, sound: Any) -> Any:
    """JSON, one time in two with anything somewhere in it."""
    value = json.loads(json.dumps(sound))
    holder: Any = value
    if draw(st.booleans()):
        return value
    while True:
        keys = range(len(holder)) if isinstance(holder, list) else sorted(holder)
        key = draw(st.sampled_from(list(keys)))
        if not isinstance(holder[key], list | dict) or not holder[key] or draw(st.booleans()):
            holder[key] = draw(some(JSON, st.integers(-2, 80), NAMES))
            return value
        holder = holder[key]


_HEADERS = st.lists(
    st.sampled_from([
        "Transfer-Encoding: chunked", "Content-Encoding: gzip", "Connection: keep-alive",
        "Content-Length: 5", f"Content-Length: {10**30}", f"{_SIZE}: -3", f"{_SIZE}: x",
    ]),
    max_size=2,
)  # fmt: skip


def _check(case: tuple[Any, ...], folder: Path) -> None:
    metadata, outputs, data, headers, edits, arrays = case
    server = _server()
    server.bodies.clear()
    server.metadata = answer(json.dumps(metadata).encode())
    server.answers = inferred(outputs, data, *headers)
    if edits:
        server.answers = damage_bytes(server.answers, edits)
    with Client(server.url, "m", timeout=20) as client:
        try:
            found = (
                client.run(*arrays[:2]) if len(arrays) > 1 else client.infer({"input": arrays[0]})
            )
        finally:
            for body in server.bodies:
                head, end = json.JSONDecoder().raw_decode(body.decode("latin-1"))
                sizes = [port["parameters"]["binary_data_size"] for port in head["inputs"]]
                assert end + sum(sizes) == len(body), (head, len(body))
        for port in client.metadata()["outputs"]:
            array = found[port["name"]]
            assert isinstance(array, np.ndarray) and (array.dtype != object or len(arrays) == 1)


TARGETS = [
    Target(
        "answer",
        st.tuples(
            _edited(METADATA),
            _edited([OUTPUT]),
            mostly(st.just(bytes(64)), st.binary(max_size=80)),
            mostly(st.just([]), _HEADERS),
            mostly(st.none(), BYTE_EDITS),
            mostly(st.just([np.ones((1, 16), "f4")] * 2), st.lists(ARRAYS, min_size=1, max_size=2)),
        ),
        _check,
        share=5,
    ),
]
