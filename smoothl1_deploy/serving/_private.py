"""What a Triton sees: a private folder, and in it a mirror of a repository, under plain names.

Triton's Python backend hands paths to a shell, unquoted: a folder called `$(command)` would run the
command, and a folder with a space is never found. So no path of the user's reaches it. And since
the mirror is made of links, a model is loaded anew, or a version withheld, by files alone: nobody
needs to be let in over the network for that.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shlex
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..errors import ArtefactError, OutputError, reason_of
from ._config import CONFIG_FILE, read_config

#: The beginning of a private folder's name. Older versions of this package used another, since
#: their folders have no lock, and would look as if nobody used them.
_PREFIX = "smoothl1-deploy-triton-"

#: A file of ours in a model's folder; Triton loads a model anew when its time changes.
_ANEW = ".load-anew"

#: The files of one version: what changes when they do.
Stamp = tuple[tuple[str, int, int, int], ...]


def is_plain(text: str) -> bool:
    """Whether a shell takes a text for one word that stands for itself."""
    return shlex.quote(text) == text


def _plain_folder(longest: int) -> Path:
    """The folder for temporary files, or else another one whose path is plain.

    Raises:
        OutputError: where no such path has `longest` characters at most.
    """
    for folder in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
        # A colon would split a list of paths.
        plain = is_plain(folder) and ":" not in folder and len(folder) <= longest
        if plain and os.access(folder, os.W_OK | os.X_OK):
            return Path(folder)
    raise OutputError(
        f"the server needs a folder for temporary files with a plain, short path, and "
        f"{tempfile.gettempdir()} has none; set TMPDIR to one"
    )


class PrivateFolder:
    """A folder that no other user can enter, made by `make` or as a context manager.

    Args:
        with_socket: whether it will hold a socket, whose path can't be long.

    Attributes:
        path: the path of the folder, before it is made too.
        shared_memory: what the names of its server's shared memory begin with.
    """

    def __init__(self, with_socket: bool = False) -> None:
        # It has its name before it is made: Ctrl-C within mkdtemp would leave a folder that nobody
        # knows.
        name = f"{_PREFIX}{secrets.token_hex(6)}"
        self.path = _plain_folder(60 if with_socket else 4000) / name
        self.shared_memory = _shared_memory(self.path)
        self._lock: int | None = None

    def __enter__(self) -> Path:
        self.make()
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()

    def make(self) -> None:
        """Make the folder, and remove the private folders whose owners were killed."""
        for path in self.path.parent.glob(f"{_PREFIX}*"):
            _remove_if_left(path)
        while True:
            self.path.mkdir(mode=0o700)
            # Until the folder is locked, another server may take it for one that was left.
            with contextlib.suppress(FileNotFoundError):
                self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                if self.path.exists():
                    return
                os.close(self._lock)

    def remove(self) -> None:
        """Remove the folder and the shared memory of its server; it may be called twice."""
        _remove(self.path)
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


def _shared_memory(folder: Path) -> str:
    return f"smoothl1_{folder.name.removeprefix(_PREFIX)}_"


def _remove_if_left(path: Path) -> None:
    """Remove a private folder of this user that nobody has locked: a lock ends with its owner."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return  # the folder is gone or another user's, or it is no folder
    try:
        with contextlib.suppress(BlockingIOError):  # its server runs
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_uid == os.geteuid():
                _remove(path)
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    for region in Path("/dev/shm").glob(f"{_shared_memory(path)}*"):
        region.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


# The models of a repository


def models_of(
    repository: Path, chosen: Iterable[str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """The models of a repository that a server may be shown, and why it may not see the others.

    Args:
        repository: the folder of the models.
        chosen: the names of the models to show; all by default.

    Raises:
        ArtefactError: when there is no model, or a chosen one can't be shown.
    """
    found = sorted(path.parent.name for path in repository.glob(f"[!.]*/{CONFIG_FILE}"))
    names = found if chosen is None else list(chosen)
    for name in names:
        if name not in found:
            raise ArtefactError(
                f"{repository} has no model {name!r}; it has {', '.join(found) or 'none'}"
            )
    if not names:
        raise ArtefactError(
            f"{repository} has no folder with a {CONFIG_FILE}; smoothl1-deploy repository writes "
            "a model repository"
        )
    left_out = {}
    if chosen is None:
        folders = (path.name for path in repository.glob("[!.]*") if path.is_dir())
        reason = (
            f"it has no {CONFIG_FILE}; smoothl1-deploy repository --lint {repository} says what a "
            "model needs"
        )
        left_out = dict.fromkeys(sorted({*folders} - {*found}), reason)
    for name in names:
        if reason := _why_not(repository / name):
            left_out[name] = reason
    shown = [name for name in names if name not in left_out]
    if not shown or (chosen is not None and left_out):
        raise ArtefactError(
            "; ".join(f"{name} is left out: {reason}" for name, reason in left_out.items())
        )
    return shown, left_out


def _why_not(folder: Path) -> str:
    """Why a server must not see the model of a folder; empty where it may."""
    try:
        config = read_config((folder / CONFIG_FILE).read_bytes())
    except (ArtefactError, OSError) as exc:
        return f"can't read {folder / CONFIG_FILE}: {reason_of(exc)}"
    # These are what the Python backend puts into its command line, beside paths.
    words = [folder.name, config.default_model_filename, *config.cc_model_filenames.values()]
    for word in (*words, *(group.name for group in config.instance_group)):
        if not is_plain(word or "empty"):
            return f"Triton would give the name {word!r} to a shell; use letters, digits, - . and _"
    return ""


class Mirror:
    """The mirror of one repository.

    Args:
        repository: the folder of the real models, which is only read.
        folder: the folder of the mirror, which is made.
        models: the names of the models to show.
    """

    def __init__(self, repository: Path, folder: Path, models: Iterable[str]) -> None:
        self.folder = folder
        self._repository = repository
        self._models = {*models}
        self._withheld: dict[tuple[str, str], Stamp] = {}
        folder.mkdir()
        for name in self._models:
            (folder / name).mkdir()
            self.touch(name)
        self.update()

    def update(self) -> None:
        """Show what has come to the models, and the withheld versions whose files have changed."""
        for (name, version), stamp in list(self._withheld.items()):
            if self.stamp(name, version) != stamp:
                del self._withheld[name, version]
        for name in self._models:
            mirrored = self.folder / name
            with contextlib.suppress(OSError):  # the user may change the model at this moment
                wanted = {
                    entry.name: entry
                    for entry in (self._repository / name).glob("[!.]*")
                    if (name, entry.name) not in self._withheld
                }
                there = {*os.listdir(mirrored)} - {_ANEW}
                for old in there - wanted.keys():
                    (mirrored / old).unlink()
                for new in wanted.keys() - there:
                    (mirrored / new).symlink_to(wanted[new])

    def withhold(self, name: str, version: str) -> bool:
        """Take a version out of sight until its files change.

        Returns:
            False where the model has no other version: then this one stays.
        """
        others = [path for path in (self.folder / name).glob("[1-9]*") if path.name != version]
        if others:
            self._withheld[name, version] = self.stamp(name, version)
            self.update()
        return bool(others)

    def withholds(self, name: str, version: str) -> bool:
        """Whether a version is out of sight."""
        return (name, version) in self._withheld

    def touch(self, name: str) -> None:
        """Have a model loaded anew."""
        (self.folder / name / _ANEW).touch()

    def drop(self, name: str) -> None:
        """Show a model no more."""
        self._models.remove(name)
        for entry in (self.folder / name).iterdir():
            entry.unlink()
        (self.folder / name).rmdir()

    def stamp(self, name: str, version: str) -> Stamp:
        """The names, times and sizes of the files of a version."""
        folder = self._repository / name / version
        found = []
        for path in sorted(folder.rglob("*")):
            with contextlib.suppress(OSError):  # the file may be removed meanwhile
                status = path.stat()
                found.append((str(path), status.st_ino, status.st_mtime_ns, status.st_size))
        return tuple(found)
