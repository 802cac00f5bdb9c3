"""`smoothl1-deploy bench`: how fast, beside what people would run instead."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingDependencyError, SpecError
from ._console import print_lines, print_note, print_tables, typed
from ._options import Count, Dtypes, Next, Reductions

if TYPE_CHECKING:
    from ..bench._rows import Row

EXAMPLE = "smoothl1-deploy bench --size 1024 --size 1048576 -o out/bench"

_SIZES = (1 << 10, 1 << 13, 1 << 16, 1 << 20, 1 << 24)
_ROWS = ("1x16", "64x16", "4096x256", "65536x256")
_COLUMNS = 16


def bench(
    *,
    output: Path = Path("out/bench"),
    size: list[int] | None = None,
    per_sample: list[str] | None = None,
    reduction: Reductions = None,
    dtype: Dtypes = None,
    beta: float = 1.0,
    constant: bool = False,
    threads: Count = 0,
    memory: bool = False,
    once: bool = True,
    quick: bool = False,
    gpu: bool = False,
) -> Next:
    """Time this tool's artefacts beside the plain export, PyTorch and OpenVINO, in one process.

    Medians of interleaved turns, as ratios; rows with their provenance are appended to bench.jsonl.

    Options:
        output: Folder for bench.jsonl and bench.png.
        size: Elements, a multiple of 16. Repeat for more.
        per_sample: Rows x columns of a loss per sample, such as 64x16. Repeat for more.
        reduction: Repeat for more.
        dtype: Repeat for more.
        beta: The beta of every loss.
        constant: Constant data, on which sums drift most.
        threads: For each contestant; 0: every core, 8 at most.
        memory: Peak memory too, each in a process of its own.
        once: Also what is paid once: export, session, ...
        quick: Two small sizes and few turns: does it run?
        gpu: The CUDA GPU instead: the speed part of scripts/gpu_report.
    """
    if gpu:
        given: dict[str, object] = {
            "--size": size, "--per-sample": per_sample, "--reduction": reduction, "--dtype": dtype,
            "--beta": beta != 1, "--constant": constant, "--threads": threads, "--memory": memory,
            "--no-once": not once, "--quick": quick,
        }  # fmt: skip
        return _bench_gpu(output, given)
    # Threads that others leave spinning would be on the next one's cores: read when they load.
    os.environ |= {"OMP_WAIT_POLICY": "passive", "OPENBLAS_THREAD_TIMEOUT": "4"}
    from .._environment import environment, now
    from .._files import check_writable, write_atomic
    from .._spec import LossSpec
    from ..bench import _cpu as cpu
    from ..bench._rows import COMPILED, append_rows, once_table, plot_png, row_tables

    sizes = size or ((1 << 10, 1 << 14) if quick else _SIZES)
    shapes = per_sample if per_sample is not None else (() if quick or size else _ROWS)
    reductions = reduction or (["mean"] if quick else ["mean", "none"])
    jobs = [
        (LossSpec(beta, name, kind), _matrix_shape(elements))
        for kind in dtype or ["float32"]
        for name in reductions
        for elements in sizes
    ] + [
        (LossSpec(beta, "mean", kind, per_sample=True), _shape(text))
        for kind in dtype or ["float32"]
        for text in shapes
    ]
    check_writable(output / "bench.jsonl")
    origin: dict[str, Any] = {"date": now(), "environment": environment()}
    load = os.getloadavg()[0]
    rows: list[Row] = []
    said: set[str] = set()
    for spec, shape in jobs:
        measured, missing = cpu.measure(
            spec,
            shape,
            threads=threads,
            constant=constant,
            memory=memory,
            rounds=3 if quick else 15,
            turn=0.002 if quick else 0.02,
            # These two compile, which takes the longest by far.
            without=(COMPILED, cpu.AHEAD) if quick else (),
        )
        for name, reason in missing.items():
            if name not in said:
                print_note(f"{name} is left out: {reason}")
                said.add(name)
        print_tables(row_tables(measured))
        append_rows(output / "bench.jsonl", [{**row.to_dict(), **origin} for row in measured])
        rows += measured
    if once and not quick:
        print_tables([once_table(cpu.once())])
    plot = None
    try:
        plot = write_atomic(output / "bench.png", plot_png(rows, **origin))
    except MissingDependencyError as exc:
        print_note(f"no plot: {exc}")
    if load > 1:
        print_note(f"the load was {load:.1f} at the start: others took part in what was measured")
    print_lines([f"wrote {output / 'bench.jsonl'}"])
    return None if plot is None else [shlex.join(["xdg-open", str(plot)])]


def _bench_gpu(output: Path, given: dict[str, object]) -> Next:
    """PyTorch eager and compiled, and every GPU backend there is, by CUDA events."""
    for option, value in given.items():
        if value:
            raise SpecError(f"--gpu measures a plan of its own, with beta 1; leave {option} out")
    from ..bench._gpu_report import card, report_into, tables

    report, paths = report_into(output, parity=False)
    print_lines([f"{report.gpu['name']}, {report.date[:10]}", card(report), ""])
    print_tables(tables(report))
    print_lines([f"{name} not available: {why}" for name, why in report.absent.items()])
    print_lines([f"no time for {what}" for what in report.dropped])
    print_lines([f"wrote {', '.join(map(str, paths))}"])
    return [typed("parity", "--backend", "ort-cuda", "--backend", "torch-triton")]


def _matrix_shape(size: int) -> tuple[int, int]:
    if size <= 0 or size % _COLUMNS:
        raise SpecError(f"--size is the number of elements, a multiple of {_COLUMNS}, got {size}")
    return size // _COLUMNS, _COLUMNS


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise SpecError(f"--per-sample is rows x columns, such as 64x16, got {text!r}")
    return int(rows), int(columns)
