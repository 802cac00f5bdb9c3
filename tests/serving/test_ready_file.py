"""The ready file: claimed before the start, there while a server is ready, then gone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzzing.answers import FakeServer, answer
from smoothl1_deploy.errors import OutputError
from smoothl1_deploy.serving._supervise import claim_ready_file, withdraw_ready_file


@pytest.fixture
def address() -> Iterator[str]:
    """Of a server that says it lives."""
    with FakeServer() as fake:
        fake.metadata = answer(b"")
        yield fake.url
        fake.shutdown()


def left(path: Path, pid: object, http: str) -> Path:
    path.write_text(json.dumps({"pid": pid, "http": http, "models": []}))
    return path


def test_that_of_a_running_server_is_left_to_it_and_no_proxy_is_asked(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    path = left(tmp_path / "ready.json", os.getpid(), address)
    before = path.read_bytes()
    with pytest.raises(OutputError, match=rf"a server that runs \(process {os.getpid()}, http"):
        claim_ready_file(path)
    assert path.read_bytes() == before


def test_what_a_server_that_was_killed_left_goes(tmp_path: Path, address: str) -> None:
    dead = 2**22 + 1  # above the largest process id
    place = tmp_path / "ready.json"
    for pid, http in (
        (dead, address),
        ("x", address),
        (None, address),
        (os.getpid(), "http://127.0.0.1:1"),  # a number that was used again
        (os.getpid(), "no address"),
    ):
        claim_ready_file(left(place, pid, http))
        assert not place.exists(), (pid, http)


def test_what_answers_no_http_is_no_server(tmp_path: Path) -> None:
    with FakeServer() as fake:
        for fake.metadata in (b"", b"hello\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"a" * 70_000):
            path = left(tmp_path / "ready.json", os.getpid(), fake.url)
            claim_ready_file(path)
            assert not path.exists()
        fake.shutdown()


def test_a_file_that_is_something_else_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "loss.onnx"
    for content in (b"", b"weights", b"[]", b'{"pid": 1}', b"\xff"):
        path.write_bytes(content)
        with pytest.raises(OutputError, match="no ready file of a server; name another file"):
            claim_ready_file(path)
        assert path.read_bytes() == content


def test_a_path_that_can_hold_no_file_is_refused_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="Is a directory; name another file"):
        claim_ready_file(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="choose a file in a folder that you may write to"):
        claim_ready_file(tmp_path / "file" / "ready.json")


def test_it_is_removed_unless_another_server_has_put_its_own_there(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    claim_ready_file(path)
    assert list(tmp_path.iterdir()) == []  # a file there would mean ready
    path.write_bytes(b"{}")
    withdraw_ready_file(path, b'{"pid": 1}')
    assert path.read_bytes() == b"{}"
    withdraw_ready_file(path, b"{}")
    assert list(tmp_path.iterdir()) == []
