"""The operators of the domain `smoothl1_deploy`, as onnxscript functions.

Every route is made of these bodies, so the numbers are decided here and nowhere else.

With `core = clip(d, -beta, beta)` the loss is the linear excess plus the quadratic core:

    l = |d - core| + (0.5 * core) * (core / beta)

There is no branch on `|d| < beta`, and each element sees at most one rounding more than
PyTorch. Why this form of the branch-free ones (bench/NOTES.md has their speeds):

* Every beta >= 0 is right. At beta = 0 the core vanishes and `|d|` remains; only the divisor,
  a scalar, needs a guard. `(core / beta) * (d - core / 2)` divides zero by zero there.
* Nothing overflows that PyTorch keeps finite: `core / beta` is at most 1. Dividing by
  `2 * beta` would save an operator and overflow for the largest betas.
* NaN survives a runtime whose Clip drops it (NVIDIA/TensorRT#4758), because `d` is a term.
* Halving the core first loses less than halving the product where that is subnormal.
* Zero is +0, as PyTorch's is; `(core / beta) * (d - core / 2)` gives -0 for d = -0.

The functions that have no attribute and call no other can also be called while
torch.onnx.export traces: its inliner handles no more than that (torch 2.13).
"""

# onnxscript reads the source of these functions: annotations must be real objects, so there is
# no `from __future__ import annotations` here.
from typing import Any, TypeVar, Union

import numpy as np
from onnxscript import BFLOAT16, BOOL, DOUBLE, FLOAT, FLOAT16, INT64, script
from onnxscript import opset18 as op
from onnxscript.values import OnnxFunction, Opset

DOMAIN = "smoothl1_deploy"
DOMAIN_VERSION = 2
OPSET = 18  # the lowest that every route, the parser of TensorRT and torch.onnx.export share
_domain = Opset(DOMAIN, DOMAIN_VERSION)
_NAN = float("nan")

# onnxscript 0.7 knows a Union as a bound, neither constraints nor `FLOAT | DOUBLE`. The return
# annotations matter: torch.onnx.export counts the outputs of a function call by them. A tensor of
# any shape is `FLOAT[...]`; `FLOAT` says that it has rank 0, and tools believe it.
T = TypeVar("T", bound=Union[FLOAT, DOUBLE])
TNarrow = TypeVar("TNarrow", bound=Union[FLOAT, FLOAT16, BFLOAT16])
TAny = TypeVar("TAny", bound=Union[FLOAT, DOUBLE, FLOAT16, BFLOAT16])


@script(_domain)
def SmoothL1LossTerms(input: T, target: T, beta: T, half: T, divisor: T) -> T:
    """Smooth L1 of each element, float32 or float64, with the scalars as tensors of rank 0.

    `beta` >= 0; `half` is 0.5; `divisor` is beta, or 1 where beta is 0. All of the inputs' dtype:
    a body that cast them itself would need CastLike, which ONNX Runtime warns about at each load.
    """
    difference = op.Sub(input, target)
    core = op.Clip(difference, op.Neg(beta), beta)
    excess = op.Abs(op.Sub(difference, core))
    quadratic = op.Mul(op.Mul(half, core), op.Div(core, divisor))
    return op.Add(excess, quadratic)


@script(_domain)
def SmoothL1Addends(
    input: FLOAT[...], target: FLOAT[...], beta: FLOAT[...], half: FLOAT[...]
) -> FLOAT[...]:
    """Smooth L1 of each element, for a sum: a loss of 0 may be -0, which `Abs` of the sum ends.

    `beta` > 0 (of 0 it makes NaN); `half` is 0.5; both of rank 0. With six passes over memory
    instead of the eight of `SmoothL1LossTerms`, it has the same bits up to beta, and beyond it one
    rounding less.
    """
    difference = op.Sub(input, target)
    core = op.Clip(difference, op.Neg(beta), beta)
    return op.Mul(op.Div(core, beta), op.Sub(difference, op.Mul(half, core)))


@script(_domain)
def L1Loss(input: FLOAT[...], target: FLOAT[...]) -> FLOAT[...]:
    """Smooth L1 of each element for beta = 0: its distance."""
    return op.Abs(op.Sub(input, target))


@script(_domain)
def HuberLossTerms(input: T, target: T, delta: T, half: T, shrink: T, slope: T) -> T:
    """The Huber loss of each element, in the form of `SmoothL1LossTerms`, scalars as tensors.

    `delta` >= 0; `half` is 0.5; `shrink` times `slope` is delta, or any number where it is inf.
    """
    difference = op.Sub(input, target)
    core = op.Clip(difference, op.Neg(delta), delta)
    beyond = op.Sub(difference, core)
    linear = op.Mul(op.Mul(shrink, op.Abs(beyond)), slope)
    return op.Add(linear, op.Mul(op.Mul(half, core), core))


@script(_domain)
def Weighted(losses: T, weight: T) -> T:
    """The losses times their weight, which broadcasts with them."""
    return op.Mul(losses, weight)


@script(_domain)
def Selected(values: T, mask: BOOL[...], nothing: T) -> T:
    """The values where the mask is true, and `nothing` elsewhere, whatever they are there."""
    # The values are the second branch: ONNX Runtime's Where makes 0 of a -0 of its first one. Not
    # isn't used: its optimiser (1.31) turns the two branches where it meets one.
    return op.Where(op.Xor(mask, op.Cast(op.Constant(value_int=1), to=9)), nothing, values)


@script(_domain)
def BetaDivisor(beta: FLOAT[...]) -> FLOAT[...]:
    """The divisor that `SmoothL1LossTerms` takes: beta, 1 for 0, NaN for what is no beta."""
    zero = op.Constant(value_float=0.0)
    one = op.Constant(value_float=1.0)
    otherwise = op.Where(op.Equal(beta, zero), one, op.Constant(value_float=_NAN))
    return op.Where(op.Greater(beta, zero), beta, otherwise)


@script(_domain)
def BetaDivisorFloat64(beta: DOUBLE[...]) -> DOUBLE[...]:
    """`BetaDivisor` in float64, for sums of what no float32 holds."""
    zero = op.Cast(op.Constant(value_float=0.0), to=11)
    one = op.Cast(op.Constant(value_float=1.0), to=11)
    otherwise = op.Where(op.Equal(beta, zero), one, op.Cast(op.Constant(value_float=_NAN), to=11))
    return op.Where(op.Greater(beta, zero), beta, otherwise)


@script(_domain)
def DeltaOne(delta: FLOAT[...]) -> FLOAT[...]:
    """1 for a delta, and NaN for what is none: for 0, what is negative, and NaN."""
    is_delta = op.Greater(delta, op.Constant(value_float=0.0))
    return op.Where(is_delta, op.Constant(value_float=1.0), op.Constant(value_float=_NAN))


@script(_domain)
def DeltaOneFloat64(delta: DOUBLE[...]) -> DOUBLE[...]:
    """`DeltaOne` in float64, of a delta that no float32 may hold."""
    zero = op.Cast(op.Constant(value_float=0.0), to=11)
    one = op.Cast(op.Constant(value_float=1.0), to=11)
    nan = op.Cast(op.Constant(value_float=_NAN), to=11)
    return op.Where(op.Greater(delta, zero), one, nan)


@script(_domain)
def SmoothL1Loss(input: FLOAT[...], target: FLOAT[...], beta: float = 1.0) -> FLOAT[...]:
    """Smooth L1 of each element of float32 tensors; `beta` >= 0 is an attribute.

    Cast float16 and bfloat16 to float32 first. A model that feeds it float64 fails to load: an
    attribute would round beta to float32; use SmoothL1LossTerms.
    """
    threshold = op.Constant(value_float=beta)
    half = op.Constant(value_float=0.5)
    return SmoothL1LossTerms(input, target, threshold, half, BetaDivisor(threshold))


@script(_domain)
def SmoothL1SlopeTerms(input: T, target: T, beta: T, shrink: T) -> T:
    """d(loss)/d(input) of each element times a divisor, for whoever sums before dividing.

    The divisor is beta times `shrink`, or 1 for beta = 0 or inf.
    `shrink` is 1, a power of two that keeps sums of `shrink * beta` finite, or 0 for beta = inf.
    The quotient is `clip(d, -beta, beta) / beta`, and the sign of d for beta = 0, as PyTorch's CPU
    kernels have it: 0 for d = 0 (the subgradient is any of [-1, 1]) and, for beta = 0 alone, 0 for
    d = NaN. Differences that cancel do so exactly, which their quotients by beta would not.
    Source: smooth_l1_loss_backward and l1_loss of torch 2.13, and tests/graph/test_extensions.py.
    """
    difference = op.Sub(input, target)
    core = op.Clip(difference, op.Neg(beta), beta)
    # Only beta = inf lets an infinite core through, whose slope is 1 and whose product is NaN.
    within = op.Where(op.IsInf(core), op.Sign(core), op.Mul(core, shrink))
    # A runtime's Clip may have dropped NaN (NVIDIA/TensorRT#4758).
    smooth = op.Where(op.IsNaN(difference), difference, within)
    zero = op.Sub(beta, beta)  # NaN for beta = inf, to which nothing is equal
    sign = op.Where(op.IsNaN(difference), zero, op.Sign(difference))
    return op.Where(op.Equal(beta, zero), sign, smooth)


@script(_domain)
def HuberSlopeTerms(input: T, target: T, delta: T) -> T:
    """d(loss)/d(input) of each element's Huber loss: `clip(d, -delta, delta)`."""
    difference = op.Sub(input, target)
    core = op.Clip(difference, op.Neg(delta), delta)
    # A runtime's Clip may have dropped NaN (NVIDIA/TensorRT#4758).
    return op.Where(op.IsNaN(difference), difference, core)


@script(_domain)
def WithoutNegativeZero(sums: DOUBLE[...]) -> DOUBLE[...]:
    """`sums` with 0 for -0: a sum starts at 0 in PyTorch, and runtimes start at the first term."""
    zero = op.Cast(op.Constant(value_float=0.0), to=11)
    return op.Where(op.Equal(sums, zero), zero, sums)


@script(_domain)
def WideSum(losses: TNarrow) -> DOUBLE[...]:
    """The sum of all elements, accumulated in float64: exact to 2^-29 for 2^24 float32 values.

    For formats narrower than float64, any rank; the sum of nothing is 0. The result is float64,
    for one Cast to round it once.
    """
    # TensorRT refuses to reduce a tensor of rank 0; flattened, there is none.
    flat = op.Reshape(op.Cast(losses, to=11), op.Constant(value_ints=[-1]))
    return op.ReduceSum(flat, op.Constant(value_ints=[0]), keepdims=0)


@script(_domain)
def WideMean(losses: TNarrow) -> DOUBLE[...]:
    """`WideSum` over the number of elements; the mean of nothing is NaN (0 / 0), as PyTorch's."""
    return op.Div(WideSum(losses), op.Cast(op.Size(losses), to=11))


@script(_domain)
def WideRowSum(losses: TNarrow) -> DOUBLE[...]:
    """The sum of each row, over every axis but 0, as `WideSum` accumulates it; rank 1 at least."""
    rows = op.Flatten(op.Cast(losses, to=11), axis=1)
    return op.ReduceSum(rows, op.Constant(value_ints=[1]), keepdims=0)


@script(_domain)
def RowCount(losses: TAny) -> DOUBLE[...]:
    """The number of elements in a row: the product of every axis but 0."""
    # Flatten is not used: where a value is flattened twice, onnxscript's optimiser (0.7) makes
    # an invalid model. Max, because an integer division by no rows ends the process.
    rows = op.Gather(op.Shape(losses), op.Constant(value_int=0))
    columns = op.Div(op.Size(losses), op.Max(rows, op.Constant(value_int=1)))
    return op.Cast(columns, to=11)


@script(_domain)
def WideRowMean(losses: TNarrow) -> DOUBLE[...]:
    """`WideRowSum` over the number of elements in a row."""
    return op.Div(WideRowSum(losses), RowCount(losses))


@script(_domain)
def CompensatedAxesSum(values: DOUBLE[...], axes: INT64[...]) -> DOUBLE[...]:
    """The sum of float64 `values` over `axes`, kept with size 1, as if in twice the precision.

    A runtime that adds up float64 in one pass is thousands of ULP off at 2^24 elements. Here
    `scale`, a power of two of at least twice the sum of magnitudes, splits each element into a
    multiple of ulp(scale), whose sum is exact in any order, and a rest whose sum is tiny. One
    split suffices up to 2^26 elements.

    Source: Rump, Ogita, Oishi, "Accurate floating-point summation part I", 2008 (ExtractVector
    and NextPowerTwo).
    """
    magnitude = op.ReduceSum(op.Abs(values), axes, keepdims=1, noop_with_empty_axes=1)
    # An attribute can't hold a float64; powers of two of float32's range are exact.
    two_53 = op.Cast(op.Constant(value_float=9007199254740992.0), to=11)
    # Where the split would overflow, all is made smaller; that rounds off subnormals alone.
    small = op.Cast(op.Constant(value_float=2.0**-120), to=11)
    one = op.Cast(op.Constant(value_float=1.0), to=11)
    shrink = op.Where(op.IsInf(op.Mul(op.Mul(magnitude, two_53), two_53)), small, one)
    whole = op.Mul(magnitude, shrink)
    scaled = op.Mul(whole, two_53)
    power = op.Abs(op.Sub(op.Add(scaled, whole), scaled))
    # Where the sum is itself a power of two, the tie above rounds to 0 (NextPowerTwo's last
    # step): without Max nothing is split, and [1, 2^-54, 2^-54, ...] loses its tail.
    bounded = op.Max(power, whole)
    scale = op.Mul(bounded, op.Cast(op.Constant(value_float=4.0), to=11))
    parts = op.Mul(values, shrink)
    high = op.Sub(op.Add(parts, scale), scale)
    low = op.Sub(parts, high)
    sum_high = op.ReduceSum(high, axes, keepdims=1, noop_with_empty_axes=1)
    sum_low = op.ReduceSum(low, axes, keepdims=1, noop_with_empty_axes=1)
    exact = op.Div(op.Add(sum_high, sum_low), shrink)
    # NaN and infinite elements, and magnitudes that add up to more than float64 holds, make the
    # split NaN; and where there is no axis to add up over, it makes 0 of -0.
    plain = op.ReduceSum(values, axes, keepdims=1, noop_with_empty_axes=1)
    is_sum = op.Cast(op.Size(axes), to=9)
    return op.Where(op.And(is_sum, op.Not(op.IsNaN(exact))), exact, plain)


@script(_domain)
def CompensatedRowSum(losses: DOUBLE[...]) -> DOUBLE[...]:
    """The sum of each row, over every axis but 0, as `CompensatedAxesSum` has it."""
    axis = op.Constant(value_ints=[1])
    return op.Squeeze(CompensatedAxesSum(op.Flatten(losses, axis=1), axis), axis)


@script(_domain)
def CompensatedRowMean(losses: DOUBLE[...]) -> DOUBLE[...]:
    """`CompensatedRowSum` over the number of elements in a row."""
    return op.Div(CompensatedRowSum(losses), RowCount(losses))


@script(_domain)
def CompensatedSum(losses: DOUBLE[...]) -> DOUBLE[...]:
    """The sum of all float64 elements: `CompensatedRowSum` of them as one row."""
    row = op.Reshape(losses, op.Constant(value_ints=[1, -1]))
    return op.Squeeze(CompensatedRowSum(row), op.Constant(value_ints=[0]))


@script(_domain)
def CompensatedMean(losses: DOUBLE[...]) -> DOUBLE[...]:
    """`CompensatedSum` over the number of elements; the mean of nothing is NaN."""
    return op.Div(CompensatedSum(losses), op.Cast(op.Size(losses), to=11))


@script(_domain)
def WideAxesSum(losses: TNarrow, axes: INT64[...]) -> DOUBLE[...]:
    """The sum over `axes`, as `WideSum` accumulates it; over none the losses themselves."""
    return op.ReduceSum(op.Cast(losses, to=11), axes, keepdims=0, noop_with_empty_axes=1)


@script(_domain)
def CompensatedAxesTotal(losses: DOUBLE[...], axes: INT64[...]) -> DOUBLE[...]:
    """`CompensatedAxesSum` without the axes that were added up over."""
    return op.Squeeze(CompensatedAxesSum(losses, axes), axes)


@script(_domain)
def AxesCount(losses: TAny, sums: DOUBLE[...]) -> DOUBLE[...]:
    """How many losses each of the sums is of; where there are no sums, any number."""
    return op.Cast(op.Div(op.Size(losses), op.Max(op.Size(sums), op.Constant(value_int=1))), to=11)


@script(_domain)
def RowsLike(rows: DOUBLE[...], like: TAny) -> DOUBLE[...]:
    """`rows` [N] in the shape [N, 1, ...] that broadcasts with `like` [N, ...]."""
    first = op.Constant(value_ints=[1])
    end = op.Constant(value_ints=[9223372036854775807])
    ones = op.Expand(first, op.Shape(op.Slice(op.Shape(like), first, end)))
    return op.Reshape(rows, op.Concat(op.Shape(rows), ones, axis=0), allowzero=1)


@script(_domain)
def BroadcastAxes(values: TAny, like: TAny) -> INT64[...]:
    """The axes of `values` along which `like` was broadcast to them, those it lacks among them."""
    shape, full = op.Shape(like), op.Shape(values)
    one = op.Constant(value_ints=[1])
    lacking = op.Constant(value_ints=[-1])
    missing = op.Unsqueeze(op.Sub(op.Size(full), op.Size(shape)), op.Constant(value_ints=[0]))
    aligned = op.Concat(op.Expand(lacking, missing), shape, axis=0)
    was_one = op.And(op.Equal(aligned, one), op.Not(op.Equal(full, one)))
    repeated = op.NonZero(op.Or(op.Equal(aligned, lacking), was_one))
    return op.Reshape(repeated, lacking)


#: Every function above, by its name.
FUNCTIONS: dict[str, OnnxFunction[..., Any]] = {
    name: function for name, function in globals().items() if isinstance(function, OnnxFunction)
}


def loss_scalars(beta: Any) -> tuple[tuple[str, Any], ...]:
    """The last three inputs of the function `SmoothL1LossTerms`, by name; of each beta of an array.

    The same holds for the others.
    """
    return ("beta", beta), ("half", 0.5), ("beta_divisor", beta + (beta == 0))


def huber_scalars(delta: Any) -> tuple[tuple[str, Any], ...]:
    """The last four inputs of the function `HuberLossTerms`, by name."""
    # Nothing lies beyond an infinite knee; 0 * inf would make NaN of it.
    slope = np.where(np.isinf(delta), 1.0, delta)[()]
    return ("delta", delta), ("half", 0.5), ("huber_shrink", 1.0), ("huber_slope", slope)


def slope_scalars(beta: Any) -> tuple[tuple[str, Any], ...]:
    """The last two inputs of the function `SmoothL1SlopeTerms`, by name, and its divisor.

    A beta that many differences would overflow with is made a number below 1 by a power of two.
    """
    below_1, exponent = np.frexp(beta)
    kinds = [np.equal(beta, 0), np.isinf(beta), np.less(beta, 2.0**500)]
    shrink = np.select(kinds, [1.0, 0.0, 1.0], np.ldexp(1.0, -np.maximum(exponent, 0)))
    divisor = np.select(kinds, [1.0, 1.0, beta], below_1)
    return ("slope_beta", beta), ("slope_shrink", shrink), ("slope_divisor", divisor)
