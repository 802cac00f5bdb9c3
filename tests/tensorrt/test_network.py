"""The loss through TensorRT's parser, evaluated on the CPU, against the oracle and PyTorch."""

from __future__ import annotations

import functools
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from agreement import assert_right, pair
from onnx import numpy_helper

pytest.importorskip("tensorrt_rtx")

from smoothl1_deploy import LossSpec, export, load
from smoothl1_deploy._floats import NUMPY_DTYPE
from smoothl1_deploy.backends._trt_network import TrtNetworkBackend
from smoothl1_deploy.errors import InvalidInputError, UnsupportedError
from smoothl1_deploy.tensorrt._network import plan
from smoothl1_deploy.tensorrt._parse import parse

DTYPES = ("float32", "float16", "bfloat16")
REDUCTIONS = ("none", "mean", "sum")
SPECIALS = (math.nan, math.inf, -math.inf, -0.0, 1e-7, -3e4)


@functools.cache
def runner(spec, route="function", shape=("N", 16), target_shape=None, drops_nan=True):
    model = export(spec, route=route, shape=shape, target_shape=target_shape)
    return TrtNetworkBackend("tensorrt_rtx", clip_drops_nan=drops_nan).load(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_loss_is_right_for_every_beta_and_special_number(reduction, dtype):
    betas = (0.0, 0.1, 1.0, 1e4, math.inf)
    for route, beta in [*itertools.product(("function", "inlined"), betas), ("torch", 0.1)]:
        spec = LossSpec(beta, reduction, dtype)
        run = runner(spec, route).run
        a, b = pair(spec, (24, 16), special=reduction == "none")
        assert_right(spec, run(a, b)["loss"], a, b)
        for value in SPECIALS if reduction != "none" else ():
            a[3, 5] = value
            assert_right(spec, run(a, b)["loss"], a, b)


@pytest.mark.parametrize("drops_nan", [True, False])
def test_nan_survives_a_clip_that_drops_it(drops_nan):
    routes, betas = ("function", "inlined"), (0.0, 0.5, math.inf)
    for route, beta, dtype in itertools.product(routes, betas, DTYPES):
        for reduction, which in itertools.product(REDUCTIONS, (0, 1)):
            spec = LossSpec(beta, reduction, dtype)
            arrays = np.random.default_rng(0).normal(size=(2, 24, 16)).astype(NUMPY_DTYPE[dtype])
            arrays[which, 2, 3] = math.nan
            loss = runner(spec, route, drops_nan=drops_nan).run(*arrays)["loss"]
            lost = np.isnan(arrays[which]) if reduction == "none" else True
            assert (np.isnan(loss) == lost).all(), (spec, route, which)


CLIP = """<ir_version: 8, opset_import: ["" : 18]> g (float[N] input, float[N] target) =>
    (float[N] loss) <float a = {-2}, float b = {3}>
    { d = Sub(input, target) loss = Clip(d, a, b) }"""


def test_whether_a_clip_drops_nan_shows():
    """Clip alone: the switch changes something, or the test above proves nothing."""
    feeds = np.array([math.nan, 9, -9], np.float32), np.zeros(3, np.float32)
    model = onnx.parser.parse_model(CLIP)
    assert TrtNetworkBackend().load(model).run(*feeds)["loss"].tolist() == [-2, 3, -2]
    kept = TrtNetworkBackend(clip_drops_nan=False).load(model).run(*feeds)["loss"]
    assert np.isnan(kept[0]) and kept[1:].tolist() == [3, -2]


SHAPES = [
    ((), None, (), ()),
    (("N",), None, (7,), (7,)),
    (("N", 3, "H", 2), None, (2, 3, 5, 2), (2, 3, 5, 2)),
    ((2, 3), None, (2, 3), (2, 3)),
    (("N", 16), (16,), (5, 16), (16,)),
    (("N", 16), (), (5, 16), ()),
    (("N", 1), ("M",), (5, 1), (4,)),
    (("N", 1, 4), (3, 1), (2, 1, 4), (3, 1)),
    (("N", 16), None, (0, 16), (0, 16)),
    (("N", 0), None, (3, 0), (3, 0)),
    (("N", 16), (1, 16), (0, 16), (1, 16)),
]


@pytest.mark.parametrize(("dtype", "route"), [("float32", "function"), ("bfloat16", "inlined")])
def test_ranks_broadcasts_and_empty_axes(dtype, route):
    for (shape, target_shape, a, b), reduction in itertools.product(SHAPES, REDUCTIONS):
        spec = LossSpec(0.5, reduction, dtype)
        arrays = pair(spec, a)[0], pair(spec, b)[1]
        loss = runner(spec, route, shape, target_shape).run(*arrays)["loss"]
        assert_right(spec, loss, *arrays)


def test_one_plan_serves_every_size_and_many_threads():
    spec = LossSpec(0.5, "mean")
    run = runner(spec).run
    for rows in (1, 0, 1000, 3):
        arrays = pair(spec, (rows, 16))
        assert_right(spec, run(*arrays)["loss"], *arrays)
    given = [pair(spec, (40 + i, 16)) for i in range(40)]
    alone = [run(*arrays)["loss"] for arrays in given]
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(lambda arrays: run(*arrays)["loss"], given)] == alone


def test_outputs_are_fresh_arrays(rtx):
    """No output may be a view of an input, or of a constant of the plan."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[2] x) => (float[2] y, float[2] z) '
        "<float[2] c = {1, 2}> { y = Identity(x) z = Identity(c) }"
    )
    made = plan(parse(model, rtx))
    x = np.array([5, 6], np.float32)
    made.run({"x": x})["z"][:] = 0
    out = made.run({"x": x})
    assert out["z"].tolist() == [1, 2]
    assert not np.shares_memory(out["y"], x)


@pytest.mark.parametrize(("dtype", "by"), [("float32", 2e-4), ("float16", 0.2), ("bfloat16", 0.2)])
def test_a_wrong_constant_is_seen(dtype, by):
    """The evaluation must be able to fail: of `none`, and of the mean."""
    for reduction, value in itertools.product(("none", "mean"), (0.5, 2.0)):  # 2 is beta
        spec = LossSpec(2.0, reduction, dtype)
        model = export(spec, "inlined", ("N", 16))
        arrays = pair(spec, (24, 16))
        wrong = numpy_helper.from_array(np.array(value * (1 + by), np.float32))
        held = [*model.graph.initializer, *(a.t for n in model.graph.node for a in n.attribute)]
        found = [t for t in held if t.data_type == 1 and numpy_helper.to_array(t) == value]
        assert found
        for tensor in found:
            name = tensor.name
            tensor.CopyFrom(wrong)
            tensor.name = name
        del model.metadata_props[:]  # by which a changed model is known
        loss = TrtNetworkBackend().load(model).run(*arrays)["loss"]
        with pytest.raises(AssertionError):
            assert_right(spec, loss, *arrays)


def test_an_input_that_numpy_would_broadcast_is_refused(mean_model):
    """The plan itself checks nothing: a runner stands before it."""
    ones = np.ones((4, 16), np.float32)
    with pytest.raises(InvalidInputError, match=r"target has the shape \(1, 16\)"):
        TrtNetworkBackend().load(mean_model).run(ones, ones[:1])


def test_the_runner_tells_spec_and_what_was_narrowed(mean_model):
    loaded = load(mean_model, backend="trt-network")
    assert loaded.spec == LossSpec(0.5)
    assert "computes in float32" in loaded.parsed.notes[0]


def test_float64_and_any_rank_are_refused():
    backend = TrtNetworkBackend()
    wide = LossSpec(dtype="float64")
    assert "no float64" in backend.refuses(wide)
    assert all(backend.refuses(LossSpec(dtype=dtype)) is None for dtype in DTYPES)
    with pytest.raises(UnsupportedError, match=r"'input' is float64. TensorRT has no float64"):
        backend.load(export(wide, shape=("N",)))
    with pytest.raises(UnsupportedError, match=r"unknown rank"):
        backend.load(export(LossSpec()))
