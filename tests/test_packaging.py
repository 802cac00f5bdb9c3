"""What is shipped: pins that fit, no trace of one machine, rules that hold."""

from __future__ import annotations

import platform
import re
import runpy
import shutil
import subprocess
import tomllib
import zipfile
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import child
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import smoothl1_deploy

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = [
    line
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def _files() -> list[Path]:
    """The committed files, or those of the package where this is no clone."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        return [*ROOT.glob("smoothl1_deploy/**/*.py"), *ROOT.glob("*.t*")]
    return [path for n in listed.stdout.decode().split("\0") if n and (path := ROOT / n).is_file()]


def test_what_the_scripts_install_is_pinned_to_an_exact_version_that_fits() -> None:
    for pin in PINS:
        assert re.fullmatch(r"[\w.-]+==[\d.]+", pin), pin
    pins = {canonicalize_name(name): pin for name, pin in (pin.split("==") for pin in PINS)}
    assert pins["torch"] == "2.13.0"
    extras = PROJECT["optional-dependencies"]
    wanted = [text for extra in {*extras} - {"gpu"} for text in extras[extra]]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *wanted]):
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} against {version}"
    # And each other: the build of torch with CUDA depends on one triton.
    for package in distributions():
        if pins.get(canonicalize_name(package.name)) != package.version.partition("+")[0]:
            continue
        for requirement in map(Requirement, package.requires or ()):
            pin = pins.get(canonicalize_name(requirement.name))
            if pin and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
                assert requirement.specifier.contains(pin), f"{package.name} needs {requirement}"


def test_runtimes_that_exclude_each_other_are_in_extras_of_their_own() -> None:
    extras = PROJECT["optional-dependencies"]
    names = {extra: {Requirement(text).name for text in extras[extra]} for extra in extras}
    names["core"] = {Requirement(text).name for text in PROJECT["dependencies"]}
    for runtime in ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "torch"):
        assert sum(runtime in found for found in names.values()) == 1, runtime


def test_the_version_is_that_of_the_package_and_the_licence_whole() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert PROJECT["dynamic"] == ["version"]
    assert setuptools["dynamic"]["version"]["attr"] == "smoothl1_deploy.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", smoothl1_deploy.__version__)
    versions = re.findall(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == smoothl1_deploy.__version__
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "9. Accepting Warranty or Additional Liability." in text
    assert PROJECT["license"] == "Apache-2.0"


@pytest.mark.skipif(not shutil.which("objdump"), reason="binutils read what was linked")
@pytest.mark.skipif(not shutil.which("cc"), reason="a C compiler builds it")
def test_the_wheel_has_the_operators_and_the_platform_that_they_need(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    wheel = runpy.run_path(str(ROOT / "scripts" / "wheel"))["build"](
        tmp_path, "--no-build-isolation", "--no-index"
    )
    assert wheel.name.endswith(f"-py3-none-manylinux_2_17_{platform.machine()}.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    for path in (path.relative_to(ROOT) for path in _files()):
        if path.parts[0] == "smoothl1_deploy":
            assert (tmp_path / path).is_file(), path
    library = tmp_path / "smoothl1_deploy" / "ops" / "c" / "libsmoothl1_deploy.so"
    linked = subprocess.check_output(["objdump", "-p", library], text=True)
    assert re.findall(r"NEEDED +(\S+)", linked) == ["libc.so.6"]
    assert max(int(minor) for minor in re.findall(r"GLIBC_2\.(\d+)", linked)) <= 17
    assert "PATH" not in linked, "it names a folder of the machine that built it"


@pytest.mark.parametrize("nvcc", ["false", "/nowhere/nvcc"])
def test_compilers_that_fail_leave_the_package_to_be_installed(nvcc: str, tmp_path: Path) -> None:
    """As an nvcc does that is too old to be asked what it compiles for."""
    pytest.importorskip("setuptools", minversion="77")
    places = ["--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "objects"]
    compilers = {"CC": "false", "NVCC": nvcc}
    done = child.run("setup.py", "--quiet", "build_ext", *places, cwd=ROOT, variables=compilers)
    assert done.returncode == 0, done.stderr
    assert not [*tmp_path.rglob("*.so")]


def test_each_script_installs_torch_first_and_extras_that_exist() -> None:
    script = (ROOT / "scripts" / "_env").read_text()
    assert script.index("install --quiet torch==2.13.0\n") < script.index("constraints.txt -e")
    lists = [found.split(",") for found in re.findall(r"_extras=([\w,-]+)", script)]
    demo, everything = sorted(lists, key=len)
    extras = {*PROJECT["optional-dependencies"]}
    assert {*demo, *everything} <= extras
    # A virtual environment that serves scripts/test serves scripts/demo: `test` holds `report`.
    report, test = (PROJECT["optional-dependencies"][name] for name in ("report", "test"))
    assert {*demo} - {"report"} <= {*everything} and {*report} <= {*test}


def test_scripts_are_executable_and_parse() -> None:
    for name in ("scripts/test", "scripts/demo", "scripts/fuzz", "scripts/longrun", ".ci/run"):
        path = ROOT / name
        assert path.stat().st_mode & 0o111 == 0o111
        assert path.read_text().startswith("#!/usr/bin/env bash\n")
        subprocess.run(["bash", "-n", str(path)], check=True)


def test_no_committed_file_names_a_registry_or_this_machine() -> None:
    # Written apart, so that this file doesn't name them either.
    patterns = ["/" + "opt/venv", "/" + "work/", "/" + "root/", "/tmp" + "/wt", "py" + "pi.org"]
    patterns += ["pythonhosted" + ".org", "npmjs" + ".org", "deb." + "debian.org"]
    found = []
    for path in _files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {word}" for word in patterns if word in text]
    assert found == []


def _ruff(name: str, code: str) -> str:
    pytest.importorskip("ruff")
    words = ["check", "--output-format", "concise", "--no-cache", "--stdin-filename", name, "-"]
    module = f'"""A module."""\n\n{code}\n'
    return child.run("-m", "ruff", *words, input=module, cwd=ROOT).stdout


def test_the_lint_rule_against_heavy_imports_bites_but_where_a_module_lives_on_torch() -> None:
    heavy = ("torch", "onnxruntime", "tensorrt", "tensorrt_rtx")
    top = "\n".join(f"import {module}\n\nprint({module})" for module in heavy)
    inside = f"def use() -> None:\n    {top}".replace("\n", "\n    ")
    assert _ruff("smoothl1_deploy/backends/new.py", top).count("TID253") == len(heavy)
    assert "TID253" not in _ruff("smoothl1_deploy/backends/new.py", inside)
    assert "TID253" not in _ruff("tests/test_new.py", top)
    for name in ("reference/_module", "graph/_torch_route", "graph/_torchscript"):
        assert "TID253" not in _ruff(f"smoothl1_deploy/{name}.py", "import torch\n\nprint(torch)")


def _compat() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "compat"))


def test_every_command_is_probed_with_packages_missing() -> None:
    from smoothl1_deploy.cli._registry import COMMANDS

    compat = _compat()
    assert {probe.split()[0] for probe in compat["PROBES"]} == {*COMMANDS, "--help"}
    known = {extra for needs in compat["PROBES"].values() for extra in needs}
    assert known <= set(PROJECT["optional-dependencies"])


def test_the_lowest_versions_are_those_of_pyproject() -> None:
    lowest = _compat()["_lowest"]()
    assert "onnxruntime==1.31.*" in lowest and "numpy==2.0.*" in lowest
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(r for e in extras if e != "gpu" for r in extras[e])]
    names = {Requirement(text).name for text in wanted}
    assert {pin.partition("==")[0] for pin in lowest} == names


def test_a_run_of_some_replaces_their_lines_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = _compat()["_write"]
    page = tmp_path / "compat.md"
    monkeypatch.setitem(write.__globals__, "PAGE", page)
    shutil.copy(ROOT / "docs" / "compat.md", page)
    before = page.read_text()
    write("", [])
    assert page.read_text() == before
    write("", ["| `newest` | 3.99.0 | 9.9 | today | 1 failed |"])
    *kept, _ = re.split(r"(?m)^(?=\| `newest`)", before)
    assert page.read_text().startswith(*kept) and "| 1 failed |" in page.read_text()
    assert page.read_text().count("\n") == before.count("\n")


def test_a_python_that_is_not_there_is_said_to_be() -> None:
    done = child.run(str(ROOT / "scripts" / "compat"), "/nowhere/python3.13")
    assert done.returncode == 1
    assert "/nowhere/python3.13 is left out: it is no Python that runs here" in done.stdout
