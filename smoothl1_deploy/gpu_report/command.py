"""`scripts/gpu_report`: measure, write the JSON and the Markdown, say what was dropped."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..device import Device, find_device
from ..environment import environment, silence
from ..errors import OutputError, SmoothL1DeployError
from ..files import write_atomic
from ..tensorrt.gpu import current_gpu
from .contestants import BACKENDS, TORCH, usable_backends
from .parity import Parity, run_parity
from .passes import count_forms, passes_table
from .plan import Budget, plan_small, plan_speed
from .report import GpuReport, file_stem, markdown
from .speed import Bench, run_small, run_speed
from .timing import copy_bandwidth

__all__ = ["main", "measure", "report_into"]

_LIMIT = 480.0  # seconds: what an issue of this project allows the command
_RESERVE = 40.0  # seconds of them for starting, ending, and what runs over
_SPEED_SHARE = 0.45  # of the rest; parity has what remains


def measure(
    device: Device, seconds: float, *, parity: bool = True, speed: bool = True
) -> GpuReport:
    """Everything the report holds of a device, within `seconds`."""
    import torch

    budget = Budget(seconds)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    gpu = _gpu(torch, device.index)
    say = _progress(budget)
    say(f"{gpu['name']}: which backends run here")
    backends, absent = usable_backends()
    contestants = (*TORCH, *backends)
    bandwidth, rows, small = None, [], []
    if speed:
        say("speed")
        bandwidth = copy_bandwidth(torch)
        bench = Bench.on(torch, device)
        keep = _RESERVE + ((1 - _SPEED_SHARE) * budget.left if parity else 0.0)
        small = run_small(plan_small(contestants), bench, budget, keep)
        rows = run_speed(plan_speed(contestants, backends), bench, budget, keep)
    say("passes over memory")
    passes = count_forms()
    found = Parity({}, problem="left out by --no-parity")
    if parity:
        say("parity")
        left = budget.left - _RESERVE
        found = run_parity(backends, left) if left > 0 else Parity({}, problem="no time was left")
    return GpuReport(
        gpu, started, {**environment(), "torch_cuda": torch.version.cuda}, bandwidth,
        tuple(rows), tuple(small), found, absent, tuple(budget.dropped), budget.spent,
        passes,
    )  # fmt: skip


def _gpu(torch: Any, index: int) -> dict[str, Any]:
    """The card as torch sees it; the driver's version as nvidia-smi does."""
    found = current_gpu()
    card = Device(torch, index)
    return {
        "name": card.name,
        "compute_capability": card.capability,
        "driver": found.driver if found else "unknown",
        "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
    }


def _progress(budget: Budget) -> Any:
    return lambda text: print(f"{budget.spent:4.0f} s  {text}", flush=True)


def _plan_text() -> str:
    """What a run would measure with every backend there, in its order."""
    contestants = (*TORCH, *BACKENDS)
    groups, small = plan_speed(contestants, BACKENDS), plan_small(contestants)
    lines = [f"{len(small)} small calls, {sum(len(g.cells) for g in groups)} cells of speed:"]
    lines += [
        f"  {g.dtype} {g.reduction} {g.contestant}: "
        f"{', '.join(f'2^{c.log2}' for c in g.cells)} (about {g.seconds:.0f} s)"
        for g in groups
    ]
    return "\n".join([*lines, "then the parity matrix, float32 first, for the time that is left"])


def report_into(
    folder: Path, seconds: float = _LIMIT, *, parity: bool = True, speed: bool = True
) -> tuple[GpuReport, list[Path]]:
    """Measure this machine's GPU, and write the JSON and the Markdown into `folder`.

    Raises:
        MissingDependencyError: without torch.
        BackendUnavailableError: without a GPU.
        OutputError: when a file can't be written.
    """
    device = find_device("the GPU report")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise OutputError(f"can't make the folder {folder}: {exc.strerror}") from exc
    report = measure(device, seconds, parity=parity, speed=speed)
    stem = folder / file_stem(report.gpu["name"], report.date)
    paths = [
        write_atomic(stem.with_name(stem.name + ".json"), report.to_json().encode()),
        write_atomic(stem.with_name(stem.name + ".md"), markdown(report).encode()),
    ]
    return report, paths


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 done, 1 a cell of a backend is red, 2 can't write, 3 no GPU or package.

    After Ctrl-C it is 130.
    """
    parser = argparse.ArgumentParser(
        prog="gpu_report", description="Parity and speed on this machine's CUDA GPU, in 8 minutes."
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("results"), help="folder")
    parser.add_argument("--seconds", type=float, default=_LIMIT, help="time budget (480)")
    parser.add_argument("--no-parity", action="store_true", help="the speed alone")
    parser.add_argument("--no-speed", action="store_true", help="the parity alone")
    parser.add_argument("--plan", action="store_true", help="show what would be measured, and end")
    parser.add_argument(
        "--passes", action="store_true", help="count each graph's passes over memory, and end"
    )
    options = parser.parse_args(arguments)
    silence()
    if options.passes:
        counted = count_forms()
        print("\n".join(passes_table(counted.rows)) if counted.rows else counted.problem)
        return 3 if counted.problem else 0
    if options.plan:
        print(_plan_text())
        return 0
    try:
        report, paths = report_into(
            options.output,
            options.seconds,
            parity=not options.no_parity,
            speed=not options.no_speed,
        )
    except SmoothL1DeployError as exc:
        print(f"error: {exc}")
        return exc.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was written")
        return 130
    for text in report.dropped:
        print(f"no time for: {text}")
    print(f"wrote {', '.join(map(str, paths))}")
    return 1 if report.parity.red else 0
