"""The client against the real server, and against servers that are not there or break off."""

from __future__ import annotations

import itertools
import json
import re
import select
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest_serving import SPECS

from fuzzing.answers import METADATA, OUTPUT, FakeServer, answer, inferred
from smoothl1_deploy import LossSpec
from smoothl1_deploy.cli import main
from smoothl1_deploy.errors import ArtefactError, InvalidInputError, ServerError, SpecError
from smoothl1_deploy.floats import NUMPY_DTYPE, ulp_distance
from smoothl1_deploy.parity.cases import with_beta
from smoothl1_deploy.reference.oracle import oracle, oracle_gradient
from smoothl1_deploy.serving import Client
from smoothl1_deploy.serving.launcher import Server
from smoothl1_deploy.serving.transport import open_transport

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


@pytest.mark.parametrize(
    "path", ["repository/index", "models/mean/stats", "systemsharedmemory/status", "logging"]
)
def test_restricted_apis_ask_for_the_admin_key(server: Server, path: str) -> None:
    request = urllib.request.Request(f"{server.addresses.to_dict()['http']}/v2/{path}")
    request.method = "POST" if path.endswith("index") else "GET"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request)
    request.add_header("admin-key", server.admin_key)
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 200


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


@pytest.mark.parametrize(
    "numbers", [{"retries": 1.5}, {"retries": -1}, {"timeout": 0}, {"timeout": float("inf")}]
)
def test_what_is_no_number_of_retries(numbers: dict[str, float]) -> None:
    with pytest.raises(SpecError, match="must be > 0 and finite, and retries=.* a whole number"):
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


# Servers that answer, and lie


@pytest.fixture
def liar() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake
        fake.shutdown()


def _output(**changes: object) -> list[dict[str, object]]:
    return [{**OUTPUT, **changes}]


def _metadata(**changes: object) -> bytes:
    return answer(json.dumps({**METADATA, **changes}).encode())


_DEEP = b"[" * 100_000
#: What is said of the model, or None for the truth; the answer to a request; words of the error.
LIES: dict[str, tuple[bytes | None, bytes, str]] = {
    "no JSON": (answer(b"hello"), b"", "Expecting value"),
    "JSON that is nested too deep": (answer(_DEEP), b"", "recursion"),
    "a number of 5,000 digits": (answer(b"9" * 5000), b"", "4300 digits"),
    "metadata that are a list": (answer(b"[]"), b"", "metadata without"),
    "metadata without outputs": (_metadata(outputs=[]), b"", "metadata without outputs"),
    "an infinite axis": (_metadata(outputs=_output(shape=[1e999])), b"", "infinity"),
    "a name that is a list": (None, inferred(_output(name=[]), bytes(64)), "unhashable"),
    "an answer of no JSON": (None, answer(b"{"), "Expecting property name"),
    "an answer that is nested too deep": (None, answer(_DEEP), "recursion"),
    "an answer without outputs": (None, inferred([], b""), "no 'loss'"),
    "an output that the model lacks": (
        None, inferred(_output(name="cost"), bytes(64)), "'cost', which the model does not have",
    ),
    "an output in JSON": (
        None, inferred([{**OUTPUT, "parameters": {}, "data": [0.0] * 16}], b""),
        "no 'binary_data_size'",
    ),
    "bytes that are not there": (None, inferred(_output(), bytes(60)), "64 bytes of loss, which"),
    "bytes that belong to nobody": (None, inferred(_output(), bytes(72)), "8 bytes that belong"),
    "fewer bytes than none": (
        None, inferred(_output(parameters={"binary_data_size": -4}), bytes(64)), "-4 bytes of loss",
    ),
    "JSON beyond the end": (
        None, answer(b"{}", "Inference-Header-Content-Length: 99"), "2 bytes, 99 of them JSON",
    ),
    "JSON of no length": (None, answer(b"{}", "Inference-Header-Content-Length: x"), "invalid lit"),
    "bytes in place of numbers": (
        None, inferred(_output(datatype="BYTES"), b"\xff" * 64), "loss is BYTES .*should be FP32",
    ),
    "another dtype": (
        None, inferred(_output(datatype="INT32"), bytes(64)), "and should be FP32 .1, 16.",
    ),
    "another shape": (None, inferred(_output(shape=[16, 1]), bytes(64)), "and should be FP32"),
    "an axis of -1": (None, inferred(_output(shape=[-1, 16]), bytes(64)), "and should be FP32"),
    "an axis that is no number": (None, inferred(_output(shape=["1", 16]), bytes(64)), "and shou"),
    "compressed": (
        None, answer(zlib.compress(bytes(2**26)), "Content-Encoding: deflate"), "a compressed answ",
    ),
    "more than was asked for": (
        None, inferred(_output(), bytes(2**21)), "more than 1,048,640 bytes, which is all",
    ),
    "more than there can be": (
        None, answer(bytes(2**21)).replace(b": 2097152", b": " + b"9" * 15), "more than 1,048,640",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_sentence_of_the_client_and_of_the_command_line(
    lie: str, liar: FakeServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    described, said, words = LIES[lie]
    liar.metadata = described or liar.metadata
    liar.answers = said
    np.savez(tmp_path / "pair.npz", input=np.ones((1, 16), "f4"), target=np.ones((1, 16), "f4"))
    arguments = ["run", "m", "--url", liar.url, "--data", str(tmp_path / "pair.npz")]
    assert main(arguments) == ServerError.exit_code
    told = " ".join(capfd.readouterr().err.split())
    assert re.search(f"answered what no Open Inference server does .*{words}", told), told


def test_a_truth_that_the_lies_differ_from(liar: FakeServer) -> None:
    liar.answers = inferred([OUTPUT], np.arange(16, dtype="f4").tobytes())
    with Client(liar.url, "m") as client:
        loss = client.loss(np.ones((1, 16), "f4"), np.ones((1, 16), "f4"))
    assert loss.tolist() == [list(range(16))]


def test_an_axis_that_may_have_any_length_still_has_one(liar: FakeServer) -> None:
    liar.answers = inferred(_output(shape=[-1, 16]), bytes(64))
    with (
        Client(liar.url, "m") as client,
        pytest.raises(ServerError, match="no Open Inference server does .*has the shape .-1, 16."),
    ):
        client.infer({"input": np.ones((1, 16), "f4")})


def test_a_loss_that_is_declared_as_bytes_is_refused_before_it_is_asked_for(
    liar: FakeServer,
) -> None:
    liar.metadata = _metadata(outputs=_output(datatype="BYTES"))
    with (
        Client(liar.url, "m") as client,
        pytest.raises(ArtefactError, match="gives loss as BYTES, which is no number format of a"),
    ):
        client.loss(np.ones((1, 16), "f4"), np.ones((1, 16), "f4"))
    assert not liar.bodies


def test_an_answer_that_is_cut_is_lost(liar: FakeServer) -> None:
    liar.answers = inferred([OUTPUT], bytes(64))[:-1]
    with (
        Client(liar.url, "m") as client,
        pytest.raises(ServerError, match="was lost .*1 more expected.*was not repeated"),
    ):
        client.loss(np.ones((1, 16), "f4"), np.ones((1, 16), "f4"))
    assert len(liar.bodies) == 1


def _dripped(whole: bytes) -> Iterator[bytes]:
    for byte in whole:
        time.sleep(0.02)
        yield bytes([byte])


_WHOLE = inferred([OUTPUT], bytes(64))


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("fast", [0, len(_WHOLE) - 64], ids=["header", "body"])
def test_the_time_out_is_for_the_whole_answer_however_it_drips(
    liar: FakeServer, fast: int, tls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    liar.answers = lambda: itertools.chain([_WHOLE[:fast]], _dripped(_WHOLE[fast:]))
    if tls:
        _certify(liar, tmp_path, monkeypatch)
    # 64 bytes take 1.3 s, all of them 5 s, and there is never half a second without one.
    with (
        Client(liar.url.replace("http", "https" if tls else "http"), "m", timeout=0.5) as client,
        pytest.raises(ServerError, match="gave no answer within 0.5 s; it was not asked again"),
    ):
        client.loss(np.ones((1, 16), "f4"), np.ones((1, 16), "f4"))


def _certify(fake: FakeServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have it speak TLS, with a certificate that the client trusts."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj"]
    command += ["/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        files = ["-keyout", key, "-out", certificate]
        subprocess.run([*command, *files], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is missing")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    fake.socket = context.wrap_socket(fake.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))


def test_a_certificate_that_nobody_trusts_is_no_connection(
    liar: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _certify(liar, tmp_path, monkeypatch)
    monkeypatch.delenv("SSL_CERT_FILE")
    with (
        Client(liar.url.replace("http", "https"), "m", retries=0) as client,
        pytest.raises(ServerError, match="no connection .*CERTIFICATE_VERIFY_FAILED"),
    ):
        client.metadata()


@pytest.mark.parametrize("breaker", ["keep"], indirect=True)
def test_the_time_out_of_a_big_send_says_so(breaker: Breaker) -> None:
    arrays = {"input": np.zeros(2**24, "u1")}  # more than the sockets hold; the server reads 64 kB
    transport = open_transport(f"http://127.0.0.1:{breaker.port}", 0.3, 0)
    with pytest.raises(ServerError, match="gave no answer within 0.3 s; it was not asked again"):
        transport.infer("mean", "", arrays)


@both
def test_the_tries_to_connect_are_within_the_time_out(protocol: str) -> None:
    with (
        Client(f"{protocol}://127.0.0.1:{_free_port()}", "mean", timeout=0.5, retries=9) as client,
        pytest.raises(ServerError, match="no connection to .* after [123] tries"),
    ):
        client.metadata()  # the fourth would come after 0.7 s, the last after 51


@both
def test_a_request_over_the_limit_of_the_protocol_is_refused_before_it_is_sent(
    protocol: str,
) -> None:
    transport = open_transport(f"{protocol}://127.0.0.1:{_free_port()}", 1, 0)
    with pytest.raises(InvalidInputError, match="have 2,147,483,648 bytes, and a request 2,147,48"):
        transport.infer("mean", "", {"input": np.zeros(2**31, "u1")})
    transport.close()


@both
def test_no_proxy_of_the_environment_is_used(
    server: Server, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        for name in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
            monkeypatch.setenv(name.upper(), f"http://127.0.0.1:{proxy.getsockname()[1]}")
        x, y, _ = arrays(SPECS["mean"], 2)
        with Client(server.addresses.to_dict()[protocol], "mean", timeout=5) as client:
            assert client.loss(x, y) == oracle(SPECS["mean"], x, y)


def test_a_connection_that_the_server_closed_meanwhile_is_not_used(liar: FakeServer) -> None:
    # It closes its connections after each answer, and says nothing of that.
    liar.metadata, liar.answers = (
        one.replace(b"Connection: close\r\n", b"") for one in (_metadata(), _WHOLE)
    )
    x = np.ones((1, 16), "f4")
    with Client(liar.url, "m") as client:
        for ask in (client.metadata, lambda: client.loss(x, x), lambda: client.loss(x, x)):
            ask()
            idle = client._transport._idle[0].sock  # type: ignore[attr-defined]
            assert select.select([idle], [], [], 30)[0]  # it is closed now


def _grpc_answer(**changes: Any) -> Any:
    from tritonclient.grpc import service_pb2

    output = {"name": "loss", "datatype": "FP32", "shape": [1, 16]}
    raw = changes.pop("raw", [bytes(64)])
    return service_pb2.ModelInferResponse(outputs=[{**output, **changes}], raw_output_contents=raw)


GRPC_LIES: dict[str, tuple[dict[str, Any], str]] = {
    "no numbers": ({"raw": []}, "no Open Inference server does .*shorter"),
    "more than the outputs": ({"raw": [bytes(64)] * 2}, "no Open Inference server does .*longer"),
    "too few numbers": ({"raw": [bytes(60)]}, "no Open Inference server does .*cannot reshape"),
    "bytes": ({"datatype": "BYTES", "raw": [b"\xff" * 8]}, "loss is BYTES .* should be FP32"),
    "a type that there is not": ({"datatype": "FP7"}, "loss is FP7 .* should be FP32"),
    "a negative axis": ({"shape": [-1, 16]}, "loss is FP32 .* should be FP32 .1, 16."),
    "another name": ({"name": "cost"}, "the output 'cost', which the model does not have"),
    "compressed": ({"compressed": True}, "the server says .*gzip"),
}


@pytest.fixture(scope="module")
def grpc_liar() -> Iterator[Any]:
    """A server over gRPC that gives the answer in its `said`."""
    grpc = pytest.importorskip("grpc")
    from google.protobuf.json_format import ParseDict
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    class Fake(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
        def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802, the name is gRPC's
            return ParseDict(METADATA, service_pb2.ModelMetadataResponse())

        def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
            said = dict(self.said)
            if said.pop("compressed", False):
                context.set_compression(grpc.Compression.Gzip)
            return _grpc_answer(**said)

    fake, serving = Fake(), grpc.server(ThreadPoolExecutor(1))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, serving)
    fake.url = f"grpc://127.0.0.1:{serving.add_insecure_port('127.0.0.1:0')}"
    serving.start()
    yield fake
    serving.stop(None).wait()


@pytest.mark.parametrize("lie", GRPC_LIES)
def test_a_lie_over_grpc(lie: str, grpc_liar: Any) -> None:
    x = np.ones((1, 16), "f4")
    with Client(grpc_liar.url, "m") as client:
        grpc_liar.said = {}
        assert not client.loss(x, x).any()  # the truth
        grpc_liar.said, words = GRPC_LIES[lie]
        with pytest.raises(ServerError, match=words):
            client.loss(x, x)


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
