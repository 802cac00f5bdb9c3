"""The ready file: claimed before the start, there while a server is ready, then gone."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from fuzzing.answers import FakeServer
from smoothl1_deploy.errors import OutputError
from smoothl1_deploy.serving.ready_file import ReadyFile

DEAD = 2**22 + 1  # above the largest process id


class Alive(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/v2/health/live" else 404)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Alive)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def left(path: Path, pid: int, http: str) -> Path:
    path.write_text(json.dumps({"pid": pid, "http": http, "models": []}))
    return path


def test_it_is_there_and_then_gone(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    file = ReadyFile(path)
    file.claim()
    assert list(tmp_path.iterdir()) == []  # a file there would mean ready
    file.write({"http": "http://127.0.0.1:1"})
    assert json.loads(path.read_text()) == {"http": "http://127.0.0.1:1"}
    file.withdraw()
    assert list(tmp_path.iterdir()) == []


def test_that_of_a_running_server_is_left_to_it(tmp_path: Path, address: str) -> None:
    path = left(tmp_path / "ready.json", os.getpid(), address)
    before = path.read_bytes()
    with pytest.raises(OutputError, match=rf"a server that runs \(process {os.getpid()}, http"):
        ReadyFile(path).claim()
    assert path.read_bytes() == before


def test_a_proxy_of_the_environment_is_not_asked_whether_it_runs(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with pytest.raises(OutputError, match="a server that runs"):
        ReadyFile(left(tmp_path / "ready.json", os.getpid(), address)).claim()


@pytest.mark.parametrize("said", [b"", b"hello\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"a" * 70_000])
def test_what_answers_no_http_is_no_server(tmp_path: Path, said: bytes) -> None:
    with FakeServer() as fake:
        fake.metadata = said
        path = left(tmp_path / "ready.json", os.getpid(), fake.url)
        ReadyFile(path).claim()
        fake.shutdown()
    assert not path.exists()


@pytest.mark.parametrize("pid", [DEAD, "x", None])
def test_that_of_a_server_that_was_killed_goes(tmp_path: Path, address: str, pid: int) -> None:
    path = left(tmp_path / "ready.json", pid, address)
    ReadyFile(path).claim()
    assert not path.exists()


def test_a_number_that_was_used_again_does_not_count(tmp_path: Path) -> None:
    path = left(tmp_path / "ready.json", os.getpid(), "http://127.0.0.1:1")
    ReadyFile(path).claim()
    assert not path.exists()


@pytest.mark.parametrize("content", [b"", b"weights", b"[]", b'{"pid": 1}', b"\xff"])
def test_a_file_that_is_something_else_is_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "loss.onnx"
    path.write_bytes(content)
    with pytest.raises(OutputError, match="no ready file of a server; name another file"):
        ReadyFile(path).claim()
    assert path.read_bytes() == content


def test_a_folder_and_a_place_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="Is a directory; name another file"):
        ReadyFile(tmp_path).claim()
    with pytest.raises(OutputError, match="choose a file in a folder that exists"):
        ReadyFile(tmp_path / "none" / "ready.json").claim()


def test_what_another_server_put_there_is_not_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    file = ReadyFile(path)
    file.write({"pid": 1})
    path.write_text("{}")
    file.withdraw()
    assert path.read_text() == "{}"


def test_no_path_no_file(tmp_path: Path) -> None:
    file = ReadyFile(None)
    file.claim()
    file.write({})
    file.withdraw()


def test_withdrawn_unwritten_it_touches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    path.write_text("{}")
    ReadyFile(path).withdraw()
    assert path.exists()
