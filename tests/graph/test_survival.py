"""What other tools do to our files, for a few files; scripts/survival tries all of them."""

from __future__ import annotations

import functools

import onnx
import pytest
from handmade import model_of
from onnx import TensorProto
from survival import TOOLS, Outcome, Row, Tool, judge, missing, survive, table

from smoothl1_deploy import LossSpec, attach, export
from smoothl1_deploy.graph._metadata import is_changed

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


def test_a_tool_that_spoils_the_file_is_seen() -> None:
    def negate(model: onnx.ModelProto) -> onnx.ModelProto:
        next(node for node in model.graph.node if node.op_type == "Abs").op_type = "Neg"
        return model

    def forget(model: onnx.ModelProto) -> onnx.ModelProto:
        del model.graph.node[0]
        return model

    def refuse(model: onnx.ModelProto) -> onnx.ModelProto:
        raise NotImplementedError("not this one")

    for change, status, detail in (
        (negate, "wrong", "ULP"),
        (forget, "unloadable", "Invalid model"),
        (refuse, "refuses", "NotImplementedError: not this one"),
    ):
        found = survive(Tool("planted", "onnx", change), FILES[2])
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


def test_an_inlined_loss_has_no_constant_whose_number_is_no_tensor() -> None:
    """onnxslim reads such a float as a double, and converters leave its dtype as it was."""
    spec = LossSpec(0.3)
    front = model_of("g (float[N, 4] x) => (float[N, 4] y) { y = Neg(x) }")
    for model in (
        export(spec, "inlined", ("N", 4)),
        attach(front, "y", "t", spec, route="inlined"),
    ):
        constants = [node for node in model.graph.node if node.op_type == "Constant"]
        assert constants
        assert {attribute.name for node in constants for attribute in node.attribute} == {"value"}


def test_what_a_tool_has_changed_is_known_as_changed() -> None:
    from onnxscript import optimizer

    assert is_changed(optimizer.optimize(export(LossSpec(0.5), shape=("N", 4))))
