"""A sum in one stage or in two under ONNX Runtime's CUDA provider, side by side on this GPU.

    python bench/gpu_stages.py         # half a minute; PYTHONPATH=. where nothing is installed

Microseconds of the GPU (two sweeps of the caches before each call: a session takes the host longer
to launch than one) and, call after call, of the host. The figures in bench/NOTES.md are its output.
"""

from __future__ import annotations

import time
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy.backends.ort_gpu import OrtCudaBackend
from smoothl1_deploy.gpu_report.contestants import in_two_stages
from smoothl1_deploy.gpu_report.timing import sweep, time_calls

SIZES = (26, 24, 22, 20, 18, 16, 14, 10)  # log2 of the elements
ROUNDS = 3  # in turn, so that a slow moment meets both


def host(call: Any, calls: int = 200) -> float:
    """Microseconds a call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls * 1e6


def main() -> None:
    """The table."""
    once = sweep(torch)
    for dtype, reduction in product(("float32", "float16"), ("mean", "sum")):
        one = export(LossSpec(1.0, reduction, dtype), shape=("N", 16))
        models = {"one": one, "two": in_two_stages(one)}
        runners: Any = {name: OrtCudaBackend().load(model) for name, model in models.items()}
        for log2 in SIZES:
            x, t = torch.randn((2, (1 << log2) // 16, 16), device="cuda").to(getattr(torch, dtype))
            found: dict[str, list[tuple[float, float]]] = {"one": [], "two": []}
            for _, name in product(range(ROUNDS), found):
                call = partial(runners[name].run, x, t)
                gpu = time_calls(torch, call, before=lambda: (once(), once())).median * 1e6
                found[name].append((gpu, host(call) if log2 <= 20 else 0.0))
            gpu, cpu = (
                {name: median(pair[i] for pair in pairs) for name, pairs in found.items()}
                for i in (0, 1)
            )
            print(
                f"{reduction} {dtype} 2^{log2}: one {gpu['one']:.1f}, two {gpu['two']:.1f} us of "
                f"the GPU; one over two {gpu['one'] / gpu['two']:.2f}; call after call "
                f"{cpu['one']:.0f}, {cpu['two']:.0f} us",
                flush=True,
            )


if __name__ == "__main__":
    main()
