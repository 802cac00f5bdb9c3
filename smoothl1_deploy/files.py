"""Files that are there whole, or as they were before; the standard library alone."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path
from typing import BinaryIO

from .errors import OutputError, reason_of

__all__ = ["open_file", "read_file", "write_atomic"]


def write_atomic(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write beside the target, then rename: the file is there whole, or as it was before.

    Raises:
        OutputError: when the folder is missing or can't be written, and for what is no file: a
            rename would put one in the place of a device.
    """
    path = Path(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise OutputError(
            f"can't write {path}: it is a folder or a device; choose the name of a file"
        )
    # Not tempfile: it makes files for the owner alone, and to learn the umask one has to change
    # it, which two threads must not do at once. open() applies it by itself.
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        raise OutputError(
            f"can't write {path}: {reason_of(exc)}; choose a file in a folder that exists "
            "and that you may write to"
        ) from exc
    return path


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """A file that is open for reading, in binary.

    Raises:
        OSError: also for what is no file: a pipe would wait for its writer without end.
    """

    def opened(path: str, flags: int) -> int:
        handle = os.open(path, flags | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(0, "it is a folder, a pipe or a device")
        return handle

    return open(path, "rb", opener=opened)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """What a file holds; raises as `open_file` does."""
    with open_file(path) as file:
        return file.read()
