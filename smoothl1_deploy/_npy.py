"""Arrays from files of numpy's own formats, read without trust, and written whole or not at all."""

from __future__ import annotations

import contextlib
import io
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from ._files import check_writable, open_file, write_atomic
from ._floats import NUMPY_DTYPE, Array
from .errors import InvalidInputError, OutputError, is_shortage, reason_of

#: Shape, whether it is in Fortran order, and dtype.
Header = tuple[tuple[int, ...], bool, np.dtype[Any]]

_REQUIRED = ("input", "target")
_OPTIONAL = ("weight", "grad_output")
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
    (3, 0): np.lib.format.read_array_header_2_0,  # differs in the names of fields alone
}
_LARGE = 1 << 30  # bytes; an array that unpacks to no more is no bomb
_MOST_TIMES = 100  # deflate reaches 1,032 on zeros, random floats 1.1
_REMEDY = "write it with numpy.save"
ARCHIVE_REMEDY = "write it with numpy.savez, the arrays by the names input and target"


def read_array(path: Path, dtype: str) -> Array:
    """The array of a .npy file.

    Args:
        path: the file.
        dtype: the artefact's; where that is bfloat16, raw items of two bytes are taken as that,
            because numpy writes bfloat16 without its name.

    Raises:
        InvalidInputError: for a file that is missing, truncated, pickled or of another format.
        MemoryError, OSError: where the machine lacks memory or files for it.
    """
    file, (shape, fortran, stored) = open_array(path)
    count = math.prod(shape)
    with file:
        # Read, not mapped: where a mapped file is cut meanwhile, the process ends by SIGBUS.
        data = np.fromfile(file, stored, count)
    if data.size != count:
        raise InvalidInputError(f"{path} was cut off while it was read; {_REMEDY}")
    array = data.reshape(shape[::-1]).T if fortran else data.reshape(shape)
    return as_bfloat16(array, str(path), dtype)


def open_array(path: Path) -> tuple[IO[bytes], Header]:
    """A .npy file, which stands at the first element and is long enough for all of them.

    Raises:
        InvalidInputError: as `read_array` does.
        MemoryError, OSError: likewise.
    """
    check_file(path, b"\x93NUMPY", f"a .npy file; {_REMEDY}")
    with damage_told(str(path), _REMEDY), contextlib.ExitStack() as stack:
        file = stack.enter_context(open_file(path))
        shape, fortran, dtype = _read_header(file, str(path))
        stored = os.fstat(file.fileno()).st_size - file.tell()
        expected = math.prod(shape) * dtype.itemsize
        if stored < expected or not dtype.itemsize or min(shape, default=0) < 0:
            raise ValueError(f"{stored} bytes where its header says {expected}")
        stack.pop_all()
        return file, (shape, fortran, dtype)


@contextlib.contextmanager
def damage_told(what: str, remedy: str) -> Iterator[None]:
    """Take what is raised within for damage of a file.

    numpy, tokenize, zipfile and the decompressors each raise errors of their own.

    Raises:
        InvalidInputError: for everything but what the machine lacks.
    """
    try:
        yield
    except InvalidInputError:
        raise
    except Exception as exc:
        if is_shortage(exc):
            raise
        raise InvalidInputError(f"{what} is truncated or damaged ({exc}); {remedy}") from exc


def read_archive(path: Path, dtype: str) -> dict[str, Array]:
    """The arrays called `input`, `target`, and `weight` and `grad_output` where an .npz has them.

    Raises:
        InvalidInputError: as for `read_array`, and where one of the first two is missing.
    """
    required, optional = (dict.fromkeys(names, dtype) for names in (_REQUIRED, _OPTIONAL))
    return read_named(path, required, optional, ARCHIVE_REMEDY)


def read_named(
    path: Path, required: Mapping[str, str], optional: Mapping[str, str], remedy: str
) -> dict[str, Array]:
    """Arrays of an .npz file, by their names; others in it are left alone.

    Args:
        path: the file.
        required: name -> dtype, by which bfloat16 is recognised.
        optional: likewise, of those that may be missing.
        remedy: what to give instead, where one is missing or can't be read.

    Raises:
        InvalidInputError: as for `read_array`, and where one is missing.
    """
    check_file(path, b"PK", f"an .npz file; {remedy}")
    with damage_told(str(path), remedy), np.load(path, allow_pickle=False) as archive:
        if absent := [name for name in required if name not in archive.files]:
            raise InvalidInputError(
                f"{path} has no array called {' or '.join(absent)}, only "
                f"{', '.join(archive.files) or 'nothing'}; {remedy}"
            )
        names = [*required, *(name for name in optional if name in archive.files)]
        for name in names:
            check_member(archive.zip, name, path)
        arrays = {name: archive[name] for name in names}
    dtypes = {**optional, **required}
    return {n: as_bfloat16(array, f"{n} in {path}", dtypes[n]) for n, array in arrays.items()}


def _read_header(file: IO[bytes], what: str) -> Header:
    """The header of the array that `file` begins with.

    Raises:
        InvalidInputError: for pickled objects.
        Exception: of numpy, tokenize or the file, where there is no such header.
    """
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"a header of version {version}")
    shape, fortran, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        raise InvalidInputError(
            f"{what} holds Python objects, which are not loaded (a pickle can run any code); "
            "convert it to float32"
        )
    if not all(type(size) is int for size in shape):  # to numpy True is one, but not everywhere
        raise ValueError(f"no array has the shape {shape}")
    # numpy multiplies every other size, though there is nothing to hold.
    beside = math.prod(size for size in shape if size) * dtype.itemsize
    if len(shape) > 64 or (0 in shape and not 0 <= beside < 1 << 63):
        raise ValueError(f"no array has the shape {shape}")
    return shape, fortran, dtype


def check_member(archive: zipfile.ZipFile, name: str, path: Path) -> tuple[Header, int]:
    """The header of an array, and where its elements begin, before anything else is decompressed.

    Raises:
        InvalidInputError: for pickled objects, and for an archive that unpacks to far more than
            it holds.
        Exception: of numpy, tokenize or zipfile, where the header is damaged or says another size.
    """
    info = archive.NameToInfo.get(f"{name}.npy") or archive.getinfo(name)
    with archive.open(info) as file:
        header = _read_header(file, f"{name} in {path}")
        first = file.tell()
    stored, expected = info.file_size - first, math.prod(header[0]) * header[2].itemsize
    if stored != expected:
        raise ValueError(f"{name}: {stored} bytes where its header says {expected}")
    if stored > _LARGE and stored > _MOST_TIMES * path.stat().st_size:
        raise InvalidInputError(
            f"{path} has {path.stat().st_size:,} bytes and would unpack {name} to {stored:,}; if "
            "you trust it, unpack it yourself and give the arrays as .npy files"
        )
    return header, first


def check_file(path: Path, magic: bytes, expected: str) -> None:
    """Refuse what is no file, or begins otherwise than a file of the `expected` kind does.

    Raises:
        InvalidInputError: with the reason.
    """
    try:
        with open_file(path) as file:
            start = file.read(len(magic))
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        if is_shortage(exc):
            raise
        raise InvalidInputError(
            f"{path} can't be read ({reason_of(exc)}); give the path of {expected}"
        ) from exc
    if start[:1] == b"\x80":
        expected += ". It looks like a pickle, which is not loaded: it can run any code"
    if start != magic:
        raise InvalidInputError(f"{path} is not {expected}")


def as_bfloat16(array: Any, what: str, dtype: str) -> Array:
    """`array` with bfloat16 where the file says no more than two raw bytes an element."""
    if not isinstance(array, np.ndarray):
        raise InvalidInputError(f"{what} is not an array of numpy; {_REMEDY}")
    if array.dtype != np.dtype("V2"):
        return array
    if dtype != "bfloat16":
        raise InvalidInputError(
            f"{what} holds raw items of two bytes, which is how numpy writes bfloat16, but the "
            f"artefact is {dtype}; convert it to {dtype}"
        )
    return array.view(NUMPY_DTYPE["bfloat16"])


def check_output(path: Path, outputs: int) -> None:
    """Refuse, before anything is computed, a file name that `write_arrays` can't serve.

    Raises:
        OutputError: on another suffix, or .npy for more than one output, or as `write_arrays`.
    """
    if path.suffix not in (".npy", ".npz"):
        raise OutputError(f"can't write {path}: choose a name that ends in .npy or .npz")
    if path.suffix == ".npy" and outputs != 1:
        raise OutputError(f"can't write {outputs} outputs to {path}; choose a name with .npz")
    check_writable(path)


def write_arrays(path: Path, arrays: dict[str, Array]) -> Path:
    """Write the one array to .npy, or all by their names to .npz.

    Raises:
        OutputError: as `_files.write_atomic`.
    """
    buffer = io.BytesIO()
    if path.suffix == ".npy":
        (array,) = arrays.values()
        np.save(buffer, array, allow_pickle=False)
    else:
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return write_atomic(path, buffer.getvalue())
