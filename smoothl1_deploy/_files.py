"""The one place that writes files: whole or not at all; the standard library alone.

* A link is followed, and stays a link. A file that is replaced keeps its permissions.
* What is no file (a pipe, a terminal, `/dev/stdout`) is written to, and never replaced.
* Folders that are missing on the way to a file are made, and go again where it is not written.
* An unfinished file stands beside its target under a name that nobody can guess and that is no
  longer than 114 bytes. It is made anew: nothing that somebody planted there is opened.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import OutputError, reason_of

#: The open files of this process that were written to as files, 1 for stdout.
descriptors_written: set[int] = set()


def write_atomic(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write beside the target, then rename: the file is there whole, or as it was before.

    Raises:
        OutputError: when it can't be written, and for a folder or a disk.
    """
    with replacing(path) as file:
        file.write(data)
    return Path(path)


@contextlib.contextmanager
def refusal_told(problem: str, remedy: str) -> Iterator[None]:
    """What the system refuses within, told as one sentence with its reason in the middle.

    Raises:
        OutputError: in place of OSError, and of the ValueError of a name that no file can have.
    """
    try:
        yield
    except (OutputError, BrokenPipeError):  # told already; whoever read it has stopped
        raise
    except (OSError, ValueError) as exc:
        raise OutputError(f"{problem}: {reason_of(exc)}; {remedy}") from exc


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` when the block ends without an error.

    Raises:
        OutputError: as `write_atomic`.
    """
    path = Path(path)
    with _refusal_of(path):
        target = resolve(path)
        if target is None:
            with _stream(path) as file:
                yield file
            return
        part = unfinished(target)
        with folders_made(target.parent):
            handle = create(part, target)
            try:
                with open(handle, "wb") as file:
                    yield file
                put(part, target)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(part)
                raise


def _refusal_of(path: Path) -> contextlib.AbstractContextManager[None]:
    return refusal_told(f"can't write {path}", "choose a file in a folder that you may write to")


class _TriedError(Exception):
    """Ends the trial of a file."""


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a file that can't be written, before the work whose result it is to hold.

    An unfinished one is made and removed, so that the system itself says what it refuses.

    Raises:
        OutputError: as `write_atomic`.
    """
    path = Path(path)
    with _refusal_of(path):
        if resolve(path) is None:  # whoever reads a pipe would take the trial for its end
            return
    with contextlib.suppress(_TriedError), replacing(path):
        raise _TriedError


@contextlib.contextmanager
def folders_made(folder: Path) -> Iterator[None]:
    """The folder and those above it are there within; what was made and is empty then goes again.

    Raises:
        OSError: when one can't be made.
    """
    made = [each for each in (folder, *folder.parents) if not os.path.exists(each)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()


def make_folder(folder: Path, option: str = "-o") -> Path:
    """The folder, made with those above it where they are missing.

    Args:
        folder: to write into.
        option: of the command line, by which the user chooses another.

    Raises:
        OutputError: when it can't be made.
    """
    with refusal_told(f"can't make the folder {folder}", f"choose another with {option}"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def resolve(path: Path) -> Path | None:
    """The file that `path` leads to, whether it is there or not; None where it is no file.

    Raises:
        OSError: where there is no way to it. Of links that others left in a folder like /tmp, this
            is the kernel's decision (fs.protected_symlinks), so it is asked first.
        OutputError: for a folder and for a disk.
    """
    there = _status(path)
    if there is None:
        return Path(os.path.realpath(path))
    mode = there.st_mode
    if stat.S_ISDIR(mode) or stat.S_ISBLK(mode):
        raise OutputError(f"can't write {path}: it is a folder or a disk; choose a file")
    if not stat.S_ISREG(mode) or _descriptor(path) is not None:
        return None
    os.close(os.open(path, os.O_WRONLY))  # a rename would replace what may not be written
    return Path(os.path.realpath(path))


def _descriptor(path: Path) -> int | None:
    """The open file of this process that `path` stands for, as /dev/stdout does; None without."""
    own = os.path.realpath("/proc/self/fd")
    for _ in range(40):  # links in a row: as many as Linux follows
        folder = os.path.realpath(path.parent)
        if folder == own and path.name.isdigit():
            return int(path.name)
        try:
            path = Path(folder, os.readlink(path))
        except OSError:
            return None
    return None


@contextlib.contextmanager
def _stream(path: Path) -> Iterator[BinaryIO]:
    number = _descriptor(path)
    # Opened by its path, a file that the shell put behind stdout would be written from its start.
    if number is None:
        handle = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
    else:
        handle = os.dup(number)
        descriptors_written.add(number)
    with open(handle, "wb") as file:
        yield file


def token() -> str:
    """What makes the name of an unfinished file one that nobody can guess."""
    return secrets.token_hex(8)


def unfinished(target: Path, mark: str | None = None) -> Path:
    """Where the file stands that becomes `target`; its name is shorter than any limit."""
    return target.with_name(f".{target.name[:24]}.{mark or token()}")


def is_unfinished(name: str) -> bool:
    """Whether a name is one of `unfinished`."""
    return bool(re.fullmatch(r"\..*\.[0-9a-f]{16}", name, re.DOTALL))


def create(part: Path, target: Path) -> int:
    """A descriptor of a new file, with the permissions and the owner of what is at `target`.

    Not tempfile's: its files are for the owner alone, and to learn the umask one has to change it,
    which two threads must not do at once. open() applies it by itself.
    """
    there = _status(target)
    mode = 0o666 if there is None else there.st_mode & 0o777
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(part, flags, mode)
    _adopt(handle, there)
    return handle


def _status(path: Path) -> os.stat_result | None:
    with contextlib.suppress(FileNotFoundError):
        return os.stat(path)
    return None


def _adopt(handle: int, there: os.stat_result | None) -> None:
    if there is None:
        return
    with contextlib.suppress(OSError):  # the owner may be another, whom only root can name
        os.fchown(handle, there.st_uid, there.st_gid)
    os.fchmod(handle, there.st_mode & 0o777)


def put(part: Path, path: Path) -> None:
    """Move a finished file to where `path` leads, or copy it into what is no file."""
    with open(part, "rb") as file:
        target = resolve(path)
        if target is None:
            with _stream(path) as stream:
                shutil.copyfileobj(file, stream)
            os.unlink(part)
            return
        _adopt(file.fileno(), _status(target))
        os.fsync(file.fileno())
    os.replace(part, target)


def check_apart(
    written: Iterable[tuple[str, Path | None]], read: Iterable[tuple[str, Path | None]]
) -> None:
    """Refuse to write a file that is also read, or is to be written twice, under whatever name.

    Args:
        written: pairs of an option and its file; None where the option wasn't given.
        read: likewise.

    Raises:
        OutputError: naming both options.
    """
    there = [(option, path) for option, path in read if path is not None]
    for option, path in written:
        if path is None:
            continue
        for other, old in there:
            if is_same(path, old):
                raise OutputError(
                    f"{option} {path} and {other} {old} are one file, which is left as it is; name "
                    f"another one with {option}"
                )
        there.append((option, path))


def is_same(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to one file, be it there yet or not."""
    try:
        there = os.path.exists(a) and os.path.exists(b)
        return os.path.samefile(a, b) if there else os.path.realpath(a) == os.path.realpath(b)
    except (OSError, ValueError):  # a name that no file can have
        return False


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
