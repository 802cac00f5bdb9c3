"""The losses of `torch.nn.functional`, recorded operator by operator by either exporter of PyTorch.

Both exporters take operators one at a time, and neither keeps a function call whole (the inliner
of torch 2.13 loses its attributes and the functions that its body calls). So the bodies of
`_functions` are replayed: the numbers are still decided there alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from onnx import TensorProto, helper

from .._model import ELEMENT_TYPE
from .._spec import DTYPES, LossSpec
from ..errors import SpecError
from . import _functions as f
from ._assemble import function_closure
from ._functions import huber_scalars, loss_scalars

_REDUCTION = ("none", "mean", "sum")  # PyTorch's enumeration at::Reduction


class Recorder(Protocol):
    """Adds one ONNX operator with one output to the graph that is being made."""

    def __call__(self, op: str, inputs: Sequence[Any], /, **attributes: Any) -> Any:
        """The operator's output."""


def checked_dtype(dtype: str) -> str:
    """The dtype, where it is a loss's; PyTorch refuses any other when it runs."""
    if dtype not in DTYPES:
        raise SpecError(
            f"the loss is of {dtype} tensors, which PyTorch refuses; convert one of them, as in "
            "input.float()"
        )
    return dtype


def _splits(knee: float) -> tuple[float, float]:
    """The factors 1/2 and 2 where they keep another off 1, else 1 and 1.

    The optimiser of the dynamo exporter takes a factor or divisor within 1e-5 of 1 for 1 and drops
    it (onnxscript 0.7). Halving the one operand and doubling the other changes no bit.
    """
    return (0.5, 2.0) if abs(knee - 1) < 1e-3 else (1.0, 1.0)


def record_smooth_l1(
    record: Recorder, input: Any, target: Any, dtype: str, reduction: int, beta: float
) -> Any:
    """The Smooth L1 loss of two values of the same `dtype`, which is the result's too.

    Raises:
        SpecError: on a beta that PyTorch refuses when it runs: the export would not.
    """
    spec = LossSpec(beta, _REDUCTION[reduction], dtype)
    scalars = dict(loss_scalars(spec.effective_beta))
    half, twice = _splits(spec.effective_beta)
    scalars["half"] /= half
    scalars["beta_divisor"] *= twice
    return _record(record, "SmoothL1LossTerms", [*scalars.values()], spec, input, target)


def record_huber(
    record: Recorder, input: Any, target: Any, dtype: str, reduction: int, delta: float
) -> Any:
    """The Huber loss of two values of the same `dtype`, which is the result's too.

    Raises:
        SpecError: on a delta that is not positive, as PyTorch has it.
    """
    spec = LossSpec(reduction=_REDUCTION[reduction], dtype=dtype, loss="huber", delta=delta)
    scalars = dict(huber_scalars(spec.effective_beta))
    scalars["huber_shrink"], twice = _splits(spec.effective_beta)
    scalars["huber_slope"] *= twice
    return _record(record, "HuberLossTerms", [*scalars.values()], spec, input, target)


def record_absolute(record: Recorder, input: Any, target: Any, reduction: int) -> Any:
    """`l1_loss` of integers, which PyTorch computes where it needs no division."""
    if _REDUCTION[reduction] == "mean":
        raise SpecError("PyTorch has no mean of an integral l1_loss; convert its inputs to float")
    losses = record("Abs", [record("Sub", [input, target])])
    if _REDUCTION[reduction] == "none":
        return losses
    flat = record("Reshape", [losses, record("Constant", [], value_ints=[-1])])
    return record("ReduceSum", [flat, record("Constant", [], value_ints=[0])], keepdims=0)


def _record(
    record: Recorder, function: str, scalars: list[float], spec: LossSpec, input: Any, target: Any
) -> Any:
    compute = ELEMENT_TYPE[spec.compute_dtype]
    is_narrow = spec.dtype != spec.compute_dtype
    if is_narrow:
        input, target = (record("Cast", [value], to=compute) for value in (input, target))
    constants = [
        record("Constant", [], value=helper.make_tensor(f"scalar_{i}", compute, [], [value]))
        for i, value in enumerate(scalars)
    ]
    result = _replay(record, function, [input, target, *constants])
    if spec.reduction != "none":
        wide = "Compensated" if spec.dtype == "float64" else "Wide"
        # The losses are one row: the TorchScript exporter takes a float64 of rank 0 for a Python
        # number and makes float32 of it, which rounds the sum before it is divided, or overflows.
        row = record("Reshape", [result, record("Constant", [], value_ints=[1, -1])])
        total = _replay(record, f"{wide}RowSum", [row])
        if spec.reduction == "mean":
            # RowMean is not used: of two Flattens of one value the dynamo exporter's optimiser
            # makes an invalid model (onnxscript 0.7).
            count = record("Cast", [record("Size", [result])], to=TensorProto.DOUBLE)
            total = record("Div", [total, count])
        result = record("Squeeze", [total, record("Constant", [], value_ints=[0])])
        is_narrow = spec.dtype != "float64"  # the wide sums are float64
    return record("Cast", [result], to=ELEMENT_TYPE[spec.dtype]) if is_narrow else result


def _replay(record: Recorder, function: str, inputs: Sequence[Any]) -> Any:
    """Record the body of a function, and of those it calls."""
    body = function_closure([function])[-1]
    values = dict(zip(body.input, inputs, strict=True))
    for node in body.node:
        given = [values[name] for name in node.input]
        if node.domain == f.DOMAIN:
            values[node.output[0]] = _replay(record, node.op_type, given)
            continue
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        values[node.output[0]] = record(node.op_type, given, **attributes)
    return values[body.output[0]]
