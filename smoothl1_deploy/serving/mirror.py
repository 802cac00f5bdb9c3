"""What Triton sees of a repository: links under plain names, in a folder of ours.

So no path of the user's reaches it, and a model is loaded anew, or a version withheld, by files
alone: over the network nobody needs to be let in for that.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ArtefactError, reason_of
from .model_config import CONFIG_FILE, read_config
from .private import is_plain

__all__ = ["Mirror", "Stamp", "models_of"]

#: The files of one version: what changes when they do.
Stamp = tuple[tuple[str, int, int, int], ...]

#: A file of ours in a model's folder; Triton loads a model anew when its time changes.
_ANEW = ".load-anew"


def models_of(
    repository: Path, chosen: Iterable[str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """The models of a repository that a server may be shown, and why it may not see others.

    Args:
        repository: its folder.
        chosen: names; all by default.

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
    """Why a server must not see a model; empty where it may."""
    try:
        config = read_config((folder / CONFIG_FILE).read_bytes())
    except (ArtefactError, OSError) as exc:
        reason = reason_of(exc) if isinstance(exc, OSError) else exc
        return f"can't read {folder / CONFIG_FILE}: {reason}"
    for word in (folder.name, *_shell_words(config)):
        if not is_plain(word or "empty"):
            return f"Triton would give the name {word!r} to a shell; use letters, digits, - . and _"
    return ""


def _shell_words(config: Any) -> Iterable[str]:
    """What the Python backend puts into its command line, beside paths."""
    yield config.default_model_filename
    yield from config.cc_model_filenames.values()
    for group in config.instance_group:
        yield group.name


class Mirror:
    """The mirror of one repository.

    Args:
        repository: the real one; it is only read.
        folder: where; it is made.
        models: the names of those to show.
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
        """Show what came to the models, and withheld versions whose files have changed."""
        for (name, version), stamp in list(self._withheld.items()):
            if self.stamp(name, version) != stamp:
                del self._withheld[name, version]
        for name in self._models:
            place = self.folder / name
            with contextlib.suppress(OSError):  # the user changes it at this moment
                wanted = {
                    entry.name: entry
                    for entry in (self._repository / name).glob("[!.]*")
                    if (name, entry.name) not in self._withheld
                }
                there = {*os.listdir(place)} - {_ANEW}
                for old in there - wanted.keys():
                    (place / old).unlink()
                for new in wanted.keys() - there:
                    (place / new).symlink_to(wanted[new])

    def withhold(self, name: str, version: str) -> bool:
        """Take a version out of sight until its files change.

        Returns:
            False where the model has no other one: it stays.
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
        """Names, times and sizes of the files of a version."""
        folder = self._repository / name / version
        found = []
        for path in sorted(folder.rglob("*")):
            with contextlib.suppress(OSError):  # removed meanwhile
                status = path.stat()
                found.append((str(path), status.st_ino, status.st_mtime_ns, status.st_size))
        return tuple(found)
