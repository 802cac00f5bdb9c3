"""Targets on what `score` reads: files row by row, Parquet among them, and its journal."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from smoothl1_deploy import LossSpec
from smoothl1_deploy.scoring._score import score_files
from smoothl1_deploy.scoring._scorer import make_job
from smoothl1_deploy.scoring._shards import locate
from smoothl1_deploy.scoring._sources import SUFFIXES, Location, open_source

from .damage import BYTE_EDITS, damage_bytes
from .files import FILES
from .target import Target
from .values import JSON, NAMES, mostly, some


@functools.cache
def _tables() -> tuple[bytes, ...]:
    """Parquet files of numbers, lists, text and nulls; none where pyarrow is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        return (b"PAR1",)
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: list[Any] = [[1.0, 2.0, 3.0], [1, None, 3], ["a", "b", "c"], [True, False, True]]
    columns += [[[1.0, 2.0]] * 3, [[1.0], [], [2.0]], [[1.0], None, [2.0]], [None] * 3]
    columns += [[[[1.0]]] * 3, [{"a": 1.0}] * 3, pa.array(np.full(3, 1.5, np.float16)), []]
    written = []
    for column in columns:
        buffer = io.BytesIO()
        pq.write_table(pa.table({"input": column}), buffer)
        written.append(buffer.getvalue())
    return tuple(written)


@st.composite
def _parquet(draw: st.DrawFn) -> bytes:
    data = draw(st.sampled_from(_tables()))
    return damage_bytes(data, draw(BYTE_EDITS)) if draw(st.booleans()) else data


def _source(case: tuple[Any, ...], folder: Path) -> None:
    data, suffix, name, rows = case
    path = folder / f"a{suffix}"
    path.write_bytes(data)
    source = open_source(Location(path, "input", name))
    try:
        assert len(source.shape) > 0
        stop = min(source.shape[0], 8)
        for start in rows:
            array = source.read(min(start, stop), stop)
            assert array.shape == (stop - min(start, stop), *source.shape[1:])
    finally:
        source.close()


class _InterruptedError(Exception):
    """Stops a run between two tasks."""


def _journal(case: tuple[Any, ...], folder: Path) -> None:
    """Interrupt a run, damage its journal, run again: the same sum, or a refusal."""
    line, key, value, edits = case
    for role in ("input", "target"):
        (folder / role).mkdir()
        for shard in range(3):
            np.save(folder / role / f"{shard}.npy", np.full((2, 2), shard + len(role), np.float32))
    paths = {role: folder / role for role in ("input", "target")}
    located = locate(paths, dict.fromkeys(paths))
    job, journal = make_job(LossSpec(), threads=1), folder / "journal"
    whole = score_files(job, located, journal=journal).sum

    def stop(progress: Any) -> None:
        if progress.done:
            raise _InterruptedError

    try:
        score_files(job, located, journal=journal, on_progress=stop)
    except _InterruptedError:
        lines = journal.read_bytes().splitlines(keepends=True)
        number = line % len(lines)
        fields = json.loads(lines[number][9:])
        holder = fields
        for part in key:
            names = sorted(holder) if isinstance(holder, dict) else []
            if not names:
                break
            parent, name = holder, names[part % len(names)]
            holder = holder[name]
        if value is None:
            del parent[name]
        else:
            parent[name] = value[0]
        text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        lines[number] = b"%08x %s\n" % (zlib.crc32(text), text)  # its check is right
        journal.write_bytes(damage_bytes(b"".join(lines), edits))
        before = journal.read_bytes()
    again = score_files(job, located, journal=journal).sum
    # A forged sum of a finished task can't be told from a true one.
    assert again == whole or number > 0, (again, whole, before)


TARGETS = [
    Target(
        "source",
        st.tuples(
            some(_parquet(), _parquet(), FILES),
            mostly(st.just(".parquet"), st.sampled_from(SUFFIXES)),
            mostly(st.none(), NAMES),
            st.lists(st.integers(0, 4), min_size=1, max_size=3),
        ),
        _source,
        share=10,
    ),
    Target(
        "journal",
        st.tuples(
            st.integers(0, 3),
            st.lists(st.integers(0, 5), min_size=1, max_size=4),
            some(st.none(), st.tuples(JSON)),
            mostly(st.just([]), BYTE_EDITS),
        ),
        _journal,
        share=3,
    ),
]
