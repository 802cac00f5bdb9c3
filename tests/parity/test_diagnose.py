"""Planted faults: each one is found and named; a right model is left alone."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import onnx
import onnx.checker
import onnx.helper
import onnx.parser
import pytest

from smoothl1_deploy import LossSpec, export, load, verify
from smoothl1_deploy.graph.elements import ELEMENT_TYPE
from smoothl1_deploy.parity.diagnose import diagnose
from smoothl1_deploy.parity.faults import Fault
from smoothl1_deploy.parity.verify import Verification, diagnosis_table, verify_table

#: An element of the loss, PyTorch's formula.
ELEMENTS = """
    d = Sub(pred, gt)
    size = Abs(d)
    inside = Less(size, beta)
    square = Mul(d, d)
    halved = Mul(half, square)
    quadratic = Div(halved, beta)
    offset = Mul(half, beta)
    linear = Sub(size, offset)
    each = Where(inside, quadratic, linear)
"""

#: The three reductions, right at every size: float64 accumulators, 0/0 for an empty mean.
REDUCE = {
    "none": "out = Identity(each)",
    "sum": """
    wide = Cast<to=11>(each)
    total = ReduceSum<keepdims=0>(wide)
    out = Cast<to=1>(total)
""",
    "mean": """
    wide = Cast<to=11>(each)
    total = ReduceSum<keepdims=0>(wide)
    number = Size(each)
    count = Cast<to=11>(number)
    average = Div(total, count)
    out = Cast<to=1>(average)
""",
}


def planted(
    edits: Sequence[tuple[str, str]] = (),
    *,
    beta: float = 0.5,
    reduction: str = "mean",
    dtype: str = "float32",
    shape: str = "N,4",
    target_shape: str = "",
    out: str | None = None,
) -> onnx.ModelProto:
    """The right model with lines replaced; every edit must find its line once."""
    body = ELEMENTS + REDUCE[reduction]
    body = body.replace("Cast<to=1>(", f"Cast<to={ELEMENT_TYPE[dtype]}>(")
    for good, bad in edits:
        assert body.count(good) == 1, good
        body = body.replace(good, bad)
    if out is None:
        out = f"[{shape}]" if reduction == "none" else ""
    element = {"float32": "float", "float64": "double"}.get(dtype, dtype)
    model = onnx.parser.parse_model(f"""
<ir_version: 10, opset_import: ["" : 18]>
their_loss ({element}[{shape}] pred, {element}[{target_shape or shape}] gt) => ({element}{out} out)
{{ {body} }}
""")
    for name, value in {"half": 0.5, "one": 1.0, "beta": beta}.items():
        tensor = onnx.helper.make_tensor(name, ELEMENT_TYPE[dtype], [], [value])
        model.graph.initializer.append(tensor)
    onnx.checker.check_model(model)
    return model


def found(
    model: onnx.ModelProto, spec: LossSpec, backend: str = "ort-cpu", drift: bool = False
) -> list[Fault]:
    result = verify(model, backend, spec=spec, drift=drift)
    assert not result
    return [diagnosis.fault for diagnosis in result.diagnoses]


#: name -> (edits, keywords of `planted`, the one fault to be named).
FAULTS: dict[str, tuple[list[tuple[str, str]], dict[str, object], Fault]] = {
    "no 0.5 below": ([("Mul(half, square)", "Mul(one, square)")], {}, Fault.MISSING_HALF),
    "no 0.5 below, sum": (
        [("Mul(half, square)", "Mul(one, square)")], {"reduction": "sum"}, Fault.MISSING_HALF
    ),
    "no 0.5 below, none": (
        [("Mul(half, square)", "Mul(one, square)")],
        {"reduction": "none", "beta": 1.0},
        Fault.MISSING_HALF,
    ),
    "no 0.5 above": ([("Sub(size, offset)", "Sub(size, beta)")], {}, Fault.MISSING_LINEAR_HALF),
    "no 0.5 above, none": (
        [("Sub(size, offset)", "Sub(size, beta)")],
        {"reduction": "none", "beta": 1.0},
        Fault.MISSING_LINEAR_HALF,
    ),
    "no 0.5 at all": (
        [("Mul(half, square)", "Mul(one, square)"), ("Sub(size, offset)", "Sub(size, beta)")],
        {},
        Fault.MISSING_HALF,
    ),
    "no offset above": ([("Sub(size, offset)", "Identity(size)")], {}, Fault.MISSING_OFFSET),
    "no division": ([("Div(halved, beta)", "Identity(halved)")], {}, Fault.MISSING_DIVISION),
    "huber": (
        [("Div(halved, beta)", "Identity(halved)"),
         ("linear = Sub(size, offset)", "rest = Sub(size, offset) linear = Mul(beta, rest)")],
        {},
        Fault.HUBER,
    ),
    "mse": ([("Where(inside, quadratic, linear)", "Identity(square)")], {}, Fault.MSE),
    "half mse": ([("Where(inside, quadratic, linear)", "Identity(halved)")], {}, Fault.MSE),
    "no linear part": (
        [("Where(inside, quadratic, linear)", "Identity(quadratic)")], {}, Fault.MSE
    ),
    "l1": ([("Where(inside, quadratic, linear)", "Identity(size)")], {}, Fault.L1),
    "branches swapped": (
        [("Less(size, beta)", "Greater(size, beta)")], {}, Fault.BRANCHES_SWAPPED
    ),
    "no abs in the comparison": ([("Less(size, beta)", "Less(d, beta)")], {}, Fault.MISSING_ABS),
    "no abs in the linear part": (
        [("Sub(size, offset)", "Sub(d, offset)")], {}, Fault.MISSING_ABS
    ),
    "inputs truncated": (
        [("d = Sub(pred, gt)",
          "p = Cast<to=7>(pred) g = Cast<to=7>(gt) e = Sub(p, g) d = Cast<to=1>(e)")],
        {},
        Fault.TRUNCATION,
    ),
    "difference truncated": (
        [("d = Sub(pred, gt)", "e = Sub(pred, gt) i = Cast<to=7>(e) d = Cast<to=1>(i)")],
        {},
        Fault.TRUNCATION,
    ),
    "sum for mean": ([("Div(total, count)", "Identity(total)")], {}, Fault.SUM_FOR_MEAN),
    "mean for sum": (
        [("out = Cast<to=1>(total)",
          "n = Size(each) m = Cast<to=11>(n) v = Div(total, m) out = Cast<to=1>(v)")],
        {"reduction": "sum"},
        Fault.MEAN_FOR_SUM,
    ),
    "mean over the batch": (
        [("number = Size(each)", "number = Shape<start=0, end=1>(each)"),
         ("average = Div(total, count)", "ratio = Div(total, count) average = Squeeze(ratio)")],
        {},
        Fault.WRONG_COUNT,
    ),
    "mean over the row": (
        [("number = Size(each)", "number = Shape<start=1, end=2>(each)"),
         ("average = Div(total, count)", "ratio = Div(total, count) average = Squeeze(ratio)")],
        {},
        Fault.WRONG_COUNT,
    ),
    "mean over the target before broadcasting": (
        [("Size(each)", "Size(gt)")], {"shape": "N,4", "target_shape": "4"}, Fault.WRONG_COUNT
    ),
    "one axis only": (
        [("ReduceSum<keepdims=0>(wide)", "Identity(wide)"),
         ("average = Div(total, count)", "zero = Constant<value_ints=[0]>() "
          "average = ReduceMean<keepdims=0>(total, zero)")],
        {"out": "[4]"},
        Fault.SOME_AXES,
    ),
    "inputs cast to bfloat16": (
        [("d = Sub(pred, gt)",
          "p = Cast<to=16>(pred) g = Cast<to=16>(gt) q = Cast<to=1>(p) h = Cast<to=1>(g) "
          "d = Sub(q, h)")],
        {},
        Fault.NARROW_INPUT,
    ),
    "scaled": (
        [("d = Sub(pred, gt)", "d = Sub(pred, gt) three = Sum(one, one, one)"),
         ("Where(inside, quadratic, linear)", "Where(inside, quadratic, linear) each3 = "
          "Mul(three, each)"),
         ("Cast<to=11>(each)", "Cast<to=11>(each3)")],
        {},
        Fault.SCALED,
    ),
    "0.5001": (
        [("Mul(half, square)", "Mul(odd, square)"),
         ("d = Sub(pred, gt)", "d = Sub(pred, gt) odd = Constant<value_float=0.5001>()")],
        {},
        Fault.WRONG_COEFFICIENT,
    ),
    "0/0": (
        [("Where(inside, quadratic, linear)", "Add(part, rest)"),
         ("linear = Sub(size, offset)",
          "linear = Sub(size, offset) low = Neg(beta) c = Clip(d, low, beta) e = Mul(half, c) "
          "f = Sub(d, e) r = Div(c, beta) part = Mul(r, f) rest = Mul(offset, one)")],
        {"beta": 0.0},
        Fault.ZERO_DIVISION,
    ),
    "<= at beta 0": ([("Less(size", "LessOrEqual(size")], {"beta": 0.0}, Fault.LESS_OR_EQUAL),
    "nan swallowed": (
        [("d = Sub(pred, gt)",
          "e = Sub(pred, gt) bad = IsNaN(e) nought = Sub(one, one) d = Where(bad, nought, e)")],
        {},
        Fault.NAN_SWALLOWED,
    ),
    "inf becomes finite": (
        [("d = Sub(pred, gt)",
          "e = Sub(pred, gt) top = Constant<value_float=3.4e38>() low = Neg(top) "
          "d = Clip(e, low, top)")],
        {},
        Fault.INFINITE_INPUT,
    ),
    "empty mean": (
        [("Cast<to=11>(number)", "Cast<to=11>(atleast)"),
         ("number = Size(each)",
          "number = Size(each) i = Constant<value_int=1>() atleast = Max(number, i)")],
        {},
        Fault.EMPTY_MEAN,
    ),
    "negative zero": (
        [("Where(inside, quadratic, linear)", "Mul(r, f)"),
         ("linear = Sub(size, offset)",
          "linear = Sub(size, offset) low = Neg(beta) c = Clip(d, low, beta) r = Div(c, beta) "
          "e = Mul(half, c) f = Sub(d, e)")],
        {"reduction": "none"},
        Fault.NEGATIVE_ZERO,
    ),
    "wrong shape": (
        [("ReduceSum<keepdims=0>(wide)", "ReduceSum<keepdims=1>(wide)")],
        {"out": "[1,1]"},
        Fault.SHAPE,
    ),
    "pseudo-Huber": (
        [("Where(inside, quadratic, linear)", "Mul(most, more)"),
         ("inside = Less(size, beta)",
          "r = Div(d, beta) rr = Mul(r, r) s = Add(one, rr) root = Sqrt(s) more = Sub(root, one) "
          "most = Mul(beta, beta) inside = Less(size, beta)")],
        {},
        Fault.PSEUDO_HUBER,
    ),
    "pseudo-Huber over delta, which is not beta": (
        [("Where(inside, quadratic, linear)", "Sub(root, one)"),
         ("halved =", "s = Add(square, one) root = Sqrt(s) halved =")],
        {"reduction": "none"},
        Fault.PSEUDO_HUBER,
    ),
    "log-cosh": (
        [("Where(inside, quadratic, linear)", "Sub(sum, log2)"),
         ("size = Abs(d)",
          "e = Sub(gt, pred) f = Add(e, e) g = Softplus(f) sum = Add(d, g) two = Add(one, one) "
          "log2 = Log(two) size = Abs(d)")],
        {"reduction": "sum"},
        Fault.LOG_COSH,
    ),
    "Charbonnier": (
        [("Where(inside, quadratic, linear)", "Sqrt(s)"),
         ("halved =", "e = Constant<value_float=1e-6>() s = Add(square, e) halved =")],
        {},
        Fault.SMOOTH_ABS,
    ),
    "abs as a square root": (
        [("size = Abs(d)\n", ""),
         ("inside = Less(size, beta)\n", ""),
         ("square = Mul(d, d)",
          "square = Mul(d, d) e = Constant<value_float=1e-6>() s = Add(square, e) size = Sqrt(s) "
          "inside = Less(size, beta)")],
        {"beta": 1.0},
        Fault.SMOOTH_ABS,
    ),
    "abs as a square root, both parts": (
        [("d = Sub(pred, gt)",
          "f = Sub(pred, gt) ff = Mul(f, f) e = Constant<value_float=1e-6>() s = Add(ff, e) "
          "d = Sqrt(s)")],
        {},
        Fault.SMOOTH_ABS,
    ),
    "abs as a square root that shows at d = 0 alone": (
        [("d = Sub(pred, gt)",
          "f = Sub(pred, gt) ff = Mul(f, f) e = Constant<value_float=1e-12>() s = Add(ff, e) "
          "d = Sqrt(s)")],
        {},
        Fault.SMOOTH_ABS,
    ),
    "loss clipped": (
        [("Where(inside, quadratic, linear)", "Min(raw, two)"),
         ("linear = Sub(size, offset)",
          "linear = Sub(size, offset) two = Add(one, one) raw = Where(inside, quadratic, linear)")],
        {},
        Fault.CLIPPED,
    ),
    "difference clipped": (
        [("d = Sub(pred, gt)",
          "e = Sub(pred, gt) two = Add(one, one) low = Neg(two) d = Clip(e, low, two)")],
        {"reduction": "sum"},
        Fault.CLIPPED,
    ),
    "sum clipped": (
        [("Cast<to=1>(total)", "Min(s, two)"),
         ("total = ReduceSum<keepdims=0>(wide)",
          "total = ReduceSum<keepdims=0>(wide) s = Cast<to=1>(total) two = Add(one, one)")],
        {"reduction": "sum"},
        Fault.CLIPPED,
    ),
    "mask of the target": (
        [("Where(inside, quadratic, linear)", "Mul(raw, mask)"),
         ("linear = Sub(size, offset)",
          "linear = Sub(size, offset) raw = Where(inside, quadratic, linear) "
          "nought = Sub(one, one) known = Greater(gt, nought) mask = Cast<to=1>(known)")],
        {},
        Fault.WEIGHTED,
    ),
    "mask of the target, in the count as well": (
        [("d = Sub(pred, gt)",
          "nought = Sub(one, one) none = Equal(gt, nought) known = Not(none) "
          "shape = Constant<value_ints=[-1]>() flat = Reshape(known, shape) "
          "p = Compress(pred, flat) g = Compress(gt, flat) d = Sub(p, g)")],
        {},
        Fault.WEIGHTED,
    ),
    "mask of a constant": (
        [("Where(inside, quadratic, linear)", "Mul(raw, mask)"),
         ("linear = Sub(size, offset)",
          "linear = Sub(size, offset) raw = Where(inside, quadratic, linear) "
          "mask = Constant<value_floats=[1.0, 1.0, 0.0, 1.0]>()")],
        {},
        Fault.WEIGHTED,
    ),
    "target cast to integers": (
        [("d = Sub(pred, gt)", "i = Cast<to=7>(gt) g = Cast<to=1>(i) d = Sub(pred, g)")],
        {},
        Fault.TRUNCATION,
    ),
    "target rounded": (
        [("d = Sub(pred, gt)", "g = Round(gt) d = Sub(pred, g)")], {"reduction": "none"},
        Fault.TRUNCATION,
    ),
}  # fmt: skip

#: What the explanation of some of them says: the number that was inferred, and the remedy.
SAID = {
    "pseudo-Huber": "delta^2 * (sqrt(1 + (d/delta)^2) - 1), with delta = 0.5; compute it by torch",
    "pseudo-Huber over delta, which is not beta": "with delta = 1; compute it by torch",
    "log-cosh": "log(cosh(d)), whatever beta is; compute it by torch.nn.SmoothL1Loss",
    "Charbonnier": "Charbonnier's, sqrt(d^2 + 1e-06) everywhere",
    "abs as a square root": "|d| is sqrt(d^2 + 1e-06) in the linear part; compute |d| by Abs",
    "abs as a square root, both parts": "sqrt(d^2 + 1e-06) in both parts; compute |d| by Abs",
    "abs as a square root that shows at d = 0 alone": "d = 0 gives 1e-12",
    "loss clipped": "never above 2, as where |d| is clipped to 2.25; leave the clip out",
    "difference clipped": "never above 1.75, as where |d| is clipped to 2; leave the clip out",
    "sum clipped": "the result is never above 2; leave the clip out",
    "mask of the target": "whose target is 0 or less count as 0; give the mask as weights of 0 "
    "and 1, which LossSpec(weight='count') takes",
    "mask of the target, in the count as well": "whose target is 0 are left out, of the mean's "
    "count as well; give the mask as weights of 0 and 1, which LossSpec(weight='weights') takes",
    "mask of a constant": "count 1, 1, 0, 1 times each; give these factors as weights",
    "target cast to integers": "the target alone is truncated to an integer; cast to a float type",
    "target rounded": "the target alone is rounded to an integer; cast to a float type",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name: str) -> None:
    edits, options, fault = FAULTS[name]
    model = planted(edits, **options)  # type: ignore[arg-type]
    spec = LossSpec(options.get("beta", 0.5), options.get("reduction", "mean"))  # type: ignore[arg-type]
    (diagnosis,) = verify(model, spec=spec, drift=False).diagnoses
    assert diagnosis.fault is fault
    if name in SAID:
        assert SAID[name] in diagnosis.explanation
        assert "would explain" not in diagnosis.explanation  # no other is in question


def test_log_cosh_by_its_name_overflows_as_well() -> None:
    edits = [("Where(inside, quadratic, linear)", "Log(c)"), ("size =", "c = Cosh(d) size =")]
    assert found(planted(edits), LossSpec(0.5)) == [Fault.LOG_COSH, Fault.RANGE]


def test_a_right_formula_that_overflows_on_the_way_and_what_else_is_wrong_with_it() -> None:
    """log(exp(d)) is infinite beyond d = 88; the mean of nothing is looked at all the same."""
    edits = [
        ("Where(inside, quadratic, linear)", "Where(inside, quadratic, lost)"),
        ("linear =", "e = Exp(size) f = Log(e) lost = Sub(f, offset) linear ="),
        ("Cast<to=11>(number)", "Cast<to=11>(atleast)"),
        ("count =", "i = Constant<value_int=1>() atleast = Max(number, i) count ="),
    ]
    assert found(planted(edits), LossSpec(0.5)) == [Fault.RANGE, Fault.EMPTY_MEAN]


def test_an_accumulation_in_rows_is_named_of_which_no_drift_is_measured() -> None:
    edits = [
        *FLOAT32_SUMS,
        ("Size(each)", "Shape<start=1, end=2>(each)"),
        ("ReduceSum<keepdims=0>(wide)", "ReduceSum<keepdims=0>(wide, last)"),
        ("d = Sub(pred, gt)", "last = Constant<value_ints=[1]>() d = Sub(pred, gt)"),
    ]
    by_row = LossSpec(0.5, per_sample=True)
    result = verify(planted(edits, shape="N,4096", out="[N]"), spec=by_row)
    (diagnosis,) = result.diagnoses
    assert diagnosis.fault is Fault.FLOAT32_ACCUMULATION
    assert "right on a few elements, and" in diagnosis.explanation


@pytest.mark.parametrize(
    ("theirs", "ours", "hint"),
    [
        (0.7, 0.5, "beta = 0.7 fits"),
        (0.5, 1.0, "beta = 0.5 fits"),
        (2.0, 0.5, "that is 1/beta"),
        (1.0, 0.0, "beta = 1 fits"),
        (1e-3, 1.0, "beta = 0.001 fits"),
        (1e4, 1.0, "beta = 10000 fits"),
        (1 / 9, 3.0, "taken for a sigma"),
        (0.12345, 0.1, "beta = 0.12345 fits"),
    ],
)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_wrong_beta_is_estimated(theirs: float, ours: float, hint: str, reduction: str) -> None:
    result = verify(
        planted(beta=theirs, reduction=reduction), spec=LossSpec(ours, reduction), drift=False
    )
    (diagnosis,) = result.diagnoses
    assert diagnosis.fault is Fault.WRONG_BETA
    assert diagnosis.estimate == pytest.approx(theirs, rel=1e-6)
    assert hint in diagnosis.explanation
    assert f"the spec says {ours:.9g}" in diagnosis.explanation


def test_beta_rounded_to_float32_in_a_float64_graph() -> None:
    model = planted(dtype="float64", beta=float(np.float32(0.1)))
    (diagnosis,) = verify(model, spec=LossSpec(0.1, dtype="float64"), drift=False).diagnoses
    assert diagnosis.fault is Fault.WRONG_BETA
    assert "rounded to float32" in diagnosis.explanation


NARROW = {
    "float64 computed in float32": (
        [("d = Sub(pred, gt)",
          "p = Cast<to=1>(pred) g = Cast<to=1>(gt) e = Sub(p, g) d = Cast<to=11>(e)"),
         ("wide = Cast<to=11>(each)", "wide = Cast<to=1>(each)"),
         ("count = Cast<to=11>(number)", "count = Cast<to=1>(number)")],
        Fault.NARROW_ARITHMETIC,
    ),
    "float64 added up in float32": (
        [("wide = Cast<to=11>(each)", "wide = Cast<to=1>(each)"),
         ("count = Cast<to=11>(number)", "count = Cast<to=1>(number)")],
        Fault.FLOAT32_ACCUMULATION,
    ),
    "float64 inputs through float32": (
        [("d = Sub(pred, gt)",
          "p = Cast<to=1>(pred) g = Cast<to=1>(gt) q = Cast<to=11>(p) h = Cast<to=11>(g) "
          "d = Sub(q, h)")],
        Fault.NARROW_INPUT,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NARROW)
def test_float64_that_is_not(name: str) -> None:
    edits, fault = NARROW[name]
    model = planted(edits, dtype="float64", beta=0.5)
    # ONNX Runtime's optimiser takes casts to a narrower format and back for nothing.
    assert found(model, LossSpec(0.5, dtype="float64"), "onnx-reference") == [fault]


@pytest.mark.parametrize(
    ("edits", "fault"),
    [
        (
            [("Cast<to=11>(each)", "Cast<to=10>(each)"),
             ("Cast<to=11>(number)", "Cast<to=10>(number)")],
            Fault.HALF_ACCUMULATION,
        ),
        (
            [("Cast<to=11>(each)", "Cast<to=16>(each)"),
             ("average = Div(total, count)",
              "back = Cast<to=11>(total) average = Div(back, count)")],
            Fault.HALF_ACCUMULATION,
        ),
        (
            [("d = Sub(pred, gt)",
              "p = Cast<to=10>(pred) g = Cast<to=10>(gt) e = Sub(p, g) d = Cast<to=1>(e)"),
             ("wide = Cast<to=11>(each)", "r = Cast<to=10>(each) wide = Cast<to=11>(r)"),
             ("out = Cast<to=1>(average)", "o = Cast<to=10>(average) out = Cast<to=1>(o)")],
            Fault.NARROW_ARITHMETIC,
        ),
    ],
)  # fmt: skip
def test_half_precision(edits: list[tuple[str, str]], fault: Fault) -> None:
    assert found(planted(edits), LossSpec(0.5), "onnx-reference") == [fault]


FLOAT32_SUMS = [
    ("Cast<to=11>(each)", "Identity(each)"),
    ("Cast<to=11>(number)", "Cast<to=1>(number)"),
    ("out = Cast<to=1>(average)", "out = Identity(average)"),
]


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


def test_float64_accumulation() -> None:
    result = verify(planted(dtype="float64"), spec=LossSpec(0.5, dtype="float64"))
    assert [d.fault for d in result.diagnoses] == [Fault.FLOAT64_ACCUMULATION]


def test_two_faults_are_both_named() -> None:
    edits = [("Mul(half, square)", "Mul(one, square)"), ("Div(total, count)", "Identity(total)")]
    assert found(planted(edits), LossSpec(0.5)) == [Fault.MISSING_HALF, Fault.SUM_FOR_MEAN]


def test_a_wrong_beta_with_a_wrong_reduction() -> None:
    model = planted([("Div(total, count)", "Identity(total)")], beta=0.25)
    result = verify(model, spec=LossSpec(0.5), drift=False)
    assert [d.fault for d in result.diagnoses] == [Fault.WRONG_BETA, Fault.SUM_FOR_MEAN]
    assert result.diagnoses[0].estimate == 0.25


@pytest.mark.parametrize(
    "each",
    [
        "Mul(pred, gt)",
        "Exp(size)",
        "Max(pred, gt)",
        "Tanh(size)",
    ],
)
def test_an_unrelated_model_is_unknown(each: str) -> None:
    model = planted([("Where(inside, quadratic, linear)", each)])
    result = verify(model, spec=LossSpec(0.5), drift=False)
    (diagnosis,) = result.diagnoses
    assert diagnosis.fault is Fault.UNKNOWN
    assert "no known fault explains all" in diagnosis.explanation
    assert diagnosis.evidence


SPECS = [
    LossSpec(beta, reduction, dtype)
    for dtype in ("float32", "float16", "bfloat16", "float64")
    for reduction in ("none", "mean", "sum")
    for beta in (0.0, 1e-3, 0.5, 1.0, 1e4, float("inf"))
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("shape", [None, ("N", 3), (), (0, 2)], ids=str)
def test_nothing_is_named_on_a_right_model(
    spec: LossSpec, shape: tuple[int | str, ...] | None
) -> None:
    assert diagnose(load(export(spec, "inlined", shape)), spec) == ()


EXTENSIONS = [
    LossSpec(beta, reduction, dtype, **extension)  # type: ignore[arg-type]
    for beta in (0.0, 0.5)
    for reduction in ("mean", "sum")
    for dtype in ("float32", "bfloat16", "float64")
    for extension in (
        {"per_sample": True},
        {"gradient": True},
        {"gradient": True, "per_sample": True},
        {"weight": "count", "gradient": True},
    )
]


@pytest.mark.parametrize("spec", EXTENSIONS, ids=lambda spec: spec.name)
def test_nothing_is_named_on_a_right_extension(spec: LossSpec) -> None:
    assert diagnose(load(export(spec, "inlined", ("N", 3))), spec) == ()


@pytest.mark.parametrize(
    ("theirs", "ours", "faults"),
    [
        ({"per_sample": True, "reduction": "sum"}, {"per_sample": True}, [Fault.SUM_FOR_MEAN]),
        ({}, {"per_sample": True}, [Fault.REDUCED]),
        ({"per_sample": True, "beta": 0.25}, {"per_sample": True}, [Fault.WRONG_BETA]),
        ({"weight": "count", "beta": 0.25}, {"weight": "count"}, [Fault.WRONG_BETA]),
        (
            {"weight": "count", "reduction": "sum"},
            {"weight": "count"},
            [Fault.SUM_FOR_MEAN],
        ),
    ],
)
def test_faults_of_the_extensions(
    theirs: dict[str, object], ours: dict[str, object], faults: list[Fault]
) -> None:
    model = export(LossSpec(**{"beta": 0.5, **theirs}), shape=("N", 3))  # type: ignore[arg-type]
    spec = LossSpec(**{"beta": 0.5, **ours})  # type: ignore[arg-type]
    assert [diagnosis.fault for diagnosis in diagnose(load(model), spec)] == faults


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
    assert "most likely" not in str(verify_table(result).caption)


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


def test_verify_names_swapped_inputs_in_the_gradient() -> None:
    spec = LossSpec(0.5, gradient=True)
    assert verify(gradient_model(), spec=spec, drift=False)
    result = verify(gradient_model(negated=True), spec=spec, drift=False)
    assert [diagnosis.fault for diagnosis in result.diagnoses] == [Fault.SWAPPED_INPUTS]


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


def test_swapped_inputs_are_right_for_the_loss_alone() -> None:
    assert verify(planted([("Sub(pred, gt)", "Sub(gt, pred)")]), spec=LossSpec(0.5), drift=False)


@pytest.mark.parametrize("beta", [1e-3, 0.1, 0.5, 1.0, 3.0, 1e4])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_less_or_equal_changes_no_answer_and_is_read_off_the_graph(
    beta: float, reduction: str
) -> None:
    model = planted([("Less(size", "LessOrEqual(size")], beta=beta, reduction=reduction)
    result = verify(model, spec=LossSpec(beta, reduction), drift=False)
    assert result
    (remark,) = result.remarks
    assert remark.fault is Fault.LESS_OR_EQUAL and f"beta = {beta:g}" in remark.explanation
    assert result.to_dict()["remarks"][0]["fault"] == "<= for <"


#: Ways to write a comparison, and whether |d| = beta goes to the quadratic part.
COMPARISONS = {
    "less": ([], False),
    "greater, arguments exchanged": ([("Less(size, beta)", "Greater(beta, size)")], False),
    "not greater": (
        [("inside = Less(size, beta)", "outside = Greater(size, beta) inside = Not(outside)")],
        True,
    ),
    "greater, branches exchanged": (
        [("Less(size, beta)", "Greater(size, beta)"),
         ("Where(inside, quadratic, linear)", "Where(inside, linear, quadratic)")],
        True,
    ),
    "or equal, branches exchanged": (
        [("Less(size, beta)", "GreaterOrEqual(size, beta)"),
         ("Where(inside, quadratic, linear)", "Where(inside, linear, quadratic)")],
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPARISONS)
def test_however_the_comparison_is_written(name: str) -> None:
    edits, or_equal = COMPARISONS[name]
    result = verify(planted(edits, beta=1.0), spec=LossSpec(), drift=False)
    assert result
    assert [remark.fault for remark in result.remarks] == [Fault.LESS_OR_EQUAL] * or_equal


def test_a_comparison_is_read_inside_a_function_too() -> None:
    model = onnx.parser.parse_model("""
<ir_version: 10, opset_import: ["" : 18, "theirs" : 1]>
g (float[N,4] pred, float[N,4] gt) => (float[N,4] out) { out = theirs.loss(pred, gt) }
<domain: "theirs", opset_import: ["" : 18]>
loss (x, y) => (out) {
    beta = Constant<value_float=1.0>() half = Constant<value_float=0.5>()
    d = Sub(x, y) size = Abs(d) inside = LessOrEqual(size, beta) square = Mul(d, d)
    quadratic = Mul(half, square) linear = Sub(size, half) out = Where(inside, quadratic, linear)
}""")
    result = verify(model, spec=LossSpec(reduction="none"), drift=False)
    assert result and [remark.fault for remark in result.remarks] == [Fault.LESS_OR_EQUAL]


def test_no_comparison_no_remark() -> None:
    assert verify(export(LossSpec(), shape=("N", 4)), drift=False).remarks == ()


def shown(result: Verification) -> str:
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), width=200)
    console.print(verify_table(result), diagnosis_table(result))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_a_diagnosis_is_shown_and_is_strict_json() -> None:
    result = verify(
        planted([("Div(halved, beta)", "Identity(halved)")]), spec=LossSpec(0.5), drift=False
    )
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
        planted([("Less(size", "LessOrEqual(size")], beta=0.0), spec=LossSpec(0.0), drift=False
    )
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["diagnoses"][0]["evidence"][0]["got"] == "nan"


def test_an_error_instead_of_an_answer_and_no_line_of_the_runtime_s_on_stderr(
    capfd: pytest.CaptureFixture[str],
) -> None:
    row = "i = Constant<value_int=100>() p = Gather<axis=0>(pred, i) d = Sub(p, gt)"
    edits = [("d = Sub(pred, gt)", row)]  # there is no row 100
    result = verify(planted(edits), spec=LossSpec(0.5), drift=False)
    (diagnosis,) = result.diagnoses
    assert diagnosis.fault is Fault.NO_ANSWER
    assert "ONNX Runtime refused the inputs" in diagnosis.explanation
    assert capfd.readouterr() == ("", "")
