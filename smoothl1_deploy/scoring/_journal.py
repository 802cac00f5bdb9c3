"""`Journal`: which tasks are finished, in a file that survives a kill at any moment.

The first line says that it is a journal, the second what is scored, into which unfinished file, and
what the files of the data look like. Each further line is a finished task. A line begins with the
CRC-32 of the rest, and is on the disk before the task counts as finished. A line that was cut off
by a kill is dropped: its task is done again.

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

from .._files import make_folder, refusal_told, token
from ..errors import InvalidInputError, OutputError
from ._partial import Partial
from ._scorer import Job, TaskResult, checksums
from ._shards import Plan, Shard

_KIND = "smoothl1-deploy score 4"
_ELSEWHERE = "give another place with --journal"
_AGAIN = "start again with --restart"


def default_journal(job: Job, plan: Plan, output: Path | None, batch: int | None) -> Path:
    """The journal of a request in the user's cache folder.

    The same request finds it again, whatever stands in the files of the data by then.

    Raises:
        OutputError: where there can't be one.
    """
    of_folders = len(plan.shards) > 1
    data = {
        role: [str((at.path.parent if of_folders else at.path).absolute()), at.name]
        for shard in plan.shards[:1]
        for role, at in shard.files.items()
    }
    request = {"job": job.to_dict(), "data": data, "output": _absolute(output), "batch": batch}
    key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:32]
    folder = make_folder(platformdirs.user_cache_path("smoothl1-deploy") / "score", "--journal")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"can't write into the folder {folder}; {_ELSEWHERE}")
    return folder / f"{key}.journal"


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _line(fields: Mapping[str, Any]) -> bytes:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _fields(line: bytes) -> dict[str, Any] | None:
    """What a line says; None where it is damaged or cut off."""
    check, _, text = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or check != b"%08x" % zlib.crc32(text):
        return None
    with contextlib.suppress(ValueError, RecursionError):
        fields = json.loads(text)
        return fields if isinstance(fields, dict) else None
    return None


def _paths(shard: Shard) -> list[str]:
    return [str(location.path.absolute()) for location in shard.files.values()]


def _identity(path: str) -> list[int]:
    """What changes when a file does; the change time can't be set back by a user."""
    with contextlib.suppress(OSError):  # it is gone
        stat = os.stat(path)
        return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    return []


def _locked(path: Path) -> FileIO:
    """The file, made where there is none, and locked as long as it is open.

    Raises:
        OutputError: where that can't be.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OutputError(
            f"can't write the journal {path}: it is a folder, a pipe or a device; give a file with "
            "--journal"
        )
    with refusal_told(f"can't write the journal {path}", _ELSEWHERE), contextlib.ExitStack() as own:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        file = own.enter_context(FileIO(handle, "r+"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had locked it may just have removed it.
            free = os.path.exists(path) and os.path.samestat(os.fstat(handle), path.stat())
        except BlockingIOError:
            free = False
        if not free:
            raise OutputError(
                f"another process works with the journal {path}; wait for it, or {_ELSEWHERE}"
            )
        own.pop_all()
        return file


class Journal:
    """The journal of one run; a context manager that holds a lock on it.

    Args:
        path: the file; it is made where there is none.
        job: what is computed.
        plan: of which data, in which tasks.
        output: where the scores go, as a part of what is scored; None for nowhere.
        restart: throw away what an earlier run has done.

    Attributes:
        done: index of a finished task -> what it adds.
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
            "output": _absolute(output),
            **{f"shard {shard.name}": shard.to_dict() for shard in plan.shards},
            "batch": plan.tasks[0].batch if plan.tasks else 0,
            "number of tasks": len(plan.tasks),
        }
        self._files = {p: _identity(p) for shard in plan.shards for p in _paths(shard)}
        self._ours = False  # whether the file is a journal of this run, which may be removed
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
        # A journal of another version can be thrown away, but not read.
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
            self.done[fields["task"]] = Partial.from_dict(fields["partial"])
            sums[fields["task"]] = fields["checksums"]
            kept += len(line)
        if not set(sums) <= set(range(len(self._plan.tasks))):
            raise ValueError("it names a task that the data don't have")
        self._check_content(head["files"], sums)
        self._file.truncate(kept)

    def _check_content(
        self, before: Mapping[str, list[int]], sums: Mapping[int, dict[str, int]]
    ) -> None:
        """Read again what is finished of the files that look changed, and compare."""
        changed = {path for path, now in self._files.items() if before.get(path) != now}
        shards = [not changed.isdisjoint(_paths(shard)) for shard in self._plan.shards]
        finished = (self._plan.tasks[index] for index in sorted(sums))
        again = [task for task in finished if shards[task.shard]]
        for task, found in checksums(self._plan, again):
            for role, value in found.items():
                if sums[task.index][role] != value:
                    raise InvalidInputError(
                        f"{self._plan.shards[task.shard].files[role]} has changed since the "
                        f"interrupted run scored a part of it (journal {self.path}); restore it, "
                        f"or {_AGAIN}"
                    )

    def add(self, result: TaskResult) -> None:
        """Put a finished task on the disk.

        Raises:
            InvalidInputError: when a file of the task has changed while it was scored.
            OutputError: when the disk is full, for instance.
        """
        for path in _paths(self._plan.shards[self._plan.tasks[result.task].shard]):
            if _identity(path) != self._files[path]:
                raise InvalidInputError(f"{path} has changed while it was scored; {_AGAIN}")
        fields = {"partial": result.partial.to_dict(), "checksums": result.checksums}
        self._write({"task": result.task, **fields})
        self.done[result.task] = result.partial

    def _write(self, fields: Mapping[str, Any]) -> None:
        data = _line(fields)
        with refusal_told(f"can't write the journal {self.path}", _ELSEWHERE):
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())

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
            with contextlib.suppress(OSError):  # somebody else has removed it
                if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
                    os.unlink(os.path.realpath(self.path))
        self._file.close()
