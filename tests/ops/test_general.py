"""The second family of operators: masks, betas of each element, sums over any axes, slopes.

Graphs go on from what they give, so here each is called by its name, as the only node of a model.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from exact import exact_loss
from handmade import assert_near, run_session
from onnx import helper

from smoothl1_deploy._floats import NUMPY_DTYPE
from smoothl1_deploy._spec import DTYPES
from smoothl1_deploy.errors import BackendUnavailableError
from smoothl1_deploy.ops import library, operators

try:
    KNOWN = operators()
except BackendUnavailableError as exc:
    pytest.skip(str(exc), allow_module_level=True)

SUFFIX = {"float32": "", "float16": "Float16", "bfloat16": "BFloat16", "float64": "Float64"}
Given = dict[str, Any]
BETAS = [0.75, 0.0, np.inf, 0.5]


@pytest.fixture
def use() -> Iterator[Any]:
    """The function that picks an instruction set, of the library that sessions have loaded."""
    choose = ctypes.CDLL(str(library())).smoothl1_deploy_use
    yield choose
    choose(choose(0))


@cache
def session_of(
    name: str, elements: tuple[tuple[str, int], ...], threads: int = 1
) -> ort.InferenceSession:
    """Of a model that is nothing but the operator."""
    totals = "Totals" in name
    outputs = ["total", "count", *["weights"] * ("Weighted" in name)] if totals else ["out"]
    element = helper.np_dtype_to_tensor_dtype(np.dtype("f8")) if totals else elements[0][1]
    graph = helper.make_graph(
        [helper.make_node(name, [n for n, _ in elements], outputs, domain="smoothl1_deploy")],
        "one",
        [helper.make_tensor_value_info(n, e, None) for n, e in elements],
        [helper.make_tensor_value_info(n, element, None) for n in outputs],
    )
    versions = [helper.make_opsetid("", 18), helper.make_opsetid("smoothl1_deploy", 2)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library()))
    return ort.InferenceSession(model.SerializeToString(), options)


def call(given: Given, form: str, *, huber: bool = False, threads: int = 1) -> Given:
    """What the operator gives for the arrays, whose names say which operator it is."""
    dtype = next(name for name, known in NUMPY_DTYPE.items() if known == given["input"].dtype)
    name = "Masked" * ("mask" in given) + "Weighted" * ("weight" in given)
    name += f"{'Huber' if huber else 'SmoothL1'}Loss{form}{SUFFIX[dtype]}"
    elements = tuple((n, helper.np_dtype_to_tensor_dtype(a.dtype)) for n, a in given.items())
    return run_session(session_of(name, elements, threads), given)


def arrays(dtype: str, *shapes: tuple[int, ...] | None, beta: Any = 0.75, seed: int = 0) -> Given:
    """Numbers of few bits, whose differences are exact; shapes of input, target, weight, mask."""
    random = np.random.default_rng(seed)
    of = NUMPY_DTYPE[dtype]
    given: Given = {}
    for name, shape in zip(("input", "target", "weight", "mask"), shapes, strict=False):
        if name == "mask" and shape is not None:
            given[name] = np.asarray(random.integers(0, 2, shape), bool)
        elif shape is not None:
            low = 0 if name == "weight" else -32
            given[name] = np.asarray(random.integers(low, 33, shape) / 16, of)
    given["beta"] = np.asarray(beta, np.float64 if dtype == "float64" else np.float32)
    return given


def right(given: Given, *, huber: bool = False, slopes: bool = False) -> tuple[Any, Any, Any]:
    """Losses or gradients, weights, and what is selected, of each element, in extended precision."""
    wide = np.longdouble
    names = [name for name in ("input", "target", "weight", "mask", "beta") if name in given]
    full = dict(zip(names, np.broadcast_arrays(*(given[n] for n in names)), strict=True))
    mask = full.get("mask", np.ones(full["input"].shape, bool))
    weight = full.get("weight", np.ones(mask.shape)).astype(wide)
    beta = np.where(full["beta"] >= 0, full["beta"].astype(wide), np.nan)
    with np.errstate(all="ignore"):
        d = full["input"].astype(wide) - full["target"].astype(wide)
        size = np.abs(d)
        if slopes:
            value = np.clip(d, -beta, beta)
            if not huber:
                flat = np.where(np.isinf(d), np.sign(d), d * 0)
                value = np.where(beta == np.inf, flat, value / beta)
                value = np.where(beta == 0, np.where(np.isnan(d), 0, np.sign(d)), value)
            value = value * given["flowing"]
        elif huber:
            linear = beta * (size - beta / 2)
            value = np.where(size <= beta, size * size / 2, linear)
        else:
            linear = size - beta / 2
            value = np.where(size < beta, np.where(beta == np.inf, 0, size * size / 2 / beta), linear)
        value = np.where(mask, value * weight, 0)
    value = np.where(np.isnan(beta), np.nan, value)
    return value, np.where(mask, weight, 0), mask


def assert_right(given: Given, axes: Any = None, *, huber: bool = False, note: Any = "") -> None:
    """Of every form; the sums over all of them, or over axes."""
    values, weights, mask = right(given, huber=huber)
    form = "Totals"
    if axes is not None:
        given, form = given | {"axes": np.asarray(axes, np.int64)}, "AxesTotals"
    over = tuple(range(mask.ndim)) if axes is None else tuple(axes)
    found = call(given, form, huber=huber)
    want = {"total": values, "count": mask, "weights": weights}
    assert {*found} == {"total", "count"} | ({"weights"} & {*found} if "weight" in given else set())
    for name, got in found.items():
        summed = np.asarray(want[name].astype(np.longdouble).sum(axis=over), np.float64)
        if name == "total" and given["beta"].size == 1 and not given["beta"] >= 0:
            summed = np.full_like(summed, np.nan)  # also of nothing
        assert_near(got, summed, 2, (name, note))
        assert not np.signbit(got).any(), (name, note)
    if axes is None:
        dtype = given["input"].dtype
        with np.errstate(all="ignore"):
            one = values.astype(dtype)
        assert_near(call(given, "Elements", huber=huber)["out"], one, 1, note)
        for flowing in (np.float64(-1.5), np.asarray(2.0 ** np.arange(one.size)).reshape(one.shape)):
            sloped = given | {"flowing": flowing}
            with np.errstate(all="ignore"):
                one = right(sloped, huber=huber, slopes=True)[0].astype(dtype)
            got = call(sloped, "Slopes", huber=huber)["out"]
            assert_near(got, one, 1, note)
            outside = ~mask & ~np.isnan(one)
            assert got[outside].tobytes() == bytes(got[outside].nbytes), note


SHAPES: list[tuple[tuple[int, ...] | None, ...]] = [
    ((), (), (), ()),
    ((3, 7), (3, 7), (3, 7), (3, 7)),
    ((5, 3), (1, 3), (5, 1), (5, 1)),
    ((5, 3), (5, 3), None, (5, 1)),
    ((2, 3, 2, 5), (3, 1, 5), (2, 1, 1, 1), (1, 1, 1, 1)),
    ((2, 3), (2, 3), (2, 3), None),
    ((7,), (7,), None, (2, 7)),
    ((0, 3), (1, 3), (3,), (0, 1)),
    ((41,), (), None, None),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_broadcast_with_any_beta(use: Any, dtype: str) -> None:
    bad = [-1.0, np.nan]
    for shapes, huber in itertools.product(SHAPES, (False, True)):
        size = np.broadcast_shapes(*(shape for shape in shapes if shape is not None))
        betas: list[Any] = [*BETAS, *bad, [[0.5]]]
        if size:
            each = np.resize(BETAS, size[-1])
            betas += [each, np.resize([0.5, np.nan], size[-1])]
        if len(size) > 1:
            betas.append(np.resize(BETAS, size[0]).reshape(-1, *[1] * (len(size) - 1)))
        for number, beta in enumerate(betas):
            use(1 + number % use(0))
            assert_right(arrays(dtype, *shapes, beta=beta), huber=huber, note=(shapes, beta, huber))
