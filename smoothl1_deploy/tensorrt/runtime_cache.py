"""The runtime cache of `tensorrt_rtx`: kernels compiled for this GPU, kept between processes.

An engine of `tensorrt_rtx` holds no kernels for the GPU at hand: they are compiled when an
execution context first meets a shape. Written against the names and docstrings of 1.7.1, tested
with a fake made of them; no GPU has run this module yet.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import filelock

from ..artefact import write_atomic
from ..errors import OutputError

__all__ = ["RuntimeCache"]


class RuntimeCache:
    """The compiled kernels of one engine, in a file that many processes may share.

    Args:
        path: of the file; made with its folder when there is something to keep. The runtime
            itself checks that what it reads fits the GPU, the driver and the version.

    Attributes:
        loaded: whether the runtime took what the file held.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.loaded = False
        self._cache: Any = None
        self._saved = b""
        self._guard = threading.Lock()

    def attach(self, config: Any) -> None:
        """Give a runtime configuration a cache, filled from the file where that fits."""
        self._cache = config.create_runtime_cache()
        content = self._read()
        if content:
            self.loaded = bool(self._cache.deserialize(content))
            self._saved = content if self.loaded else b""
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write what was compiled since, if anything; of two processes the last one to write wins.

        Raises:
            OutputError: when the file can't be written.
        """
        with self._guard:
            content = bytes(self._cache.serialize())
            if content == self._saved:
                return
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self._lock():
                    write_atomic(self.path, content)
            except OSError as exc:
                if isinstance(exc, OutputError):
                    raise
                raise OutputError(
                    f"can't keep compiled kernels in {self.path} ({exc.strerror or exc}); choose a "
                    "folder that you may write to, or run without a runtime cache"
                ) from exc
            self._saved = content

    def _lock(self) -> filelock.BaseFileLock:
        return filelock.FileLock(self.path.with_name(self.path.name + ".lock"))

    def _read(self) -> bytes:
        if not self.path.is_file():
            return b""
        try:
            with self._lock():
                return self.path.read_bytes()
        except OSError:  # what can't be read is compiled again
            return b""
