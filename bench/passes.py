"""How often each form of the graph goes over memory under ONNX Runtime's CUDA provider.

    python bench/passes.py         # some seconds; needs no GPU

That provider runs operator by operator: each reads its inputs from memory and writes its output
back. So the bytes its operators move are the time it can't go below, and they can be counted
without a GPU: on the graph that ONNX Runtime's own optimiser leaves (extended level), with the
CPU's provider in the place of CUDA's. The two share the rules that apply to these operators.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy._floats import NUMPY_DTYPE
from smoothl1_deploy._model import inputs_of
from smoothl1_deploy.backends._ort_gpu import inlined
from smoothl1_deploy.parity._contract import plain_export

_ROWS, _COLUMNS = 4096, 16
_ELEMENTS = _ROWS * _COLUMNS
_BETA = 0.75  # neither it nor 2 beta is 1, by which no optimiser leaves a division in

#: Operators that launch nothing: constants, views, and what the host knows.
_FREE = ("Constant", "Flatten", "Identity", "Reshape", "Shape", "Size", "Squeeze", "Unsqueeze")

_HEAD = """<ir_version: 8, opset_import: ["" : 18]> g (float[N, 16] input, float[N, 16] target)
=> (float{shape} loss) <float low = {{-0.75}}, float beta = {{0.75}}, float half = {{0.5}},
float two_beta = {{1.5}}, int64[1] last = {{1}}, int64[1] every = {{-1}}, int64[1] first = {{0}}>
{{ d = Sub(input, target) core = Clip(d, low, beta) """
_NOW = (
    "beyond = Sub(d, core) a = Abs(beyond) h = Mul(half, core) q = Div(core, beta) s = Mul(h, q) "
)
_TWICE = "beyond = Sub(d, core) a = Abs(beyond) q = Div(core, two_beta) s = Mul(core, q) "
_DIFFERENCE = "h = Mul(half, core) e = Sub(d, h) m = Mul(core, e) "
_WIDE = ("w = Cast<to = 11>(l) flat = Reshape(w, every) t = ReduceSum<keepdims = 0>(flat, first) "
         "loss = Cast<to = 1>(t) }")  # fmt: skip
_NARROW = ("r = ReduceSum<keepdims = 0>(l, last) w = Cast<to = 11>(r) "
           "t = ReduceSum<keepdims = 0>(w, first) loss = Cast<to = 1>(t) }")  # fmt: skip

#: Forms with fewer passes, for a beta that is known and not 0, as text of ONNX: tried, not taken.
CANDIDATES = {
    ("two sums of rows of 16, of the excess and of the squares", "sum"): (
        _HEAD.format(shape="") + "beyond = Sub(d, core) e = ReduceL1<keepdims = 0>(beyond, last) "
        "q = ReduceSumSquare<keepdims = 0>(core, last) p = Div(q, two_beta) r = Add(e, p) "
        "w = Cast<to = 11>(r) t = ReduceSum<keepdims = 0>(w, first) loss = Cast<to = 1>(t) }"
    ),
    ("core / 2 beta", "none"): _HEAD.format(shape="[N, 16]") + _TWICE + "loss = Add(a, s) }",
    ("core (d - core / 2) / beta", "none"): (
        _HEAD.format(shape="[N, 16]") + _DIFFERENCE + "loss = Div(m, beta) }"
    ),
    ("core / 2 beta", "sum"): _HEAD.format(shape="") + _TWICE + "l = Add(a, s) " + _WIDE,
    ("rows of 16 in float32, then float64", "sum"): (
        _HEAD.format(shape="") + _NOW + "l = Add(a, s) " + _NARROW
    ),
    ("both of these", "sum"): _HEAD.format(shape="") + _TWICE + "l = Add(a, s) " + _NARROW,
    ("core (d - core / 2), rows of 16", "sum"): (
        _HEAD.format(shape="") + _DIFFERENCE + "l = Div(m, beta) " + _NARROW
    ),
}


@dataclass(frozen=True, slots=True)
class Passes:
    """What one form of the graph takes.

    Attributes:
        operators: that are launched, those on a single number included.
        passes: operators among them that read or write every element.
        bytes: they move, an element.
        least: bytes an element that any implementation must move.
    """

    form: str
    reduction: str
    dtype: str
    operators: int
    passes: int
    bytes: float
    least: float

    @property
    def share(self) -> float:
        """Of the copy bandwidth that counts as reached when every pass runs at all of it."""
        return self.least / self.bytes


def count_passes(model: Any) -> tuple[int, int, float]:
    """Operators, passes and bytes an element of an ONNX model of two inputs of [N, 16]."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        options = ort.SessionOptions()
        options.log_severity_level = 4  # it warns that the file is for this machine
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(path)
    nodes = [node for node in graph.graph.node if node.op_type not in _FREE]
    known = {port.name for port in graph.graph.output}
    inner = {name for node in graph.graph.node for name in node.output if name} - known
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(inner))
    plain = ort.SessionOptions()
    plain.log_severity_level = 4
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        graph.SerializeToString(), plain, providers=["CPUExecutionProvider"]
    )
    kinds = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}
    feeds = {
        port.name: np.zeros((_ROWS, _COLUMNS), NUMPY_DTYPE[kinds[port.type.tensor_type.elem_type]])
        for port in inputs_of(graph)
    }
    names = [port.name for port in session.get_outputs()]
    tensors = {**dict(zip(names, session.run(None, feeds), strict=True)), **feeds}
    # A sum of rows is touched where the rows are; what is smaller than a row's share is not.
    sizes = {name: x.nbytes for name, x in tensors.items() if x.size >= _ELEMENTS // _COLUMNS}
    whole = {name for name, x in tensors.items() if x.size >= _ELEMENTS}
    moved = passes = 0
    for node in nodes:
        touched = {*node.input, *node.output}
        passes += bool(touched & whole)
        moved += sum(sizes.get(name, 0) for name in touched)
    return len(nodes), passes, moved / _ELEMENTS


def forms() -> Iterator[Passes]:
    """This tool's graph by route, the plain exporter's and the candidates."""

    def of(form: str, reduction: str, dtype: str, model: Any) -> Passes:
        item = {"float32": 4, "float16": 2}[dtype]
        least = item * (3 if reduction == "none" else 2)
        return Passes(form, reduction, dtype, *count_passes(model), least)

    for dtype in ("float32", "float16"):
        for reduction in ("none", "sum", "mean"):
            spec = LossSpec(_BETA, reduction, dtype)
            for route in ("function", "inlined"):
                # As the backend ort-cuda hands it over.
                model = inlined(export(spec, route, ("N", _COLUMNS)))
                yield of(f"this tool's, {route}", reduction, dtype, model)
            if dtype == "float16":
                continue  # the CPU's provider has casts inserted that CUDA's needs not
            arguments = {"reduction": reduction, "beta": _BETA}
            model = plain_export(arguments, dtype, ("N", _COLUMNS))
            yield of("plain exporter", reduction, dtype, model)
            for (name, which), text in CANDIDATES.items():
                if which == reduction:
                    yield of(name, reduction, dtype, onnx.parser.parse_model(text))


def passes_table(rows: Iterable[Passes]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [
        "| form | reduction | dtype | operators | passes | bytes an element | least | at most |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    return lines + [
        f"| {r.form} | `{r.reduction}` | {r.dtype} | {r.operators} | {r.passes} | {r.bytes:.4g} | "
        f"{r.least:g} | {r.share:.0%} |"
        for r in rows
    ]


if __name__ == "__main__":
    print("\n".join(passes_table(forms())))
