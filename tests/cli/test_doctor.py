"""`doctor`: it tells what is there, what is not, and never fails itself."""

from __future__ import annotations

import importlib.metadata
import json
import re
import runpy
import tomllib
from pathlib import Path

import pytest
from conftest_cli import _WITHOUT, Cli, Shown, spawn
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import smoothl1_deploy._environment as environment
import smoothl1_deploy.backends._base as base
import smoothl1_deploy.cli._doctor as doctor
from smoothl1_deploy._certainty import Certainty
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
    for name in (*BACKENDS, *FLAVOURS, *report["packages"], *Certainty):
        assert name in text


def test_what_can_not_be_run_or_not_be_compared_with_pytorch_is_said_to_be_not_run() -> None:
    def told(without: str) -> dict[str, str]:
        report = json.loads(spawn("doctor", "--json", without=without).out)
        assert [*report["certainty"]] == [*Certainty]
        return report["certainty"]  # type: ignore[no-any-return]

    without_a_runtime = told("onnxruntime,tensorrt,tensorrt_rtx,tritonclient")
    assert without_a_runtime["measured on samples"] == "by verify and parity: onnx-reference"
    assert without_a_runtime["not run"].startswith("ort-cpu, ort-cpu-bare, trt-network, ")
    assert told("torch")["measured on every pair"] == "by prove, half formats: none"


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


def _groups(text: str) -> dict[str, dict[str, list[str]]]:
    """Heading -> kind -> names, of what `doctor` prints."""
    blocks = (block.splitlines() for block in text.split("\n\n"))
    return {
        heading: {
            kind: names.split(", ") for kind, names in (line.split(None, 1) for line in lines)
        }
        for heading, *lines in blocks
        if lines and lines[0].startswith("  ")
    }


def test_an_installation_is_named_once_with_all_that_it_gives_and_a_gpu_comes_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    blocked = "onnxruntime,torch,tensorrt,tensorrt_rtx,tritonclient,jinja2"
    groups = _groups(spawn("doctor", without=blocked).out)
    headings = [*groups]
    assert headings[0] == "works here"
    assert groups["works here"]["backends"] == ["onnx-reference"]
    assert "export" in groups["works here"]["commands"]
    cpu = {"backends": ["ort-cpu", "ort-cpu-bare"], "commands": ["run", "score", "compare"]}
    assert groups["pip install 'smoothl1-deploy[cpu]'"] == cpu
    both = groups["pip install torch==2.13.0 'smoothl1-deploy[cpu]'"]
    assert both == {"commands": ["verify", "prove"]}
    gpu = [
        heading for heading in headings if heading.startswith("with an NVIDIA GPU: pip install ")
    ]
    assert len(gpu) == 4 and headings[-4:] == gpu
    named = [name for group in groups.values() for names in group.values() for name in names]
    assert len(named) == len({*named}) and {*BACKENDS, *FLAVOURS, *doctor.NEEDS} <= {*named}


def test_what_a_command_needs_is_what_scripts_compat_tries_it_with() -> None:
    probes = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "compat"))["PROBES"]
    needs = {name: {*of} & {*doctor._MODULES} for name, of in doctor.NEEDS.items()}
    for probe, extras in probes.items():
        words = probe.split()
        if "--backend" not in words:
            known = [name for name in needs if {*name.split()} <= {*words} and name != "torch"]
            assert needs.get(max(known, key=len, default=""), set()) == {*extras}, probe


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_cuts_no_line_of_it(shown: Shown, width: int) -> None:
    lines = shown(width, "doctor").splitlines()
    assert max(map(len, lines)) <= width
    assert any("ORT_DISABLE_TELEMETRY=1 ends it" in line for line in lines)
    assert any(re.match("onnxruntime-ep-nv-tensorrt-rtx +(not installed|[0-9])", x) for x in lines)


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
