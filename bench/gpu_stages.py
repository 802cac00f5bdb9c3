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

import onnx
import torch
from onnx import helper

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy.backends._ort_gpu import OrtCudaBackend, inlined
from smoothl1_deploy.bench._timing import sweep, time_calls
from smoothl1_deploy.graph._metadata import read_spec, stamp

SIZES = (26, 24, 22, 20, 18, 16, 14, 10)  # log2 of the elements
ROUNDS = 3  # in turn, so that a slow moment meets both


def in_two_stages(model: Any) -> Any:
    """A full reduction along the last axis first, and then of what that leaves."""
    spec = read_spec(model)
    found: onnx.ModelProto = inlined(model)
    nodes = list(found.graph.node)
    made = {name: node for node in nodes for name in node.output}
    total = next(node for node in nodes if node.op_type == "ReduceSum")
    flat = made[total.input[0]]
    if flat.op_type != "Reshape" or spec is None:
        raise ValueError(f"{found.graph.name} doesn't flatten what it adds up")
    axis = helper.make_node("Constant", [], ["last_axis"], "last_axis", value_ints=[-1])
    rows = helper.make_node("ReduceSum", [flat.input[0], "last_axis"], ["rows"], "rows", keepdims=0)
    flat.input[0] = "rows"
    nodes[nodes.index(flat) : nodes.index(flat)] = [axis, rows]
    del found.graph.node[:]
    found.graph.node.extend(nodes)
    stamp(found, spec, "inlined", "two_stages")
    return found


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
