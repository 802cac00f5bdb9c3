"""`translation_table`: this package's losses inside `torch.onnx.export(dynamo=True)`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import ir
from onnxscript import opset18 as op

from .._model import DTYPE_OF_ELEMENT, ELEMENT_TYPE
from ._torch_losses import checked_dtype, record_absolute, record_huber, record_smooth_l1


def translation_table() -> dict[Any, Callable[..., Any]]:
    """The table for `torch.onnx.export(..., dynamo=True, custom_translation_table=...)`.

    Whatever the exported module calls of `nn.SmoothL1Loss`, `F.smooth_l1_loss`, `nn.HuberLoss`,
    `F.huber_loss`, `nn.L1Loss` and `F.l1_loss` becomes this package's graph: reductions in
    float64, the mean of nothing NaN, float16 and bfloat16 computed in float32 and rounded once,
    the dtype of the result PyTorch's. Right with the exporter's `optimize` on and off, whose
    rules drop a division by a beta within 1e-5 of 1; with dynamic shapes; in strict and
    non-strict export.

    A new dictionary each time, which changes nothing outside of the one export it is given to;
    `table | {...}` joins it with entries of your own.

    Warns of a program that was decomposed before (`run_decompositions`): there is no loss left in
    it to replace.

    Raises (inside the exporter's own error):
        SpecError: on a negative beta, a delta <= 0, and integral inputs, as PyTorch refuses them.

    >>> module, pair = torch.nn.SmoothL1Loss().eval(), (torch.ones(3), torch.zeros(3))
    >>> options = {"dynamo": True, "custom_translation_table": translation_table()}
    >>> program = torch.onnx.export(module, pair, verbose=False, **options)
    >>> len(program.model_proto.graph.output)
    1
    """
    return {
        torch.ops.aten.smooth_l1_loss.default: _smooth_l1_loss,
        torch.ops.aten.huber_loss.default: _huber_loss,
        # smooth_l1_loss with beta = 0 reaches the exporter as this.
        torch.ops.aten.l1_loss.default: _l1_loss,
        # No loss: what is left of one in a program that was decomposed before.
        torch.ops.aten.abs.default: _abs,
    }


def _smooth_l1_loss(self: Any, target: Any, reduction: int = 1, beta: float = 1.0) -> Any:
    (self, target), dtype = _promoted(self, target)
    loss = record_smooth_l1(_record, self, target, dtype, reduction, beta)
    return _typed(loss, dtype)


def _huber_loss(self: Any, target: Any, reduction: int = 1, delta: float = 1.0) -> Any:
    (self, target), dtype = _promoted(self, target)
    loss = record_huber(_record, self, target, dtype, reduction, delta)
    return _typed(loss, dtype)


def _l1_loss(self: Any, target: Any, reduction: int = 1) -> Any:
    if int(self.dtype) not in DTYPE_OF_ELEMENT:
        return record_absolute(_record, self, target, reduction)
    return _smooth_l1_loss(self, target, reduction, 0.0)


def _abs(self: Any) -> Any:
    """PyTorch's abs, and a warning where it is that of a loss, whose decompositions all have one.

    What function of torch an operator was made for, the program keeps when it is decomposed, and
    saved and loaded too.
    """
    node = self.producer()
    made_for = None if node is None else node.meta.get("node")
    name = "" if made_for is None else made_for.meta.get("torch_fn", ("",))[0]
    loss = re.match("smooth_l1_loss|huber_loss|l1_loss", name)
    if loss:
        warnings.warn(
            f"the program has its {loss[0]} in plain operators: it was decomposed before "
            "(run_decompositions), and translation_table() finds no loss to replace. The exported "
            "loss is PyTorch's decomposition, whose sums drift and whose beta near 1 is dropped; "
            "give torch.onnx.export the module, or the program as torch.export.export made it",
            stacklevel=2,
        )
    return op.Abs(self)


def _record(name: str, inputs: Sequence[Any], /, **attributes: Any) -> Any:
    return getattr(op, name)(*inputs, **attributes)


def _promoted(*operands: Any) -> tuple[list[Any], str]:
    """The operands as they were before the exporter's type promotion, and the result's dtype.

    Its rule for these losses casts half tensors to float32, computes there and casts back, but
    forgets the last where the loss is an output of the model (torch 2.13). Undone here, the
    loss has PyTorch's dtype everywhere; casts to what it is already stay behind.
    """
    element = operands[0].dtype
    dtype = checked_dtype(DTYPE_OF_ELEMENT.get(int(element), element.name))
    for value in operands:
        _widen(value)
    sources = [_before_promotion(value) for value in operands]
    floats = {int(value.dtype) for value in sources} & set(DTYPE_OF_ELEMENT)
    own = DTYPE_OF_ELEMENT[floats.pop()] if len(floats) == 1 else dtype
    if own == dtype:
        return list(operands), dtype
    # Integers too become the half format first, as PyTorch has it.
    element = ELEMENT_TYPE[own]
    cast = [v if int(v.dtype) == element else op.Cast(v, to=element) for v in sources]
    return cast, own


def _before_promotion(value: Any) -> Any:
    """What the exporter's type promotion cast to `value`; `value` where it did not."""
    node = value.producer()
    if node is None or node.op_type != "Cast":
        return value
    made_by = node.metadata_props.get("pkg.torch.onnx.fx_node", "")
    return node.inputs[0] if "prims.convert_element_type" in made_by else value


def _widen(value: Any) -> None:
    """Let every Expand of bfloat16 that `value` comes from be one of float32 and a cast back.

    ONNX Runtime's CPU provider has none of bfloat16. It becomes so in its place and not beside it:
    without the exporter's optimiser nobody takes away what nothing reads.
    """
    while (node := value.producer()) is not None and node.op_type in ("Cast", "Expand"):
        value = node.inputs[0]
        if node.op_type == "Expand" and node.outputs[0].dtype == ir.DataType.BFLOAT16:
            wide = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
            expand = ir.node("Expand", [*wide.outputs, node.inputs[1]])
            for made, like in ((wide, value), (expand, node.outputs[0])):
                made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
                made.outputs[0].shape = like.shape
            node.prepend([wide, expand])
            node.op_type = "Cast"
            node.attributes.add(ir.AttrInt64("to", ir.DataType.BFLOAT16))
            node.resize_inputs(1)
            node.replace_input_with(0, expand.outputs[0])


def _typed(result: Any, dtype: str) -> Any:
    """`result` declared as what it is: left open, the exporter declares its own promotion's."""
    result.dtype = ir.DataType(ELEMENT_TYPE[dtype])
    return result
