"""`attach`: graft the loss onto a model that has the prediction already."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.shape_inference
import onnx.version_converter
from onnx import TensorProto, helper, numpy_helper

from ..errors import ArtefactError, SpecError
from ..spec import LossSpec
from .elements import DTYPE_OF_ELEMENT, ELEMENT_TYPE
from .metadata import forget_spec
from .shapes import Shape, broadcast, summed_axes

__all__ = ["ATTACHED", "attach", "float_dtype_of"]

#: The metadata entry that lists what was attached.
ATTACHED = "smoothl1_deploy.attached"

_SHOWN = 20  # candidate tensors in an error
_SMALL = 1024  # bytes of an initialiser that shape inference may need the values of
_WIDENS = {("float16", "float32"), ("bfloat16", "float32")} | {
    (narrow, "float64") for narrow in ("float16", "bfloat16", "float32")
}


@dataclass(frozen=True, slots=True)
class _Tensor:
    """What is known of a tensor: None for an element type or a shape that nothing tells."""

    name: str
    element: int | None = None
    shape: Shape | None = None


def attach(
    model: onnx.ModelProto,
    prediction: str,
    target: str | np.ndarray[Any, Any],
    spec: LossSpec | None = None,
    *,
    weight: str | np.ndarray[Any, Any] | None = None,
    loss_name: str = "loss",
    only_loss: bool = False,
    route: str = "function",
    convert_opset: bool = False,
) -> onnx.ModelProto:
    """A copy of `model` that also computes the loss of one of its tensors.

    Nodes are added after the model's own, which stay as they are. Attach again for a second loss.

    Args:
        model: any ONNX model of opset 13 or newer.
        prediction: a tensor of its main graph: output, input or internal; float of any width.
        target: another tensor of it; or the name of an input to add, in the prediction's shape;
            or an array, to be a constant. Integers and narrower floats become the spec's dtype.
        spec: None means the mean with beta 1 in the prediction's dtype. An input `beta` is added
            for `runtime_beta`, an input `grad_output` for `upstream`.
        weight: for a spec with a weight; like `target`.
        loss_name: of the output (`grad_input` for the gradient); numbered where it is taken.
        only_loss: drop the other outputs, and the nodes and inputs that only they need.
        route: `"function"` adds a node of the domain `smoothl1_deploy`; `"inlined"` plain ones.
        convert_opset: convert a model whose opset is older than 13.

    Raises:
        SpecError: on a name that no tensor has (close matches first), shapes that can't be
            broadcast, and a dtype that would lose precision.
        ArtefactError: on a model whose opset is too old.
    """
    if route not in ("function", "inlined"):
        raise SpecError(f"unknown route {route!r} to attach by; choose function or inlined")
    grafted = onnx.ModelProto()
    grafted.CopyFrom(model)
    forget_spec(grafted)
    opset = _opset(grafted)
    if opset < 13 and convert_opset:
        grafted = onnx.version_converter.convert_version(grafted, 18)
        opset = 18
    graft = _Graft(grafted, prediction, spec)
    roles = {"input": graft.prediction, "target": graft.operand("target", target)}
    if graft.spec.weight:
        if weight is None:
            raise SpecError("the spec has a weight; say which tensor or array it is with weight=")
        roles["weight"] = graft.operand("weight", weight)
    elif weight is not None:
        raise SpecError("weight= for a spec without one; write LossSpec(weight='count')")
    functions = graft.add(roles, loss_name, opset, only_loss)
    if route == "inlined":
        names = [(function.domain, function.name) for function in functions]
        grafted = onnx.inliner.inline_selected_functions(grafted, names)
    return grafted


def _opset(model: onnx.ModelProto) -> int:
    return max((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), default=1)


class _Graft:
    """The state of one attachment: the model, its tensors, and the names that are free."""

    def __init__(self, model: onnx.ModelProto, prediction: str, spec: LossSpec | None) -> None:
        self.model = model
        self._tensors = _tensors(model)
        self._taken = set(_all_names(model.graph))
        found = self._known("prediction", prediction)
        dtype = DTYPE_OF_ELEMENT.get(found.element or 0)
        if found.element is not None and dtype is None:
            kind = TensorProto.DataType.Name(found.element)
            raise SpecError(f"the prediction {prediction!r} is {kind}; a loss needs a float tensor")
        if spec is None and dtype is None:
            raise SpecError(
                f"the element type of {prediction!r} can't be inferred; say it with spec="
                "LossSpec(dtype=...)"
            )
        self.spec = spec if spec is not None else LossSpec(dtype=str(dtype))
        self._prediction = found
        self._prefix = ""
        self._nodes: list[onnx.NodeProto] = []
        self.prediction = self._in_dtype("prediction", found)

    def _known(self, what: str, name: str) -> _Tensor:
        if name in self._tensors:
            return self._tensors[name]
        names = list(self._tensors)
        close = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
        listed = [*close, *(other for other in reversed(names) if other not in close)]
        more = f", and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
        raise SpecError(
            f"the model has no tensor {name!r} to be the {what}; it has "
            f"{', '.join(map(repr, listed[:_SHOWN]))}{more}"
        )

    def operand(self, what: str, given: str | np.ndarray[Any, Any]) -> _Tensor:
        """The tensor that a target or weight is: an existing one, a new input, or a constant."""
        if isinstance(given, str):
            if given in self._tensors:
                return self._in_dtype(what, self._tensors[given])
            if not given:
                raise SpecError(f"the {what} has an empty name")
            element, shape = ELEMENT_TYPE[self.spec.dtype], self._prediction.shape
            self.model.graph.input.append(helper.make_tensor_value_info(given, element, shape))
            self._taken.add(given)
            return _Tensor(given, element, shape)
        array = np.ascontiguousarray(given).reshape(np.shape(given))
        try:
            tensor = numpy_helper.from_array(array, self._free(what))
        except (TypeError, ValueError, NotImplementedError, KeyError) as exc:
            raise SpecError(f"the {what}, an array of {array.dtype}, can't be a constant") from exc
        self.model.graph.initializer.append(tensor)
        return self._in_dtype(what, _Tensor(tensor.name, tensor.data_type, array.shape))

    def _in_dtype(self, what: str, tensor: _Tensor) -> _Tensor:
        """`tensor`, or a cast of it to the spec's dtype where that loses nothing."""
        wanted = self.spec.dtype
        if tensor.element in (None, ELEMENT_TYPE[wanted]):
            return tensor
        dtype = DTYPE_OF_ELEMENT.get(tensor.element or 0)
        kind = TensorProto.DataType.Name(tensor.element)
        if dtype is not None and (dtype, wanted) not in _WIDENS:
            raise SpecError(
                f"the {what} {tensor.name!r} is {dtype}, and {wanted} would lose some of it; "
                f"use LossSpec(dtype={dtype!r})"
            )
        if dtype is None and (
            what == "prediction" or kind in ("STRING", "COMPLEX64", "COMPLEX128")
        ):
            raise SpecError(f"the {what} {tensor.name!r} is {kind}; a loss needs float tensors")
        name = self._free(f"{tensor.name}_{wanted}")
        element = ELEMENT_TYPE[wanted]
        self._nodes.append(helper.make_node("Cast", [tensor.name], [name], name=name, to=element))
        return replace(tensor, name=name, element=element)

    def _free(self, name: str) -> str:
        """`name`, or `name_1`, `name_2`, ... where it is taken."""
        free, number = name, 0
        while free in self._taken:
            number += 1
            free = f"{name}_{number}"
        self._taken.add(free)
        return free

    def add(
        self, roles: dict[str, _Tensor], loss_name: str, opset: int, only_loss: bool
    ) -> list[onnx.FunctionProto]:
        """Append nodes, functions, inputs and outputs; gives the functions."""
        from . import functions as f
        from .assemble import Assembly, function_closure

        spec, graph = self.spec, self.model.graph
        losses = _broadcast(roles)
        if spec.per_sample and losses == ():
            raise SpecError("per_sample needs an axis of samples; the prediction has rank 0")
        names = {role: tensor.name for role, tensor in roles.items()}
        if spec.runtime_beta:
            names["beta"] = self._free("beta")
            beta = helper.make_tensor_value_info(names["beta"], TensorProto.FLOAT, ())
            graph.input.append(beta)
        reduced = self._reduced_shape(losses)
        if spec.upstream:
            names["grad_output"] = self._free("grad_output")
            element = ELEMENT_TYPE[spec.dtype]
            value = helper.make_tensor_value_info(names["grad_output"], element, reduced)
            graph.input.append(value)
        outputs = {"loss": self._free(loss_name)}
        if spec.gradient:
            outputs["grad_input"] = self._free("grad_input")
        axes = summed_axes(*(tensor.shape for tensor in roles.values()))
        prefix = self._free_prefix(outputs["loss"])
        assembly = Assembly(spec, {**names, **outputs}, summed_axes=axes, prefix=prefix)
        functions = function_closure(assembly.used)
        oldest = 14 if _needs_allowzero(functions, assembly.nodes) else 13
        if opset < oldest:
            raise ArtefactError(
                f"the model is of opset {opset}, and this loss needs {oldest}; convert it with "
                "convert_opset=True (--convert-opset), or onnx.version_converter"
            )
        self._add_functions(functions, opset)
        if not any(entry.domain == f.DOMAIN for entry in self.model.opset_import):
            self.model.opset_import.append(helper.make_opsetid(f.DOMAIN, f.DOMAIN_VERSION))
        self.model.ir_version = max(self.model.ir_version, 8)  # the first with functions
        graph.node.extend([*self._nodes, *assembly.nodes])
        self._add_outputs(outputs, reduced, only_loss)
        self._note(names, outputs)
        return functions

    def _free_prefix(self, name: str) -> str:
        prefix, number = f"{name}/", 0
        while any(other.startswith(prefix) for other in self._taken):
            number += 1
            prefix = f"{name}_{number}/"
        return prefix

    def _add_functions(self, functions: list[onnx.FunctionProto], opset: int) -> None:
        """The bodies mean the same in every opset from 13 on: they take the model's."""
        present = {(function.domain, function.name) for function in self.model.functions}
        for function in functions:
            if (function.domain, function.name) in present:
                continue
            copy = self.model.functions.add()
            copy.CopyFrom(function)
            for entry in copy.opset_import:
                if entry.domain == "":
                    entry.version = opset

    def _reduced_shape(self, losses: Shape | None) -> Shape | None:
        """The shape of the loss, where that of the element losses is `losses`."""
        if self.spec.per_sample:
            return None if losses is None else losses[:1]
        return losses if self.spec.reduction == "none" else ()

    def _add_outputs(self, outputs: dict[str, str], shape: Shape | None, only: bool) -> None:
        spec, graph = self.spec, self.model.graph
        if only:
            del graph.output[:]
        element = ELEMENT_TYPE[spec.dtype]
        graph.output.append(helper.make_tensor_value_info(outputs["loss"], element, shape))
        if spec.gradient:
            like = self._prediction.shape
            graph.output.append(helper.make_tensor_value_info(outputs["grad_input"], element, like))
        if only:
            _prune(graph)

    def _note(self, names: dict[str, str], outputs: dict[str, str]) -> None:
        properties = {entry.key: entry.value for entry in self.model.metadata_props}
        attached = json.loads(properties.get(ATTACHED, "[]"))
        attached.append({"spec": self.spec.to_dict(), "inputs": names, "outputs": outputs})
        properties[ATTACHED] = json.dumps(attached, sort_keys=True)
        helper.set_model_props(self.model, properties)


def _broadcast(roles: dict[str, _Tensor]) -> Shape | None:
    """The shape of the element losses; None where a rank is unknown."""
    full: Shape | None = roles["input"].shape
    for role, tensor in roles.items():
        if full is None or tensor.shape is None:
            return None
        try:
            full = broadcast(full, tensor.shape)
        except SpecError as exc:
            raise SpecError(
                f"the prediction has the shape {roles['input'].shape}, the {role} {tensor.name!r} "
                f"{tensor.shape}: {exc}"
            ) from exc
    return full


def _needs_allowzero(functions: list[onnx.FunctionProto], nodes: list[onnx.NodeProto]) -> bool:
    every = [*nodes, *(node for function in functions for node in function.node)]
    return any(attribute.name == "allowzero" for node in every for attribute in node.attribute)


def _all_names(graph: onnx.GraphProto) -> Iterator[str]:
    """Every tensor and node name, those of subgraphs too."""
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        yield value.name
    for sparse in graph.sparse_initializer:
        yield sparse.values.name
    for node in graph.node:
        yield node.name
        yield from node.input
        yield from node.output
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _all_names(subgraph)


def _skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its big initialisers as inputs: what shape inference needs, and no more."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    big = [t for t in graph.initializer if t.ByteSize() > _SMALL or t.external_data]
    known = {value.name for value in graph.input}
    for tensor in big:
        if tensor.name not in known:
            value = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            graph.input.append(value)
    kept = [tensor for tensor in graph.initializer if tensor not in big]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return copy


def _tensors(model: onnx.ModelProto) -> dict[str, _Tensor]:
    """Every tensor of the main graph, with what shape inference tells of it."""
    skeleton = _skeleton(model)
    try:
        graph = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        graph = skeleton.graph  # custom operators, or a model that contradicts itself
    found: dict[str, _Tensor] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.HasField("tensor_type"):
            found[value.name] = _tensor(value)
    names = [value.name for value in (*graph.input, *graph.initializer)]
    names += [name for node in graph.node for name in node.output if name]
    for tensor in graph.initializer:
        found[tensor.name] = _Tensor(tensor.name, tensor.data_type, tuple(tensor.dims))
    # Sequences and the like are no candidates; what inference can't tell still is one.
    others = {v.name for v in (*graph.input, *graph.value_info, *graph.output)} - set(found)
    return {name: found.get(name, _Tensor(name)) for name in names if name not in others}


def _tensor(value: onnx.ValueInfoProto) -> _Tensor:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return _Tensor(value.name, tensor.elem_type or None)
    dims = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{value.name}_axis_{i}"
        for i, dim in enumerate(tensor.shape.dim)
    )
    return _Tensor(value.name, tensor.elem_type or None, dims)


def _prune(graph: onnx.GraphProto) -> None:
    """Drop the nodes, inputs and initialisers that no output needs."""
    needed = {value.name for value in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed.update(node.input)
            for attribute in node.attribute:
                for subgraph in (attribute.g, *attribute.graphs):
                    needed.update(_all_names(subgraph))
    for field, items in (
        (graph.node, kept[::-1]),
        (graph.input, [value for value in graph.input if value.name in needed]),
        (graph.initializer, [value for value in graph.initializer if value.name in needed]),
        (graph.value_info, [value for value in graph.value_info if value.name in needed]),
    ):
        chosen = list(items)
        del field[:]
        field.extend(chosen)


def float_dtype_of(model: onnx.ModelProto, name: str) -> str | None:
    """The dtype of a float tensor of the main graph; None where nothing tells it."""
    tensor = _tensors(model).get(name)
    return None if tensor is None else DTYPE_OF_ELEMENT.get(tensor.element or 0)
