"""A package's face: public names that bring what defines them when they are first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from .errors import require


def face(
    package: str, names: Mapping[str, Collection[str]], of_torch: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """The `__getattr__`, `__dir__` and `__all__` of a package (PEP 562).

    A type checker has to be told of the same names by imports under `TYPE_CHECKING`.

    Args:
        package: the `__name__` of the package.
        names: a module, relative to the package -> the public names that it defines.
        of_torch: the names that need PyTorch: without it they raise an error that says how to
            install it.
    """
    modules = {name: module for module, those in names.items() for name in those}

    def bring(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if name in of_torch:
            require("torch", "torch", name)
        value = getattr(importlib.import_module(modules[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    def known() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return bring, known, sorted(modules)
