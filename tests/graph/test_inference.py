"""Shape inference: what it tells, and the memory it takes for tensors that are never made."""

from __future__ import annotations

import subprocess
import sys

import onnx
import pytest
from onnx import parser

from smoothl1_deploy.graph.inference import inferred_graph

_COMPUTED = """<ir_version: 8, opset_import: ["": 18]>
g (float[{rows}, 4] x) => (float[a, b] y) {{
    size = Shape(x)
    turned = Gather <axis = 0> (size, {{order}})
    y = Reshape(x, turned)
}}"""


def _axes(graph: onnx.GraphProto, name: str) -> list[int]:
    values = {value.name: value for value in (*graph.value_info, *graph.output)}
    return [dim.dim_value for dim in values[name].type.tensor_type.shape.dim]


def _model(rows: int) -> onnx.ModelProto:
    text = _COMPUTED.format(rows=rows).replace("{order}", "order")
    text = text.replace("{\n    size", "<int64[2] order = {1, 0}> {\n    size")
    return parser.parse_model(text)


def test_shapes_that_the_graph_computes_are_told() -> None:
    assert _axes(inferred_graph(_model(6)), "y") == [4, 6]


@pytest.mark.parametrize("rows", [1 << 22, 1 << 40])
def test_of_a_large_model_the_declared_shapes_are_told(rows: int) -> None:
    assert _axes(inferred_graph(_model(rows)), "turned") == [2]


def test_a_model_that_contradicts_itself_gives_its_own_graph() -> None:
    model = _model(6)
    model.graph.node[0].op_type = "Unknown"
    assert inferred_graph(model) == model.graph


_ROWS = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
from smoothl1_deploy import LossSpec, attach, export

model = export(LossSpec(dtype="float64", per_sample=True), shape=({rows}, 16))
scored = attach(model, "loss", "scores", LossSpec(0.5, dtype="float64"), loss_name="second")
print([value.name for value in scored.graph.output])
"""


def test_rows_without_end_take_no_memory() -> None:
    """onnx keeps a message for each element of a tensor of rank 1, those inside functions too."""
    code = _ROWS.format(rows=(1 << 31) - 1)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "['loss', 'second']", done.stderr[-2000:]
