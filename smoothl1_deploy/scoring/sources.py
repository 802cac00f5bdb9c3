"""Rows of an array in a file, a few at a time, whatever the format of the file.

A row is what stands at one index of the first axis. To add a format: subclass `Source` in a module
of its own and enter its suffix in `_FORMATS`.
"""

from __future__ import annotations

import importlib
import math
import mmap
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidInputError
from ..floats import NUMPY_DTYPE, Array, dtype_name
from ..npy import read_array

__all__ = ["SUFFIXES", "Location", "NpySource", "Source", "open_source"]

#: suffix -> (module of this package that reads it, its class).
_FORMATS = {
    ".npy": ("sources", "NpySource"),
    ".npz": ("npz", "NpzSource"),
    ".parquet": ("parquet", "ParquetSource"),
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
        if self.name is not None:
            if self.name in names:
                return self.name
            problem = f"has no {kind} called {self.name!r}"
        else:
            if self.role in names:
                return self.role
            if len(names) == 1:
                return names[0]
            problem = f"has no {kind} called {self.role!r}, and more or less than one to choose"
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
    """A .npy file, mapped into memory; what was read is unmapped again, so memory stays bounded."""

    def __init__(self, location: Location) -> None:
        array = read_array(location.path, location.dtype)
        if array.ndim == 0:
            raise InvalidInputError(f"{location} has no axis; there is nothing to score row by row")
        self._array = array
        self.shape, self.dtype = array.shape, array.dtype
        self.can_flatten = array.flags.c_contiguous
        self._map = _mapping(array)

    def flatten(self) -> None:
        """A view: nothing is read."""
        self._array = self._array.reshape(-1)
        super().flatten()

    def read(self, start: int, stop: int) -> Array:
        """A view of the file."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)  # the pages of the rows before
        return self._array[start:stop]

    def close(self) -> None:
        """The mapping goes with its last view."""
        self._array, self._map = self._array[:0], None


def _mapping(array: Array) -> mmap.mmap | None:
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    return base if isinstance(base, mmap.mmap) else None  # an empty array is not mapped


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
