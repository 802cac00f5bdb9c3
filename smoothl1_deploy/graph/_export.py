"""`export`: a spec, by one of three routes, to an ONNX model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from .._model import ELEMENT_TYPE, axes_of, inlined
from .._shapes import Dim, Shape, broadcast, check_shape, check_size, describe, summed_axes
from .._spec import ELEMENTS, ROUTES, LossSpec
from ..errors import SpecError, require
from . import _functions as f
from ._assemble import IR_VERSION, OLDEST_IR, OPSETS, oldest_opset, set_opset
from ._metadata import stamp


def export(
    spec: LossSpec,
    route: str = "function",
    shape: Sequence[Dim] | None = None,
    *,
    target_shape: Sequence[Dim] | None = None,
    weight_shape: Sequence[Dim] | None = None,
    mask_shape: Sequence[Dim] | None = None,
    opset: int | None = None,
) -> onnx.ModelProto:
    """The ONNX model of a spec: inputs `input` and `target`, output `loss`.

    With the extensions of the spec, `weight`, `mask` (boolean), `beta` (float32, rank 0), `divisor`
    (rank 0) and `grad_output` (the shape of `loss`) are inputs too, and `grad_input` is a second
    output.

    The same arguments give the same bytes. float16 and bfloat16 are computed in float32 and
    rounded once; reductions accumulate in float64.

    Args:
        spec: what to compute.
        route: `"function"`: one node of the domain `smoothl1_deploy`, its body among the model's
            functions, and a kernel of `ops` for it; several nodes with a gradient. `"inlined"`:
            the same as plain ONNX operators. `"torch"`: `torch.onnx.export` of the reference
            module, with the same body put in by a translation table; needs torch and a shape.
        shape: the shape of `input`: integers, and names for dynamic axes. None means any rank,
            which ONNX Runtime takes and TensorRT doesn't.
        target_shape: the shape of `target` where it differs; it must broadcast with `shape`.
        weight_shape: the shape of `weight` where it differs, likewise.
        mask_shape: the shape of `mask` where it differs, likewise.
        opset: that of the graph, 13 to 26; some losses begin at 14 or 15. None means 18. The
            answers are the same in every bit. Below 18 the IR version is 8 instead of 10, which
            the runtimes that such a file is for don't read.

    Raises:
        SpecError: on an unknown route or a shape that makes no sense (a `ValueError`), or that an
            array of betas doesn't broadcast with, and on an
            opset that the route doesn't go to; by the `torch` route also when a dynamic axis would
            have to broadcast with anything but 1.
        MissingDependencyError: for the `torch` route without torch.

    >>> model = export(LossSpec(0.5), shape=("N", 16))
    >>> [node.op_type for node in model.graph.node], [value.name for value in model.graph.input]
    (['SmoothL1LossMean'], ['input', 'target'])
    """
    if not isinstance(spec, LossSpec):
        raise SpecError(
            f"spec must be a LossSpec, got {type(spec).__name__}; write LossSpec(beta=...)"
        )
    if str(route) not in ROUTES:  # an array compares its elements instead
        raise SpecError(f"unknown route {route!r}; choose one of {', '.join(ROUTES)}")
    others = {"target": target_shape, "weight": weight_shape, "mask": mask_shape}
    shapes = _shapes(spec, shape, others)
    operands = [shapes[name] for name in spec.operands]
    if None not in operands:
        spec = spec.of_rank(max(len(each or ()) for each in (*operands, spec.beta_shape)))

    if route == "torch":
        require("torch", "torch", "the torch route")
        from ._torch_route import torch_model

        model = torch_model(spec, shapes["input"], shapes["target"])
    else:
        model = _function_model(spec, shapes, inlined=route == "inlined")
        if route == "inlined":
            model = fold_scalars(inlined(model))

    model.ir_version = IR_VERSION
    if opset is not None:
        _move(model, opset, route)
    different = [name for name in spec.operands if shapes[name] != shapes["input"]]
    described = [describe(shapes["input"]), *(f"{n}_{describe(shapes[n])}" for n in different)]
    stamp(model, spec, route, "-".join(described))  # which no identifier holds
    # Its shapes can't be inferred where any rank, shown as rank 1, would lack axes.
    known = not (spec.axes or spec.beta_shape) or shapes["input"] is not None
    onnx.checker.check_model(_with_any_rank_hidden(model), full_check=known)
    return model


def _shapes(
    spec: LossSpec, shape: Sequence[Dim] | None, others: dict[str, Sequence[Dim] | None]
) -> dict[str, Shape | None]:
    """The shape of every input and output; refuses what makes no sense or can't be broadcast."""
    losses = own = check_shape(shape)
    shapes = {"input": own, "beta": spec.beta_shape, "divisor": (), "grad_input": own}
    for name, given in others.items():
        other = check_shape(given, f"{name}_shape")
        if other is not None and own is None:
            raise SpecError(f"{name}_shape without shape: an export of any rank takes any {name}")
        shapes[name] = own if other is None else other
        if name not in spec.operands and given is not None:
            raise SpecError(f"{name}_shape for a spec without {name}; give the spec a {name} too")
        if name in spec.operands and losses is not None and (each := shapes[name]) is not None:
            losses = broadcast(losses, each)
    if losses is not None:
        losses = spec.broadcast_with_betas(losses)
        check_size(losses, "the broadcast shape")
    if spec.per_sample and losses == ():
        raise SpecError("per_sample needs an axis of samples; the shapes have rank 0")
    loss = ("samples",) if spec.per_sample and losses is None else spec.loss_shape(losses)
    beside = dict.fromkeys(ELEMENTS, losses)
    return {**shapes, **beside, "loss": loss, "grad_output": loss}


def _function_model(
    spec: LossSpec, shapes: dict[str, Shape | None], *, inlined: bool
) -> onnx.ModelProto:
    """The assembly as a graph of its own, every tensor called what the spec calls it."""
    from ._assemble import model_of, nodes_of  # onnxscript takes most of a second

    names = {name: name for name in (*spec.inputs, *spec.outputs)}
    given = [*(shapes[name] for name in spec.operands), spec.beta_shape]
    ranks = [-1 if shape is None else len(shape) for shape in given]
    nodes, constants, functions = nodes_of(
        spec,
        names,
        summed_axes=summed_axes(*given),
        rank=None if -1 in ranks else max(ranks),
        inlined=inlined,
    )

    def value(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, ELEMENT_TYPE[spec.dtype_of(name)], shapes[name])

    graph = helper.make_graph(
        nodes,
        spec.name,
        [*map(value, spec.inputs)],
        [*map(value, spec.outputs)],
        initializer=constants,
    )
    return model_of(graph, functions)


def _move(model: onnx.ModelProto, opset: Any, route: str) -> None:
    """Let `model`, which was made in the opset of `_functions`, be one of `opset`.

    Raises:
        SpecError: where its nodes don't mean the same in that opset.
    """
    holders = (model.graph, *model.functions)
    known = range(oldest_opset(n for holder in holders for n in holder.node), OPSETS.stop)
    if not isinstance(opset, int) or opset not in known:
        raise SpecError(
            f"opset {opset!r}: the route {route!r} writes this loss in the opsets {known[0]} to "
            f"{known[-1]}; choose one of them, or leave it out for {f.OPSET}"
        )
    if opset < f.OPSET:
        model.ir_version = OLDEST_IR
    for each in (model, *model.functions):
        set_opset(each, opset)


def _with_any_rank_hidden(model: onnx.ModelProto) -> onnx.ModelProto:
    """The checker demands a shape where the ONNX IR allows none: show it one of rank 1."""
    values = [*model.graph.input, *model.graph.output]
    if None not in map(axes_of, values):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in [*copy.graph.input, *copy.graph.output]:
        if axes_of(value) is None:
            value.type.tensor_type.shape.dim.add().dim_param = "any"
    return copy


def fold_scalars(model: onnx.ModelProto) -> onnx.ModelProto:
    """Evaluate the nodes whose inputs are all constants, and drop what nothing reads.

    Only this and no rewriting: the rule sets of optimisers drop a division by a beta that is
    nearly 1 and a subtraction of one that is nearly 0 (onnxscript 0.7), which changes the loss.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass
    from onnxscript.optimizer import fold_constants

    converted = ir.from_proto(model)
    with np.errstate(all="ignore"):  # an infinite beta less itself is NaN, and no accident
        fold_constants(converted)
    RemoveUnusedNodesPass()(converted)
    RemoveUnusedOpsetsPass()(converted)
    folded = ir.to_proto(converted)
    del folded.graph.value_info[:]  # every consumer infers these afresh
    return folded
