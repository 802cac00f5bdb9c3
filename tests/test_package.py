"""The package as a whole: what an import brings along, and that every public name is documented."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import smoothl1_deploy
from smoothl1_deploy.errors import MissingDependencyError

ROOT = Path(smoothl1_deploy.__file__).parent
HEAVY = ("numpy", "ml_dtypes", "torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt")
HEAVY += ("tensorrt_rtx", "typer", "rich")

ERRORS = "smoothl1_deploy.errors"
MODULES = sorted(
    info.name for info in pkgutil.walk_packages([str(ROOT)], "smoothl1_deploy.") if not info.ispkg
)


def imported_by(code: str) -> set[str]:
    """Which of HEAVY a fresh interpreter has imported after `code`."""
    script = f"{code}\nimport sys\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT.parent, check=False
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


def test_every_public_name_resolves_and_an_unknown_one_is_an_attribute_error() -> None:
    names: dict[str, object] = {}
    exec("from smoothl1_deploy import *", names)
    assert set(smoothl1_deploy.__all__) <= set(names) & set(dir(smoothl1_deploy))
    assert all(getattr(smoothl1_deploy, name) is not None for name in smoothl1_deploy.__all__)
    assert len(set(smoothl1_deploy.__all__)) == len(smoothl1_deploy.__all__)
    with pytest.raises(AttributeError, match="module 'smoothl1_deploy' has no attribute 'huber'"):
        smoothl1_deploy.huber  # noqa: B018


FACES = [info.name for info in pkgutil.walk_packages([str(ROOT)], "smoothl1_deploy.") if info.ispkg]


def test_what_is_public_stands_on_a_face() -> None:
    """Modules begin with `_`; a face's names resolve, and a type checker is told of the same."""
    assert [n for n in MODULES if not n.rpartition(".")[2].startswith("_")] == [ERRORS]
    for name in ("smoothl1_deploy", *FACES):
        package = importlib.import_module(name)
        assert package.__file__ is not None
        tree = ast.parse(Path(package.__file__).read_text())
        guarded = [node for node in tree.body if isinstance(node, ast.If)]
        told = (
            {
                alias.name
                for node in ast.walk(guarded[0])
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
            }
            if guarded
            else set()
        )
        public = set(getattr(package, "__all__", ()))
        assert not guarded or public - {"LossSpec", "__version__"} == told
        assert all(hasattr(package, item) for item in public)


def _module(name: str) -> object:
    try:
        return importlib.import_module(name)
    except MissingDependencyError as exc:  # an optional dependency; the message says which
        pytest.skip(str(exc))


def _public(name: str) -> dict[str, object]:
    """What `name` defines for others: its `__all__` where it is a face, else what has no `_`."""
    module = _module(name)
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    things = {item: getattr(module, item) for item in names}
    return {item: x for item, x in things.items() if getattr(x, "__module__", None) == name}


def _undocumented(name: str) -> list[str]:
    """The public classes, functions and methods that `name` defines without a docstring."""
    found = []
    for item, thing in _public(name).items():
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


@pytest.mark.parametrize("name", MODULES)
def test_a_module_and_what_is_public_in_it_say_what_they_are(name: str) -> None:
    assert (_module(name).__doc__ or "").strip()
    assert _undocumented(name) == []


def test_the_check_for_docstrings_sees_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from smoothl1_deploy._spec import LossSpec, resolve_reduction

    monkeypatch.setattr(resolve_reduction, "__doc__", None)
    monkeypatch.setattr(LossSpec.to_dict, "__doc__", None)
    assert sorted(_undocumented("smoothl1_deploy._spec")) == [
        "LossSpec.to_dict",
        "resolve_reduction",
    ]


#: A module imports, when it is imported itself, from its own layer and those before it alone.
LAYERS = [
    {"", "__version__", "errors", "_face", "_spec", "_records"},
    {"_environment", "_files", "_floats", "_shapes"},
    {"_dlpack", "reference"},
    {"_model"},
    {"graph"},
    {"_artefact"},
    {"_npy", "_device", "ops"},
    {"tensorrt"},
    {"backends"},
    {"parity", "scoring"},
    {"bench"},
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


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
@pytest.mark.parametrize("name", MODULES)
def test_documented_examples_work(name: str) -> None:
    result = doctest.testmod(_module(name))  # type: ignore[arg-type]
    assert result.failed == 0
    if name == "smoothl1_deploy._spec":
        assert result.attempted >= 5  # doctest finds none where a module is loaded in a new way
