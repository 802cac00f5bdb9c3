"""What a GPU has to show of TensorRT 8.5.3.1: kernels that run, their numbers, their speed.

    TENSORRT85=/where/pack.py/says python -m bench.tensorrt85.card FOLDER     # about six minutes

The first line says GO or NO GO, with TensorRT's own words. Each step's findings are in
FOLDER/tensorrt85.json before the next begins, and those of the matrix in FOLDER/report.json and
report.md, so that a machine that is taken away takes nothing with it.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from bench.gpu_stages import in_two_stages
from bench.tensorrt85.engine import EngineRunner, Tensorrt85, Worker, unpacked
from smoothl1_deploy import LossSpec, export
from smoothl1_deploy._files import make_folder, write_atomic
from smoothl1_deploy._floats import ulp_distance
from smoothl1_deploy.errors import SmoothL1DeployError
from smoothl1_deploy.parity._matrix import Matrix, run_matrix
from smoothl1_deploy.parity.views import _markdown as markdown
from smoothl1_deploy.reference import oracle

BACKEND = "bench.tensorrt85.engine:Tensorrt85"
ROW = 16
SECONDS = 300.0  # of the matrix


def pair(log2: int, dtype: str) -> list[Any]:
    """Input and target of 2^log2 elements."""
    shape = (2, (1 << log2) // ROW, ROW)
    return list(np.random.default_rng(0).normal(0, 2, shape).astype(dtype))


def loaded(spec: LossSpec, change: Callable[[Any], Any] = lambda model: model) -> EngineRunner:
    """The engine of a spec."""
    return Tensorrt85().load(change(export(spec, "inlined", ("N", ROW))))


def one_engine() -> dict[str, Any]:
    """Whether there are kernels for this GPU at all."""
    spec, (x, t) = LossSpec(0.5), pair(10, "float32")
    runner = loaded(spec)
    got, right = runner.run(x, t)["loss"], oracle(spec, x, t)
    return {
        "loss": float(got),
        "oracle": float(right),
        "bytes": len(runner.data),
        "said": runner.said,
    }


def nan_through_clip() -> dict[str, Any]:
    """What NVIDIA/TensorRT#4758 tells of: Clip gives a bound for NaN."""
    port = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in ("x", "y")]
    bounds = [helper.make_tensor(n, TensorProto.FLOAT, [], [v]) for n, v in (("a", -1), ("b", 1))]
    node = helper.make_node("Clip", ["x", "a", "b"], ["y"])
    graph = helper.make_graph([node], "clip", port[:1], port[1:], bounds)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    asked, x = Tensorrt85().worker, np.array([np.nan, -2, 0.5, np.inf], np.float32)
    built, _ = asked.ask("build", model.SerializeToString(), profile={})
    _, (data,) = asked.ask("run", x.tobytes(), engine=built["engine"], inputs=[("x", x.shape)])
    return {"clip of nan, -2, 0.5, inf to -1..1": [str(v) for v in np.frombuffer(data, np.float32)]}


def nothing() -> dict[str, Any]:
    """The mean and the sum of no elements: NaN and 0 by PyTorch."""
    none = np.zeros((0, ROW), np.float32)
    runners = {name: loaded(LossSpec(reduction=name)) for name in ("mean", "sum")}
    return {name: str(runner.run(none, none)["loss"]) for name, runner in runners.items()}


def stages(log2: int) -> dict[str, Any]:
    """A full reduction in one stage and along the rows first: milliseconds, ULP from the truth."""
    spec, (x, t) = LossSpec(), pair(log2, "float32")
    right, found = oracle(spec, x, t), {}
    for name, change in (("one", lambda model: model), ("two", in_two_stages)):
        outputs, taken = loaded(spec, change).measure({"input": x, "target": t}, 20)
        found[name] = {"ms": taken, "ulp": float(ulp_distance(outputs["loss"], right).max())}
    return found


def speed(log2: int) -> dict[str, Any]:
    """Milliseconds, shares of a copy's bandwidth, and `torch-triton` where torch has a GPU."""
    import torch

    from smoothl1_deploy import load
    from smoothl1_deploy.bench._timing import time_calls

    found: dict[str, Any] = {}
    for dtype, reduction in product(("float32", "float16"), ("none", "mean", "sum")):
        spec, (x, t) = LossSpec(1.0, reduction, dtype), pair(log2, dtype)
        copied, _ = Tensorrt85().worker.ask("copy", size=x.nbytes, repeats=20)
        _, taken = loaded(spec).measure({"input": x, "target": t}, 20)
        moved = 3 if reduction == "none" else 2  # arrays; a copy moves two
        share = copied["milliseconds"] * moved / 2 / taken
        found[f"{dtype} {reduction}"] = {"ms": taken, "share of a copy's bandwidth": share}
        if torch.cuda.is_available():
            fused: Any = load(export(spec, shape=("N", ROW)), "torch-triton")
            on_card = [torch.from_numpy(array).cuda() for array in (x, t)]
            ours = time_calls(torch, lambda run=fused.run, pair=on_card: run(*pair)).median * 1e3
            found[f"{dtype} {reduction}"]["torch-triton ms"] = ours
    return found


def damaged() -> dict[str, Any]:
    """An engine with one byte changed, each in a process of its own, which it may end."""
    data, found = loaded(LossSpec()).data, {}
    for share in (0.0, 0.01, 0.25, 0.5, 0.99):
        broken = bytearray(data)
        broken[int(share * (len(data) - 1))] ^= 0xFF
        try:
            Worker(*unpacked()).ask("deserialize", bytes(broken))
            found[f"byte at {share:.0%}"] = "deserialised"
        except SmoothL1DeployError as exc:
            found[f"byte at {share:.0%}"] = str(exc)
    return found


def matrix(folder: Path) -> dict[str, Any]:
    """Every beta, reduction and extension that 8.5 can carry out, all families."""
    # The function route, whose bodies are put in place: it is the one that meets 2^20 elements.
    part = Matrix((BACKEND,), dtypes=("float32", "float16"), routes=("function",))
    report = run_matrix(part, seconds=SECONDS)
    print(*report.notes, sep="\n")
    write_atomic(folder / "report.json", json.dumps(report.to_dict()).encode())
    write_atomic(folder / "report.md", markdown.render(report).encode())
    return dict(report.summary)


def main(folder: Path, log2: int = 26) -> int:
    """Take the steps in turn; 1 where there is not even one engine."""
    make_folder(folder)
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "one engine": one_engine,
        "nan through clip": nan_through_clip,
        "nothing": nothing,
        "matrix": lambda: matrix(folder),
        "stages": lambda: stages(min(log2, 24)),
        "speed": lambda: speed(log2),
        "damaged engine": damaged,
    }
    found: dict[str, Any] = {}
    for name, step in steps.items():
        try:
            found[name] = step()
        except Exception as exc:  # the next step may show something
            found[name] = {"problem": f"{type(exc).__name__}: {exc}"}
            if not isinstance(exc, SmoothL1DeployError):
                traceback.print_exc()
        write_atomic(folder / "tensorrt85.json", json.dumps(found, indent=1).encode())
        if name == "one engine":
            print("NO GO:" if "problem" in found[name] else "GO:", end=" ")
        print(name, json.dumps(found[name]), flush=True)
        if "problem" in found["one engine"]:
            return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
