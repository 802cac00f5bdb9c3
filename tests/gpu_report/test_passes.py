"""How often a graph goes over memory, counted; and its twin that adds up in two stages."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from smoothl1_deploy import LossSpec, export, load
from smoothl1_deploy.backends.ort_nodes import inlined
from smoothl1_deploy.gpu_report import command, passes
from smoothl1_deploy.gpu_report.contestants import in_two_stages
from smoothl1_deploy.gpu_report.passes import CANDIDATES, count_forms, count_passes, passes_table


def test_two_operators_by_hand() -> None:
    """Sub reads 4 + 4 and writes 4; Abs reads 4 and writes 4; a view and a constant are free."""
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 18]>
        g (float[N, 16] input, float[N, 16] target) => (float[M] loss) <int64[1] all = {-1}>
        { d = Sub(input, target) a = Abs(d) loss = Reshape(a, all) }""")
    assert count_passes(model) == (2, 2, 20.0)


def test_a_sum_reads_and_hardly_writes() -> None:
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 18]>
        g (float[N, 16] input, float[N, 16] target) => (float loss)
        <int64[1] last = {1}, int64[1] first = {0}>
        { d = Sub(input, target) r = ReduceSum<keepdims = 0>(d, last)
          loss = ReduceSum<keepdims = 0>(r, first) }""")
    # A row's sum is 4/16 bytes an element, written and read again; the last operator is no pass.
    assert count_passes(model) == (3, 2, 12 + 4 + 0.25 + 0.25)


def test_the_graphs_of_this_tool() -> None:
    none, mean, narrow = (
        count_passes(inlined(export(LossSpec(0.75, reduction, dtype), "inlined", ("N", 16))))
        for reduction, dtype in (("none", "float32"), ("mean", "float32"), ("none", "float16"))
    )
    assert none == (8, 8, 80.0)
    # Six of a sum's own form, a cast to float64 (12 bytes), and its sum (8).
    assert mean[1:] == (8, 80.0)
    # Two casts in, one out, of 6 bytes each.
    assert narrow == (11, 11, 98.0)


@pytest.mark.parametrize("name", [*CANDIDATES], ids=str)
def test_a_candidate_is_the_loss(name: tuple[str, str]) -> None:
    """A form that computes something else would be no candidate."""
    import onnxruntime as ort

    session = ort.InferenceSession(
        onnx.parser.parse_model(CANDIDATES[name]).SerializeToString(),
        providers=["CPUExecutionProvider"],
    )
    rng = np.random.default_rng(3)
    x, t = (rng.standard_normal((64, 16)).astype(np.float32) for _ in range(2))
    expected = load(export(LossSpec(0.75, name[1]), shape=("N", 16))).run(x, t)["loss"]
    (got,) = session.run(None, {"input": x, "target": t})
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


def test_the_table_and_its_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = count_forms()
    assert counted.problem is None
    forms = {row.form for row in counted.rows}
    assert {"this tool's, function", "plain exporter", "both of these"} <= forms
    assert {(r.reduction, r.dtype) for r in counted.rows if r.form == "this tool's, inlined"} == {
        (reduction, dtype)
        for reduction in ("none", "sum", "mean")
        for dtype in ("float32", "float16")
    }
    assert "| this tool's, inlined | `none` | float32 | 8 | 8 | 80 | 12 | 15% |" in passes_table(
        counted.rows
    )
    monkeypatch.setattr(command, "count_forms", lambda: counted)
    assert command.main(["--passes"]) == 0
    assert capsys.readouterr().out.splitlines() == passes_table(counted.rows)


def test_without_onnxruntime(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert passes.count_forms().problem.startswith("MissingDependencyError: counting the passes")
    assert command.main(["--passes"]) == 3
    assert "smoothl1-deploy[cpu]" in capsys.readouterr().out


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_in_two_stages(reduction: str) -> None:
    spec = LossSpec(1.0, reduction)
    model = export(spec, shape=("N", 16))
    twin = in_two_stages(model)
    sums = [node for node in twin.graph.node if node.op_type == "ReduceSum"]
    (flat,) = [node for node in twin.graph.node if node.op_type == "Reshape"]
    assert len(sums) == 2 and flat.input[0] == sums[0].output[0]
    x, t = (np.random.default_rng(n).standard_normal((640, 16)).astype(np.float32) for n in (1, 2))
    for rows in (640, 0):
        one, two = (load(m).run(x[:rows], t[:rows])["loss"] for m in (model, twin))
        np.testing.assert_array_equal(one, two)
    assert load(twin).spec == spec


def test_no_reduction_to_cut() -> None:
    with pytest.raises(StopIteration):
        in_two_stages(export(LossSpec(reduction="none"), shape=("N", 16)))
