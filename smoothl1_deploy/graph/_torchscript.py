"""`register_torchscript_symbolic`: the losses inside `torch.onnx.export(dynamo=False)`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnx import TensorProto, numpy_helper
from torch.onnx import symbolic_helper, symbolic_opset9
from torch.onnx.utils import register_custom_op_symbolic, unregister_custom_op_symbolic

from .._model import DTYPE_OF_ELEMENT, ELEMENT_TYPE
from ..errors import require
from ._torch_losses import checked_dtype, record_absolute, record_huber, record_smooth_l1

#: The opsets of the TorchScript exporter that the losses are registered for: ReduceSum takes its
#: axes as an input from 13 on, and the exporter ends at 20.
OPSETS = range(13, 21)


class Registration(contextlib.ExitStack):
    """What `register_torchscript_symbolic` did, to be undone; a context manager."""

    def undo(self) -> None:
        """Register again what was there before; a second call does nothing."""
        self.close()


def register_torchscript_symbolic() -> Registration:
    """Teach `torch.onnx.export(dynamo=False)` the losses of `torch.nn`, for opsets 13 to 20.

    Without it the export of `aten::smooth_l1_loss`, `aten::huber_loss` and `aten::l1_loss` ends
    in `UnsupportedOperatorError`. With it `nn.SmoothL1Loss`, `nn.HuberLoss`, `nn.L1Loss` and
    their functions become this package's graph; `translation_table` says what that gives. A
    bfloat16 tensor is broadcast as float32: ONNX Runtime's CPU provider can't expand it otherwise.

    Registers for the whole process. Registering again where it is registered changes nothing, and
    undoing that changes nothing.

    Returns:
        A `Registration`: `undo()`, or the end of `with`, restores what was there before, symbolic
        functions of your own for the same operators too.

    Raises:
        MissingDependencyError: with a PyTorch that keeps its registry elsewhere, as 2.8 does.

    Raises (by the export):
        SpecError: on a negative beta, a delta <= 0, and integral inputs, as PyTorch refuses them.

    >>> import io, warnings
    >>> pair, file = (torch.ones(3), torch.zeros(3)), io.BytesIO()
    >>> with register_torchscript_symbolic(), warnings.catch_warnings(action="ignore"):
    ...     torch.onnx.export(torch.nn.SmoothL1Loss(), pair, file, dynamo=False)
    """
    done = Registration()
    for name, function in _SYMBOLIC.items():
        for opset in OPSETS:
            present = _registered(name, opset)
            if present is not function:
                register_custom_op_symbolic(name, function, opset)
                done.callback(_restore, name, opset, present)
    return done


def _restore(name: str, opset: int, before: Callable[..., Any] | None) -> None:
    """Register what was there `before`, or nothing.

    Unregistering the last of an operator leaves an empty entry (torch 2.13), where an export would
    end in `min() arg is an empty sequence` and not in UnsupportedOperatorError.
    """
    if before is not None:
        register_custom_op_symbolic(name, before, opset)
    elif _registered(name, opset) is not None:
        unregister_custom_op_symbolic(name, opset)
        if not _registry().get_function_group(name)._functions:
            del _registry()._registry[name]


def _registry() -> Any:
    """PyTorch's own registry of symbolic functions; before torch 2.9 it lay elsewhere."""
    module = "torch.onnx._internal.torchscript_exporter.registration"
    purpose = f"register_torchscript_symbolic, with torch {torch.__version__},"
    return require(module, "torch", purpose).registry


def _registered(name: str, opset: int) -> Callable[..., Any] | None:
    """The custom function registered for exactly this opset; PyTorch has no public way to ask."""
    group = _registry().get_function_group(name)
    if group is None or not group._functions.overridden(opset):
        return None
    found: Callable[..., Any] = group._functions[opset]
    return found


@symbolic_helper.parse_args("v", "v", "i", "f")
def _smooth_l1_loss(g: Any, self: Any, target: Any, reduction: int, beta: float) -> Any:
    return _recorded(g, record_smooth_l1, self, target, reduction, beta)


@symbolic_helper.parse_args("v", "v", "i", "f")
def _huber_loss(g: Any, self: Any, target: Any, reduction: int, delta: float) -> Any:
    return _recorded(g, record_huber, self, target, reduction, delta)


@symbolic_helper.parse_args("v", "v", "i")
def _l1_loss(g: Any, self: Any, target: Any, reduction: int) -> Any:
    if not any(_element(value) in DTYPE_OF_ELEMENT for value in (self, target)):
        return record_absolute(_Recorder(g), self, target, reduction)
    return _recorded(g, record_smooth_l1, self, target, reduction, 0.0)


def _broadcast_tensors(g: Any, self: Any) -> Any:
    narrow = symbolic_helper._unpack_list(self)
    wide = g.op("prim::ListConstruct", *(_widened(g, value) for value in narrow))
    expanded = symbolic_helper._unpack_list(symbolic_opset9.broadcast_tensors(g, wide))
    pairs = zip(expanded, narrow, strict=True)
    return g.op("prim::ListConstruct", *(_narrowed(g, *pair) for pair in pairs))


def _expand(g: Any, self: Any, *size: Any) -> Any:
    return _narrowed(g, symbolic_opset9.expand(g, _widened(g, self), *size), self)


def _expand_as(g: Any, self: Any, other: Any) -> Any:
    return _narrowed(g, symbolic_opset9.expand_as(g, _widened(g, self), other), self)


def _widened(g: Any, value: Any) -> Any:
    """`value` as float32 where it is bfloat16, which ONNX Runtime can neither expand nor add up."""
    return _Recorder(g)("Cast", [value], to=TensorProto.FLOAT) if _is_bfloat16(value) else value


def _narrowed(g: Any, made: Any, value: Any) -> Any:
    """What was made of `value` widened, in the dtype of `value`."""
    return _Recorder(g)("Cast", [made], to=TensorProto.BFLOAT16) if _is_bfloat16(value) else made


def _is_bfloat16(value: Any) -> bool:
    types = torch.onnx.JitScalarType  # type: ignore[attr-defined]
    return bool(types.from_value(value, types.UNDEFINED) == types.BFLOAT16)


_SYMBOLIC: dict[str, Callable[..., Any]] = {
    "aten::broadcast_tensors": _broadcast_tensors,
    "aten::expand": _expand,
    "aten::expand_as": _expand_as,
    "aten::smooth_l1_loss": _smooth_l1_loss,
    "aten::huber_loss": _huber_loss,
    "aten::l1_loss": _l1_loss,
}


def _recorded(
    g: Any, loss: Callable[..., Any], input: Any, target: Any, reduction: int, knee: float
) -> Any:
    record = _Recorder(g)
    dtype = _promoted_dtype(input, target)
    elements = [_element(value) for value in (input, target)]
    operands = _before_broadcast(record, input, target)
    ranks = [symbolic_helper._get_tensor_rank(value) for value in operands]
    if ranks == [0, 0]:  # which the exporter would take for Python numbers
        one = record("Constant", [], value_ints=[1])
        operands = [record("Reshape", [value, one]) for value in operands]
    wanted = ELEMENT_TYPE[dtype]
    operands = [
        value if element == wanted else record("Cast", [value], to=wanted)
        for value, element in zip(operands, elements, strict=True)
    ]
    result = loss(record, *operands, dtype, reduction, knee)
    if ranks == [0, 0] and not reduction:  # which is PyTorch's number for none
        result = record("Squeeze", [result, record("Constant", [], value_ints=[0])])
    return result


def _kind(value: Any) -> Any:
    return torch.onnx.JitScalarType.from_value(value)  # type: ignore[attr-defined]


def _element(value: Any) -> int:
    """The ONNX element type of a value of the TorchScript graph."""
    return int(_kind(value).onnx_type())


def _promoted_dtype(*operands: Any) -> str:
    """The name of their common dtype, as PyTorch promotes tensors of one rank."""
    dtypes = [_kind(value).dtype() for value in operands]
    return checked_dtype(str(torch.promote_types(*dtypes)).removeprefix("torch."))


def _before_broadcast(record: _Recorder, *pair: Any) -> Sequence[Any]:
    """The pair that `torch.broadcast_tensors` was called with; the pair itself elsewhere.

    The exporter broadcasts by adding the two up to learn their shape; Sub broadcasts by itself.
    Recognised by that sum: it is expanded to in both, and is 0 + a + b of just these two. What was
    cast after that, by autocast too, is cast so before it.
    """
    sources, shapes, casts = [], [], []
    for value in pair:
        node = value.node()
        elements: list[int] = []
        while node.kind() == "onnx::Cast":
            elements.insert(0, node.i("to"))
            node = next(node.inputs()).node()
        if node.kind() != "onnx::Expand":
            return pair
        source, size = node.inputs()
        sources.append(source)
        shapes.append(size.node())
        casts.append(elements)
    if any(shape.kind() != "onnx::Shape" for shape in shapes):
        return pair
    total, other = (next(shape.inputs()) for shape in shapes)
    if total.debugName() != other.debugName():
        return pair
    for source in sources[::-1]:
        if total.node().kind() != "onnx::Add":
            return pair
        total, term = total.node().inputs()
        if term.debugName() != source.debugName():
            return pair
    for i, elements in enumerate(casts):
        for element in elements:
            sources[i] = record("Cast", [sources[i]], to=element)
    return sources


class _Recorder:
    """Adds operators to a graph of TorchScript, where attributes carry their kind in their name."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def __call__(self, op: str, inputs: Sequence[Any], /, **attributes: Any) -> Any:
        if op == "Constant":
            return self._graph.op(op, value_t=_tensor(*attributes.values()))
        return self._graph.op(op, *inputs, **{f"{name}_i": n for name, n in attributes.items()})


def _tensor(value: Any) -> torch.Tensor:
    """The value of a Constant: a TensorProto, a float (float32) or integers (int64)."""
    if isinstance(value, TensorProto):
        return torch.from_numpy(numpy_helper.to_array(value).copy())
    kind = torch.float32 if isinstance(value, float) else torch.int64
    return torch.tensor(value, dtype=kind)
