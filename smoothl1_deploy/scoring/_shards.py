"""Which files belong together, and into which tasks their rows are cut.

A shard is a file of input and its partner of target: two files, or those of one name in two
folders. A task is some rows of a shard that are given to one process, scored, and recorded as one.
A batch is the rows that an engine's session is fed at once.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._floats import NUMPY_DTYPE, dtype_name
from ..errors import InvalidInputError
from ._sources import SUFFIXES, Location, open_source

#: The number of elements of a batch, whose arrays and losses stay in a core's share of the cache.
BATCH_ELEMENTS = 1 << 18
#: The number of elements of a task: a kill loses some tenths of a second of work, and a line of the
#: journal with its fsync costs less than a hundredth of that.
TASK_ELEMENTS = 1 << 23

Roles = Mapping[str, Location]


@dataclass(frozen=True, slots=True)
class Shard:
    """Files that are read together, row by row.

    Attributes:
        name: what messages call it, and what shards are ordered by.
        files: role -> where its array is.
        shapes: role -> the shape of its array.
        dtypes: role -> the name of its dtype.
        flat: whether every element counts as a row here.
        first: the number of rows in the shards before it.
        rows: the number of its rows; of its elements, where it is flat.
    """

    name: str
    files: Roles
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    flat: bool
    first: int
    rows: int

    def to_dict(self) -> dict[str, Any]:
        """What must be the same for a run to go on, beside the content of the files; JSON-ready."""
        return {
            role: {"name": at.name, "shape": [*self.shapes[role]], "dtype": self.dtypes[role]}
            for role, at in self.files.items()
        }


@dataclass(frozen=True, slots=True)
class Task:
    """Rows `start` to `stop` of a shard, to be scored `batch` rows at a time."""

    index: int
    shard: int
    start: int
    stop: int
    batch: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All shards in the order of their names, and all tasks."""

    shards: tuple[Shard, ...]
    tasks: tuple[Task, ...]

    @property
    def rows(self) -> int:
        """The number of rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    def elements(self, task: Task) -> int:
        """How many elements of its first input a task has: the measure of progress."""
        shard = self.shards[task.shard]
        width = 1 if shard.flat else math.prod(next(iter(shard.shapes.values()))[1:])
        return (task.stop - task.start) * width


def locate(
    paths: Mapping[str, Path],
    names: Mapping[str, str | None],
    dtype: str | Mapping[str, str] = "float32",
) -> dict[str, dict[str, Location]]:
    """Name of a shard -> role -> location, in the order of the names.

    Args:
        paths: role, of a whole model an input's name -> a file, or a folder of shards; all the
            same kind.
        names: role -> of the array in an .npz or Parquet file.
        dtype: see `Location`; of all, or by role.

    Raises:
        InvalidInputError: when a path is missing, folders and files are mixed, or a shard has no
            partner in another folder.

    >>> import numpy as np
    >>> from pathlib import Path
    >>> from smoothl1_deploy.scoring import locate
    >>> np.save("shard.npy", np.ones((6, 4), "f4"))
    >>> sorted(locate({"input": Path("shard.npy"), "target": Path("shard.npy")}, {}))
    ['shard.npy']
    """
    dtypes = dict.fromkeys(paths, dtype) if isinstance(dtype, str) else dtype

    def located(folder: str | None = None) -> dict[str, Location]:
        return {
            role: Location(path / folder if folder else path, role, names.get(role), dtypes[role])
            for role, path in paths.items()
        }

    folders = {role for role, path in paths.items() if os.path.isdir(path)}
    for role, path in paths.items():
        if not os.path.exists(path):  # unlike Path.exists, for names that no file can have
            if re.match(r"\w[\w+.-]+:/", str(path)):
                raise InvalidInputError(
                    f"{role}: {path} is an address, and score reads files; copy what is there to "
                    "this machine, or mount it"
                )
            raise InvalidInputError(f"{role}: {path} does not exist; give a file or a folder")
    if folders and folders != set(paths):
        files = ", ".join(str(path) for role, path in paths.items() if role not in folders)
        raise InvalidInputError(f"{files} is a file beside a folder; give folders, or files")
    first = next(iter(paths.values()))
    if not folders:
        return {first.name: located()}
    found = {role: _shard_names(path) for role, path in paths.items()}
    every = sorted(set().union(*found.values()))
    if not every:
        raise InvalidInputError(f"{first} holds no file of {', '.join(SUFFIXES)}")
    for name in every:
        for role, path in paths.items():
            if name not in found[role]:
                other = next(paths[r] / name for r in paths if name in found[r])
                raise InvalidInputError(
                    f"the shard {other} has no partner {path / name}; shards are matched by name"
                )
            if not os.path.exists(path / name):
                raise InvalidInputError(
                    f"the shard {path / name} is a link to {os.path.realpath(path / name)}, which "
                    "does not exist; restore that, or remove the link"
                )
    return {name: located(name) for name in every}


def _shard_names(folder: Path) -> set[str]:
    try:
        names = os.listdir(folder)
    except OSError as exc:
        raise InvalidInputError(f"{folder} can't be read ({exc.strerror})") from exc
    return {n for n in names if n.lower().endswith(SUFFIXES) and not n.startswith((".", "_"))}


def float_dtype(located: Mapping[str, Roles]) -> str:
    """The widest floating-point dtype of the first shard: what the loss is computed in.

    Raises:
        InvalidInputError: where there is none.
    """
    name, files = next(iter(located.items()))
    found = []
    for role in ("input", "target"):
        with contextlib.closing(open_source(files[role])) as source:
            found.append(dtype_name(source.dtype))
    floats = [d for d in found if d in NUMPY_DTYPE]
    if not floats:
        raise InvalidInputError(
            f"the shard {name} holds {' and '.join(found)}; a loss needs floating-point numbers: "
            "convert one of them to float32"
        )
    return max(floats, key=lambda d: NUMPY_DTYPE[d].itemsize)


def make_plan(
    located: Mapping[str, Roles], *, flat: bool, rows: int | None = None, compared: bool = True
) -> Plan:
    """Look at every shard, check that they fit together, and cut them into tasks.

    Args:
        located: as `locate` gives it.
        flat: whether only the elements matter, so that rows may be cut too.
        rows: the number of rows of a batch: None takes about `BATCH_ELEMENTS` elements.
        compared: whether the arrays are compared with one another, and so have axes in common.

    Raises:
        InvalidInputError: on shapes or dtypes that differ; the message names the shard.
    """
    shards: list[Shard] = []
    tasks: list[Task] = []
    first = 0
    for number, (name, files) in enumerate(located.items()):
        shard = _inspect(name, files, flat and rows is None, first, compared)
        shards.append(shard)
        _check_alike(shards[0], shard)
        tasks.extend(_cut(shard, number, len(tasks), rows))
        first += shard.rows
    return Plan(tuple(shards), tuple(tasks))


def _inspect(name: str, files: Roles, flat: bool, first: int, compared: bool) -> Shard:
    with contextlib.ExitStack() as stack:
        sources = {
            role: stack.enter_context(contextlib.closing(open_source(location)))
            for role, location in files.items()
        }
        shapes = {role: source.shape for role, source in sources.items()}
        if len({(len(shape) if compared else 0, shape[0]) for shape in shapes.values()}) != 1:
            given = ", ".join(f"{role} {shape}" for role, shape in shapes.items())
            raise InvalidInputError(
                f"the shard {name} has {given}; row by row, they need the same number of rows"
                + (" and of axes" if compared else "")
            )
        alike = len(set(shapes.values())) == 1
        flat = flat and alike and all(source.can_flatten for source in sources.values())
        shape = next(iter(shapes.values()))
        rows = math.prod(shape) if flat else shape[0]
        dtypes = {role: dtype_name(source.dtype) for role, source in sources.items()}
        return Shard(name, files, shapes, dtypes, flat, first, rows)


def _check_alike(one: Shard, other: Shard) -> None:
    for role, dtype in other.dtypes.items():
        if dtype != one.dtypes[role]:
            raise InvalidInputError(
                f"{other.files[role]} is {dtype}, but {one.files[role]} is {one.dtypes[role]}; "
                "convert the shards to one dtype"
            )
        if other.shapes[role][1:] != one.shapes[role][1:]:
            raise InvalidInputError(
                f"{other.files[role]} has rows of shape {other.shapes[role][1:]}, but "
                f"{one.files[role]} of {one.shapes[role][1:]}; score them apart"
            )


def _cut(shard: Shard, number: int, index: int, rows: int | None) -> Iterator[Task]:
    width = 1 if shard.flat else max(math.prod(s[1:]) for s in shard.shapes.values())
    batch = rows or max(1, BATCH_ELEMENTS // max(width, 1))
    step = batch * max(1, TASK_ELEMENTS // (batch * max(width, 1)))
    for start in range(0, shard.rows, step):
        yield Task(index, number, start, min(start + step, shard.rows), batch)
        index += 1
