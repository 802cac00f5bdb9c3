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


def test_every_error_is_of_the_family_has_its_exit_code_and_is_what_python_would_raise() -> None:
    for name, code, builtin in (
        ("ArtefactError", 2, ValueError),
        ("BackendUnavailableError", 3, Exception),
        ("BuildError", 2, Exception),
        ("InvalidInputError", 2, ValueError),
        ("MissingDependencyError", 3, ImportError),
        ("OutputError", 2, OSError),
        ("SmoothL1DeployError", 2, Exception),
        ("SpecError", 2, ValueError),
        ("UnsupportedError", 2, Exception),
    ):
        error = getattr(errors, name)
        assert issubclass(error, SmoothL1DeployError) and issubclass(error, builtin)
        assert error.exit_code == code, name


def test_a_message_of_millions_of_letters_keeps_its_beginning_and_its_remedy() -> None:
    text = str(errors.SpecError(f"unknown dtype {'x' * 5_000_000}; choose one of float32"))
    assert text.startswith("unknown dtype xxx") and text.endswith("; choose one of float32")
    assert " more)... " in text and len(text) < 4100


def test_require_gives_the_module_or_says_what_to_install() -> None:
    assert require("json", "cpu", "a test") is sys.modules["json"]
    assert require("os.path", "cpu", "a test").join("a", "b")
    with pytest.raises(MissingDependencyError) as caught:
        require("smoothl1_no_such_module", "cpu", "the ort-cpu backend")
    assert str(caught.value) == (
        "the ort-cpu backend needs the package 'smoothl1_no_such_module', which can't be imported "
        "(No module named 'smoothl1_no_such_module'). "
        "Install it with: pip install 'smoothl1-deploy[cpu]'"
    )
    assert isinstance(caught.value.__cause__, ImportError)
    with pytest.raises(MissingDependencyError, match=r"Install it with: pip install torch=="):
        require("smoothl1_no_such_module", "torch", "a test")


@pytest.mark.parametrize(
    ("body", "error", "reason"),
    [
        ("import smoothl1_nowhere", MissingDependencyError, "No module named 'smoothl1_nowhere'"),
        ("raise OSError('libnvinfer.so.10: cannot open shared object file')",
         MissingDependencyError, "libnvinfer.so.10"),
        ("raise MemoryError", BackendUnavailableError, "too little memory or too few files"),
        ("raise ImportError('libtorch_cpu.so: failed to map segment from shared object')",
         BackendUnavailableError, "too little memory or too few files"),
        ("raise OSError('lib.so: cannot open shared object file: Too many open files')",
         BackendUnavailableError, "too little memory or too few files"),
        ("1 / 0", ZeroDivisionError, "division by zero"),
    ],
)  # fmt: skip
def test_require_tells_a_broken_package_and_too_little_memory_apart(
    body: str, error: type[Exception], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "smoothl1_broken.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "smoothl1_broken", raising=False)
    with pytest.raises(error, match=reason) as said:
        require("smoothl1_broken", "cpu", "a test")
    assert error is MissingDependencyError or "pip install" not in str(said.value)
