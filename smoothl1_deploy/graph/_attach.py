"""`attach`: graft the loss onto a model that has the prediction already."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.utils
import onnx.version_converter
from onnx import helper, numpy_helper

from .._dlpack import as_array
from .._model import (
    ATTACHED,
    DTYPE_OF_ELEMENT,
    ELEMENT_TYPE,
    MODEL_ERRORS,
    Loss,
    Tensor,
    axes_of,
    check_engines,
    check_trust,
    correct,
    element_name,
    every_node,
    inputs_of,
    main_tensors,
    metadata_of,
    note_attached,
    opset_of,
    read_attached,
    subgraphs,
    value_names,
)
from .._shapes import Dim, Shape, broadcast, check_shape, summed_axes
from .._spec import LossSpec
from ..errors import ArtefactError, ModelWarning, SpecError
from ._metadata import forget_spec, is_served, read_spec, stamp

_SHOWN = 20  # candidate tensors in an error
_PARSED = 2**31 - 1  # bytes that protobuf reads in one message
_WIDENS = {("float16", "float32"), ("bfloat16", "float32")} | {
    (narrow, "float64") for narrow in ("float16", "bfloat16", "float32")
}


def attach(
    model: onnx.ModelProto,
    prediction: str,
    target: str | np.ndarray[Any, Any],
    spec: LossSpec | None = None,
    *,
    weight: str | np.ndarray[Any, Any] | None = None,
    mask: str | np.ndarray[Any, Any] | None = None,
    target_shape: Sequence[Dim] | None = None,
    loss_name: str = "loss",
    only_loss: bool = False,
    route: str = "function",
    convert_opset: bool = False,
) -> onnx.ModelProto:
    """A copy of `model` that also computes the loss of one of its tensors.

    Nodes are added after the model's own, which stay as they are but for one name: an output that
    is read here and that a DequantizeLinear gives comes out of a Sum behind it. Initialisers of a
    model of IR 3 or older are no longer listed as inputs, and so stay constants. With outputs,
    inputs and constants for operands, the outputs that were there keep their bits under ONNX
    Runtime's optimiser too. Attach again for a second loss.

    Args:
        model: any ONNX model of opset 13 or newer. Weights beside its file may stay there
            (`onnx.load(path, load_external_data=False)`), which spares their memory; the result
            names the same files.
        prediction: a tensor of its main graph: output, input or internal; float of any width.
        target: another tensor of it; or the name of an input to add, in the prediction's shape;
            or an array, to be a constant. Integers and narrower floats become the spec's dtype.
            An axis whose size or name the model's inputs don't tell is one of the target's own.
        spec: None means the mean with beta 1 in the prediction's dtype. An input `beta` is added
            for `runtime_beta`, and inputs `divisor` and `grad_output` where it has them.
        weight: the weight of a spec that has one; given like `target`.
        mask: the mask of a spec that has one, likewise: of booleans, or of integers of which those
            that aren't 0 select.
        target_shape: the shape of an input to add as the target, where it isn't the prediction's
            or nobody knows that: integers, and names for dynamic axes.
        loss_name: the name of the output (the gradient's is `grad_input`); numbered where taken.
        only_loss: drop the other outputs, and the nodes and inputs that only they need.
        route: `"function"` adds a node of the domain `smoothl1_deploy`; `"inlined"` plain ones.
        convert_opset: convert a model whose opset the loss can't be computed in to the lowest
            that it can, 13 or, for some gradients, 14; the model's functions are then put in the
            places where they are called.

    Raises:
        InvalidInputError: on a constant that is no array, or has no data.
        SpecError: on a name that no tensor has (close matches first), a target that is the
            prediction, shapes that can't be broadcast, a shape of a target that is there already,
            and a dtype that would lose precision.
        ArtefactError: on a model whose opset is too old, that has a function of our name and
            another content, or with more than 2 GB in memory where a step can't take them.

    Warns:
        ModelWarning: where the model declares a shape that its nodes contradict; the nodes are
            believed, and the result declares what they make.

    >>> import onnx.parser
    >>> graph = "g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }"
    >>> model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {graph}')
    >>> scored = attach(model, "y", "target", LossSpec(0.5))
    >>> [v.name for v in scored.graph.input], [v.name for v in scored.graph.output]
    (['x', 'target'], ['y', 'loss'])
    """
    if str(route) not in ("function", "inlined"):
        raise SpecError(f"unknown route {route!r} to attach by; choose function or inlined")
    if not isinstance(model, onnx.ModelProto):
        raise ArtefactError(
            f"expected an onnx.ModelProto, got {type(model).__name__}; read it with onnx.load(path)"
        )
    if spec is not None and not isinstance(spec, LossSpec):
        raise SpecError(f"spec must be a LossSpec, got {type(spec).__name__}")
    check_trust(model)
    check_engines(model, "a loss can only be attached to the graph that it was built from")
    _check_name("loss", loss_name)
    if isinstance(target, str) and target == str(prediction):  # an array compares its elements
        raise SpecError(
            f"the target {target!r} is the prediction itself, and such a loss is 0 whatever the "
            "model computes; name another tensor, or a new input"
        )
    target_shape = check_shape(target_shape, "target_shape")
    inlined = str(route) == "inlined"
    while True:
        grafted = onnx.ModelProto()
        grafted.CopyFrom(model)
        forget_spec(grafted)
        try:
            graft = _Graft(grafted, prediction, spec)
            roles = graft.roles(target, target_shape, {"weight": weight, "mask": mask})
            functions = graft.add(roles, loss_name, only_loss, inlined)
            break
        except OldOpsetError as old:  # which opset it has to be, only the finished loss tells
            if not convert_opset:
                raise
            model = converted(model, old.needed)
    if graft.contradiction is not None:
        warnings.warn(graft.contradiction, ModelWarning, stacklevel=2)
    if inlined:
        check_parsed(grafted, "the route 'inlined'")
        names = [(function.domain, function.name) for function in functions]
        grafted = onnx.inliner.inline_selected_functions(grafted, names)
    return grafted


def _check_name(what: str, name: Any) -> None:
    try:
        size = len(name.encode()) if isinstance(name, str) else 0
    except UnicodeEncodeError:  # a lone surrogate: a file name that is no text, for instance
        size = 0
    if not size:
        raise SpecError(f"the {what} can't be called {name!r}; give a name of Unicode characters")


_value = helper.make_tensor_value_info


class _Graft:
    """The state of one attachment: the model, its tensors, and the names that are free."""

    def __init__(self, model: onnx.ModelProto, prediction: str, spec: LossSpec | None) -> None:
        self.model = model
        self._tensors = main_tensors(model)
        self.contradiction = correct(model, self._tensors)
        self._values = set(value_names(model.graph))
        self._taken = self._values | {node.name for node in every_node(model.graph.node)}
        self._named = {dim for value in inputs_of(model) for dim in axes_of(value) or ()}
        found = self._known("prediction", prediction)
        dtype = DTYPE_OF_ELEMENT.get(found.element or 0)
        if found.element is not None and dtype is None:
            kind = element_name(found.element)
            raise SpecError(f"the prediction {prediction!r} is {kind}; a loss needs a float tensor")
        if spec is None and dtype is None:
            raise SpecError(
                f"the element type of {prediction!r} can't be inferred; say it by the "
                "dtype of the loss"
            )
        self.spec = spec if spec is not None else LossSpec(dtype=str(dtype))
        self._prediction = found
        self._new_shape = found.shape  # what inputs that are added get
        self._prefix = ""
        self._nodes: list[onnx.NodeProto] = []
        self.prediction = self._in_dtype("prediction", self._handed_on(found))

    def roles(
        self,
        target: str | np.ndarray[Any, Any],
        target_shape: Shape | None,
        others: dict[str, str | np.ndarray[Any, Any] | None],
    ) -> dict[str, Tensor]:
        """The tensors that the loss is computed of, by what they are to it."""
        roles = {"input": self.prediction, "target": self._operand("target", target, target_shape)}
        for role, given in others.items():
            if (role in self.spec.operands) != (given is not None):
                raise SpecError(
                    f"the spec has a {role}; say which tensor or array it is"
                    if given is None
                    else f"a {role} for a spec without one; give the spec a {role} too"
                )
            if given is not None:
                roles[role] = self._operand(role, given)
        return roles

    def _known(self, what: str, name: str) -> Tensor:
        if not isinstance(name, str):
            raise SpecError(f"the {what} must be the name of a tensor, got {name!r}")
        if name in self._tensors:
            return self._tensors[name]
        if name in self._values:
            raise self._no_tensor(what, name)
        names = list(self._tensors)
        close = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
        listed = [*close, *(other for other in reversed(names) if other not in close)]
        more = f", and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
        raise SpecError(
            f"the model has no tensor {name!r} to be the {what}; it has "
            f"{', '.join(map(repr, listed[:_SHOWN])) or 'none at all'}{more}"
        )

    def _no_tensor(self, what: str, name: str) -> SpecError:
        """What to say of a name that the model knows, but as no tensor of its main graph."""
        graph = self.model.graph
        kinds = {
            value.name: kind.removesuffix("_type").replace("_", " ")
            for value in (*graph.input, *graph.value_info, *graph.output)
            if (kind := value.type.WhichOneof("value")) not in (None, "tensor_type")
        }
        kind = f"of the type {kinds[name]}" if name in kinds else "a sequence or the like"
        near: list[str] = []
        for node in graph.node:
            if name in node.output:
                near = [other for other in node.input if other in self._tensors]
                break
            if name not in kinds and _inside(node, name):
                kind = f"inside a graph of {node.op_type}, where only that can read it"
                near = [other for other in node.output if other in self._tensors]
        instance = f", {' or '.join(map(repr, near))} for instance" if near else ""
        return SpecError(
            f"the {what} {name!r} is no tensor of the main graph but {kind}; name one that is"
            f"{instance}"
        )

    def _handed_on(self, tensor: Tensor) -> Tensor:
        """`tensor`, its bits kept: what a loss reads has a reader more than it had.

        ONNX Runtime (1.31) gives each reader of a DequantizeLinear, and the graph's output, one
        of its own, and fuses int8 operators with the two nodes behind them where there is one
        alone: with a second one the output moves by a quantisation step (bench/NOTES.md). So the
        one reader of such an output becomes a Sum of nothing else, and the loss reads that.
        """
        graph, name = self.model.graph, tensor.name
        if all(name != value.name for value in graph.output) or any(
            name in node.input or _inside(node, name) for node in graph.node
        ):
            return tensor
        for node in graph.node:
            if name in node.output and self._dequantizes(node, name):
                inner = self._free(f"{name}_dequantized")
                node.output[list(node.output).index(name)] = inner
                sum_name = self._free(f"{name}_handed_on")
                self._nodes.append(helper.make_node("Sum", [inner], [name], name=sum_name))
        return tensor

    def _dequantizes(self, node: onnx.NodeProto, output: str) -> bool:
        """Whether a DequantizeLinear gives that output, in a function of the model for instance."""
        for f in self.model.functions:
            if (f.domain, f.name, f.overload) == (node.domain, node.op_type, node.overload):
                inner = dict(zip(node.output, f.output, strict=False)).get(output, "")
                return any(inner in n.output and self._dequantizes(n, inner) for n in f.node)
        return node.op_type == "DequantizeLinear"

    def _operand(
        self, what: str, given: str | np.ndarray[Any, Any], shape: Shape | None = None
    ) -> Tensor:
        """The tensor that a target, weight or mask is: one of the model's, a new input, a constant.

        `shape` is what the caller says of a new input.
        """
        if shape is not None and (not isinstance(given, str) or given in self._tensors):
            raise SpecError(
                f"{what}_shape {shape} for a {what} that has its own; leave {what}_shape out, or "
                "name a new input"
            )
        if isinstance(given, str):
            if given in self._tensors:
                return self._in_dtype(what, self._handed_on(self._tensors[given]))
            _check_name(what, given)
            if given in self._values:
                raise self._no_tensor(what, given)
            element = ELEMENT_TYPE[self.spec.dtype_of(what)]
            if shape is None:
                shape = self._shape_of_new(given)
            elif self._new_shape is None:
                self._new_shape, self._named = shape, self._named | {*shape}
            self.model.graph.input.append(_value(given, element, shape))
            self._taken.add(given)
            # One input may play both parts.
            self._tensors[given] = Tensor(given, element, shape, shape)
            return self._tensors[given]
        array = as_array(given, f"the {what}")
        try:
            tensor = numpy_helper.from_array(array, self._free(what))
        except (TypeError, ValueError, NotImplementedError, KeyError) as exc:
            raise SpecError(f"the {what}, an array of {array.dtype}, can't be a constant") from exc
        self.model.graph.initializer.append(tensor)
        return self._in_dtype(what, Tensor(tensor.name, tensor.data_type, *[array.shape] * 2))

    def _shape_of_new(self, name: str) -> Shape | None:
        """The prediction's shape, in which an axis that no input names is one of its own.

        Where nobody knows it, the shape which the caller gave of another new input.
        """
        return self._new_shape and tuple(
            dim if isinstance(dim, int) or dim in self._named else f"{name}_axis_{i}"
            for i, dim in enumerate(self._new_shape)
        )

    def _in_dtype(self, what: str, tensor: Tensor) -> Tensor:
        """`tensor`, or a cast of it to the spec's dtype where that loses nothing.

        A mask of integers, as tokenizers give it, selects where it isn't 0.
        """
        wanted = self.spec.dtype_of({"prediction": "input"}.get(what, what))
        if tensor.element in (None, ELEMENT_TYPE[wanted]):
            return tensor
        dtype = DTYPE_OF_ELEMENT.get(tensor.element or 0)
        kind = element_name(tensor.element)
        if dtype is not None and wanted == "bool":
            raise SpecError(
                f"the mask {tensor.name!r} is {dtype}, and a mask is of booleans or integers; "
                "numbers that multiply the losses are a weight"
            )
        if dtype is not None and (dtype, wanted) not in _WIDENS:
            raise SpecError(
                f"the {what} {tensor.name!r} is {dtype}, and {wanted} would lose some of it; "
                f"attach a loss of the dtype {dtype}"
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
        self, roles: dict[str, Tensor], loss_name: str, only_loss: bool, inlined: bool
    ) -> list[onnx.FunctionProto]:
        """Append nodes, functions, inputs and outputs; gives the functions."""
        from ._assemble import nodes_of, oldest_opset  # onnxscript takes most of a second

        graph, losses = self.model.graph, self.spec.broadcast_with_betas(_broadcast(roles))
        spec = self.spec if losses is None else self.spec.of_rank(len(losses))
        if spec.per_sample and losses == ():
            raise SpecError("per_sample needs an axis of samples; the prediction has rank 0")
        names = {role: tensor.name for role, tensor in roles.items()}
        reduced, element = spec.loss_shape(losses), ELEMENT_TYPE[spec.dtype]
        for role in spec.inputs[len(names) :]:
            names[role] = self._free(role)
            own = {"grad_output": reduced, "beta": spec.beta_shape}.get(role, ())
            graph.input.append(_value(names[role], ELEMENT_TYPE[spec.dtype_of(role)], own))
        outputs = {"loss": self._free(loss_name)}
        outputs |= {role: self._free(role) for role in spec.outputs[1:]}
        nodes, constants, functions = nodes_of(
            spec,
            {**names, **outputs},
            summed_axes=summed_axes(*(t.certain for t in roles.values()), spec.beta_shape),
            rank=None if losses is None else len(losses),
            prefix=self._free_prefix(outputs["loss"]),
            inlined=inlined,
        )
        graph.initializer.extend(constants)
        needed = oldest_opset([*nodes, *(node for f in functions for node in f.node)])
        if opset_of(self.model) < needed:
            raise OldOpsetError(opset_of(self.model), needed)
        _add_functions(self.model, functions)
        graph.node.extend([*self._nodes, *nodes])
        if only_loss:
            del graph.output[:]
        graph.output.append(_value(outputs["loss"], element, reduced))
        for role in spec.outputs[1:]:
            shape = self._prediction.shape if role == "grad_input" else losses
            graph.output.append(_value(outputs[role], element, shape))
        if only_loss:
            prune(graph)
        note_attached(self.model, Loss(spec, names, outputs))
        return functions

    def _free_prefix(self, name: str) -> str:
        prefix, number = f"{name}/", 0
        while any(other.startswith(prefix) for other in self._taken):
            number += 1
            prefix = f"{name}_{number}/"
        return prefix


def _inside(node: onnx.NodeProto, name: str) -> bool:
    """Whether a graph that `node` holds has that name in it, of its own or read from outside."""
    return any(name in value_names(subgraph) for subgraph in subgraphs(node))


def _broadcast(roles: dict[str, Tensor], certain: bool = False) -> Shape | None:
    """The shape of the element losses; None where a rank is unknown.

    Shapes that are only declared and don't fit together are not refused: what is `certain` decides.
    """
    shapes = {role: each.certain if certain else each.shape for role, each in roles.items()}
    full = shapes["input"]
    for role, shape in shapes.items():
        if full is None or shape is None:
            return None
        try:
            full = broadcast(full, shape)
        except SpecError as exc:
            if not certain:
                return _broadcast(roles, certain=True)
            raise SpecError(
                f"the prediction has the shape {shapes['input']}, the {role} {roles[role].name!r} "
                f"{shape}: {exc}"
            ) from exc
    return full


# What becomes of the model: its opset, its functions, what is dropped


class OldOpsetError(ArtefactError):
    """A model older than `needed`, the lowest opset that has what a loss is made of."""

    def __init__(self, opset: int, needed: int) -> None:
        super().__init__(
            f"the model is of opset {opset}, and this loss needs {needed}; convert it with "
            "convert_opset, or onnx.version_converter"
        )
        self.needed = needed


def _raise_ir(model: onnx.ModelProto) -> None:
    """Make `model` one that may have functions, its constants as constant as they were.

    Before IR 4 every initialiser had to be listed among the inputs. From IR 4 on one that is
    listed may be overridden by the caller, so that no runtime folds it into anything.
    """
    from ._assemble import OLDEST_IR

    if model.ir_version < 4:
        held = (graph for node in every_node(model.graph.node) for graph in subgraphs(node))
        for graph in (model.graph, *held):
            constants = {tensor.name for tensor in graph.initializer}
            fed = [value for value in graph.input if value.name not in constants]
            del graph.input[:]
            graph.input.extend(fed)
    model.ir_version = max(model.ir_version, OLDEST_IR)


def _add_functions(model: onnx.ModelProto, functions: Iterable[onnx.FunctionProto]) -> None:
    """Add the functions that `model` lacks; their bodies mean the same in every opset they allow.

    The IR version becomes the first that has functions, where it is older.

    Raises:
        ArtefactError: when a function of that name is there and computes something else.
    """
    from ._assemble import set_opset
    from ._functions import DOMAIN, DOMAIN_VERSION

    _raise_ir(model)
    opset = opset_of(model)
    if not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
    present = {(function.domain, function.name): function for function in model.functions}
    for function in functions:
        other = present.get((function.domain, function.name))
        if other is None:
            copy = model.functions.add()
            copy.CopyFrom(function)
            set_opset(copy, opset)
        elif _body(other) != _body(function):
            raise ArtefactError(
                f"the model has a function {function.domain}.{function.name} that computes "
                "something else, of another version of smoothl1-deploy perhaps; put it in place "
                "with onnx.inliner.inline_local_functions(model), or attach to the model as it was"
            )


def _body(function: onnx.FunctionProto) -> list[Any]:
    ports = [[*function.input], [*function.output], [*function.attribute]]
    return ports + [
        [n.op_type, n.domain, [*n.input], [*n.output], [str(a) for a in n.attribute]]
        for n in function.node
    ]


def converted(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """`model` in the opset `opset`.

    Its functions are put in the places where they are called: onnx's converter (1.23) drops them.

    Raises:
        ArtefactError: for what the converter can't do, and for more than it can read.
    """
    check_parsed(model, "the conversion of the opset")
    try:
        if model.functions:
            model = onnx.inliner.inline_local_functions(model, convert_version=True)
        return onnx.version_converter.convert_version(model, opset)
    except (onnx.version_converter.ConvertError, *MODEL_ERRORS, RuntimeError) as exc:
        raise ArtefactError(f"onnx can't convert the model to opset {opset}: {exc}") from exc


def check_parsed(model: onnx.ModelProto, step: str) -> None:
    """Refuse a model too big for `step`, which onnx takes in C++: it arrives there as one message.

    Raises:
        ArtefactError: for more than 2 GB in memory.
    """
    size = model.ByteSize()
    if size > _PARSED:
        raise ArtefactError(
            f"the model holds {size} bytes in memory, and {step} takes {_PARSED} at most "
            "(protobuf's limit); leave its weights in a file beside it "
            "(onnx.load without external data)"
        )


def prune(graph: onnx.GraphProto) -> None:
    """Drop the nodes, inputs and initialisers that no output needs."""
    needed = {value.name for value in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed.update(node.input)
            for subgraph in subgraphs(node):
                needed.update(value_names(subgraph))
        needed.discard("")  # an input or output that is left out
    for field, items in (
        (graph.node, kept[::-1]),
        (graph.input, [value for value in graph.input if value.name in needed]),
        (graph.initializer, [value for value in graph.initializer if value.name in needed]),
        (graph.value_info, [value for value in graph.value_info if value.name in needed]),
    ):
        chosen = list(items)
        del field[:]
        field.extend(chosen)


# What was attached, found again


def read_losses(model: onnx.ModelProto) -> tuple[Loss, ...]:
    """The losses that `model` says it computes: that of its spec, or those attached to it.

    Raises:
        ArtefactError: when the metadata are damaged.
    """
    spec = read_spec(model)
    return read_attached(model) if spec is None else (Loss.of(spec),)


def loss_part(model: onnx.ModelProto, loss: Loss) -> onnx.ModelProto:
    """The part of a model from prediction and target to the loss, as an artefact.

    `load` and `verify` understand it. A model that is a loss by itself comes back as it is.

    Raises:
        ArtefactError: when the metadata name tensors that the model doesn't have.
    """
    if read_spec(model) is not None:
        return model
    typed = onnx.ModelProto()
    typed.CopyFrom(model)
    del typed.graph.value_info[:]
    typed.graph.value_info.extend(  # any tensor may become an input
        helper.make_tensor_value_info(tensor.name, tensor.element, tensor.shape)
        for tensor in main_tensors(model).values()
        if tensor.element
    )
    names = [loss.inputs[role] for role in loss.spec.inputs]
    others = [tensor for tensor in typed.graph.initializer if tensor.name not in names]
    del typed.graph.initializer[:]  # a constant target is an input of the part too
    typed.graph.initializer.extend(others)
    try:
        part = onnx.utils.Extractor(typed).extract_model(names, list(loss.outputs.values()))
        del part.graph.value_info[:]
        for role, tensor in {**loss.inputs, **loss.outputs}.items():
            rename(part.graph.node, tensor, role)
            for value in (*part.graph.input, *part.graph.output):
                if value.name == tensor:
                    value.name = role
        onnx.checker.check_model(part, full_check=True)
    except (*MODEL_ERRORS, ValueError) as exc:
        raise ArtefactError(
            f"the loss that the metadata tell of can't be cut out of the model: {exc}"
        ) from exc
    served = is_served(model)
    stamp(part, loss.spec, "attached", "served" if served else "part", served=served)
    return part


def attached_anew(model: onnx.ModelProto, loss: Loss, spec: LossSpec) -> onnx.ModelProto:
    """The model with one loss of what `loss` compares, computed by `spec`, and nothing beside it.

    Raises:
        ArtefactError: when the metadata name tensors that the model doesn't have.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    kept = {key: text for key, text in metadata_of(model).items() if key != ATTACHED}
    helper.set_model_props(bare, kept)
    known = main_tensors(bare)
    roles = ("input", "target", "weight", "mask")
    prediction, target, weight, mask = (loss.inputs.get(role) for role in roles)
    lacking = [name for name in (prediction, target, weight, mask) if name and name not in known]
    if lacking or not (prediction and target):
        raise ArtefactError(f"the metadata tell of tensors that the model lacks: {lacking}")
    return attach(bare, prediction, target, spec, weight=weight, mask=mask, only_loss=True)


def rename_uses(nodes: Iterable[onnx.NodeProto], old: str, new: str) -> None:
    """Let every node that reads the tensor `old` read `new`, in subgraphs too."""
    for node in every_node(nodes):
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new


def rename(nodes: Iterable[onnx.NodeProto], old: str, new: str) -> None:
    """Give a tensor of a graph another name, where it is made and where it is read."""
    rename_uses(nodes, old, new)
    for node in nodes:
        for i, name in enumerate(node.output):
            if name == old:  # another name may be no UTF-8, which can't be written
                node.output[i] = new
