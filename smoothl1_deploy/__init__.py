"""Smooth L1, from PyTorch to production, proven equal.

Importing this package imports neither torch nor onnx nor a runtime; each public name brings
what it needs when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

from ._face import face
from ._spec import LossSpec

if TYPE_CHECKING:
    from .backends._base import load as load
    from .backends._runner import Runner as Runner
    from .graph._attach import attach as attach
    from .graph._export import export as export
    from .graph._torch_table import translation_table as translation_table
    from .graph._torchscript import (
        register_torchscript_symbolic as register_torchscript_symbolic,
    )
    from .parity._differences import Comparison as Comparison
    from .parity._differences import compare as compare
    from .parity._verify import Verification as Verification
    from .parity._verify import verify as verify
    from .reference._module import SmoothL1Loss as SmoothL1Loss
    from .scoring._score import Score as Score
    from .scoring._score import loss_over as loss_over
    from .tensorrt._build import build_engine as build_engine
    from .tensorrt._engine import Engine as Engine

__getattr__, __dir__, _lazy = face(
    __name__,
    {
        ".backends._base": ("load",),
        ".backends._runner": ("Runner",),
        ".graph._attach": ("attach",),
        ".graph._export": ("export",),
        ".graph._torch_table": ("translation_table",),
        ".graph._torchscript": ("register_torchscript_symbolic",),
        ".parity._differences": ("Comparison", "compare"),
        ".parity._verify": ("Verification", "verify"),
        ".reference._module": ("SmoothL1Loss",),
        ".scoring._score": ("Score", "loss_over"),
        ".tensorrt._build": ("build_engine",),
        ".tensorrt._engine": ("Engine",),
    },
    of_torch=("SmoothL1Loss", "register_torchscript_symbolic", "translation_table"),
)

__all__ = ["LossSpec", "__version__", *_lazy]
