"""What only a GPU can show, in one go: TensorRT's kernels, our operators for CUDA, the report.

    bash .card/run FOLDER [SECONDS]      # after the calls that bench/pack.py prints; 520 seconds

The first line says GO or NO GO of TensorRT 8.5.3.1, with its own words; without it the steps of
the operators are taken all the same. What a step found is in FOLDER/card.json before the next one
begins, so that a machine that is taken away takes nothing with it. The matrices stand beside it as
tensorrt85.json and .md and as operators.json and .md, and what `scripts/gpu_report` writes. It ends
with 1 where a step had a problem, a cell is red, or a target is missed.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bench.gpu_stages import host, in_two_stages
from bench.tensorrt85.engine import EngineRunner, Tensorrt85, Worker, unpacked
from smoothl1_deploy import LossSpec, attach, export, load, ops
from smoothl1_deploy._device import Device, find_device
from smoothl1_deploy._files import make_folder, write_atomic
from smoothl1_deploy._floats import ulp_distance
from smoothl1_deploy.backends._ort_gpu import OrtCudaBackend, inlined
from smoothl1_deploy.bench._gpu_report import report_into
from smoothl1_deploy.bench._rows import EAGER
from smoothl1_deploy.bench._timing import time_calls
from smoothl1_deploy.errors import SmoothL1DeployError
from smoothl1_deploy.graph._functions import DOMAIN
from smoothl1_deploy.parity._matrix import Matrix, run_matrix
from smoothl1_deploy.parity._report import Report
from smoothl1_deploy.parity.views import _markdown as markdown
from smoothl1_deploy.reference import oracle

ENGINES = "bench.tensorrt85.engine:Tensorrt85"
ROOT = Path(__file__).parents[1]
ROW = 16
WORKERS = 16  # processes of a matrix of engines: most of a build is the host's
TURNS = 5
LEAST = 100  # cells of engines, for a matrix whose time may run out
Found = dict[str, Any]


def pair(log2: int, dtype: str) -> list[Any]:
    """Input and target of 2^log2 elements."""
    shape = (2, (1 << log2) // ROW, ROW)
    return list(np.random.default_rng(0).normal(0, 2, shape).astype(dtype))


def kept(report: Report, folder: Path, name: str) -> Found:
    """What a matrix found, written whole beside it."""
    print(*report.notes, sep="\n")
    write_atomic(folder / f"{name}.json", json.dumps(report.to_dict()).encode())
    write_atomic(folder / f"{name}.md", markdown.render(report).encode())
    whole = not any(note.startswith("left out") for note in report.notes)
    return {**report.summary, "whole": whole, "ok": bool(report) and report.summary["cells"] > 0}


# TensorRT


def loaded(spec: LossSpec, change: Callable[[Any], Any] = lambda model: model) -> EngineRunner:
    """The engine of a spec."""
    return Tensorrt85().load(change(export(spec, "inlined", ("N", ROW))))


def one_engine() -> Found:
    """Whether there are kernels for this GPU at all."""
    spec, (x, t) = LossSpec(0.5), pair(10, "float32")
    runner = loaded(spec)
    got, right = runner.run(x, t)["loss"], oracle(spec, x, t)
    return {
        "loss": float(got),
        "oracle": float(right),
        "bytes": len(runner.data),
        "said": runner.said,
        "ok": bool(ulp_distance(got, right).max() <= 2),
    }


def nan_through_clip() -> Found:
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


def nothing() -> Found:
    """The mean and the sum of no elements: NaN and 0 by PyTorch."""
    none = np.zeros((0, ROW), np.float32)
    runners = {name: loaded(LossSpec(reduction=name)) for name in ("mean", "sum")}
    found = {name: str(runner.run(none, none)["loss"]) for name, runner in runners.items()}
    return {**found, "ok": found == {"mean": "nan", "sum": "0.0"}}


def engines(folder: Path, seconds: float) -> Found:
    """Every beta, reduction and extension that 8.5 can carry out, the plain losses first."""
    # The function route, whose bodies are put in place: it is the one that meets 2^20 elements.
    plain = Matrix(
        (ENGINES,), dtypes=("float32", "float16"), routes=("function",), extensions=False
    )
    first = run_matrix(plain, workers=WORKERS, seconds=0.4 * seconds)
    more = replace(plain, plain=False, extensions=True)
    second = run_matrix(more, workers=WORKERS, seconds=0.6 * seconds)
    both = replace(
        first,
        cells=(*first.cells, *second.cells),
        notes=(*dict.fromkeys((*first.notes, *second.notes)),),
        seconds=first.seconds + second.seconds,
    )
    found = kept(both, folder, "tensorrt85")
    return {**found, "ok": found["ok"] and found["cells"] >= LEAST}


def stages(log2: int) -> Found:
    """A full reduction in one stage and along the rows first: milliseconds, ULP from the truth."""
    spec, (x, t) = LossSpec(), pair(log2, "float32")
    right, found = oracle(spec, x, t), {}
    for name, change in (("one", lambda model: model), ("two", in_two_stages)):
        outputs, taken = loaded(spec, change).measure({"input": x, "target": t}, 20)
        found[name] = {"ms": taken, "ulp": float(ulp_distance(outputs["loss"], right).max())}
    return found


def speed(log2: int) -> Found:
    """Milliseconds, shares of a copy's bandwidth, and `torch-triton`."""
    import torch

    found: Found = {}
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
            ours = time_calls(torch, partial(fused.run, *on_card)).median * 1e3
            found[f"{dtype} {reduction}"]["torch-triton ms"] = ours
    return found


def damaged() -> Found:
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


# The operators for CUDA


def operators(folder: Path, seconds: float) -> Found:
    """The whole matrix of the function route, and the random draws of it."""
    matrix = Matrix(("ort-cuda",), routes=("function",), draws=240)
    found = kept(run_matrix(matrix, workers=WORKERS // 2, seconds=seconds), folder, "operators")
    return {**found, "ok": found["ok"] and found["whole"]}


def bits(log2: int) -> Found:
    """How many different results 20 runs of two sessions give: 1 of each loss."""
    device, found = find_device("the card"), {}
    sizes = sorted({min(size, log2) for size in (10, 20, 24)})
    for dtype, reduction, size in product(("float32", "float16"), ("none", "mean", "sum"), sizes):
        spec = LossSpec(1.0, reduction, dtype)
        x, t = (device.upload(array) for array in pair(size, dtype))
        runners = [load(export(spec, shape=("N", ROW)), "ort-cuda") for _ in range(2)]
        losses = (device.download(runner.run(x, t)["loss"]) for runner in runners * 10)
        found[f"{dtype} {reduction} 2^{size}"] = len(
            {hashlib.sha256(loss.tobytes()).digest() for loss in losses}
        )
    return {**found, "ok": set(found.values()) == {1}}


def bare(model: onnx.ModelProto, **settings: str) -> Any:
    """A session as anyone opens it, with the operators registered."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    ops.register(options, "cuda")
    graph = inlined(model, ((DOMAIN, name) for name in ops.operators("cuda")))
    provider = (OrtCudaBackend.provider, {"use_tf32": "0", **settings})
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=[provider])


def bound(device: Device, session: Any, tensors: Mapping[str, Any]) -> Callable[[], object]:
    """A call of a session that reads and writes these tensors of float32, and waits for nothing."""
    import onnxruntime

    binding, options = session.io_binding(), onnxruntime.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    for ports, bind in (
        (session.get_inputs(), binding.bind_input),
        (session.get_outputs(), binding.bind_output),
    ):
        for name in (port.name for port in ports):
            shape, address = tuple(tensors[name].shape), tensors[name].data_ptr()
            bind(name, device.kind, device.index, TensorProto.FLOAT, shape, address)
    return partial(session.run_with_iobinding, binding, options)


def in_turn(calls: Mapping[str, Callable[[], object]], count: int) -> dict[str, float]:
    """Microseconds of each call, the best of some turns: what the host's other work leaves."""
    turns = [{name: host(call, count) for name, call in calls.items()} for _ in range(TURNS)]
    return {name: min(turn[name] for turn in turns) for name in calls}


def small_calls(count: int = 1000) -> Found:
    """64 x 16 of float32: microseconds a call, ours and a bare session's, one in a CUDA graph."""
    import torch

    device, found = find_device("the card"), {}
    for reduction in ("mean", "none"):
        spec, shape = LossSpec(1.0, reduction), (64, ROW)
        x, t = (device.upload(array) for array in pair(10, "float32"))
        model = export(spec, shape=shape)
        runner: Any = load(model, "ort-cuda")
        eager = partial(torch.nn.functional.smooth_l1_loss, x, t, reduction=reduction)
        calls: dict[str, Callable[[], object]] = {EAGER: eager, "run": partial(runner.run, x, t)}
        losses = {}
        for name, settings in (("bare", {}), ("graph", {"enable_cuda_graph": "1"})):
            losses[name] = device.empty(tuple(spec.loss_shape(shape)), "float32")
            tensors = {"input": x, "target": t, "loss": losses[name]}
            calls[name] = bound(device, bare(model, **settings), tensors)
        took = in_turn(calls, count)
        x += 1  # a graph reads what is there when it is replayed
        torch.cuda.synchronize()
        for name in losses:
            calls[name]()
        torch.cuda.synchronize()
        is_right = all(torch.allclose(loss, eager(), rtol=1e-6) for loss in losses.values())
        is_met = took["run"] <= 2 * took[EAGER] and took["graph"] <= 0.5 * took[EAGER]
        found[reduction] = {"us": took, "right": is_right, "ok": is_right and is_met}
    return {**found, "ok": all(each["ok"] for each in found.values())}


def attached(rows: int = 4096, width: int = 1024, count: int = 100) -> Found:
    """A model with a loss attached: its output's bits, and what the loss adds to its time."""
    random, device = np.random.default_rng(0), find_device("the card")
    weights = [
        numpy_helper.from_array(random.normal(0, 0.03, (width, width)).astype(np.float32), name)
        for name in ("first", "second")
    ]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [rows, width]) for n in "xy"]
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "second"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "model", ports[:1], ports[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    spec = LossSpec(0.5)
    x, t = (device.upload(random.normal(0, 1, (rows, width)).astype("f4")) for _ in range(2))
    plain, scored = (device.empty((rows, width), "float32") for _ in range(2))
    beside, alone = (device.empty((), "float32") for _ in range(2))
    calls = {
        "the model": bound(device, bare(model), {"x": x, "y": plain}),
        "with its loss": bound(
            device,
            bare(attach(model, "y", "target", spec)),
            {"x": x, "target": t, "y": scored, "loss": beside},
        ),
        "the loss": bound(
            device,
            bare(export(spec, shape=(rows, width))),
            {"input": plain, "target": t, "loss": alone},
        ),
    }
    took = in_turn(calls, count)
    made = [device.download(tensor).tobytes() for tensor in (plain, scored, beside, alone)]
    added = took["with its loss"] - took["the model"]
    is_same = made[0] == made[1] and made[2] == made[3]
    return {
        "us": took,
        "added": added,
        "bits": is_same,
        "ok": is_same and added <= took["the loss"],
    }


def tests() -> Found:
    """The tests for a GPU: threads, tensors that aren't copied, CUDA graphs; parity has a step."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*pytest, "-k", "not parity", "tests/gpu"], cwd=ROOT, capture_output=True, text=True
    )
    return {"said": done.stdout.splitlines()[-12:], "ok": done.returncode == 0}


# The report


def report(folder: Path, seconds: float) -> Found:
    """What `scripts/gpu_report` finds, with the peers in the same process."""
    measured, _ = report_into(folder, seconds)
    largest = max((row.elements for row in measured.rows), default=0)
    shares = {
        row.spec.name: row.bytes / row.timing.median / measured.copy_bandwidth_bytes_per_s
        for row in measured.rows
        if row.timing and row.contestant == "ort-cuda" and row.elements == largest
    }
    return {
        "share of a copy's bandwidth": shares,
        "parity": measured.parity.backends,
        "ok": measured.parity.ok and min(shares.values(), default=0) >= 0.85,
    }


def main(folder: Path, seconds: float = 520.0, log2: int = 26) -> int:
    """Take the steps in turn."""
    make_folder(folder)
    end = time.monotonic() + seconds
    of_tensorrt: dict[str, Callable[[], Found]] = {
        "one engine": one_engine,
        "nan through clip": nan_through_clip,
        "nothing": nothing,
        "engines": lambda: engines(folder, 0.22 * seconds),
        "stages": lambda: stages(min(log2, 24)),
        "speed": lambda: speed(log2),
        "damaged engine": damaged,
    }
    steps = of_tensorrt | {
        "small calls": small_calls,
        "bits": lambda: bits(log2),
        "attached": attached,
        "operators": lambda: operators(folder, 0.15 * seconds),
        "tests": tests,
        "report": lambda: report(folder, max(end - time.monotonic(), 0.3 * seconds)),
    }
    found: dict[str, Found] = {}
    for name, step in steps.items():
        if name in of_tensorrt and "problem" in found.get("one engine", {}):
            continue
        started = time.monotonic()
        try:
            found[name] = step()
        except Exception as exc:  # the next step may show something
            found[name] = {"problem": f"{type(exc).__name__}: {exc}", "ok": False}
            if not isinstance(exc, SmoothL1DeployError):
                traceback.print_exc()
        found[name]["seconds"] = round(time.monotonic() - started, 1)
        write_atomic(folder / "card.json", json.dumps(found, indent=1).encode())
        if name == "one engine":
            print("NO GO:" if "problem" in found[name] else "GO:", end=" ")
        print(name, json.dumps(found[name]), flush=True)
    return int(not all(each.get("ok", True) for each in found.values()))


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        raise SystemExit(__doc__)
    sys.exit(main(Path(sys.argv[1]), *map(float, sys.argv[2:])))
