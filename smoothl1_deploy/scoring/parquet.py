"""A column of a Parquet file: numbers, or lists of one length, which become rows of numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import InvalidInputError, require
from ..floats import Array
from .sources import Location, Source

__all__ = ["ParquetSource"]

_ROWS = 1 << 16  # decoded at a time, of numbers
#: Bytes of a file in memory. pyarrow reads whole row groups ahead, or else a whole column of one.
_BUFFER = 1 << 20


class ParquetSource(Source):
    """Read row group by row group; rows before the first one wanted are skipped by their group."""

    def __init__(self, location: Location) -> None:
        parquet = require("pyarrow.parquet", "score", "reading Parquet")
        self._arrow = require("pyarrow", "score", "reading Parquet")
        self._compute = require("pyarrow.compute", "score", "reading Parquet")
        self._where = str(location)
        with self._damage_told():
            self._file: Any = parquet.ParquetFile(
                location.path, pre_buffer=False, buffer_size=_BUFFER
            )
        try:
            with self._damage_told():
                schema = self._file.schema_arrow
                self._column = location.choose(list(schema.names), "column")
                self._where = f"{self._column} in {location.path}"
                self.dtype, width = self._inspect(schema.field(self._column).type)
                self._check_groups()
        except BaseException:
            self._file.close()
            raise
        self.shape = (self._file.metadata.num_rows, *width)
        self._position = 0
        self._batches: Iterator[Array] = iter(())
        self._left = np.empty((0, *width), self.dtype)

    @contextlib.contextmanager
    def _damage_told(self) -> Iterator[None]:
        try:
            yield
        except InvalidInputError:
            raise
        except (OSError, StopIteration, ValueError, self._arrow.ArrowException) as exc:
            raise InvalidInputError(
                f"{self._where} can't be read as Parquet: it is truncated, damaged or of another "
                f"format ({exc}); write it with pyarrow"
            ) from exc

    def _inspect(self, kind: Any) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """The dtype of the elements, and the shape of a row."""
        types = self._arrow.types
        width: tuple[int, ...] = ()
        whole = kind
        if types.is_fixed_size_list(kind):
            width, kind = (kind.list_size,), kind.value_type
        elif types.is_list(kind) or types.is_large_list(kind):
            width, kind = (self._first_length(),), kind.value_type
        if not (types.is_floating(kind) or types.is_integer(kind) or types.is_boolean(kind)):
            raise InvalidInputError(
                f"{self._where} holds {whole}; a loss needs numbers, or lists of numbers: make a "
                "column of them by cast, struct_field or list_flatten of pyarrow.compute"
            )
        return np.dtype(kind.to_pandas_dtype()), width

    def _check_groups(self) -> None:
        data = self._file.metadata
        rows = [data.row_group(group).num_rows for group in range(data.num_row_groups)]
        if min(rows, default=0) < 0 or sum(rows) != data.num_rows:
            raise ValueError(f"row groups of {rows} rows in a file of {data.num_rows}")

    def _first_length(self) -> int:
        for batch in self._file.iter_batches(batch_size=1, columns=[self._column]):
            if batch.num_rows:
                value = batch.column(self._column)[0].as_py()
                return 0 if value is None else len(value)
        return 0

    def _decoded(self, groups: list[int]) -> Iterator[Array]:
        width = int(np.prod(self.shape[1:], dtype=int))
        for batch in self._file.iter_batches(
            batch_size=max(1, _ROWS // max(width, 1)), row_groups=groups, columns=[self._column]
        ):
            yield self._numbers(batch.column(self._column), width)

    def _numbers(self, column: Any, width: int) -> Array:
        rows = len(column)
        nulls = column.null_count
        if len(self.shape) > 1:
            lengths = self._compute.list_value_length(column)
            if not nulls and rows and set(lengths.unique().to_pylist()) != {width}:
                raise InvalidInputError(
                    f"{self._where} has lists of different lengths; a loss needs rows of one "
                    f"length, the first has {width}"
                )
            column = column.flatten()
            nulls += column.null_count
        if nulls:
            raise InvalidInputError(
                f"{self._where} has {nulls} null(s), which is also what pandas makes of NaN, and a "
                "loss knows no missing number; drop these rows, or write NaN as it is with "
                "pyarrow.array(frame[column].to_numpy())"
            )
        return np.asarray(column.to_numpy(zero_copy_only=False)).reshape(rows, *self.shape[1:])

    def _seek(self, row: int) -> None:
        """Begin with the row group that holds `row`."""
        first = 0
        metadata = self._file.metadata
        for group in range(metadata.num_row_groups):
            if row < first + metadata.row_group(group).num_rows:
                self._batches = self._decoded(list(range(group, metadata.num_row_groups)))
                break
            first += metadata.row_group(group).num_rows
        self._left = self._left[:0]
        self._position = first
        self._take(row - first, keep=False)

    def _take(self, rows: int, keep: bool = True) -> list[Array]:
        taken = []
        self._position += rows
        while rows > 0:
            if not len(self._left):
                self._left = next(self._batches)
            part, self._left = self._left[:rows], self._left[rows:]
            rows -= len(part)
            if keep:
                taken.append(part)
        return taken

    def read(self, start: int, stop: int) -> Array:
        """A copy."""
        with self._damage_told():
            if start != self._position or start == 0:
                self._seek(start)
            taken = self._take(stop - start)
        return np.concatenate(taken) if taken else self._left[:0]

    def close(self) -> None:
        """The file."""
        self._file.close()
