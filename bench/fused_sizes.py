"""Sizes of the fused kernels of `torch-triton`, side by side on this machine's GPU.

    python bench/fused_sizes.py        # about a minute; PYTHONPATH=. where nothing is installed

Microseconds of the GPU at 2^26 elements (caches swept before each call), and what the present sizes
take; then where the host's time of a small call goes. The figures in bench/NOTES.md are its output.
"""

from __future__ import annotations

import time
from functools import partial
from itertools import product
from typing import Any

import torch

from smoothl1_deploy import LossSpec, export, load
from smoothl1_deploy.backends import fused
from smoothl1_deploy.backends.torch_triton import TorchTritonBackend
from smoothl1_deploy.gpu_report.timing import copy_bandwidth, sweep, time_calls

LARGE = 1 << 26
DTYPES = {"float32": 4, "float16": 2}
BLOCKS = tuple(product((1024, 2048, 4096, 8192), (4, 8)))  # elements, warps
TILES = tuple(product((2048, 4096, 8192), (4, 8)))
PROGRAMS = (1024, 2048, 4096, 8192)


def pair(elements: int, dtype: str) -> Any:
    """Input and target, on the GPU."""
    return torch.randn((2, elements // 16, 16), device="cuda").mul_(2).to(getattr(torch, dtype))


def timed(spec: LossSpec, x: Any, t: Any, before: Any) -> float:
    """Microseconds of the GPU."""
    runner: Any = TorchTritonBackend().load(export(spec, shape=("N", 16)))
    return time_calls(torch, lambda: runner.run(x, t), before=before).median * 1e6


def sizes(before: Any, limit: float) -> None:
    """The table of sizes; `limit`: bytes a second of a copy."""
    for dtype, item in DTYPES.items():
        x, t = pair(LARGE, dtype)
        least = {"none": 3 * LARGE * item / limit * 1e6, "mean": 2 * LARGE * item / limit * 1e6}
        for block, warps in BLOCKS:
            fused._BLOCK, fused._BLOCK_WARPS = block, warps
            found = timed(LossSpec(1.0, "none", dtype), x, t, before)
            print(f"none {dtype} block {block} warps {warps}: {found:.1f} us, "
                  f"{least['none'] / found:.0%}", flush=True)  # fmt: skip
        for (tile, warps), programs in product(TILES, PROGRAMS):
            fused._TILE, fused._TILE_WARPS, fused._PROGRAMS = tile, warps, programs
            found = timed(LossSpec(1.0, "mean", dtype), x, t, before)
            print(f"mean {dtype} tile {tile} warps {warps} programs {programs}: {found:.1f} us, "
                  f"{least['mean'] / found:.0%}", flush=True)  # fmt: skip


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
        launch, loss = runner._launches[x.shape], torch.empty_like(x)
        host(f"{reduction} the launch alone", partial(launch, x, t, runner._beta, loss, None))
    host("torch.empty", lambda: torch.empty((), dtype=torch.float32, device="cuda"))
    host("as_it_is", lambda: runner.device.as_it_is(x))


if __name__ == "__main__":
    chosen = {name: getattr(fused, name) for name in
              ("_BLOCK", "_BLOCK_WARPS", "_TILE", "_TILE_WARPS", "_PROGRAMS")}  # fmt: skip
    bandwidth = copy_bandwidth(torch)
    print(f"{torch.cuda.get_device_name()}: a copy moves {bandwidth / 1e9:,.0f} GB/s; now {chosen}")
    small()
    sizes(sweep(torch), bandwidth)
