"""What verify's diagnosis is worth: scripts/scorecard.

Each fault that has a name is planted into each spelling of the loss, for each reduction, and the
diagnosis of `verify` is read: it names the fault, another one, or none, or all is green. Right
graphs in the same spellings show its false alarms. The spellings are ours by both routes, what
torch.onnx.export writes, and the formulas that people write by hand.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import torch
from handmade import model_of
from onnx import helper

from smoothl1_deploy import LossSpec, export, load, verify
from smoothl1_deploy._environment import now
from smoothl1_deploy._floats import NUMPY_DTYPE
from smoothl1_deploy._model import ELEMENT_TYPE
from smoothl1_deploy._spec import DTYPES
from smoothl1_deploy._table import Table
from smoothl1_deploy.errors import SmoothL1DeployError
from smoothl1_deploy.parity._diagnose import diagnose
from smoothl1_deploy.parity._faults import Fault
from smoothl1_deploy.parity._pool import each
from smoothl1_deploy.parity._verify import Verification

# --- the spellings ---------------------------------------------------------------------------

REDUCTIONS = ("none", "mean", "sum", "per sample")

_SIZES = "d = Sub(p, g) size = Abs(d) inside = Less(size, beta)"
_HALVED = "square = Mul(d, d) halved = Mul(half, square)"

#: What people write, as ONNX' text; `p` and `g` are input and target in the format computed in.
BY_HAND: dict[str, str] = {
    "Where, Less, Abs": f"""
        {_SIZES} {_HALVED} quadratic = Div(halved, beta) offset = Mul(half, beta)
        linear = Sub(size, offset) each = Where(inside, quadratic, linear)""",
    "Pow, constants folded": f"""
        {_SIZES} square = Pow(d, two) factor = Div(half, beta) quadratic = Mul(factor, square)
        shift = Mul(half, beta) linear = Sub(size, shift)
        each = Where(inside, quadratic, linear)""",
    "Clip": """
        d = Sub(p, g) low = Neg(beta) core = Clip(d, low, beta) divided = Div(core, beta)
        part = Mul(half, core) rest = Sub(d, part) product = Mul(divided, rest)
        each = Abs(product)""",
    "Min and the excess": """
        d = Sub(p, g) size = Abs(d) core = Min(size, beta) part = Mul(half, core)
        slope = Div(core, beta) within = Mul(part, slope) excess = Sub(size, core)
        each = Add(within, excess)""",
    "Huber over beta": f"""
        {_SIZES} {_HALVED} offset = Mul(half, beta) rest = Sub(size, offset)
        outer = Mul(beta, rest) huber = Where(inside, halved, outer) each = Div(huber, beta)""",
    "Where, by two masks": f"""
        {_SIZES} {_HALVED} nought = Sub(one, one) near = Where(inside, halved, nought)
        quadratic = Div(near, beta) offset = Mul(half, beta) linear = Sub(size, offset)
        far = Where(inside, nought, linear) each = Add(quadratic, far)""",
}

#: Right at every size: float64 accumulators, 0/0 for an empty mean.
_REDUCE = {
    "none": "out = Identity(each)",
    "sum": "wide = Cast<to=11>(each) total = ReduceSum<keepdims=0>(wide) out = Identity(total)",
    "mean": """
        wide = Cast<to=11>(each) total = ReduceSum<keepdims=0>(wide) number = Size(each)
        count = Cast<to=11>(number) out = Div(total, count)""",
    "per sample": """
        wide = Cast<to=11>(each) axis = Constant<value_ints=[1]>()
        total = ReduceSum<keepdims=0>(wide, axis) number = Shape<start=1, end=2>(each)
        count = Cast<to=11>(number) out = Div(total, count)""",
}
_SLOPE = """
    below = Neg(beta) inner = Clip(d, below, beta) raw = Div(inner, beta)
"""
_SCALE = {
    "none": "grad_input = Identity(raw)",
    "sum": "grad_input = Identity(raw)",
    "mean": "n = Size(each) nf = Cast<to=1>(n) grad_input = Div(raw, nf)",
    "per sample": "n = Shape<start=1, end=2>(each) nf = Cast<to=1>(n) grad_input = Div(raw, nf)",
}
_ELEMENT = {"float32": "float", "float64": "double"}


def spec_of(
    reduction: str, beta: float, dtype: str = "float32", gradient: bool = False
) -> LossSpec:
    """The spec that a graph of the card is held against."""
    rows = reduction == "per sample"
    return LossSpec(beta, "mean" if rows else reduction, dtype, per_sample=rows, gradient=gradient)


def _by_hand(body: str, reduction: str, spec: LossSpec) -> onnx.ModelProto:
    # People compute the half formats in float32, as PyTorch does.
    compute, element = spec.compute_dtype, _ELEMENT.get(spec.dtype, spec.dtype)
    widened, narrowed = (f"Cast<to={ELEMENT_TYPE[dtype]}>" for dtype in (compute, spec.dtype))
    axes = {"none": "[N, 4]", "per sample": "[N]"}.get(reduction, "")
    outputs, gradient = f"{element}{axes} loss", ""
    if spec.gradient:
        outputs, gradient = f"{outputs}, {element}[N, 4] grad_input", _SLOPE + _SCALE[reduction]
    constants: dict[str, Any] = {
        name: np.asarray(value, NUMPY_DTYPE[compute])
        for name, value in {"half": 0.5, "one": 1, "two": 2, "beta": spec.beta}.items()
    }
    return model_of(
        f"""theirs ({element}[N, 4] input, {element}[N, 4] target) => ({outputs}) {{
            p = {widened}(input) g = {widened}(target) {body} {_REDUCE[reduction]}
            loss = {narrowed}(out) {gradient}
        }}""",
        ir=10,
        **constants,
    )


class _Rows(torch.nn.Module):
    """A mean for each row, as people write it."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = torch.nn.functional.smooth_l1_loss
        return loss(input, target, beta=self.beta, reduction="none").mean(1)


@lru_cache(maxsize=64)
def _exported(spec: LossSpec) -> bytes:
    """What torch.onnx.export writes of the loss, with nothing of ours."""
    whole = torch.nn.SmoothL1Loss(reduction=spec.reduction, beta=spec.beta)
    module = _Rows(spec.beta) if spec.per_sample else whole
    # Two tensors: one that is given twice is one input.
    pair = tuple(torch.ones(8, 4, dtype=getattr(torch, spec.dtype)) for _ in range(2))
    axes = {0: torch.export.Dim("N")}
    program = torch.onnx.export(
        module.eval(), pair, dynamo=True, dynamic_shapes=(axes, axes), verbose=False
    )
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


OURS = ("function", "inlined")
EXPORTER = "torch.onnx.export"
SPELLINGS = (*OURS, EXPORTER, *BY_HAND)


def graph_of(spelling: str, reduction: str, spec: LossSpec) -> onnx.ModelProto:
    """The right graph of a spec in a spelling."""
    if spelling in OURS:
        return export(spec, spelling, ("N", 4))
    if spelling == EXPORTER:
        return onnx.load_model_from_string(_exported(spec))
    return _by_hand(BY_HAND[spelling], reduction, spec)


#: What the graphs that others wrote call the tensors that faults are planted by.
_NAMES = {
    "input": r"input|\w+(?<!grad)_input",
    "target": r"target|\w+_target",
    "d": r"d|sub|\w+_difference",
    "size": r"size|abs_1",
    "inside": r"inside|lt_1",
    "square": r"square|pow_1",
    "halved": r"halved|mul",
    "quadratic": r"quadratic|div",
    "linear": r"linear|sub_1",
    "core": r"core|\w+_core",
    "part": r"part|(SmoothL1Addends|SmoothL1LossTerms)_tmp_1",
    "divided": r"divided|SmoothL1Addends_tmp_0",
    "slope": r"slope|SmoothL1LossTerms_tmp_2",
    "guard": r"BetaDivisor_return_val|divisor",
    "beta": r"beta|\w+_beta|val_0",
    "each": r"each|losses|where|SmoothL1(Addends|LossTerms)_return_val|SmoothL1Loss\w*_losses",
    "out": r"SmoothL1Loss\w+_loss",
    "grad_input": r"(\w+_)?grad_input",
}


def _apart(model: onnx.ModelProto) -> None:
    """The result behind a node of its own, where the losses of the elements are the result."""
    name = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["each" if output == name else output for output in node.output]
    model.graph.node.append(helper.make_node("Identity", ["each"], [name]))


def _matches(role: str, name: str) -> bool:
    # Inlined nodes have the number of their call behind their names.
    return bool(re.fullmatch(_NAMES.get(role, re.escape(role)), re.sub(r"__\d+(_\d+)?$", "", name)))


# --- planting --------------------------------------------------------------------------------


def plant(model: onnx.ModelProto, edit: str) -> bool:
    """Replace the node of what the last statement ends with; False where there is none.

    The other statements' names are their own. `was` is what the node gave.
    """
    new = list(onnx.parser.parse_graph(f"planted () => () {{ {edit} }}").node)
    for holder in (model.graph, *model.functions):
        if _replace(holder, new, model.graph.output[0].name):
            del model.graph.value_info[:]
            for function in model.functions:
                del function.value_info[:]
            return True
    return False


def _replace(
    holder: onnx.FunctionProto | onnx.GraphProto, new: Sequence[onnx.NodeProto], result: str
) -> bool:
    role = new[-1].output[0]
    inputs = [value if isinstance(value, str) else value.name for value in holder.input]
    made = [name for node in holder.node for name in node.output]
    constants = [tensor.name for tensor in getattr(holder, "initializer", ())]
    places = [
        at
        for at, node in enumerate(holder.node)
        if _matches(role, node.output[0]) or (role == "out" and node.output[0] == result)
    ]
    if not places:
        return False
    at = places[0]
    old = holder.node[at].output[0]
    names = {role: old, "was": f"was_{old}"}
    for node in new[:-1]:
        names[node.output[0]] = f"planted_{node.output[0]}"
    for name in (name for node in new for name in node.input if name not in names):
        found = [known for known in (*made, *inputs, *constants) if _matches(name, known)]
        if not found:
            return False
        names[name] = found[0]
    renamed = [_renamed(node, names) for node in new]
    if any("was" in node.input for node in new):
        renamed.insert(0, _renamed(holder.node[at], {old: names["was"]}))
    nodes = [*holder.node[:at], *renamed, *holder.node[at + 1 :]]
    del holder.node[:]
    holder.node.extend(nodes)
    return True


def _renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    copy: onnx.NodeProto = onnx.NodeProto.FromString(node.SerializeToString())
    copy.input[:] = [names.get(name, name) for name in node.input]
    copy.output[:] = [names.get(name, name) for name in node.output]
    return copy


@dataclass(frozen=True)
class Plant:
    """How a fault is put into graphs.

    Attributes:
        edits: of which the first that a graph has the tensors for is made; "" changes nothing.
        reductions: for which it is a fault.
        beta: of the spec.
        theirs: the beta of the graph, where that is another.
        dtype, gradient: of the spec.
        drift: whether it shows at many elements alone.
        also: what is then wrong too.
        only: the spellings that it is a fault of.
    """

    edits: tuple[str, ...]
    reductions: tuple[str, ...] = REDUCTIONS
    beta: float = 0.75
    theirs: float | None = None
    dtype: str = "float32"
    gradient: bool = False
    drift: bool = False
    also: tuple[Fault, ...] = ()
    only: tuple[str, ...] = SPELLINGS


def _one(*edits: str, **options: Any) -> tuple[Plant, ...]:
    return (Plant(edits, **options),)


def _constant(name: str, value: str) -> str:
    return f"{name} = Constant<value_float={value}>() "


_MEAN, _SUM, _NONE, _ROWS = (("mean",), ("sum",), ("none",), ("per sample",))
_ADDED = ("mean", "sum")
_AXIS = "axis = Constant<value_ints=[1]>() "
_FIRST = "axis = Constant<value_ints=[0]>() "
_DIVIDED = "f = Cast<to=1>(n) s = ReduceSum<keepdims=0>(each) q = Div(s, f) out = Squeeze(q)"
_OF_HAND = tuple(BY_HAND)

#: Fault -> how it is planted; none where no graph can show it here, with the reason below.
PLANTS: dict[Fault, tuple[Plant, ...]] = {
    Fault.WRONG_BETA: _one("", theirs=0.3),
    Fault.MISSING_HALF: _one(
        "halved = Identity(square)", _constant("one", "1.0") + "factor = Div(one, beta)",
        "part = Identity(core)"),
    Fault.MISSING_LINEAR_HALF: _one(
        "offset = Identity(beta)", "shift = Identity(beta)", "linear = Sub(size, beta)"),
    Fault.MISSING_OFFSET: _one("rest = Identity(size)", "linear = Identity(size)",
                               only=tuple(s for s in SPELLINGS if s != "Clip")),
    Fault.MISSING_DIVISION: _one(
        "factor = Identity(half)", "slope = Identity(core)", "quadratic = Identity(near)",
        "quadratic = Identity(halved)"),
    Fault.HUBER: _one(
        "each = Identity(huber)", "divided = Identity(core)", "each = Mul(was, beta)"),
    Fault.MSE: (
        *_one("each = Mul(d, d)"),
        *_one(_constant("half", "0.5") + "s = Mul(d, d) each = Mul(s, half)"),
        *_one(_constant("half", "0.5") + "s = Mul(d, d) h = Mul(s, half) each = Div(h, beta)"),
    ),
    Fault.L1: _one("each = Abs(d)"),
    Fault.PSEUDO_HUBER: (
        *_one("r = Div(d, beta) rr = Mul(r, r) " + _constant("one", "1.0")
              + "s = Add(rr, one) root = Sqrt(s) more = Sub(root, one) most = Mul(beta, beta) "
              "each = Mul(most, more)"),
        *_one(_constant("one", "1.0") + "dd = Mul(d, d) s = Add(dd, one) root = Sqrt(s) "
              "each = Sub(root, one)"),
    ),
    Fault.LOG_COSH: _one(
        "m = Neg(d) f = Add(m, m) s = Softplus(f) t = Add(d, s) "
        + _constant("log2", "0.6931471805599453") + "each = Sub(t, log2)"),
    Fault.SMOOTH_ABS: (
        *_one(_constant("e", "1e-6") + "dd = Mul(d, d) s = Add(dd, e) each = Sqrt(s)"),
        *_one(_constant("e", "1e-6") + "dd = Mul(d, d) s = Add(dd, e) size = Sqrt(s)"),
    ),
    Fault.CLIPPED: _one(_constant("two", "2.0") + "each = Min(was, two)"),
    Fault.WEIGHTED: (
        *_one(_constant("nought", "0.0") + "known = Greater(target, nought) "
              "mask = Cast<to=1>(known) each = Mul(was, mask)", also=(Fault.NAN_SWALLOWED,)),
        *_one("mask = Constant<value_floats=[1.0, 1.0, 0.0, 1.0]>() each = Mul(was, mask)"),
    ),
    Fault.BRANCHES_SWAPPED: _one("inside = Greater(size, beta)"),
    Fault.MISSING_ABS: (
        *_one("inside = Less(d, beta)", "size = Identity(d)", "core = Min(d, beta)"),
        *_one("linear = Sub(d, offset)", "linear = Sub(d, shift)", "rest = Sub(d, offset)",
              _constant("o", "0.375") + "linear = Sub(d, o)"),
    ),
    Fault.TRUNCATION: (
        *_one("i = Cast<to=7>(was) d = Cast<to=1>(i)"),
        *_one("i = Cast<to=7>(target) g = Cast<to=1>(i) d = Sub(input, g)"),
        *_one("g = Round(target) d = Sub(input, g)"),
    ),
    Fault.SCALED: _one(_constant("three", "3.0") + "each = Mul(was, three)"),
    Fault.ZERO_DIVISION: _one("guard = Identity(beta)", "core = Identity(was)",
                              "huber = Identity(was)", beta=0.0,
                              only=("function", "Clip", "Min and the excess", "Huber over beta",
                                    "Where, by two masks")),
    Fault.SUM_FOR_MEAN: (
        *_one("out = ReduceSum<keepdims=0>(each)", reductions=_MEAN),
        *_one(_AXIS + "out = ReduceSum<keepdims=0>(each, axis)", reductions=_ROWS),
    ),
    Fault.MEAN_FOR_SUM: _one("out = ReduceMean<keepdims=0>(each)", reductions=_SUM),
    Fault.REDUCED: (
        *_one("out = ReduceMean<keepdims=0>(was)", "out = ReduceMean<keepdims=0>(each)",
              reductions=_NONE),
        *_one("out = ReduceMean<keepdims=0>(each)", reductions=_ROWS),
        *_one("out = ReduceSum<keepdims=0>(each)", reductions=_ROWS),
    ),
    Fault.NOT_REDUCED: _one("out = Identity(each)", reductions=("mean", "sum", "per sample")),
    Fault.SOME_AXES: (
        *_one(_AXIS + "out = ReduceMean<keepdims=0>(each, axis)", reductions=_MEAN),
        *_one(_FIRST + "out = ReduceSum<keepdims=0>(each, axis)", reductions=_ADDED),
    ),
    Fault.WRONG_COUNT: (
        *_one("n = Shape<start=0, end=1>(each) " + _DIVIDED, reductions=_ADDED),
        *_one("n = Shape<start=1, end=2>(each) " + _DIVIDED, reductions=_ADDED),
        *_one("n = Shape<start=0, end=1>(each) f = Cast<to=1>(n) " + _AXIS
              + "s = ReduceSum<keepdims=0>(each, axis) out = Div(s, f)", reductions=_ROWS),
    ),
    Fault.FLOAT64_ACCUMULATION: _one("", dtype="float64", drift=True, only=_OF_HAND,
                                     reductions=_ADDED),
    Fault.FLOAT32_ACCUMULATION: (
        *_one("s = ReduceMean<keepdims=0>(each) out = Abs(s)", drift=True, reductions=_MEAN,
              also=(Fault.EMPTY_MEAN,)),
        *_one("s = ReduceSum<keepdims=0>(each) out = Abs(s)", drift=True, reductions=_SUM),
    ),
    Fault.HALF_ACCUMULATION: (),
    Fault.NARROW_INPUT: _one("p = Cast<to=16>(input) g = Cast<to=16>(target) q = Cast<to=1>(p) "
                             "h = Cast<to=1>(g) d = Sub(q, h)"),
    Fault.NARROW_ARITHMETIC: _one("n = Cast<to=16>(was) out = Cast<to=1>(n)"),
    Fault.RANGE: _one(_constant("big", "1e37") + "m = Mul(was, big) each = Div(m, big)"),
    Fault.LESS_OR_EQUAL: _one("inside = LessOrEqual(size, beta)", beta=0.0,
                              only=(EXPORTER, "Where, Less, Abs", "Pow, constants folded")),
    Fault.NAN_SWALLOWED: _one("bad = IsNaN(was) " + _constant("nought", "0.0")
                              + "d = Where(bad, nought, was)"),
    Fault.INFINITE_INPUT: tuple(
        Plant((_constant("top", top) + "low = Neg(top) d = Clip(was, low, top)",))
        for top in ("1e30", "3.4e38")
    ),
    Fault.EMPTY_MEAN: _one(
        "n = Size(each) i = Constant<value_int=1>() m = Max(n, i) c = Cast<to=11>(m) "
        "w = Cast<to=11>(each) s = ReduceSum<keepdims=0>(w) q = Div(s, c) a = Abs(q) "
        "out = Cast<to=1>(a)",
        reductions=_MEAN),
    Fault.EMPTY: _one(
        "n = Size(each) c = Cast<to=1>(n) q = Div(c, c) out = Mul(was, q)", reductions=_SUM),
    Fault.NEGATIVE_ZERO: _one(
        "low = Neg(beta) c = Clip(d, low, beta) r = Div(c, beta) " + _constant("half", "0.5")
        + "e = Mul(half, c) f = Sub(d, e) each = Mul(r, f)", reductions=_NONE),
    Fault.SHAPE: _one("axis = Constant<value_ints=[-1]>() out = Unsqueeze(was, axis)",
                      reductions=("mean", "sum", "per sample")),
    Fault.DTYPE: _one("out = Cast<to=11>(was)"),
    Fault.NO_ANSWER: _one("i = Constant<value_int=100>() p = Gather<axis=0>(input, i) "
                          "d = Sub(p, target)"),
    Fault.SWAPPED_INPUTS: _one("grad_input = Neg(was)", gradient=True),
    Fault.GRADIENT_SCALE: (
        *_one("n = Size(input) f = Cast<to=1>(n) grad_input = Mul(was, f)", gradient=True,
              reductions=_MEAN),
        *_one("n = Size(input) f = Cast<to=1>(n) grad_input = Div(was, f)", gradient=True,
              reductions=_SUM),
        *_one("n = Shape<start=1, end=2>(input) f = Cast<to=1>(n) grad_input = Mul(was, f)",
              gradient=True, reductions=_ROWS),
    ),
    Fault.WRONG_GRADIENT: _one("grad_input = Sign(was)", gradient=True),
}  # fmt: skip

#: Faults that no graph shows here, and why.
NOT_PLANTED = {
    Fault.HALF_ACCUMULATION: "ONNX Runtime's CPU provider adds half formats up in float32"
}

#: What is wrong with the exporter's own graph.
_THEIRS = {
    "mean": {Fault.EMPTY_MEAN, Fault.FLOAT32_ACCUMULATION},
    "sum": {Fault.FLOAT32_ACCUMULATION},
}


@dataclass(frozen=True)
class Cell:
    """A graph with a fault: the plant of that number. Or a right graph, of a beta and a dtype."""

    spelling: str
    reduction: str
    fault: Fault | None = None
    number: int = 0
    beta: float = 1.0
    dtype: str = "float32"

    @property
    def plant(self) -> Plant:
        return PLANTS[self.fault][self.number] if self.fault else Plant(("",))

    def model(self) -> tuple[onnx.ModelProto, LossSpec] | None:
        """The graph and what it is held against; None where it has no such fault."""
        how = self.plant
        if self.fault is None:
            spec = spec_of(self.reduction, self.beta, self.dtype)
            return graph_of(self.spelling, self.reduction, spec), spec
        if how.gradient and self.spelling == EXPORTER:
            return None
        spec = spec_of(self.reduction, how.beta, how.dtype, how.gradient)
        own = spec if how.theirs is None else replace(spec, beta=how.theirs)
        model = graph_of(self.spelling, self.reduction, own)
        if spec.reduction == "none" and self.spelling not in BY_HAND:
            _apart(model)
        if not any(edit == "" or plant(model, edit) for edit in how.edits):
            return None
        for output in model.graph.output:
            output.type.tensor_type.ClearField("shape")
        if self.fault is Fault.DTYPE:
            model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
        return model, spec


def planted_cells(words: Sequence[str] = ()) -> list[Cell]:
    """Every fault, or those with a word in their names, in every spelling and reduction."""
    return [
        Cell(spelling, reduction, fault, number)
        for fault, plants in PLANTS.items()
        if not words or any(word in fault.value for word in words)
        for number, how in enumerate(plants)
        for spelling, reduction in itertools.product(how.only, how.reductions)
    ]


_BETAS = (0.0, 1e-3, 0.5, 1.0, 1e4)
#: Where a formula divides by beta with no guard, 0 is a fault.
_NO_ZERO = ("Clip", "Min and the excess", "Huber over beta", "Where, by two masks")


def _is_right(spelling: str, reduction: str, beta: float, dtype: str) -> bool:
    """Whether a graph has no fault by its spelling, however it came to it."""
    if spelling == EXPORTER:
        # It adds up in float32, stores beta as float32, makes float32 of the L1 of a half format,
        # and ONNX Runtime has not all that it writes of bfloat16.
        rounded = dtype == "float64" and beta == 1e-3
        l1_of_half = dtype == "float16" and beta == 0
        adds = reduction in ("mean", "sum")
        return not (adds or rounded or l1_of_half or dtype == "bfloat16")
    if spelling in OURS:
        return True
    if dtype == "float64" and reduction in ("mean", "sum"):
        return False  # by hand it is added up in float64, and ours as if in more
    if spelling == "Huber over beta" and beta > 1:
        return False  # the product of the largest numbers overflows
    return not (beta == 0 and spelling in _NO_ZERO)


def right_cells() -> list[Cell]:
    """Right graphs of several betas in every dtype."""
    every = itertools.product(SPELLINGS, REDUCTIONS, _BETAS, DTYPES)
    return [Cell(s, r, beta=beta, dtype=dtype) for s, r, beta, dtype in every
            if _is_right(s, r, beta, dtype)]  # fmt: skip


# --- the judge -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What `verify` made of a cell.

    Attributes:
        kind: `named`: that fault, and no other that is not there; of a right graph: no fault.
            `another`: one that is not there. `unnamed`: red, and no name. `unseen`: green.
        said: the faults that were named, or the words of an error.
        beside: whether others are said to explain the answers as well.
    """

    kind: str
    said: tuple[str, ...] = ()
    beside: bool = False


def judge(cell: Cell) -> Outcome | None:
    """One cell of the card; None where there is no such graph."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = cell.model()
        if made is None:
            return None
        try:
            return _planted(cell, *made) if cell.fault else _right(*made)
        except SmoothL1DeployError as exc:
            return Outcome("unnamed" if cell.fault else "another", (str(exc),))


def _planted(cell: Cell, model: onnx.ModelProto, spec: LossSpec) -> Outcome:
    found = verify(model, spec=spec, drift=cell.plant.drift)
    assert isinstance(found, Verification)
    if found:
        return Outcome("unseen")
    named = {diagnosis.fault for diagnosis in found.diagnoses} - {Fault.UNKNOWN}
    there = {cell.fault, *cell.plant.also}
    if cell.spelling == EXPORTER:
        there |= _THEIRS.get(cell.reduction, set())
    kind = "named" if cell.fault in named and named <= there else "another" if named else "unnamed"
    beside = any("would explain the answers as well" in d.explanation for d in found.diagnoses)
    return Outcome(kind, tuple(d.fault.value for d in found.diagnoses), beside)


def _right(model: onnx.ModelProto, spec: LossSpec) -> Outcome:
    """The diagnosis is asked though nothing is red, as `verify` itself never does."""
    drift = spec.beta == 1 and spec.dtype == "float32"
    found = verify(model, spec=spec, drift=drift)
    assert isinstance(found, Verification)
    named = found.diagnoses or diagnose(load(model), spec)
    said = tuple(diagnosis.fault.value for diagnosis in named)
    return Outcome("another" if named or not found else "named", said)


# --- the tables ------------------------------------------------------------------------------

_ROOT = Path(__file__).resolve().parent.parent
PAGE = _ROOT / "docs" / "diagnosis.md"
_BEGIN, _END = (f"<!-- {what} scripts/scorecard -->\n" for what in ("written by", "end of"))

KINDS = {
    "named": "named",
    "another": "another named",
    "unnamed": "red, not named",
    "unseen": "not seen",
}
_HEADS = ("planted", *KINDS.values())

Found = Mapping[Cell, Outcome]


def _counts(outcomes: Iterable[Outcome]) -> tuple[str, ...]:
    kinds = Counter(outcome.kind for outcome in outcomes)
    return tuple(f"{count:,}" for count in (kinds.total(), *(kinds[kind] for kind in KINDS)))


def by_fault(found: Found) -> Table:
    """A row for each fault; below, where it is not named rightly."""
    rows, below = [], []
    for fault in PLANTS:
        mine = {cell: outcome for cell, outcome in found.items() if cell.fault is fault}
        if mine or fault in NOT_PLANTED:
            rows.append((fault.value, *_counts(mine.values())))
        if fault in NOT_PLANTED:
            below.append(f"{fault.value} is not planted: {NOT_PLANTED[fault]}")
        wrong = (
            (f"plant {c.number + 1}, {KINDS[o.kind]}: {', '.join(o.said)}".removesuffix(": "), c)
            for c, o in mine.items()
            if o.kind != "named"
        )
        grouped: dict[str, list[Cell]] = {}
        for text, cell in wrong:
            grouped.setdefault(text, []).append(cell)
        for text, cells in grouped.items():
            where = (", ".join(dict.fromkeys(c.reduction for c in cells)),
                     "; ".join(dict.fromkeys(c.spelling for c in cells)))  # fmt: skip
            below.append(f"{fault.value}, {text} ({' of '.join(where)})")
    rows.append(("all", *_counts(found.values())))
    return Table("faults", ("fault", *_HEADS), rows, "l" + "r" * len(_HEADS), tuple(below))


def by_spelling(found: Found, right: Found) -> Table:
    """A row for each spelling, with the alarms on its right graphs."""
    rows, below = [], []
    for spelling in SPELLINGS:
        mine = [outcome for cell, outcome in found.items() if cell.spelling == spelling]
        graphs = [outcome for cell, outcome in right.items() if cell.spelling == spelling]
        wrong = sum(outcome.kind != "named" for outcome in graphs)
        rows.append((spelling, *_counts(mine), f"{len(graphs):,}", f"{wrong:,}"))
    alarms = {cell: outcome for cell, outcome in right.items() if outcome.kind != "named"}
    rows.append(("all", *_counts(found.values()), f"{len(right):,}", f"{len(alarms):,}"))
    for cell, outcome in alarms.items():
        where = f"{cell.spelling}, {cell.reduction}, beta {cell.beta:g}, {cell.dtype}"
        below.append(f"a false alarm: {where}: {', '.join(outcome.said) or 'red'}")
    heads = (*_HEADS, "right graphs", "false alarms")
    return Table("spellings", ("spelling", *heads), rows, "l" + "r" * len(heads), tuple(below))


def _told(found: Found, right: Found, seconds: float) -> str:
    faults = len({cell.fault for cell in found})
    named = sum(outcome.kind == "named" for outcome in found.values())
    alarms = sum(outcome.kind != "named" for outcome in right.values())
    beside = sum(outcome.beside for outcome in found.values())
    return (
        f"`scripts/scorecard` on {now()[:10]}, {seconds / 60:.0f} minutes on {os.cpu_count()} "
        f"cores: {len(found):,} planted graphs of {faults} faults, {named:,} named, {beside} of "
        f"them with other faults that would explain the answers as well; {len(right):,} right "
        f"graphs, {alarms} false alarms."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the card; write it where every fault was planted."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="words of the faults' names")
    words = parser.parse_args(arguments).words
    started = time.monotonic()
    cells = [*planted_cells(words), *([] if words else right_cells())]
    cells.sort(key=lambda cell: cell.spelling)  # a process keeps what the exporter gave
    judged = dict(each(judge, cells, os.cpu_count() or 1))
    outcomes = {cell: outcome for cell in cells if (outcome := judged[cell])}
    found = {cell: outcome for cell, outcome in outcomes.items() if cell.fault}
    right = {cell: outcome for cell, outcome in outcomes.items() if not cell.fault}
    told = _told(found, right, time.monotonic() - started)
    tables = (by_fault(found), by_spelling(found, right))
    text = "\n".join([told, *(line for table in tables for line in table.markdown())]).rstrip()
    if words:
        print(text)
    else:
        head, _, rest = PAGE.read_text().partition(_BEGIN)
        PAGE.write_text(f"{head}{_BEGIN}\n{text}\n\n{_END}{rest.partition(_END)[2]}")
        print(f"{told}\nwrote {PAGE.relative_to(_ROOT)}")
    return int(any(outcome.kind == "another" for outcome in outcomes.values()))


if __name__ == "__main__":
    raise SystemExit(main())
