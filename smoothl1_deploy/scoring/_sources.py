"""Rows of an array in a file, a few at a time, whatever the format of the file.

A row is what stands at one index of the first axis. To add a format: subclass `Source` and enter
its suffix in `_FORMATS`.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from .._floats import NUMPY_DTYPE, Array, dtype_name
from .._npy import (
    ARCHIVE_REMEDY,
    Header,
    as_bfloat16,
    check_file,
    check_member,
    damage_told,
    open_array,
)
from ..errors import InvalidInputError, require

_DECODED = 1 << 16  # how many numbers of a Parquet file are decoded at a time
#: How many bytes of a Parquet file pyarrow reads at a time; by itself it reads whole row groups.
_BUFFER = 1 << 20
_PARQUET_REMEDY = "write it with pyarrow"


@dataclass(frozen=True, slots=True)
class Location:
    """Where an array is.

    Attributes:
        path: the file.
        role: `input`, `target`, `weight`, or an input of a whole model: the name it is looked for
            by, where it has no other.
        name: that of the array in an .npz file, or of the column of a Parquet file; None takes the
            one called like the role, or the only one.
        dtype: what raw items of two bytes are taken for: numpy writes bfloat16 without its name.
    """

    path: Path
    role: str
    name: str | None = None
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.path}[{self.name}]" if self.name else str(self.path)

    def choose(self, names: list[str], kind: str) -> str:
        """The name of the array among those of the file.

        Raises:
            InvalidInputError: where there is none of that name, or no telling which.
        """
        name = self.name if self.name is not None else self.role
        times = names.count(name)
        if times > 1:
            raise InvalidInputError(
                f"{self.path} has {times} {kind}s called {name!r}; rename all but one"
            )
        if times == 1:
            return name
        if self.name is None and len(names) == 1:
            return names[0]
        problem = f"has no {kind} called {name!r}"
        if self.name is None:
            problem += ", and more or less than one to choose"
        raise InvalidInputError(
            f"{self.path} {problem}; it has {', '.join(map(repr, names)) or 'none'}. Name it with "
            f"--{self.role}-name, or, for a whole model, call it as the input"
        )


class Source(ABC):
    """An open array.

    Attributes:
        shape: that of the whole array, of at least one axis.
        dtype: that of its elements.
        can_flatten: whether an element can be taken for a row.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    can_flatten: bool = False

    @abstractmethod
    def read(self, start: int, stop: int) -> Array:
        """Rows `start` to `stop`; valid until the next call.

        Raises:
            InvalidInputError: where the file is damaged.
        """

    def flatten(self) -> None:
        """From now on an element is a row; only where `can_flatten`."""
        self.shape = (math.prod(self.shape),)

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""


class NpySource(Source):
    """A .npy file, whose rows are read into one buffer.

    It is not mapped into memory: where a mapped file is cut meanwhile, the process ends by SIGBUS.
    """

    _file: IO[bytes] | None = None

    def __init__(self, location: Location) -> None:
        self._what = str(location.path)
        self._file, header = open_array(location.path)
        try:
            self._lay_out(header, self._file.tell(), location)
        except BaseException:
            self._file.close()
            raise

    def _lay_out(self, header: Header, first: int, location: Location) -> None:
        self.shape, fortran, dtype = header
        if not self.shape:
            raise InvalidInputError(
                f"{self._what} has no axis; there is nothing to score row by row"
            )
        self.dtype = as_bfloat16(np.empty(0, dtype), self._what, location.dtype).dtype
        self._first = first
        # In Fortran order the file has a line for each element of a row, through all rows.
        self._lines = max(math.prod(self.shape[1:]), 1) if fortran else 1
        self.can_flatten = self._lines == 1
        self._buffer = np.empty(0, np.uint8)

    def read(self, start: int, stop: int) -> Array:
        """The one buffer, with other rows in it."""
        rows, axes = stop - start, self.shape[1:]
        step = math.prod(axes) * self.dtype.itemsize // self._lines
        size = rows * step * self._lines
        if self._buffer.size < size:
            self._buffer = np.empty(size, np.uint8)
        lines = self._buffer[:size].reshape(self._lines, rows * step)
        for number, line in enumerate(lines):
            self._fill(line, self._first + (number * self.shape[0] + start) * step)
        found = lines.view(self.dtype)
        if self._lines > 1:
            return found.reshape(*axes[::-1], rows).T
        return found.reshape(rows, *axes)

    def _fill(self, line: Any, offset: int) -> None:
        assert self._file is not None
        while line.size:
            got = os.preadv(self._file.fileno(), [line], offset)
            if not got:
                raise InvalidInputError(
                    f"{self._what} was cut off while it was scored; score it again when it is whole"
                )
            line, offset = line[got:], offset + got

    def close(self) -> None:
        """Close the file; the rows that were read last stay valid."""
        if self._file is not None:
            self._file.close()


class NpzSource(NpySource):
    """An array of an .npz file, unpacked into a file without a name when it is first read."""

    def __init__(self, location: Location) -> None:
        self._what, self._path = str(location.path), location.path
        check_file(location.path, b"PK", f"an .npz file; {ARCHIVE_REMEDY}")
        with damage_told(self._what, ARCHIVE_REMEDY), zipfile.ZipFile(location.path) as archive:
            members = [name[:-4] for name in archive.namelist() if name.endswith(".npy")]
            self._name = location.choose(members, "array")
            self._what = f"{self._name} in {location.path}"
            header, first = check_member(archive, self._name, location.path)
        self._lay_out(header, first, location)

    def read(self, start: int, stop: int) -> Array:
        """The rows, as of a .npy file; the first call unpacks all of the array."""
        if self._file is None:
            self._file = self._unpack()
        return super().read(start, stop)

    def _unpack(self) -> IO[bytes]:
        # /tmp may be memory, and /var/tmp is for what is large; a user's TMPDIR comes first.
        disk = "TMPDIR" not in os.environ and os.access("/var/tmp", os.W_OK)
        with damage_told(self._what, ARCHIVE_REMEDY), contextlib.ExitStack() as stack:
            file = stack.enter_context(tempfile.TemporaryFile(dir="/var/tmp" if disk else None))
            archive = stack.enter_context(zipfile.ZipFile(self._path))
            shutil.copyfileobj(archive.open(f"{self._name}.npy"), file)
            file.flush()
            archive.close()
            stack.pop_all()
        return file


#: Arrow's name of a float type -> numpy's; others are called alike.
_FLOATS = {"halffloat": "float16", "float": "float32", "double": "float64"}


class ParquetSource(Source):
    """A column of numbers, or of lists of one length, which become rows of numbers."""

    def __init__(self, location: Location) -> None:
        parquet = require("pyarrow.parquet", "score", "reading Parquet")
        self._arrow = require("pyarrow", "score", "reading Parquet")
        self._what = str(location)
        check_file(location.path, b"PAR1", f"a Parquet file; {_PARQUET_REMEDY}")
        with damage_told(self._what, _PARQUET_REMEDY), contextlib.ExitStack() as stack:
            self._file: Any = parquet.ParquetFile(
                location.path, pre_buffer=False, buffer_size=_BUFFER
            )
            stack.callback(self._file.close)
            schema, data = self._file.schema_arrow, self._file.metadata
            self._column = location.choose(list(schema.names), "column")
            self._what = f"{self._column} in {location.path}"
            self.dtype, width = self._inspect(schema.field(self._column).type)
            self._groups = [data.row_group(i).num_rows for i in range(data.num_row_groups)]
            if min(self._groups, default=0) < 0 or sum(self._groups) != data.num_rows:
                raise ValueError(f"row groups of {self._groups} rows in a file of {data.num_rows}")
            stack.pop_all()
        self.shape = (data.num_rows, *width)
        self._position = -1  # the index of the row after those that were read last
        self._decoded: Iterator[Array] = iter(())
        self._left = np.empty((0, *width), self.dtype)  # rows that are decoded, and not read yet

    def _inspect(self, kind: Any) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """The dtype of the elements, and the shape of a row."""
        types = self._arrow.types
        width: tuple[int, ...] = ()
        whole = kind
        if types.is_fixed_size_list(kind):
            width, kind = (kind.list_size,), kind.value_type
        elif types.is_list(kind) or types.is_large_list(kind):
            batches = self._file.iter_batches(batch_size=1, columns=[self._column])
            first = next((batch.column(0)[0].as_py() for batch in batches if batch.num_rows), None)
            width, kind = (len(first or ()),), kind.value_type
        if not (types.is_floating(kind) or types.is_integer(kind) or types.is_boolean(kind)):
            raise InvalidInputError(
                f"{self._what} holds {whole}; a loss needs numbers, or lists of numbers: make a "
                "column of them by cast, struct_field or list_flatten of pyarrow.compute"
            )
        # Not by to_pandas_dtype, which imports pandas (pyarrow 17).
        return np.dtype(_FLOATS.get(str(kind), str(kind))), width

    def _decode_from(self, row: int) -> Iterator[Array]:
        """What follows `row`, some rows at a time, from the row group on that holds it."""
        group = 0
        while group < len(self._groups) and row >= self._groups[group]:
            row -= self._groups[group]
            group += 1
        for batch in self._file.iter_batches(
            batch_size=max(1, _DECODED // max(math.prod(self.shape[1:]), 1)),
            row_groups=list(range(group, len(self._groups))),
            columns=[self._column],
        ):
            rows = self._numbers(batch.column(self._column))[row:]
            row -= batch.num_rows - len(rows)
            yield rows

    def _numbers(self, column: Any) -> Array:
        rows = len(column)
        nulls = column.null_count
        if len(self.shape) > 1:
            lengths = column.value_lengths()
            if not nulls and rows and set(lengths.unique().to_pylist()) != {*self.shape[1:]}:
                raise InvalidInputError(
                    f"{self._what} has lists of different lengths; a loss needs rows of one "
                    f"length, the first has {self.shape[1]}"
                )
            column = column.flatten()
            nulls += column.null_count
        if nulls:
            raise InvalidInputError(
                f"{self._what} has {nulls} null(s), which is also what pandas makes of NaN, and a "
                "loss knows no missing number; drop these rows, or write NaN as it is, from an "
                "array of numpy"
            )
        return np.asarray(column.to_numpy(zero_copy_only=False)).reshape(rows, *self.shape[1:])

    def read(self, start: int, stop: int) -> Array:
        """Rows that follow those read last are the quickest."""
        if start != self._position:
            self._decoded, self._left = self._decode_from(start), self._left[:0]
        parts, missing = [self._left], stop - start - len(self._left)
        with damage_told(self._what, _PARQUET_REMEDY):
            while missing > 0:
                parts.append(next(self._decoded))
                missing -= len(parts[-1])
        rows = np.concatenate(parts) if len(parts) > 1 else parts[0]
        self._position, self._left = stop, rows[stop - start :]
        return rows[: stop - start]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


_FORMATS: dict[str, type[Any]] = {
    ".npy": NpySource,
    ".npz": NpzSource,
    ".parquet": ParquetSource,
    ".pq": ParquetSource,
}
SUFFIXES = tuple(_FORMATS)


def open_source(location: Location) -> Source:
    """Open the array at `location`, by the suffix of its file.

    Raises:
        InvalidInputError: for another suffix, and for a file that is missing or damaged.
        MissingDependencyError: for Parquet without pyarrow.
    """
    suffix = location.path.suffix.lower()
    if suffix not in _FORMATS:
        raise InvalidInputError(
            f"{location.path} is none of {', '.join(SUFFIXES)}; convert it, or give a folder of "
            "such files"
        )
    source: Source = _FORMATS[suffix](location)
    if source.dtype.kind not in "iub" and dtype_name(source.dtype) not in NUMPY_DTYPE:
        source.close()
        raise InvalidInputError(f"{location} holds {source.dtype}, which are no numbers of a loss")
    return source
