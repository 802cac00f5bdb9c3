"""An array of an .npz file, decompressed as it is read: no more than the rows asked for.

A small archive can claim any size. What is held is the rows that were asked for, and an archive
whose header and directory disagree about the size is refused before anything is decompressed.
"""

from __future__ import annotations

import lzma
import math
import tokenize
import zipfile
import zlib
from typing import IO, Any

import numpy as np

from ..errors import InvalidInputError
from ..floats import NUMPY_DTYPE, Array
from ..npy import read_header
from .sources import Location, Source

__all__ = ["NpzSource"]

_REMEDY = "write it with numpy.savez(path, input=..., target=...)"
#: zipfile raises RuntimeError for an encrypted member; numpy's header goes through tokenize.
_DAMAGE = (
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    lzma.LZMAError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


class NpzSource(Source):
    """One member of the archive, read from its beginning to its end."""

    sequential = True

    def __init__(self, location: Location) -> None:
        self._location = location
        try:
            self._archive = zipfile.ZipFile(location.path)
        except _DAMAGE as exc:
            raise InvalidInputError(
                f"{location.path} can't be read as an .npz file ({exc}); {_REMEDY}"
            ) from exc
        members = [n[:-4] for n in self._archive.namelist() if n.endswith(".npy")]
        try:
            self._name = location.choose(members, "array")
            self._what = f"{self._name} in {location.path}"
            self._open()
        except BaseException:
            self._archive.close()
            raise

    def _open(self) -> None:
        try:
            self._file: IO[bytes] = self._archive.open(f"{self._name}.npy")
            shape, fortran, dtype = read_header(self._file)
        except _DAMAGE as exc:
            raise self._damaged(exc) from exc
        self._check(shape, fortran, dtype)
        self.shape = shape
        raw = dtype == np.dtype("V2") and self._location.dtype == "bfloat16"
        self.dtype = NUMPY_DTYPE["bfloat16"] if raw else dtype
        self.can_flatten, self._row = True, 0

    def _damaged(self, exc: object) -> InvalidInputError:
        return InvalidInputError(f"{self._what} is truncated or damaged ({exc}); {_REMEDY}")

    def _check(self, shape: tuple[int, ...], fortran: bool, dtype: np.dtype[Any]) -> None:
        if dtype.hasobject:
            raise InvalidInputError(
                f"{self._what} holds Python objects, which are not loaded (a pickle can run any "
                "code); convert it: array.astype('float32')"
            )
        if not shape:
            raise InvalidInputError(
                f"{self._what} has no axis; there is nothing to score row by row"
            )
        if fortran and len(shape) > 1:
            raise InvalidInputError(
                f"{self._what} is in Fortran order, so its rows don't follow one another; save it "
                "as .npy, or write it with numpy.savez(path, input=numpy.ascontiguousarray(array))"
            )
        expected = self._file.tell() + math.prod(shape) * dtype.itemsize
        stored = self._archive.getinfo(f"{self._name}.npy").file_size
        if stored != expected:
            raise self._damaged(f"{stored} bytes where its header says {expected}")

    def flatten(self) -> None:
        """The elements follow one another in the archive."""
        self._row *= math.prod(self.shape[1:])
        super().flatten()

    def read(self, start: int, stop: int) -> Array:
        """A copy; what stands before is decompressed and dropped, from the beginning if need be."""
        width = math.prod(self.shape[1:]) * self.dtype.itemsize
        if start < self._row:
            flat = len(self.shape) == 1
            self._file.close()
            self._open()
            if flat:
                self.flatten()
        try:
            self._file.seek((start - self._row) * width, 1)
            data = bytearray((stop - start) * width)
            got = _fill(self._file, memoryview(data))
            if stop == self.shape[0] and self._file.read(1):
                raise ValueError("more bytes than its header says")
        except _DAMAGE as exc:
            raise self._damaged(exc) from exc
        if got != len(data):
            raise self._damaged(f"{got} of {len(data)} bytes are there")
        self._row = stop
        return np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:])

    def close(self) -> None:
        """The archive."""
        self._file.close()
        self._archive.close()


def _fill(file: IO[bytes], into: memoryview) -> int:
    got = 0
    while got < len(into):
        data = file.read(min(len(into) - got, 1 << 20))
        if not data:
            break
        into[got : got + len(data)] = data
        got += len(data)
    return got
