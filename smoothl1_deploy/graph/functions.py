"""The operators of the domain `smoothl1_deploy`, as onnxscript functions.

Every route is made of these bodies, so the numbers are decided here and nowhere else.

With `core = clip(d, -beta, beta)` the loss is the linear excess plus the quadratic core:

    l = |d - core| + (0.5 * core) * (core / beta)

There is no branch on `|d| < beta`, and each element sees at most one rounding more than
PyTorch. Why this form of the branch-free ones (bench/NOTES.md has the timings):

* Every beta >= 0 is right. At beta = 0 the core vanishes and `|d|` remains; only the divisor,
  a scalar, needs a guard. `(core / beta) * (d - core / 2)` divides zero by zero there.
* Nothing overflows that PyTorch keeps finite: `core / beta` is at most 1. Dividing by
  `2 * beta` would save an operator and overflow for the largest betas.
* NaN survives a runtime whose Clip drops it (NVIDIA/TensorRT#4758), because `d` is a term.
* Halving the core first is exact where halving the product, in the subnormal range, isn't.
* Zero is +0, as PyTorch's is; `(core / beta) * (d - core / 2)` gives -0 for d = -0.

The functions that have no attribute and call no other can also be called while
torch.onnx.export traces: its inliner handles no more than that (torch 2.13).
"""

# onnxscript reads the source of these functions: annotations must be real objects, so there is
# no `from __future__ import annotations` here.
from typing import Any, TypeVar, Union

from onnxscript import BFLOAT16, DOUBLE, FLOAT, FLOAT16, script
from onnxscript import opset18 as op
from onnxscript.values import OnnxFunction, Opset

__all__ = [
    "DOMAIN",
    "DOMAIN_VERSION",
    "FUNCTIONS",
    "OPSET",
    "CompensatedMean",
    "CompensatedSum",
    "SmoothL1Loss",
    "SmoothL1LossTerms",
    "WideMean",
    "WideSum",
]

DOMAIN = "smoothl1_deploy"
DOMAIN_VERSION = 1
OPSET = 18  # the lowest that every route, the parser of TensorRT and torch.onnx.export share
_domain = Opset(DOMAIN, DOMAIN_VERSION)

# onnxscript 0.7 knows a Union as a bound, neither constraints nor `FLOAT | DOUBLE`. The return
# annotations matter: torch.onnx.export counts the outputs of a function call by them.
T = TypeVar("T", bound=Union[FLOAT, DOUBLE])
TNarrow = TypeVar("TNarrow", bound=Union[FLOAT, FLOAT16, BFLOAT16])


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
def SmoothL1Loss(input: FLOAT, target: FLOAT, beta: float = 1.0) -> FLOAT:
    """Smooth L1 of each element of float32 tensors; `beta` >= 0 is an attribute.

    Cast float16 and bfloat16 to float32 first. A model that feeds it float64 fails to load: an
    attribute would round beta to float32; use SmoothL1LossTerms.
    """
    threshold = op.Constant(value_float=beta)
    is_l1 = op.Equal(threshold, op.Constant(value_float=0.0))
    divisor = op.Where(is_l1, op.Constant(value_float=1.0), threshold)
    return SmoothL1LossTerms(input, target, threshold, op.Constant(value_float=0.5), divisor)


@script(_domain)
def WideSum(losses: TNarrow) -> DOUBLE:
    """The sum of all elements, accumulated in float64: exact to 2^-29 for 2^24 float32 values.

    For formats narrower than float64, any rank; the sum of nothing is 0. The result is float64,
    for one Cast to round it once.
    """
    # TensorRT refuses to reduce a tensor of rank 0; flattened, there is none.
    flat = op.Reshape(op.Cast(losses, to=11), op.Constant(value_ints=[-1]))
    return op.ReduceSum(flat, op.Constant(value_ints=[0]), keepdims=0)


@script(_domain)
def WideMean(losses: TNarrow) -> DOUBLE:
    """`WideSum` over the number of elements; the mean of nothing is NaN (0 / 0), as PyTorch's."""
    return op.Div(WideSum(losses), op.Cast(op.Size(losses), to=11))


@script(_domain)
def CompensatedSum(losses: DOUBLE) -> DOUBLE:
    """The sum of float64 elements >= 0, as if accumulated in twice the precision.

    A runtime that adds up float64 in one pass is thousands of ULP off at 2^24 elements. Here
    `scale`, a power of two of at least twice the naive sum, splits each element into a multiple
    of ulp(scale), whose sum is exact in any order, and a rest whose sum is tiny. One split
    suffices up to 2^26 elements.

    Source: Rump, Ogita, Oishi, "Accurate floating-point summation part I", 2008 (ExtractVector
    and NextPowerTwo).
    """
    flat = op.Reshape(losses, op.Constant(value_ints=[-1]))
    axis = op.Constant(value_ints=[0])
    naive = op.ReduceSum(flat, axis, keepdims=0)
    # 2^53 as a product of float32 constants: an attribute can't hold a float64.
    two_53 = op.Cast(op.Constant(value_float=9007199254740992.0), to=11)
    scaled = op.Mul(naive, two_53)
    power = op.Abs(op.Sub(op.Add(scaled, naive), scaled))
    # Of a naive sum that is itself a power of two, the tie above rounds to 0 (NextPowerTwo's last
    # step): without Max nothing is split, and [1, 2^-54, 2^-54, ...] loses its tail.
    bounded = op.Max(power, naive)
    scale = op.Mul(bounded, op.Cast(op.Constant(value_float=4.0), to=11))
    high = op.Sub(op.Add(flat, scale), scale)
    low = op.Sub(flat, high)
    exact = op.Add(op.ReduceSum(high, axis, keepdims=0), op.ReduceSum(low, axis, keepdims=0))
    # NaN and infinite elements, and sums near the overflow limit, make the split NaN.
    return op.Where(op.IsNaN(exact), naive, exact)


@script(_domain)
def CompensatedMean(losses: DOUBLE) -> DOUBLE:
    """`CompensatedSum` over the number of elements; the mean of nothing is NaN."""
    return op.Div(CompensatedSum(losses), op.Cast(op.Size(losses), to=11))


FUNCTIONS: dict[str, OnnxFunction[..., Any]] = {
    f.name: f
    for f in (
        SmoothL1Loss,
        SmoothL1LossTerms,
        WideSum,
        WideMean,
        CompensatedSum,
        CompensatedMean,
    )
}
