"""`kept_registry`: the exporter's table of operators, made once a process, not once an export.

torch.onnx.export reads the source of some 500 functions anew for each model, which takes longer
than all the rest of a small one (torch 2.13). Each export still gets a table of its own to add to.
Where PyTorch keeps the table elsewhere, nothing is changed.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

__all__ = ["kept_registry"]

_patching = threading.RLock()


@contextmanager
def kept_registry() -> Iterator[None]:
    """While it holds, the exporter copies the table it made before; one thread at a time."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        original = ONNXRegistry.__dict__["from_torchlib"]
    except (ImportError, KeyError):
        yield
        return

    def from_torchlib(cls: type, **settings: Any) -> Any:
        own = copy.copy(_table(original.__func__, cls, **settings))
        own.functions = {target: [*metas] for target, metas in own.functions.items()}
        return own

    with _patching:
        ONNXRegistry.from_torchlib = classmethod(from_torchlib)  # type: ignore[method-assign, assignment, arg-type]
        try:
            yield
        finally:
            ONNXRegistry.from_torchlib = original  # type: ignore[method-assign]


@lru_cache(maxsize=4)
def _table(make: Any, registry: type, **settings: Any) -> Any:
    return make(registry, **settings)
