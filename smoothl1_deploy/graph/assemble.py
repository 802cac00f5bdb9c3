"""The nodes of a loss: one a step, on tensors of any name; what `export` and `attach` share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..spec import LossSpec
from . import functions as f
from .elements import ELEMENT_TYPE, IR_VERSION, loss_scalars

__all__ = ["Assembly", "function_closure", "model_of"]


class Assembly:
    """Nodes that compute `spec`.

    Case 1: every dtype but float64, beta a number: one node `SmoothL1Loss` with an attribute.
    Case 2: beta an input, float64, or a gradient: the terms, with the scalars as tensors.

    Args:
        spec: what to compute.
        tensors: name of a tensor of the graph for each of `spec.inputs` (in the spec's dtype;
            beta in float32, grad_output in the shape of loss) and `spec.outputs`.
        summed_axes: of the element losses, along which input was broadcast and its gradient has
            to be summed back; None to find them at run time, which TensorRT can't.
        prefix: of the names of the tensors in between.
        partial: end with the sum of the element losses in float64, `loss`, and that of the
            weights a mean divides by, `weight_total`. The gradient of a mean is divided by
            `count`, float64 and rank 0. `tensors` then names these too.

    Attributes:
        nodes: in topological order.
        used: the functions they call.
    """

    def __init__(
        self,
        spec: LossSpec,
        tensors: Mapping[str, str],
        *,
        summed_axes: tuple[int, ...] | None = None,
        prefix: str = "",
        partial: bool = False,
    ) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.used: list[str] = []
        self._spec = spec
        self._tensors = tensors
        self._prefix = prefix
        self._partial = partial
        self._element = ELEMENT_TYPE[spec.compute_dtype]
        self._wide_name = "Compensated" if spec.dtype == "float64" else "Wide"
        names = [name for name in spec.inputs if name in ("input", "target", "weight")]
        self._data = {name: self._widened(tensors[name], name) for name in names}
        self._scalars = self._scalar_tensors()
        losses = self._losses()
        weights = self._broadcast_weights(losses) if spec.weight == "weights" else None
        self._reduced(losses, weights)
        if spec.gradient:
            self._gradient(losses, weights, summed_axes)

    def _add(
        self, op: str, inputs: list[str], output: str, *, domain: str = "", **attributes: Any
    ) -> str:
        output = self._tensors.get(output) or self._prefix + output
        node = helper.make_node(op, inputs, [output], name=output, domain=domain, **attributes)
        self.nodes.append(node)
        if domain:
            self.used.append(op)
        return output

    def _call(self, function: str, inputs: list[str], output: str, **attributes: Any) -> str:
        return self._add(function, inputs, output, domain=f.DOMAIN, **attributes)

    def _widened(self, tensor: str, name: str) -> str:
        """The tensor in the compute dtype."""
        if self._spec.compute_dtype == self._spec.dtype:
            return tensor
        return self._add("Cast", [tensor], f"{name}_wide", to=self._element)

    def _constant(self, name: str, value: float) -> str:
        tensor = helper.make_tensor(name, self._element, [], [value])
        return self._add("Constant", [], name, value=tensor)

    def _scalar_tensors(self) -> list[str] | None:
        """beta, half and divisor for the terms; None where an attribute says it all (case 1)."""
        spec = self._spec
        if spec.runtime_beta:
            beta = self._tensors["beta"]
            scalars = [beta, self._call("BetaDivisor", [beta], "divisor")]
            if spec.dtype == "float64":
                scalars = [
                    self._add("Cast", [name], f"{wide}_wide", to=TensorProto.DOUBLE)
                    for name, wide in zip(scalars, ("beta", "divisor"), strict=True)
                ]
            return [scalars[0], self._constant("half", 0.5), scalars[1]]
        if spec.dtype == "float64" or spec.gradient:
            return [self._constant(n, value) for n, value in loss_scalars(spec.effective_beta)]
        return None

    def _losses(self) -> str:
        """The element losses, weighted, in the compute dtype."""
        spec = self._spec
        bare = spec.reduction == "none" and spec.compute_dtype == spec.dtype
        name = "loss" if bare and not spec.weight else "losses"
        pair = [self._data["input"], self._data["target"]]
        if self._scalars is None:
            losses = self._call("SmoothL1Loss", pair, name, beta=spec.effective_beta)
        else:
            losses = self._call("SmoothL1LossTerms", [*pair, *self._scalars], name)
        if spec.weight:
            output = "loss" if bare else "weighted"
            losses = self._add("Mul", [losses, self._data["weight"]], output)
        return losses

    def _broadcast_weights(self, losses: str) -> str:
        shape = self._add("Shape", [losses], "losses_shape")
        return self._add("Expand", [self._data["weight"], shape], "weights")

    def _rounded(self, total: str, output: str) -> None:
        """The one rounding from the accumulator's dtype to the output's."""
        self._add("Cast", [total], output, to=ELEMENT_TYPE[self._spec.dtype])

    def _reduced(self, losses: str, weights: str | None) -> None:
        spec = self._spec
        if spec.reduction == "none":
            if spec.compute_dtype != spec.dtype:
                self._rounded(losses, "loss")
            return
        if self._partial:
            for tensor, name in ((losses, "loss"), (weights, "weight_total")):
                if tensor is not None:
                    self._call(f"{self._wide_name}Sum", [tensor], name)
            return
        row = "Row" if spec.per_sample else ""
        final = "loss" if spec.dtype == "float64" else "total"
        if weights is None:
            function = self._wide_name + row + spec.reduction.title()
            total = self._call(function, [losses], final)
        else:
            function = f"{self._wide_name}{row}Sum"
            loss_total = self._call(function, [losses], "loss_total")
            self._weight_total = self._call(function, [weights], "weight_total")
            total = self._add("Div", [loss_total, self._weight_total], final)
        if total != self._tensors["loss"]:
            self._rounded(total, "loss")

    def _gradient(
        self, losses: str, weights: str | None, summed_axes: tuple[int, ...] | None
    ) -> None:
        """In float64 and rounded once: rounded before, terms of either sign that are summed back
        show by cancellation what they lost, and subnormal ones round up to what they aren't.
        """
        spec = self._spec
        assert self._scalars is not None
        terms = [self._data["input"], self._data["target"], *self._scalars]
        slope = self._call("SmoothL1GradientTerms", [*map(self._double, terms)], "slope")
        if spec.weight:
            weight = self._double(self._data["weight"])
            slope = self._add("Mul", [slope, weight], "slope_weighted")
        if spec.reduction == "mean":
            count = self._count(losses, weights)
            divisor = self._add("Cast", [count], "mean_divisor", to=TensorProto.DOUBLE)
            slope = self._add("Div", [slope, divisor], "slope_mean")
        if spec.upstream:
            slope = self._add("Mul", [slope, self._upstream(losses)], "slope_upstream")
        if summed_axes is None:
            slope = self._call("SumToShape", [slope, self._data["input"]], "slope_summed")
        elif summed_axes:
            tensor = helper.make_tensor(
                "summed_axes", TensorProto.INT64, [len(summed_axes)], summed_axes
            )
            axes = self._add("Constant", [], "summed_axes", value=tensor)
            total = self._add("ReduceSum", [slope, axes], "slope_total", keepdims=1)
            shape = self._add("Shape", [self._data["input"]], "input_shape")
            slope = self._add("Reshape", [total, shape], "slope_summed", allowzero=1)
        self._rounded(slope, "grad_input")

    def _upstream(self, losses: str) -> str:
        """`grad_output` in float64, in a shape that broadcasts with the element losses."""
        upstream = self._tensors["grad_output"]
        if self._spec.dtype != "float64":
            upstream = self._add("Cast", [upstream], "upstream", to=TensorProto.DOUBLE)
        if not self._spec.per_sample:
            return upstream
        return self._call("RowsLike", [upstream, losses], "upstream_column")

    def _double(self, tensor: str) -> str:
        if self._element == TensorProto.DOUBLE:
            return tensor
        return self._add("Cast", [tensor], f"{tensor}_double", to=TensorProto.DOUBLE)

    def _count(self, losses: str, weights: str | None) -> str:
        """What the loss of an element was divided by, in a shape that broadcasts with it."""
        if self._partial:
            return self._tensors["count"]
        row = "Row" if self._spec.per_sample else ""
        if weights is not None:
            count = self._weight_total
            return self._call("RowsLike", [count, losses], "weights_column") if row else count
        if row:
            return self._call("RowCount", [losses], "row_count")
        return self._add("Size", [losses], "count")


@lru_cache
def _function_proto(name: str) -> onnx.FunctionProto:
    """The function as models carry it: what other people's tools read wrongly is not in it.

    * No value has a type or a shape of its own: the callers' decide.
    * No name is in two functions: onnxscript's optimiser puts bodies in place of calls and keeps
      what one of them said of a name (onnxscript 0.7).
    * A constant is a tensor: onnxslim reads `value_float` as float64.

    onnxscript reads the source of a function anew for each proto, which is why they are kept;
    protobuf copies are cheap.
    """
    proto: onnx.FunctionProto = f.FUNCTIONS[name].to_function_proto()
    proto.doc_string = inspect.cleandoc(f.FUNCTIONS[name].function.__doc__ or "")
    del proto.value_info[:]
    for node in proto.node:
        for names in (node.input, node.output):
            names[:] = [value and f"{name}_{value}" for value in names]
        node.name = node.output[0]
        if node.op_type == "Constant":
            _hold_a_tensor(node)
    for names in (proto.input, proto.output):
        names[:] = [f"{name}_{value}" for value in names]
    return proto


def _hold_a_tensor(constant: onnx.NodeProto) -> None:
    """Write what a Constant holds as its attribute `value`, but for a reference to another's."""
    (attribute,) = constant.attribute
    if attribute.ref_attr_name or attribute.HasField("t"):
        return
    value = np.asarray(helper.get_attribute_value(attribute))
    narrow = value.astype(np.float32) if value.dtype == np.float64 else value
    constant.ClearField("attribute")
    constant.attribute.append(helper.make_attribute("value", numpy_helper.from_array(narrow)))


def function_closure(names: list[str]) -> list[onnx.FunctionProto]:
    """The functions called `names` and every function they call, callees first."""
    found: dict[str, onnx.FunctionProto] = {}

    def visit(name: str) -> None:
        if name in found:
            return
        proto = _function_proto(name)
        for node in proto.node:
            if node.domain == f.DOMAIN:
                visit(node.op_type)
        found[name] = proto

    for name in names:
        visit(name)
    return list(found.values())


def model_of(graph: onnx.GraphProto, used: list[str]) -> onnx.ModelProto:
    """The model of a graph that calls the functions `used`."""
    return helper.make_model(
        graph,
        functions=function_closure(used),
        opset_imports=[
            helper.make_opsetid("", f.OPSET),
            helper.make_opsetid(f.DOMAIN, f.DOMAIN_VERSION),
        ],
        ir_version=IR_VERSION,
    )
