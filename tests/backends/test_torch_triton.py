"""`torch-triton`: the fused kernels under Triton's interpreter, which needs no GPU.

What a GPU would run besides (its instructions, not its numbers) is in `test_fused_compiled`.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from agreement import assert_right, pair
from host_device import HostDevice

from smoothl1_deploy import LossSpec, export, load
from smoothl1_deploy._floats import NUMPY_DTYPE
from smoothl1_deploy._spec import DTYPES, REDUCTIONS
from smoothl1_deploy.backends import _base as base
from smoothl1_deploy.backends._torch_triton import InterpretedDevice, TorchTritonBackend
from smoothl1_deploy.errors import (
    ArtefactError,
    BackendUnavailableError,
    MissingDependencyError,
    UnsupportedError,
)
from smoothl1_deploy.parity._cases import LAYOUTS, Case, References, check, is_for
from smoothl1_deploy.parity._families import FAMILIES
from smoothl1_deploy.parity._matrix import BETAS, Matrix, is_too_slow, run_matrix

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

_KERNELS = "smoothl1_deploy.backends._fused"


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    """The kernels as the interpreter takes them, which is decided when they are imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.delitem(sys.modules, _KERNELS, raising=False)
        yield
    sys.modules.pop(_KERNELS, None)


@pytest.fixture
def fused() -> Any:
    TorchTritonBackend()
    return sys.modules[_KERNELS]


def agrees(spec: LossSpec, case: Case) -> None:
    axes = LAYOUTS[case.layout]
    target = None if axes.target_axes == axes.input_axes else axes.target_axes
    runner = load(export(spec, shape=axes.input_axes, target_shape=target), "torch-triton")
    result = check(runner, References.of(spec, case), TorchTritonBackend.accumulator)
    assert result.verdict.ok, (spec.name, case, result.verdict.detail)


def fused_loss(spec: LossSpec, *arrays: np.ndarray, **others: Any) -> np.ndarray:
    """The loss of a matrix by the kernels."""
    model = export(spec, shape=("N", arrays[0].shape[1]))
    return load(model, "torch-triton").run(*arrays, **others)["loss"]


# Numbers


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_beta_and_family(dtype: str, reduction: str) -> None:
    summed = ("normal", "constant", "overflow", "outliers", "nan")
    for beta in BETAS:
        for family in FAMILIES if reduction == "none" else summed:
            agrees(LossSpec(beta, reduction, dtype), Case.of(family, "odd"))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_layout(reduction: str) -> None:
    for layout in LAYOUTS:
        if "^" not in layout and is_for(LossSpec(), layout):
            for dtype in ("float32", "bfloat16"):
                agrees(LossSpec(0.5, reduction, dtype), Case.of("normal", layout))


def test_the_mean_of_a_million_equal_numbers() -> None:
    agrees(LossSpec(1.0, "mean"), Case.of("constant", "2^20"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_number_a_row(dtype: str) -> None:
    for reduction in ("mean", "sum"):
        spec = LossSpec(0.5, reduction, dtype, per_sample=True)
        for layout in ("matrix", "odd", "4-d", "no-rows"):
            for family in ("normal", "constant", "nan", "overflow"):
                agrees(spec, Case.of(family, layout))


def test_many_programs_and_tiles_along_a_row(monkeypatch: pytest.MonkeyPatch, fused: Any) -> None:
    for name, value in {"_TILE": (64, 1), "_PROGRAMS": 8}.items():
        monkeypatch.setattr(fused, name, value)
    for rows, dtype in itertools.product((1, 3), DTYPES):
        how = fused.plan(rows, 1000)
        assert how.tiles > 1 and how.programs[1] > 1
        for reduction, special in (("mean", False), ("sum", True)):
            spec = LossSpec(0.5, reduction, dtype, per_sample=rows > 1)
            a, b = pair(spec, (rows, 1000), special=special)
            assert_right(spec, fused_loss(spec, a, b), a, b)


def test_beta_at_run_time() -> None:
    for dtype in DTYPES:
        spec = LossSpec(reduction="none", dtype=dtype, runtime_beta=True)
        for beta in (0.0, 0.1, 2.0, math.inf):
            number = replace(spec, runtime_beta=False, beta=float(np.float32(beta)))
            a, b = pair(number, (30, 4), special=True)
            assert_right(number, fused_loss(spec, a, b, beta=beta), a, b)
        for beta in (-1.0, math.nan):
            assert np.isnan(fused_loss(spec, a, b, beta=beta).astype("f8")).all()
    spec = LossSpec(reduction="sum", runtime_beta=True)
    nothing, one = (np.zeros((n, 4), np.float32) for n in (0, 1))
    assert fused_loss(spec, nothing, nothing, beta=-1.0) == 0
    assert np.isnan(fused_loss(spec, one, one, beta=-1.0))


def test_a_sum_is_rounded_once() -> None:
    """1 + half an ULP + a trace that float32 does not hold: by way of float32 it would be 1."""
    for dtype, bits in (("float16", 11), ("bfloat16", 8)):
        spec = LossSpec(0.0, "sum", dtype)
        x = np.zeros((1, 16), NUMPY_DTYPE[dtype])
        x[0, [0, 1, 8]] = 1.0, 2.0**-bits, 2.0**-24
        zeros = np.zeros_like(x)  # not 0 * x: before numpy 2.1.3 that of a bfloat16 is float32
        assert float(fused_loss(spec, x, zeros)) == 1 + 2.0 ** (1 - bits)
        x[0, 8] = 0
        assert float(fused_loss(spec, x, zeros)) == 1.0  # the tie, to even


def test_every_bfloat16_comes_back_and_ties_are_rounded_to_even() -> None:
    """As |x - 0|, by the bits: every number but NaN's payload."""
    spec = LossSpec(0.0, "none", "bfloat16")
    x = np.arange(1 << 16, dtype=np.uint16).view(NUMPY_DTYPE["bfloat16"]).reshape(-1, 16)
    got = fused_loss(spec, x, np.zeros_like(x))
    np.testing.assert_array_equal(got.astype("f4"), np.abs(x.astype("f4")))
    x = np.array([[1, 1 + 2.0**-7]], NUMPY_DTYPE["bfloat16"])
    got = fused_loss(spec, x, np.full_like(x, -(2.0**-8)))
    assert got.astype("f8").tolist() == [[1, 1 + 2.0**-6]]


def _store_rounded(source, target):  # type: ignore[no-untyped-def]
    bits = tl.load(source + tl.arange(0, 4))
    tl.store(target + tl.arange(0, 4), rounded(bits.to(tl.float32, bitcast=True), tl.int16))  # noqa: F821


def test_the_nan_of_a_gpu_is_still_nan(fused: Any) -> None:
    """All ones: one more, and it would be -0."""
    _store_rounded.__globals__["rounded"] = fused._rounded
    source = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800000, 0x3F808000], dtype=torch.int32)
    target = torch.zeros(4, dtype=torch.int16)
    triton.jit(_store_rounded)[(1,)](source, target)
    assert target.tolist() == [0x7FC0, 0x7FC0, 0x7F80, 0x3F80]


def test_what_pairs_of_float64_lose_is_kept() -> None:
    """Each 2^-53 meets the 1 at a step of its own, and is rounded away there."""
    x = np.zeros(4096)
    x[0], x[[1 << k for k in range(12)]] = 1.0, 2.0**-53
    x = x.reshape(-1, 16)
    assert fused_loss(LossSpec(0.0, "sum", "float64"), x, 0 * x) == 1 + 12 * 2.0**-53


def test_the_tree_of_the_interpreter_and_that_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, fused: Any
) -> None:
    """On a GPU the last step is `tl.reduce`, which takes the interpreter long."""
    for dtype in ("float32", "float64"):
        spec = LossSpec(0.5, "sum", dtype)
        inputs = pair(spec, (16, 16))
        runner = load(export(spec, shape=("N", 16)), "torch-triton")
        unrolled = runner.run(*inputs)["loss"]
        with monkeypatch.context() as patch:
            patch.setattr(fused, "INTERPRETED", False)
            np.testing.assert_array_max_ulp(runner.run(*inputs)["loss"], unrolled, 1)


def test_the_product_with_an_inverse_is_the_quotient(fused: Any) -> None:
    """Of all powers of two that have one, and of nothing else."""
    for power in (-149, -128, -127, -126, -20, 0, 1, 126, 127):
        beta = 2.0**power
        inverse = fused._inverse(beta)
        assert (inverse is None) == (power < -127)
        if inverse is not None:
            assert float(np.float32(inverse)) == inverse == 1 / beta
        for dtype in ("float16", "bfloat16", "float32"):
            for family in ("normal", "subnormals"):
                agrees(LossSpec(beta, "none", dtype), Case.of(family, "odd"))
    for beta in (0.1, 3.0, 1e-40, float(np.nextafter(np.float32(1), np.float32(2)))):
        assert fused._inverse(beta) is None
    assert fused._inverse(0.0) == 1 and fused._inverse(math.inf) == 0


# How a sum is cut


def test_a_plan_covers_every_element_once(fused: Any) -> None:
    for rows, columns in itertools.product(
        (0, 1, 2, 3, 64, 5000, 1 << 20, 1 << 33),
        (0, 1, 5, 16, 4096, 16385, 1 << 20, (1 << 26) + 1, 1 << 33),
    ):
        how = fused.plan(rows, columns)
        (height, width), (down, parts) = how.tile, how.programs
        assert height * width <= 2048 and width >= 16
        assert height & (height - 1) == width & (width - 1) == 0
        assert down * height >= rows > (down - 1) * height or rows == down == 0
        reach = how.tiles * width
        assert parts * reach >= columns and (parts == 1 or (parts - 1) * reach < columns)
        assert 1 <= parts <= 4096
        assert how.scratch == (0 if parts == 1 else 2 * rows * parts)
    # Small sums are one launch, and large ones fill a card.
    for shape, programs in (((1, 1024), (1, 1)), ((1 << 20, 16), (8192, 1)),
                            ((1, 1 << 20), (1, 512)), ((1, 1 << 26), (1, 4096))):  # fmt: skip
        assert fused.plan(*shape).programs == programs


# The backend


def test_where_it_runs_is_said() -> None:
    backend = TorchTritonBackend()
    assert backend.slow == "the CPU, interpreted (TRITON_INTERPRET=1)"
    runner: Any = backend.load(export(LossSpec(), shape=("N", 4)))
    assert runner.device.name == backend.slow
    matrix = Matrix(("torch-triton",), betas=(0.5,), dtypes=("float32",), quick=True)
    report = run_matrix(matrix)
    assert report, [cell.failures[0].verdict.detail for cell in report.red]
    assert {cell.route for cell in report.cells} == {"function"}
    assert [cell.refused for cell in report.cells if cell.refused] == [
        "the fused kernel of torch-triton computes the loss, and no gradient"
    ]
    assert (
        "torch-triton on the CPU, interpreted (TRITON_INTERPRET=1): of 2^20 elements only mean at "
        "beta 1, constant"
    ) in report.notes


def test_what_an_interpreter_is_spared() -> None:
    backend, of = TorchTritonBackend(), Case.of
    for beta, reduction, case, spared in (
        (1.0, "mean", of("constant", "2^20"), False),
        (1.0, "mean", of("normal", "2^20"), True),
        (0.5, "mean", of("constant", "2^20"), True),
        (1.0, "sum", of("constant", "2^20"), True),
        (0.5, "sum", of("normal", "odd"), False),
    ):
        assert is_too_slow(LossSpec(beta, reduction), case, backend) == spared
    backend.slow = None
    assert not is_too_slow(LossSpec(), of("normal", "2^20"), backend)


def test_what_it_refuses() -> None:
    backend = TorchTritonBackend()
    for spec, reason in (
        (LossSpec(gradient=True), "computes the loss, and no gradient"),
        (LossSpec(weight="count"), "and no weight, mask or divisor"),
    ):
        assert reason in str(backend.refuses(spec))
        with pytest.raises(UnsupportedError, match=reason):
            backend.load(export(spec, shape=("N", 4)))
    assert backend.refuses(LossSpec(per_sample=True, runtime_beta=True)) is None


def test_a_model_without_a_spec() -> None:
    model = export(LossSpec(), shape=("N", 4))
    del model.metadata_props[:]
    with pytest.raises(ArtefactError, match="carries none; use a backend that runs the graph"):
        load(model, "torch-triton")


def test_many_threads() -> None:
    """The interpreter itself can't be entered twice."""
    spec = LossSpec(0.5, "none")
    runner = load(export(spec, shape=("N", 16)), "torch-triton")

    def work(rows: int) -> None:
        a, b = pair(spec, (rows, 16))
        assert_right(spec, runner.run(a, b)["loss"], a, b)

    with ThreadPoolExecutor(4) as pool:
        assert len([*pool.map(work, range(1, 9))]) == 8


class _Host(HostDevice):
    """Tensors of the host are on this device, and its graphs can be replayed."""

    selected = InterpretedDevice.selected


@pytest.mark.usefixtures("tensors_are_on_the_device")
def test_tensors_stay_where_they_are_and_a_graph_replays() -> None:
    for reduction in REDUCTIONS:
        spec = LossSpec(0.5, reduction, "bfloat16")
        runner = TorchTritonBackend(_Host()).load(export(spec, shape=("N", 16)))
        download = runner.device.download
        a, b = pair(spec, (64, 16))
        x, t = runner.device.upload(a), runner.device.upload(b)
        loss = runner.run(x, t)["loss"]
        assert isinstance(loss, torch.Tensor) and loss.dtype == torch.bfloat16
        assert_right(spec, download(loss), a, b)
        recorded = runner.capture(x, t)
        x += 1
        assert_right(spec, download(recorded.replay()["loss"]), download(x), b)


@pytest.mark.usefixtures("tensors_are_on_the_device")
def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, fused: Any) -> None:
    """What a CUDA graph can't record: numbers that come back to the host while it computes."""
    runner = TorchTritonBackend(_Host()).load(
        export(LossSpec(reduction="sum", runtime_beta=True), shape=("N", 16))
    )
    x, t = torch.ones(64, 16), torch.zeros(64, 16)

    def waits(*arguments: Any) -> None:
        raise AssertionError("a number came back to the host")

    for name in ("item", "tolist", "__float__", "__bool__", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    # In the place of the interpreter, which works on the host's numbers.
    seen = []
    monkeypatch.setattr(fused.Launch, "__call__", lambda *a: seen.append(a))
    assert runner.run(x, t, beta=0.5)["loss"].shape == ()
    assert len(seen) == 1


class _Compiler:
    """In the place of a kernel: what it is asked to compile, and what it is then called with."""

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.called: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile(*arguments: Any, num_warps: int, enable_fp_fusion: bool, **known: Any) -> Any:
            self.compiled.append((grid, arguments, known))
            return {grid: lambda *given: self.called.append(given)}

        return compile


@pytest.mark.usefixtures("tensors_are_on_the_device")
def test_a_kernel_is_looked_for_once(monkeypatch: pytest.MonkeyPatch, fused: Any) -> None:
    """The next call of a shape goes to what was compiled, unless an address is no multiple."""
    kernel = _Compiler()
    monkeypatch.setattr(fused, "_write_losses", kernel)
    runner = TorchTritonBackend(_Host()).load(export(LossSpec(0.5, "none"), shape=("N", 16)))
    room = torch.zeros(65 * 16)
    x, t = room[: 64 * 16].view(64, 16), torch.ones(64, 16)
    for _ in range(3):
        loss = runner.run(x, t)["loss"]
    ((grid, arguments, known),) = kernel.compiled
    assert grid == (1, 1, 1) and arguments[3:] == (0.5, 2.0, 1024)
    assert known == {"BETA": 2, "EVEN": True, "BLOCK": 1024}
    # The addresses, and then everything by position.
    addresses = [each.data_ptr() for each in (x, t, loss)]
    assert len(kernel.called) == 2
    assert kernel.called[-1] == (*addresses, 0.5, 2.0, 1024, 2, True, 1024)
    runner.run(room[1:1025].view(64, 16), t)
    runner.run(x, room[1:1025].view(64, 16))
    assert len(kernel.compiled) == 3 and len(kernel.called) == 2
    runner.run(x[:32], t[:32])
    runner.run(x, t)
    assert len(kernel.compiled) == 4 and len(kernel.called) == 3


# Where it can't be used


def test_without_an_interpreter_or_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.delitem(sys.modules, _KERNELS, raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BackendUnavailableError) as caught:
        base.get_backend("torch-triton")
    assert str(caught.value).endswith(
        "or set TRITON_INTERPRET=1 before Python starts, to have its kernels interpreted on the "
        "CPU, slowly"
    )
    assert base.missing("torch-triton") == str(caught.value)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingDependencyError, match="^the torch-triton .* needs the package 'tri"):
        base.get_backend("torch-triton")


def test_a_triton_that_flushes_subnormals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    with pytest.raises(BackendUnavailableError) as caught:
        base.get_backend("torch-triton")
    assert str(caught.value) == (
        "the torch-triton backend needs triton 3.6 or newer; 3.5.1 here takes subnormal numbers "
        "for 0 when it divides. Install it with: pip install -U 'smoothl1-deploy[triton]'"
    )
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(np, "__version__", "2.4.1")
    with pytest.raises(BackendUnavailableError, match=r"needs triton 3\.7 or newer with numpy 2\."):
        base.get_backend("torch-triton")
    for version, numpy in (("3.6.0", "2.3.5"), ("3.10.0", "2.4.1")):
        monkeypatch.setattr(triton, "__version__", version)
        monkeypatch.setattr(np, "__version__", numpy)
        assert TorchTritonBackend().name == "torch-triton"
