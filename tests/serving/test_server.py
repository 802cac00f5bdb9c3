"""`smoothl1-deploy serve` with the real server: ready, looked after, ended with nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import helper

import smoothl1_deploy
from smoothl1_deploy import LossSpec, verify
from smoothl1_deploy.cli import main
from smoothl1_deploy.errors import BackendUnavailableError, ServerError
from smoothl1_deploy.graph import _metadata as metadata
from smoothl1_deploy.ops import library
from smoothl1_deploy.parity._certificate import certify
from smoothl1_deploy.reference._oracle import oracle
from smoothl1_deploy.serving import Client
from smoothl1_deploy.serving import _private as private
from smoothl1_deploy.serving import _server as module
from smoothl1_deploy.serving._embedded import Triton, install_path
from smoothl1_deploy.serving._repository import served_loss, write_loss
from smoothl1_deploy.serving._server import Server
from smoothl1_deploy.serving._supervise import Supervisor, service

ROOT = Path(smoothl1_deploy.__file__).parent.parent
MEAN, NONE = LossSpec(), LossSpec(reduction="none")


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory, triton: Triton) -> Path:
    folder = tmp_path_factory.mktemp("certified") / "models"
    (mean,) = write_loss(folder, MEAN, name="mean")
    write_loss(folder, NONE, name="none")
    certify(verify(mean.file, drift=False), mean.file)
    return folder


@pytest.fixture
def models(tmp_path: Path, certified: Path) -> Path:
    return shutil.copytree(certified, tmp_path / "models")


class Served:
    """The command on a folder, in a process of its own that ends with the block."""

    def __init__(
        self, folder: Path, *options: str, python: str = sys.executable, **variables: str
    ) -> None:
        self.ready, self.logs = folder.parent / "ready.json", folder.parent / "logs"
        command = [python, "-m", "smoothl1_deploy", "serve", str(folder), *options]
        command += ["--ready-file", str(self.ready), "--logs", str(self.logs)]
        self.process = subprocess.Popen(
            command, cwd=folder.parent, env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.communicate(timeout=300)

    def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, "it never came"
            time.sleep(0.05)

    def facts(self) -> dict[str, Any]:
        """What the ready file says, once it is there."""
        self.until(self.ready.exists)
        found: dict[str, Any] = json.loads(self.ready.read_text())
        return found

    def events(self) -> list[dict[str, Any]]:
        path = self.logs / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def end(self, number: int) -> None:
        """It ends by a signal, and leaves nothing."""
        left = Family(self.process.pid)
        self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == 0 and out.endswith("stopped\n"), out
        assert not self.ready.exists()
        left.assert_gone()


class Family:
    """The processes below one, and what the shared memory of the servers among them begins with."""

    def __init__(self, pid: int) -> None:
        self.all = psutil.Process(pid).children(recursive=True)
        # The stub is tried out twice before it runs a model: once by us, and once by the server.
        self.models: list[psutil.Process] = []
        self.memory: set[str] = set()
        for child in self.all:
            with contextlib.suppress(psutil.NoSuchProcess):  # a trial is over at once
                for word in child.cmdline():
                    if found := re.match("smoothl1_[0-9a-f]{12}_", word):
                        self.models.append(child)
                        self.memory.add(found[0])

    def regions(self) -> list[str]:
        return [name for name in os.listdir("/dev/shm") if name.startswith(tuple(self.memory))]

    def assert_gone(self) -> None:
        assert not psutil.wait_procs(self.all, timeout=60)[1]
        assert self.regions() == []


def answers(url: str, model: str = "mean") -> bool:
    """Whether a model gives the mean."""
    x, y = np.random.default_rng(3).normal(size=(2, 5, 16)).astype(np.float32)
    with Client(url, model) as client:
        return bool(client.loss(x, y) == oracle(MEAN, x, y))


def test_it_serves_is_looked_after_and_leaves_nothing(models: Path) -> None:
    with Served(models, "--interval", "0.2") as served:
        facts = served.facts()
        assert [model["name"] for model in facts["models"]] == ["mean", "none"]
        states = [model["certificate"]["state"] for model in facts["models"]]
        assert states == ["matches", "absent"]
        assert all(facts[key].split("//")[1].startswith("127.0.0.1:") for key in ("http", "grpc"))
        assert answers(facts["grpc"])
        running = Family(served.process.pid)
        assert running.regions()
        for child in running.models:
            assert child.environ()["ORT_DISABLE_TELEMETRY"] == "1"
        next(p for p in running.models if "/mean/" in " ".join(p.cmdline())).kill()
        served.until(lambda: any(e["event"] == "reloaded" for e in served.events()))
        assert answers(facts["grpc"])
        shutil.copytree(models / "mean/1", models / "new")
        (models / "new").rename(models / "mean/2")
        served.until(lambda: served.facts()["models"][0]["version"] == "2")
        served.end(signal.SIGINT)
    log = served.events()
    assert [e["event"] for e in log if e["event"] in ("ready", "stopped")] == ["ready", "stopped"]
    failed = next(e for e in log if e["event"] == "canary_failed")
    assert failed["model"] == "mean" and failed["level"] == "warning"
    assert failed["reason"] == "the process of 'mean' has died"


def test_the_operators_of_this_installation_are_run_and_no_other_library(
    tmp_path: Path, triton: Triton
) -> None:
    """A body that gives back its input would show: the right loss is the kernel's."""
    try:
        ours = library()
    except BackendUnavailableError as exc:
        pytest.skip(str(exc))
    folder = tmp_path / "models"
    for name in ("ours", "stranger"):
        (written,) = write_loss(folder, MEAN, name=name, ops=True)
        model = onnx.load(written.file)
        whole = model.functions[-1]
        del whole.node[:]
        whole.node.append(helper.make_node("Identity", [whole.input[0]], [whole.output[0]]))
        onnx.save(model, written.file)
    other = tmp_path / "other.so"
    other.write_bytes(ours.read_bytes() + b"\0")  # any loader would take it
    config = folder / "stranger" / "config.pbtxt"
    config.write_text(config.read_text().replace(str(ours), str(other)))
    with Served(folder) as served:
        facts = served.facts()
        assert [model["name"] for model in facts["models"]] == ["ours"]
        refused = f"names the operator library '{other}', and the embedded server runs none but"
        assert refused in facts["left_out"]["stranger"]
        assert answers(facts["http"], "ours")


def test_sigterm_before_it_is_ready_leaves_nothing_either(models: Path) -> None:
    with Served(models) as served:
        served.until(lambda: Family(served.process.pid).models)
        served.end(signal.SIGTERM)


def test_sigterm_before_the_server_answers_leaves_nothing_either(models: Path) -> None:
    programs, temporary = models.parent / "programs", models.parent / "temporary"
    for folder in (programs, temporary):
        folder.mkdir()
    # In the place of a server that takes long to start.
    (programs / "tritonserver").write_text("#!/bin/sh\nexec sleep 600\n")
    (programs / "tritonserver").chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    with Served(models, PATH=path, TMPDIR=str(temporary)) as served:
        children = psutil.Process(served.process.pid).children
        served.until(lambda: [child.name() for child in children()] == ["sleep"])
        assert len([*temporary.iterdir()]) == 1
        served.end(signal.SIGTERM)
    assert [*temporary.iterdir()] == []


def test_a_server_that_is_interrupted_or_killed_as_it_ends_leaves_nothing(
    certified: Path, triton: Triton, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(process: Any, timeout: float | None = None) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    server = Server(certified, triton, models=["mean"])
    for stop in (lambda: server.stop(), lambda: server.stop(at_once=True)):
        server.start()
        pid, left = server.pid, Family(server.pid)
        assert left.regions() and left.models
        monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stop()
        assert not psutil.pid_exists(pid)
        left.assert_gone()
    server.stop()  # may be called again


def test_a_server_whose_parent_ended_before_it_could_ask_is_none() -> None:
    def said(parent: int) -> str:
        limits = f"{parent} {1 << 20} {1 << 25}".split()
        command = [sys.executable, "-S", "-c", module._BECOME, *limits]
        command += ["/bin/sh", "-c", "ulimit -s"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert said(os.getpid()) == said(0) == "1024\n"
    assert said(os.getpid() + 1) == ""


def test_a_model_that_is_wrong_or_refused_is_named_in_one_line(
    models: Path, triton: Triton, capsys: pytest.CaptureFixture[str]
) -> None:
    ready = models.parent / "ready.json"
    # Another loss under the first one's name and spec: the server finds nothing wrong with it.
    other = served_loss(LossSpec(beta=0.25), ("N", 16)).model
    metadata.stamp(other, MEAN, "inlined", "served", served=True)
    onnx.save(other, models / "mean/1/model.onnx")
    with (
        pytest.raises(ServerError, match=r"^the canary of 'mean' is wrong: loss is \["),
        service(Server(models, triton), models.parent, ready_file=ready),
    ):
        pass
    assert not ready.exists()

    (models / "none/1/model.onnx").write_bytes(b"junk")
    asked = ["--model", "none", "--model", "mean"]  # what was asked for by name is not left out
    assert main(["serve", str(models), "--logs", str(models.parent), *asked]) == 2
    note, line = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert note.startswith("note: none: refused: ")
    assert line.startswith("error: the Triton server can't load the model 'none'")
    assert "Protobuf parsing failed" in line and ".py(" not in line


def test_what_can_t_be_served_is_said_before_a_server_starts(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = ["--logs", str(models.parent / "logs")]
    (models / "folder" / "config.pbtxt").mkdir(parents=True)
    for options, message in (
        (["--http-port", "9", "--grpc-port", "9"], "two of the ports are the same"),
        (["--host", ""], "can't listen on '' (it is empty); --host takes a name or an address"),
        (["--host", "no.such.name.invalid"], "--host takes a name or an address of this machine"),
        (["--host", "fe80::1%lo"], "it holds for one interface alone"),
        (["--host", "192.0.2.1"], "--host takes a name or an address of this machine"),
        (["--loading"], "loading over the network needs a key: give --admin-key too"),
        (["--ready-file", "/"], "can't use / as the ready file"),
        (["--model", "folder"], "config.pbtxt: Is a directory"),
    ):
        assert main(["serve", str(models), *logs, *options]) == 2
        assert message in capsys.readouterr().err


def ask(server: Server, path: str, posted: bool = True, **headers: str | None) -> int:
    url = f"{server.addresses.to_dict()['http']}/v2/{path}"
    named = {name.replace("_", "-"): value or "" for name, value in headers.items()}
    request = urllib.request.Request(url, b"{}" if posted else None, named)
    try:
        with urllib.request.urlopen(request) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as exc:
        return exc.code


def sent(server: Server, start: str, header: str, body: bytes) -> bytes:
    """What a server answers to a POST, sent as it stands here."""
    host, _, port = server.addresses.http.partition(":")
    with socket.create_connection((host, int(port)), 300) as connection:
        head = f"POST /v2/{start}\r\nHost: x\r\nConnection: close\r\n{header}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection.makefile("rb").read()


def test_the_admin_apis_ask_for_the_key_which_opens_them_but_for_loading(server: Server) -> None:
    paths = ("repository/index", "models/mean/stats", "systemsharedmemory/status", "logging")
    for path in paths:
        posted = path == "repository/index"
        assert ask(server, path, posted) == 403
        assert ask(server, path, posted, admin_key=server.admin_key) == 200, path
    assert ask(server, "repository/models/mean/load") == 403
    assert ask(server, "repository/models/mean/load", admin_key=server.admin_key) == 503
    assert [text for text in server.warnings() if "admin key" in text] == [
        "every user of this machine can read the admin key on the server's command line"
    ]


def test_without_a_key_none_that_can_be_sent_opens_anything(
    certified: Path, triton: Triton
) -> None:
    with Server(certified, triton, models=["mean"], loss_metrics=True) as server:
        (option,) = (
            word.partition(":")[2]
            for word in psutil.Process(server.pid).cmdline()
            if word.startswith("--http-restricted-api=")
        )
        name, _, value = option.partition("=")
        assert name.endswith("\n") and value == "\n" and list(server.warnings()) == []
        for lines in (f"{name}: {value}", f"{name.strip()}: ", f"{name.strip()}:\r\n \r\n "):
            answer = sent(
                server, f"repository/index HTTP/1.1\r\n{lines}", "Content-Length: 2", b"{}"
            )
            assert b" 200 OK" not in answer


def test_loading_over_the_network_is_there_for_whoever_asked_for_it(
    models: Path, triton: Triton
) -> None:
    with (
        Server(models, triton, models=["mean"], admin_key="k", loading=True) as server,
        contextlib.closing(Supervisor(server, lambda event, **fields: None)) as supervisor,
    ):
        supervisor.bring_up()
        (models / "mean/2").mkdir()
        (models / "mean/2/model.onnx").write_bytes(b"no model")
        assert supervisor.check()  # it is shown to the server, which is not asked to load it
        assert ask(server, "repository/models/mean/load") == 403
        assert ask(server, "repository/models/mean/load", admin_key="k") == 400
        (process,) = supervisor.models["mean"].processes
        process.kill()
        assert supervisor.check() and supervisor.models["mean"].version == "1"
        shutil.copy(models / "mean/1/model.onnx", models / "mean/2")
        supervisor.check()
        assert ask(server, "repository/models/mean/load", admin_key="k") == 200
        assert supervisor.check() and supervisor.models["mean"].version == "2"


def bodies() -> Iterator[tuple[bytes, int]]:
    """Requests that end a server with the usual stack, each with the size of its chunks."""
    numbers = ",".join(["3.25"] * 800_000)
    flat = ",".join(
        f'{{"name":"{name}","shape":[50000,16],"datatype":"FP32","data":[{numbers}]}}'
        for name in ("input", "target")
    )
    yield f'{{"inputs":[{flat}]}}'.encode(), 1 << 20
    yield b'{"inputs":[{"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}]}", 1 << 20
    yield b'{"inputs":[' + b" " * 700_000 + b"]}", 1


def test_no_json_of_some_megabytes_ends_the_server(server: Server) -> None:
    for body, size in bodies():
        chunks = (body[k : k + size] for k in range(0, len(body), size))
        framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
        answer = sent(server, "models/mean/infer HTTP/1.1", "Transfer-Encoding: chunked", framed)
        assert answer.startswith(b"HTTP/1.1 ") and server.exit_code is None


def test_who_can_reach_it_and_a_stack_that_can_not_be_raised_are_said(
    certified: Path, triton: Triton, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, data = module.resource.RLIMIT_STACK, module.resource.RLIMIT_DATA
    for limits in ({stack: (8 << 20, 8 << 20)}, {stack: (8 << 20, -1), data: (8 << 20, 8 << 20)}):
        monkeypatch.setattr(
            module.resource, "getrlimit", lambda kind, limits=limits: limits.get(kind, (-1, -1))
        )
        opened, stays = Server(certified, triton, host="0.0.0.0").warnings()
        assert opened.startswith("it listens on 0.0.0.0: whoever can reach this machine")
        assert stays.startswith("the stack stays at 8 MiB here (ulimit -Hs, -v and -d): a JSON re")


def test_names_are_resolved_before_triton_sees_them(certified: Path, triton: Triton) -> None:
    assert Server(certified, triton, host="localhost").host == "127.0.0.1"


def test_it_listens_on_an_address_of_ipv6(certified: Path, triton: Triton) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with Server(certified, triton, models=["mean"], host="::1") as server:
        for protocol in ("http", "grpc"):
            url = server.addresses.to_dict()[protocol]
            assert url.startswith(f"{protocol}://[::1]:") and answers(url)
        with urllib.request.urlopen(server.addresses.to_dict()["metrics"]) as answer:
            assert answer.status == 200


def test_no_command_in_a_path_is_run(tmp_path: Path, certified: Path, triton: Triton) -> None:
    # Python's folder, the installation, the folder for temporary files, the logs, the repository.
    folder = tmp_path / "$(touch ran) `touch ran` a & touch ran; 'b \"c\nd"
    models = shutil.copytree(certified, folder / "models")
    data = folder / "data/smoothl1-deploy/triton"
    data.mkdir(parents=True)
    (data / install_path().name).symlink_to(install_path())
    (folder / "python").symlink_to(Path(sys.executable).parent.parent)
    (folder / "temporary").mkdir()
    python = folder / "python" / Path(sys.executable).parent.name / Path(sys.executable).name
    variables = {"XDG_DATA_HOME": str(folder / "data"), "TMPDIR": str(folder / "temporary")}
    with Served(models, python=str(python), **variables) as served:
        assert answers(served.facts()["http"])
    assert sorted(path.name for path in folder.iterdir()) == [
        "data", "logs", "models", "python", "temporary",
    ]  # fmt: skip
    assert [*tmp_path.iterdir()] == [folder]


def test_a_server_ends_with_its_parent_and_what_is_left_goes_at_the_next_start(
    models: Path,
) -> None:
    temporary = models.parent / "temporary"
    temporary.mkdir()

    def killed(everything: bool) -> Family:
        with Served(models, TMPDIR=str(temporary)) as served:
            served.facts()
            family = Family(served.process.pid)
            served.process.kill()
            for member in family.all if everything else ():
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            served.process.wait()
        served.ready.unlink()
        assert not psutil.wait_procs(family.all, timeout=60)[1]
        return family

    killed(everything=False)
    (first,) = temporary.iterdir()
    family = killed(everything=True)  # as a machine that runs out of memory may do
    (second,) = temporary.iterdir()
    assert second != first and family.regions()
    with Served(models, TMPDIR=str(temporary)) as served:
        served.facts()
        (third,) = temporary.iterdir()
        assert third != second and not family.regions()
    assert [*temporary.iterdir()] == []


def test_a_private_folder_that_is_in_use_or_not_ours_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "precious").mkdir()
    (tmp_path / "smoothl1-deploy-triton-planted").symlink_to(tmp_path / "precious")
    (tmp_path / "smoothl1-deploy-triton-left").mkdir()
    with private.PrivateFolder() as one, private.PrivateFolder() as two:
        assert {*tmp_path.iterdir()} == {
            tmp_path / "precious", tmp_path / "smoothl1-deploy-triton-planted", one, two,
        }  # fmt: skip
        assert one.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "precious").is_dir() and not one.exists() and not two.exists()


def test_only_loopback_listens(server: Server) -> None:
    listening = [
        c.laddr.ip.removeprefix("::ffff:")
        for c in psutil.Process(server.pid).net_connections("inet")
        if c.status == psutil.CONN_LISTEN
    ]
    assert len(listening) == 3 and set(listening) == {"127.0.0.1"}
