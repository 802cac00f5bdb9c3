"""`ScoreFile`: one score a row, each always at the same offset, so that it can be written twice.

While the run goes on the scores stand in a .npy file beside the target, or beside the journal where
the target is no file. The target gets them when they are whole.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
from pathlib import Path

import numpy as np

from .._files import create, put, refusal_told, replacing, resolve, unfinished
from .._floats import NUMPY_DTYPE, Array
from ..errors import OutputError, require
from ._journal import Journal
from ._shards import Plan

_ROWS = 1 << 18  # rows of a row group of Parquet


class ScoreFile:
    """The scores of a plan, in the order of its shards.

    Args:
        path: ends in .npy or .parquet.
        plan: how many rows there are.
        dtype: that of the scores. Parquet has no bfloat16; it gets float32, which holds them all.
        journal: the run's, which remembers the unfinished file by its `part`.

    Attributes:
        kept: whether an unfinished file of this plan was there, to go on with.

    Raises:
        OutputError: on another suffix, or a folder that can't be written.
        MissingDependencyError: for Parquet without pyarrow.
    """

    def __init__(self, path: Path, plan: Plan, dtype: str, journal: Journal) -> None:
        if path.suffix not in (".npy", ".parquet"):
            raise OutputError(f"can't write {path}: choose a name that ends in .npy or .parquet")
        if path.suffix == ".parquet":
            require("pyarrow", "score", "writing Parquet")
        self.path = path
        self._plan, self._dtype = plan, NUMPY_DTYPE[dtype]
        self._handle = -1
        header = io.BytesIO()
        kind = np.lib.format.dtype_to_descr(self._dtype)
        fields = {"descr": kind, "fortran_order": False, "shape": (plan.rows,)}
        np.lib.format.write_array_header_1_0(header, fields)
        self._first = header.tell()
        with self._refusal_told():
            self.part = unfinished(resolve(path) or journal.path, journal.part)
            self.part.parent.mkdir(parents=True, exist_ok=True)
            self.kept = self._open(header.getvalue())

    def _open(self, header: bytes) -> bool:
        """Whether the unfinished file was there; otherwise all the room is taken for a new one."""
        size = self._first + self._plan.rows * self._dtype.itemsize
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with contextlib.suppress(FileNotFoundError):
            self._handle = os.open(self.part, flags)
            there = os.fstat(self._handle)
            ours = stat.S_ISREG(there.st_mode) and there.st_uid == os.geteuid()
            if ours and there.st_size == size and os.pread(self._handle, len(header), 0) == header:
                return True
            self.close(keep=False)
        self._handle = create(self.part, self.path)
        try:
            os.posix_fallocate(self._handle, 0, size)  # a full disk is found now, not after hours
            self._write_at(0, header)
        except BaseException:
            self.close(keep=False)
            raise
        return False

    def _refusal_told(self) -> contextlib.AbstractContextManager[None]:
        return refusal_told(
            f"can't write {self.path}",
            "choose a file in a folder that you may write to and that has room",
        )

    def _write_at(self, offset: int, data: bytes) -> None:
        while data:
            written = os.pwrite(self._handle, data, offset)
            data, offset = data[written:], offset + written

    def write(self, task: int, scores: Array) -> None:
        """The scores of a task, on the disk when this returns."""
        found = self._plan.tasks[task]
        row = self._plan.shards[found.shard].first + found.start
        data = np.ascontiguousarray(scores, self._dtype).tobytes()
        with self._refusal_told():
            self._write_at(self._first + row * self._dtype.itemsize, data)
            os.fsync(self._handle)

    def finish(self) -> None:
        """Give the whole file its name, in its format."""
        self.close()
        with self._refusal_told():
            if self.path.suffix == ".npy":
                put(self.part, self.path)
            else:
                self._write_parquet()

    def _write_parquet(self) -> None:
        pyarrow = require("pyarrow", "score", "writing Parquet")
        parquet = require("pyarrow.parquet", "score", "writing Parquet")
        stored = np.dtype(np.float32) if self._dtype == NUMPY_DTYPE["bfloat16"] else self._dtype
        schema = pyarrow.schema([("score", pyarrow.from_numpy_dtype(stored))])
        with (
            self.part.open("rb") as file,
            replacing(self.path) as whole,
            # A dictionary of scores, which hardly repeat, would only take memory.
            parquet.ParquetWriter(whole, schema, use_dictionary=False) as writer,
        ):
            file.seek(self._first)
            while data := file.read(_ROWS * self._dtype.itemsize):
                scores = np.frombuffer(data, self._dtype).astype(stored)
                writer.write_table(pyarrow.table([scores], schema=schema))
        self.part.unlink()

    def close(self, keep: bool = True) -> None:
        """Keep the unfinished file, unless nothing is in it."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        if not keep:
            self.part.unlink(missing_ok=True)
