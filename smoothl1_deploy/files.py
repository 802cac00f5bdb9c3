"""Files that are there whole, or as they were before; the standard library alone."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from .errors import OutputError, reason_of

__all__ = ["write_atomic"]


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
