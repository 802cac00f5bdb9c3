"""The nodes of a loss, on tensors of any name: what `export` and `attach` share.

`Assembly` has a node for each step. `nodes_of` puts them into a function, whose name says what it
computes: where the operators of `ops` are registered, ONNX Runtime has a kernel of that name.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .._model import ELEMENT_TYPE
from .._spec import LossSpec
from . import _functions as f
from ._functions import huber_scalars, loss_scalars, slope_scalars

IR_VERSION = 10  # ONNX 1.16: the oldest runtime we test reads it
OLDEST_IR = 8  # the first with functions
#: The opsets in which the bodies of `_functions` mean the same: from the first whose ReduceSum
#: takes its axes as an input, to the last that ONNX Runtime 1.31 doesn't call unfinished.
OPSETS = range(13, 27)
_OPSETS = [helper.make_opsetid("", f.OPSET), helper.make_opsetid(f.DOMAIN, f.DOMAIN_VERSION)]


class Assembly:
    """Nodes that compute `spec`.

    Case 1: computed in float32, beta a number: the element losses are one node `SmoothL1Loss` with
        an attribute.
    Case 2: beta an input or an array, float64, or nodes that are to be inlined: the terms, with the
        scalars as tensors, an array's for each beta. Inlined, an attribute becomes a Constant whose
        number is no tensor, which others read in another dtype or leave in its own (onnxslim
        0.1.98, the float16 converters).

    Args:
        spec: what to compute.
        tensors: name of a tensor of the graph for each of `spec.inputs` (of `spec.dtype_of` it,
            grad_output in the shape of loss) and `spec.outputs`. Where it names beta, the number in
            the spec is not looked at.
        summed_axes: the axes of the element losses along which input was broadcast and its gradient
            has to be summed back; None to find them at run time, which TensorRT can't.
        rank: of the element losses; None where it isn't known.
        prefix: what the names of the tensors in between begin with.
        inlined: whether the functions are going to be inlined.

    Attributes:
        nodes: in topological order.
        used: the functions they call, by name.
        parts: further ones, made for this loss.
    """

    def __init__(
        self,
        spec: LossSpec,
        tensors: Mapping[str, str],
        *,
        summed_axes: tuple[int, ...] | None = None,
        rank: int | None = None,
        prefix: str = "",
        inlined: bool = False,
    ) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.used: list[str] = []
        self.parts: list[onnx.FunctionProto] = []
        self._spec = spec
        self._tensors = tensors
        self._rank = rank
        self._prefix = prefix
        self._inlined = inlined
        self._element = ELEMENT_TYPE[spec.compute_dtype]
        self._has_factor = spec.effective_loss_weight != 1.0
        self._each = _EACH if spec.beta_shape else ""
        self._axes = ""  # the tensor of the spec's axes
        self._doubles: dict[str, str] = {}
        self._counted = ""  # what a mean divides by, once it is asked for
        #: Whether a mean divides each row by a number of its own.
        self._counts_rows = spec.keeps_axes and (spec.weight == "weights" or spec.mask)
        self._counts_rows &= spec.reduction == "mean" and not spec.divisor
        is_narrow = self._element == TensorProto.FLOAT and not spec.gradient
        self._is_added = is_narrow and spec.reduction != "none" and _has_attribute(spec)
        self._assemble(summed_axes)

    def _assemble(self, summed_axes: tuple[int, ...] | None) -> None:
        spec = self._spec
        self._take_operands()
        losses = self._losses()
        if spec.axes:
            self._axes = self._integers("axes", spec.axes)
            if min(spec.axes) < 0:  # of what is empty, ONNX Runtime (1.31) adds up over none such
                rank = self._add("Size", [self._add("Shape", [losses], "whole_shape")], "rank")
                self._axes = self._add("Mod", [self._axes, rank], "axes_from_0")
        if spec.reduction == "none":
            element = TensorProto.DOUBLE if self._has_factor else self._element
            self._rounded(self._times_factor(losses), element, "loss")
        else:
            self._reduced(losses)
        if spec.gradient:
            self._gradient(losses, summed_axes)

    def _take_operands(self) -> None:
        names = [name for name in self._spec.operands if name != "mask"]
        self._data = {name: self._widened(self._tensors[name], name) for name in names}
        self._scalars = self._scalar_tensors()

    def _add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """A node of an operator of ONNX, or of one of our functions; gives its output."""
        domain = f.DOMAIN if op.removesuffix(_EACH) in f.FUNCTIONS else ""
        output = self._tensors.get(output) or self._prefix + output
        node = helper.make_node(op, inputs, [output], name=output, domain=domain, **attributes)
        self.nodes.append(node)
        if domain:
            self.used.append(op)
        return output

    def _widened(self, tensor: str, name: str) -> str:
        """The tensor in the compute dtype."""
        if self._spec.compute_dtype == self._spec.dtype:
            return tensor
        return self._add("Cast", [tensor], f"{name}_wide", to=self._element)

    def _constant(self, name: str, value: Any, element: int = TensorProto.DOUBLE) -> str:
        tensor = helper.make_tensor(name, element, np.shape(value), np.ravel(value))
        return self._add("Constant", [], name, value=tensor)

    def _integers(self, name: str, values: tuple[int, ...]) -> str:
        tensor = numpy_helper.from_array(np.array(values, np.int64))
        return self._add("Constant", [], name, value=tensor)

    def _scalar_tensors(self) -> list[str] | None:
        """The scalars of the terms; None where an attribute says it all (case 1)."""
        spec = self._spec
        if spec.loss == "huber":
            return self._huber_scalars()
        if _is_l1(spec):
            return []
        if self._is_added:
            known = self._tensors.get("beta")
            beta = known or self._constant("beta", spec.effective_beta, self._element)
            return [beta, self._constant("half", 0.5, self._element)]
        if self._element == TensorProto.DOUBLE and "beta" in self._tensors:
            beta = self._cast(self._tensors["beta"])
            self._divisor = self._add("BetaDivisorFloat64", [beta], "beta_divisor")
            return [beta, self._constant("half", 0.5), self._divisor]
        if "beta" in self._tensors:
            beta = self._tensors["beta"]
            self._divisor = self._add("BetaDivisor", [beta], "beta_divisor")
            return [beta, self._constant("half", 0.5, self._element), self._divisor]
        if self._element == TensorProto.DOUBLE or self._inlined or spec.beta_shape:
            return [
                self._constant(name, value, self._element)
                for name, value in loss_scalars(spec.effective_beta)
            ]
        return None

    def _huber_scalars(self) -> list[str]:
        """The delta, half, shrink and slope of `HuberLossTerms`."""
        if "beta" not in self._tensors:
            known = huber_scalars(self._spec.effective_beta)
            return [self._constant(name, value, self._element) for name, value in known]
        delta, one = self._tensors["beta"], "DeltaOne"
        if self._element == TensorProto.DOUBLE:
            delta, one = self._cast(delta), "DeltaOneFloat64"
        most = float(np.finfo(self._spec.compute_dtype).max)
        largest = self._constant("largest", most, self._element)
        half = self._constant("half", 0.5, self._element)
        self._divisor = self._add(one, [delta], "delta_one")
        return [delta, half, self._divisor, self._add("Min", [delta, largest], "huber_slope")]

    def _losses(self) -> str:
        """The element losses, weighted: in the compute dtype, or in float64 if more is to come."""
        spec = self._spec
        pair = [self._data["input"], self._data["target"]]
        if _is_l1(spec):
            losses = self._add("L1Loss", pair, "element_losses")
        elif spec.loss == "huber":
            losses = self._add(
                f"HuberLossTerms{self._each}", [*pair, *(self._scalars or ())], "element_losses"
            )
        elif self._is_added:
            losses = self._add("SmoothL1Addends", [*pair, *(self._scalars or ())], "element_losses")
        elif self._scalars is None:
            losses = self._add("SmoothL1Loss", pair, "element_losses", beta=spec.effective_beta)
        else:
            operands = [*pair, *self._scalars]
            losses = self._add(f"SmoothL1LossTerms{self._each}", operands, "element_losses")
        self._unweighted = losses
        # A product may leave the range of float32, and its mean, or a tenth of it, not.
        is_wide = self._has_factor if spec.reduction == "none" else bool(spec.weight)
        if is_wide:
            losses = self._double(losses)
        if spec.weight:
            weight = self._double(self._data["weight"]) if is_wide else self._data["weight"]
            # A function, since quantisers leave those alone and would quantise a Mul of float32.
            losses = self._add("Weighted", [losses, weight], "weighted")
        return self._selected(losses, TensorProto.DOUBLE if is_wide else self._element)

    def _difference(self) -> str:
        """Input less target in the shape of the element losses, 0 where the mask leaves out."""
        found = self._add("Sub", [self._data["input"], self._data["target"]], "difference")
        for name in ["weight"] * bool(self._spec.weight) + ["beta"] * bool(self._each):
            if name in self._tensors:
                shape = self._add("Shape", [self._tensors[name]], f"{name}_shape")
            else:
                shape = self._integers(f"{name}_shape", self._spec.beta_shape)
            found = self._add("Expand", [found, shape], f"difference_of_each_{name}")
        return self._selected(found, self._element, knows_beta=False)

    def _selected(self, values: str, element: int, knows_beta: bool = True) -> str:
        """The values, of `element`, with 0 for those of elements that the mask leaves out.

        NaN instead of 0 where beta is an input and no beta, as all is then that knows it.
        """
        if not self._spec.mask:
            return values
        nothing = self._constant(f"{values}_of_none", 0.0, element)
        if "beta" in self._tensors and self._spec.runtime_beta and knows_beta:
            divisor = self._divisor if element == self._element else self._double(self._divisor)
            nothing = self._add("Div", [nothing, divisor], f"{values}_of_none_or_nan")
        return self._add("Selected", [values, self._tensors["mask"], nothing], f"{values}_selected")

    def _times_factor(self, loss: str) -> str:
        """`loss`, in float64, times the constant factor, where that is not 1."""
        if not self._has_factor:
            return loss
        factor = self._constant("factor", self._spec.effective_loss_weight)
        return self._add("Weighted", [loss, factor], "times")

    def _rounded(self, result: str, element: int, output: str) -> None:
        """`result`, which the last node gives as an `element`, as the output: rounded once."""
        wanted = ELEMENT_TYPE[self._spec.dtype]
        if element != wanted:
            self._add("Cast", [result], output, to=wanted)
        else:
            self._name_last(output)

    def _name_last(self, output: str) -> None:
        node = self.nodes[-1]
        node.name = node.output[0] = self._tensors[output]

    def _reduced(self, losses: str) -> None:
        spec = self._spec
        alone = replace(spec, weight=None, mask=False, divisor=False, empty="nan", axes=None)
        is_divided = spec.reduction == "mean" and spec != alone
        how = "Sum" if is_divided else spec.reduction.title()
        total = self._added_up(losses, "total", spec.dtype == "float64", how)
        self._total = total
        if spec.weight:
            total = self._add("WithoutNegativeZero", [total], "total_signed")
        elif self._is_added:
            total = self._add("Abs", [total], "total_signed")
        if is_divided:
            mean = self._add("Div", [total, self._count(losses)], "divided")
            if spec.dtype == "float64" and spec.weight == "weights":
                mean = self._without_overflow(mean, total)
            total = mean
        if spec.reduction == "sum" or spec.mask or spec.divisor or spec.empty == "zero":
            total = self._unless_no_beta(total, losses)
        self._rounded(self._times_factor(total), TensorProto.DOUBLE, "loss")

    def _added_up(self, values: str, output: str, is_double: bool, how: str = "Sum") -> str:
        """The sum, or mean, of the values over the spec's axes, in float64."""
        kind = "Compensated" if is_double else "Wide"
        if not self._axes:
            return self._add(f"{kind}{'Row' * self._spec.per_sample}{how}", [values], output)
        function = "CompensatedAxesTotal" if is_double else "WideAxesSum"
        return self._add(function, [values, self._axes], output)

    def _beside(self, rows: str, like: str, output: str) -> str:
        """A number for each of the loss, in a shape that broadcasts with the element losses."""
        if self._axes:
            return self._add("Unsqueeze", [rows, self._axes], output)
        return self._add("RowsLike", [rows, like], output)

    def _without_overflow(self, mean: str, total: str) -> str:
        """`mean`, or where a sum of it overflows float64 the sum of each weight's share."""
        shrunk = self._add(
            "Mul", [self._weights, self._constant("tiny", 2.0**-60)], "weights_shrunk"
        )
        whole = self._added_up(shrunk, "weight_total_shrunk", True)
        if self._spec.keeps_axes:
            whole = self._beside(whole, shrunk, "weight_column_shrunk")
        share = self._add("Div", [shrunk, whole], "share")
        losses = self._selected(self._unweighted, TensorProto.DOUBLE)
        shares = self._add("Mul", [share, losses], "loss_shares")
        safe = self._added_up(shares, "mean_of_shares", True)
        # What is not finite has no difference to itself.
        sums = self._add("Add", [total, self._counted], "both_sums")
        lost = self._add("IsNaN", [self._add("Sub", [sums, sums], "none_if_finite")], "lost")
        zero = self._add("Sub", [safe, safe], "none_if_safe")
        use = self._add("And", [lost, self._add("Equal", [zero, zero], "is_safe")], "use_shares")
        return self._add("Where", [use, safe, mean], "mean")

    def _gradient(self, losses: str, summed_axes: tuple[int, ...] | None) -> None:
        """Add the gradient, in float64 and rounded once.

        Rounded before, terms of either sign that are summed back show by cancellation what they
        lost, and subnormal ones round up to what they aren't.

        Case 1: what flows into every loss is one number; or, summed and of a dtype narrower than
            float64, a weight or upstream gradient too. Added up before the division by beta and
            the one number: differences, and products of few bits, cancel exactly, which their
            quotients would not.
        Case 2: weights or an upstream gradient for each loss in float64, or without a sum; a
            divisor that may be 0, as of weights, of what a mask selects, or given. In autograd's
            order, a slope of at most 1 last: nothing over- or underflows that it keeps.
        """
        spec = self._spec
        slope, divisor = self._slope_terms()
        is_summed = summed_axes != ()
        upstream = ["upstream"] * spec.upstream
        by_loss = [*upstream] if spec.keeps_axes else []
        by_loss += ["weight"] * bool(spec.weight)
        for_all = [part for part in upstream if part not in by_loss]
        for_all += ["factor"] * self._has_factor
        for_all += ["mean"] * (spec.reduction == "mean")
        is_alone = spec.dtype == "float64" or spec.weight == "weights" or not is_summed
        if spec.mask or spec.divisor or (by_loss and is_alone) or (is_summed and spec.beta_shape):
            # Of scalars, ONNX Runtime (1.31) makes an invalid graph where it drops a division by 1.
            divisors = slope_scalars(spec.effective_beta)[-1][1]
            is_one = spec.loss == "huber" or (divisors == 1.0).all()
            if "beta" in self._tensors or not is_one:
                slope = self._add("Div", [slope, divisor], "slope")
            flowing = self._flowing_in(losses, [*for_all, *by_loss])
            slope = self._add("Mul", [flowing, slope], "slope_weighted") if flowing else slope
            slope = self._selected(slope, TensorProto.DOUBLE)
            if is_summed:
                slope = self._unless_no_beta(self._summed(slope, summed_axes), slope)
        else:
            if by_loss:
                own = self._flowing_in(losses, by_loss)
                slope = self._add("Mul", [own, slope], "slope_weighted")
            if is_summed:
                slope = self._summed(slope, summed_axes)
            slope = self._add("Div", [slope, divisor], "slope")
            if for_all:
                is_product = for_all != ["mean"]
                count = self._count(losses)
                scalar = self._flowing_in(losses, for_all) if is_product else count
                scalar = self._of_something(scalar, losses) if is_summed else scalar
                operator = "Mul" if is_product else "Div"
                slope = self._add(operator, [slope, scalar], "slope_scaled")
        if is_summed:
            slope = self._zero_of_a_sum(slope, summed_axes)
        self._rounded(slope, TensorProto.DOUBLE, "grad_input")

    def _flowing_in(self, losses: str, parts: list[str]) -> str:
        """What autograd multiplies each slope with, of those `parts` that are asked for.

        They are the upstream gradient, the constant factor, the divisor of a mean, and the weight.
        """
        factor = self._upstream(losses) if "upstream" in parts else ""
        if "factor" in parts:
            own = self._constant("upstream_factor", self._spec.effective_loss_weight)
            factor = self._add("Mul", [factor, own], "upstream_times") if factor else own
        if "mean" in parts:
            count = self._count(losses)
            if self._counts_rows:
                count = self._beside(count, losses, "weight_column")
            one = factor or self._constant("one", 1.0)
            factor = self._add("Div", [one, count], "upstream_mean")
        if "weight" in parts:
            weight = self._double(self._data["weight"])
            factor = self._add("Mul", [weight, factor], "upstream_weighted") if factor else weight
        return factor

    def _slope_terms(self) -> tuple[str, str]:
        """The slopes of the element losses times a divisor, in float64, and that divisor."""
        terms = [self._double(self._data["input"]), self._double(self._data["target"])]
        if self._spec.loss == "huber":
            if "beta" in self._tensors:
                delta, divisor = self._cast(self._tensors["beta"]), self._double(self._divisor)
            else:
                delta = self._constant("slope_delta", self._spec.effective_beta)
                divisor = self._constant("slope_divisor", 1.0)
            terms = [*terms, delta]
            return self._add(f"HuberSlopeTerms{self._each}", terms, "slope_terms"), divisor
        beta, shrink, divisor, scale = self._slope_scalars()
        if scale:
            terms = [self._add("Mul", [x, scale], f"{x}_half") for x in terms]
        terms = [*terms, beta, shrink]
        return self._add(f"SmoothL1SlopeTerms{self._each}", terms, "slope_terms"), divisor

    def _slope_scalars(self) -> tuple[str, str, str, str]:
        """The beta, shrink and divisor of the slopes' terms, in float64, and a factor for operands.

        Input and target are multiplied with the factor, where it isn't "": where beta is inf,
        differences of float64 may overflow, which are no infinite ones; those of halves can't.
        """
        spec = self._spec
        is_double = spec.dtype == "float64"
        if "beta" not in self._tensors:
            scalars = slope_scalars(spec.effective_beta)
            beta, shrink, divisor = (self._constant(name, value) for name, value in scalars)
            scale = np.where(np.isinf(spec.effective_beta), 0.5, 1.0)
            is_halved = is_double and (scale < 1).any()
            return beta, shrink, divisor, self._constant("half_of_both", scale) if is_halved else ""
        one = self._constant("slope_one", 1.0)
        beta = self._cast(self._tensors["beta"])
        infinite = self._constant("slope_infinite", math.inf)
        is_infinite = self._add("Equal", [beta, infinite], "slope_is_flat")

        def if_infinite(value: float, name: str, otherwise: str) -> str:
            number = self._constant(f"{name}_if_flat", value)
            return self._add("Where", [is_infinite, number, otherwise], name)

        shrink = if_infinite(0.0, "slope_shrink", one)
        divisor = if_infinite(1.0, "slope_divisor", self._double(self._divisor))
        return beta, shrink, divisor, if_infinite(0.5, "scale", one) if is_double else ""

    def _summed(self, slope: str, axes: tuple[int, ...] | None) -> str:
        """`slope` in the shape of input, added up along the axes that input was broadcast to.

        Compensated for every dtype: of a large beta, differences cancel that are as large.
        """
        if axes is None:
            along = self._add("BroadcastAxes", [slope, self._data["input"]], "summed_axes")
        else:
            along = self._integers("summed_axes", axes)
        total = self._add("CompensatedAxesSum", [slope, along], "slope_sum")
        shape = self._add("Shape", [self._data["input"]], "input_shape")
        return self._add("Reshape", [total, shape], "slope_summed", allowzero=1)

    def _zero_of_a_sum(self, slope: str, axes: tuple[int, ...] | None) -> str:
        """`slope`, which was added up along `axes`, with 0 for -0."""
        signed = self._add("WithoutNegativeZero", [slope], "slope_signed")
        if axes is not None:
            return signed
        # Where nothing was added up, autograd gives -0 too.
        size = self._add("Size", [self._prefix + "summed_axes"], "summed_axis_count")
        is_sum = self._add("Cast", [size], "is_sum", to=TensorProto.BOOL)
        # `slope` is the second branch: ONNX Runtime's Where makes 0 of a -0 of its first one.
        return self._add("Where", [is_sum, signed, slope], "slope_or_signed")

    def _unless_no_beta(self, summed: str, losses: str) -> str:
        """`summed`, or NaN where beta is an input and no beta: a sum of nothing doesn't know it."""
        if not self._spec.runtime_beta:
            return summed
        nan = self._constant(f"{summed}_none", math.nan)
        divisor = self._divisor
        if self._each:
            divisor = self._add("WideSum", [divisor], f"{summed}_divisor")
        is_no_beta = self._add("IsNaN", [divisor], f"{summed}_has_no_beta")
        if self._each:  # where there are losses, those of such a beta are NaN by themselves
            none = self._is_nothing(losses, f"{summed}_of_nothing")
            is_no_beta = self._add("And", [is_no_beta, none], f"{summed}_of_no_beta")
        return self._add("Where", [is_no_beta, nan, summed], f"{summed}_or_nan")

    def _of_something(self, scalar: str, losses: str) -> str:
        """`scalar`, or 1 where there are no element losses: their gradients add up to 0."""
        is_nothing = self._is_nothing(losses, "is_nothing")
        one = self._constant("one_of_nothing", 1.0)
        # The scalar may be -0, which ONNX Runtime's Where loses in its first branch.
        return self._add("Where", [is_nothing, one, scalar], "scalar_of_something")

    def _is_nothing(self, losses: str, output: str) -> str:
        size = self._add("Size", [losses], f"{output}_count")
        none = self._constant(f"{output}_none", 0, TensorProto.INT64)
        return self._add("Equal", [size, none], output)

    def _upstream(self, losses: str) -> str:
        """`grad_output` in float64, in a shape that broadcasts with the element losses."""
        upstream = self._tensors["grad_output"]
        if self._spec.dtype != "float64":
            upstream = self._cast(upstream)
        if self._spec.reduction == "none" or not self._spec.keeps_axes:
            return upstream
        return self._beside(upstream, losses, "upstream_column")

    def _double(self, tensor: str) -> str:
        """A tensor of the compute dtype in float64."""
        return tensor if self._element == TensorProto.DOUBLE else self._cast(tensor)

    def _cast(self, tensor: str) -> str:
        """The tensor in float64, cast once however often it is asked for."""
        if tensor not in self._doubles:
            name = f"{tensor}_double"
            self._doubles[tensor] = self._add("Cast", [tensor], name, to=TensorProto.DOUBLE)
        return self._doubles[tensor]

    def _count(self, losses: str) -> str:
        """The number that the loss of an element was divided by: of rank 0, or one for each row."""
        if not self._counted:
            self._counted = self._new_count(losses)
            if self._spec.empty == "zero":  # what is divided by infinity is 0, and NaN where it was
                zero, infinite = self._constant("no_count", 0.0), self._constant("least", math.inf)
                is_zero = self._add("Equal", [self._counted, zero], "is_of_nothing")
                by = self._add("Where", [is_zero, infinite, self._counted], "count_or_infinite")
                self._counted = by
        return self._counted

    def _whole_weights(self, shape: str) -> str:
        """The weight of each element loss."""
        each = self._add("Expand", [self._data["weight"], shape], "each_weight")
        return self._selected(each, self._element)

    def _new_count(self, losses: str) -> str:
        spec = self._spec
        if spec.divisor:
            given = self._tensors["divisor"]
            return given if spec.dtype == "float64" else self._cast(given)
        if spec.weight == "weights" or spec.mask:
            shape = self._add("Shape", [losses], "losses_shape")
            is_double = spec.dtype == "float64" and spec.weight == "weights"
            if spec.weight == "weights":
                each = self._weights = self._whole_weights(shape)
            else:  # counted in float32 and added up in float64, whatever the dtype
                ones = self._add("Cast", [self._tensors["mask"]], "ones", to=TensorProto.FLOAT)
                each = self._add("Expand", [ones, shape], "selected_ones")
            return self._added_up(each, "count", is_double)
        if self._axes:
            return self._add("AxesCount", [losses, self._total], "axes_count")
        if spec.per_sample:
            return self._add("RowCount", [losses], "row_count")
        return self._cast(self._add("Size", [losses], "size"))


class _Differences(Assembly):
    """Input less target, in the spec's dtype and the shape of its element losses."""

    def _assemble(self, summed_axes: tuple[int, ...] | None) -> None:
        names = ("input", "target")
        self._data = {name: self._widened(self._tensors[name], name) for name in names}
        self._rounded(self._difference(), self._element, "differences")


class _InParts(Assembly):
    """Nodes of a loss that has no name: `_Part`s, and what is left to do with a few numbers."""

    def _assemble(self, summed_axes: tuple[int, ...] | None) -> None:
        spec = self._spec
        wide = TensorProto.DOUBLE if spec.dtype == "float64" else TensorProto.FLOAT
        beta = self._tensors.get("beta") or self._constant("beta", spec.effective_beta, wide)
        if spec.runtime_beta and spec.dtype == "float64":
            beta = self._cast(beta)
        operands = [*(self._tensors[name] for name in spec.operands), beta]
        # A kernel counts for each row, whether or not the numbers differ.
        self._counts_rows = spec.keeps_axes and not spec.divisor
        if spec.reduction == "none":
            self._call("Elements", operands)
        else:
            self._axes = self._reduced_axes()
            beside = f"And{spec.elements.title()}" if spec.elements else ""
            self._found = self._call(f"Totals{beside}", [*operands, self._axes])
            total = self._found["total"]
            if spec.reduction == "mean":
                total = self._add("Div", [total, self._count("")], "divided")
            self._rounded(self._times_factor(total), TensorProto.DOUBLE, "loss")
        if spec.gradient:
            flowing = ["upstream"] * spec.upstream + ["factor"] * self._has_factor
            flowing += ["mean"] * (spec.reduction == "mean")
            one = "" if flowing else self._constant("one", 1.0)
            self._call("Slopes", [*operands, self._flowing_in("", flowing) or one])

    def _reduced_axes(self) -> str:
        first = int(self._spec.per_sample)
        if self._spec.axes or self._rank is not None:
            axes = self._spec.axes or tuple(range(first, self._rank or 0))
            return self._integers("axes", axes)
        ranks = [
            self._add(
                "Size", [self._add("Shape", [self._tensors[name]], f"{name}_dims")], f"{name}_rank"
            )
            for name in self._spec.operands
        ]
        start = self._constant("first_axis", first, TensorProto.INT64)
        step = self._constant("axis_step", 1, TensorProto.INT64)
        ranks.append(self._constant("beta_rank", len(self._spec.beta_shape), TensorProto.INT64))
        return self._add("Range", [start, self._add("Max", ranks, "rank"), step], "axes")

    def _call(self, form: str, inputs: list[str]) -> dict[str, str]:
        """A node of a part; gives its outputs by their roles."""
        part = _Part(self._spec, form)
        made = {role: self._tensors.get(role) or self._prefix + role for role in part.outputs}
        outputs = [*made.values()]
        node = helper.make_node(part.name, inputs, outputs, name=outputs[0], domain=f.DOMAIN)
        self.nodes.append(node)
        self.used += part.used
        self.parts.append(part.function)
        return made

    def _new_count(self, losses: str) -> str:
        if self._spec.divisor:
            return super()._new_count(losses)
        return self._found["weights" if self._spec.weight == "weights" else "count"]


class _Part(Assembly):
    """The one pass over memory of a loss that has no name, which `ops` has a kernel for.

    Its inputs are the spec's operands, a beta, and the axes or what flows into each gradient.
    Elements are the losses; Totals their sum, how many they are and, where they are weighted, the
    sum of the weights, and then the losses or differences themselves; Slopes the gradients.
    """

    def __init__(self, spec: LossSpec, form: str) -> None:
        self._form = form
        core = LossSpec(
            reduction="sum" if "Totals" in form else "none",
            dtype=spec.dtype,
            loss=spec.loss,
            runtime_beta=True,
            weight=spec.weight and "count",
            mask=spec.mask,
            gradient=form == "Slopes",
            upstream=form == "Slopes",
        )
        flags = "Masked" * spec.mask + "Weighted" * bool(spec.weight)
        loss = "Huber" if spec.loss == "huber" else "SmoothL1"
        self.name = f"{flags}{loss}Loss{form}{_SUFFIX[spec.dtype]}"
        inputs, self.outputs = [*core.inputs], ["loss" if form == "Elements" else "grad_input"]
        if "Totals" in form:
            inputs, weights = [*inputs, "axes"], ["weights"] * bool(spec.weight)
            self.outputs = ["total", "count", *weights, *[spec.elements or ""] * ("And" in form)]
        tensors = {role: f"{self.name}_{role}" for role in (*inputs, *self.outputs)}
        super().__init__(core, tensors, summed_axes=(), prefix=f"{self.name}_")
        self.function = helper.make_function(
            f.DOMAIN,
            self.name,
            [tensors[role] for role in inputs],
            [tensors[role] for role in self.outputs],
            self.nodes,
            opset_imports=_OPSETS,
            doc_string="One pass where `smoothl1_deploy.ops` is registered.",
        )

    def _assemble(self, summed_axes: tuple[int, ...] | None) -> None:
        self._each = _EACH  # the beta that it is given may be an array
        self._take_operands()
        if self._form == "Slopes":
            self._gradient("", ())
            return
        losses = self._losses()
        if self._form == "Elements":
            self._rounded(losses, self._element, "loss")
            return
        if "losses" in self.outputs:
            self._add("Cast", [losses], "losses", to=ELEMENT_TYPE[self._spec.dtype])
        if "differences" in self.outputs:
            self._rounded(self._difference(), self._element, "differences")
        self._axes, is_double = self._tensors["axes"], self._spec.dtype == "float64"
        total = self._total = self._added_up(losses, "sum", is_double)
        if self._spec.weight:
            total = self._add("WithoutNegativeZero", [total], "sum_signed")
        self._unless_no_beta(total, losses)
        self._name_last("total")
        count = self._new_count(losses)
        if not self._spec.mask:  # each has the same
            shape = self._add("Shape", [self._total], "sums_shape")
            self._add("Expand", [count, shape], "counts")
        self._name_last("count")
        if self._spec.weight:
            shape = self._add("Shape", [losses], "whole_shape")
            self._added_up(self._whole_weights(shape), "weight_sum", is_double)
            self._name_last("weights")


#: The end of the name of a function that takes a beta for each element.
_EACH = "Each"

#: dtype -> the end of a function's name.
_SUFFIX = {"float32": "", "float16": "Float16", "bfloat16": "BFloat16", "float64": "Float64"}


def function_name(spec: LossSpec) -> str:
    """The name of the function that is the whole loss, which no loss computed otherwise has.

        [Weighted][Smooth]L1Loss[Row][Sum|Mean|Average][At][Gradient[Upstream]]
        [Float16|BFloat16|Float64][Wide]

    Without Smooth beta is 0, and known. Average divides by the sum of the weights. At takes beta as
    an input, not as an attribute. Gradient gives grad_input too, of an input that is not broadcast;
    Upstream takes grad_output. Wide computes narrower dtypes in float64, without a kernel in `ops`.

    >>> function_name(LossSpec(0.5, "mean", weight="weights", per_sample=True, dtype="float16"))
    'WeightedSmoothL1LossRowAverageFloat16'
    """
    reduction = "Average" if spec.weight == "weights" else spec.reduction.title()
    return "".join(
        (
            "Weighted" * bool(spec.weight),
            "L1Loss" if _is_l1(spec) else "SmoothL1Loss",
            "Row" * spec.per_sample,
            reduction * (spec.reduction != "none"),
            "At" * _takes_beta(spec),
            "Gradient" * spec.gradient,
            "Upstream" * spec.upstream,
            _SUFFIX[spec.dtype],
            "Wide" * spec.has_subnormal_beta,
        )
    )


def _has_a_name(spec: LossSpec) -> bool:
    """Whether there is a function that is the whole loss; others are a few nodes."""
    is_plain = spec.loss != "huber" and spec.effective_loss_weight == 1.0
    has_more = spec.mask or spec.divisor or spec.empty != "nan" or spec.axes or spec.beta_shape
    return is_plain and not (has_more or spec.elements)


def _has_parts(spec: LossSpec, summed_axes: tuple[int, ...] | None) -> bool:
    """Whether `_InParts` knows a loss that has no name, and no step of it is between its parts."""
    is_summed_back = spec.gradient and summed_axes != ()
    is_none = spec.reduction == "none"
    is_rounded_after = is_none and spec.effective_loss_weight != 1.0
    may_overflow = spec.dtype == "float64" and spec.weight == "weights"
    has_axes = spec.axes is None or min(spec.axes) >= 0
    is_times = spec.elements == "losses" and spec.effective_loss_weight != 1.0
    return (
        has_axes
        and not is_times
        and not (is_summed_back or is_rounded_after or may_overflow or spec.has_subnormal_beta)
    )


def _is_l1(spec: LossSpec) -> bool:
    """Whether the nodes compute |d| in float32 and know of no beta."""
    is_zero = not spec.beta_shape and spec.effective_beta == 0
    return is_zero and spec.loss != "huber" and not _takes_beta(spec)


def _has_attribute(spec: LossSpec) -> bool:
    return not (_takes_beta(spec) or _is_l1(spec) or spec.loss == "huber" or spec.beta_shape)


def _takes_beta(spec: LossSpec) -> bool:
    """Whether beta is an input: an attribute holds a float32, and what is an input isn't known.

    A gradient's is, lest there be twice as many operators: each makes a session open later.
    """
    is_attribute = spec.has_subnormal_beta or not (spec.gradient or spec.dtype == "float64")
    return spec.runtime_beta or not is_attribute


def nodes_of(
    spec: LossSpec,
    tensors: Mapping[str, str],
    *,
    summed_axes: tuple[int, ...] | None,
    rank: int | None = None,
    prefix: str = "",
    inlined: bool = False,
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], list[onnx.FunctionProto]]:
    """The nodes of a loss, the initialisers that they read, and the functions they call.

    One node, but for a gradient that is summed back to an input, or may have to be, for what has no
    name, and for what is going to be inlined. Takes what `Assembly` takes, and the rank of the
    element losses where it is known.
    """
    is_part = not inlined and rank != 0 and _has_parts(spec, summed_axes)
    if spec.elements and (spec.reduction == "none" or not is_part):
        return _with_elements(spec, tensors, summed_axes, rank, prefix, inlined)
    has_a_name = _has_a_name(spec)
    if inlined or (spec.gradient and summed_axes != ()) or not has_a_name:
        is_part = is_part and not has_a_name
        if spec.per_sample and rank and rank > 1 and not (has_a_name or is_part):
            spec = replace(spec, per_sample=False, axes=tuple(range(1, rank)))
        kind = _InParts if is_part else Assembly
        assembly = kind(
            spec, tensors, summed_axes=summed_axes, rank=rank, prefix=prefix, inlined=inlined
        )
        return assembly.nodes, [], [*function_closure(assembly.used), *assembly.parts]
    name = function_name(spec)
    # One body for the beta that is known and the one that isn't.
    whole = replace(spec, beta=1.0, runtime_beta=True) if _takes_beta(spec) else spec
    inputs = [tensors.get(role) or f"{prefix}{role}" for role in whole.inputs]
    constants: list[onnx.TensorProto] = []
    attributes: dict[str, Any] = {}
    if _has_attribute(spec):
        attributes = {"beta": spec.effective_beta}
    elif not (_is_l1(spec) or spec.runtime_beta):
        element = TensorProto.DOUBLE if spec.dtype == "float64" else TensorProto.FLOAT
        beta = spec.effective_beta
        constants = [helper.make_tensor(f"{prefix}beta", element, [], [beta])]
    outputs = [tensors[role] for role in spec.outputs]
    node = helper.make_node(name, inputs, outputs, name=outputs[0], domain=f.DOMAIN, **attributes)
    return [node], constants, _functions_of(whole)


def _with_elements(
    spec: LossSpec,
    tensors: Mapping[str, str],
    summed_axes: tuple[int, ...] | None,
    rank: int | None,
    prefix: str,
    inlined: bool,
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], list[onnx.FunctionProto]]:
    """What `nodes_of` gives of the loss alone, and of its elements."""
    alone = replace(spec, elements=None)
    found = nodes_of(
        alone, tensors, summed_axes=summed_axes, rank=rank, prefix=prefix, inlined=inlined
    )
    within = f"{prefix}elements/"
    if spec.elements == "losses":
        named = {**tensors, "loss": tensors["losses"]}
        more = nodes_of(spec.of_elements, named, summed_axes=(), prefix=within, inlined=inlined)
    else:
        known = spec.at(np.ones(spec.beta_shape))  # of which it asks nothing but the shape
        difference = _Differences(known, tensors, prefix=within)
        more = difference.nodes, [], function_closure(difference.used)
    names = {function.name for function in found[2]}
    functions = [*found[2], *(each for each in more[2] if each.name not in names)]
    return [*found[0], *more[0]], [*found[1], *more[1]], functions


def _functions_of(spec: LossSpec) -> list[onnx.FunctionProto]:
    name = function_name(spec)
    if name in f.FUNCTIONS:
        return function_closure([name])
    attributes = ["beta"] * _has_attribute(spec)
    tensors = {role: f"{name}_{role}" for role in (*spec.inputs, "beta", *spec.outputs)}
    assembly = Assembly(spec, tensors, summed_axes=(), prefix=f"{name}_")
    nodes = assembly.nodes
    if attributes:
        # A tensor of it here: TensorRT (for RTX 1.7.1) loses what one function hands on to another
        # by reference, and computes with 0.
        beta = helper.make_node("Constant", [], [tensors["beta"]], name=tensors["beta"])
        beta.attribute.add(name="value_float", ref_attr_name="beta", type=onnx.AttributeProto.FLOAT)
        nodes = [beta, *nodes]
    whole = helper.make_function(
        f.DOMAIN,
        name,
        [tensors[role] for role in spec.inputs],
        [tensors[role] for role in spec.outputs],
        nodes,
        opset_imports=_OPSETS,
        attributes=attributes,
        doc_string="The whole loss: one pass where `smoothl1_deploy.ops` is registered.",
    )
    return [*function_closure(assembly.used), whole]


@lru_cache
def _function_proto(name: str) -> onnx.FunctionProto:
    """The function as models carry it: what other people's tools read wrongly is not in it.

    * No value has a type or a shape of its own: the callers' decide.
    * No name is in two functions: onnxscript's optimiser puts bodies in place of calls and keeps
      what one of them said of a name (onnxscript 0.7).
    * A constant is a tensor: onnxslim reads `value_float` as float64.

    One whose name ends with Each takes a beta for each element.

    onnxscript reads the source of a function anew for each proto, which is why they are kept;
    protobuf copies are cheap.
    """
    proto: onnx.FunctionProto = f.FUNCTIONS[name.removesuffix(_EACH)].to_function_proto()
    if name not in f.FUNCTIONS:
        proto.name = name
        _clip_each(proto)
    proto.doc_string = inspect.cleandoc(proto.doc_string)
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


def _clip_each(function: onnx.FunctionProto) -> None:
    """Let Max and Min stand for Clip, whose ends are numbers."""
    at, clip = next((i, node) for i, node in enumerate(function.node) if node.op_type == "Clip")
    values, low, high = clip.input
    clip.op_type = "Min"
    clip.input[:] = ["raised", high]
    function.node.insert(at, helper.make_node("Max", [values, low], ["raised"]))


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
    """The functions called `names` and every function they call, callees first.

    Copies, the caller's own: torch.onnx.export names the tensors of constants it is given.
    """
    found: dict[str, onnx.FunctionProto] = {}

    def visit(name: str) -> None:
        if name in found:
            return
        proto = onnx.FunctionProto()
        proto.CopyFrom(_function_proto(name))
        for node in proto.node:
            if node.domain == f.DOMAIN:
                visit(node.op_type)
        found[name] = proto

    for name in names:
        visit(name)
    return list(found.values())


def oldest_opset(nodes: Iterable[onnx.NodeProto]) -> int:
    """The first of OPSETS in which ONNX's operators have the attributes that `nodes` give them."""

    def knows(opset: int, node: onnx.NodeProto) -> bool:
        known = onnx.defs.get_schema(node.op_type, opset, "").attributes
        return all(attribute.name in known for attribute in node.attribute)

    plain = [node for node in nodes if not node.domain]
    return next(opset for opset in OPSETS if all(knows(opset, node) for node in plain))


def set_opset(holder: onnx.ModelProto | onnx.FunctionProto, opset: int) -> None:
    """Let the nodes of `holder` be read as operators of that opset."""
    for entry in holder.opset_import:
        if not entry.domain:
            entry.version = opset


def model_of(graph: onnx.GraphProto, functions: list[onnx.FunctionProto]) -> onnx.ModelProto:
    """The model of a graph that calls `functions`."""
    return helper.make_model(
        graph, functions=functions, opset_imports=_OPSETS, ir_version=IR_VERSION
    )
