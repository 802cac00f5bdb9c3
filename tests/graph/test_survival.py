"""What other tools do to our files, for a few files; scripts/survival tries all of them."""

from __future__ import annotations

import functools

import onnx
import pytest
from onnx import TensorProto, helper
from survival import TOOLS, Outcome, Row, Tool, judge, missing, survive, table

from smoothl1_deploy import LossSpec, attach, export
from smoothl1_deploy.graph.metadata import is_changed

#: One for each thing that once went wrong.
FILES = (
    Row("function", "mean", "float32"),  # its losses were said to be of rank 0
    Row("function", "gradient per sample", "float64"),  # a name was said of two things
    Row("inlined", "per sample", "float32"),  # beta was a float without a tensor
    Row("attach inlined", "run-time beta", "float16"),
    Row("attach function", "unreduced weight", "float32"),  # a product was quantised
)


@functools.cache
def made(row: Row) -> bytes:
    return row.model().SerializeToString()


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_the_number_survives_or_the_tool_s_own_fault_is_named(tool: Tool) -> None:
    if missing(tool):
        pytest.skip(f"{tool.package} is not installed")
    found = {row: survive(tool, row, made(row)) for row in FILES if row.route.startswith(tool.only)}
    assert all(outcome.ok for outcome in found.values()), found
    assert any(outcome.status == "same" for outcome in found.values())


def _negate(model: onnx.ModelProto) -> onnx.ModelProto:
    next(node for node in model.graph.node if node.op_type == "Abs").op_type = "Neg"
    return model


def _forget(model: onnx.ModelProto) -> onnx.ModelProto:
    del model.graph.node[0]
    return model


def _refuse(model: onnx.ModelProto) -> onnx.ModelProto:
    raise NotImplementedError("not this one")


@pytest.mark.parametrize(
    ("change", "status", "detail"),
    [
        (_negate, "wrong", "ULP"),
        (_forget, "unloadable", "Invalid model"),
        (_refuse, "refuses", "NotImplementedError: not this one"),
    ],
)
def test_a_tool_that_spoils_the_file_is_seen(change: object, status: str, detail: str) -> None:
    found = survive(Tool("planted", "onnx", "onnx", change), FILES[2])  # type: ignore[arg-type]
    assert found.status == status and detail in found.detail, found
    assert found.ok is (status == "refuses")


def test_a_sum_in_float32_is_seen() -> None:
    """It shows on equal numbers."""
    row = Row("inlined", "sum", "float32")
    model = row.model()
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.DOUBLE:
                attribute.i = TensorProto.FLOAT
    found = judge(row, model)
    assert found.status == "wrong" and "constant" in found.detail, found


def test_the_table_tells_equal_cells_together() -> None:
    same, refuses = Outcome("same"), Outcome("refuses", "no")
    dtypes = ("float32", "float16", "bfloat16", "float64")
    rows = [Row("torch", v, d) for v in ("none", "mean", "sum") for d in dtypes]
    found = {row: refuses if row.dtype == "float16" else same for row in rows}
    text = table({"a": found, "b": dict.fromkeys(rows, same), "c": dict.fromkeys(rows, refuses)})
    lines = text.splitlines()
    assert [line.split(" | ")[3] for line in lines[2:5]] == ["same, [1]", "same", "[2]"]
    assert lines[6:] == ["1. float16: refuses: no", "2. refuses: no"]


@pytest.mark.parametrize("attached", [False, True])
def test_an_inlined_loss_has_no_constant_whose_number_is_no_tensor(attached: bool) -> None:
    """onnxslim reads such a float as a double, and converters leave its dtype as it was."""
    spec = LossSpec(0.3)
    model = export(spec, "inlined", ("N", 4))
    if attached:
        ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("N", 4)) for name in "xy"]
        nodes = [helper.make_node("Neg", ["x"], ["y"])]
        front = helper.make_model(helper.make_graph(nodes, "front", ports[:1], ports[1:]))
        model = attach(front, "y", "t", spec, route="inlined")
    constants = [node for node in model.graph.node if node.op_type == "Constant"]
    assert constants
    assert {attribute.name for node in constants for attribute in node.attribute} == {"value"}


def test_what_a_tool_has_changed_is_known_as_changed() -> None:
    from onnxscript import optimizer

    assert is_changed(optimizer.optimize(export(LossSpec(0.5), shape=("N", 4))))
