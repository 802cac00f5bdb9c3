"""`export`: a spec, by one of three routes, to an ONNX model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper

from ..errors import SpecError
from ..spec import LossSpec
from .elements import ELEMENT_TYPE, loss_scalars
from .metadata import stamp
from .shapes import Dim, Shape, broadcast, check_shape, describe

__all__ = ["ROUTES", "export"]

ROUTES = ("function", "inlined", "torch")

_IR_VERSION = 10  # ONNX 1.16: the oldest runtime we test reads it


def export(
    spec: LossSpec,
    route: str = "function",
    shape: Sequence[Dim] | None = None,
    *,
    target_shape: Sequence[Dim] | None = None,
) -> onnx.ModelProto:
    """The ONNX model of a spec: inputs `input` and `target`, output `loss`.

    The same arguments give the same bytes. float16 and bfloat16 are computed in float32 and
    rounded once; reductions accumulate in float64.

    Args:
        spec: what to compute.
        route: `"function"`: a node `SmoothL1Loss` of the domain `smoothl1_deploy`, its body
            among the model's functions. `"inlined"`: the same as plain ONNX operators.
            `"torch"`: `torch.onnx.export` of the reference module, with the same body put in
            by a translation table; needs torch and a shape.
        shape: of `input`: integers, and names for dynamic axes. None means any rank, which
            ONNX Runtime takes and TensorRT doesn't.
        target_shape: of `target` where it differs; it must broadcast with `shape`.

    Raises:
        SpecError: on an unknown route or a shape that makes no sense (a `ValueError`).
        MissingDependencyError: for the `torch` route without torch.
    """
    if not isinstance(spec, LossSpec):
        raise SpecError(
            f"spec must be a LossSpec, got {type(spec).__name__}; write LossSpec(beta=...)"
        )
    if route not in ROUTES:
        raise SpecError(f"unknown route {route!r}; choose one of {', '.join(ROUTES)}")
    input_shape = check_shape(shape)
    other_shape = check_shape(target_shape, "target_shape")
    if target_shape is None:
        other_shape = input_shape
    elif input_shape is None:
        raise SpecError("target_shape without shape: an export of any rank takes any target")

    if route == "torch":
        from .torch_route import torch_model

        if input_shape is None or other_shape is None:
            raise SpecError(
                "the torch route can't export any rank; give a shape such as ('N', 16), "
                "or use route='function'"
            )
        model = torch_model(spec, input_shape, other_shape)
    else:
        model = _function_model(spec, input_shape, other_shape)
        if route == "inlined":
            from .plain import inline

            model = inline(model)

    model.ir_version = _IR_VERSION
    shapes = describe(input_shape)
    if other_shape != input_shape:
        shapes += f"_{describe(other_shape)}"
    stamp(model, spec, route, shapes)
    onnx.checker.check_model(_with_any_rank_hidden(model), full_check=True)
    return model


def _function_model(
    spec: LossSpec, shape: Shape | None, target_shape: Shape | None
) -> onnx.ModelProto:
    """[Cast, Cast,] SmoothL1Loss [, Sum or Mean] [, Cast]: one node a step of the computation."""
    from . import functions as f

    nodes: list[onnx.NodeProto] = []
    used: list[str] = []

    def add(op: str, inputs: list[str], output: str, *, domain: str = "", **attributes: Any) -> str:
        nodes.append(
            helper.make_node(op, inputs, [output], name=output, domain=domain, **attributes)
        )
        if domain:
            used.append(op)
        return output

    input, target = "input", "target"
    if spec.compute_dtype != spec.dtype:
        compute = ELEMENT_TYPE[spec.compute_dtype]
        input = add("Cast", [input], "input_wide", to=compute)
        target = add("Cast", [target], "target_wide", to=compute)

    last = spec.reduction == "none" and spec.compute_dtype == spec.dtype
    losses = "loss" if last else "losses"
    if spec.dtype == "float64":  # an attribute would round beta to float32
        scalars = loss_scalars(spec.beta)
        for name, value in scalars:
            tensor = helper.make_tensor(name, TensorProto.DOUBLE, [], [value])
            nodes.append(helper.make_node("Constant", [], [name], name=name, value=tensor))
        names = [name for name, _ in scalars]
        add("SmoothL1LossTerms", [input, target, *names], losses, domain=f.DOMAIN)
    else:
        add("SmoothL1Loss", [input, target], losses, domain=f.DOMAIN, beta=spec.effective_beta)

    if spec.reduction != "none":
        reduce = ("Compensated" if spec.dtype == "float64" else "Wide") + spec.reduction.title()
        add(reduce, [losses], "loss" if spec.dtype == "float64" else "total", domain=f.DOMAIN)
    if nodes[-1].output[0] != "loss":
        add("Cast", [nodes[-1].output[0]], "loss", to=ELEMENT_TYPE[spec.dtype])

    element = ELEMENT_TYPE[spec.dtype]
    out_shape: Shape | None = ()
    if spec.reduction == "none":
        out_shape = (
            None if shape is None or target_shape is None else broadcast(shape, target_shape)
        )
    elif shape is not None and target_shape is not None:
        broadcast(shape, target_shape)  # refuses what can't be broadcast
    graph = helper.make_graph(
        nodes,
        spec.name,
        [_value("input", element, shape), _value("target", element, target_shape)],
        [_value("loss", element, out_shape)],
    )
    return helper.make_model(
        graph,
        functions=_closure(used),
        opset_imports=[
            helper.make_opsetid("", f.OPSET),
            helper.make_opsetid(f.DOMAIN, f.DOMAIN_VERSION),
        ],
    )


def _closure(names: list[str]) -> list[onnx.FunctionProto]:
    """The functions called `names` and every function they call, callees first."""
    from . import functions as f

    found: dict[str, onnx.FunctionProto] = {}

    def visit(name: str) -> None:
        if name in found:
            return
        proto = f.FUNCTIONS[name].to_function_proto()
        proto.doc_string = inspect.cleandoc(f.FUNCTIONS[name].function.__doc__ or "")
        for node in proto.node:
            if node.domain == f.DOMAIN:
                visit(node.op_type)
        found[name] = proto

    for name in names:
        visit(name)
    return list(found.values())


def _value(name: str, element: int, shape: Shape | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, shape)


def _with_any_rank_hidden(model: onnx.ModelProto) -> onnx.ModelProto:
    """The checker demands a shape where the ONNX IR allows none: show it one of rank 1."""
    values = [*model.graph.input, *model.graph.output]
    if all(value.type.tensor_type.HasField("shape") for value in values):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in [*copy.graph.input, *copy.graph.output]:
        if not value.type.tensor_type.HasField("shape"):
            value.type.tensor_type.shape.dim.add().dim_param = "any"
    return copy
