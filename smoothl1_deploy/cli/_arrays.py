"""The arrays that a command is given: files by the names of a model's inputs, or one archive."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .._floats import Array
    from .._model import Port


def named_files(given: Iterable[str] | None) -> tuple[list[Path], dict[str, Path]]:
    """What stands behind `--input`: files alone, and files by names, of NAME=FILE.

    A file that is called `a=b.npy` is a file.
    """
    alone, named = list[Path](), dict[str, Path]()
    for entry in given or ():
        name, equals, path = entry.partition("=")
        if equals and not Path(entry).exists():
            named[name] = Path(path)
        else:
            alone.append(Path(entry))
    return alone, named


def read_data(
    path: Path, ports: Mapping[str, Port], without: Container[str] = ()
) -> dict[str, Array]:
    """The arrays of an .npz file for the inputs of a model, less those that are had otherwise."""
    from .._npy import read_named
    from ..backends._whole import listed

    wanted = {name: port.dtype for name, port in ports.items() if name not in without}
    return read_named(path, wanted, {}, f"the model takes {listed(ports)}")
