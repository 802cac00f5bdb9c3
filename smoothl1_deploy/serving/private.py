"""A private folder for one server: plain names for all that reaches Triton, gone with its owner.

Triton's Python backend hands paths to a shell, unquoted: a folder called `$(command)` would run it,
and one with a space is never found.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shlex
import shutil
import tempfile
from pathlib import Path

from ..errors import OutputError

__all__ = ["PrivateFolder", "is_plain", "plain_folder"]

#: No older version's: theirs have no lock, and would look as if nobody had them.
_PREFIX = "smoothl1-deploy-triton-"


def is_plain(text: str) -> bool:
    """Whether a shell takes a text for one word of itself."""
    return shlex.quote(text) == text


def plain_folder(longest: int) -> Path:
    """The folder for temporary files, or else another one whose path is plain.

    Raises:
        OutputError: where there is none of `longest` characters at most.
    """
    for folder in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
        # Lists of paths are split at a colon.
        plain = is_plain(folder) and ":" not in folder and len(folder) <= longest
        if plain and os.access(folder, os.W_OK | os.X_OK):
            return Path(folder)
    raise OutputError(
        f"the server needs a folder for temporary files with a plain, short path, and "
        f"{tempfile.gettempdir()} has none; set TMPDIR to one"
    )


class PrivateFolder:
    """A folder that no other user can enter: made by `make`, or as a context manager.

    Args:
        with_socket: whether there will be a socket in it, whose path can't be long.

    Attributes:
        path: where it is, or will be.
        shared_memory: what the names of its server's shared memory begin with.
    """

    def __init__(self, with_socket: bool = False) -> None:
        # Named before it is made: Ctrl-C within mkdtemp would leave a folder that nobody knows.
        self._token = secrets.token_hex(6)
        self.path = plain_folder(60 if with_socket else 4000) / f"{_PREFIX}{self._token}"
        self.shared_memory = _shared_memory(self._token)
        self._lock: int | None = None

    def __enter__(self) -> Path:
        self.make()
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()

    def make(self) -> None:
        """Make it, and remove those whose owner was killed."""
        for path in self.path.parent.glob(f"{_PREFIX}*"):
            _remove_if_left(path)
        while True:
            self.path.mkdir(mode=0o700)
            # Until it is locked, another server may take it for one that was left.
            with contextlib.suppress(FileNotFoundError):
                self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                if self.path.exists():
                    return
                os.close(self._lock)

    def remove(self) -> None:
        """Remove it, and the shared memory of its server; may be called twice."""
        _remove(self.path, self._token)
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


def _shared_memory(token: str) -> str:
    return f"smoothl1_{token}_"


def _remove_if_left(path: Path) -> None:
    """Remove a private folder of this user's that nobody has locked: a lock ends with its owner."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return  # gone, another user's, or none
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_uid == os.geteuid():
            _remove(path, path.name.removeprefix(_PREFIX))
    except BlockingIOError:
        pass  # its server runs
    finally:
        os.close(lock)


def _remove(path: Path, token: str) -> None:
    for region in Path("/dev/shm").glob(f"{_shared_memory(token)}*"):
        region.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
