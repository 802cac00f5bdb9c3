"""`ScoreFile`: one score a row, each written to its own place, so that it can be written twice.

While the run goes on the scores stand in a .npy file beside the target, which has its name only
when it is whole.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import OutputError, require
from ..floats import NUMPY_DTYPE, Array
from .shards import Plan

__all__ = ["ScoreFile"]

_ROWS = 1 << 20  # of a row group of Parquet


class ScoreFile:
    """The scores of a plan, in the order of its shards.

    Args:
        path: ends in .npy or .parquet.
        plan: how many rows there are.
        dtype: of the scores. Parquet has no bfloat16; it gets float32, which holds every one.

    Attributes:
        kept: whether an unfinished file of this plan was there, to go on with.

    Raises:
        OutputError: on another suffix, or a folder that can't be written.
        MissingDependencyError: for Parquet without pyarrow.
    """

    def __init__(self, path: Path, plan: Plan, dtype: str) -> None:
        if path.suffix not in (".npy", ".parquet"):
            raise OutputError(f"can't write {path}: choose a name that ends in .npy or .parquet")
        if path.suffix == ".parquet":
            require("pyarrow", "score", "writing Parquet")
        self.path = path
        self.part = path.with_name(f".{path.name}.part")
        self._plan, self._dtype = plan, NUMPY_DTYPE[dtype]
        self._file: IO[bytes] | None = None
        header = _header(self._dtype, plan.rows)
        self._offset = len(header)
        size = self._offset + plan.rows * self._dtype.itemsize
        try:
            self.kept = self._fits(header, size)
            if not self.kept:
                self.part.write_bytes(header)
                os.truncate(self.part, size)
        except OSError as exc:
            raise self._error(exc) from exc

    def _fits(self, header: bytes, size: int) -> bool:
        if not self.part.exists() or self.part.stat().st_size != size:
            return False
        with self.part.open("rb") as file:
            return file.read(len(header)) == header

    def _error(self, exc: OSError) -> OutputError:
        return OutputError(
            f"can't write {self.part}: {exc.strerror}; choose a file in a folder that exists, that "
            "you may write to and that has room"
        )

    def write(self, piece: int, scores: Array) -> None:
        """The scores of a piece, on the disk when this returns."""
        found = self._plan.pieces[piece]
        row = self._plan.shards[found.shard].first + found.start
        try:
            if self._file is None:
                self._file = self.part.open("r+b")
            self._file.seek(self._offset + row * self._dtype.itemsize)
            self._file.write(np.ascontiguousarray(scores, self._dtype).tobytes())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as exc:
            raise self._error(exc) from exc

    def finish(self) -> None:
        """Give the whole file its name, in its format."""
        self.close()
        try:
            if self.path.suffix == ".npy":
                os.replace(self.part, self.path)
            else:
                self._write_parquet()
        except OSError as exc:
            raise self._error(exc) from exc

    def _write_parquet(self) -> None:
        pyarrow = require("pyarrow", "score", "writing Parquet")
        parquet = require("pyarrow.parquet", "score", "writing Parquet")
        stored = np.dtype(np.float32) if self._dtype == NUMPY_DTYPE["bfloat16"] else self._dtype
        schema = pyarrow.schema([("score", pyarrow.from_numpy_dtype(stored))])
        whole = self.part.with_suffix(".whole")
        with contextlib.ExitStack() as undo:
            undo.callback(whole.unlink, missing_ok=True)
            with parquet.ParquetWriter(whole, schema) as writer, self.part.open("rb") as file:
                file.seek(self._offset)
                while data := file.read(_ROWS * self._dtype.itemsize):
                    scores = np.frombuffer(data, self._dtype).astype(stored)
                    writer.write_table(pyarrow.table([scores], schema=schema))
            os.replace(whole, self.path)
        self.part.unlink()

    def close(self, keep: bool = True) -> None:
        """Keep the unfinished file, unless nothing is in it."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if not keep:
            self.part.unlink(missing_ok=True)


def _header(dtype: np.dtype[np.generic], rows: int) -> bytes:
    import io

    buffer = io.BytesIO()
    fields = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (rows,),
    }
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()
