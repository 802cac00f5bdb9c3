"""Planted faults: each one is found and named; a right model is left alone."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.parser
import pytest
from theirs import their_loss

from smoothl1_deploy import LossSpec, export, load, verify
from smoothl1_deploy._spec import DTYPES, REDUCTIONS
from smoothl1_deploy.parity._diagnose import diagnose
from smoothl1_deploy.parity._faults import Fault
from smoothl1_deploy.parity._verify import Verification
from smoothl1_deploy.parity.views import _tables as tables


def planted(
    faults: str = "",
    *,
    beta: float = 0.5,
    reduction: str = "mean",
    dtype: str = "float32",
    shape: str = "N,4",
    target_shape: str = "",
    out: str | None = None,
) -> onnx.ModelProto:
    """Someone's loss with faults, of inputs in these shapes."""
    element = {"float32": "float", "float64": "double"}.get(dtype, dtype)
    if out is None:
        out = f"[{shape}]" if reduction == "none" else ""
    return their_loss(
        faults,
        inputs=f"{element}[{shape}] pred, {element}[{target_shape or shape}] gt",
        outputs=f"{element}{out} out",
        beta=beta,
        reduction=reduction,
        dtype=dtype,
    )


def found(
    model: onnx.ModelProto, spec: LossSpec, backend: str = "ort-cpu", drift: bool = False
) -> list[Fault]:
    result = verify(model, backend, spec=spec, drift=drift)
    assert not result
    return [diagnosis.fault for diagnosis in result.diagnoses]


#: What is wrong -> the one fault to be named, the lines, keywords of `planted`, and what the
#: explanation says: the number that was inferred, and the remedy.
FAULTS: dict[str, tuple[Fault, str, dict[str, Any], str]] = {
    "no 0.5 below": (
        Fault.MISSING_HALF, "halved = Mul(one, square)", {"reduction": "none", "beta": 1.0}, ""),
    "no 0.5 above": (
        Fault.MISSING_LINEAR_HALF, "linear = Sub(size, beta)", {"reduction": "sum", "beta": 1.0},
        ""),
    "no 0.5 at all": (
        Fault.MISSING_HALF, "halved = Mul(one, square)\nlinear = Sub(size, beta)", {}, ""),
    "no offset above": (Fault.MISSING_OFFSET, "linear = Identity(size)", {}, ""),
    "no division": (Fault.MISSING_DIVISION, "quadratic = Identity(halved)", {}, ""),
    "huber": (
        Fault.HUBER,
        "quadratic = Identity(halved)\nrest = Sub(size, offset) linear = Mul(beta, rest)", {}, ""),
    "mse": (Fault.MSE, "each = Identity(square)", {}, ""),
    "half mse": (Fault.MSE, "each = Identity(halved)", {}, ""),
    "no linear part": (Fault.MSE, "each = Identity(quadratic)", {}, ""),
    "l1": (Fault.L1, "each = Identity(size)", {}, ""),
    "branches swapped": (Fault.BRANCHES_SWAPPED, "inside = Greater(size, beta)", {}, ""),
    "no abs in the comparison": (Fault.MISSING_ABS, "inside = Less(d, beta)", {}, ""),
    "no abs in the linear part": (Fault.MISSING_ABS, "linear = Sub(d, offset)", {}, ""),
    "difference truncated": (
        Fault.TRUNCATION, "e = Sub(pred, gt) i = Cast<to=7>(e) d = Cast<to=1>(i)", {}, ""),
    "target cast to integers": (
        Fault.TRUNCATION, "i = Cast<to=7>(gt) g = Cast<to=1>(i) d = Sub(pred, g)", {},
        "the target alone is truncated to an integer; cast to a float type"),
    "target rounded": (
        Fault.TRUNCATION, "g = Round(gt) d = Sub(pred, g)", {"reduction": "none"},
        "the target alone is rounded to an integer; cast to a float type"),
    "sum for mean": (Fault.SUM_FOR_MEAN, "average = Identity(total)", {}, ""),
    "mean for sum": (
        Fault.MEAN_FOR_SUM,
        "n = Size(each) m = Cast<to=11>(n) v = Div(total, m) out = Cast<to=1>(v)",
        {"reduction": "sum"}, ""),
    "mean over the batch": (
        Fault.WRONG_COUNT,
        "number = Shape<start=0, end=1>(each)\nr = Div(total, count) average = Squeeze(r)", {},
        "divided by the size of the first axis (the batch)"),
    "mean over the row": (
        Fault.WRONG_COUNT,
        "number = Shape<start=1, end=2>(each)\nr = Div(total, count) average = Squeeze(r)", {}, ""),
    "mean over the target before broadcasting": (
        Fault.WRONG_COUNT, "number = Size(gt)", {"target_shape": "4"}, ""),
    "one axis only": (
        Fault.SOME_AXES,
        "total = Identity(wide)\n"
        "zero = Constant<value_ints=[0]>() average = ReduceMean<keepdims=0>(total, zero)",
        {"out": "[4]"}, ""),
    "scaled": (
        Fault.SCALED,
        "three = Sum(one, one, one) raw = Where(inside, quadratic, linear) each = Mul(three, raw)",
        {}, "every answer is 3 times the right one"),
    "inputs cast to bfloat16": (
        Fault.NARROW_INPUT,
        "p = Cast<to=16>(pred) g = Cast<to=16>(gt) q = Cast<to=1>(p) h = Cast<to=1>(g) "
        "d = Sub(q, h)", {}, ""),
    "0/0": (
        Fault.ZERO_DIVISION,
        "low = Neg(beta) c = Clip(d, low, beta) e = Mul(half, c) f = Sub(d, e) r = Div(c, beta) "
        "part = Mul(r, f) rest = Mul(offset, one) each = Add(part, rest)", {"beta": 0.0}, ""),
    "<= at beta 0": (Fault.LESS_OR_EQUAL, "inside = LessOrEqual(size, beta)", {"beta": 0.0}, ""),
    "nan swallowed": (
        Fault.NAN_SWALLOWED,
        "e = Sub(pred, gt) bad = IsNaN(e) nought = Sub(one, one) d = Where(bad, nought, e)", {},
        "one NaN in the input gives finite where PyTorch gives nan"),
    "inf becomes finite": (
        Fault.INFINITE_INPUT,
        "e = Sub(pred, gt) top = Constant<value_float=3.4e38>() low = Neg(top) "
        "d = Clip(e, low, top)", {}, ""),
    "empty mean": (
        Fault.EMPTY_MEAN,
        "i = Constant<value_int=1>() atleast = Max(number, i) count = Cast<to=11>(atleast)", {},
        "the mean of no elements is 0 where PyTorch gives nan"),
    "negative zero": (
        Fault.NEGATIVE_ZERO,
        "low = Neg(beta) c = Clip(d, low, beta) r = Div(c, beta) e = Mul(half, c) f = Sub(d, e) "
        "each = Mul(r, f)", {"reduction": "none"}, ""),
    "wrong shape": (
        Fault.SHAPE, "total = ReduceSum<keepdims=1>(wide)", {"out": "[1,1]"},
        "the result has the shape (1, 1), PyTorch's has ()"),
    "pseudo-Huber": (
        Fault.PSEUDO_HUBER,
        "r = Div(d, beta) rr = Mul(r, r) s = Add(one, rr) root = Sqrt(s) more = Sub(root, one) "
        "most = Mul(beta, beta) each = Mul(most, more)", {},
        "delta^2 * (sqrt(1 + (d/delta)^2) - 1), with delta = 0.5; compute it by torch"),
    "pseudo-Huber over delta, which is not beta": (
        Fault.PSEUDO_HUBER, "s = Add(square, one) root = Sqrt(s) each = Sub(root, one)",
        {"reduction": "none"}, "with delta = 1; compute it by torch"),
    "log-cosh": (
        Fault.LOG_COSH,
        "e = Sub(gt, pred) f = Add(e, e) g = Softplus(f) sum = Add(d, g) two = Add(one, one) "
        "log2 = Log(two) each = Sub(sum, log2)", {"reduction": "sum"},
        "log(cosh(d)), whatever beta is; compute it by torch.nn.SmoothL1Loss"),
    "Charbonnier": (
        Fault.SMOOTH_ABS,
        "e = Constant<value_float=1e-6>() s = Add(square, e) each = Sqrt(s)", {},
        "Charbonnier's, sqrt(d^2 + 1e-06) everywhere"),
    "abs as a square root": (
        Fault.SMOOTH_ABS,
        "f = Mul(d, d) e = Constant<value_float=1e-6>() s = Add(f, e) size = Sqrt(s)",
        {"beta": 1.0}, "|d| is sqrt(d^2 + 1e-06) in the linear part; compute |d| by Abs"),
    "abs as a square root that shows at d = 0 alone": (
        Fault.SMOOTH_ABS,
        "f = Sub(pred, gt) ff = Mul(f, f) e = Constant<value_float=1e-12>() s = Add(ff, e) "
        "d = Sqrt(s)", {}, "d = 0 gives 1e-12"),
    "loss clipped": (
        Fault.CLIPPED,
        "two = Add(one, one) raw = Where(inside, quadratic, linear) each = Min(raw, two)", {},
        "never above 2, as where |d| is clipped to 2.25; leave the clip out"),
    "mask of the target": (
        Fault.WEIGHTED,
        "raw = Where(inside, quadratic, linear) nought = Sub(one, one) known = Greater(gt, nought) "
        "mask = Cast<to=1>(known) each = Mul(raw, mask)", {},
        "whose target is 0 or less count as 0; give the mask as weights of 0 and 1, which "
        "a spec with the weight 'count' takes"),
    "mask of the target, in the count as well": (
        Fault.WEIGHTED,
        "nought = Sub(one, one) none = Equal(gt, nought) known = Not(none) "
        "shape = Constant<value_ints=[-1]>() flat = Reshape(known, shape) "
        "p = Compress(pred, flat) g = Compress(gt, flat) d = Sub(p, g)", {},
        "whose target is 0 are left out, of the mean's count as well; give the mask as weights of "
        "0 and 1, which a spec with the weight 'weights' takes"),
    "mask of a constant": (
        Fault.WEIGHTED,
        "raw = Where(inside, quadratic, linear) "
        "mask = Constant<value_floats=[1.0, 1.0, 0.0, 1.0]>() each = Mul(raw, mask)", {},
        "count 1, 1, 0, 1 times each; give these factors as weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name: str) -> None:
    fault, lines, options, said = FAULTS[name]
    spec = LossSpec(options.get("beta", 0.5), options.get("reduction", "mean"))
    (diagnosis,) = verify(planted(lines, **options), spec=spec, drift=False).diagnoses
    assert diagnosis.fault is fault
    assert said in diagnosis.explanation
    assert not said or "would explain" not in diagnosis.explanation  # no other is in question


def test_a_right_formula_that_overflows_on_the_way_and_what_else_is_wrong_with_it() -> None:
    """log(exp(d)) is infinite beyond d = 88; the mean of nothing is looked at all the same."""
    assert found(planted("c = Cosh(d) each = Log(c)"), LossSpec(0.5)) == [
        Fault.LOG_COSH, Fault.RANGE,
    ]  # fmt: skip
    model = planted("""
        e = Exp(size) f = Log(e) lost = Sub(f, offset) each = Where(inside, quadratic, lost)
        i = Constant<value_int=1>() atleast = Max(number, i) count = Cast<to=11>(atleast)
    """)
    assert found(model, LossSpec(0.5)) == [Fault.RANGE, Fault.EMPTY_MEAN]


FLOAT32_SUMS = """
    wide = Identity(each)
    count = Cast<to=1>(number)
    out = Identity(average)
"""


def test_a_wrong_beta_is_estimated() -> None:
    for number, (theirs, ours, hint) in enumerate(
        (
            (0.7, 0.5, "beta = 0.7 fits"),
            (0.5, 1.0, "beta = 0.5 fits"),
            (2.0, 0.5, "that is 1/beta"),
            (1.0, 0.0, "beta = 1 fits"),
            (1e-3, 1.0, "beta = 0.001 fits"),
            (1e4, 1.0, "beta = 10000 fits"),
            (1 / 9, 3.0, "taken for a sigma"),
            (0.12345, 0.1, "beta = 0.12345 fits"),
        )
    ):
        spec = LossSpec(ours, REDUCTIONS[number % 3])
        model = planted(beta=theirs, reduction=spec.reduction)
        (diagnosis,) = verify(model, spec=spec, drift=False).diagnoses
        assert diagnosis.fault is Fault.WRONG_BETA, spec
        assert diagnosis.estimate == pytest.approx(theirs, rel=1e-6), spec
        assert hint in diagnosis.explanation
        assert f"the spec says {ours:.9g}" in diagnosis.explanation


def test_beta_rounded_to_float32_in_a_float64_graph() -> None:
    model = planted(dtype="float64", beta=float(np.float32(0.1)))
    (diagnosis,) = verify(model, spec=LossSpec(0.1, dtype="float64"), drift=False).diagnoses
    assert diagnosis.fault is Fault.WRONG_BETA
    assert "rounded to float32" in diagnosis.explanation


#: What is computed in too narrow a format -> the dtype of the model, the lines, the fault.
NARROW = {
    "float64 computed in float32": ("float64", """
        p = Cast<to=1>(pred) g = Cast<to=1>(gt) e = Sub(p, g) d = Cast<to=11>(e)
        wide = Cast<to=1>(each)
        count = Cast<to=1>(number)""", Fault.NARROW_ARITHMETIC),
    "float64 inputs through float32": ("float64", """
        p = Cast<to=1>(pred) g = Cast<to=1>(gt) q = Cast<to=11>(p) h = Cast<to=11>(g) d = Sub(q, h)
        """, Fault.NARROW_INPUT),
    "float32 added up in float16": ("float32", """
        wide = Cast<to=10>(each)
        count = Cast<to=10>(number)""", Fault.NARROW_ARITHMETIC),
    "float32 added up in bfloat16, divided in float64": ("float32", """
        wide = Cast<to=16>(each)
        back = Cast<to=11>(total) average = Div(back, count)""", Fault.NARROW_ARITHMETIC),
}  # fmt: skip


def test_too_narrow_a_format_is_named() -> None:
    for name, (dtype, lines, fault) in NARROW.items():
        # ONNX Runtime's optimiser takes casts to a narrower format and back for nothing.
        faults = found(planted(lines, dtype=dtype), LossSpec(0.5, dtype=dtype), "onnx-reference")
        assert faults == [fault], name


@pytest.mark.parametrize(
    ("shape", "text"), [("N,4", "grows with the number of elements"), ("65536,4", "at 262,144")]
)
def test_float32_accumulation(shape: str, text: str) -> None:
    result = verify(planted(FLOAT32_SUMS, shape=shape), spec=LossSpec(0.5))
    (diagnosis,) = result.diagnoses
    assert diagnosis.fault is Fault.FLOAT32_ACCUMULATION
    assert text in diagnosis.explanation
    assert "adding up in float32" in diagnosis.explanation
    assert diagnosis.evidence[0].got != diagnosis.evidence[0].expected


def test_an_error_of_the_same_size_everywhere_is_no_accumulation() -> None:
    slightly_more = "odd = Constant<value_float=1.0000005>() each = Mul(odd, raw)"
    model = planted(f"raw = Where(inside, quadratic, linear) {slightly_more}")
    assert found(model, LossSpec(0.5), drift=True) == [Fault.UNKNOWN]


def test_a_formula_that_is_the_right_one_at_this_beta_explains_no_wrong_number() -> None:
    """|d| - beta is |d| where beta is 0; that its difference may cancel is no excuse there."""
    model = planted("odd = Constant<value_float=1.0000013>() each = Mul(odd, size)", beta=0.0)
    assert found(model, LossSpec(0.0)) == [Fault.SCALED]


def test_float64_accumulation() -> None:
    result = verify(planted(dtype="float64"), spec=LossSpec(0.5, dtype="float64"))
    assert [d.fault for d in result.diagnoses] == [Fault.FLOAT64_ACCUMULATION]


def test_two_faults_are_both_named() -> None:
    model = planted("halved = Mul(one, square)\naverage = Identity(total)")
    assert found(model, LossSpec(0.5)) == [Fault.MISSING_HALF, Fault.SUM_FOR_MEAN]
    result = verify(
        planted("average = Identity(total)", beta=0.25), spec=LossSpec(0.5), drift=False
    )
    assert [item.fault for item in result.diagnoses] == [Fault.WRONG_BETA, Fault.SUM_FOR_MEAN]
    assert result.diagnoses[0].estimate == 0.25


def test_an_unrelated_model_is_unknown() -> None:
    for each in ("Mul(pred, gt)", "Tanh(size)"):
        (diagnosis,) = verify(planted(f"each = {each}"), spec=LossSpec(0.5), drift=False).diagnoses
        assert diagnosis.fault is Fault.UNKNOWN and diagnosis.evidence, each
        assert "no known fault explains all" in diagnosis.explanation


def test_nothing_is_named_on_a_right_model() -> None:
    betas = (0.0, 1e-3, 0.5, 1.0, 1e4, float("inf"))
    shapes: tuple[tuple[int | str, ...] | None, ...] = (None, ("N", 3), (), (0, 2))
    for number, (beta, dtype, shape) in enumerate(product(betas, DTYPES, shapes)):
        spec = LossSpec(beta, REDUCTIONS[number % 3], dtype)
        assert diagnose(load(export(spec, "inlined", shape)), spec) == (), (spec, shape)


def test_nothing_is_named_on_a_right_extension() -> None:
    extensions: tuple[dict[str, Any], ...] = (
        {"per_sample": True},
        {"gradient": True},
        {"gradient": True, "per_sample": True},
        {"weight": "count", "gradient": True},
        {"gradient": True, "upstream": True},
        {"runtime_beta": True},
    )
    for number, (dtype, extension) in enumerate(product(DTYPES, extensions)):
        reduction, beta = (("mean", 0.5), ("sum", 0.0), ("mean", 0.0), ("sum", 0.5))[number % 4]
        spec = LossSpec(1.0 if "runtime_beta" in extension else beta, reduction, dtype, **extension)
        assert diagnose(load(export(spec, "inlined", ("N", 3))), spec) == (), spec


def test_faults_of_the_extensions() -> None:
    rows, weighs = {"per_sample": True}, {"weight": "count"}
    cases: tuple[tuple[dict[str, Any], dict[str, Any], Fault], ...] = (
        ({**rows, "reduction": "sum"}, rows, Fault.SUM_FOR_MEAN),
        ({}, rows, Fault.REDUCED),
        ({**rows, "beta": 0.25}, rows, Fault.WRONG_BETA),
        ({**weighs, "beta": 0.25}, weighs, Fault.WRONG_BETA),
        ({**weighs, "reduction": "sum"}, weighs, Fault.SUM_FOR_MEAN),
    )
    for theirs, ours, fault in cases:
        model = export(LossSpec(**{"beta": 0.5, **theirs}), shape=("N", 3))
        found = diagnose(load(model), LossSpec(**{"beta": 0.5, **ours}))
        assert [diagnosis.fault for diagnosis in found] == [fault], theirs


def test_what_the_weights_alone_get_wrong_is_unknown() -> None:
    """Probes have weights of 1: where those are right, the red cases speak."""
    model = export(LossSpec(0.5, weight="count"), shape=("N", 3))
    result = verify(model, spec=LossSpec(0.5, weight="weights"), drift=False)
    (diagnosis,) = result.diagnoses
    assert diagnosis.fault is Fault.UNKNOWN
    assert (
        "right on every probe, but these cases are red, and nothing says why"
        in diagnosis.explanation
    )


def test_a_green_verification_is_not_diagnosed() -> None:
    result = verify(planted(), spec=LossSpec(0.5))
    assert result and result.diagnoses == ()
    assert not any("likely" in line for line in tables.verification(result).below)


def gradient_model(negated: bool = False, divided: bool = True) -> onnx.ModelProto:
    """The mean with its gradient as a second output."""
    model = planted()
    graph = model.graph
    sign = "Sub(gt, pred)" if negated else "Sub(pred, gt)"
    scale = "Div(slope, number_f)" if divided else "Identity(slope)"
    more = onnx.parser.parse_graph(
        f"""more (float[N,4] pred, float[N,4] gt) => (float[N,4] grad_input) {{
            e = {sign} low = Neg(beta) core = Clip(e, low, beta) slope = Div(core, beta)
            number_f = Cast<to=1>(number) grad_input = {scale}
        }}"""
    )
    graph.node.extend(more.node)
    graph.output.append(more.output[0])
    graph.node[-1].output[0] = "grad_input"
    for node in graph.node:
        node.output[:] = ["loss" if name == "out" else name for name in node.output]
    graph.output[0].name = "loss"
    onnx.checker.check_model(model)
    return model


def test_the_gradient_shows_swapped_inputs() -> None:
    spec = LossSpec(0.5)
    assert diagnose(load(gradient_model()), spec) == ()
    (swapped,) = diagnose(load(gradient_model(negated=True)), spec)
    assert swapped.fault is Fault.SWAPPED_INPUTS
    (scaled,) = diagnose(load(gradient_model(divided=False)), spec)
    assert scaled.fault is Fault.GRADIENT_SCALE and "not divided" in scaled.explanation


def test_a_fault_of_the_gradient_comes_before_one_of_a_zero() -> None:
    model = onnx.parser.parse_model("""
<ir_version: 10, opset_import: ["" : 18]>
g (float[N,4] pred, float[N,4] gt) => (float[N,4] loss, float[N,4] grad_input) {
    high = Constant<value_float=1.0>() low = Neg(high) half = Constant<value_float=0.5>()
    d = Sub(pred, gt) core = Clip(d, low, high) part = Mul(half, core) rest = Sub(d, part)
    loss = Mul(core, rest) other = Sub(gt, pred) grad_input = Clip(other, low, high)
}""")
    spec = LossSpec(reduction="none", gradient=True)
    assert found(model, spec) == [Fault.SWAPPED_INPUTS, Fault.NEGATIVE_ZERO]


@pytest.mark.parametrize("lines", ["inside = LessOrEqual(size, beta)", "d = Sub(gt, pred)"])
def test_what_changes_no_answer_is_not_named(lines: str) -> None:
    assert verify(planted(lines), spec=LossSpec(0.5), drift=False)


def shown(result: Verification) -> str:
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), width=200)
    console.print(tables.verification(result), tables.diagnoses(result))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_a_diagnosis_is_shown_and_is_strict_json() -> None:
    result = verify(planted("quadratic = Identity(halved)"), spec=LossSpec(0.5), drift=False)
    text = shown(result)
    assert "most likely: missing division by beta" in text
    assert "0.5*d^2, not divided by beta" in text and "expected" in text and "got" in text
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    (diagnosis,) = data["diagnoses"]
    assert diagnosis["fault"] == "missing division by beta"
    evidence = diagnosis["evidence"][0]
    assert evidence["got"] == pytest.approx(evidence["explained"], rel=1e-6)
    assert evidence["got"] != pytest.approx(evidence["expected"], rel=1e-2)


def test_what_is_not_finite_is_a_string_in_json() -> None:
    result = verify(
        planted("inside = LessOrEqual(size, beta)", beta=0.0), spec=LossSpec(0.0), drift=False
    )
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["diagnoses"][0]["evidence"][0]["got"] == "nan"


def test_an_error_instead_of_an_answer_and_no_line_of_the_runtime_s_on_stderr(
    capfd: pytest.CaptureFixture[str],
) -> None:
    there_is_no_such_row = (
        "i = Constant<value_int=100>() p = Gather<axis=0>(pred, i) d = Sub(p, gt)"
    )
    result = verify(planted(there_is_no_such_row), spec=LossSpec(0.5), drift=False)
    (diagnosis,) = result.diagnoses
    assert diagnosis.fault is Fault.NO_ANSWER
    assert "ONNX Runtime refused the inputs" in diagnosis.explanation
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("made", "said", "fault"),
    [
        (LossSpec(0.3), LossSpec(loss="huber", delta=0.3), Fault.SCALED),
        (LossSpec(0.3), LossSpec(0.3, loss_weight=2.0), Fault.SCALED),
        (LossSpec(0.3, "sum", loss_weight=2.0), LossSpec(0.3, loss_weight=2.0), Fault.SUM_FOR_MEAN),
        (LossSpec(0.1, loss_weight=2.0), LossSpec(0.3, loss_weight=2.0), Fault.WRONG_BETA),
    ],
    ids=["no delta", "no factor", "sum for mean", "another beta"],
)
def test_a_fault_of_a_huber_loss_or_one_with_a_factor_is_named_as_it_is(
    made: LossSpec, said: LossSpec, fault: Fault
) -> None:
    """And not by what makes the same number of Smooth L1."""
    model = export(made, "inlined", ("N", 16))
    del model.metadata_props[:]
    found = verify(model, spec=said, drift=False).diagnoses
    assert [each.fault for each in found] == [fault]
