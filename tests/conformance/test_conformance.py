"""The suite for anyone's loss: right ones pass, and a fault turns the tests red that see it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import child
import numpy as np
import pytest
from conftest_cli import Cli

from smoothl1_deploy._floats import Array
from smoothl1_deploy._spec import LossSpec
from smoothl1_deploy.backends._base import backend_class, get_backend
from smoothl1_deploy.backends._names import others
from smoothl1_deploy.conformance import _plugin, _suite
from smoothl1_deploy.conformance.__main__ import table_of
from smoothl1_deploy.conformance._losses import LOSSES, Loss, find_loss
from smoothl1_deploy.conformance._subject import LossBackend, as_it_is, read_only, strided
from smoothl1_deploy.conformance._suite import FEW, SIZES, VALUES, wrong
from smoothl1_deploy.errors import MissingDependencyError, SpecError
from smoothl1_deploy.parity._cases import Case

#: The right loss, as a user's module holds it.
RIGHT = """
import numpy as np

def loss(input, target, beta, reduction):
    d = np.abs(input.astype(np.float64) - target.astype(np.float64))
    with np.errstate(all="ignore"):
        losses = np.where(d < beta, 0.5 * d * (d / beta), d - 0.5 * beta)
        found = losses if reduction == "none" else getattr(losses, reduction)()
        return np.asarray(found).astype(input.dtype)
"""
_names: dict[str, Any] = {}
exec(RIGHT, _names)
right: Loss = _names["loss"]


def by_rows(input: Array, target: Array, beta: float, reduction: str) -> Array:
    found = right(input, target, beta, reduction)
    return found * input.size / len(input) if reduction == "mean" else found


def undivided(input: Array, target: Array, beta: float, reduction: str) -> Array:
    d = abs(input - target)
    return np.where(d <= beta, 0.5 * d * d, d - np.float32(0.5 * beta))


def deaf_to_nan(input: Array, target: Array, beta: float, reduction: str) -> Array:
    return np.nan_to_num(right(input, target, beta, reduction), nan=0.0, posinf=np.inf)


def writing(input: Array, target: Array, beta: float, reduction: str) -> Array:
    input -= target
    return right(input, np.zeros_like(target), beta, reduction)


def by_address(input: Array, target: Array, beta: float, reduction: str) -> Array:
    steps = np.empty(input.shape, input.dtype).strides
    return right(np.lib.stride_tricks.as_strided(input, strides=steps), target, beta, reduction)


def drifting(input: Array, target: Array, beta: float, reduction: str) -> Array:
    return right(input, target, beta, "none").cumsum()[-1]


def red(loss: Loss, spec: LossSpec, cases: Any, handing: Any = as_it_is) -> set[str]:
    with np.errstate(all="ignore"):
        found = wrong(LossBackend(loss), spec, cases, handing)
    return {f"{each.case.family} {each.case.layout}" for each in found}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_a_right_loss_passes(dtype: str) -> None:
    for beta in _suite.BETAS:
        assert red(right, LossSpec(beta, "none", dtype), VALUES) == set()
    for handing in (read_only, strided):
        assert red(right, LossSpec(dtype=dtype), FEW, handing) == set()


def test_each_fault_is_seen_where_it_is() -> None:
    """And nowhere else: a suite that is red everywhere says nothing."""
    mean, none = LossSpec(), LossSpec(0.1, "none")
    assert red(by_rows, none, VALUES) == set()
    assert {"normal matrix", "constant matrix"} <= red(by_rows, mean, VALUES)
    assert not any("odd" in name and "zeros" in name for name in red(by_rows, mean, VALUES))
    faults = red(undivided, none, VALUES)
    assert {"quadratic odd", "boundary matrix"} <= faults and "linear odd" not in faults
    swallowed = red(deaf_to_nan, none, VALUES)
    assert {name.split()[0] for name in swallowed} == {"nan", "inf-minus-inf"}
    assert red(drifting, LossSpec(reduction="sum"), SIZES) == {"normal 2^20", "constant 2^20"}


def test_a_loss_that_writes_or_reads_by_address_is_seen() -> None:
    spec = LossSpec(reduction="none")
    (first, *_) = wrong(LossBackend(writing), spec, FEW)
    assert first.verdict.detail == "it wrote into what it was given"
    (first, *_) = wrong(LossBackend(writing), spec, FEW, read_only)
    assert "ValueError: output array is read-only" in first.verdict.detail
    assert red(by_address, spec, FEW) == set()
    assert "normal matrix" in red(by_address, spec, FEW, strided)


def test_the_message_has_all_that_one_needs() -> None:
    with np.errstate(all="ignore"):
        found = wrong(LossBackend(deaf_to_nan), LossSpec(reduction="none"), VALUES)
    told = _suite.told(found, 24)
    assert "in a wrong class; at (" in told and "PyTorch nan, oracle nan" in told
    assert "from input " in told and "target " in told and "of 24 cases" in told


@pytest.mark.parametrize("name", sorted({*LOSSES} - {"tinygrad"}))  # which needs clang too
def test_what_is_out_of_the_box_is_a_loss(name: str) -> None:
    try:
        loss = find_loss(name)
    except MissingDependencyError as exc:
        pytest.skip(str(exc))
    assert red(loss, LossSpec(0.5, "sum"), [Case.of("zeros", "matrix")]) == set()


def test_a_loss_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("almost.py").write_text("loss = 3")
    for name, said in {
        "abacus": "unknown loss 'abacus'; choose one of eager, compiled",
        "nowhere:loss": "there is no loss 'nowhere:loss' .*; give module:callable",
        "almost:loss": "'almost:loss' is a int; give what can be called",
    }.items():
        with pytest.raises(SpecError, match=said):
            find_loss(name)


def suite(*words: object, folder: Path) -> Any:
    """The suite as anyone runs it; an installed package finds the plugin by itself."""
    plugin = ("-p", "smoothl1_deploy.conformance._plugin", "-p", "no:cacheprovider")
    named = ("--pyargs", "smoothl1_deploy.conformance")
    return child.run("-m", "pytest", *plugin, *named, *words, cwd=folder)


def test_skips_expected_failures_header_and_results(tmp_path: Path) -> None:
    refusal = "    assert input.dtype.name != 'bfloat16', 'no such dtype'\n    d ="
    (tmp_path / "mine.py").write_text(RIGHT.replace("    d =", refusal))
    (tmp_path / "skips.txt").write_text("# slow\n\ntest_values[float16-*  # half is slow here\n")
    (tmp_path / "xfails.txt").write_text(
        "test_*[bfloat16-*]  # not written yet\n"
        "test_values[float64-beta1-mean]  # was wrong before 1.2\n"
    )
    files = ("--skips-file", "skips.txt", "--xfails-file", "xfails.txt", "--results", "found.json")
    chosen = ("-k", "beta1-mean and not shapes and not sizes", "-m", "not hostile")
    done = suite("--loss", "mine:loss", *chosen, *files, folder=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "conformance of mine:loss by smoothl1-deploy 0.1.0, against PyTorch" in done.stdout
    assert "[XPASS(strict)] was wrong before 1.2" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert {test["spec"]["dtype"]: test["outcome"] for test in found["tests"]} == {
        "float32": "passed", "float16": "skipped", "bfloat16": "xfailed", "float64": "xpassed"
    }  # fmt: skip
    ((name, *entries),) = table_of([found]).rows
    assert name == "mine:loss" and [entry.text for entry in entries[:2]] == ["0 of 1", "not tried"]  # type: ignore[union-attr]
    assert "AssertionError: no such dtype" in entries[2].text  # type: ignore[union-attr]


def test_a_line_says_why_and_names_a_test(tmp_path: Path) -> None:
    known = tmp_path / "known.txt"
    config: Any = SimpleNamespace(getoption={"skips_file": "", "xfails_file": str(known)}.get)
    for text, said in {
        "test_values[*]": "line 1: test_values[*] has no reason; add one behind a #",
        "\ntest_value[*]  # a slip": "line 2: test_value[*] names no test; take it out",
    }.items():
        known.write_text(text)
        with pytest.raises(pytest.UsageError, match=re.escape(said)):
            _plugin._Conformance().pytest_collection_modifyitems(config, [])


def test_a_stranger_s_pytest_keeps_its_own_options(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser): parser.addoption('--loss')"
    )
    (tmp_path / "test_it.py").write_text(
        "def test_it(pytestconfig): assert pytestconfig.option.loss"
    )
    words = ("-q", "--loss", "mine", "-p", "smoothl1_deploy.conformance._plugin")
    done = child.run("-m", "pytest", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


THEIRS = """
from smoothl1_deploy.backends import Backend, get_backend

class Theirs(Backend):
    def load(self, model):
        return get_backend("onnx-reference").load(model)
"""


def test_a_package_adds_backends_by_entry_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    """None under a name of ours, which says what an artefact was proved on."""
    (tmp_path / "their_backends.py").write_text(THEIRS)
    about = tmp_path / "theirs-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (about / "entry_points.txt").write_text(
        "[smoothl1_deploy.backends]\n"
        "theirs = their_backends:Theirs\ngone = their_backends:Gone\n"
        "ort-cpu = their_backends:Theirs\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert others() == {"theirs": "their_backends:Theirs", "gone": "their_backends:Gone"}
    backend = get_backend("theirs")
    assert backend.name == "theirs" and wrong(backend, LossSpec(0.1), FEW) == []
    assert backend_class("ort-cpu").__module__.startswith("smoothl1_deploy.")
    with pytest.raises(SpecError, match="there is no backend 'their_backends:Gone'"):
        get_backend("gone")
    with pytest.raises(
        SpecError, match="unknown backend 'their'; choose .*, theirs, gone, or give"
    ):
        get_backend("their")
    parts = {part["name"]: part for part in json.loads(cli("doctor", "--json").out)["backends"]}
    assert parts["theirs"]["available"] and "Gone" in parts["gone"]["reason"]
