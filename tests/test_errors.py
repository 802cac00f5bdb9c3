"""The errors: their family, their exit codes, and `require`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from smoothl1_deploy import errors
from smoothl1_deploy.errors import (
    BackendUnavailableError,
    MissingDependencyError,
    SmoothL1DeployError,
    require,
)

EXIT_CODES = {
    "ArtefactError": 2,
    "BackendUnavailableError": 3,
    "BuildError": 2,
    "InvalidInputError": 2,
    "MissingDependencyError": 3,
    "OutputError": 2,
    "SmoothL1DeployError": 2,
    "SpecError": 2,
    "UnsupportedError": 2,
}


def test_every_error_is_of_the_family_and_has_its_exit_code() -> None:
    others = {
        "is_shortage",
        "reason_of",
        "require",
        "shortage",
        "ModelWarning",
    }  # a warning is no error
    classes = {name: getattr(errors, name) for name in errors.__all__ if name not in others}
    assert all(issubclass(cls, SmoothL1DeployError) for cls in classes.values())
    found = {name: cls.exit_code for name, cls in classes.items()}
    assert {name: found.get(name) for name in EXIT_CODES} == EXIT_CODES


def test_a_message_of_millions_of_letters_keeps_its_beginning_and_its_remedy() -> None:
    text = str(errors.SpecError(f"unknown dtype {'x' * 5_000_000}; choose one of float32"))
    assert text.startswith("unknown dtype xxx") and text.endswith("; choose one of float32")
    assert " more)... " in text and len(text) < 4100


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("SpecError", ValueError),
        ("InvalidInputError", ValueError),
        ("ArtefactError", ValueError),
        ("OutputError", OSError),
        ("MissingDependencyError", ImportError),
    ],
)
def test_errors_are_also_what_python_would_raise(name: str, builtin: type[Exception]) -> None:
    assert issubclass(getattr(errors, name), builtin)


def test_require_gives_the_module() -> None:
    assert require("json", "cpu", "a test") is sys.modules["json"]
    assert require("os.path", "cpu", "a test").join("a", "b")


def test_require_says_what_to_install() -> None:
    with pytest.raises(MissingDependencyError) as caught:
        require("smoothl1_no_such_module", "cpu", "the ort-cpu backend")
    assert str(caught.value) == (
        "the ort-cpu backend needs the package 'smoothl1_no_such_module', which can't be imported "
        "(No module named 'smoothl1_no_such_module'). "
        "Install it with: pip install 'smoothl1-deploy[cpu]'"
    )
    assert isinstance(caught.value.__cause__, ImportError)


def test_require_pins_torch() -> None:
    with pytest.raises(MissingDependencyError, match=r"Install it with: pip install torch=="):
        require("smoothl1_no_such_module", "torch", "a test")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import smoothl1_no_such_module", "No module named 'smoothl1_no_such_module'"),
        ("raise OSError('libnvinfer.so.10: cannot open shared object file')", "libnvinfer.so.10"),
    ],
)
def test_require_speaks_of_a_package_that_is_there_but_broken(
    body: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "smoothl1_broken.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match=reason):
        require("smoothl1_broken", "cpu", "a test")


@pytest.mark.parametrize(
    "body",
    [
        "raise MemoryError",
        "raise ImportError('libtorch_cpu.so: failed to map segment from shared object')",
        "raise OSError('lib.so: cannot open shared object file: Too many open files')",
    ],
)
def test_a_package_that_gets_too_little_memory_is_not_said_to_be_missing(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "smoothl1_large.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendUnavailableError, match="too little memory or too few files") as said:
        require("smoothl1_large", "torch", "a test")
    assert "pip install" not in str(said.value)


def test_require_lets_the_other_errors_of_a_package_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "smoothl1_buggy.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        require("smoothl1_buggy", "cpu", "a test")
