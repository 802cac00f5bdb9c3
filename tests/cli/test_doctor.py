"""`doctor`: it tells what is there, what is not, and never fails itself."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import pytest
from conftest_cli import _WITHOUT, Cli, spawn
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import smoothl1_deploy._environment as environment
import smoothl1_deploy.backends._base as base
from smoothl1_deploy.backends._base import BACKENDS
from smoothl1_deploy.tensorrt._flavour import FLAVOURS


def test_the_report(cli: Cli) -> None:
    done = cli("doctor", "--json")
    assert done.code == 0
    report = json.loads(done.out)
    assert [part["name"] for part in report["backends"]] == [*BACKENDS]
    assert [part["name"] for part in report["flavours"]] == [*FLAVOURS]
    assert report["packages"]["numpy"] == importlib.metadata.version("numpy")
    assert all(part["available"] == (part["reason"] is None) for part in report["backends"])
    text = cli("doctor").out
    for name in (*BACKENDS, *FLAVOURS, *report["packages"]):
        assert name in text


def test_it_says_which_operators_there_are_or_that_files_run_by_their_own_graph(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "built.so"
    monkeypatch.setattr("smoothl1_deploy.ops._LIBRARY", library)
    monkeypatch.setattr(environment, "environment", environment.environment.__wrapped__)
    text = cli("doctor").out
    said = "operators +not built: every file runs by its own graph\n"
    assert re.search(said, text)
    assert "install a C compiler" in text  # how to have them stands once, below
    library.write_bytes(b"code")
    text = cli("doctor").out
    assert re.search("operators +built, sha256 5694d08a2e53\n", text)
    assert "install a C compiler" not in text


def test_what_is_missing_comes_with_its_install_command() -> None:
    blocked = "onnxruntime,torch,tensorrt,tensorrt_rtx"
    done = spawn("doctor", "--json", without=blocked)
    assert done.code == 0
    report = json.loads(done.out)
    reasons = {part["name"]: part["reason"] for part in report["backends"] + report["flavours"]}
    assert "pip install 'smoothl1-deploy[cpu]'" in reasons["ort-cpu"]
    assert "pip install torch==2.13.0" in reasons["torch"]
    assert "pip install 'smoothl1-deploy[gpu]'" in reasons["tensorrt"]
    assert "pip install 'smoothl1-deploy[rtx]'" in reasons["tensorrt_rtx"]
    assert reasons["onnx-reference"] is None
    text = spawn("doctor", without=blocked).out
    # On a line of its own: a table would cut it.
    assert any(line.endswith("pip install 'smoothl1-deploy[cpu]'") for line in text.splitlines())


def test_a_broken_package_is_reported_not_raised(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(base, "get_backend", broken)
    done = cli("doctor")
    assert done.code == 0
    assert "torch not available: importing it fails (OSError: libcudart.so.13: cann" in done.out


def test_two_builds_in_each_others_way_and_what_is_older_than_the_tests_pass_with(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = environment.environment()
    here = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    here |= {"torch": "2.8.0+cpu", "onnx": "1.23", "numpy": "2.0.0rc1"}
    found = {**facts, "packages": {**facts["packages"], **here}}
    monkeypatch.setattr(environment, "environment", lambda: found)
    report = json.loads(cli("doctor", "--json").out)
    assert report["lowest"]["torch"] == "2.13"
    assert [warning for warning in report["warnings"] if "older" in warning] == [
        "torch 2.8.0+cpu is older than 2.13, the lowest that the tests pass with; some of it may "
        "work. For all of it: pip install 'torch>=2.13'"
    ]
    text = cli("doctor").out
    assert "lowest that passes" in text
    assert "warning: onnxruntime and onnxruntime-gpu are both installed" in text


def test_the_lowest_versions_are_those_of_pyproject(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [Requirement(text) for some in (project["dependencies"], *extras) for text in some]
    least = {canonicalize_name(r.name): str(r.specifier).removeprefix(">=") for r in wanted}
    expected = {name: least[canonicalize_name(name)] for name in environment.PACKAGES}
    assert environment.lowest_versions() == expected

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)  # without an installation
    assert environment.lowest_versions() == {}


def test_a_backend_that_is_slow_here(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(base.Backend):
        slow = "the CPU, interpreted"

        def load(self, model: object) -> base.Runner:
            raise NotImplementedError

    real = base.get_backend
    monkeypatch.setattr(
        base, "get_backend", lambda name: Slow() if name == "torch-triton" else real(name)
    )
    (warning,) = json.loads(cli("doctor", "--json").out)["warnings"]
    assert warning == (
        "torch-triton runs on the CPU, interpreted: its numbers are right, and it is slow"
    )


_LIBRARY = """
import numpy
from smoothl1_deploy import LossSpec, export, load

load(export(LossSpec(), shape=("N", 16))).run(*numpy.ones((2, 1, 16), "f4"))
"""


@pytest.mark.parametrize(
    ("code", "setting", "wrote", "said"),
    [
        (_WITHOUT, None, False, "off in these commands, on in your own sessions: they write below"),
        (_WITHOUT, "0", True, "on in these commands, on in your own sessions: they write below"),
        (_WITHOUT, "1", False, "off in these commands, off in your own sessions\n"),
        (_LIBRARY, None, True, ""),
    ],
)
def test_telemetry_is_off_in_a_command_unless_the_user_asks_for_it_and_a_program_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, setting: str | None, wrote: bool,
    said: str,
) -> None:  # fmt: skip
    pytest.importorskip("onnxruntime")
    for name in ("CI", "GITHUB_ACTIONS", "ORT_DISABLE_TELEMETRY"):  # where it is off by itself
        monkeypatch.delenv(name, raising=False)
    if setting is not None:
        monkeypatch.setenv("ORT_DISABLE_TELEMETRY", setting)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = spawn("doctor", code=code, without="torch,triton,tensorrt,tensorrt_rtx")  # are slow
    assert done.code == 0
    assert any(tmp_path.rglob("deviceid")) == wrote
    assert not said or f"onnxruntime's telemetry  {said}" in done.out
