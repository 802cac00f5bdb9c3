"""Sums of rows of 32 in float32: right, or refused and left to the artefact's own arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from agreement import assert_right

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy.backends.base import get_backend
from smoothl1_deploy.backends.ort_cpu import OrtRunner
from smoothl1_deploy.backends.slots import Slots
from smoothl1_deploy.backends.sums import Sums, has_sums
from smoothl1_deploy.errors import InvalidInputError
from smoothl1_deploy.floats import ulp_distance
from smoothl1_deploy.reference.oracle import oracle


def runner(spec: LossSpec, tile: int = 1 << 17) -> OrtRunner:
    backend = get_backend("ort-cpu", 1)
    backend.tile = tile
    loaded = backend.load(export(spec))
    assert isinstance(loaded, OrtRunner)
    return loaded


def refusals(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of `Sums.run` from now on gave no answer."""
    seen: list[bool] = []
    honest = Sums.run

    def run(sums: Sums, input: Any, target: Any) -> Any:
        loss = honest(sums, input, target)
        seen.append(loss is None)
        return loss

    monkeypatch.setattr(Sums, "run", run)
    return seen


def test_which_specs_have_sums() -> None:
    assert has_sums(LossSpec(0.1)) and has_sums(LossSpec(0.1, "sum", "float16"))
    for spec in (
        LossSpec(0.1, "none"),
        LossSpec(0.0),
        LossSpec(float("inf")),
        LossSpec(1e-50),  # 0 as a float32
        LossSpec(1e39),  # infinite as one
        LossSpec(0.1, "mean", "float64"),
        LossSpec(0.1, "mean", "bfloat16"),
        LossSpec(0.1, per_sample=True),
        LossSpec(0.1, gradient=True),
        LossSpec(runtime_beta=True),
        LossSpec(0.1, weight="count"),
    ):
        assert not has_sums(spec), spec


@pytest.mark.parametrize("kind", ["constant", "two columns", "64 columns", "random"])
def test_sums_stay_within_two_ulp(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is the same in every row is wrong in the same way in every row: the worst data."""
    seen = refusals(monkeypatch)
    rng = np.random.default_rng(3)
    worst = 0
    for beta in (1.0, 0.1, 3.3, 0.37):
        spec = LossSpec(beta, "mean")
        run = runner(spec).run
        for _ in range(100):
            scale = beta * np.exp(2 * rng.standard_normal())
            columns = {"constant": 1, "two columns": 2, "64 columns": 64, "random": 8192}[kind]
            a, b = (scale * rng.standard_normal((2, columns))).astype(np.float32)
            a, b = np.tile(a, 8192 // columns), np.tile(b, 8192 // columns)
            assert_right(spec, run(a, b)["loss"], a, b)  # PyTorch rounds input - target too
            b[:] = 0
            worst = max(worst, int(ulp_distance(run(a, b)["loss"], oracle(spec, a, b))))
    assert worst <= 2
    assert len(seen) == 800 and not any(seen)


@pytest.mark.parametrize("size", [4097, 8191, 100_001, (1 << 18) + 31])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sizes_that_neither_rows_nor_tiles_divide(
    size: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = refusals(monkeypatch)
    rng = np.random.default_rng(size)
    a, b = rng.standard_normal((2, size)).astype(dtype)
    a[-1] = 900.0  # what is left over counts
    for reduction in ("mean", "sum"):
        spec = LossSpec(0.7, reduction, dtype)
        run = runner(spec, 1 << 16).run
        first, second = run(a, b)["loss"], run(a, b)["loss"]
        assert first.tobytes() == second.tobytes()
        if np.isfinite(first):
            assert_right(spec, first, a, b)
    assert len(seen) == 4 and not any(seen[:2])


def test_what_can_not_be_had_is_left_to_the_artefact(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = refusals(monkeypatch)
    size = 5000
    one = np.zeros(size, np.float32)
    one[77] = 1
    cases = [
        (1.0, "mean", 0 * one),
        (1.0, "mean", one * np.float32("nan")),
        (1.0, "sum", np.where(one, np.inf, 1).astype(np.float32)),
        (1.0, "sum", np.where(one, np.nan, 1).astype(np.float32)),
        (3.0, "mean", np.full(size, 2e38, np.float32)),  # core * d is infinite
        (1e30, "mean", np.full(size, 1e20, np.float32)),  # and the loss is 5e9
        (1.0, "sum", np.full(size, 1e36, np.float32)),  # the sum of a row isn't, that of all is
        (1e-30, "mean", np.full(size, 1e-30, np.float32)),  # core * d is 0
        (1e-10, "mean", np.full(size, 1e-22, np.float32)),
    ]
    for beta, reduction, a in cases:
        spec = LossSpec(beta, reduction)
        assert_right(spec, runner(spec).run(a, 0 * one)["loss"], a, 0 * one, str(beta))
    assert seen == [True] * len(cases)
    half = np.full(size, 60000, np.float16)
    assert runner(LossSpec(1.0, "sum", "float16")).run(half, 0 * half)["loss"] == np.inf


def test_an_error_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    tiled = runner(LossSpec(1.0))
    a = np.ones(8192, np.float32)
    tiled.run(a, 0 * a)

    def broken(*given: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(Sums, "_sum", broken)
    with pytest.raises(InvalidInputError, match="ONNX Runtime refused the inputs: planted"):
        tiled.run(a, 0 * a)
    monkeypatch.setattr(Slots, "run", broken)
    tiled.run(a[:64], a[:64] * 0)  # the first of a shape takes the long way
    with pytest.raises(InvalidInputError, match="ONNX Runtime refused the inputs: planted"):
        tiled.run(a[:64], a[:64] * 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("kind", [{"reduction": "none"}, {"per_sample": True, "gradient": True}])
def test_calls_of_one_shape_after_another(dtype: str, kind: dict[str, Any]) -> None:
    """The second call of a shape, and every one after it, goes by arrays that stay bound."""
    spec = LossSpec(0.5, dtype=dtype, **kind)
    model = export(spec)
    short = get_backend("ort-cpu", 1).load(model)
    rng = np.random.default_rng(0)
    for shape in ((3, 4), (3, 4), (3, 4), (12,), (12,), (2, 2, 3), (2, 2, 3), (3, 4), (3, 4)):
        a, b = (rng.standard_normal((2, *shape)) * 2).astype(short._dtype)
        expected = get_backend("ort-cpu", 1).load(model).run(a, b)
        kept = a.tobytes(), b.tobytes()
        found = short.run(a, b)
        again = short.run(b, a)  # must not reach back into `found`
        assert not any(np.shares_memory(found[n], again[n]) for n in found)
        assert {n: found[n].tobytes() for n in found} == {
            n: expected[n].tobytes() for n in expected
        }
        assert {n: found[n].shape for n in found} == {n: expected[n].shape for n in expected}
        assert (a.tobytes(), b.tobytes()) == kept
