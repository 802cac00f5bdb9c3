"""`Journal`: which pieces are finished, in a file that survives a kill at any moment.

The first line says that it is a journal, the second what is scored, into which unfinished file, and
what the files of the data look like. Each further line is a finished piece. A line begins with the
CRC-32 of the rest, and is on the disk before the piece counts as finished. A line that was cut off
by a kill is dropped: its piece is done again.

The file itself is locked, so that one process works with it, and nothing is made beside it (as
sqlite3 would make a journal of its own).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import zlib
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import platformdirs

from .._files import token
from ..errors import InvalidInputError, OutputError, reason_of
from ._engine import PieceResult, checksums
from ._partial import Partial
from ._scorer import Job
from ._shards import Plan, Shard

_KIND = "smoothl1-deploy score 3"
_AGAIN = "start again with --restart"


def default_journal(request: Mapping[str, Any]) -> Path:
    """The journal of a request in the user's cache folder: the same request finds it again.

    Raises:
        OutputError: where there can't be one.
    """
    key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:32]
    folder = platformdirs.user_cache_path("smoothl1-deploy") / "score"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(0, "it can't be written")
    except OSError as exc:
        raise OutputError(
            f"can't make the folder {folder} ({exc.strerror}), so an interrupted run begins again; "
            "give another place for the journal with --journal"
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
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _identity(path: Path) -> list[int]:
    """What changes when a file does; the change time can't be set back by a user."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _locked(path: Path) -> FileIO:
    """The file, made where there is none, and locked as long as it is open.

    Raises:
        OutputError: where that can't be.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OutputError(
                f"can't write the journal {path}: it is a folder, a pipe or a device; give a file "
                "with --journal"
            )
        file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), path.stat())
            if not there:  # whoever had locked it has just removed it
                raise BlockingIOError
        except BaseException:
            file.close()
            raise
        return file
    except BlockingIOError:
        raise OutputError(
            f"another process works with the journal {path}; wait for it, or give another place "
            "with --journal"
        ) from None
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        if isinstance(exc, OutputError):
            raise
        raise OutputError(
            f"can't write the journal {path} ({reason_of(exc)}); give another place with --journal"
        ) from exc


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
        part: what `files.unfinished` tells the file of the scores by, as long as it is unfinished.

    Raises:
        InvalidInputError: when the files have changed since, or it is another run's journal, or no
            journal at all.
        OutputError: when it can't be written, or another process works with it.
    """

    def __init__(
        self, path: Path, job: Job, plan: Plan, output: Path | None = None, restart: bool = False
    ) -> None:
        self.path = path
        self.done: dict[int, Partial] = {}
        self.part = token()
        self._plan = plan
        self._run = {
            **job.to_dict(),
            "output": None if output is None else str(output.absolute()),
            **{f"shard {shard.name}": shard.to_dict() for shard in plan.shards},
            "batch": plan.pieces[0].batch if plan.pieces else 0,
            "number of pieces": len(plan.pieces),
        }
        places = [place for shard in plan.shards for place in shard.files.values()]
        self._files = {str(place.path.absolute()): _identity(place.path) for place in places}
        self._ours = False  # and so may be removed
        self._file = _locked(path)
        try:
            self._open(restart)
        except BaseException:
            self.close()
            raise

    def _open(self, restart: bool) -> None:
        data = self._file.readall()
        lines = data.splitlines(keepends=True)
        begun = _line({"kind": _KIND}).startswith(data)  # nothing, or cut off by a kill
        kind = "" if begun else str((_fields(lines[0]) or {}).get("kind"))
        # That of another version can be thrown away, but not read.
        if not begun and kind != _KIND and not (restart and kind.startswith(_KIND[:-1])):
            raise InvalidInputError(
                f"{self.path} is not a journal of this version of smoothl1-deploy score; it is "
                "left as it is. Give another place with --journal"
            )
        head = _fields(lines[1]) if kind == _KIND and len(lines) > 1 else None
        if head is not None and re.fullmatch(r"[0-9a-f]{16}", str(head.get("part"))):
            self.part = head["part"]
        if head is None or restart:
            self.forget()
            return
        try:
            self._resume(head, lines)
        except InvalidInputError:
            raise
        except (LookupError, TypeError, ValueError, OverflowError, AttributeError) as exc:
            raise InvalidInputError(
                f"the journal {self.path} makes no sense ({type(exc).__name__}: {exc}), though "
                f"it was written whole; {_AGAIN}"
            ) from exc
        self._ours = True

    def _resume(self, head: Mapping[str, Any], lines: list[bytes]) -> None:
        """Fill `done`, and cut off what a kill has left of a line."""
        run = head["run"]
        for key in [*sorted({*run} - {*self._run}), *self._run]:
            before, now = run.get(key), self._run.get(key)
            if before != now:
                raise InvalidInputError(
                    f"the journal {self.path} is of another run: its {key} was {before}, and is "
                    f"{now}. Restore what it was, or {_AGAIN}"
                )
        kept, sums = len(lines[0]) + len(lines[1]), dict[int, dict[str, int]]()
        for line in lines[2:]:
            fields = _fields(line)
            if fields is None:
                break
            self.done[fields["piece"]] = Partial.from_dict(fields["partial"])
            sums[fields["piece"]] = fields["checksums"]
            kept += len(line)
        if not set(sums) <= set(range(len(self._plan.pieces))):
            raise ValueError("it names a piece that the data don't have")
        self._check_content(head["files"], sums)
        self._file.truncate(kept)

    def _check_content(
        self, before: Mapping[str, list[int]], sums: Mapping[int, dict[str, int]]
    ) -> None:
        """Read again what is finished of the files that look changed, and compare."""
        changed = {path for path, now in self._files.items() if before.get(path) != now}

        def looks_changed(shard: Shard) -> bool:
            return any(str(place.path.absolute()) in changed for place in shard.files.values())

        finished = (self._plan.pieces[index] for index in sorted(sums))
        again = [piece for piece in finished if looks_changed(self._plan.shards[piece.shard])]
        for piece, found in checksums(self._plan, again):
            for role, value in found.items():
                if sums[piece.index][role] != value:
                    raise InvalidInputError(
                        f"{self._plan.shards[piece.shard].files[role]} has changed since the "
                        f"interrupted run scored a part of it (journal {self.path}); restore it, "
                        f"or {_AGAIN}"
                    )

    def add(self, result: PieceResult) -> None:
        """Put a finished piece on the disk.

        Raises:
            InvalidInputError: when a file of the piece has changed while it was scored.
            OutputError: when the disk is full, for instance.
        """
        shard = self._plan.shards[self._plan.pieces[result.piece].shard]
        for place in shard.files.values():
            before = self._files[str(place.path.absolute())]
            if not place.path.exists() or _identity(place.path) != before:
                raise InvalidInputError(f"{place} has changed while it was scored; {_AGAIN}")
        fields = {"partial": result.partial.to_dict(), "checksums": result.checksums}
        self._write({"piece": result.piece, **fields})
        self.done[result.piece] = result.partial

    def _write(self, fields: Mapping[str, Any]) -> None:
        data = _line(fields)
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError as exc:
            raise OutputError(
                f"can't write the journal {self.path}: {exc.strerror}; give another place with "
                "--journal"
            ) from exc

    def forget(self) -> None:
        """Begin anew: there is nothing that could be gone on with."""
        self.done.clear()
        self._ours = True
        self._file.truncate(0)
        self._write({"kind": _KIND})
        self._write({"run": self._run, "part": self.part, "files": self._files})

    def finish(self) -> None:
        """All is done and written: the journal goes."""
        self.done.clear()
        self.close()

    def close(self) -> None:
        """Keep the journal for the next run, where anything is done."""
        if self._ours and not self.done and not self._file.closed:
            with contextlib.suppress(OSError):  # somebody was quicker
                if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
                    os.unlink(os.path.realpath(self.path))
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
