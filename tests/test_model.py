"""The one reader of models: what a caller must give, axes, shapes, what is attached."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import child
import numpy as np
import onnx
import pytest
import torch
from handmade import Array, model_of, run
from onnx import helper, numpy_helper

from smoothl1_deploy import LossSpec, attach, load
from smoothl1_deploy._artefact import signature
from smoothl1_deploy._model import ATTACHED, Loss, axes_of, dims_of, inputs_of, main_tensors
from smoothl1_deploy.backends._ort_gpu import host_nodes
from smoothl1_deploy.cli import main
from smoothl1_deploy.cli._inspect import graph_ports, inspect_model
from smoothl1_deploy.errors import ArtefactError, SpecError
from smoothl1_deploy.graph._attach import read_losses
from smoothl1_deploy.serving._config import onnx_ports
from smoothl1_deploy.serving._graph import serve
from smoothl1_deploy.serving._lint import unguarded
from smoothl1_deploy.serving._supervise import make_canary
from smoothl1_deploy.tensorrt._profile import input_shapes


def _model(rows: int) -> onnx.ModelProto:
    """A matrix that is reshaped to what it would be if it were transposed."""
    body = "size = Shape(x) turned = Gather<axis = 0>(size, order) y = Reshape(x, turned)"
    graph = f"g (float[{rows}, 4] x) => (float[a, b] y) {{ {body} }}"
    return model_of(graph, order=np.array([1, 0]))


def test_shapes_that_the_graph_computes_are_told_where_inference_works() -> None:
    model = _model(6)
    assert main_tensors(model)["y"].certain == (4, 6)
    model.graph.node[0].op_type = "Unknown"  # and the declarations count where it doesn't
    y = main_tensors(model)["y"]
    assert (y.shape, y.certain) == (("a", "b"), None)
    for rows in (1 << 22, 1 << 40):  # of a large model without their numbers
        assert main_tensors(_model(rows))["turned"].certain == (2,)


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
    done = child.run("-c", code)
    assert done.stdout.strip() == "['loss', 'second']", done.stderr[-2000:]


#: Every way to write "not known" into a dimension; -1 is PaddlePaddle's.
_UNKNOWN: dict[str, Callable[[Any], Any]] = {
    "-1": lambda dim: setattr(dim, "dim_value", -1),
    "?": lambda dim: setattr(dim, "dim_param", "?"),
    "no name and no value": lambda dim: dim.Clear(),
}


def _parsed(text: str, unknown: str = "?", imports: str = "") -> onnx.ModelProto:
    """A model whose axes `u` are written as `unknown`; checked by nobody, as those of users are."""
    model = model_of(text, imports=imports)
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "u":
                _UNKNOWN[unknown](dim)
    return model


def _rows(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32) * 2


_SUM = LossSpec(0.5, "sum", gradient=True)


def _assert_pytorchs(model: onnx.ModelProto, x: Array, t: Array, /, **feeds: Array) -> None:
    """The sum and its gradient with respect to `y`, which is -x, in the shapes of PyTorch."""
    y = torch.from_numpy(-x).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # broadcasting is meant
        loss = torch.nn.functional.smooth_l1_loss(y, torch.from_numpy(t), reduction="sum", beta=0.5)
    loss.backward()
    found = run(model, {"x": x, **feeds})
    np.testing.assert_allclose(found["loss"], loss.detach().numpy(), rtol=1e-6)
    gradient = y.grad.numpy()  # type: ignore[union-attr]
    assert found["grad_input"].shape == gradient.shape
    np.testing.assert_allclose(found["grad_input"], gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("unknown", _UNKNOWN)
def test_an_axis_without_a_size_is_dynamic_and_like_no_other(unknown: str) -> None:
    model = _parsed("g (float[u, u, 4, N] x, float t) => (float[u] y) { y = Abs(t) }", unknown)
    x, t = model.graph.input
    assert axes_of(x) == (None, None, 4, "N") and axes_of(t) == ()
    assert dims_of(x) == ("x_axis_0", "x_axis_1", 4, "N")
    assert dims_of(model.graph.output[0]) == ("y_axis_0",)


def _with_weights() -> onnx.ModelProto:
    """Weights among the inputs, as before IR 4, one of them sparse."""
    text = """g (float[u, 4] x, float[u, 4] t, float[4] w, float[4] s) => (float[u, 4] y)
        { z = Mul(x, w) q = Add(z, s) y = Sub(q, t) }"""
    model = _parsed(text, "-1")
    model.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "w"))
    values = helper.make_tensor("s", 1, [1], [1.0])
    places = helper.make_tensor("s_indices", 7, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [4]))
    return model


def test_every_part_reads_the_same_inputs_and_axes() -> None:
    model = _with_weights()
    assert [value.name for value in inputs_of(model)] == ["x", "t"]
    assert [port.name for port in signature(model).inputs.values()] == ["x", "t"]
    assert signature(model).input.shape == ("x_axis_0", 4)
    shown = [(port["name"], port["shape"]) for port in graph_ports(model)[0]]
    assert shown == [("x", [-1, 4]), ("t", [-1, 4])]
    assert [(p.name, p.dims) for p in onnx_ports(model).inputs] == [("x", (-1, 4)), ("t", (-1, 4))]
    assert [(s.name, s.dims) for s in input_shapes(model)] == [("x", (None, 4)), ("t", (None, 4))]
    assert host_nodes(model) == frozenset()
    assert unguarded(_parsed(_PAIR, "-1"), ()) == [("t", "x")]


_PAIR = """g (float[u, 4] x, float[u, 4] t) => (float[u, 4] y)
    { d = Sub(x, t) y = Abs(d) }"""
_TWO = "g (float[u, 4] x, float[u, 4] t) => (float[u, 4] y) { y = Neg(x) }"
_ONE = "g (float[u, 4] x) => (float[u, 4] y) { y = Neg(x) }"


@pytest.mark.parametrize("unknown", _UNKNOWN)
def test_the_gradient_where_two_unknown_axes_differ(unknown: str) -> None:
    """Taken for equal, grad_input came in the shape of the target: (3, 4) of ones."""
    for text in (_TWO, _ONE):  # a target that is there, and a new one
        model = attach(_parsed(text, unknown), "y", "t", _SUM)
        for rows, others in ((1, 3), (3, 3)):
            t = _rows(others, 1)
            _assert_pytorchs(model, _rows(rows), t, t=t)
    constant = _rows(2, 1)
    model = attach(_parsed(_ONE, unknown), "y", constant, _SUM)
    _assert_pytorchs(model, _rows(2), constant)


@pytest.mark.parametrize("unknown", _UNKNOWN)
def test_a_server_of_unknown_rows(tmp_path: Path, unknown: str) -> None:
    """The canary made arrays of -1 rows: serve ended as a bug."""
    model = attach(_parsed(_ONE, unknown), "y", "t", LossSpec(0.5, per_sample=True))
    served = serve(model)
    assert served.unbatched is None
    onnx.save(served.model, tmp_path / "model.onnx")
    canary = make_canary(tmp_path / "model.onnx", "m", "1")
    assert canary is not None
    answer = run(served.model, canary.inputs)
    assert answer["loss"].shape == (2, 1)
    assert canary._same(answer["loss"], canary.expected["loss"])
    with pytest.raises(Exception, match="Reshape"):
        run(served.model, {"x": _rows(3), "t": _rows(1)})  # the guard of the rows


def test_a_server_of_a_model_with_a_name_that_is_no_text() -> None:
    """Found by scripts/fuzz: the name was written back as it was, which protobuf refuses."""
    model = attach(_parsed(_ONE), "y", "t", LossSpec(0.5, per_sample=True))
    model.graph.node[0].name = "Neg____"
    data = model.SerializeToString().replace(b"Neg____", b"Neg\xff\xff\xff\xff")
    assert read_losses(serve(onnx.load_model_from_string(data)).model)


#: What people do to a model: the batch of its input becomes dynamic, the rest is left.
_ONCE_OF_ONE_ROW = """g (float[N, 4] x) => (float[1, 4] y) <float[1, 4] h>
    { h = Neg(x) y = Identity(h) }"""


def test_a_declared_batch_of_one_where_it_is_n(tmp_path: Path, capsys: Any) -> None:
    model = _parsed(_ONCE_OF_ONE_ROW)
    with pytest.warns(UserWarning) as caught:
        grafted = attach(model, "y", "t", _SUM)
    assert [str(warning.message) for warning in caught] == [
        "the model declares 'y' with the shape (1, 4), and its nodes make (N, 4) of its inputs "
        "(and likewise of 1 more); the nodes are believed"
    ]
    assert dims_of(grafted.graph.input[1]) == ("N", 4)
    assert [dims_of(value) for value in grafted.graph.output] == [("N", 4), (), ("N", 4)]
    assert dims_of(model.graph.output[0]) == (1, 4)  # the caller's own
    x, t = _rows(3), _rows(3, 1)
    _assert_pytorchs(grafted, x, t, t=t)
    with pytest.warns(UserWarning):
        constant = attach(model, "y", _rows(1), _SUM)
    _assert_pytorchs(constant, x, _rows(1))
    onnx.save(model, tmp_path / "m.onnx")
    arguments = ["--prediction", "y", "--target", "t", "-o", str(tmp_path / "out.onnx")]
    assert main(["attach", str(tmp_path / "m.onnx"), *arguments]) == 0
    assert "note: the model declares 'y' with the shape (1, 4), and" in capsys.readouterr().err


def test_a_declared_rank_and_a_branch_are_believed_no_more() -> None:
    rank = _parsed("g (float[N, 2, 4] x) => (float[N, 4] y) { y = Neg(x) }")
    with pytest.warns(UserWarning, match=r"\(N, 4\), and its nodes make \(N, 2, 4\) of"):
        grafted = attach(rank, "y", "t", _SUM)
    assert dims_of(grafted.graph.input[1]) == ("N", 2, 4)
    x, t = (_rows(6, seed).reshape(3, 2, 4) for seed in (0, 1))
    _assert_pytorchs(grafted, x, t, t=t)
    branch = """g (bool c, float[N, 4] x) => (float[1, 4] y) { y = If (c) <
        then_branch = t () => (float[1, 4] a) { a = Neg(x) },
        else_branch = e () => (float[1, 4] b) { b = Abs(x) }> }"""
    assert main_tensors(_parsed(branch))["y"].certain == ("N", 4)


def test_every_part_believes_the_nodes(tmp_path: Path) -> None:
    text = "g (float[N, 4] x, float[N, 4] t) => (float[2, 4] y) { d = Sub(x, t) y = Abs(d) }"
    model = _parsed(text)
    assert signature(model).loss.shape == ("N", 4)
    assert graph_ports(model)[1][0]["shape"] == ["N", 4]
    assert onnx_ports(model).outputs[0].dims == (-1, 4)
    with pytest.warns(UserWarning, match="the model declares 'y'"):
        assert dims_of(serve(model).model.graph.output[0]) == ("N", 4)
    onnx.save(model, tmp_path / "m.onnx")
    assert "the model declares 'y' with" in inspect_model(tmp_path / "m.onnx").problems[0]
    assert load(model).run(_rows(3), _rows(3))["y"].shape == (3, 4)


_UNTOLD = "g (float[N, 4] x) => (float[{shape}] y) {{ y = mine.QuickGelu(x) }}"
_MINE = ', "mine": 1'


def test_what_nothing_contradicts_is_believed_but_no_number_rests_on_it() -> None:
    y = main_tensors(_parsed(_UNTOLD.format(shape="1, 4"), imports=_MINE))["y"]
    assert (y.shape, y.certain, y.misdeclared) == ((1, 4), None, None)
    # onnx knows nothing of com.microsoft.QuickGelu, and ONNX Runtime runs it.
    text = _UNTOLD.format(shape="1, 4").replace("mine.", "com.microsoft.")
    runs = _parsed(text, imports=', "com.microsoft": 1')
    grafted = attach(runs, "y", "t", _SUM, target_shape=("M", 4), only_loss=True)
    found = run(grafted, {"x": _rows(3), "t": _rows(3, 1)})
    assert found["grad_input"].shape == (3, 4)


def test_target_shape_gives_what_nobody_knows(tmp_path: Path) -> None:
    model = _parsed("g (float[N, 4] x) => (float y) { y = mine.F(x) }", imports=_MINE)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert axes_of(attach(model, "y", "t").graph.input[1]) is None
    weighted = LossSpec(weight="count")
    grafted = attach(model, "y", "t", weighted, weight="w", target_shape=("N", "M", 4))
    assert [axes_of(value) for value in grafted.graph.input[1:]] == [("N", "M", 4)] * 2
    onnx.save(model, tmp_path / "m.onnx")
    ports = ("--prediction", "y", "--target", "t", "--target-shape", "N,7")
    out = tmp_path / "out.onnx"
    assert main(["attach", str(tmp_path / "m.onnx"), *ports, "-o", str(out)]) == 0
    assert axes_of(onnx.load(out).graph.input[1]) == ("N", 7)


def test_target_shape_may_broadcast_and_must_fit() -> None:
    row = attach(_parsed(_ONE), "y", "t", _SUM, target_shape=(1, 4))
    t = _rows(1, 1)
    _assert_pytorchs(row, _rows(3), t, t=t)
    with pytest.raises(SpecError, match=r"the target 't' \(5, 3\): .* can't be broadcast: 4"):
        attach(_parsed(_ONE), "y", "t", target_shape=(5, 3))
    for target in ("x", np.zeros((1, 4), np.float32)):
        with pytest.raises(SpecError, match="has its own; leave target_shape out"):
            attach(_parsed(_ONE), "y", target, target_shape=(1, 4))
    # A size that is only declared doesn't speak against the caller's.
    untold = _parsed(_UNTOLD.format(shape="2, 4"), imports=_MINE)
    assert axes_of(attach(untold, "y", "t", target_shape=(5, 4)).graph.input[1]) == (5, 4)


_LOSS = Loss.of(LossSpec(0.5)).to_dict()
#: What may stand in the entry of a file that somebody else wrote.
_DAMAGED: dict[str, Any] = {
    "no roles": [{**_LOSS, "inputs": {}}],
    "no target": [{**_LOSS, "inputs": {"input": "y"}}],
    "a role too many": [{**_LOSS, "outputs": {"loss": "loss", "grad_input": "g"}}],
    "no inputs": [{"spec": _LOSS["spec"], "outputs": _LOSS["outputs"]}],
    "lists for roles": [{**_LOSS, "inputs": [], "outputs": []}],
    "a number for a name": [{**_LOSS, "outputs": {"loss": 3}}],
    "an empty name": [{**_LOSS, "outputs": {"loss": ""}}],
    "a list for a spec": [{**_LOSS, "spec": []}],
    "a spec of no sense": [{**_LOSS, "spec": {"beta": -1}}],
    "a loss that is no object": [[]],
    "no list": {"spec": 1},
    "null": None,
}


def test_damaged_notes_of_what_was_attached_are_one_sentence(tmp_path: Path, capsys: Any) -> None:
    model, path = attach(_parsed(_ONE), "y", "t", LossSpec(0.5)), tmp_path / "m.onnx"
    sentence = f"the model's metadata entry {ATTACHED} is damaged ("
    for entry in ("[{", *map(json.dumps, _DAMAGED.values())):
        helper.set_model_props(model, {ATTACHED: entry})
        for ask in (read_losses, serve, lambda model: attach(model, "y", "t", LossSpec(0.5))):
            with pytest.raises(ArtefactError, match=rf"^the model's metadata entry {ATTACHED} is"):
                ask(model)
        onnx.save(model, path)
        assert inspect_model(path).problems[0].startswith(sentence), entry
    assert main(["repository", str(tmp_path / "models"), "--model", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


def test_what_was_attached_is_read_as_it_was_noted() -> None:
    spec = LossSpec(float("inf"), "sum", gradient=True, upstream=True, weight="count")
    model = attach(_parsed(_ONE), "y", "t", spec, weight="w")
    inputs = {"input": "y", "target": "t", "weight": "w", "grad_output": "grad_output"}
    assert read_losses(model) == (Loss(spec, inputs, {"loss": "loss", "grad_input": "grad_input"}),)
