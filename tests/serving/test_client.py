"""The client against the real server, and against servers that are not there, break off or lie."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import select
import socket
import ssl
import subprocess
import textwrap
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest_serving import SPECS, WHOLE

from fuzzing.answers import METADATA, OUTPUT, FakeServer, answer, inferred
from smoothl1_deploy import LossSpec, load
from smoothl1_deploy._floats import NUMPY_DTYPE, ulp_distance
from smoothl1_deploy.cli import main
from smoothl1_deploy.errors import ArtefactError, InvalidInputError, ServerError, SpecError
from smoothl1_deploy.parity._cases import with_beta
from smoothl1_deploy.reference._oracle import exact_outputs, oracle
from smoothl1_deploy.serving import Client
from smoothl1_deploy.serving._server import Server
from smoothl1_deploy.serving._transport import open_transport

BETA = 0.25
ONE = np.ones((1, 16), "f4")

both = pytest.mark.parametrize("protocol", ["http", "grpc"])


@pytest.fixture
def ask(server: Server, protocol: str) -> Iterator[Callable[[str], Client]]:
    with contextlib.ExitStack() as opened:
        url = server.addresses.to_dict()[protocol]
        yield lambda model: opened.enter_context(Client(url, model))


def arrays(spec: LossSpec, rows: int) -> list[np.ndarray]:
    numbers = np.random.default_rng(rows).normal(size=(3, rows, 16)) * 2
    numbers[2] = np.abs(numbers[2])  # a weight
    return list(numbers.astype(NUMPY_DTYPE[spec.dtype]))


def is_right(answer: np.ndarray, exact: np.ndarray, ulp: int = 3) -> bool:
    nan = np.isnan(exact)
    same = (answer.dtype, answer.shape) == (exact.dtype, exact.shape)
    return same and bool(
        (np.isnan(answer) == nan).all() and (ulp_distance(answer, exact)[~nan] <= ulp).all()
    )


@both
def test_every_kind_of_loss_and_the_gradient_beside_it(ask: Callable[[str], Client]) -> None:
    for (name, spec), rows in itertools.product(SPECS.items(), (0, 1, 5, 64)):
        if rows == 0 and name in ("none", "scores"):  # Triton's batches have one row at least
            continue
        x, y, w = arrays(spec, rows)
        of_nothing = rows == 0 and "sum" not in name and not spec.divisor
        known = with_beta(spec, BETA) if spec.runtime_beta else spec
        given = {"input": x, "target": y, "weight": w, "mask": w > 1, "divisor": 7.0}
        given["beta"] = known.effective_beta
        given = {role: value for role, value in given.items() if role in spec.inputs}
        outputs = ask(name).run(**given)
        given.pop("beta", None)
        exact = exact_outputs(known, **given)
        assert {*outputs} == {*exact} and np.isnan(outputs["loss"]).all() == of_nothing, name
        for output, array in exact.items():
            assert is_right(outputs[output], array, 4), (name, rows)


def test_the_example_of_the_client(server: Server) -> None:
    url = server.addresses.to_dict()["http"]
    example = textwrap.dedent((Client.__doc__ or "").partition("Example:\n")[2])
    exec(example.replace("http://127.0.0.1:8000", url), {"Client": Client, "np": np})


@both
def test_no_number_is_lost_on_the_way(ask: Callable[[str], Client]) -> None:
    x, y, _ = arrays(SPECS["none"], 2)
    x[0, :6] = np.nan, np.inf, -np.inf, 1e-45, -0.0, 3.4e38
    loss = ask("none").loss(x, y)
    assert np.isnan(loss[0, 0]) and loss[0, 1] == loss[0, 2] == np.inf
    assert is_right(loss, oracle(SPECS["none"], x, y))


@both
def test_what_the_server_refuses_is_told_in_its_words(ask: Callable[[str], Client]) -> None:
    x, y, _ = arrays(SPECS["mean"], 65)

    def refused(model: str, words: str, **feeds: np.ndarray) -> None:
        with pytest.raises(InvalidInputError, match=f"the server says .*{words}"):
            ask(model).infer(feeds)

    refused("mean", "Reshape", input=x, target=y[:1])  # and no broadcast
    refused("none", "must be <= 64", input=x, target=y)
    refused("mean", "(unexpected shape|expected)", input=x[:, :3], target=y[:, :3])
    refused("mean", "FP64", input=x.astype("f8"), target=y.astype("f8"))
    with pytest.raises(ArtefactError, match="the server says .*'huber'"):
        ask("huber").loss(x, y)


@both
def test_what_does_not_fit_is_refused_before_it_is_sent(ask: Callable[[str], Client]) -> None:
    x, y, _ = arrays(SPECS["mean"], 2)
    with pytest.raises(InvalidInputError, match="takes input, target, and no beta; leave it out"):
        ask("mean").loss(x, y, beta=0.5)
    with pytest.raises(InvalidInputError, match="weight is missing; the model takes"):
        ask("weighted").loss(x, y)
    with pytest.raises(InvalidInputError, match="promote to float64"):
        ask("mean").loss(x, y.astype("f8"))


@both
@pytest.mark.parametrize("name", [*WHOLE])
def test_a_whole_model_gives_the_bits_that_the_file_gives_here_by_its_own_names(
    ask: Callable[[str], Client], server: Server, protocol: str, name: str,
    tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    images = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype("f4")
    images[0, 0, 0, :3] = np.nan, np.inf, -0.0
    given = {"images": images, "boxes_gt": np.zeros((5, 4 if name == "detector" else 192), "f4")}
    if name == "detector":
        given["wide"] = np.array([4])
    # The server has none of our operators: it runs what the file carries.
    expected = load(WHOLE[name], "ort-cpu-bare").run(**given)
    found = ask(name).run(**given)
    assert [*found] == [*expected]
    assert all(found[n].tobytes() == array.tobytes() for n, array in expected.items())

    files = []
    for port, array in given.items():
        np.save(tmp_path / f"{port}.npy", array)
        files += ["--input", f"{port}={tmp_path / port}.npy"]
    np.savez(tmp_path / "all.npz", **given)
    url = server.addresses.to_dict()[protocol]
    for words in (files, ["--data", str(tmp_path / "all.npz")]):
        out = tmp_path / "out.npz"
        assert main(["run", name, "--url", url, *words, "-o", str(out)]) == 0
        with np.load(out) as written:
            assert all(written[n].tobytes() == a.tobytes() for n, a in expected.items())
    capfd.readouterr()


@both
def test_what_does_not_fit_a_whole_model_is_told_in_the_words_of_load(
    ask: Callable[[str], Client],
) -> None:
    images, boxes = np.zeros((2, 3, 8, 8), "f4"), np.zeros((2, 192), "f4")
    takes = r"the model takes images: float32\[\?,3,8,8\], boxes_gt: float32\[\?,192\]"
    for given, words in (
        ({"images": images}, f"boxes_gt is missing; {takes}"),
        ({"input": images, "target": boxes}, f"no input 'input', no input 'target', .*{takes}"),
        ({"images": images[0], "boxes_gt": boxes}, r"images has the shape \(3, 8, 8\), and the m"),
        (
            {"images": images.astype("f8"), "boxes_gt": boxes},
            "images is float64, .*; convert it to float32",
        ),
    ):
        with pytest.raises(InvalidInputError, match=words):
            ask("head").run(**given)


@both
def test_one_client_gives_many_threads_their_own_answers(ask: Callable[[str], Client]) -> None:
    client, spec = ask("scores"), SPECS["scores"]

    def one(rows: int) -> bool:
        x, y, _ = arrays(spec, rows)
        return bool((ulp_distance(client.loss(x, y), oracle(spec, x, y)) <= 1).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, [1 + i % 20 for i in range(120)]))


def test_what_is_no_address_and_no_number_of_retries_is_refused() -> None:
    for url in (
        *("127.0.0.1:8000", "ftp://127.0.0.1", "http://", "", "http://[::1", "http://:8000"),
        *("http://127.0.0.1:99999", "grpc://127.0.0.1:x"),
    ):
        with pytest.raises(SpecError, match="is no address of a server; write http://HOST:PORT"):
            Client(url, "mean")
    for numbers in ({"retries": 1.5}, {"retries": -1}, {"timeout": 0}, {"timeout": float("inf")}):
        with pytest.raises(SpecError, match="must be > 0 and finite, and retries=.* a whole numb"):
            Client("http://127.0.0.1:1", "mean", **numbers)  # type: ignore[arg-type]


# Servers that fail


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@both
def test_no_server_is_tried_again_within_the_time_and_then_said(protocol: str) -> None:
    address = f"127.0.0.1:{_free_port()}"
    with Client(f"{protocol}://{address}", "mean", retries=2) as client:
        with pytest.raises(ServerError, match=f"^no connection to {address} after 3 tries") as got:
            client.metadata()
        assert client.retried == 2
    assert "smoothl1-deploy serve starts one" in str(got.value) and got.value.exit_code == 3
    with (
        Client(f"{protocol}://{address}", "mean", timeout=0.5, retries=9) as client,
        pytest.raises(ServerError, match="no connection to .* after [123] tries"),
    ):
        client.metadata()  # the fourth would come after 0.7 s, the last after 51


@pytest.fixture
def liar() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake
        fake.shutdown()


def fails(fake: FakeServer, words: str, **options: Any) -> None:
    """One request to it fails in these words, and is not sent again."""
    with Client(fake.url, "m", **options) as client:
        with pytest.raises(ServerError, match=words):
            client.loss(ONE, ONE)
        assert (len(fake.bodies), client.retried) == (1, 0)


def test_a_request_that_was_sent_is_not_repeated(liar: FakeServer) -> None:
    fails(liar, "was lost .*was not repeated, since the server may have", retries=5)


def test_an_answer_that_is_cut_is_lost(liar: FakeServer) -> None:
    liar.answers = inferred([OUTPUT], bytes(64))[:-1]
    fails(liar, "was lost .*1 more expected.*was not repeated")


def test_a_server_that_does_not_answer_is_not_asked_again(liar: FakeServer) -> None:
    over = threading.Event()
    liar.answers = lambda: iter([b"" * over.wait(60)])
    fails(liar, "gave no answer within 0.3 s; it was not asked again", timeout=0.3)
    over.set()


def test_the_time_out_of_a_big_send_says_so() -> None:
    arrays = {"input": np.zeros(2**24, "u1")}  # more than the sockets hold
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        transport = open_transport(f"http://127.0.0.1:{deaf.getsockname()[1]}", 0.3, 0)
        with pytest.raises(ServerError, match="gave no answer within 0.3 s; it was not asked agai"):
            transport.infer("mean", "", arrays)


# Servers that answer, and lie


def _output(**changes: object) -> list[dict[str, object]]:
    return [{**OUTPUT, **changes}]


def _metadata(**changes: object) -> bytes:
    return answer(json.dumps({**METADATA, **changes}).encode())


_DEEP = answer(b"[" * 100_000)
_SIZE = "Inference-Header-Content-Length"
#: What is said of the model, and words of the error.
DESCRIPTIONS = [
    (answer(b"hello"), "Expecting value"),
    (_DEEP, "recursion"),
    (answer(b"9" * 5000), "4300 digits"),
    (answer(b"[]"), "metadata without"),
    (_metadata(outputs=[]), "metadata without outputs"),
    (_metadata(outputs=_output(shape=[1e999])), "infinity"),
]
#: What a request is answered.
ANSWERS = [
    (answer(b"{"), "Expecting property name"),
    (_DEEP, "recursion"),
    (inferred([], b""), "no 'loss'"),
    (inferred(_output(name=[]), bytes(64)), "unhashable"),
    (inferred(_output(name="cost"), bytes(64)), "'cost', which the model does not have"),
    (inferred(_output(parameters={}, data=[0.0] * 16), b""), "no 'binary_data_size'"),
    (inferred(_output(), bytes(60)), "64 bytes of loss, which"),
    (inferred(_output(), bytes(72)), "8 bytes that belong"),
    (inferred(_output(parameters={"binary_data_size": -4}), bytes(64)), "-4 bytes of loss"),
    (answer(b"{}", f"{_SIZE}: 99"), "2 bytes, 99 of them JSON"),
    (answer(b"{}", f"{_SIZE}: x"), "invalid lit"),
    (inferred(_output(datatype="BYTES"), b"\xff" * 64), "loss is BYTES .*should be FP32"),
    (inferred(_output(datatype="INT32"), bytes(64)), "and should be FP32 .1, 16."),
    (inferred(_output(shape=[16, 1]), bytes(64)), "and should be FP32"),
    (inferred(_output(shape=[-1, 16]), bytes(64)), "and should be FP32"),
    (inferred(_output(shape=["1", 16]), bytes(64)), "and should be FP32"),
    (answer(zlib.compress(bytes(2**26)), "Content-Encoding: deflate"), "a compressed answ"),
    (inferred(_output(), bytes(2**21)), "more than 1,048,640 bytes, which is all"),
    (answer(bytes(2**21)).replace(b": 2097152", b": " + b"9" * 15), "more than 1,048,640"),
]


def test_a_lie_is_one_sentence_of_the_client_and_of_the_command_line(
    liar: FakeServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "pair.npz", input=ONE, target=ONE)
    arguments = ["run", "m", "--url", liar.url, "--data", str(tmp_path / "pair.npz")]
    lies = [(said, b"", words) for said, words in DESCRIPTIONS]
    for liar.metadata, liar.answers, words in (*lies, *((_metadata(), *one) for one in ANSWERS)):
        assert main(arguments) == ServerError.exit_code, words
        told = " ".join(capfd.readouterr().err.split())
        assert re.search(f"answered what no Open Inference server does .*{words}", told), told


def test_a_truth_that_the_lies_differ_from(liar: FakeServer) -> None:
    liar.answers = inferred([OUTPUT], np.arange(16, dtype="f4").tobytes())
    with Client(liar.url, "m") as client:
        assert client.loss(ONE, ONE).tolist() == [list(range(16))]
        liar.answers = inferred(_output(shape=[-1, 16]), bytes(64))
        with pytest.raises(ServerError, match="does .*has the shape .-1, 16."):
            client.infer({"input": ONE})  # an axis that may have any length still has one


def test_a_loss_that_is_declared_as_bytes_is_refused_before_it_is_asked_for(
    liar: FakeServer,
) -> None:
    liar.metadata = _metadata(outputs=_output(datatype="BYTES"))
    with (
        Client(liar.url, "m") as client,
        pytest.raises(ArtefactError, match="gives loss as BYTES, which is no number format of a"),
    ):
        client.loss(ONE, ONE)
    assert not liar.bodies


_WHOLE = inferred([OUTPUT], bytes(64))


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_the_time_out_is_for_the_whole_answer_however_it_drips(
    liar: FakeServer, tls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dripped(fast: int) -> Iterator[bytes]:
        yield _WHOLE[:fast]
        for byte in _WHOLE[fast:]:
            time.sleep(0.02)
            yield bytes([byte])

    if tls:
        _certify(liar, tmp_path, monkeypatch)
    # The header takes 3.7 s, the 64 bytes of the body 1.3, and there is never half a second
    # without one.
    for fast in (0, len(_WHOLE) - 64):
        liar.answers = lambda fast=fast: dripped(fast)
        with (
            Client(
                liar.url.replace("http", "https" if tls else "http"), "m", timeout=0.5
            ) as client,
            pytest.raises(ServerError, match="gave no answer within 0.5 s; it was not asked again"),
        ):
            client.loss(ONE, ONE)


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
    with Client(liar.url, "m") as client:
        for ask in (client.metadata, lambda: client.loss(ONE, ONE), lambda: client.loss(ONE, ONE)):
            ask()
            idle = client._transport._idle[0].sock  # type: ignore[attr-defined]
            assert select.select([idle], [], [], 30)[0]  # it is closed now


# The same over gRPC


class GrpcLiar:
    """A server over gRPC that answers with `said`, whose entries change the truth.

    Attributes:
        asked: how many requests came.
    """

    def __init__(self) -> None:
        import grpc
        from google.protobuf.json_format import ParseDict
        from tritonclient.grpc import service_pb2, service_pb2_grpc

        liar = self

        class Fake(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
            def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802, gRPC's name
                return ParseDict(METADATA, service_pb2.ModelMetadataResponse())

            def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
                liar.asked += 1
                said = {"name": "loss", "datatype": "FP32", "shape": [1, 16], **liar.said}
                raw = said.pop("raw", [bytes(64)])
                if said.pop("compressed", False):
                    context.set_compression(grpc.Compression.Gzip)
                if said.pop("lost", False):
                    context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
                return service_pb2.ModelInferResponse(outputs=[said], raw_output_contents=raw)

        self.said: dict[str, Any] = {}
        self.asked = 0
        self.serving = grpc.server(ThreadPoolExecutor(1))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Fake(), self.serving)
        self.url = f"grpc://127.0.0.1:{self.serving.add_insecure_port('127.0.0.1:0')}"
        self.serving.start()


def test_a_lie_over_grpc_and_a_request_that_was_sent_and_lost() -> None:
    pytest.importorskip("grpc")
    liar = GrpcLiar()
    with Client(liar.url, "m", retries=3) as client:
        assert not client.loss(ONE, ONE).any()  # the truth
        for liar.said, words in (
            ({"raw": []}, "no Open Inference server does .*shorter"),
            ({"raw": [bytes(64)] * 2}, "no Open Inference server does .*longer"),
            ({"raw": [bytes(60)]}, "no Open Inference server does .*cannot reshape"),
            ({"datatype": "BYTES", "raw": [b"\xff" * 8]}, "loss is BYTES .* should be FP32"),
            ({"datatype": "FP7"}, "loss is FP7 .* should be FP32"),
            ({"shape": [-1, 16]}, "loss is FP32 .* should be FP32 .1, 16."),
            ({"name": "cost"}, "the output 'cost', which the model does not have"),
            ({"compressed": True}, "the server says .*gzip"),
            ({"lost": True}, "was lost .*was not repeated"),
        ):
            before = liar.asked
            with pytest.raises(ServerError, match=words):
                client.loss(ONE, ONE)
            assert (liar.asked, client.retried) == (before + 1, 0)
    liar.serving.stop(None).wait()
