"""The functions one by one, as nodes in somebody's own program."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest
from agreement import assert_right, pair
from exact import error_in_ulp, exact_loss, round_fraction
from handmade import run
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnxscript import DOUBLE, FLOAT, script
from onnxscript import opset18 as op

from smoothl1_deploy import LossSpec
from smoothl1_deploy._model import ELEMENT_TYPE
from smoothl1_deploy.graph import FUNCTIONS
from smoothl1_deploy.graph import _functions as functions
from smoothl1_deploy.graph._assemble import function_closure, model_of
from smoothl1_deploy.graph._functions import loss_scalars, slope_scalars

# As a program of a user's own has them.
SmoothL1Loss = FUNCTIONS["SmoothL1Loss"]
SmoothL1LossTerms = FUNCTIONS["SmoothL1LossTerms"]
WideMean = FUNCTIONS["WideMean"]

RUNTIMES = ("ort", "reference")


def node_model(name: str, inputs: list[str], outputs: str, **attributes: Any) -> onnx.ModelProto:
    """One call of the function `name`; `inputs` and `outputs` are dtypes."""
    value = helper.make_tensor_value_info
    ports = [value(f"x{i}", ELEMENT_TYPE[dtype], None) for i, dtype in enumerate(inputs)]
    names = [port.name for port in ports]
    node = helper.make_node(name, names, ["y"], domain=functions.DOMAIN, **attributes)
    graph = helper.make_graph([node], "one", ports, [value("y", ELEMENT_TYPE[outputs], None)])
    return model_of(graph, function_closure([name]))


def in_order(model: onnx.ModelProto) -> onnx.ModelProto:
    """As the reference evaluator wants them (onnx 1.23): onnxscript puts the callers first."""
    order = [f.name for f in function_closure([f.name for f in model.functions])]
    model.functions.sort(key=lambda f: order.index(f.name))
    return model


def call(model: onnx.ModelProto, *arrays: np.ndarray, runtime: str = "ort") -> np.ndarray:
    """The first output."""
    feeds = {value.name: a for value, a in zip(model.graph.input, arrays, strict=True)}
    if runtime == "reference":
        with np.errstate(all="ignore"):
            return np.asarray(ReferenceEvaluator(model).run(None, feeds)[0])
    return next(iter(run(model, feeds, "ORT_ENABLE_ALL").values()))


def test_every_function_is_documented_and_of_opset_18_alone() -> None:
    assert len(functions.FUNCTIONS) == 29
    for name, function in functions.FUNCTIONS.items():
        assert function.name == name and len(function.function.__doc__ or "") > 40
        proto = function.to_function_proto()
        versions = {entry.domain: entry.version for entry in proto.opset_import}
        assert versions == {"": 18} | ({"smoothl1_deploy": 2} if len(versions) > 1 else {})
        onnx.checker.check_function(proto)


@script()
def _user_program(prediction: FLOAT["N", 5], truth: FLOAT["N", 5]) -> FLOAT:  # noqa: F821, UP037
    scaled = op.Mul(prediction, op.Constant(value_float=2.0))
    losses = SmoothL1Loss(scaled, truth, beta=0.25)
    return op.CastLike(WideMean(losses), prediction)


@script()
def _user_program_in_double(prediction: DOUBLE[...], truth: DOUBLE[...]) -> DOUBLE[...]:
    beta = op.Cast(op.Constant(value_float=0.75), to=11)
    half = op.Cast(op.Constant(value_float=0.5), to=11)
    return SmoothL1LossTerms(prediction, truth, beta, half, beta)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_user_calls_the_functions_in_a_program_of_their_own(runtime: str) -> None:
    a, b = pair(LossSpec(0.25), (40, 5))
    model = _user_program.to_model_proto()
    onnx.checker.check_model(model, full_check=True)
    assert "SmoothL1Loss" in {f.name for f in model.functions}
    got = call(in_order(model), a / 2, b, runtime=runtime)
    assert_right(LossSpec(0.25), got, a, b)
    spec = LossSpec(0.75, "none", "float64")
    a, b = pair(spec, (100,))
    model = in_order(_user_program_in_double.to_model_proto())
    assert_right(spec, call(model, a, b, runtime=runtime), a, b)


BETAS = (0.0, 1e-45, 1e-38, 1e-9, 0.5, 1.0, 3e38, math.inf)


def test_a_user_leaves_beta_out() -> None:
    """Not on the reference evaluator: it knows no default of a function's attribute (onnx 1.23)."""
    spec = LossSpec(1.0, "none")
    a, b = pair(spec, (100,))
    model = node_model("SmoothL1Loss", ["float32"] * 2, "float32")
    assert_right(spec, call(model, a, b), a, b)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_is_added_up_is_the_loss_but_for_the_sign_of_zero(runtime: str) -> None:
    """And for one rounding less beyond beta."""
    model = node_model("SmoothL1Addends", ["float32"] * 4, "float32")
    zero, half = np.zeros((), np.float32), np.array(0.5, np.float32)
    for beta in (2e-38, 1e-9, 0.5, 1.0, 3e38, math.inf):
        spec = LossSpec(beta, "none")
        a, b = pair(spec, (200,), special=True)
        got = call(model, a, b, np.array(beta, np.float32), half, runtime=runtime)
        assert_right(spec, abs(got), a, b)
        whole = node_model("SmoothL1Loss", ["float32"] * 2, "float32", beta=spec.effective_beta)
        losses = call(whole, a, b, runtime=runtime)
        with np.errstate(invalid="ignore"):
            within = abs(a - b) <= np.float32(beta)
        if beta > 1e-37:  # half of which is not subnormal
            assert np.array_equal(abs(got[within]), losses[within], equal_nan=True)
    nothing = call(model, zero, half, zero, half, runtime=runtime)
    assert np.isnan(nothing)  # 0 is no beta of this one, and nobody is told another number


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_subnormal_loss_is_rounded_once(runtime: str) -> None:
    """Halved as a product it is rounded twice: 2.6 steps to 3, their half of 1.5 to 2 and not 1."""
    beta = 2.0  # a power of two, by which dividing is exact
    for dtype in ("float32", "float64"):
        step = float(np.finfo(dtype).smallest_subnormal)
        x = (np.sqrt(2 * beta * step) * np.sqrt(np.linspace(0.4, 9, 200))).astype(dtype)
        model = node_model("SmoothL1LossTerms", [dtype] * 5, dtype)
        scalars = [np.array(value, dtype) for _, value in loss_scalars(beta)]
        got = call(model, x, np.zeros_like(x), *scalars, runtime=runtime)
        exact = [round_fraction(exact_loss(value, 0.0, beta), dtype) for value in x.tolist()]
        assert got.tolist() == exact
        assert {value / step for value in exact} == set(range(10))


class Clip(OpRun):  # type: ignore[misc]
    """A Clip that drops NaN, as TensorRT's does (NVIDIA/TensorRT#4758)."""

    op_domain = ""
    calls = 0

    def _run(self, x: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray]:
        Clip.calls += 1
        return (np.where(np.isnan(x), low, np.clip(x, low, high)),)


@pytest.mark.parametrize("name", ["SmoothL1LossTerms", "SmoothL1Addends", "SmoothL1SlopeTerms"])
def test_nan_survives_a_clip_that_drops_it(name: str) -> None:
    x = np.array([np.nan, 1.0, np.nan, 3.0], np.float32)
    y = np.array([1.0, np.nan, np.nan, 3.0], np.float32)
    for beta in BETAS:
        if beta == 0 and name != "SmoothL1LossTerms":
            continue  # addends aren't made for it, and PyTorch's slope of NaN is 0
        scalars = [np.float32(value) for value in (beta, 0.5, beta or 1.0)]
        if name == "SmoothL1Addends":
            scalars = scalars[:2]
        if name == "SmoothL1SlopeTerms":
            scalars = [np.float32(value) for _, value in slope_scalars(beta)[:2]]
        # Inlined: the reference evaluator keeps its own Clip inside of functions (onnx 1.23).
        model = onnx.inliner.inline_local_functions(
            node_model(name, ["float32"] * (2 + len(scalars)), "float32")
        )
        feeds = {f"x{i}": value for i, value in enumerate((x, y, *scalars))}
        before = Clip.calls
        with np.errstate(all="ignore"):
            (got,) = ReferenceEvaluator(model, new_ops=[Clip]).run(None, feeds)
        assert Clip.calls == before + 1
        assert np.isnan(got[:3]).all() and got[3] == 0


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", ["WideSum", "WideMean", "CompensatedSum", "CompensatedMean"])
def test_reductions_of_any_rank(name: str, runtime: str) -> None:
    dtype = "float32" if name.startswith("Wide") else "float64"
    model = node_model(name, [dtype], "float64")
    for shape in ((), (1,), (0,), (3, 4), (2, 0, 3), (2, 1, 3, 1, 2)):
        x = np.asarray(np.linspace(0.1, 2.1, math.prod(shape)).reshape(shape), dtype)
        got = call(model, x, runtime=runtime)
        assert (got.shape, got.dtype) == ((), np.float64)
        total = math.fsum(float(v) for v in x.reshape(-1))
        expected = total if name.endswith("Sum") else total / x.size if x.size else math.nan
        np.testing.assert_allclose(got, expected, rtol=1e-15)


def test_wide_sum_holds_what_float32_and_a_half_format_lose() -> None:
    x = np.full(2**20 + 1, 2.0**-24, np.float32)
    x[0] = 1.0
    assert float(call(node_model("WideSum", ["float32"], "float64"), x)) == 1 + 2.0**-4
    x = np.full(5000, 60000, np.float16)
    assert float(call(node_model("WideSum", ["float16"], "float64"), x)) == 5000 * float(x[0])


def _nasty() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(5)
    one_large = np.full(200_001, 2.0**-53)
    one_large[0] = 1.0
    return {
        "spread": abs(generator.standard_normal(5000)) * 2.0 ** generator.integers(-60, 40, 5000),
        "one large": one_large,
        "constant": np.full(100_003, 0.1),
        "powers": 2.0 ** np.arange(-600, 400, 1.0),
        "subnormal": np.full(1001, 5e-324) * np.arange(1001),
        "largest that splits": np.full(1003, 1e285),
    }


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_compensated_sum_is_exact_to_an_ulp(runtime: str) -> None:
    for kind, x in _nasty().items():
        exact = sum((Fraction(float(v)) for v in x), Fraction(0))
        got = call(node_model("CompensatedSum", ["float64"], "float64"), x, runtime=runtime)
        assert error_in_ulp(float(got), exact, "float64") <= 1, kind
        got = call(node_model("CompensatedMean", ["float64"], "float64"), x, runtime=runtime)
        assert error_in_ulp(float(got), exact / len(x), "float64") <= 2, kind


def test_compensated_sum_of_special_values() -> None:
    model = node_model("CompensatedSum", ["float64"], "float64")
    for values, total in (
        ([], 0.0),
        ([0.0, 0.0], 0.0),
        ([1.0, math.inf], math.inf),
        ([1.0, math.nan], math.nan),
        ([math.inf, math.nan], math.nan),
        ([1e308, 1e308], math.inf),
        ([8e307, 8e307], 1.6e308),
        ([1.7e308], 1.7e308),
        ([5e-324], 5e-324),
        ([1.0, *[2.0**-54] * 3], 1.0 + 2.0**-52),  # their sum of magnitudes is a power of two
    ):
        got = call(model, np.array(values, np.float64))
        np.testing.assert_array_equal(got, total)
        assert not np.signbit(got)
