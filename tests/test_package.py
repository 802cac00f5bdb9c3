"""The package as a whole: what an import brings along, what is public, who may import whom."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import os
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import child
import pytest

import smoothl1_deploy
from smoothl1_deploy.errors import BackendUnavailableError, MissingDependencyError

ROOT = Path(smoothl1_deploy.__file__).parent
HEAVY = ("numpy", "ml_dtypes", "torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt")
HEAVY += ("tensorrt_rtx", "typer", "rich")

_FOUND = [*pkgutil.walk_packages([str(ROOT)], "smoothl1_deploy.")]
FACES = ["smoothl1_deploy", *(info.name for info in _FOUND if info.ispkg)]
MODULES = [info.name for info in _FOUND if not info.ispkg]


def imported_by(code: str) -> set[str]:
    """Which of HEAVY a fresh interpreter has imported after `code`."""
    done = child.run(
        "-c", f"{code}\nimport sys\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


RUNS = """
import numpy as np
from smoothl1_deploy import LossSpec, export
from smoothl1_deploy.backends._base import load
x = np.ones(3, np.float32)
for backend in ("ort-cpu", "onnx-reference"):
    load(export(LossSpec()), backend).run(x, x)
"""
EXPORTS = """
from smoothl1_deploy import LossSpec, export
for route in ("function", "inlined"):
    export(LossSpec(0.5, "mean", "bfloat16"), route, ("N", 4))
"""
ONNX = {"numpy", "ml_dtypes", "onnx", "onnx_ir", "onnxscript"}


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import smoothl1_deploy; dir(smoothl1_deploy)", set()),
        ("from smoothl1_deploy import LossSpec; LossSpec(0.5).to_dict()", set()),
        ("import smoothl1_deploy.errors, smoothl1_deploy._spec", set()),
        ("import smoothl1_deploy.reference._oracle", {"numpy", "ml_dtypes"}),
        (EXPORTS, ONNX),
        (RUNS, {*ONNX, "onnxruntime"}),
    ],
)
def test_nothing_heavier_is_imported_than_is_needed(code: str, allowed: set[str]) -> None:
    assert imported_by(code) <= allowed


def test_what_is_public_stands_on_a_face() -> None:
    """Modules begin with `_`; a face's names are there, and a type checker is told of the same."""
    others = [name for name in MODULES if not name.rpartition(".")[2].startswith("_")]
    assert others == ["smoothl1_deploy.errors"]
    for name in FACES:
        face: Any = importlib.import_module(name)
        public = getattr(face, "__all__", [])
        assert len({*public}) == len(public)
        assert {*public} <= {*dir(face)} and all(hasattr(face, item) for item in public), name
        for guarded in (node for node in _parsed(face).body if isinstance(node, ast.If)):
            imports = [node for node in guarded.body if isinstance(node, ast.ImportFrom)]
            told = {alias.name for node in imports for alias in node.names}
            assert {*public} - {"LossSpec", "__version__"} == told, name
    with pytest.raises(AttributeError, match="module 'smoothl1_deploy' has no attribute 'huber'"):
        smoothl1_deploy.huber  # noqa: B018


def _parsed(module: Any) -> ast.Module:
    return ast.parse(Path(module.__file__).read_text())


def _defined(name: str) -> dict[str, Any]:
    """The classes and functions without `_` that a module itself defines."""
    things = vars(importlib.import_module(name))
    return {
        item: thing
        for item, thing in things.items()
        if not item.startswith("_") and getattr(thing, "__module__", None) == name
    }


def _undocumented(name: str) -> list[str]:
    """The public classes, functions and methods that `name` defines without a docstring."""
    found = []
    for item, thing in _defined(name).items():
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        if not inspect.getdoc(thing) or (thing.__doc__ or "").startswith(f"{item}("):
            found.append(item)  # a dataclass without a docstring gets its signature for one
        for attribute, member in vars(thing).items() if inspect.isclass(thing) else ():
            member = getattr(member, "__func__", getattr(member, "fget", member))
            public = inspect.isfunction(member) and not attribute.startswith("_")
            # inspect.getdoc finds the docstring of the method that this one overrides.
            if public and not inspect.getdoc(getattr(thing, attribute)):
                found.append(f"{item}.{attribute}")
    return found


def _without_example(name: str) -> list[str]:
    """The classes and functions on a face whose docstrings show no use of them.

    An `Example:` that is no doctest, as one of a client that needs a server, has a test of its own.
    """
    face = importlib.import_module(name)
    things = {item: getattr(face, item) for item in getattr(face, "__all__", ())}
    shown = re.compile(r">>> |^ *Example:$", re.MULTILINE)
    return [n for n, x in things.items() if callable(x) and not shown.search(x.__doc__ or "")]


def test_every_module_and_what_is_public_in_it_say_what_they_are() -> None:
    for name in (*FACES, *MODULES):
        assert (importlib.import_module(name).__doc__ or "").strip(), name
        assert _undocumented(name) == [], name


def test_every_name_on_a_face_has_an_example() -> None:
    assert {name: found for name in FACES if (found := _without_example(name))} == {}


def test_these_checks_see_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from smoothl1_deploy._spec import LossSpec, resolve_reduction

    monkeypatch.setattr(resolve_reduction, "__doc__", None)
    monkeypatch.setattr(LossSpec.to_dict, "__doc__", None)
    monkeypatch.setattr(LossSpec, "__doc__", "What is computed.")
    assert _undocumented("smoothl1_deploy._spec") == ["resolve_reduction", "LossSpec.to_dict"]
    assert "LossSpec" in _without_example("smoothl1_deploy")


class _Examples(doctest.DocTestRunner):
    """Ends an example of what is not installed here, or can't run here, with that reason."""

    def report_unexpected_exception(self, out: Any, test: Any, example: Any, exc_info: Any) -> None:
        if isinstance(exc_info[1], (MissingDependencyError, BackendUnavailableError)):
            raise exc_info[1]
        super().report_unexpected_exception(out, test, example, exc_info)


def _with_examples() -> Iterator[str]:
    for name in (*FACES, *MODULES):
        path = ROOT.parent.joinpath(*name.split("."))
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if ">>> " in source.read_text():
            yield name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*_with_examples()])
def test_documented_examples_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "user-cache"))
    runner, lacking = _Examples(optionflags=doctest.ELLIPSIS), []
    for test in doctest.DocTestFinder().find(importlib.import_module(name)):
        try:
            runner.run(test)
        except (MissingDependencyError, BackendUnavailableError) as exc:
            lacking.append(f"{test.name}: {exc}")
    assert runner.failures == 0
    if lacking:
        pytest.skip("; ".join(lacking))
    assert runner.tries > 0  # a doctest finds nothing where a module is loaded in a new way


#: A module imports, when it is imported itself, from its own layer and those before it alone.
LAYERS = [
    {"", "__version__", "errors", "_face", "_spec", "_shapes", "_records"},
    {"_certainty", "_environment", "_files", "_floats", "_table"},
    {"_dlpack", "reference"},
    {"_model"},
    {"graph"},
    {"_artefact"},
    {"_npy", "_device", "ops"},
    {"tensorrt"},
    {"backends"},
    {"parity", "scoring"},
    {"bench", "conformance"},
    {"serving"},
    {"cli"},
    {"__main__"},
]


def _layer(module: tuple[str, ...]) -> int:
    found = [layer for layer, those in enumerate(LAYERS) if ".".join(module[:1]) in those]
    assert found, f"{'.'.join(module)} stands in no layer"
    return found[0]


def _imports(source: str, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """What of this package a module imports when it is imported."""
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((*base, *name.split(".")) for name in names)
        elif not isinstance(node, (ast.FunctionDef, ast.If)):  # an `if` is that of TYPE_CHECKING
            nodes.extend(ast.iter_child_nodes(node))


def test_data_flow_one_way() -> None:
    """CONTRIBUTING's map: a module that stands left knows nothing of what stands right of it."""
    wrong = []
    for path in ROOT.rglob("*.py"):
        module = path.relative_to(ROOT).with_suffix("").parts
        module = module[:-1] if module[-1] == "__init__" else module
        package = module if path.name == "__init__.py" else module[:-1]
        for imported in _imports(path.read_text(), package):
            if _layer(imported) > _layer(module):
                wrong.append(f"{'.'.join(module)} imports {'.'.join(imported)}")
    assert not wrong
