"""The functions one by one, as nodes in somebody's own program."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
import pytest
from agreement import assert_right, pair
from exact import error_in_ulp, exact_loss, round_fraction
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnxscript import DOUBLE, FLOAT, script
from onnxscript import opset18 as op

from smoothl1_deploy import LossSpec
from smoothl1_deploy.graph import functions
from smoothl1_deploy.graph.elements import ELEMENT_TYPE, loss_scalars, slope_scalars
from smoothl1_deploy.graph.functions import SmoothL1Loss, SmoothL1LossTerms, WideMean

RUNTIMES = ("ort", "reference")

#: The reference evaluator wants a function before those that call it (onnx 1.23).
CALLEES_FIRST = (
    "L1Loss",
    "SmoothL1Addends",
    "BetaDivisor",
    "SmoothL1LossTerms",
    "SmoothL1Loss",
    "SmoothL1SlopeTerms",
    "WideSum",
    "WideMean",
    "CompensatedAxesSum",
    "CompensatedRowSum",
    "CompensatedSum",
    "CompensatedMean",
)


def node_model(name: str, inputs: list[str], outputs: str, **attributes: Any) -> onnx.ModelProto:
    """One call of the function `name`; `inputs` and `outputs` are dtypes."""
    names = [f"x{i}" for i in range(len(inputs))]
    graph = helper.make_graph(
        [helper.make_node(name, names, ["y"], domain=functions.DOMAIN, **attributes)],
        "one_node",
        [
            helper.make_tensor_value_info(n, ELEMENT_TYPE[dtype], None)
            for n, dtype in zip(names, inputs, strict=True)
        ],
        [helper.make_tensor_value_info("y", ELEMENT_TYPE[outputs], None)],
    )
    return helper.make_model(
        graph,
        functions=[functions.FUNCTIONS[f].to_function_proto() for f in CALLEES_FIRST],
        opset_imports=[
            helper.make_opsetid("", 18),
            helper.make_opsetid(functions.DOMAIN, functions.DOMAIN_VERSION),
        ],
        ir_version=10,
    )


def in_order(model: onnx.ModelProto) -> onnx.ModelProto:
    """onnxscript puts the callers first."""
    model.functions.sort(key=lambda f: CALLEES_FIRST.index(f.name))
    return model


def call(model: onnx.ModelProto, *arrays: np.ndarray, runtime: str = "ort") -> np.ndarray:
    """The first output."""
    feeds = {value.name: a for value, a in zip(model.graph.input, arrays, strict=True)}
    if runtime == "reference":
        with np.errstate(all="ignore"):
            return np.asarray(ReferenceEvaluator(model).run(None, feeds)[0])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


def test_the_table_holds_every_function_by_its_name() -> None:
    assert {f for f in functions.__all__ if not f.isupper() and f != "DOMAIN_VERSION"} == set(
        functions.FUNCTIONS
    )
    for name, function in functions.FUNCTIONS.items():
        assert function is getattr(functions, name)
        assert function.name == name
        assert len(function.function.__doc__ or "") > 40


@pytest.mark.parametrize("name", sorted(functions.FUNCTIONS))
def test_every_function_is_of_the_domain_and_of_opset_18(name: str) -> None:
    proto = functions.FUNCTIONS[name].to_function_proto()
    assert proto.domain == "smoothl1_deploy"
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    assert versions.pop("") == 18
    assert set(versions) <= {"smoothl1_deploy"}
    onnx.checker.check_function(proto)


def test_beta_is_an_attribute_of_default_one() -> None:
    proto = SmoothL1Loss.to_function_proto()
    assert [(a.name, a.f) for a in proto.attribute_proto] == [("beta", 1.0)]
    assert list(proto.input) == ["input", "target"]


@script()
def _user_program(prediction: FLOAT["N", 5], truth: FLOAT["N", 5]) -> FLOAT:  # noqa: F821, UP037
    scaled = op.Mul(prediction, op.Constant(value_float=2.0))
    losses = SmoothL1Loss(scaled, truth, beta=0.25)
    return op.CastLike(WideMean(losses), prediction)


@script()
def _user_program_with_defaults(prediction: FLOAT[...], truth: FLOAT[...]) -> FLOAT[...]:
    return SmoothL1Loss(prediction, truth)


@script()
def _user_program_in_double(prediction: DOUBLE[...], truth: DOUBLE[...]) -> DOUBLE[...]:
    beta = op.Cast(op.Constant(value_float=0.75), to=11)
    half = op.Cast(op.Constant(value_float=0.5), to=11)
    return SmoothL1LossTerms(prediction, truth, beta, half, beta)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_user_calls_the_function_in_a_program_of_their_own(runtime: str) -> None:
    a, b = pair(LossSpec(0.25), (40, 5))
    model = _user_program.to_model_proto()
    onnx.checker.check_model(model, full_check=True)
    assert "SmoothL1Loss" in {f.name for f in model.functions}
    got = call(in_order(model), a / 2, b, runtime=runtime)
    assert_right(LossSpec(0.25), got, a, b)


def test_a_user_leaves_beta_out() -> None:
    """Not on the reference evaluator: it knows no default of a function's attribute (onnx 1.23)."""
    spec = LossSpec(1.0, "none")
    a, b = pair(spec, (100,))
    assert_right(spec, call(_user_program_with_defaults.to_model_proto(), a, b), a, b)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_user_computes_in_double(runtime: str) -> None:
    spec = LossSpec(0.75, "none", "float64")
    a, b = pair(spec, (100,))
    model = in_order(_user_program_in_double.to_model_proto())
    assert_right(spec, call(model, a, b, runtime=runtime), a, b)


def terms(beta: float, dtype: str) -> list[np.ndarray]:
    """The scalars that the function `SmoothL1LossTerms` takes."""
    return [np.array(value, dtype) for _, value in loss_scalars(beta)]


BETAS = (0.0, 1e-45, 1e-38, 1e-9, 0.5, 1.0, 3e38, math.inf)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("beta", BETAS)
def test_elements_with_special_values(beta: float, runtime: str) -> None:
    spec = LossSpec(beta, "none")
    a, b = pair(spec, (200,), special=True)
    got = call(
        node_model("SmoothL1Loss", ["float32"] * 2, "float32", beta=spec.effective_beta),
        a,
        b,
        runtime=runtime,
    )
    assert_right(spec, got, a, b)
    model = node_model("SmoothL1LossTerms", ["float32"] * 5, "float32")
    got = call(model, a, b, *terms(spec.effective_beta, "float32"), runtime=runtime)
    assert_right(spec, got, a, b)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("beta", [2e-38, 1e-9, 0.5, 1.0, 3e38, math.inf])
def test_what_is_added_up_is_the_loss_but_for_the_sign_of_zero(beta: float, runtime: str) -> None:
    """And for one rounding less beyond beta."""
    spec = LossSpec(beta, "none")
    a, b = pair(spec, (200,), special=True)
    scalars = [np.array(value, np.float32) for value in (beta, 0.5)]
    model = node_model("SmoothL1Addends", ["float32"] * 4, "float32")
    got = call(model, a, b, *scalars, runtime=runtime)
    assert_right(spec, abs(got), a, b)
    whole = node_model("SmoothL1Loss", ["float32"] * 2, "float32", beta=spec.effective_beta)
    losses = call(whole, a, b, runtime=runtime)
    with np.errstate(invalid="ignore"):
        within = abs(a - b) <= np.float32(beta)
    if beta > 1e-37:  # half of which is not subnormal
        assert np.array_equal(abs(got[within]), losses[within], equal_nan=True)
    zero = np.zeros((), np.float32)
    nothing = call(model, zero, scalars[1], zero, scalars[1], runtime=runtime)
    assert np.isnan(nothing)  # 0 is no beta of this one, and nobody is told another number


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_elements_of_l1(runtime: str) -> None:
    a, b = pair(LossSpec(0.0, "none"), (200,), special=True)
    got = call(node_model("L1Loss", ["float32"] * 2, "float32"), a, b, runtime=runtime)
    assert_right(LossSpec(0.0, "none"), got, a, b)


@pytest.mark.parametrize("beta", [0.0, 5e-324, 1e-50, 0.1, 1e39, 1e308, math.inf])
def test_elements_in_double(beta: float) -> None:
    spec = LossSpec(beta, "none", "float64")
    a, b = pair(spec, (200,), special=True)
    model = node_model("SmoothL1LossTerms", ["float64"] * 5, "float64")
    assert_right(spec, call(model, a, b, *terms(beta, "float64")), a, b)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_subnormal_loss_is_rounded_once(dtype: str, runtime: str) -> None:
    """Halved as a product it is rounded twice: 2.6 steps to 3, their half of 1.5 to 2 and not 1."""
    beta = 2.0  # a power of two, by which dividing is exact
    step = float(np.finfo(dtype).smallest_subnormal)
    x = (np.sqrt(2 * beta * step) * np.sqrt(np.linspace(0.4, 9, 200))).astype(dtype)
    model = node_model("SmoothL1LossTerms", [dtype] * 5, dtype)
    got = call(model, x, np.zeros_like(x), *terms(beta, dtype), runtime=runtime)
    exact = [round_fraction(exact_loss(value, 0.0, beta), dtype) for value in x.tolist()]
    assert got.tolist() == exact
    assert {value / step for value in exact} == set(range(10))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_loss_of_nothing_is_plus_zero(runtime: str) -> None:
    x = np.array([0.0, -0.0, 0.0, -0.0, 1.0], np.float32)
    y = np.array([0.0, -0.0, -0.0, 0.0, 1.0], np.float32)
    for beta in BETAS:
        model = node_model("SmoothL1Loss", ["float32"] * 2, "float32", beta=beta)
        got = call(model, x, y, runtime=runtime)
        assert got.tobytes() == bytes(got.nbytes)  # +0


class Clip(OpRun):  # type: ignore[misc]
    """A Clip that drops NaN, as TensorRT's does (NVIDIA/TensorRT#4758)."""

    op_domain = ""
    calls = 0

    def _run(self, x: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray]:
        Clip.calls += 1
        return (np.where(np.isnan(x), low, np.clip(x, low, high)),)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", ["SmoothL1LossTerms", "SmoothL1Addends", "SmoothL1SlopeTerms"])
def test_nan_survives_a_clip_that_drops_it(name: str, beta: float) -> None:
    if beta == 0 and name != "SmoothL1LossTerms":
        return  # addends aren't made for it, and PyTorch's slope of NaN is 0
    scalars = [np.float32(value) for value in (beta, 0.5, beta or 1.0)]
    if name == "SmoothL1Addends":
        scalars = scalars[:2]
    if name == "SmoothL1SlopeTerms":
        scalars = [np.float32(value) for _, value in slope_scalars(beta)[:2]]
    # Inlined: the reference evaluator keeps its own Clip inside of functions (onnx 1.23).
    model = onnx.inliner.inline_local_functions(
        node_model(name, ["float32"] * (2 + len(scalars)), "float32")
    )
    x = np.array([np.nan, 1.0, np.nan, 3.0], np.float32)
    y = np.array([1.0, np.nan, np.nan, 3.0], np.float32)
    feeds = {f"x{i}": value for i, value in enumerate((x, y, *scalars))}
    before = Clip.calls
    with np.errstate(all="ignore"):
        (got,) = ReferenceEvaluator(model, new_ops=[Clip]).run(None, feeds)
    assert Clip.calls == before + 1
    assert np.isnan(got[:3]).all()
    assert got[3] == 0


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 4), (2, 0, 3), (2, 1, 3, 1, 2)])
@pytest.mark.parametrize("name", ["WideSum", "WideMean", "CompensatedSum", "CompensatedMean"])
def test_reductions_of_any_rank(name: str, shape: tuple[int, ...], runtime: str) -> None:
    dtype = "float32" if name.startswith("Wide") else "float64"
    x = np.asarray(np.linspace(0.1, 2.1, math.prod(shape)).reshape(shape), dtype)
    got = call(node_model(name, [dtype], "float64"), x, runtime=runtime)
    assert (got.shape, got.dtype) == ((), np.float64)
    total = math.fsum(float(v) for v in x.reshape(-1))
    expected = total if name.endswith("Sum") else total / x.size if x.size else math.nan
    np.testing.assert_allclose(got, expected, rtol=1e-15)


def test_wide_sum_holds_what_float32_loses() -> None:
    x = np.full(2**20 + 1, 2.0**-24, np.float32)
    x[0] = 1.0
    assert float(call(node_model("WideSum", ["float32"], "float64"), x)) == 1 + 2.0**-4


@pytest.mark.parametrize("dtype", ["float16"])
def test_wide_sum_of_a_half_format(dtype: str) -> None:
    x = np.full(5000, 60000, dtype)
    assert float(call(node_model("WideSum", [dtype], "float64"), x)) == 5000 * float(x[0])


def _nasty(kind: str) -> np.ndarray:
    generator = np.random.default_rng(5)
    if kind == "spread":
        return np.abs(generator.standard_normal(5000)) * 2.0 ** generator.integers(-60, 40, 5000)
    if kind == "one large":
        x = np.full(200_001, 2.0**-53)
        x[0] = 1.0
        return x
    if kind == "constant":
        return np.full(100_003, 0.1)
    if kind == "powers":
        return 2.0 ** np.arange(-600, 400, 1.0)
    if kind == "subnormal":
        return np.full(1001, 5e-324) * np.arange(1001)
    if kind == "largest that splits":
        return np.full(1003, 1e285)
    raise ValueError(kind)


KINDS = ("spread", "one large", "constant", "powers", "subnormal", "largest that splits")


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_compensated_sum_is_exact_to_an_ulp(kind: str, runtime: str) -> None:
    x = _nasty(kind)
    exact = sum((Fraction(float(v)) for v in x), Fraction(0))
    got = call(node_model("CompensatedSum", ["float64"], "float64"), x, runtime=runtime)
    assert error_in_ulp(float(got), exact, "float64") <= 1
    got = call(node_model("CompensatedMean", ["float64"], "float64"), x, runtime=runtime)
    assert error_in_ulp(float(got), exact / len(x), "float64") <= 2


@pytest.mark.parametrize(
    ("values", "total"),
    [
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
    ],
)
def test_compensated_sum_of_special_values(values: list[float], total: float) -> None:
    got = call(node_model("CompensatedSum", ["float64"], "float64"), np.array(values, np.float64))
    np.testing.assert_array_equal(got, total)
    assert not np.signbit(got)
