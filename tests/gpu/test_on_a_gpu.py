"""What only a GPU can show. Each backend that isn't available here is skipped with its reason."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from agreement import assert_right, pair

from smoothl1_deploy import LossSpec, export, load
from smoothl1_deploy._floats import ulp_distance
from smoothl1_deploy.backends._base import missing
from smoothl1_deploy.errors import SmoothL1DeployError, UnsupportedError
from smoothl1_deploy.parity._matrix import Matrix, run_matrix
from smoothl1_deploy.reference import oracle

pytestmark = pytest.mark.gpu

SPEC = LossSpec(0.5, "none")
MODEL = export(SPEC, shape=("N", 16))


@pytest.fixture(
    params=["torch-cuda", "torch-triton", "ort-cuda", "ort-tensorrt", "ort-tensorrt-rtx", "trt"]
)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = missing(name)
    if reason is None:
        try:
            load(MODEL, name)
        except SmoothL1DeployError as exc:  # it is installed, and this card is none of its
            reason = str(exc)
    if reason:
        pytest.skip(f"{name} not available: {reason}")
    return name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_parity(backend: str, dtype: str) -> None:
    if backend == "torch-cuda":
        pytest.skip("PyTorch's own kernel is a reference, not under test")
    matrix = Matrix((backend,), betas=(0.0, 0.5, 1.0), dtypes=(dtype,), routes=("function",),
                    extensions=False, quick=True)  # fmt: skip
    report = run_matrix(matrix)
    assert report, [cell.failures[0].verdict.detail for cell in report.red]


def test_cuda_tensors_in_and_out(backend: str) -> None:
    runner: Any = load(MODEL, backend)
    a, b = pair(SPEC, (64, 16))
    x, t = torch.from_numpy(a).cuda(), torch.from_numpy(b).cuda()
    before = torch.cuda.memory_allocated()
    loss = runner.run(x, t)["loss"]
    assert loss.device == x.device
    # The output, and at most a little scratch memory: no copy of what went in.
    assert torch.cuda.memory_allocated() - before <= 2 * loss.nbytes
    if backend != "torch-cuda":
        assert_right(SPEC, loss.cpu().numpy(), a, b)


def test_every_operand_is_taken_from_the_card(backend: str) -> None:
    """Beside input and target: weights, a mask, betas at run time and a divisor."""
    spec = LossSpec(runtime_beta=(16,), mask=True, weight="count", divisor=True, empty="zero")
    try:
        runner: Any = load(export(spec, shape=("N", 16)), backend)
    except UnsupportedError as exc:
        pytest.skip(str(exc))
    a, b = pair(spec, (64, 16))
    given: dict[str, Any] = {
        "weight": abs(a[::-1]),
        "mask": a > b,
        "beta": abs(b[0]),
        "divisor": 7.0,
    }
    on_card = {name: torch.from_numpy(given[name].copy()).cuda() for name in ("weight", "mask")}
    found = runner.run(torch.from_numpy(a).cuda(), torch.from_numpy(b).cuda(), **given | on_card)
    loss = found["loss"].cpu().numpy()
    np.testing.assert_array_equal(loss, runner.run(a, b, **given)["loss"])
    known = replace(spec, beta=given.pop("beta"), runtime_beta=False)
    if backend != "torch-cuda":
        assert ulp_distance(loss, oracle(known, a, b, **given)).max() <= 2


def test_many_threads(backend: str) -> None:
    runner = load(MODEL, backend)

    def work(rows: int) -> None:
        a, b = pair(SPEC, (rows, 16))
        assert_right(SPEC, runner.run(a, b)["loss"], a, b)

    with ThreadPoolExecutor(16) as pool:
        assert len([*pool.map(work, [1 + n % 40 for n in range(200)])]) == 200


def test_a_cuda_graph(backend: str) -> None:
    if backend not in ("trt", "torch-cuda", "torch-triton"):
        pytest.skip(f"{backend} can't be recorded in a CUDA graph")
    runner: Any = load(MODEL, backend)
    a, b = pair(SPEC, (64, 16))
    x, t = torch.from_numpy(a).cuda(), torch.from_numpy(b).cuda()
    recorded = runner.capture(x, t)
    x += 1
    assert_right(SPEC, recorded.replay()["loss"].cpu().numpy(), (x.cpu().numpy()), b)
