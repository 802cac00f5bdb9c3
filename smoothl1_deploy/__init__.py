"""Smooth L1, from PyTorch to production, proven equal.

Importing this package imports neither torch nor onnx nor a runtime; each public name brings
what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from .errors import require
from .spec import LossSpec

if TYPE_CHECKING:
    from .backends.base import load as load
    from .backends.runner import Runner as Runner
    from .graph.attach import attach as attach
    from .graph.export import export as export
    from .graph.torch_table import translation_table as translation_table
    from .graph.torchscript import (
        register_torchscript_symbolic as register_torchscript_symbolic,
    )
    from .parity.verify import Verification as Verification
    from .parity.verify import verify as verify
    from .reference.module import SmoothL1Loss as SmoothL1Loss
    from .scoring.score import Score as Score
    from .scoring.score import loss_over as loss_over
    from .tensorrt.build import build_engine as build_engine
    from .tensorrt.engine import Engine as Engine

#: public name -> module that defines it, imported on first use.
_LAZY = {
    "Engine": ".tensorrt.engine",
    "Runner": ".backends.runner",
    "Score": ".scoring.score",
    "SmoothL1Loss": ".reference.module",
    "Verification": ".parity.verify",
    "build_engine": ".tensorrt.build",
    "attach": ".graph.attach",
    "export": ".graph.export",
    "load": ".backends.base",
    "loss_over": ".scoring.score",
    "register_torchscript_symbolic": ".graph.torchscript",
    "translation_table": ".graph.torch_table",
    "verify": ".parity.verify",
}

#: Those that PyTorch has to be there for.
_OF_TORCH = ("SmoothL1Loss", "register_torchscript_symbolic", "translation_table")

__all__ = ["LossSpec", "__version__", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _OF_TORCH:
        require("torch", "torch", name)
    value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
