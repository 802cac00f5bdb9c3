"""Files larger than what may be held: the memory of a run in a process of its own is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest_cli import _ROOT

ELEMENTS = 1 << 26
FILE = 4 * ELEMENTS  # bytes of each of two files
ALLOWED = FILE // 4  # growth of the resident set

#: The growth is counted from a first, small run on, which loads the libraries.
_MEASURED = """
import json, sys, threading, time
from pathlib import Path
import psutil
from smoothl1_deploy import LossSpec
from smoothl1_deploy.scoring.score import score_files
from smoothl1_deploy.scoring.scorer import make_job
from smoothl1_deploy.scoring.shards import locate

def run(folder, **options):
    found = {p.stem: p for p in Path(folder).iterdir() if p.suffix in (".npy", ".npz")}
    paths = {role: found[role] for role in ("input", "target")}
    job = make_job(LossSpec(per_sample="output" in options), threads=2)
    return score_files(job, locate(paths, {}), **options)

options = {"output": Path(sys.argv[2])} if len(sys.argv) > 2 else {}
run("small", **options)
process = psutil.Process()
before = process.memory_info().rss
peak, over = before, threading.Event()

def watch():
    global peak
    while not over.wait(0.002):
        peak = max(peak, process.memory_info().rss)

threading.Thread(target=watch).start()
result = run(sys.argv[1], **options)
over.set()
print(json.dumps({"growth": peak - before, "loss": result.loss, "count": result.count}))
"""


def save(folder: str, suffix: str, elements: int, shape: tuple[int, ...]) -> None:
    Path(folder).mkdir()
    block = np.resize(np.float32([0.0, 0.5, 3.0, -2.0]), 1 << 20)
    for name, factor in (("input", 1), ("target", 0)):
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        data = (block[: min(elements, block.size)] * np.float32(factor)).tobytes()
        times = -(-elements // block.size)
        if suffix == ".npy":
            with open(f"{folder}/{name}.npy", "wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for _ in range(times):
                    file.write(data)
        else:
            with (
                zipfile.ZipFile(
                    f"{folder}/{name}.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1
                ) as archive,
                archive.open("arr_0.npy", "w", force_zip64=True) as member,
            ):
                np.lib.format.write_array_header_1_0(member, header)
                for _ in range(times):
                    member.write(data)


@pytest.mark.parametrize(
    ("suffix", "shape", "output"),
    [
        (".npy", (ELEMENTS,), None),
        (".npy", (ELEMENTS // 16, 16), "scores.npy"),
        (".npy", (1, ELEMENTS), None),
        (".npz", (ELEMENTS,), None),
    ],
    ids=["npy", "scores", "one row", "npz"],
)
def test_memory_is_bounded(suffix: str, shape: tuple[int, ...], output: str | None) -> None:
    pytest.importorskip("psutil")
    save("small", suffix, 1 << 18, (1 << 18,) if len(shape) == 1 else (1 << 14, 16))
    save("big", suffix, ELEMENTS, shape)
    command = [sys.executable, "-c", _MEASURED, "big", *([output] if output else [])]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["count"] == ELEMENTS
    assert found["loss"] == (0.0 + 0.125 + 2.5 + 1.5) / 4
    assert found["growth"] < ALLOWED, f"{found['growth'] >> 20} MiB"
