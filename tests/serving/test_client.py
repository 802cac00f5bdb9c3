"""The client against the real server, and against servers that are not there or break off."""

from __future__ import annotations

import json
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest_serving import SPECS

from smoothl1_deploy import LossSpec
from smoothl1_deploy.cli import main
from smoothl1_deploy.errors import ArtefactError, InvalidInputError, ServerError, SpecError
from smoothl1_deploy.floats import NUMPY_DTYPE, ulp_distance
from smoothl1_deploy.parity.cases import with_beta
from smoothl1_deploy.reference.oracle import oracle, oracle_gradient
from smoothl1_deploy.serving import Client
from smoothl1_deploy.serving.launcher import Server

BETA = 0.25
BATCHED = ("none", "scores")

both = pytest.mark.parametrize("protocol", ["http", "grpc"])


@pytest.fixture
def ask(server: Server, protocol: str) -> Iterator[Callable[..., Client]]:
    opened: list[Client] = []

    def client(model: str, **options: float) -> Client:
        opened.append(Client(server.addresses.to_dict()[protocol], model, **options))
        return opened[-1]

    yield client
    for one in opened:
        one.close()


def arrays(spec: LossSpec, rows: int) -> list[np.ndarray]:
    numbers = np.random.default_rng(rows).normal(size=(3, rows, 16)) * 2
    numbers[2] = np.abs(numbers[2])  # a weight
    return list(numbers.astype(NUMPY_DTYPE[spec.dtype]))


def right(spec: LossSpec, x: np.ndarray, y: np.ndarray, w: np.ndarray | None) -> np.ndarray:
    return oracle(with_beta(spec, BETA) if spec.runtime_beta else spec, x, y, w)


def options(spec: LossSpec, w: np.ndarray) -> dict[str, object]:
    beta = {"beta": BETA} if spec.runtime_beta else {}
    return {**beta, **({"weight": w} if spec.weight else {})}


@both
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("rows", [0, 1, 5, 64])
def test_every_kind_of_loss(ask: Callable[..., Client], name: str, rows: int) -> None:
    if rows == 0 and name in BATCHED:
        pytest.skip("Triton's batches have one row at least")
    spec = SPECS[name]
    x, y, w = arrays(spec, rows)
    loss = ask(name).loss(x, y, **options(spec, w))
    exact = right(spec, x, y, w if spec.weight else None)
    assert (loss.dtype, loss.shape) == (exact.dtype, exact.shape)
    nan = np.isnan(exact)
    assert (np.isnan(loss) == nan).all() and bool(nan.all()) == (rows == 0 and "sum" not in name)
    assert (ulp_distance(loss, exact)[~nan] <= 3).all()


@both
def test_no_number_is_lost_on_the_way(ask: Callable[..., Client]) -> None:
    x, y, _ = arrays(SPECS["none"], 2)
    x[0, :6] = np.nan, np.inf, -np.inf, 1e-45, -0.0, 3.4e38
    loss = ask("none").loss(x, y)
    exact = oracle(SPECS["none"], x, y)
    assert np.isnan(loss[0, 0]) and loss[0, 1] == loss[0, 2] == np.inf
    assert np.array_equal(np.isnan(loss), np.isnan(exact))
    assert (ulp_distance(loss, exact)[~np.isnan(exact)] <= 3).all()


@both
def test_the_gradient_comes_too(ask: Callable[..., Client]) -> None:
    spec = SPECS["weighted"]
    x, y, w = arrays(spec, 4)
    outputs = ask("weighted").run(x, y, weight=w)
    assert sorted(outputs) == ["grad_input", "loss"]
    assert (ulp_distance(outputs["grad_input"], oracle_gradient(spec, x, y, w)) <= 4).all()


@both
def test_a_target_of_one_row_is_an_error_and_not_a_broadcast(ask: Callable[..., Client]) -> None:
    x, y, _ = arrays(SPECS["mean"], 5)
    with pytest.raises(InvalidInputError, match="the server says .*Reshape"):
        ask("mean").loss(x, y[:1])


@both
def test_more_rows_than_a_batch_may_have(ask: Callable[..., Client]) -> None:
    x, y, _ = arrays(SPECS["none"], 65)
    with pytest.raises(InvalidInputError, match="the server says .*must be <= 64"):
        ask("none").loss(x, y)


@both
def test_the_servers_own_words(ask: Callable[..., Client]) -> None:
    x, y, _ = arrays(SPECS["mean"], 2)
    with pytest.raises(ArtefactError, match="the server says .*'huber'"):
        ask("huber").loss(x, y)
    with pytest.raises(InvalidInputError, match="the server says .*unexpected shape|.*expected"):
        ask("mean").infer({"input": x[:, :3], "target": y[:, :3]})
    with pytest.raises(InvalidInputError, match="the server says .*FP64"):
        ask("mean").infer({"input": x.astype("f8"), "target": y.astype("f8")})


@both
def test_what_does_not_fit_is_refused_before_it_is_sent(ask: Callable[..., Client]) -> None:
    x, y, _ = arrays(SPECS["mean"], 2)
    with pytest.raises(InvalidInputError, match="takes input, target, and no beta; leave it out"):
        ask("mean").loss(x, y, beta=0.5)
    with pytest.raises(InvalidInputError, match="weight is missing; the model takes"):
        ask("weighted").loss(x, y)
    with pytest.raises(InvalidInputError, match="promote to float64"):
        ask("mean").loss(x, y.astype("f8"))


@both
def test_one_client_in_many_threads(ask: Callable[..., Client]) -> None:
    client, spec = ask("scores"), SPECS["scores"]

    def one(rows: int) -> bool:
        x, y, _ = arrays(spec, rows)
        return bool((ulp_distance(client.loss(x, y), oracle(spec, x, y)) <= 1).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, [1 + i % 20 for i in range(120)]))


@both
def test_run_with_a_url(
    server: Server, protocol: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    x, y, _ = arrays(SPECS["mean"], 7)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    files = ["--input", str(tmp_path / "x.npy"), "--target", str(tmp_path / "y.npy")]
    assert main(["run", "mean", "--url", server.addresses.to_dict()[protocol], *files]) == 0
    assert np.float32(capfd.readouterr().out) == oracle(SPECS["mean"], x, y)


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000", "ftp://127.0.0.1", "http://", "", "http://[::1", "http://127.0.0.1:99999",
        "grpc://127.0.0.1:x", "http://:8000",
    ],
)  # fmt: skip
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(SpecError, match="is no address of a server; write http://HOST:PORT"):
        Client(url, "mean")


@pytest.mark.parametrize("numbers", [{"retries": 1.5}, {"retries": -1}, {"timeout": 0}])
def test_what_is_no_number_of_retries(numbers: dict[str, float]) -> None:
    with pytest.raises(SpecError, match="must be > 0 and retries=.* a whole number >= 0"):
        Client("http://127.0.0.1:1", "mean", **numbers)


# Servers that fail


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@both
def test_no_server_is_tried_again_and_then_said(protocol: str) -> None:
    address = f"127.0.0.1:{_free_port()}"
    with Client(f"{protocol}://{address}", "mean", retries=2) as client:
        with pytest.raises(ServerError, match=f"^no connection to {address} after 3 tries") as got:
            client.infer({"input": np.zeros((1, 16), "f4")})
        assert client.retried == 2
    assert "smoothl1-deploy serve starts one" in str(got.value) and got.value.exit_code == 3


class Breaker(threading.Thread):
    """Accepts connections, reads what comes first, and then does as told."""

    def __init__(self, then: str) -> None:
        super().__init__(daemon=True)
        self.then, self.requests = then, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.kept: list[socket.socket] = []

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            asked = bool(connection.recv(65536))
            self.requests += asked
            if self.then == "close" or not asked:
                connection.close()
            else:
                self.kept.append(connection)

    def counted(self) -> int:
        """The requests that came: behind them all a connection of our own, without one."""
        with socket.create_connection(("127.0.0.1", self.port)) as last:
            last.shutdown(socket.SHUT_WR)
            assert last.recv(1) == b""
        return self.requests


@pytest.fixture
def breaker(request: pytest.FixtureRequest) -> Iterator[Breaker]:
    thread = Breaker(request.param)
    thread.start()
    yield thread
    thread.listener.close()
    for connection in thread.kept:
        connection.close()


@pytest.mark.parametrize("breaker", ["close"], indirect=True)
def test_a_request_whose_connection_breaks_is_not_repeated(breaker: Breaker) -> None:
    with (
        Client(f"http://127.0.0.1:{breaker.port}", "mean", retries=5) as client,
        pytest.raises(ServerError, match="was lost .*was not repeated, since the server may have"),
    ):
        client.infer({"input": np.zeros((1, 16), "f4")})
    assert breaker.counted() == 1 and client.retried == 0


@pytest.mark.parametrize("breaker", ["keep"], indirect=True)
def test_a_server_that_does_not_answer_is_not_asked_again(breaker: Breaker) -> None:
    with (
        Client(f"http://127.0.0.1:{breaker.port}", "mean", timeout=0.3) as client,
        pytest.raises(ServerError, match="gave no answer within 0.3 s; it was not asked again"),
    ):
        client.infer({"input": np.zeros((1, 16), "f4")})
    assert breaker.counted() == 1


_HEADER = b"Inference-Header-Content-Length: "
_ANSWERS = {
    "no JSON": b"Content-Length: 5\r\n\r\nhello",
    "no metadata": b"Content-Length: 2\r\n\r\n{}",
    "a list": b"Content-Length: 2\r\n\r\n[]",
    "a header that is longer": _HEADER + b"99\r\nContent-Length: 2\r\n\r\n{}",
    "a header that is no number": _HEADER + b"x\r\nContent-Length: 2\r\n\r\n{}",
    "binary that is missing": (
        _HEADER
        + b"120\r\nContent-Length: 120\r\n\r\n"
        + b'{"model_name":"mean","outputs":[{"name":"loss","datatype":"FP32","shape":[1],'
        b'"parameters":{"binary_data_size":4}}]}'.ljust(120)
    ),
}


@pytest.mark.parametrize("answer", _ANSWERS.values(), ids=list(_ANSWERS))
@pytest.mark.parametrize("ask", ["metadata", "infer"])
def test_a_server_of_another_kind(answer: bytes, ask: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\n" + answer)
                # Closed with half of a request unread, it would take the answer back.
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with (
            Client(url, "mean", timeout=60) as client,
            pytest.raises(ServerError, match="answered what no Open Inference server does"),
        ):
            if ask == "metadata":
                client.metadata()
            else:
                client.infer({"input": np.zeros((1, 16), "f4")})
        thread.join()


class Relay(threading.Thread):
    """Carries gRPC to the real server, until `cut` breaks every connection."""

    def __init__(self, target: str) -> None:
        super().__init__(daemon=True)
        host, _, port = target.rpartition(":")
        self.target = host, int(port)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.sockets: list[socket.socket] = []
        self.answers = True

    def run(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(self.target)
            self.sockets += [near, far]
            for source, sink, back in ((near, far, False), (far, near, True)):
                threading.Thread(target=self._carry, args=(source, sink, back), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, back: bool) -> None:
        try:
            while data := source.recv(65536):
                if back and not self.answers:
                    self.cut()  # the server answered, and the client will never know
                    return
                sink.sendall(data)
        except OSError:
            return

    def cut(self) -> None:
        for one in self.sockets:
            one.close() if one.fileno() < 0 else one.shutdown(socket.SHUT_RDWR)


def test_grpc_does_not_repeat_a_request_that_was_counted(server: Server) -> None:
    def counted() -> int:
        url = f"{server.addresses.to_dict()['http']}/v2/models/mean/stats"
        request = urllib.request.Request(url, headers={"admin-key": server.admin_key})
        with urllib.request.urlopen(request) as answer:
            stats = json.load(answer)["model_stats"][0]["inference_stats"]
        return int(stats["success"]["count"])

    relay = Relay(server.addresses.grpc)
    relay.start()
    x, y, _ = arrays(SPECS["mean"], 3)
    with Client(f"grpc://127.0.0.1:{relay.port}", "mean", retries=3) as client:
        client.loss(x, y)
        before = counted()
        relay.answers = False
        with pytest.raises(ServerError, match="was lost .*was not repeated"):
            client.loss(x, y)
        assert counted() == before + 1  # it was computed, once
        assert client.retried == 0
    relay.listener.close()
