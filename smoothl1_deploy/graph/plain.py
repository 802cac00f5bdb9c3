"""From functions to plain ONNX operators, with what depends on constants alone folded away."""

from __future__ import annotations

import onnx

__all__ = ["fold_scalars", "inline"]


def inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` without its local functions, scalars folded."""
    import onnx.inliner

    return fold_scalars(onnx.inliner.inline_local_functions(model))


def fold_scalars(model: onnx.ModelProto) -> onnx.ModelProto:
    """Evaluate the nodes whose inputs are all constants, and drop what nothing reads.

    Only this and no rewriting: the rule sets of optimisers drop a division by a beta that is
    nearly 1 and a subtraction of one that is nearly 0 (onnxscript 0.7), which changes the loss.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass
    from onnxscript.optimizer import fold_constants

    converted = ir.from_proto(model)
    fold_constants(converted)
    RemoveUnusedNodesPass()(converted)
    RemoveUnusedOpsetsPass()(converted)
    folded = ir.to_proto(converted)
    del folded.graph.value_info[:]  # every consumer infers these afresh
    return folded
