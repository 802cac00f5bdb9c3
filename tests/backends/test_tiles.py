"""Large arrays in tiles: the same loss as in one piece, whatever the tiles and the threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import numpy as np
import pytest
from agreement import assert_right, pair

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy.backends import crew, tiles
from smoothl1_deploy.backends.base import TILE, Runner, get_backend, load
from smoothl1_deploy.backends.sums import has_sums
from smoothl1_deploy.errors import InvalidInputError, SpecError
from smoothl1_deploy.floats import ulp_distance
from smoothl1_deploy.graph.tiles import tile_model, why_not_tiled
from smoothl1_deploy.spec import DTYPES

KINDS: list[dict[str, Any]] = [
    {"reduction": "none"},
    {"reduction": "mean"},
    {"reduction": "sum"},
    {"reduction": "none", "gradient": True},
    {"reduction": "mean", "gradient": True},
    {"reduction": "sum", "gradient": True},
    {"reduction": "mean", "per_sample": True},
    {"reduction": "sum", "per_sample": True, "gradient": True},
    {"reduction": "mean", "runtime_beta": True},
    {"reduction": "none", "runtime_beta": True, "gradient": True},
    {"reduction": "mean", "weight": "count"},
    {"reduction": "mean", "weight": "weights"},
    {"reduction": "mean", "weight": "count", "gradient": True},
    {"reduction": "mean", "weight": "weights", "per_sample": True, "gradient": True},
]


def runner(spec: LossSpec, tile: int, threads: int = 1) -> Runner:
    """The artefact of `spec`; `tile` 0 for its own graph on the whole arrays."""
    backend = get_backend("ort-cpu", threads)
    backend.tile = tile
    return backend.load(export(spec))


def arguments(spec: LossSpec, shape: tuple[int, ...], special: bool = False) -> dict[str, Any]:
    """What `run` takes for `spec`."""
    a, b = pair(spec, shape, special=special)
    given: dict[str, Any] = {"input": a, "target": b}
    if spec.weight:
        given["weight"] = np.random.default_rng(5).uniform(0, 2, shape).astype(a.dtype)
    if spec.runtime_beta:
        given["beta"] = 0.5
    return given


def count_tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tiles of each call from now on."""
    seen: list[int] = []
    honest = tiles._Call.outputs

    def outputs(call: tiles._Call) -> Any:
        seen.append(call.tiles)
        return honest(call)

    monkeypatch.setattr(tiles._Call, "outputs", outputs)
    return seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_tiles_give_what_the_whole_gives(
    kind: dict[str, Any], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = count_tiles(monkeypatch)
    spec = LossSpec(1.0 if kind.get("runtime_beta") else 0.3, dtype=dtype, **kind)
    whole, tiled = runner(spec, 0), runner(spec, 64, threads=2)
    for shape in ((1021,), (1024,), (70, 16), (40, 3, 7), (2, 500)):
        given = arguments(spec, shape)
        expected, found = whole.run(**given), tiled.run(**given)
        assert list(found) == list(expected)
        for name in expected:
            assert found[name].dtype == expected[name].dtype
            assert found[name].shape == expected[name].shape
            # In float64 the order of a sum shows; `Sums` rounds elsewhere than the artefact.
            most = 2 if spec.dtype == "float64" or has_sums(spec) else 0
            assert ulp_distance(found[name], expected[name]).max() <= most, (shape, name)
    assert has_sums(spec) or (len(seen) == 5 and min(seen) >= 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("beta", [0.0, 1.0, float("inf")])
def test_tiles_are_right_at_the_edges_of_the_format(
    beta: float, reduction: str, dtype: str
) -> None:
    spec = LossSpec(beta, reduction, dtype)
    tiled = runner(spec, 64)
    for special in (False, True):
        a, b = pair(spec, (1021,), special=special)
        assert_right(spec, tiled.run(a, b)["loss"], a, b)
    zero = np.zeros_like(a)
    loss = tiled.run(zero, -zero)["loss"]
    assert not loss.any() and not np.signbit(loss).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_one_element_of_one_tile(reduction: str, value: float) -> None:
    spec = LossSpec(0.5, reduction)
    tiled = runner(spec, 64)
    for at in (0, 63, 64, 700, 1020):
        a, b = pair(spec, (1021,))
        a[at] = value
        assert_right(spec, tiled.run(a, b)["loss"], a, b, f"at {at}")


def test_sums_that_overflow_on_the_way() -> None:
    for spec in (LossSpec(1.0, "sum"), LossSpec(1.0, "mean"), LossSpec(1.0, "mean", "float64")):
        big = float(np.finfo(spec.dtype).max) / 4
        a = np.full(1000, big, spec.dtype)
        assert_right(spec, runner(spec, 64).run(a, 0 * a)["loss"], a, 0 * a)
    opposite = np.array([1.0, np.inf, -np.inf, 1.0])
    assert np.isnan(tiles._exact_sum(opposite))
    assert tiles._exact_sum(np.full(4, 1e308)) == np.inf
    assert tiles._exact_sum(np.array([1e16, 1.0, -1e16])) == 1.0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_neither_threads_nor_the_size_of_tiles_change_a_float32_sum(
    beta: float, reduction: str
) -> None:
    spec = LossSpec(beta, reduction)
    a, b = pair(spec, (100_003,))
    found = {
        runner(spec, tile, threads).run(a, b)["loss"].tobytes()
        for tile, threads in product((1000, 1 << 14, 99_999), (1, 2, 5))
    }
    assert len(found) == 1


def test_what_is_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_tiles(monkeypatch)
    spec = LossSpec(0.0, "sum")
    tiled = runner(spec, 256)
    rng = np.random.default_rng(0)

    def calls(a: np.ndarray, b: np.ndarray) -> list[int]:
        seen.clear()
        assert_right(spec, tiled.run(a, b)["loss"], a, b)
        return list(seen)

    a = rng.standard_normal(1000).astype(np.float32)
    assert calls(a, -a) == [4]
    assert calls(a[:256], -a[:256]) == []
    assert calls(a[:0], a[:0]) == []
    assert calls(a, -a[:1]) == []  # broadcast: in one piece
    assert calls(a.reshape(10, 100).T, a.reshape(100, 10)) == [4]
    # Nobody cuts rows: the few that fit, or one.
    per_sample = runner(LossSpec(per_sample=True), 256)
    for shape, expected in (((10, 100), 5), ((3, 300), 3), ((1, 1000), 1), ((1000,), 4)):
        seen.clear()
        per_sample.run(a[: np.prod(shape)].reshape(shape), -a[: np.prod(shape)].reshape(shape))
        assert seen == [expected], shape


def test_load_tiles_and_a_check_of_the_artefact_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_tiles(monkeypatch)
    spec = LossSpec(0.0)
    a, b = pair(spec, (TILE + 1,))
    first = load(export(spec)).run(a, b)["loss"]
    assert seen == [2]
    second = get_backend("ort-cpu").load(export(spec)).run(a, b)["loss"]
    assert seen == [2]
    assert first.tobytes() == second.tobytes()
    assert_right(spec, first, a, b)


def test_what_can_not_be_tiled_runs_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_tiles(monkeypatch)
    spec = LossSpec(0.5, weight="weights", gradient=True)
    assert why_not_tiled(spec) == (
        "every element of the gradient is divided by the sum of all weights"
    )
    given = arguments(spec, (1000,))
    found = runner(spec, 64).run(**given)
    assert seen == []
    assert found["grad_input"].tobytes() == runner(spec, 0).run(**given)["grad_input"].tobytes()


def test_many_threads_share_the_tiles() -> None:
    spec = LossSpec(0.5, "none")
    tiled = runner(spec, 128, threads=3)
    cases = []
    for i in range(8):
        a, b = pair(spec, (1000 + 37 * i,))
        cases.append((a * (1 + i), b, runner(spec, 0).run(a * (1 + i), b)["loss"].tobytes()))
    barrier = threading.Barrier(8)

    def work(case: tuple[np.ndarray, np.ndarray, bytes]) -> int:
        a, b, expected = case
        barrier.wait(timeout=300)
        return sum(tiled.run(a, b)["loss"].tobytes() != expected for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, cases)) == [0] * 8


def test_an_error_in_one_tile_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    tiled = runner(LossSpec(0.0), 64, threads=2)
    a, b = pair(LossSpec(0.0), (1000,))
    tiled.run(a, b)
    honest = tiles._Cut.part

    def part(cut: tiles._Cut, index: int, start: int, units: int) -> Any:
        if index == 5:
            raise RuntimeError("planted")
        return honest(cut, index, start, units)

    monkeypatch.setattr(tiles._Cut, "part", part)
    with pytest.raises(InvalidInputError, match="ONNX Runtime refused the inputs: planted"):
        tiled.run(a, b)


def test_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    assert crew.default_threads() == 8
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5})
    assert crew.default_threads() == 2
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert crew.default_threads() == 1
    with pytest.raises(SpecError, match="threads must be 1 to 4096, or 0 for the default, got -1"):
        load(export(LossSpec()), threads=-1)


def test_the_model_of_a_tile_ends_with_the_sum() -> None:
    model = tile_model(LossSpec(0.5, "mean", "float16"))
    (loss,) = model.graph.output
    assert (loss.name, loss.type.tensor_type.elem_type) == ("loss", 11)
    assert not loss.type.tensor_type.shape.dim
    operators = [node.op_type for node in model.graph.node]
    assert operators[-1] == "ReduceSum" and "Div" in operators and "ReduceMean" not in operators
