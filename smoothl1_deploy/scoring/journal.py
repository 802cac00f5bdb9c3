"""`Journal`: which pieces are finished, in a file that survives a kill at any moment.

The first line says what is scored and what the files looked like; each further line is a finished
piece. A line begins with the CRC-32 of the rest, and is on the disk before the piece counts as
finished. A line that was cut off by a kill is dropped: its piece is done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import filelock
import platformdirs

from ..artefact import write_atomic
from ..errors import ArtefactError, InvalidInputError, OutputError
from .engine import PieceResult, checksums
from .partial import Partial
from .scorer import Job
from .shards import Plan

__all__ = ["Journal", "default_journal"]

_KIND = "smoothl1-deploy score 1"
_AGAIN = "start again with --restart"


def default_journal(request: Mapping[str, Any]) -> Path:
    """The journal of a request in the user's cache folder: the same request finds it again."""
    key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:32]
    folder = platformdirs.user_cache_path("smoothl1-deploy") / "score"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise OutputError(
            f"can't make the folder {folder} ({exc.strerror}); give another place for the "
            "journal with --journal"
        ) from exc
    return folder / f"{key}.journal"


def _line(fields: Mapping[str, Any]) -> bytes:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _fields(line: bytes) -> dict[str, Any] | None:
    """What a line says; None where it is damaged or cut off."""
    check, _, text = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or check != b"%08x" % zlib.crc32(text):
        return None
    fields: dict[str, Any] = json.loads(text)
    return fields


def _identity(path: Path) -> list[int]:
    """What changes when a file does; the change time can't be set back by a user."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _identities(plan: Plan) -> dict[str, list[int]]:
    paths = {place.path for shard in plan.shards for place in shard.files.values()}
    return {_key(path): _identity(path) for path in sorted(paths)}


def _key(path: Path) -> str:
    return str(path.absolute())


class Journal:
    """The journal of one run; a context manager that holds a lock on it.

    Args:
        path: of the file; made where there is none.
        job: what is computed.
        plan: of which data.
        output: where the scores go, as a part of what is scored; None for nowhere.
        restart: throw away what an earlier run has done.

    Attributes:
        done: index of a finished piece -> what it adds.

    Raises:
        InvalidInputError: when the files have changed since, or it is another run's journal.
        OutputError: when it can't be written, or another process works with it.
    """

    def __init__(
        self, path: Path, job: Job, plan: Plan, output: Path | None = None, restart: bool = False
    ) -> None:
        self.path = path
        self.done: dict[int, Partial] = {}
        self._plan = plan
        self._file: IO[bytes] | None = None
        self._ours = False
        self._before = _identities(plan)
        self._head = {
            "kind": _KIND,
            "job": job.to_dict(),
            "plan": plan.to_dict(),
            "output": None if output is None else str(output.absolute()),
        }
        self._lock = filelock.FileLock(f"{path}.lock")
        try:
            if path.is_dir():
                raise OutputError(
                    f"can't write the journal {path}: it is a folder; give a file with --journal"
                )
            if path.exists() and not path.is_file():
                raise OutputError(  # opened, a pipe would wait for somebody who reads it
                    f"can't write the journal {path}: it is a pipe or a device; give a file with "
                    "--journal"
                )
            self._lock.acquire(blocking=False)
        except filelock.Timeout:
            raise OutputError(
                f"another process works with the journal {path}; wait for it, or give another "
                "place with --journal"
            ) from None
        except OutputError:
            raise
        except OSError as exc:
            raise OutputError(
                f"can't write the journal {path} ({exc.strerror}); give another place with "
                "--journal"
            ) from exc
        try:
            if restart:
                path.unlink(missing_ok=True)
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        lines = [_line({**self._head, "files": self._before})]
        if self.path.exists():
            try:
                lines += self._resume(self.path.read_bytes().splitlines(keepends=True))
            except InvalidInputError:
                raise
            except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as exc:
                raise InvalidInputError(
                    f"the journal {self.path} makes no sense ({type(exc).__name__}: {exc}), though "
                    f"it was written whole; {_AGAIN}"
                ) from exc
        write_atomic(self.path, b"".join(lines))
        self._file = self.path.open("ab")
        self._ours = True

    def _resume(self, lines: list[bytes]) -> list[bytes]:
        """The lines that hold still; fills `done`."""
        head = _fields(lines[0]) if lines else None
        if head is None or head.get("kind") != _KIND:
            raise InvalidInputError(
                f"{self.path} is not a journal of this version of smoothl1-deploy score; it is "
                "left as it is. Give another place with --journal"
            )
        for part in ("job", "plan", "output"):
            if head[part] != self._head[part]:
                raise InvalidInputError(
                    f"the journal {self.path} is of another run: {_difference(head, self._head)}. "
                    f"Restore what it was, or {_AGAIN}"
                )
        kept, sums = list[bytes](), dict[int, dict[str, int]]()
        for line in lines[1:]:
            fields = _fields(line)
            if fields is None:
                break
            try:
                self.done[fields["piece"]] = Partial.from_dict(fields["partial"])
            except ArtefactError:
                break
            sums[fields["piece"]] = fields["checksums"]
            kept.append(line)
        if not set(sums) <= set(range(len(self._plan.pieces))):
            raise ValueError("it names a piece that the data don't have")
        self._check_content(head["files"], sums)
        return kept

    def _check_content(
        self, before: Mapping[str, list[int]], sums: Mapping[int, dict[str, int]]
    ) -> None:
        """Read again what is finished of the files that look changed, and compare."""
        changed = {path for path, identity in self._before.items() if before[path] != identity}
        again = [
            self._plan.pieces[index]
            for index in sorted(sums)
            if any(
                _key(place.path) in changed
                for place in self._plan.shards[self._plan.pieces[index].shard].files.values()
            )
        ]
        for piece, found in checksums(self._plan, again):
            shard = self._plan.shards[piece.shard]
            for role, value in found.items():
                if sums[piece.index][role] != value:
                    raise InvalidInputError(
                        f"{shard.files[role]} has changed since the interrupted run scored a part "
                        f"of it (journal {self.path}); restore it, or {_AGAIN}"
                    )

    def add(self, result: PieceResult) -> None:
        """Put a finished piece on the disk.

        Raises:
            InvalidInputError: when a file of the piece has changed while it was scored.
            OutputError: when the disk is full, for instance.
        """
        assert self._file is not None
        shard = self._plan.shards[self._plan.pieces[result.piece].shard]
        for place in shard.files.values():
            before = self._before[_key(place.path)]
            if not place.path.exists() or _identity(place.path) != before:
                raise InvalidInputError(f"{place} has changed while it was scored; {_AGAIN}")
        fields = {
            "piece": result.piece,
            "partial": result.partial.to_dict(),
            "checksums": result.checksums,
        }
        try:
            self._file.write(_line(fields))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as exc:
            raise OutputError(f"can't write the journal {self.path}: {exc.strerror}") from exc
        self.done[result.piece] = result.partial

    def forget(self) -> None:
        """Drop what earlier runs have done: their scores are gone."""
        self.done.clear()
        self.close_file()
        write_atomic(self.path, _line({**self._head, "files": self._before}))
        self._file = self.path.open("ab")

    def close_file(self) -> None:
        """Keep the journal, and the lock."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self) -> None:
        """All is done and written: the journal goes."""
        self.close_file()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Keep the journal for the next run, where anything is done."""
        self.close_file()
        if self._ours and not self.done:
            self.path.unlink(missing_ok=True)
        if not self.path.exists():
            with contextlib.suppress(OSError):
                os.unlink(self._lock.lock_file)
        self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Where two heads differ first, in words."""
    for key in ("spec", "beta", "backend", "model"):
        if before["job"][key] != now["job"][key]:
            return f"its {key} was {before['job'][key]}, and is {now['job'][key]}"
    if before["output"] != now["output"]:
        return f"its scores go to {before['output']}"
    old, new = (
        {shard["name"]: shard for shard in head["plan"]["shards"]} for head in (before, now)
    )
    for name in sorted({*old, *new}):
        if name not in new or name not in old:
            return f"the shard {name} was {'added' if name in new else 'removed'}"
        if old[name] != new[name]:
            return f"the shard {name} was {old[name]}, and is {new[name]}"
    return "its batches had another size"
