"""How a spec becomes ONNX: the functions, the three routes, and the metadata that names them.

`FUNCTIONS` has the operators as onnxscript functions, by their names, to be called from a program
of one's own:

    from smoothl1_deploy.graph import FUNCTIONS

    SmoothL1Loss, WideMean = FUNCTIONS["SmoothL1Loss"], FUNCTIONS["WideMean"]

    @onnxscript.script()
    def doubled(prediction: FLOAT["N", 4], truth: FLOAT["N", 4]) -> FLOAT:
        losses = SmoothL1Loss(op.Add(prediction, prediction), truth, beta=0.5)
        return op.CastLike(WideMean(losses), prediction)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._face import face

if TYPE_CHECKING:
    from ._functions import FUNCTIONS as FUNCTIONS

__getattr__, __dir__, __all__ = face(__name__, {"._functions": ("FUNCTIONS",)})
