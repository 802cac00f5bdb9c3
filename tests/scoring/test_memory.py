"""Files larger than what may be held: the memory of a run in a process of its own is measured."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path

import child
import numpy as np
import pytest

ELEMENTS = 1 << 24
FILE = 4 * ELEMENTS  # bytes of each of two arrays, which no compression makes much smaller
#: Growth of the resident set. Reading an array whole is FILE at least; Parquet's was 25 to 33 MiB
#: where nothing grew, by what pyarrow's allocator keeps.
ALLOWED = FILE * 3 // 4

#: The growth is counted from a first, small run on, which loads the libraries.
_MEASURED = """
import json, sys, threading, time
from pathlib import Path
import psutil
from smoothl1_deploy import LossSpec
from smoothl1_deploy.scoring._score import score_files
from smoothl1_deploy.scoring._scorer import make_job
from smoothl1_deploy.scoring._shards import locate

def run(folder, **options):
    found = {p.stem: p for p in Path(folder).iterdir()}
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


def save(folder: str, suffix: str, shape: tuple[int, ...]) -> float:
    """Random multiples of 2^-12 below 1, and the mean of their losses, which float32 can hold."""
    Path(folder).mkdir()
    pair = np.random.default_rng(0).integers(0, 1 << 12, (2, *shape), np.int32)
    for name, numbers in zip(("input", "target"), pair, strict=True):
        write(f"{folder}/{name}{suffix}", numbers.astype(np.float32) / 4096)
    losses = np.square(pair[0] - pair[1], dtype=np.int64)
    if len(shape) == 2 and shape[0] > 1:  # a score a row, which is rounded
        return math.fsum((losses.mean(1) / 2**25).astype(np.float32)) / shape[0]
    return int(losses.sum()) / 2**25 / losses.size


def write(path: str, array: np.ndarray) -> None:
    if path.endswith(".npy"):
        np.save(path, array)
    elif path.endswith(".npz"):
        with (
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as member,
        ):
            np.lib.format.write_array(member, array)
    else:
        arrow, parquet = (pytest.importorskip(f"pyarrow{name}") for name in ("", ".parquet"))
        column = arrow.array(array.ravel())
        if array.ndim == 2:
            column = arrow.FixedSizeListArray.from_arrays(column, array.shape[1])
        # As one row group: pyarrow reads whole ones, unless it is told not to.
        table = arrow.table({"input": column})
        parquet.write_table(table, path, use_dictionary=False, row_group_size=len(array))


@pytest.mark.parametrize(
    ("suffix", "shape", "output"),
    [
        (".npy", (ELEMENTS // 16, 16), "scores.npy"),
        (".npy", (1, ELEMENTS), None),
        (".npz", (ELEMENTS,), None),
        (".parquet", (ELEMENTS // 16, 16), "scores.parquet"),
    ],
    ids=["npy with scores", "npy of one row", "npz", "parquet with scores"],
)
def test_memory_does_not_grow_with_the_files(
    suffix: str, shape: tuple[int, ...], output: str | None
) -> None:
    pytest.importorskip("psutil")
    save("small", suffix, (1 << 18,) if len(shape) == 1 else (1 << 14, 16))
    expected = save("big", suffix, shape)
    done = child.run("-c", _MEASURED, "big", *([output] if output else []))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert (found["loss"], found["count"]) == (expected, ELEMENTS)
    assert found["growth"] < ALLOWED, f"{found['growth'] >> 20} MiB"
