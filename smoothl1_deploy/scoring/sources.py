"""Rows of an array in a file, a few at a time, whatever the format of the file.

A row is what stands at one index of the first axis. To add a format: subclass `Source` in a module
of its own and enter its suffix in `_FORMATS`.
"""

from __future__ import annotations

import importlib
import math
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidInputError
from ..floats import NUMPY_DTYPE, Array, dtype_name
from ..npy import as_bfloat16, open_array

__all__ = ["SUFFIXES", "Location", "NpySource", "Source", "open_source"]

#: suffix -> (module of this package that reads it, its class).
_FORMATS = {
    ".npy": ("sources", "NpySource"),
    ".npz": ("npz", "NpzSource"),
    ".parquet": ("parquet", "ParquetSource"),
    ".pq": ("parquet", "ParquetSource"),
}
SUFFIXES = tuple(_FORMATS)


@dataclass(frozen=True, slots=True)
class Location:
    """Where an array is.

    Attributes:
        path: of the file.
        role: `input`, `target` or `weight`: the name it is looked for by, where it has no other.
        name: of the array in an .npz file, or of the column of a Parquet file; None takes the one
            called like the role, or the only one.
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
            f"--{self.role}-name"
        )


class Source(ABC):
    """An open array.

    Attributes:
        shape: of the whole array, at least one axis.
        dtype: of its elements.
        sequential: whether reading from the middle means reading everything before.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sequential: bool = False
    #: Whether `read(flat=True)` can take the array for one of a single axis.
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

    def __init__(self, location: Location) -> None:
        self._path = location.path
        self._file, self.shape, fortran, dtype = open_array(location.path)
        try:
            if not self.shape:
                raise InvalidInputError(
                    f"{location} has no axis; there is nothing to score row by row"
                )
            empty = as_bfloat16(np.empty(0, dtype), str(location.path), location.dtype)
        except BaseException:
            self._file.close()
            raise
        self.dtype, self._first = empty.dtype, self._file.tell()
        # In Fortran order each element of a row has a line of its own, through all rows.
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
        while line.size:
            got = os.preadv(self._file.fileno(), [line], offset)
            if not got:
                raise InvalidInputError(
                    f"{self._path} was cut off while it was scored; score it again when it is whole"
                )
            line, offset = line[got:], offset + got

    def close(self) -> None:
        """The rows that were read last stay valid."""
        self._file.close()


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
    module, cls = _FORMATS[suffix]
    source: Source = getattr(importlib.import_module(f".{module}", __package__), cls)(location)
    if source.dtype.kind not in "iub" and dtype_name(source.dtype) not in NUMPY_DTYPE:
        source.close()
        remedy = "; --dtype bfloat16 takes them for that" if source.dtype == np.dtype("V2") else ""
        raise InvalidInputError(
            f"{location} holds {source.dtype}, which are no numbers of a loss{remedy}"
        )
    return source
