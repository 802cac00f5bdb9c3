"""The verdict: each rule of the tolerance, from both sides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from smoothl1_deploy import LossSpec, export, load
from smoothl1_deploy._floats import Array
from smoothl1_deploy.parity._cases import Case, References, check
from smoothl1_deploy.parity._compare import Verdict, compare
from smoothl1_deploy.reference._module import eager_outputs
from smoothl1_deploy.reference._oracle import oracle

NONE = LossSpec(reduction="none")
MEAN = LossSpec(reduction="mean")


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


def up(values: Array, steps: int) -> Array:
    for _ in range(steps):
        values = np.nextafter(values, np.asarray(np.inf, values.dtype))
    return values


def judge(
    spec: LossSpec, ours: Array, torch: Array, oracle: Array, data: Array | None = None
) -> Verdict:
    data = np.ones_like(oracle) if data is None else data
    return compare(spec, ours, torch, oracle, data, data)


def test_equal_is_green_and_measures_nothing() -> None:
    verdict = judge(NONE, f32(1, 2), f32(1, 2), f32(1, 2))
    assert (verdict.ok, verdict.ulp, verdict.torch_ulp, verdict.allowed) == (True, 0, 0, 1)


def test_a_reduction_with_a_factor_may_be_three_off_as_it_is_rounded_once_more() -> None:
    truth = np.asarray(np.float32(0.77))
    spec = replace(MEAN, loss_weight=0.3)
    assert judge(spec, up(truth, 3), truth, truth).ok
    assert not judge(spec, up(truth, 4), truth, truth).ok


def test_where_pytorch_lost_a_delta_or_overflowed_a_huber_loss_its_nan_is_put_right() -> None:
    """By a delta that is 0 in bfloat16, and by a weight of 0 of a loss beyond the knee."""
    tiny = LossSpec(reduction="none", dtype="bfloat16", loss="huber", delta=1e-42)
    x = np.full(1, np.inf).astype("bfloat16")
    theirs = eager_outputs(tiny, x, np.zeros_like(x))["loss"]
    assert np.isnan(theirs) and judge(tiny, x, theirs, x, x).ok
    half = LossSpec(reduction="sum", dtype="float16", loss="huber", delta=100, weight="count")
    x, zero = np.full(2, 60_000, np.float16), np.zeros(2, np.float16)
    theirs = eager_outputs(half, x, zero, zero)["loss"]
    assert np.isnan(theirs)
    exact = oracle(half, x, zero, zero)
    assert exact == 0 and compare(half, exact, theirs, exact, x, zero).ok


def test_an_element_may_be_one_ulp_further_than_pytorch_and_a_reduction_two_off() -> None:
    truth = f32(1, 2, 3)
    for steps, torch_steps, ok in ((1, 0, True), (2, 0, False), (3, 2, True), (4, 2, False)):
        verdict = judge(NONE, up(truth, steps), up(truth, torch_steps), truth)
        assert (verdict.ok, verdict.ulp, verdict.torch_ulp) == (ok, steps, torch_steps)
        assert ok or f"{steps} ULP > {torch_steps + 1}" in verdict.detail
    truth = np.asarray(np.float32(0.77))
    for steps, torch_steps, ok in ((2, 0, True), (3, 0, False), (8, 7, True), (9, 7, False)):
        assert judge(MEAN, up(truth, steps), up(truth, torch_steps), truth).ok is ok


def test_nan_of_an_infinite_difference_is_put_right_in_a_gradient_alone() -> None:
    """Its slope is 1: a NaN comes of what was multiplied and added up after it."""
    data, target = f32(np.inf, 1), f32(0, 0)
    right, nan = f32(2, 1), f32(np.nan, 1)
    assert compare(NONE, right, nan, right, data, target, "grad_input").ok
    assert not compare(NONE, right, nan, right, data, target).ok
    assert not compare(NONE, right, nan, right, f32(np.nan, 1), target, "grad_input").ok
    flat = LossSpec(np.inf, "none")  # PyTorch's slope of inf is NaN there
    assert not compare(flat, right, nan, right, data, target, "grad_input").ok


def test_nan_in_the_gradient_of_a_broadcast_input_is_looked_up_by_its_own_elements() -> None:
    data, target = f32(1, 2).reshape(2, 1), f32(0, np.nan, 3, 4).reshape(2, 2)
    right, nan = f32(2, 1).reshape(2, 1), f32(2, np.nan).reshape(2, 1)
    assert compare(NONE, right, nan, right, data, target, "grad_input").ok
    assert not compare(NONE, right, nan[::-1], right, data, target, "grad_input").ok


def test_a_proved_bound_is_never_exceeded() -> None:
    """However far PyTorch itself is."""
    truth = np.asarray(np.float32(0.77))
    ours, torch = up(truth, 5), up(truth, 90)
    for bound, ok in ((5, True), (4, False), (None, True)):
        verdict = compare(MEAN, ours, torch, truth, truth, truth, bound=bound)
        assert (verdict.ok, verdict.bound) == (ok, bound)
        assert verdict.allowed == (91 if bound is None else bound)


def test_a_wrong_class_is_red_even_where_a_difference_would_not_show() -> None:
    nan, inf = np.nan, np.inf
    for ours, truth in ((0.0, nan), (nan, 0.0), (inf, 1.0), (-inf, inf), (-0.0, 0.0), (0.0, -0.0)):
        verdict = judge(NONE, f32(1, ours), f32(1, truth), f32(1, truth))
        assert not verdict.ok
        assert (verdict.wrong_class, verdict.worst) == (1, 1)
        assert "1 of 2 in a wrong class; at (1,)" in verdict.detail


def test_nan_equals_nan_and_infinity_itself() -> None:
    values = f32(np.nan, np.inf, -np.inf)
    assert judge(NONE, values, values, values, np.full(3, np.nan, np.float32)).ok


def test_right_where_pytorch_is_not_is_better_than_pytorch() -> None:
    for torch in (np.inf, np.nan, 0.0):
        verdict = judge(NONE, f32(125, 1), f32(torch, 1), f32(125, 1))
        assert verdict.ok and verdict.better == 1


def test_nan_from_input_that_is_not_finite_is_the_contract() -> None:
    bad_input = f32(np.inf)
    assert not judge(NONE, f32(1), f32(np.nan), f32(1), bad_input).ok
    assert judge(NONE, f32(1), f32(np.nan), f32(1), f32(1)).ok


def test_only_pytorch_s_class_or_the_oracle_s_will_do() -> None:
    assert not judge(NONE, f32(0), f32(np.inf), f32(125)).ok
    verdict = judge(NONE, f32(np.inf), f32(np.inf), f32(125))
    assert verdict.ok and verdict.better == 0


def test_what_cancellation_leaves_is_allowed_of_each_element_alone() -> None:
    truth = np.array([1.0, 2.0, 3.0])
    spec, unavoidable = LossSpec(dtype="float64", gradient=True), np.array([9, 0, 0], np.uint64)
    for steps, ok, worst in (((9, 0, 1), True, 0), ((10, 0, 1), False, 0), ((9, 2, 1), False, 1)):
        ours = np.concatenate([up(truth[i : i + 1], n) for i, n in enumerate(steps)])
        data = (truth, truth, truth, truth, "grad_input")
        verdict = compare(spec, ours, *data, unavoidable=unavoidable)
        assert (verdict.ok, verdict.worst, verdict.ulp) == (ok, worst, steps[worst])
        assert verdict.allowed == (1 if worst else 9)


@pytest.mark.parametrize("overflows", [True, False])
def test_a_weight_of_0_that_makes_nan_of_an_overflow_is_no_contract(overflows: bool) -> None:
    """PyTorch squares 1e25 to inf, and 0 * inf is NaN; beside it stands an infinite loss."""
    spec = LossSpec(1e30, per_sample=True, weight="count")
    input, weight = f32(np.inf, 1e25 if overflows else 1.0), f32(1, 0)
    data = [np.stack([f32(0, 0), values]) for values in (input, f32(0, 0), weight)]
    torch, truth = eager_outputs(spec, *data)["loss"], oracle(spec, *data)
    assert (truth == [0, np.inf]).all() and np.isnan(torch[1]) == overflows
    assert compare(spec, truth, torch, truth, *data[:2]).ok
    # Where nothing overflowed, NaN of an infinite input stays PyTorch's word.
    nan = f32(0, np.nan)
    assert compare(spec, truth, nan, truth, *data[:2]).ok is overflows


def test_an_overflow_in_pytorch_is_no_licence_for_the_rest() -> None:
    truth = f32(125, 1)
    assert not judge(NONE, up(truth, 3), f32(np.inf, 1), truth).ok


def test_the_worst_of_several_outputs_is_the_furthest_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 of 4 and not 2 of 2, which is nearer to its limit."""
    spec = LossSpec(gradient=True)
    runner, case = load(export(spec)), Case.of("normal", "odd")
    refs = References.of(spec, case)
    torch = {name: up(refs.oracle[name], steps) for name, steps in (("loss", 1), ("grad_input", 3))}
    ours = {name: up(refs.oracle[name], steps) for name, steps in (("loss", 2), ("grad_input", 3))}
    monkeypatch.setattr(runner, "run", lambda *_, **__: ours)
    verdict = check(runner, replace(refs, torch=torch)).verdict
    assert (verdict.ok, verdict.ulp, verdict.allowed) == (True, 3, 4)
    red = replace(verdict, ok=False, ulp=0)
    assert max([red, verdict, replace(red, wrong_class=1)], key=lambda v: v.badness).wrong_class


def test_shape_and_dtype_count() -> None:
    for result in (np.ones(3, np.float32), np.ones((2, 1), np.float32), np.ones(2, np.float64)):
        verdict = judge(NONE, result, f32(1, 1), f32(1, 1))
        assert not verdict.ok
        assert f"got {result.dtype}{result.shape}, expected float32(2,)" in verdict.detail


def test_nothing_to_compare_is_green() -> None:
    assert judge(NONE, f32(), f32(), f32()).ok
