"""Which Triton is used, how the embedded one comes, and what is said where neither can run."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path

import pytest

from smoothl1_deploy import LossSpec
from smoothl1_deploy.cli import main
from smoothl1_deploy.errors import (
    ArtefactError,
    BackendUnavailableError,
    MissingDependencyError,
    ServerError,
    SpecError,
)
from smoothl1_deploy.serving import _embedded as module
from smoothl1_deploy.serving._embedded import Triton, find_triton, install, install_path
from smoothl1_deploy.serving._private import models_of
from smoothl1_deploy.serving._repository import write_loss
from smoothl1_deploy.serving._server import Server


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without an embedded Triton, and with none on PATH."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def test_where_there_is_none_it_says_how_to_get_one(
    nothing: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MissingDependencyError, match="no tritonserver on PATH, and none in .*data"):
        find_triton()
    (nothing / "models").mkdir()
    assert main(["serve", str(nothing / "models"), "--logs", str(nothing)]) == 3
    assert "install it with: smoothl1-deploy serve --install" in capfd.readouterr().err
    assert main(["parity", "--backend", "triton-http", "-o", str(nothing / "p")]) == 3


def test_the_one_on_path_wins(triton: Triton, nothing: Path) -> None:
    # The embedded one, as it would look to us if it were the one of a container.
    (nothing / "bin").mkdir()
    program = nothing / "bin" / "tritonserver"
    program.write_text(f'#!/bin/sh\necho "$@" > {nothing}/options\nexit 9\n')
    program.chmod(0o755)
    found = find_triton()
    assert found == Triton(program) and not found.embedded
    write_loss(nothing / "models", LossSpec(), name="mean")
    server = Server(nothing / "models", log=nothing / "log")
    with pytest.raises(ServerError, match="the Triton server ended while it started"):
        server.start()
    options = (nothing / "options").read_text()
    assert "--model-control-mode=poll" in options and "--http-address=127.0.0.1" in options
    assert "--backend-directory" not in options  # it knows its own


def test_a_machine_that_it_is_not_made_for_is_told(
    nothing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for system, machine in (("Linux", "riscv64"), ("Darwin", "x86_64")):
        monkeypatch.setattr(module.platform, "system", lambda system=system: system)
        monkeypatch.setattr(module.platform, "machine", lambda machine=machine: machine)
        with pytest.raises(BackendUnavailableError, match=f"this is {system} on {machine}; put"):
            install()


def test_a_python_without_a_stub_is_told_which_have_one(
    triton: Triton, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Version(tuple[int, ...]):
        major, minor = 3, 99

    monkeypatch.setattr(module.sys, "version_info", Version((3, 99)))
    with pytest.raises(BackendUnavailableError, match=r"has no stub for Python .*3\.11"):
        find_triton()


def test_a_missing_library_is_named_with_its_remedy(nothing: Path) -> None:
    words = "error while loading shared libraries: libx.so.1: no such file"
    home = install_path()
    triton = Triton(home / "pytriton/tritonserver/bin/tritonserver", home)
    for program in (triton.binary, triton.stub):
        program.parent.mkdir(parents=True)
    for missing, sound, remedy in (
        (triton.binary, triton.stub, "needs glibc 2.35"),
        (triton.stub, triton.binary, "needs Python's shared library"),
    ):
        missing.write_text(f"#!/bin/sh\necho '{words}' >&2\nexit 127\n")
        sound.write_text("#!/bin/sh\nexit 1\n")
        for program in (missing, sound):
            program.chmod(0o755)
        with pytest.raises(BackendUnavailableError, match=f"can't run here .{words}.; it {remedy}"):
            find_triton()


def test_a_download_with_another_hash_is_not_installed(
    nothing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A package of that name and version with another hash, from a folder: nothing is installed.
    wheel = nothing / "nvidia_pytriton-0.7.0-py3-none-any.whl"
    wheel.write_bytes(b"PK\x05\x06" + bytes(18))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(nothing))
    with pytest.raises(BackendUnavailableError, match="pip could not install nvidia-pytriton==0.7"):
        install()
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() not in module._REQUIREMENT
    assert not install_path().exists()
    assert [path.name for path in install_path().parent.iterdir()] == [".lock"]


def test_it_is_installed_once(triton: Triton, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_pip_install", lambda *_: pytest.fail("it was there"))
    assert install() == triton
    assert find_triton() == triton


# What can be told before a server runs


def test_what_a_server_may_not_be_shown_is_left_out_aloud(tmp_path: Path) -> None:
    for name in ("mean", "$(reboot)", "damaged", "file", "instance"):
        write_loss(tmp_path, LossSpec(), name="written")
        (tmp_path / "written").rename(tmp_path / name)
    for name in ("forgotten", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("a file is no model")
    (tmp_path / "damaged/config.pbtxt").write_text("junk {")
    for name, words in (
        ("file", 'default_model_filename: "`reboot`"'),
        ("instance", 'instance_group { name: "a b" }'),
    ):
        with (tmp_path / name / "config.pbtxt").open("a") as config:
            config.write(words)
    names, left_out = models_of(tmp_path)
    assert names == ["mean"] and len(left_out) == 5
    lint = f"smoothl1-deploy repository --lint {tmp_path} says what a model needs"
    assert left_out["forgotten"] == f"it has no config.pbtxt; {lint}"
    assert "config.pbtxt: not a model config: 1:" in left_out["damaged"]
    for name, word in (("$(reboot)", "$(reboot)"), ("file", "`reboot`"), ("instance", "a b")):
        assert left_out[name].startswith(f"Triton would give the name {word!r} to a shell; use")
    assert models_of(tmp_path, ["mean"]) == (["mean"], {})
    with pytest.raises(ArtefactError, match=r"^\$\(reboot\) is left out: Triton would give"):
        models_of(tmp_path, ["$(reboot)", "mean"])
    with pytest.raises(ArtefactError, match="has no model 'huber'; it has .*, mean"):
        models_of(tmp_path, ["huber"])


def test_a_folder_that_is_no_repository_is_refused(tmp_path: Path, triton: Triton) -> None:
    with pytest.raises(ArtefactError, match="no folder with a config.pbtxt"):
        models_of(tmp_path)
    with pytest.raises(ArtefactError, match="absent is no folder; give a Triton model repository"):
        Server(tmp_path / "absent", triton)


def test_a_taken_port_is_named_with_its_option(tmp_path: Path, triton: Triton) -> None:
    write_loss(tmp_path, LossSpec(), name="mean")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SpecError, match=f"127.0.0.1:{port} .*another --grpc-port, 0 for"):
            Server(tmp_path, triton, ports={"grpc": port}).start()
