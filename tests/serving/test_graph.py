"""Served graphs: their shapes, their guard, and the number that stays the same."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
from handmade import model_of, run
from onnx import TensorProto, helper

from smoothl1_deploy import LossSpec, attach, export, load, verify
from smoothl1_deploy._artefact import signature
from smoothl1_deploy._floats import NUMPY_DTYPE
from smoothl1_deploy.errors import ArtefactError, UnsupportedError
from smoothl1_deploy.graph._attach import read_losses
from smoothl1_deploy.graph._metadata import is_served, read_spec, stamp
from smoothl1_deploy.serving import _graph as graph_module
from smoothl1_deploy.serving._graph import serve
from smoothl1_deploy.serving._lint import unguarded


def served(spec: LossSpec, shape: tuple[int | str, ...] = ("N", 16)) -> onnx.ModelProto:
    return serve(export(spec, "inlined", shape)).model


def ask(model: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    return [*run(model, feeds, "ORT_ENABLE_ALL").values()]


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 16)).astype(np.float32)


def test_the_shapes_a_server_takes() -> None:
    for spec, shape in (
        (LossSpec(reduction="none"), (3, 16)),
        (LossSpec(per_sample=True), (3, 1)),
        (LossSpec(reduction="sum", per_sample=True, gradient=True), (3, 1)),
        (LossSpec(), (1,)),
        (LossSpec(reduction="sum"), (1,)),
    ):
        graph = serve(export(spec, "inlined", ("N", 16)))
        assert ask(graph.model, input=rows(3), target=rows(3, 1))[0].shape == shape, spec
        declared = signature(graph.model).loss.shape
        assert declared is not None and declared[1:] == shape[1:], spec
        assert (graph.unbatched is None) == (len(shape) == 2), spec


@pytest.mark.parametrize("backend", ["ort-cpu", "onnx-reference", "torch", "trt-network"])
def test_run_gives_what_the_unserved_graph_gives(backend: str) -> None:
    if backend == "trt-network":
        pytest.importorskip("tensorrt_rtx")
    for route, spec in itertools.product(
        ("function", "inlined"),
        (
            LossSpec(0.5),
            LossSpec(per_sample=True, gradient=True),
            LossSpec(runtime_beta=True, reduction="sum"),
            LossSpec(dtype="bfloat16", weight="weights"),
        ),
    ):
        plain = export(spec, route, ("N", 16))
        feeds: dict[str, Any] = {
            name: rows(5, seed).astype(NUMPY_DTYPE[spec.dtype])
            for seed, name in enumerate(spec.inputs)
            if name != "beta"
        }
        if spec.runtime_beta:
            feeds["beta"] = 0.25
        expected = load(plain, backend).run(**feeds)
        answer = load(serve(plain).model, backend).run(**feeds)
        assert answer.keys() == expected.keys()
        for name, value in expected.items():
            assert answer[name].shape == value.shape, (route, spec)
            np.testing.assert_array_equal(answer[name], value, err_msg=f"{route} {spec}")


def test_verify_understands_a_served_graph() -> None:
    for spec in (LossSpec(), LossSpec(reduction="none"), LossSpec(per_sample=True)):
        model = served(spec)
        assert read_spec(model) == spec and is_served(model)
        assert verify(model, drift=False)


def test_verify_sees_a_served_graph_of_the_wrong_shape() -> None:
    model = served(LossSpec())
    axes = next(t for t in model.graph.initializer if t.name == "loss/served_axes")
    axes.CopyFrom(helper.make_tensor("loss/served_axes", TensorProto.INT64, [2], [0, 1]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("loss", 1, [1, 1]))
    stamp(model, LossSpec(), "inlined", "served", served=True)
    assert not verify(model, drift=False)


def test_another_number_of_rows_is_an_error() -> None:
    spec = LossSpec(weight="count")
    model, feeds = served(spec), {name: rows(3) for name in spec.inputs}
    ask(model, **feeds)
    for role, given in itertools.product(("target", "weight"), (1, 2, 6)):
        with pytest.raises(Exception, match="Reshape"):
            ask(model, **{**feeds, role: rows(given)})


def test_the_guard_tells_equal_sizes_of_other_shapes_apart() -> None:
    model = serve(export(LossSpec(), "inlined", ("N", "M"))).model
    x = np.zeros((4, 6), np.float32)
    assert ask(model, input=x, target=x + 1)[0] == 0.5
    with pytest.raises(Exception, match="Reshape"):
        ask(model, input=x, target=x.T.copy())


def test_an_empty_batch_gives_what_pytorch_gives() -> None:
    for reduction, empty in (("mean", [np.nan]), ("sum", [0.0]), ("none", np.empty((0, 16)))):
        model = served(LossSpec(reduction=reduction))
        loss = ask(model, input=rows(0), target=rows(0))[0]
        np.testing.assert_array_equal(loss, np.asarray(empty, np.float32))
        with pytest.raises(Exception, match="Reshape"):
            ask(model, input=rows(0), target=rows(1))


def test_beta_of_a_request_is_one_number() -> None:
    model = served(LossSpec(runtime_beta=True))
    x, t = rows(3), rows(3, 1)
    (loss,) = ask(model, input=x, target=t, beta=np.float32([0.5]))
    np.testing.assert_array_equal(loss[0], load(export(LossSpec(0.5))).run(x, t)["loss"])
    with pytest.raises(Exception, match=r"index: 0 Got: 2 Expected: 1"):
        ask(model, input=x, target=t, beta=np.float32([0.5, 1.0]))


def autoencoder() -> onnx.ModelProto:
    """`digits` [N, 16] and `mask` [N, 16] to their product and its rows' first column [N]."""
    return model_of("""g
        (float[N, 16] digits, float[N, 16] mask) => (float[N, 16] masked, float[N] first)
        <int64 zero = {0}> {
            masked = Mul(digits, mask)
            first = Gather<axis = 1>(masked, zero)
        }""")


def test_an_attached_score_of_each_row() -> None:
    spec = LossSpec(0.1, per_sample=True)
    model = attach(autoencoder(), "masked", "digits", spec, loss_name="score")
    graph = serve(model)
    assert [loss.spec for loss in read_losses(graph.model)] == [spec] and graph.unbatched is None
    masked, first, score = ask(graph.model, digits=rows(3), mask=rows(3, 1))
    assert (masked.shape, first.shape, score.shape) == ((3, 16), (3, 1), (3, 1))
    expected = ask(model, digits=rows(3), mask=rows(3, 1))
    for was, now in zip(expected, (masked, first[:, 0], score[:, 0]), strict=True):
        np.testing.assert_array_equal(was, now)
    assert read_losses(graph.model) == read_losses(model)
    assert serve(graph.model).model == graph.model


def test_an_attached_mean_keeps_requests_apart() -> None:
    model = attach(autoencoder(), "masked", "gt", LossSpec(), only_loss=True)
    graph = serve(model)
    assert graph.unbatched == (
        "loss is a mean over all rows of a batch: requests of different callers would be mixed "
        "into one number"
    )
    feeds = {"digits": rows(3), "mask": rows(3, 1)}
    assert ask(graph.model, **feeds, gt=rows(3))[0].shape == (1,)
    with pytest.raises(Exception, match="Reshape"):
        ask(graph.model, **feeds, gt=rows(1))


def test_a_target_that_is_to_broadcast_may() -> None:
    model = attach(autoencoder(), "masked", np.zeros((1, 16), np.float32), only_loss=True)
    assert ask(serve(model).model, digits=rows(3), mask=rows(3))[0].shape == (1,)


def test_rows_of_one_number_are_not_batched() -> None:
    for dtype in ("float32", "bfloat16"):
        graph = serve(export(LossSpec(reduction="none", dtype=dtype), "inlined", ("N",)))
        assert graph.unbatched == "the input input has no axis beside its rows"
        x = np.zeros(3, NUMPY_DTYPE[dtype])
        assert load(graph.model).run(x, x)["loss"].shape == (3,)


def test_what_can_not_be_served_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtefactError, match="the rank of 'input' is unknown, and a server needs"):
        serve(export(LossSpec()))
    model = autoencoder()
    model.graph.node[0].input[0] = "nothing"
    with pytest.raises(ArtefactError, match="the model is no valid ONNX graph: .*nothing"):
        serve(model)
    model.opset_import[0].version = 11
    with pytest.raises(UnsupportedError, match="the model is of opset 11, and a served"):
        serve(model)
    with pytest.raises(UnsupportedError, match="a server has no gradient to pass back"):
        serve(export(LossSpec(gradient=True, upstream=True), shape=("N", 16)))
    monkeypatch.setattr(graph_module, "_PROTOBUF_LIMIT", 100)
    with pytest.raises(UnsupportedError, match="the model has 2 GiB or more, and a served one is"):
        serve(autoencoder())


def test_two_losses_and_a_reader_of_an_output_keep_their_numbers() -> None:
    spec = LossSpec(per_sample=True)
    model = attach(autoencoder(), "masked", "gt", spec)
    model = attach(model, "masked", "gt", LossSpec(0.5, reduction="none"))
    model = attach(model, "digits", "gt", LossSpec(0.5, reduction="none"))
    # An output that another node reads: widened for the client alone.
    model.graph.node.append(helper.make_node("Neg", ["loss"], ["negative"], name="negative"))
    model.graph.output.append(helper.make_tensor_value_info("negative", 1, ["N"]))
    feeds = {"digits": rows(3), "mask": rows(3, 1), "gt": rows(3, 2)}
    graph = serve(model)
    assert len(read_losses(graph.model)) == 3 and graph.unbatched is None
    before, after = ask(model, **feeds), ask(graph.model, **feeds)
    for was, now in zip(before, after, strict=True):
        assert now.ndim == 2
        np.testing.assert_array_equal(was.ravel(), now.ravel())
    with pytest.raises(Exception, match="Reshape"):
        ask(graph.model, **{**feeds, "gt": rows(1)})
    assert unguarded(graph.model, read_losses(model)) == []
    assert unguarded(model, read_losses(model)) == [("gt", "masked"), ("gt", "digits")]


def test_a_subgraph_reads_what_was_renamed() -> None:
    model = model_of("""g
        (float[N, 2] x, bool flag) => (float total, float y) {
            total = ReduceSum<keepdims = 0>(x)
            y = If(flag) <
                then_branch = t () => (float a) { a = Neg(total) },
                else_branch = e () => (float b) { b = Abs(total) }
            >
        }""")
    feeds = {"x": np.ones((3, 2), np.float32), "flag": np.array([True])}
    np.testing.assert_array_equal(ask(serve(model).model, **feeds), ([6], [-6]))
