"""Sizes of the fused kernels of `torch-triton`, side by side on this machine's GPU.

    python bench/fused_sizes.py        # about a minute; PYTHONPATH=. where nothing is installed

Where the host's time of a small call goes; then microseconds of the GPU, caches swept before each
call, and the share of a copy's bandwidth, for the tiles in `TRIED`. The figures in bench/NOTES.md
are its output.
"""

from __future__ import annotations

import time
from functools import partial
from itertools import product
from typing import Any

import torch

from smoothl1_deploy import LossSpec, export, load
from smoothl1_deploy.backends import _fused as fused
from smoothl1_deploy.backends._torch_triton import TorchTritonBackend
from smoothl1_deploy.bench._timing import copy_bandwidth, sweep, time_calls

Sizes = tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...], tuple[int, ...]]
#: Elements -> tiles (elements, warps) of `none`, tiles of a sum, programs of a sum.
TRIED: dict[int, Sizes] = {
    1 << 26: (
        ((1024, 4), (2048, 4), (4096, 8)),
        (*product((1024, 2048, 4096), (4, 8)), (8192, 8), (8192, 16)),
        (1024, 2048, 4096, 8192, 16384),
    ),
    1 << 20: (
        ((512, 4), (1024, 4), (2048, 4)),
        tuple(product((1024, 2048, 4096), (4, 8))),
        (4096,),
    ),
    1 << 18: (((256, 4), (512, 4), (1024, 4)), tuple(product((1024, 2048, 4096), (4, 8))), (4096,)),
    1 << 14: (((256, 2), (256, 4), (512, 4)), tuple(product((1024, 2048, 4096), (4, 8))), (4096,)),
    1 << 10: (((128, 1), (256, 2), (256, 4), (512, 4)), ((1024, 2), (1024, 4), (1024, 8)), (1,)),
}
DTYPES = {"float32": 4, "float16": 2}
OTHER_BETA = 1 / 9  # of a detector; its division is no product


def pair(elements: int, dtype: str) -> Any:
    """Input and target, on the GPU."""
    return torch.randn((2, elements // 16, 16), device="cuda").mul_(2).to(getattr(torch, dtype))


def timed(spec: LossSpec, x: Any, t: Any, before: Any) -> float:
    """Microseconds of the GPU."""
    runner: Any = TorchTritonBackend().load(export(spec, shape=("N", 16)))
    return time_calls(torch, lambda: runner.run(x, t), before=before).median * 1e6


def sizes(before: Any, limit: float) -> None:
    """The table of sizes; `limit`: bytes a second of a copy."""
    for (elements, tried), (dtype, item) in product(TRIED.items(), DTYPES.items()):
        x, t = pair(elements, dtype)
        least = elements * item / limit * 1e6  # microseconds an array
        blocks, tiles, programs = tried
        for fused._BLOCK in blocks:
            found = timed(LossSpec(1.0, "none", dtype), x, t, before)
            print(f"{elements} {dtype} none {fused._BLOCK}: {found:.1f} us {3 * least / found:.0%}")
        for fused._TILE, fused._PROGRAMS in product(tiles, programs):
            if elements > fused._TILE[0] * fused._PROGRAMS * 16:
                continue
            found = timed(LossSpec(1.0, "mean", dtype), x, t, before)
            print(f"{elements} {dtype} mean {fused._TILE} {fused._PROGRAMS}: {found:.1f} us "
                  f"{2 * least / found:.0%}", flush=True)  # fmt: skip


def divided(before: Any) -> None:
    """A beta that is a power of two, and one that isn't; the sizes as they are."""
    for (dtype, _), reduction in product(DTYPES.items(), ("none", "mean")):
        x, t = pair(1 << 26, dtype)
        found = [
            timed(LossSpec(beta, reduction, dtype), x, t, before) for beta in (1.0, OTHER_BETA)
        ]
        print(f"{reduction} {dtype} beta 1: {found[0]:.1f} us, 1/9: {found[1]:.1f} us", flush=True)


def host(what: str, call: Any, calls: int = 2000) -> None:
    """Microseconds until a call is launched."""
    for _ in range(100):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    print(f"host: {what} {(time.perf_counter() - start) / calls * 1e6:.2f} us", flush=True)
    torch.cuda.synchronize()


def small() -> None:
    """Where the time of a call of 64x16 goes."""
    x, t = pair(1024, "float32")
    for reduction in ("mean", "none"):
        runner: Any = load(export(LossSpec(1.0, reduction), shape=("N", 16)), "torch-triton")
        eager = partial(torch.nn.functional.smooth_l1_loss, x, t, reduction=reduction)
        host(f"{reduction} eager", eager)
        host(f"{reduction} run", partial(runner.run, x, t))
        recorded = runner.capture(x, t)
        host(f"{reduction} replay", recorded.replay)
        launch, loss = runner._remembered(x.shape)[0], torch.empty_like(x)
        host(f"{reduction} the launch alone", partial(launch, x, t, runner._beta, loss, None))
    host("torch.empty", lambda: torch.empty((), dtype=torch.float32, device="cuda"))
    host("as_it_is", lambda: runner.device.as_it_is(x))


if __name__ == "__main__":
    bandwidth = copy_bandwidth(torch)
    print(f"{torch.cuda.get_device_name()}: a copy moves {bandwidth / 1e9:,.0f} GB/s; now "
          f"{fused._BLOCK} {fused._TILE} {fused._PROGRAMS}")  # fmt: skip
    small()
    divided(sweep(torch))
    sizes(sweep(torch), bandwidth)
