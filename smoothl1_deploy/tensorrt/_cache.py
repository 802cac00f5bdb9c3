"""`EngineCache`: engines by the hash of everything they depend on.

    <root>/engines/<key>.engine, <key>.engine.json     written by `write_engine`
    <root>/locks/<key>.lock                            held while the key is built or removed

The time of last use is the engine file's modification time.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import filelock
import platformdirs

from .._artefact import sidecar_path
from .._files import is_unfinished, refusal_told
from .._records import Record
from ..errors import ArtefactError, OutputError, SpecError
from ._engine import BuildKey, Engine, Sidecar, read_verified, write_engine

_ABANDONED = 3600  # seconds after which an unfinished file has no writer any more


def default_cache_dir() -> Path:
    """The folder for engines in the user's cache folder."""
    return platformdirs.user_cache_path("smoothl1-deploy") / "engines"


def is_cache(folder: Path) -> bool:
    """Whether `folder` is one that an `EngineCache` made."""
    return all(os.path.isdir(folder / name) for name in ("engines", "locks"))


@dataclass(frozen=True, slots=True)
class CacheEntry(Record):
    """An engine in the cache.

    Attributes:
        key: hex digest, the name of the engine.
        bytes: the size of the engine and its sidecar.
        last_used: when it was built or last taken, in seconds since the epoch.
        sidecar: None for a damaged entry.
    """

    key: str
    path: Path
    bytes: int
    last_used: float
    sidecar: Sidecar | None


class EngineCache:
    """A folder of engines, safe for many threads and processes.

    Args:
        root: the folder; made when missing. Default: `default_cache_dir()`.
        max_bytes: what the engines may take together; the least recently used go first.

    Raises:
        OutputError: when the folder can't be made.
        SpecError: for a size that is no number of bytes.
    """

    def __init__(self, root: str | Path | None = None, max_bytes: int = 1 << 30) -> None:
        self.root = default_cache_dir() if root is None else Path(root)
        self.max_bytes = _size(max_bytes)
        self._engines, self._locks = self.root / "engines", self.root / "locks"
        self._make_folders()

    def _make_folders(self) -> None:
        remedy = "choose a folder that you may write to, or build without a cache"
        with refusal_told(f"can't use {self.root} as an engine cache", remedy):
            for folder in (self._engines, self._locks):
                folder.mkdir(parents=True, exist_ok=True)

    def path(self, key: BuildKey) -> Path:
        """Where the engine of `key` stands, or would."""
        return self._engines / f"{key.digest}.engine"

    def get(self, key: BuildKey) -> Engine | None:
        """The engine of `key`, None where there is none or what there is is damaged."""
        path = self.path(key)
        try:
            engine = read_verified(path)
        except ArtefactError:
            return None
        if engine.sidecar.key.digest != key.digest:
            return None  # the engine is sound, and stands under a false name
        with contextlib.suppress(OSError):  # it was pruned since, and its bytes are in memory
            os.utime(path)
        return replace(engine, cached=True)

    def get_or_build(self, key: BuildKey, build: Callable[[], tuple[bytes, Sidecar]]) -> Engine:
        """The engine of `key`, built by `build` where the cache has none.

        Of all threads and processes that ask for one key at a time, one builds; the others wait
        and take its engine.
        """
        if found := self.get(key):
            return found
        path = self.path(key)
        with self._locked(key.digest):
            if found := self.get(key):
                return found
            damaged, near = path.exists(), self.nearest(key)
            data, sidecar = build()
            self._make_folders()  # somebody may have emptied the user's cache folder
            write_engine(path, data, sidecar)
        with contextlib.suppress(OutputError):  # the engine is there; the next prune tries again
            self.prune(self.max_bytes, keep=key.digest)
        changed = () if near is None else key.changes(near.key)
        if damaged:
            changed = ("the cached engine was damaged",)
        return Engine(path, sidecar, data, changed=changed)

    def nearest(self, key: BuildKey) -> Sidecar | None:
        """The entry for the same graph name whose key differs least; the latest of equals."""
        sidecars = (entry.sidecar for entry in self.list() if entry.sidecar is not None)
        return min(
            (sidecar for sidecar in sidecars if sidecar.graph_name == key.graph_name),
            key=lambda sidecar: len(key.changes(sidecar.key)),
            default=None,
        )

    def list(self) -> tuple[CacheEntry, ...]:
        """All entries, the most recently used first."""
        entries = []
        for path in self._engines.glob("*.engine"):
            try:
                stat = path.stat()
            except OSError:  # another process has pruned it since
                continue
            sidecar, size = None, stat.st_size
            with contextlib.suppress(OSError):
                size += sidecar_path(path).stat().st_size
            with contextlib.suppress(ArtefactError):
                sidecar = Sidecar.read(sidecar_path(path))
            entries.append(CacheEntry(path.stem, path, size, stat.st_mtime, sidecar))
        return tuple(sorted(entries, key=lambda entry: (-entry.last_used, entry.key)))

    def prune(self, max_bytes: int, *, keep: str | None = None) -> tuple[CacheEntry, ...]:
        """Remove the least recently used entries until the rest takes at most `max_bytes`.

        Entries that are being built are left alone, and so is the one whose key is `keep`.

        Returns:
            What was removed.

        Raises:
            SpecError: for a size that is no number of bytes.
            OutputError: when an entry can't be removed.
        """
        self._sweep()
        entries = self.list()
        excess = sum(entry.bytes for entry in entries) - _size(max_bytes)
        removed = []
        for entry in reversed(entries):
            if excess <= 0 or entry.key == keep:
                continue
            with contextlib.suppress(filelock.Timeout), self._locked(entry.key, timeout=0):
                with refusal_told(f"can't remove {entry.path}", "see who may write to its folder"):
                    # The sidecar first: an engine without one is never taken for sound.
                    sidecar_path(entry.path).unlink(missing_ok=True)
                    entry.path.unlink(missing_ok=True)
                excess -= entry.bytes
                removed.append(entry)
        return tuple(removed)

    def _sweep(self) -> None:
        """Remove the unfinished files of writers that died."""
        for path in self._engines.glob(".*"):
            with contextlib.suppress(OSError):  # its writer, or another sweep, was quicker
                old = time.time() - path.stat().st_mtime > _ABANDONED
                if old and is_unfinished(path.name):
                    path.unlink()

    @contextlib.contextmanager
    def _locked(self, name: str, timeout: float = -1) -> Iterator[None]:
        """Hold the lock of `name` against threads and processes.

        Raises:
            filelock.Timeout: after `timeout` seconds, of which -1 is no end.
        """
        # Each caller has a lock object of its own, so that threads exclude one another too.
        lock = filelock.FileLock(self._locks / f"{name}.lock", timeout)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise
        except OSError as exc:
            raise OutputError(f"can't lock {lock.lock_file}: {exc.strerror or exc}") from exc
        try:
            yield
        finally:
            lock.release()


def _size(max_bytes: object) -> int:
    if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 0:
        raise SpecError(f"max_bytes must be a number of bytes >= 0, got {max_bytes!r}")
    return max_bytes
