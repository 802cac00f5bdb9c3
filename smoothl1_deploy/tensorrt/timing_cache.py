"""The timing cache of `tensorrt`: measured kernel timings, in a file shared by many builds.

Written against the attribute names of tensorrt 10.0 to 11.4, tested with a fake made of them;
`tensorrt_rtx` measures nothing when it builds and has no use for one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import filelock

from ..artefact import write_atomic
from ..errors import OutputError, reason_of
from ..files import read_file
from .flavour import Flavour

__all__ = ["attach_timing_cache", "save_timing_cache"]


def attach_timing_cache(config: Any, path: str | None, flavour: Flavour) -> str | None:
    """Give the build the timings in `path`, or an empty cache where there are none that fit.

    Returns:
        A note for the sidecar where the file was of no use, else None.
    """
    if path is None:
        return None
    content = _read(Path(path))
    with flavour.capture() as log:
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return None
        # Of another GPU or version, or damaged: measure anew, and let `save` replace the file.
        config.set_timing_cache(config.create_timing_cache(b""), False)
        return f"the timing cache {path} was not used: {log.reason()}"


def save_timing_cache(config: Any, path: str | None) -> None:
    """Write what the build measured, together with what other builds added in the meantime.

    Raises:
        OutputError: when the file can't be written.
    """
    if path is None:
        return
    cache = config.get_timing_cache()
    target = Path(path)
    try:
        with filelock.FileLock(target.with_name(target.name + ".lock")):
            content = _read(target)
            others = config.create_timing_cache(content) if content else None
            if others is not None:
                cache.combine(others, False)  # false where they are of another GPU: ours stay
            write_atomic(target, bytes(cache.serialize()))
    except (OSError, ValueError) as exc:
        if isinstance(exc, OutputError):
            raise
        raise OutputError(f"can't lock the timing cache {path}: {reason_of(exc)}") from exc


def _read(path: Path) -> bytes:
    try:
        return read_file(path)
    except FileNotFoundError:
        return b""
    except (OSError, ValueError) as exc:
        raise OutputError(f"can't read the timing cache {path}: {reason_of(exc)}") from exc
