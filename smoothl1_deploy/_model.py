"""The one reader of ONNX models: what a caller must give, axes, opset, tensors, losses, trust.

Everything else in the package asks here, so that no two places read one model differently:

* The inputs that a caller must give are those of the graph without its constants: old models
  list their weights among the inputs.
* An axis has a size, or a name that every axis of that size shares, or nothing: `-1`, `?` and an
  axis without an entry are dynamic, and each is one of its own.
* A shape that a model declares of anything but its inputs is a claim. What shape inference makes
  of the nodes is believed over it; it counts only where inference tells nothing.

What reads a model recursively, a parser in C++ among them, ends the process where a model is made
to nest without end (TensorRT for RTX 1.7.1 does at a function that calls itself). So the depth is
measured before anything else looks inside.
"""

from __future__ import annotations

import graphlib
import json
import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx.checker
import onnx.defs
import onnx.inliner
import onnx.shape_inference
from onnx import TensorProto, helper

from ._records import Record
from ._shapes import Shape
from ._spec import DTYPES, LossSpec
from .errors import ArtefactError, CarriedEngineError

#: What onnx raises for a model that contradicts itself.
MODEL_ERRORS = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)
#: dtype name of an input or output of a spec -> ONNX element type.
ELEMENT_TYPE: dict[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float64": TensorProto.DOUBLE,
    "bool": TensorProto.BOOL,
}

#: The inverse, of the dtypes that a loss has.
DTYPE_OF_ELEMENT = {ELEMENT_TYPE[name]: name for name in DTYPES}

#: The metadata entry that says which losses were attached to a model, and by which tensors.
ATTACHED = "smoothl1_deploy.attached"
#: The operator in whose place ONNX Runtime puts what a provider has compiled.
ENGINE_OPERATOR = "EPContext"

# What a model declares


def inputs_of(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that a caller must give; old models list their constants among the inputs."""
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {sparse.values.name for sparse in graph.sparse_initializer}
    return [value for value in graph.input if value.name not in constants]


#: Names of an axis that exporters write for "not known", which would make equals of all of them.
_NO_NAMES = frozenset({"", "?", "-1", "None"})


def axes_of(value: onnx.ValueInfoProto) -> tuple[int | str | None, ...] | None:
    """The declared shape: sizes, names of dynamic axes, None for a dynamic axis without a name.

    None for any rank.
    """
    tensor = value.type.tensor_type
    return tuple(map(_axis, tensor.shape.dim)) if tensor.HasField("shape") else None


def _axis(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return dim.dim_value if dim.dim_value >= 0 else None
    name: Any = dim.dim_param  # bytes, where they are no UTF-8
    return name if isinstance(name, str) and name not in _NO_NAMES else None


def dims_of(value: onnx.ValueInfoProto) -> Shape | None:
    """The declared shape, an axis without a name called by its index: it is like no other."""
    return _named(value.name, axes_of(value))


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output of a graph.

    Attributes:
        dtype: numpy's name of the element type; of what is no tensor, its kind.
        axes: the declared shape, as `axes_of` gives it.
    """

    name: str
    dtype: str
    axes: tuple[int | str | None, ...] | None

    @classmethod
    def of(cls, value: onnx.ValueInfoProto) -> Port:
        """The port that a graph declares so."""
        try:
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
        except KeyError:
            dtype = value.type.WhichOneof("value") or "unknown"
        return cls(value.name, dtype, axes_of(value))

    @property
    def shape(self) -> Shape | None:
        """The declared shape as `dims_of` gives it; None for any rank."""
        return _named(self.name, self.axes)

    def __str__(self) -> str:
        if self.axes is None:
            return f"{self.name}: {self.dtype} of any rank"
        axes = ("?" if axis is None else str(axis) for axis in self.axes)
        return f"{self.name}: {self.dtype}[{','.join(axes)}]"


def _named(
    tensor: str, shape: Sequence[int | str | None] | None, taken: Container[str] = ()
) -> Shape | None:
    if shape is None:
        return None
    names = (f"{tensor}_axis_{i}" for i in range(len(shape)))
    free = (f"{name}_" if name in taken else name for name in names)
    return tuple(name if dim is None else dim for name, dim in zip(free, shape, strict=True))


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that `model` uses."""
    return max((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), default=1)


def metadata_of(model: onnx.ModelProto) -> dict[str, str]:
    """The metadata entries, as text: protobuf gives bytes for what is no UTF-8, and takes none."""
    return {_text(entry.key): _text(entry.value) for entry in model.metadata_props}


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


# What stands where


@dataclass(frozen=True, slots=True)
class Scope:
    """The nodes of one graph or function, and where they stand.

    Attributes:
        where: the path to it, empty for the main graph, else with a slash at its end.
        depth: how many graphs it lies in, from the main graph or its function.
        values: what is declared of its tensors, ports first.
    """

    where: str
    depth: int
    nodes: Sequence[onnx.NodeProto]
    initializers: Sequence[onnx.TensorProto]
    sparse: Sequence[onnx.SparseTensorProto]
    values: tuple[onnx.ValueInfoProto, ...]

    @property
    def constants(self) -> Iterator[tuple[str, onnx.TensorProto]]:
        """Its initialisers and the tensors in its nodes' attributes, each with the path to it."""
        for tensor in self.initializers:
            yield f"{self.where}{tensor.name}", tensor
        for node in self.nodes:
            for attribute in node.attribute:
                held = [attribute.t] if attribute.HasField("t") else []
                for tensor in (*held, *attribute.tensors):
                    yield f"{self.where}{node_label(node)}", tensor


def node_label(node: onnx.NodeProto) -> str:
    """What to call a node: many have no name."""
    return node.name or (node.output[0] if node.output else node.op_type)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs that a node holds, of an If or a Loop for instance."""
    return _graphs(node.attribute)


def _graphs(attributes: Iterable[onnx.AttributeProto]) -> Iterator[onnx.GraphProto]:
    for attribute in attributes:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def scopes(model: onnx.ModelProto) -> Iterator[Scope]:
    """The graph, every subgraph, every function and its subgraphs, each before what it holds."""
    yield from _scopes(model.graph)
    for function in model.functions:
        yield from _scopes(function, f"{function.name}/")


def _scopes(
    body: onnx.GraphProto | onnx.FunctionProto, where: str = "", depth: int = 0
) -> Iterator[Scope]:
    if isinstance(body, onnx.GraphProto):
        values = (*body.input, *body.output, *body.value_info)
        yield Scope(where, depth, body.node, body.initializer, body.sparse_initializer, values)
    else:
        yield Scope(where, depth, body.node, (), (), tuple(body.value_info))
    held = [(node_label(node), node.attribute) for node in body.node]
    if isinstance(body, onnx.FunctionProto):  # a caller that gives no graph gets this one
        held.append(("", body.attribute_proto))
    for label, attributes in held:
        for graph in _graphs(attributes):
            yield from _scopes(graph, f"{where}{label}/", depth + 1)


def every_node(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The `nodes`, and the nodes of their subgraphs, which read the tensors around them."""
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from every_node(graph.node)


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every constant of `model`, of its functions and of the graphs inside nodes."""
    return (tensor for scope in scopes(model) for _, tensor in scope.constants)


def value_names(graph: onnx.GraphProto) -> Iterator[str]:
    """The name of every tensor, and of other values, those of subgraphs too."""
    for scope in _scopes(graph):
        yield from (value.name for value in scope.values)
        yield from (tensor.name for tensor in scope.initializers)
        yield from (sparse.values.name for sparse in scope.sparse)
        for node in scope.nodes:
            yield from (*node.input, *node.output)


def external(model: onnx.ModelProto) -> Iterator[tuple[str, dict[str, str]]]:
    """The names of the constants whose data lie in other files, each with what it says of them."""
    for tensor in tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor.name, {entry.key: entry.value for entry in tensor.external_data}


def external_locations(model: onnx.ModelProto) -> list[str]:
    """The files beside the model that hold data of it, as the model names them."""
    return sorted({said["location"] for _, said in external(model) if "location" in said})


# Trust

_DEEPEST = 24  # graphs in one another; protobuf's own limit of 100 messages is reached about there
_MOST_NODES = 1_000_000  # with the bodies of functions in the places where they are called

_Name = tuple[str, str, str]


def check_trust(model: onnx.ModelProto) -> None:
    """Refuse what harms a reader, whatever it does with the model.

    Raises:
        ArtefactError: as `check_nesting` does, for names that are no text, and for constants of
            impossible sizes.
    """
    check_nesting(model)
    _check_names(model)
    _check_constants(model)


def check_nesting(model: onnx.ModelProto, by_name: bool = False) -> None:
    """Refuse what no reader can unfold.

    Args:
        model: anyone's.
        by_name: whether the reader takes a node for a call of the function of its name, whatever
            the domain.

    Raises:
        ArtefactError: for graphs nested deeper than 24, functions that call themselves, directly
            or through others, and more than a million nodes, those of called functions with them.
    """

    def key(item: onnx.FunctionProto | onnx.NodeProto) -> _Name:
        name = item.name if isinstance(item, onnx.FunctionProto) else item.op_type
        return ("", name, "") if by_name else (item.domain, name, item.overload)

    def unfolded(body: onnx.GraphProto | onnx.FunctionProto, called: Counter[_Name]) -> int:
        return len(body.node) + sum(count * sizes[name] for name, count in called.items())

    functions = {key(function): function for function in model.functions}
    calls = {name: _calls(f, functions, key) for name, f in functions.items()}
    try:
        order = [*graphlib.TopologicalSorter(calls).static_order()]
    except graphlib.CycleError as exc:
        ring = " -> ".join(name for _, name, _ in exc.args[1])
        raise ArtefactError(
            f"the model's functions call themselves ({ring}), which ONNX forbids; it is damaged or "
            "made to harm"
        ) from None
    sizes: dict[_Name, int] = {}
    for name in order:
        sizes[name] = unfolded(functions[name], calls[name])
    whole = unfolded(model.graph, _calls(model.graph, functions, key))
    if whole > _MOST_NODES:
        own = len(model.graph.node) > _MOST_NODES
        what = "graph has" if own else "model's functions unfold to"
        raise ArtefactError(
            f"the {what} {whole:,} nodes, more than {_MOST_NODES:,}; it is damaged or made to harm"
        )


def _check_names(model: onnx.ModelProto) -> None:
    names: list[Any] = [entry.domain for entry in model.opset_import]
    for function in model.functions:
        names += [function.domain, function.name, *function.input, *function.output]
    for scope in scopes(model):
        names += (value.name for value in scope.values)
        names += (tensor.name for _, tensor in scope.constants)
        for node in scope.nodes:
            names += [node.domain, node.op_type, node.name, *node.input, *node.output]
    for name in (model.graph.name, *names):
        if isinstance(name, bytes):  # what protobuf gives for no UTF-8
            raise ArtefactError(f"the name {name!r} in the model is no text; the model is damaged")


def _check_constants(model: onnx.ModelProto) -> None:
    """Refuse a constant that says it has more elements than its bytes can hold.

    onnx's shape inference (1.23) takes memory for what is declared: 16 GB for a file of 5 kB.
    """
    for tensor in tensors(model):
        elements = math.prod(tensor.dims)
        held = 4 * tensor.ByteSize()  # the narrowest elements have two bits
        fits = elements <= held or tensor.data_location == onnx.TensorProto.EXTERNAL
        if not fits or any(dim < 0 for dim in tensor.dims):
            raise ArtefactError(
                f"the constant {tensor.name!r} says it has the shape {tuple(tensor.dims)}, and "
                f"takes {tensor.ByteSize():,} bytes of the file; it is damaged or made to harm"
            )


@dataclass(frozen=True, slots=True)
class CarriedEngine:
    """A node in the place of a graph that a provider of ONNX Runtime has compiled.

    Source: the schema of EPContext in ONNX Runtime, whose `embed_mode` is 1 where it is not said.

    Attributes:
        node: what to call it, after the path to it.
        provider: the one that made it, as the model says; empty where it doesn't.
        inside: whether `content` is the engine, or the name of a file beside the model.
    """

    node: str
    provider: str
    inside: bool
    content: bytes = field(repr=False)

    def __str__(self) -> str:
        what = f"{len(self.content):,} bytes" if self.inside else f"the file {self._file!r}"
        return f"an engine ({what}) for {self.provider or 'any provider'} in the node {self.node!r}"

    @property
    def _file(self) -> str:
        return self.content.decode("utf-8", "replace")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the bytes."""
        where = {"bytes": len(self.content)} if self.inside else {"file": self._file}
        return {"node": self.node, "provider": self.provider, **where}


def engines_in(model: onnx.ModelProto) -> list[CarriedEngine]:
    """The engines that `model` carries, those in functions and subgraphs too.

    A node is known by the name of its operator alone, as the provider for TensorRT for RTX knows it
    (onnxruntime#27622).
    """
    return [
        _engine(f"{scope.where}{node_label(node)}", {a.name: a for a in node.attribute})
        for scope in scopes(model)
        for node in scope.nodes
        if node.op_type == ENGINE_OPERATOR
    ]


def _engine(node: str, attributes: Mapping[str, onnx.AttributeProto]) -> CarriedEngine:
    none = onnx.AttributeProto(i=1)
    source, mode, content = (
        attributes.get(name, none) for name in ("source", "embed_mode", "ep_cache_context")
    )
    return CarriedEngine(node, source.s.decode("utf-8", "replace"), mode.i != 0, content.s)


def check_engines(model: onnx.ModelProto, remedy: str) -> None:
    """Refuse a model that carries an engine, where the model is to become another one.

    Raises:
        CarriedEngineError: names the first engine and the remedy.
    """
    for engine in engines_in(model):
        raise CarriedEngineError(f"the model carries {engine}: {remedy}")


def _calls(
    body: onnx.GraphProto | onnx.FunctionProto,
    functions: Container[_Name],
    key: Callable[[onnx.NodeProto], _Name],
) -> Counter[_Name]:
    """The functions called by `body` and the graphs inside it, each as often as it is."""
    found: Counter[_Name] = Counter()
    for scope in _scopes(body):
        if scope.depth > _DEEPEST:
            where = "graph" if isinstance(body, onnx.GraphProto) else body.name
            raise ArtefactError(
                f"the {where} has graphs nested deeper than {_DEEPEST}; it is damaged or made to "
                "harm"
            )
        found.update(name for name in map(key, scope.nodes) if name in functions)
    return found


# What its nodes make of its inputs

_SMALL = 1024  # bytes of an initialiser that shape inference may need the values of
#: Elements beyond which onnx is not asked to follow what tensors hold: it keeps a message of
#: 220 bytes for each element of a tensor of rank 1, through every operator (onnx 1.23).
_LONGEST_VECTOR = 1 << 16
_MOST_ELEMENTS = 1 << 23  # the same for any rank: a function may flatten it, unseen here


@dataclass(frozen=True, slots=True)
class Tensor:
    """What is known of a tensor of the main graph.

    Attributes:
        element: the ONNX element type; None where nothing tells it.
        certain: the shape that inference makes of the nodes: what a number may rest on. None where
            it doesn't tell the rank.
        shape: the certain one, completed by what is declared where inference tells nothing.
        misdeclared: a declared shape that the nodes contradict.
    """

    name: str
    element: int | None = None
    shape: Shape | None = None
    certain: Shape | None = None
    misdeclared: tuple[int | str | None, ...] | None = None


def main_tensors(model: onnx.ModelProto) -> dict[str, Tensor]:
    """Every tensor of the main graph; a sequence or the like is none."""
    graph = model.graph
    claims = {value.name: value for value in (*graph.value_info, *graph.output)}
    bare = _skeleton(model, declared=False)
    given = _axis_names(bare.graph.input)
    told = _inferred(bare)
    stated = told
    if any(not _is_known(axes_of(value), given) for value in told.values()):
        stated = _inferred(_skeleton(model, declared=True))
    trusted = given | _axis_names(claims.values())

    def tensor(name: str) -> Tensor:
        own, other, claim = (values.get(name) for values in (told, stated, claims))
        element = next((e for v in (own, other) if v and (e := v.type.tensor_type.elem_type)), None)
        certain = dims_of(own) if own else None
        completed = dims_of(other) if other else None
        if certain is None or completed is None or len(certain) != len(completed):
            shape = completed if certain is None else certain
        else:
            shape = tuple(
                a if _is_known((a,), given) or not _is_known((b,), trusted) else b
                for a, b in zip(certain, completed, strict=True)
            )
        claimed = axes_of(claim) if claim else None
        wrong = claimed is not None and certain is not None and _contradict(claimed, certain, given)
        return Tensor(name, element, shape, certain, claimed if wrong else None)

    found = {tensor.name: Tensor(tensor.name, tensor.data_type, *[tuple(tensor.dims)] * 2)
             for tensor in graph.initializer}  # fmt: skip
    names = [value.name for value in graph.input]
    names += [name for node in graph.node for name in node.output if name]
    values = {**{value.name: value for value in graph.input}, **claims, **told}
    for name in names:
        # Sequences and the like are no candidates; what nothing tells of still is one.
        kind = values[name].type.WhichOneof("value") if name in values else None
        if name not in found and kind in (None, "tensor_type"):
            found[name] = tensor(name)
    return found


def outputs_of(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The outputs; a shape that isn't declared, or that the nodes contradict, is what they make."""
    known = main_tensors(model)
    found = []
    for value in model.graph.output:
        tensor = known.get(value.name)
        if tensor and (tensor.misdeclared is not None or axes_of(value) is None):
            own, value = value, onnx.ValueInfoProto()
            value.CopyFrom(own)
            restate(value, tensor.shape)
        found.append(value)
    return found


def contradiction(known: Iterable[Tensor]) -> str | None:
    """A sentence on the tensors of which the model declares what isn't so; None without any."""
    wrong = [tensor for tensor in known if tensor.misdeclared is not None]
    if not wrong:
        return None
    declared = ", ".join("?" if dim is None else str(dim) for dim in wrong[-1].misdeclared or ())
    made = ", ".join(map(str, wrong[-1].shape or ()))
    more = f" (and likewise of {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return (
        f"the model declares {wrong[-1].name!r} with the shape ({declared}), and its nodes make "
        f"({made}) of its inputs{more}; the nodes are believed"
    )


def correct(model: onnx.ModelProto, known: Mapping[str, Tensor]) -> str | None:
    """Declare the tensors of `model` as its nodes make them, where it declares what isn't so.

    ONNX Runtime plans its memory by what is declared, two axes called `?` taken for equal ones, and
    then ends with "Shape mismatch attempting to re-use buffer" (1.31).

    Returns:
        What `contradiction` says.
    """
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.name in known and known[value.name].misdeclared is not None:
            restate(value, known[value.name].shape)
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in _NO_NAMES:
                dim.ClearField("dim_param")
    return contradiction(known.values())


def _axis_names(values: Iterable[onnx.ValueInfoProto]) -> set[str]:
    return {dim for value in values for dim in axes_of(value) or () if isinstance(dim, str)}


def _is_known(shape: Sequence[int | str | None] | None, names: Container[str]) -> bool:
    """Whether every axis has a size or one of the names; other names are inference's inventions."""
    return shape is not None and all(isinstance(d, int) or d in names for d in shape)


def _contradict(claimed: Sequence[int | str | None], certain: Shape, given: Container[str]) -> bool:
    """Whether a rank or size is claimed that is known to be another; an unknown one may be so."""
    return len(claimed) != len(certain) or any(
        isinstance(a, int) and a != b and _is_known((b,), given)
        for a, b in zip(claimed, certain, strict=True)
    )


def _skeleton(model: onnx.ModelProto, *, declared: bool) -> onnx.ModelProto:
    """What shape inference needs of the model, and no more: its big initialisers as inputs.

    Axes without a name get one, so that inference tells which tensors share them. What is declared
    of other tensors than the inputs goes unless it is asked for: onnx (1.23) lets a declaration
    stand where its own inference contradicts it.
    """
    whole = model.graph
    copy = onnx.ModelProto(ir_version=model.ir_version)
    copy.opset_import.extend(model.opset_import)
    copy.functions.extend(model.functions)
    graph = copy.graph
    graph.node.extend(whole.node)
    graph.output.extend(whole.output)
    graph.value_info.extend(whole.value_info)
    for scope in scopes(copy):
        for value in scope.values:
            restate(value, axes_of(value) if declared else None)
    graph.input.extend(whole.input)
    taken = _axis_names(whole.input)
    for value in graph.input:
        restate(value, _named(value.name, axes_of(value), taken))
    graph.sparse_initializer.extend(whole.sparse_initializer)
    known = {value.name for value in graph.input}
    for tensor in whole.initializer:
        if tensor.ByteSize() <= _SMALL and not tensor.external_data:
            graph.initializer.append(tensor)
        elif tensor.name not in known:
            value = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            graph.input.append(value)
    return copy


def restate(value: onnx.ValueInfoProto, shape: Sequence[int | str | None] | None) -> None:
    """Declare `value`, where it is a tensor, in another shape; None stands for any rank."""
    if value.type.HasField("tensor_type"):
        element = value.type.tensor_type.elem_type
        value.type.CopyFrom(helper.make_tensor_type_proto(element, shape))


def _inferred(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """The values of the model's graph, by name, with the shapes that inference tells.

    Shapes that are computed in the graph (data propagation) are told too, unless a tensor is so
    large that following its data could take all memory. A model that inference can't make sense
    of (custom operators, contradictions, more than 2 GB) gives its own graph.
    """
    graph = model.graph
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
        if not any(map(_is_large, (*graph.input, *graph.value_info, *graph.output))):
            graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except (*MODEL_ERRORS, RuntimeError, ValueError):
        graph = model.graph
    return {value.name: value for value in (*graph.value_info, *graph.output, *graph.input)}


def inlined(model: onnx.ModelProto, kept: Iterable[tuple[str, str]] = ()) -> onnx.ModelProto:
    """`model` with the bodies of its functions in place of their calls.

    Args:
        model: anyone's.
        kept: the domain and name of functions that stay functions.

    Raises:
        ArtefactError: where that can't be done, as with two functions of one name.
    """
    try:
        return onnx.inliner.inline_selected_functions(model, list(kept), exclude=True)
    except (*MODEL_ERRORS, RuntimeError, ValueError) as exc:
        raise ArtefactError(
            f"the model's functions can't be put in place of their calls ({exc}); it is damaged"
        ) from exc


def check_types(model: onnx.ModelProto) -> None:
    """Refuse a model in which one of ONNX's own operators is given an element type it never takes.

    TensorRT's parser ends the process at a ConstantOfShape of floats (TensorRT for RTX 1.7.1).
    A type that ONNX takes in its newest version is let through in every version.

    Raises:
        ArtefactError: for such a node, and as `inlined` does.
    """
    whole = inlined(_skeleton(model, declared=False))
    newest = onnx.defs.onnx_opset_version()
    versions = {newest, min(max(opset_of(model), 1), newest)}
    told: dict[str, set[int]] = {}  # graphs beside one another may share a name
    for value in (
        *_inferred(whole).values(),
        *(v for scope in scopes(whole) for v in scope.values),
    ):
        if element := value.type.tensor_type.elem_type:
            told.setdefault(value.name, set()).add(element)
    for scope in scopes(whole):
        for node in scope.nodes:
            for name, takes in zip(node.input, _types_taken(node, versions), strict=False):
                given = [*map(element_name, told.get(name, ()))]
                if given and takes and not any(f"tensor({n.lower()})" in takes for n in given):
                    raise ArtefactError(
                        f"the node {scope.where}{node_label(node)!r} ({node.op_type}) is given "
                        f"{name!r} in {' or '.join(given)}, which {node.op_type} doesn't take "
                        "there; the model is damaged"
                    )


def _types_taken(node: onnx.NodeProto, versions: Iterable[int]) -> list[set[str]]:
    """The types that each input of `node` may have; nothing for an operator of someone else's."""
    if node.domain not in ("", "ai.onnx"):
        return []
    found: list[set[str]] = [set() for _ in node.input]
    for version in versions:
        try:
            formal = onnx.defs.get_schema(node.op_type, version, "").inputs
        except onnx.defs.SchemaError:
            return []
        for index, taken in enumerate(found if formal else ()):
            taken |= formal[min(index, len(formal) - 1)].types
    return found


def _is_large(value: onnx.ValueInfoProto) -> bool:
    sizes = [dim for dim in axes_of(value) or () if isinstance(dim, int)]
    limit = _LONGEST_VECTOR if len(sizes) == 1 else _MOST_ELEMENTS
    return math.prod(size for size in sizes if size > 0) > limit


def float_dtype_of(model: onnx.ModelProto, name: str) -> str | None:
    """The dtype of a float tensor of the main graph; None where nothing tells it."""
    tensor = main_tensors(model).get(name)
    return None if tensor is None else DTYPE_OF_ELEMENT.get(tensor.element or 0)


# What was attached to it


@dataclass(frozen=True, slots=True)
class Loss(Record):
    """One loss of a graph: its spec, and the tensor that plays each role."""

    spec: LossSpec
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    @classmethod
    def of(cls, spec: LossSpec) -> Loss:
        """The loss of an artefact, whose tensors are called what the spec calls them."""
        return cls(spec, {name: name for name in spec.inputs}, {n: n for n in spec.outputs})

    @classmethod
    def from_dict(cls, fields: Any) -> Loss:
        """The inverse of `to_dict`; raises TypeError or ValueError on other content."""
        parts = {"spec", "inputs", "outputs"}
        if not isinstance(fields, dict) or not all(isinstance(fields.get(p), dict) for p in parts):
            raise TypeError(f"a loss is an object of the objects {', '.join(sorted(parts))}")
        loss = cls(LossSpec.from_dict(fields["spec"]), fields["inputs"], fields["outputs"])
        for kind, roles in (("inputs", loss.spec.inputs), ("outputs", loss.spec.outputs)):
            given: dict[str, Any] = fields[kind]
            named = {role for role, name in given.items() if isinstance(name, str) and name}
            if not set(given) == named == set(roles):
                raise ValueError(
                    f"the {kind} are {given}, and its spec has {', '.join(roles)}, each the "
                    "name of a tensor"
                )
        return loss


def read_attached(model: onnx.ModelProto) -> tuple[Loss, ...]:
    """The losses that were attached to `model`, as its metadata tell.

    Raises:
        ArtefactError: when the entry is damaged; the model may be anyone's.
    """
    try:
        noted = json.loads(metadata_of(model).get(ATTACHED, "[]"))
        if not isinstance(noted, list):
            raise TypeError(f"{type(noted).__name__} instead of a list of losses")
        return tuple(map(Loss.from_dict, noted))
    except (ValueError, TypeError, RecursionError) as exc:
        raise ArtefactError(
            f"the model's metadata entry {ATTACHED} is damaged ({exc}); delete it, or attach to "
            "the model as it was"
        ) from exc


def note_attached(model: onnx.ModelProto, loss: Loss) -> None:
    """Add a loss to what `read_attached` tells of `model`.

    Raises:
        ArtefactError: as `read_attached` does.
    """
    noted = [known.to_dict() for known in (*read_attached(model), loss)]
    entries = {**metadata_of(model), ATTACHED: json.dumps(noted, sort_keys=True)}
    helper.set_model_props(model, entries)


def element_name(element: int) -> str:
    """`"FLOAT"`, or the number of a type that this version of onnx doesn't know."""
    known = TensorProto.DataType.DESCRIPTOR.values_by_number.get(element)
    return known.name if known else f"element type {element}"
