"""`doctor`: it tells what is there, what is not, and never fails itself."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest_cli import _WITHOUT, Done, spawn

import smoothl1_deploy.backends.base as base
from smoothl1_deploy.backends.base import BACKENDS
from smoothl1_deploy.tensorrt.flavour import FLAVOURS


def test_the_report(cli: Callable[..., Done]) -> None:
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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"code", "built, sha256 5694d08a2e53\n"),
        (None, "not built: every file runs by its own graph\n"),
    ],
)
def test_it_says_which_operators_there_are_or_that_files_run_by_their_own_graph(
    cli: Callable[..., Done],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    content: bytes | None,
    said: str,
) -> None:
    import smoothl1_deploy.environment as environment

    if content is not None:
        (tmp_path / "built.so").write_bytes(content)
    monkeypatch.setattr("smoothl1_deploy.ops._LIBRARY", tmp_path / "built.so")
    monkeypatch.setattr(environment, "environment", environment.environment.__wrapped__)
    text = cli("doctor").out
    assert re.search(f"^operators +{said}", text, re.MULTILINE)
    # How to have them stands once, below.
    assert ("install a C compiler" in text) == (content is None)


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


def test_a_broken_package_is_reported_not_raised(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(base, "get_backend", broken)
    done = cli("doctor")
    assert done.code == 0
    assert "torch not available: importing it fails (OSError: libcudart.so.13: cann" in done.out


def test_two_builds_of_onnxruntime_in_each_others_way(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    import smoothl1_deploy.environment as environment

    facts = environment.environment()
    both = {**facts["packages"], "onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(environment, "environment", lambda: {**facts, "packages": both})
    assert "warning: onnxruntime and onnxruntime-gpu are both installed" in cli("doctor").out


def test_what_is_older_than_the_tests_pass_with(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    import smoothl1_deploy.environment as environment

    facts = environment.environment()
    old = {**facts["packages"], "torch": "2.8.0+cpu", "onnx": "1.23", "numpy": "2.0.0rc1"}
    monkeypatch.setattr(environment, "environment", lambda: {**facts, "packages": old})
    report = json.loads(cli("doctor", "--json").out)
    assert report["lowest"]["torch"] == "2.13"
    assert [warning for warning in report["warnings"] if "older" in warning] == [
        "torch 2.8.0+cpu is older than 2.13, the lowest that the tests pass with; some of it may "
        "work. For all of it: pip install 'torch>=2.13'"
    ]
    assert "lowest that passes" in cli("doctor").out


def test_the_lowest_versions_are_those_of_pyproject() -> None:
    import tomllib
    from pathlib import Path

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    from smoothl1_deploy.environment import PACKAGES, lowest_versions

    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [Requirement(text) for some in (project["dependencies"], *extras) for text in some]
    least = {canonicalize_name(r.name): str(r.specifier).removeprefix(">=") for r in wanted}
    assert lowest_versions() == {name: least[canonicalize_name(name)] for name in PACKAGES}


def test_without_an_installation_no_version_is_the_lowest(monkeypatch: pytest.MonkeyPatch) -> None:
    from smoothl1_deploy.environment import lowest_versions

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert lowest_versions() == {}


def test_a_backend_that_is_slow_here(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
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


def _wrote_a_device_id(
    folder: Path, code: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[bool, str]:
    pytest.importorskip("onnxruntime")
    for name in ("CI", "GITHUB_ACTIONS"):  # where it is off by itself
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    done = spawn("doctor", code=code)
    assert done.code == 0
    return any(folder.rglob("deviceid")), done.out


@pytest.mark.parametrize(
    ("setting", "wrote", "said"),
    [
        (None, False, "off in these commands, on in your own sessions: they write below"),
        ("0", True, "on in these commands, on in your own sessions: they write below"),
        ("1", False, "off in these commands, off in your own sessions\n"),
    ],
)
def test_telemetry_is_off_in_a_command_unless_the_user_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str | None, wrote: bool, said: str
) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    if setting is not None:
        monkeypatch.setenv("ORT_DISABLE_TELEMETRY", setting)
    found, out = _wrote_a_device_id(tmp_path, _WITHOUT, monkeypatch)
    assert found == wrote and f"onnxruntime's telemetry  {said}" in out


def test_telemetry_is_the_programs_own_where_the_package_is_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    assert _wrote_a_device_id(tmp_path, _LIBRARY, monkeypatch)[0]
