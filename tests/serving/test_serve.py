"""`smoothl1-deploy serve` with the real server: ready, looked after, ended with nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
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
from smoothl1_deploy.errors import BackendUnavailableError
from smoothl1_deploy.ops import library
from smoothl1_deploy.parity.certificate import certify
from smoothl1_deploy.reference.oracle import oracle
from smoothl1_deploy.serving import Client
from smoothl1_deploy.serving.install import Triton
from smoothl1_deploy.serving.repository import write_loss

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


@contextlib.contextmanager
def serving(
    folder: Path, *options: str, python: str = sys.executable, **variables: str
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """The command in a process of its own, and the place of its ready file."""
    ready = folder.parent / "ready.json"
    command = [python, "-m", "smoothl1_deploy", "serve", str(folder)]
    command += ["--ready-file", str(ready), "--logs", str(folder.parent / "logs"), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    process = subprocess.Popen(
        command, cwd=folder.parent, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield process, ready
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=300)


def until(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    deadline = time.monotonic() + 300
    while not (found := condition()):
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)
    return found


def events(folder: Path) -> list[dict[str, Any]]:
    path = folder.parent / "logs" / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def stubs(pid: int) -> dict[psutil.Process, str]:
    """The processes of the models, each with the name of the memory that it is given.

    The same program is tried out twice before: once by us, and once by the server.
    """
    found = {}
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a trial is over at once
            for word in child.cmdline():
                if re.match("smoothl1_[0-9a-f]{12}_", word):
                    found[child] = word
    return found


def prefix(pid: int) -> str:
    """What the shared memory of the servers below a process begins with."""
    (found,) = {region.rpartition("_")[0] for region in stubs(pid).values()}
    return found


def regions(start: str) -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith(start)]


def arrays(rows: int = 5) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(2, rows, 16)).astype(np.float32)


def test_it_serves_is_looked_after_and_leaves_nothing(models: Path) -> None:
    with serving(models, "--interval", "0.2") as (process, ready):
        until(ready.exists, process)
        facts = json.loads(ready.read_text())
        assert [model["name"] for model in facts["models"]] == ["mean", "none"]
        states = [model["certificate"]["state"] for model in facts["models"]]
        assert states == ["matches", "absent"]
        assert all(facts[key].split("//")[1].startswith("127.0.0.1:") for key in ("http", "grpc"))
        own = prefix(process.pid)
        assert regions(own)

        x, y = arrays()
        with Client(facts["grpc"], "mean") as client:
            assert client.loss(x, y) == oracle(MEAN, x, y)
            (victim, *_) = (p for p in stubs(process.pid) if "/mean/" in " ".join(p.cmdline()))
            victim.kill()
            until(lambda: any(e["event"] == "reloaded" for e in events(models)), process)
            assert client.loss(x, y) == oracle(MEAN, x, y)
            shutil.copytree(models / "mean/1", models / "new")
            (models / "new").rename(models / "mean/2")
            until(lambda: json.loads(ready.read_text())["models"][0]["version"] == "2", process)

        for child in stubs(process.pid):
            assert child.environ()["ORT_DISABLE_TELEMETRY"] == "1"
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and out.endswith("stopped\n")
    assert not ready.exists()
    assert not psutil.wait_procs(children, timeout=60)[1]
    assert regions(own) == []
    log = events(models)
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
    with serving(folder) as (process, ready):
        until(ready.exists, process)
        facts = json.loads(ready.read_text())
        assert [model["name"] for model in facts["models"]] == ["ours"]
        refused = f"names the operator library '{other}', and the embedded server runs none but"
        assert refused in facts["left_out"]["stranger"]
        x, y = arrays()
        with Client(facts["http"], "ours") as client:
            assert client.loss(x, y) == oracle(MEAN, x, y)


def test_sigterm_before_it_is_ready_leaves_nothing_either(models: Path) -> None:
    with serving(models) as (process, ready):
        until(lambda: stubs(process.pid), process)
        own = prefix(process.pid)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert not ready.exists()
    assert not psutil.wait_procs(children, timeout=60)[1]
    assert regions(own) == []


def test_sigterm_before_the_server_answers_leaves_nothing_either(models: Path) -> None:
    programs, temporary = models.parent / "programs", models.parent / "temporary"
    for folder in (programs, temporary):
        folder.mkdir()
    # In the place of a server that takes long to start.
    (programs / "tritonserver").write_text("#!/bin/sh\nexec sleep 600\n")
    (programs / "tritonserver").chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    with serving(models, PATH=path, TMPDIR=str(temporary)) as (process, ready):
        children = psutil.Process(process.pid).children
        until(lambda: [child.name() for child in children()] == ["sleep"], process)
        (server,) = children()
        assert len([*temporary.glob("smoothl1-deploy-triton-*")]) == 1
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert not ready.exists()
    assert not server.is_running()
    assert [*temporary.glob("smoothl1-deploy-triton-*")] == []


def up(certified: Path, triton: Triton) -> tuple[Any, str, list[psutil.Process]]:
    """A server in this process with a model, what its memory is called, and its processes."""
    from smoothl1_deploy.serving.launcher import Server

    server = Server(certified, triton, models=["mean"])
    server.start()
    own, children = prefix(server.pid), psutil.Process(server.pid).children(recursive=True)
    assert regions(own) and children
    return server, own, children


def test_ctrl_c_while_it_ends_cuts_nothing_short(
    certified: Path, triton: Triton, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(process: Any, timeout: float | None = None) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    server, own, children = up(certified, triton)
    pid = server.pid
    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.stop()
    assert not psutil.pid_exists(pid)
    assert regions(own) == []
    assert not psutil.wait_procs(children, timeout=60)[1]


def test_a_server_whose_parent_ended_before_it_could_ask_is_none() -> None:
    from smoothl1_deploy.serving.launcher import _BECOME

    def said(parent: int) -> str:
        limits = [str(parent), str(1 << 20), str(1 << 25)]
        command = [sys.executable, "-S", "-c", _BECOME, *limits, "/bin/sh", "-c", "ulimit -s"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert said(os.getpid()) == said(0) == "1024\n"
    assert said(os.getpid() + 1) == ""


def test_a_wrong_number_is_not_ready(models: Path) -> None:
    # Another loss under the first one's name and spec: the server finds nothing wrong with it.
    import onnx

    from smoothl1_deploy.graph import metadata
    from smoothl1_deploy.serving.repository import served_loss

    other = served_loss(LossSpec(beta=0.25), ("N", 16)).model
    metadata.stamp(other, MEAN, "inlined", "served", served=True)
    onnx.save(other, models / "mean/1/model.onnx")
    with serving(models) as (process, ready):
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 3 and not ready.exists()
    assert "the canary of 'mean' is wrong: loss is [" in out
    assert "Traceback" not in out


def test_a_model_the_server_refuses_is_named_with_the_reason(models: Path) -> None:
    config = models / "none/config.pbtxt"
    config.write_text(config.read_text().replace("TYPE_FP32", "TYPE_FP64"))
    with serving(models, "--model", "none") as (process, _):
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "can't load the model 'none'" in out
    assert "input 'input' is TYPE_FP64 in config.pbtxt and tensor(float) in the graph" in out


def test_a_damaged_model_is_named_in_one_line(models: Path) -> None:
    (models / "none/1/model.onnx").write_bytes(b"junk")
    with serving(models, "--model", "none") as (process, _):
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    note, line = [line for line in out.splitlines() if line.strip()]
    assert note.startswith("note: none: refused: ")
    assert line.startswith("error: the Triton server can't load the model 'none'")
    assert "Protobuf parsing failed" in line and ".py(" not in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--http-port", "9", "--grpc-port", "9"], "two of the ports are the same"),
        (["--host", ""], "can't listen on '' (it is empty); --host takes a name or an address"),
        (["--host", "no.such.name.invalid"], "--host takes a name or an address of this machine"),
        (["--host", "fe80::1%lo"], "it holds for one interface alone"),
        (["--host", "192.0.2.1"], "--host takes a name or an address of this machine"),
        (["--loading"], "loading over the network needs a key: give --admin-key too"),
        (["--ready-file", "/"], "can't use / as the ready file"),
    ],
)
def test_options_that_can_t_be(
    models: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from smoothl1_deploy.cli import main

    logs = ["--logs", str(models.parent / "logs")]
    assert main(["serve", str(models), *logs, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_config_that_can_t_be_read(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from smoothl1_deploy.cli import main

    (models / "none/config.pbtxt").unlink()
    (models / "none/config.pbtxt").mkdir()
    logs = ["--logs", str(models.parent / "logs")]
    assert main(["serve", str(models), "--model", "none", *logs]) == 2
    assert "config.pbtxt: Is a directory" in capsys.readouterr().err


def test_metrics_count_what_was_asked(server: Any) -> None:
    def count() -> float:
        with urllib.request.urlopen(server.addresses.to_dict()["metrics"]) as answer:
            lines = answer.read().decode().splitlines()
        (line,) = (n for n in lines if n.startswith('nv_inference_request_success{model="mean"'))
        return float(line.rpartition(" ")[2])

    x, y = arrays()
    before = count()
    with Client(server.addresses.to_dict()["http"], "mean") as client:
        for _ in range(7):
            client.loss(x, y)
    assert count() == before + 7


@pytest.mark.parametrize("path", ["repository/models/mean/load", "repository/index", "logging"])
def test_the_admin_apis_are_closed_to_whoever_has_no_key(server: Any, path: str) -> None:
    assert ask(server, path) == 403


def ask(server: Any, path: str, **headers: str) -> int:
    url = f"{server.addresses.to_dict()['http']}/v2/{path}"
    request = urllib.request.Request(url, b"{}", {k.replace("_", "-"): headers[k] for k in headers})
    try:
        with urllib.request.urlopen(request) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as exc:
        return exc.code


def test_the_key_opens_them_but_for_loading(server: Any) -> None:
    assert ask(server, "repository/index", admin_key=server.admin_key) == 200
    assert ask(server, "repository/models/mean/load", admin_key=server.admin_key) == 503
    warnings = [text for text in server.warnings() if "admin key" in text]
    assert warnings == [
        "every user of this machine can read the admin key on the server's command line"
    ]


def test_without_a_key_none_that_can_be_sent_opens_anything(
    certified: Path, triton: Triton
) -> None:
    import socket

    from smoothl1_deploy.serving.launcher import Server

    with Server(certified, triton, models=["mean"], loss_metrics=True) as server:
        (option,) = (
            word.partition(":")[2]
            for word in psutil.Process(server.pid).cmdline()
            if word.startswith("--http-restricted-api=")
        )
        name, _, value = option.partition("=")
        assert name.endswith("\n") and value == "\n" and list(server.warnings()) == []
        host, _, port = server.addresses.http.partition(":")
        for lines in (f"{name}: {value}", f"{name.strip()}: ", f"{name.strip()}:\r\n \r\n "):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(
                    f"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\n{lines}\r\n"
                    "Content-Length: 2\r\n\r\n{}".encode()
                )
                connection.settimeout(30)
                assert b" 200 OK" not in connection.recv(9999)


def test_loading_over_the_network_is_there_for_whoever_asked_for_it(
    models: Path, triton: Triton
) -> None:
    from smoothl1_deploy.serving.launcher import Server
    from smoothl1_deploy.serving.supervise import Supervisor

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
        psutil.Process(process).kill()
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


def test_no_json_of_some_megabytes_ends_the_server(server: Any) -> None:
    import socket

    host, _, port = server.addresses.http.partition(":")
    for body, size in bodies():
        chunks = (body[k : k + size] for k in range(0, len(body), size))
        framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v2/models/mean/infer HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"
            )
            connection.settimeout(300)
            assert connection.recv(20).startswith(b"HTTP/1.1 ")
            while connection.recv(1 << 20):
                pass
        assert server.exit_code is None


@pytest.mark.parametrize("limited", ["RLIMIT_STACK", "RLIMIT_DATA"])
def test_a_stack_that_can_not_be_raised_is_said(
    certified: Path, triton: Triton, monkeypatch: pytest.MonkeyPatch, limited: str
) -> None:
    from smoothl1_deploy.serving import launcher

    limits = {launcher.resource.RLIMIT_STACK: (8 << 20, -1)}
    limits[getattr(launcher.resource, limited)] = (8 << 20, 8 << 20)
    monkeypatch.setattr(launcher.resource, "getrlimit", lambda kind: limits.get(kind, (-1, -1)))
    server = launcher.Server(certified, triton, host="0.0.0.0")
    opened, stays = server.warnings()
    assert opened.startswith("it listens on 0.0.0.0: whoever can reach this machine")
    assert stays.startswith("the stack stays at 8 MiB here (ulimit -Hs, -v and -d): a JSON request")


def test_names_are_resolved_before_triton_sees_them(certified: Path, triton: Triton) -> None:
    from smoothl1_deploy.serving.launcher import Server

    with Server(certified, triton, models=["mean"], host="localhost") as server:
        assert server.addresses.http.startswith("127.0.0.1:")


def test_it_listens_on_an_address_of_ipv6(certified: Path, triton: Triton) -> None:
    import socket

    from smoothl1_deploy.serving.launcher import Server

    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    x, y = arrays()
    with Server(certified, triton, models=["mean"], host="::1") as server:
        for protocol in ("http", "grpc"):
            url = server.addresses.to_dict()[protocol]
            assert url.startswith(f"{protocol}://[::1]:")
            with Client(url, "mean") as client:
                assert client.loss(x, y) == oracle(MEAN, x, y)
        with urllib.request.urlopen(server.addresses.to_dict()["metrics"]) as answer:
            assert answer.status == 200


def test_no_command_in_a_path_is_run(tmp_path: Path, certified: Path, triton: Triton) -> None:
    from smoothl1_deploy.serving.install import install_path

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
    x, y = arrays()
    with serving(models, python=str(python), **variables) as (process, ready):
        until(ready.exists, process)
        with Client(json.loads(ready.read_text())["http"], "mean") as client:
            assert client.loss(x, y) == oracle(MEAN, x, y)
    assert sorted(path.name for path in folder.iterdir()) == [
        "data", "logs", "models", "python", "temporary",
    ]  # fmt: skip
    assert [*tmp_path.iterdir()] == [folder]


def test_what_one_that_was_killed_has_left_goes_at_the_next_start(models: Path) -> None:
    temporary = models.parent / "temporary"
    temporary.mkdir()
    with serving(models, TMPDIR=str(temporary)) as (process, ready):
        until(ready.exists, process)
        own = prefix(process.pid)
        command = psutil.Process(process.pid)
        family = [command, *command.children(recursive=True)]
        for member in family:  # the server too, as a machine that runs out of memory may do
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
    left, *others = temporary.iterdir()
    assert not others, others
    assert regions(own)
    ready.unlink()
    with serving(models, TMPDIR=str(temporary)) as (process, ready):
        until(ready.exists, process)
        now, *others = temporary.iterdir()
        assert not others, others
        assert now.name != left.name and not regions(own)
    assert [*temporary.iterdir()] == []


def test_a_private_folder_that_is_in_use_or_not_ours_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smoothl1_deploy.serving import private

    monkeypatch.setattr(private, "plain_folder", lambda longest: tmp_path)
    (tmp_path / "precious").mkdir()
    (tmp_path / "smoothl1-deploy-triton-planted").symlink_to(tmp_path / "precious")
    (tmp_path / "smoothl1-deploy-triton-left").mkdir()
    with private.PrivateFolder() as one, private.PrivateFolder() as two:
        assert {*tmp_path.iterdir()} == {
            tmp_path / "precious", tmp_path / "smoothl1-deploy-triton-planted", one, two,
        }  # fmt: skip
        assert one.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "precious").is_dir() and not one.exists() and not two.exists()


def test_only_loopback_listens(server: Any) -> None:
    listening = [
        c.laddr.ip.removeprefix("::ffff:")
        for c in psutil.Process(server.pid).net_connections("inet")
        if c.status == psutil.CONN_LISTEN
    ]
    assert len(listening) == 3 and set(listening) == {"127.0.0.1"}


def test_a_server_that_is_killed_leaves_no_memory_and_no_child(
    certified: Path, triton: Triton
) -> None:
    server, own, children = up(certified, triton)
    server.stop(at_once=True)
    assert regions(own) == []
    assert not psutil.wait_procs(children, timeout=60)[1]
    server.stop()  # may be called twice
