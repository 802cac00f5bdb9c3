"""The model of one tile: what an artefact computes, for a part of its elements.

A runner may cut large arrays into tiles that stay in the cache, and put the answers together. The
model it runs on each is made here from the artefact's spec, of the artefact's own functions:

Case 1: `none`, and per sample: the artefact itself. An element, or a row, depends on no other.
Case 2: `mean` and `sum`: the artefact up to its sum in float64, which is the output as it is. The
    artefact rounds that sum once; so does whoever adds up those of the tiles.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from ..spec import LossSpec
from .elements import ELEMENT_TYPE
from .export import export

__all__ = ["COUNT", "WEIGHT_TOTAL", "is_summed", "tile_model", "why_not_tiled"]

#: An input and an output that only tiles have, float64 and rank 0.
COUNT = "count"
WEIGHT_TOTAL = "weight_total"


def is_summed(spec: LossSpec) -> bool:
    """Whether the answers of tiles have to be added up (case 2)."""
    return spec.reduction != "none" and not spec.per_sample


def why_not_tiled(spec: LossSpec) -> str | None:
    """Why a tile can't be computed by itself; None where it can."""
    if is_summed(spec) and spec.weight == "weights" and spec.gradient:
        return "every element of the gradient is divided by the sum of all weights"
    if spec.upstream:
        return "an upstream gradient has the shape of the loss, which isn't that of the elements"
    return None


def tile_model(spec: LossSpec) -> onnx.ModelProto:
    """The model of one tile of `spec`.

    Inputs: those of the artefact, all of one shape: [n], or [rows, columns] per sample. A mean
    with a gradient also takes `count`: of the elements of all tiles.

    Outputs: those of the artefact. In case 2 `loss` is the sum of the element losses, float64 and
    rank 0; where the weights are what a mean divides by, `weight_total` is their sum.
    """
    if not is_summed(spec):
        return export(spec, "inlined", ("rows", "columns") if spec.per_sample else ("n",))
    from .assemble import Assembly, function_closure, model_of
    from .plain import inline

    inputs, outputs = [*spec.inputs], [*spec.outputs]
    if spec.gradient and spec.reduction == "mean":
        inputs.append(COUNT)
    if spec.weight == "weights":
        outputs.append(WEIGHT_TOTAL)
    names = {name: name for name in (*inputs, *outputs)}
    assembly = Assembly(spec, names, summed_axes=(), partial=True)

    def value(name: str) -> onnx.ValueInfoProto:
        if name in ("loss", COUNT, WEIGHT_TOTAL):
            return helper.make_tensor_value_info(name, TensorProto.DOUBLE, ())
        if name == "beta":
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, ())
        return helper.make_tensor_value_info(name, ELEMENT_TYPE[spec.dtype], ("n",))

    graph = helper.make_graph(
        assembly.nodes, f"{spec.name}_tile", [*map(value, inputs)], [*map(value, outputs)]
    )
    return inline(model_of(graph, function_closure(assembly.used)))
