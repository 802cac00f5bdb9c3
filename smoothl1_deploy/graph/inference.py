"""Shape inference that stays small on models with large axes."""

from __future__ import annotations

import math

import onnx
import onnx.shape_inference

from .nesting import MODEL_ERRORS

__all__ = ["inferred_graph"]

#: Elements beyond which onnx is not asked to follow what tensors hold: it keeps a message of
#: 220 bytes for each element of a tensor of rank 1, through every operator (onnx 1.23).
_LONGEST_VECTOR = 1 << 16
_MOST_ELEMENTS = 1 << 23  # of any rank: a function may flatten it, which nothing here shows


def inferred_graph(model: onnx.ModelProto) -> onnx.GraphProto:
    """The model's graph with the shapes that inference tells.

    Shapes that are computed in the graph (data propagation) are told too, unless a tensor is so
    large that following its data could take all memory. A model that inference can't make sense
    of (custom operators, contradictions, more than 2 GB) gives its own graph.
    """
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
        if not any(map(_is_large, (*graph.input, *graph.value_info, *graph.output))):
            graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except (*MODEL_ERRORS, RuntimeError, ValueError):
        return model.graph
    return graph


def _is_large(value: onnx.ValueInfoProto) -> bool:
    sizes: list[int] = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    limit = _LONGEST_VECTOR if len(sizes) == 1 else _MOST_ELEMENTS
    return math.prod(size for size in sizes if size > 0) > limit
