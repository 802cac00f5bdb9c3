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
import onnx
import onnxruntime as ort
import pytest
from exact import exact_loss
from handmade import assert_near, run_session
from onnx import TensorProto, helper

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


def opened(graph: onnx.GraphProto, threads: int = 1) -> ort.InferenceSession:
    versions = [helper.make_opsetid("", 18), helper.make_opsetid("smoothl1_deploy", 2)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library()))
    return ort.InferenceSession(model.SerializeToString(), options)


@cache
def session_of(
    name: str, elements: tuple[tuple[str, int], ...], threads: int = 1
) -> ort.InferenceSession:
    """Of a model that is nothing but the operator."""
    outputs = ["total", "count", *["weights"] * ("Weighted" in name)] * ("Totals" in name)
    outputs += ["out"] * ("Totals" not in name or "And" in name)
    graph = helper.make_graph(
        [helper.make_node(name, [n for n, _ in elements], outputs, domain="smoothl1_deploy")],
        "one",
        [helper.make_tensor_value_info(n, e, None) for n, e in elements],
        [
            helper.make_tensor_value_info(
                n, elements[0][1] if n == "out" else TensorProto.DOUBLE, None
            )
            for n in outputs
        ],
    )
    return opened(graph, threads)


def call(given: Given, form: str, *, huber: bool = False, threads: int = 1) -> Given:
    """What the operator gives for the arrays, whose names say which operator it is.

    Totals of all axes, where there are none given.
    """
    if "Totals" in form and "axes" not in given:
        rank = max(a.ndim for n, a in given.items())
        given = given | {"axes": np.arange(rank, dtype=np.int64)}
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
    """Losses or gradients, weights, and what is selected, in extended precision."""
    wide = np.longdouble
    names = [name for name in ("input", "target", "weight", "mask", "beta") if name in given]
    full = dict(zip(names, np.broadcast_arrays(*(given[n] for n in names)), strict=True))
    mask = full.get("mask", np.ones(full["input"].shape, bool))
    weight = full.get("weight", np.ones(mask.shape)).astype(wide)
    is_beta = full["beta"] > 0 if huber else full["beta"] >= 0
    beta = np.where(is_beta, full["beta"].astype(wide), np.nan)
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
            value = np.where(size < beta, size * size / 2, linear)
        else:
            within = np.where(beta == np.inf, 0, size * size / 2 / beta)
            value = np.where(size < beta, within, size - beta / 2)
        value = np.where(mask, value * weight, 0)
    value = np.where(np.isnan(beta), np.nan, value)
    return value, np.where(mask, weight, 0), mask


def assert_same(got: Any, want: Any, note: Any) -> None:
    """Equal in every bit, but for those of a NaN."""
    np.testing.assert_array_equal(got.astype("f8"), want.astype("f8"), str(note))
    assert np.array_equal(np.signbit(got)[got == 0], np.signbit(want)[got == 0]), note


def assert_right(given: Given, axes: Any = None, *, huber: bool = False, note: Any = "") -> None:
    """Of every form; the sums over all of them, or over axes."""
    values, weights, mask = right(given, huber=huber)
    if axes is not None:
        given = given | {"axes": np.asarray(axes, np.int64)}
    over = tuple(range(mask.ndim)) if axes is None else tuple(axes)
    found = call(given, "Totals", huber=huber)
    want = {"total": values, "count": mask, "weights": weights}
    assert {*found} == {"total", "count"} | ({"weights"} & {*found} if "weight" in given else set())
    for name, got in found.items():
        summed = np.asarray(want[name].astype(np.longdouble).sum(axis=over), np.float64)
        is_beta = given["beta"] > 0 if huber else given["beta"] >= 0
        if name == "total" and not is_beta.all():
            summed = np.full_like(summed, np.nan) if not values.size else summed
        assert_near(got, summed, 2, (name, note))
        assert not np.signbit(got).any(), (name, note)
    summands = {name: array for name, array in given.items() if name != "axes"}
    with np.errstate(all="ignore"):
        wide = np.float64 if given["input"].dtype == np.float64 else np.float32
        less = np.subtract(given["input"], given["target"], dtype=wide).astype(given["input"].dtype)
    for form, each in (
        ("TotalsAndLosses", call(summands, "Elements", huber=huber)["out"]),
        ("TotalsAndDifferences", np.where(mask, less, less.dtype.type(0))),
    ):
        both = call(given, form, huber=huber)
        assert_same(both.pop("out"), each, (form, note))
        assert all(both[name].tobytes() == found[name].tobytes() for name in found), (form, note)
    if axes is None:
        dtype = given["input"].dtype
        with np.errstate(all="ignore"):
            one = values.astype(dtype)
        assert_near(call(given, "Elements", huber=huber)["out"], one, 1, note)
        powers = np.asarray(2.0 ** np.arange(one.size)).reshape(one.shape)
        for flowing in (np.float64(-1.5), powers):
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


#: A shape, and axes of it: rows long and short, sums side by side, few and more than a task has.
AXES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((5, 3), (0,)), ((5, 3), (1,)), ((5, 3), (0, 1)), ((5, 3), ()), ((), ()), ((1,), (0,)),
    ((2, 3, 4), (1,)), ((2, 3, 4), (0, 2)), ((2, 1, 4, 3), (1, 2)), ((3, 1, 1, 2), (0, 1)),
    ((3, 100, 4), (1,)), ((300, 7), (0,)), ((7, 300), (1,)), ((2, 40, 130), (1,)),
    ((40, 5, 6), (0, 2)), ((4, 2500), (0,)), ((2500, 4), (1,)), ((2, 3, 1500), (1,)),
    ((0, 3), (0,)), ((0, 3), (1,)), ((3, 0, 2), (1,)), ((2, 0, 3), (2,)), ((9001, 5), (0,)),
    ((300, 1030), (0,)), ((3, 40_001), (1,)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_over_any_axes(use: Any, dtype: str) -> None:
    for number, (shape, axes) in enumerate(AXES):
        each = np.resize(BETAS, shape[-1:])
        column = np.resize(BETAS, shape[:1]).reshape(shape[:1] + (1,) * (len(shape) - 1))
        narrow = shape[:-1] + (1,) * bool(shape)
        use(1 + number % use(0))
        for huber, shapes, beta in (
            (False, (shape, shape), 0.75),
            (False, (shape, shape, narrow, shape), 0.0),
            (True, (shape, shape[-1:], None, shape), 0.5),
            (True, (shape, narrow, shape, narrow), np.inf),
            (False, (shape, shape), np.nan),
            (False, (shape, shape, None, shape[1:]), each),
            (True, (shape, shape, shape), column),
        ):
            given = arrays(dtype, *shapes, beta=beta)
            assert_right(given, axes, huber=huber, note=(shape, axes, beta, huber))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_outside_the_mask_is_nowhere(dtype: str) -> None:
    """Whatever it is; and where nothing is selected, nothing is left."""
    wild = [np.nan, np.inf, -np.inf, 1e4]
    shape, axes = (6, 40), np.asarray([0], np.int64)
    betas = 0.0, 0.5, np.inf, [0.5, 0, 2, np.inf] * 10
    for huber, beta in itertools.product((False, True), betas):
        beta = np.where(huber & (np.asarray(beta) == 0), 3.0, beta)  # a delta is no 0
        given = arrays(dtype, shape, shape, shape, shape, beta=beta)
        given["mask"][:, 3] = False
        changed = {name: array.copy() for name, array in given.items()}
        for at, name in enumerate(("input", "target", "weight")):
            outside = changed[name][~given["mask"]]
            changed[name][~given["mask"]] = np.resize(np.roll(wild, at), outside.shape)
        flowing = np.where(given["mask"], 2.0, np.inf)
        for form, more in (
            ("Elements", {}), ("Totals", {}), ("Totals", {"axes": axes}),
            ("TotalsAndLosses", {}), ("TotalsAndDifferences", {"axes": axes}),
            ("Slopes", {"flowing": flowing}),
        ):  # fmt: skip
            found, same = (call(x | more, form, huber=huber) for x in (given, changed))
            for name, got in found.items():
                assert got.tobytes() == same[name].tobytes(), (form, name, beta)
                assert "axes" not in more or name == "out" or got[3] == 0
            if "out" in found:
                assert not any(found["out"][~given["mask"]].tobytes())
            changed["mask"] = np.zeros_like(given["mask"])
            for got in call(changed | more, form, huber=huber).values():
                assert not any(got.tobytes()), (form, beta)
            changed["mask"] = given["mask"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan_of_what_is_selected(dtype: str) -> None:
    ends = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-4, -2.0, 6e4]
    of = NUMPY_DTYPE[dtype]
    pairs = {"input": np.resize(ends, 64).astype(of), "target": np.repeat(ends, 8).astype(of)}
    betas = *BETAS, 2.0**-20, -1.0, np.resize(BETAS, 64)
    for huber, beta in itertools.product((False, True), betas):
        given = pairs | arrays(dtype, beta=beta)
        with np.errstate(all="ignore"):
            want = right(given, huber=huber)[0].astype(of)
            sloped = given | {"flowing": np.float64(1.0)}
            slope = right(sloped, huber=huber, slopes=True)[0].astype(of)
        got = call(given, "Elements", huber=huber)["out"]
        assert_near(got, want, 1, (huber, beta))
        assert_near(call(sloped, "Slopes", huber=huber)["out"], slope, 1, (huber, beta))
        alone = {name: a.reshape(-1, 1) for name, a in given.items()}  # each sum of one element
        total = call(alone | {"axes": np.asarray([1])}, "Totals", huber=huber)["total"]
        assert np.array_equal(np.isnan(total), np.isnan(want.astype("f4"))), (huber, beta)
        assert np.array_equal(np.isinf(total), np.isinf(want.astype("f4"))) or "16" in dtype


def test_slopes_of_a_difference_that_overflows() -> None:
    """Of an infinite beta they are 0 all the same, as the loss's own gradient has them."""
    for beta, slope in ((np.inf, 0.0), (1e300, 2.0), ([np.inf] * 5, 0.0)):
        given = {"input": np.full(5, 1.7e308), "target": np.full(5, -1.7e308)}
        given |= {"beta": np.asarray(beta, np.float64), "flowing": np.float64(2.0)}
        assert (call(given, "Slopes")["out"] == slope).all()


def test_sums_of_float64_are_those_of_exact_arithmetic(use: Any) -> None:
    random = np.random.default_rng(2)
    x, y = random.standard_normal((2, 60, 7)) * 10.0 ** random.integers(-9, 9, (2, 60, 7))
    given = {"input": x, "target": y, "beta": np.asarray(0.3)}
    exact = [exact_loss(*pair, 0.3) for pair in zip(x.flat, y.flat, strict=True)]
    whole = float(sum(exact, Fraction(0)))
    columns = np.asarray([float(sum(exact[at::7], Fraction(0))) for at in range(7)])
    for number in range(1, use(0) + 1):
        use(number)
        assert_near(call(given, "Totals")["total"], np.asarray(whole), 1)
        over = given | {"axes": np.asarray([0])}
        assert_near(call(over, "Totals")["total"], columns, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets_and_threads_give_the_same_bits(use: Any, dtype: str) -> None:
    random = np.random.default_rng(3)
    of = NUMPY_DTYPE[dtype]
    for shape, axes, weighted, masked, huber, beta in (
        ((3, 100_003), [1], True, True, False, 0.3), ((3, 100_003), [0], False, False, False, 0.3),
        ((100_003, 3), [0], False, True, True, 0.3),
        ((200, 1501), [0], True, False, False, [0.3] * 1501),
    ):  # fmt: skip
        given = {n: random.standard_normal(shape).astype(of) for n in ("input", "target")}
        given |= {"weight": random.random(shape).astype(of)} if weighted else {}
        given |= {"mask": random.random(shape) < 0.5} if masked else {}
        given["beta"] = np.asarray(beta, np.float64 if dtype == "float64" else np.float32)
        for form, more in (
            ("Elements", {}), ("Totals", {}), ("Totals", {"axes": np.asarray(axes)}),
            ("TotalsAndLosses", {"axes": np.asarray(axes)}), ("TotalsAndDifferences", {}),
            ("Slopes", {"flowing": np.float64(0.7)}),
        ):  # fmt: skip
            found = set()
            for threads, number in itertools.product((1, 3), range(1, use(0) + 1)):
                use(number)
                outputs = call(given | more, form, huber=huber, threads=threads)
                found.add(b"".join(output.tobytes() for output in outputs.values()))
            assert len(found) == 1, (form, shape, axes, weighted, masked, huber)


@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_have_the_bits_of_the_operators_for_none(dtype: str) -> None:
    random = np.random.default_rng(4)
    of = NUMPY_DTYPE[dtype]
    beta = np.asarray(0.3, np.float64 if dtype == "float64" else np.float32)
    given = {n: random.standard_normal(4001).astype(of) for n in ("input", "target", "weight")}
    elements = tuple(
        (n, helper.np_dtype_to_tensor_dtype(a.dtype)) for n, a in (given | {"beta": beta}).items()
    )
    for weighted in (True, False):
        if not weighted:
            del given["weight"]
            elements = tuple(one for one in elements if one[0] != "weight")
        name = f"{'Weighted' * weighted}SmoothL1LossAt{SUFFIX[dtype]}"
        ours = call(given | {"beta": beta}, "Elements")["out"]
        theirs = run_session(session_of(name, elements), given | {"beta": beta})["out"]
        assert ours.tobytes() == theirs.tobytes()
        everywhere = {"mask": np.full(4001, 2, np.uint8).view(bool), "beta": beta}  # any byte but 0
        assert call(given | everywhere, "Elements")["out"].tobytes() == theirs.tobytes()


def test_what_has_no_place_is_refused() -> None:
    given = arrays("float32", (2, 3), (2, 3))
    for form, more, sentence in (
        ("Totals", {"axes": np.asarray([2])}, "an axis that the elements haven't"),
        ("Totals", {"axes": np.asarray([-1])}, "an axis that the elements haven't"),
        ("Slopes", {"flowing": np.zeros(2)}, "what flows in hasn't the elements' shape"),
        ("Slopes", {"flowing": np.zeros((1, 1, 1))}, "what flows in hasn't"),
        ("Elements", {"beta": np.zeros(2, np.float32)}, "can't be broadcast to one shape"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            call(given | more, form)


def test_what_follows_the_node_knows_its_shape() -> None:
    for name, shape, told in (
        ("MaskedSmoothL1LossElements", ["N", 4], ["N", 4]),
        ("MaskedHuberLossSlopes", ["N", 4], ["N", 4]),
        ("MaskedHuberLossElements", None, []),
    ):
        shapes = {"input": shape, "target": ["N", 4], "mask": ["N", 1], "beta": [], "flowing": []}
        kinds = dict.fromkeys(shapes, TensorProto.FLOAT) | {"mask": TensorProto.BOOL}
        kinds["flowing"] = TensorProto.DOUBLE
        names = [n for n in shapes if n != "flowing" or "Slopes" in name]
        nodes = [
            helper.make_node(name, names, ["out"], domain="smoothl1_deploy"),
            helper.make_node("Identity", ["out"], ["after"]),
        ]
        inputs = [helper.make_tensor_value_info(n, kinds[n], shapes[n]) for n in names]
        outputs = [helper.make_tensor_value_info("after", TensorProto.FLOAT, None)]
        graph = helper.make_graph(nodes, "two", inputs, outputs)
        session = opened(graph)
        assert session.get_outputs()[0].shape == told, name
