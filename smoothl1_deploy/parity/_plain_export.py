"""What `torch.onnx.export` makes of the loss by itself: the graph that this package replaces."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from .._floats import Array
from .._shapes import Shape
from ..errors import require


def plain_export(
    arguments: dict[str, Any], dtype: str, shape: Shape, target_shape: Shape | None = None
) -> onnx.ModelProto:
    """The exporter's own model of `torch.nn.SmoothL1Loss(**arguments)`, its defaults untouched.

    Args:
        arguments: of the module, the deprecated ones included.
        dtype: the name of a torch dtype, of both inputs.
        shape: integers, and names for dynamic axes.
        target_shape: of the target where it differs.

    Raises:
        MissingDependencyError: without torch.
    """
    torch = require("torch", "torch", "the plain exporter's graph")
    from ..graph._torch_route import quiet

    shapes = (shape, shape if target_shape is None else target_shape)
    names = sorted({dim for axes in shapes for dim in axes if isinstance(dim, str)})
    sizes = {name: 3 + 2 * i for i, name in enumerate(names)}  # it specialises on 0, 1 and equals
    dims = {name: torch.export.Dim(name) for name in names}
    examples = tuple(
        torch.zeros([sizes[d] if isinstance(d, str) else d for d in axes]).to(getattr(torch, dtype))
        for axes in shapes
    )
    dynamic = tuple(
        {i: dims[d] for i, d in enumerate(axes) if isinstance(d, str)} for axes in shapes
    )
    with quiet():
        program = torch.onnx.export(
            torch.nn.SmoothL1Loss(**arguments).eval(),
            examples,
            dynamic_shapes=dynamic,
            dynamo=True,
            verbose=False,
        )
    model: onnx.ModelProto = program.model_proto
    return model


class PlainExport:
    """The plain graph on ONNX Runtime's CPU provider, fed as anyone would feed it: unchecked.

    Args:
        model: of `plain_export`.
        threads: for the operators of one call; 0 means every core.

    Raises:
        MissingDependencyError: without onnxruntime.
    """

    def __init__(self, model: onnx.ModelProto, threads: int = 0) -> None:
        ort = require("onnxruntime", "cpu", "the plain exporter's graph")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what it says against the model is the finding
        self._session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, input: Array, target: Array) -> Array:
        """The first output, as ONNX Runtime gives it."""
        names = [port.name for port in self._session.get_inputs()]
        values = self._session.run(None, dict(zip(names, (input, target), strict=True)))
        return np.asarray(values[0])
