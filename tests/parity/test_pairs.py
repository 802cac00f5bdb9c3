"""Every pair of a half format: the exact answers, how answers are judged, and the way through."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from smoothl1_deploy import LossSpec, export, load
from smoothl1_deploy._floats import NUMPY_DTYPE, Array
from smoothl1_deploy.errors import SpecError
from smoothl1_deploy.parity import _pairs as module
from smoothl1_deploy.parity._matrix import BETAS
from smoothl1_deploy.parity._pairs import (
    CODES,
    PAIRS,
    Claim,
    Distances,
    Exact,
    Proof,
    Tally,
    prove,
    tally,
)

ROOT = Path(__file__).parents[2]


@cache
def numbers(dtype: str) -> list[Fraction]:
    """Those >= 0 of a format by their bits, infinity as what would follow the largest."""
    bits = np.arange(1 << 15, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        values = bits.view(NUMPY_DTYPE[dtype]).astype(np.float64)
    exact = [Fraction(float(n)) for n in values[: int(np.argmax(np.isinf(values)))]]
    return [*exact, 2 * exact[-1] - exact[-2]]


def rounded(value: Fraction, dtype: str) -> int:
    """The bits of a number >= 0, to nearest and ties to even, by search among all of them."""
    exact = numbers(dtype)
    low, high = 0, len(exact) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if exact[middle] <= value else (low, middle)
    if value >= exact[high]:
        return high
    twice = 2 * value - exact[low] - exact[high]
    return high if twice > 0 or (twice == 0 and high % 2 == 0) else low


def right(spec: LossSpec, x: Array, t: Array) -> tuple[int, int]:
    """The bits of the loss and of the size of the slope of one pair, in rational arithmetic."""
    d, beta = abs(Fraction(float(x)) - Fraction(float(t))), Fraction(spec.effective_beta)
    loss = d * d / (2 * beta) if d < beta else d - beta / 2
    slope = d / beta if d < beta else Fraction(int(d > 0))
    return rounded(loss, spec.dtype), rounded(slope, spec.dtype)


#: Pairs whose exact loss lies in the middle of two numbers, or nearer to it than float64 can tell.
TIES = {
    ("float16", 1e4): [(2752.0, 0.0), (2750.0, 0.0), (4648.0, 1898.0)],
    ("bfloat16", 0.1): [(3.85058e17, -7.65612e17), (-2.37495e15, -8.97201e15), (257.0, 0.0)],
    ("bfloat16", 1.0): [(4.2393e-24, -255.0), (-1.57164e-22, -256.0), (186.0, 9.18355e-41)],
    ("float16", 0.0): [(2049.0, 0.5), (2050.0, -1.0), (6e-8, 0.0), (65504.0, -16.0)],
}


@pytest.mark.parametrize(("dtype", "beta"), [*TIES, ("float16", 1.0), ("bfloat16", 1e-3)])
def test_the_exact_answers_are_those_of_rational_arithmetic(dtype: str, beta: float) -> None:
    spec = LossSpec(beta, "none", dtype, gradient=True)
    exact, drawn = Exact(spec), np.random.default_rng(0)
    finite = exact.targets[: exact.finite]
    pairs = drawn.choice(finite, (150, 2)).tolist()
    pairs += [(x, x * (1 + e)) for x in drawn.choice(finite, 20) for e in (2**-7, 2**-9)]
    for x, t in [*pairs, *TIES.get((dtype, beta), ())]:
        x, t = np.clip(np.array([x, t]), finite[0], finite[-1]).astype(finite.dtype)
        at = int(np.flatnonzero((finite == t) & (np.signbit(finite) == np.signbit(t)))[0])
        made = exact.answers(x[None])
        found = int(made["loss"][0, at]), int(made["grad_input"][0, at]) & 0x7FFF
        assert found == right(spec, x, t), (x, t)


def test_a_guess_changes_no_answer() -> None:
    exact = Exact(LossSpec(0.5, "none", "float16", gradient=True))
    inputs = exact.targets[[3, 20_000, 31_744, 50_000]]
    right = exact.answers(inputs)
    drawn = np.random.default_rng(0).integers(0, CODES, (4, CODES), np.uint16)
    near = {name: codes + (drawn % 3 - 1) for name, codes in right.items()}
    for guess in (right, near, {"loss": drawn, "grad_input": drawn}, {"loss": right["loss"]}):
        made = exact.answers(inputs, guess)
        assert all((made[name] == codes).all() for name, codes in right.items())


def test_what_is_not_finite_and_the_signs_of_zero_are_the_oracle_s() -> None:
    from smoothl1_deploy.reference._oracle import oracle, oracle_gradient

    for dtype, beta in (("float16", 0.5), ("float16", 0.0), ("bfloat16", float("inf"))):
        spec = LossSpec(beta, "none", dtype, gradient=True)
        exact = Exact(spec)
        rows = np.array([0.0, -0.0, 1.0, np.inf, -np.inf, np.nan]).astype(exact.targets.dtype)
        made = exact.answers(rows)
        x, t = np.repeat(rows, CODES).reshape(6, CODES), np.tile(exact.targets, (6, 1))
        for name, truth in (
            ("loss", oracle(spec, x, t)),
            ("grad_input", oracle_gradient(spec, x, t)),
        ):
            got = made[name].view(truth.dtype)
            np.testing.assert_array_equal(got.astype("f4"), truth.astype("f4"))
            known = ~np.isnan(got.astype("f4"))
            np.testing.assert_array_equal(np.signbit(got)[known], np.signbit(truth)[known])


def test_pairs_are_judged_by_class_and_by_pytorch_s_own_distance() -> None:
    spec = LossSpec(1.0, "none", "float16")
    x, t = np.array([1, 2, 3, 4], np.float16), np.zeros(4, np.float16)
    exact = np.array([1, 2, 3, np.inf], np.float16).view(np.uint16)

    def judged(got: Array, torch: Array) -> Tally:
        return tally(spec, "loss", got.astype(np.uint16), torch.astype(np.uint16), exact, x, t)

    same = judged(exact, exact)
    assert same.ok and same.ours.counts == (4, 0, 0, 0) and same.worst is None
    near = judged(exact + np.array([0, 1, 0, 0]), exact)
    assert near.ok and near.ours.counts == (3, 1, 0, 0) and near.worst is not None
    assert near.worst["input"] == "2.0" and near.worst["exact"] == "2.0"
    assert not judged(exact - np.array([0, 2, 0, 0]), exact).ok
    assert judged(exact - np.array([0, 2, 0, 0]), exact - np.array([1, 0, 0, 0])).ok
    lost = judged(exact - np.array([0, 0, 0, 1]), exact)  # a number where infinity is right
    assert not lost.ok and lost.wrong_class == 1 and lost.worst == {**lost.worst, "input": "4.0"}
    healed = judged(exact, exact - np.array([0, 0, 0, 1]))
    assert healed.ok and healed.better == 1 and healed.torch.counts == (3, 0, 0, 0)
    assert (lost + near).wrong_class == 1 and (near + lost).worst == lost.worst
    assert (near + same).pairs == 8 and (near + same).ours.counts == (7, 1, 0, 0)


def test_what_is_left_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    each = PAIRS // module._TASKS
    worst = {"input": "1.0"}
    monkeypatch.setattr(
        module, "_try_task", lambda _: {"x": {"loss": Tally(pairs=each, worst=worst)}}
    )
    steps: list[tuple[int, int]] = []
    found = prove(
        Proof.begun(Claim("float16", math.inf)), progress=lambda *step: steps.append(step)
    )
    first, second = next(found), next(found)
    assert (first.pairs, second.pairs) == (each, 2 * each) and not second.ok
    known = Proof.from_dict(json.loads(json.dumps(second.to_dict())))
    assert known == second and known.claim.beta == math.inf
    assert [step.pairs for step in prove(known, most=1)] == [3 * each]
    *_, last = prove(known)
    assert last.ok and last.pairs == last.outputs["x"]["loss"].pairs == PAIRS and last.left == ()
    assert steps == [(0, 64), (1, 64), (2, 64)]
    with pytest.raises(ValueError, match="don't add up"):
        Proof.from_dict({**second.to_dict(), "left": [1, 2]})


@pytest.mark.parametrize("backend", ["ort-cpu", "ort-cpu-bare", "trt-network"])
def test_a_task_is_green_and_red_where_the_answers_are_moved(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(module, "_TASKS", 1 << 14)
    monkeypatch.setattr(module, "_AT_ONCE", 2)
    claim = Claim("float16", 1.0, (backend,))
    found = module._try_task((claim, 9_999))[backend]
    assert set(found) >= {"loss"} and all(made.ok for made in found.values())
    assert found["loss"].pairs == 4 * CODES
    runner = module._prepared(claim)[1][backend]
    real = runner.run

    def moved(*arrays: Array) -> dict[str, Array]:
        return {name: np.nextafter(a, a.dtype.type(9)) for name, a in real(*arrays).items()}

    monkeypatch.setattr(runner, "run", moved)
    wrong = module._try_task((claim, 9_999))[backend]
    assert wrong["loss"].ours.counts[0] < wrong["loss"].pairs // 2


@pytest.mark.parametrize("dtype", module.DTYPES)
def test_the_page_has_what_is_on_record(dtype: str) -> None:
    entries = json.loads((ROOT / "results" / f"pairs-{dtype}.json").read_text())["entries"]
    proofs = sorted(map(Proof.from_dict, entries), key=lambda proof: proof.claim.beta)
    assert [proof.claim.beta for proof in proofs] == list(BETAS)
    assert all(proof.pairs == PAIRS for proof in proofs)
    for proof in proofs:
        ours, bare = (proof.outputs[backend].values() for backend in module.BACKENDS)
        assert all(made.ours == Distances((PAIRS, 0, 0, 0)) for made in ours), proof.command
        assert all(made.ours.largest <= 1 for made in bare), proof.command
    page = (ROOT / "docs" / "every-pair.md").read_text()
    assert "\n".join(module.table(proofs).markdown()) in page


@pytest.mark.parametrize("backend", module.BACKENDS)
def test_a_file_without_a_gradient_has_the_losses_of_the_one_that_is_tried(backend: str) -> None:
    for dtype in module.DTYPES:
        claim = Claim(dtype, 0.1, (backend,))
        exact, runners = module._prepared(claim)
        model = export(claim.spec.without_gradient(), claim.route, ("N", CODES))
        x = np.repeat(exact.targets[5::4096], CODES).reshape(-1, CODES)
        t = np.tile(exact.targets, (len(x), 1))
        both, alone = (
            runner.run(x, t)["loss"] for runner in (runners[backend], load(model, backend))
        )
        assert both.tobytes() == alone.tobytes()


def test_a_dtype_with_more_pairs_is_refused() -> None:
    with pytest.raises(SpecError, match="of float32 there are too many"):
        Claim("float32", 1.0)
