"""`smoothl1-deploy cache`: look into the engine cache, and make room in it."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidInputError
from ._console import human_size, print_json, print_lines, print_table, typed
from ._options import AsJson, Next

if TYPE_CHECKING:
    from ..tensorrt._cache import CacheEntry, EngineCache

EXAMPLE = "smoothl1-deploy cache prune --max-mb 100"


def _rows(entries: tuple[CacheEntry, ...]) -> Iterator[tuple[str, ...]]:
    for entry in entries:
        used = datetime.datetime.fromtimestamp(entry.last_used).isoformat(" ", "seconds")
        sidecar = entry.sidecar
        name = "damaged" if sidecar is None else sidecar.graph_name
        flavour = "" if sidecar is None else f"{sidecar.flavour} {sidecar.version}"
        yield entry.key[:12], used, flavour, f"{entry.bytes:,}", name


def _open(folder: Path | None) -> EngineCache:
    """The cache in `folder`, which is not made here: a typing error must not look like a cache."""
    from ..tensorrt._cache import EngineCache, is_cache

    remedy = "give the --cache-dir of a build"
    if folder is not None and not os.path.isdir(folder):
        raise InvalidInputError(f"{folder} is no folder; {remedy}")
    if folder is not None and not is_cache(folder):
        raise InvalidInputError(f"{folder} is no engine cache, and nothing was changed; {remedy}")
    return EngineCache(folder)


def _show(root: Path, key: str, entries: tuple[CacheEntry, ...], as_json: bool) -> None:
    if as_json:
        print_json({"root": root, key: entries})
        return
    if entries:
        print_table(("key", "last used", "flavour", "bytes", "graph"), _rows(entries))
    size = human_size(sum(entry.bytes for entry in entries))
    removed = "removed " if key == "removed" else ""
    print_lines([f"{root}: {removed}{len(entries)} engines, {size}"])


def list_engines(*, cache_dir: Path | None = None, as_json: AsJson = False) -> Next:
    """Show the engines in the cache, the most recently used first.

    Options:
        cache_dir: Default: the one in your cache folder.
    """
    found = _open(cache_dir)
    _show(found.root, "entries", found.list(), as_json)
    return [typed("cache", "prune", "--max-mb", 100, *_of(cache_dir))]


def prune(*, max_mb: int, cache_dir: Path | None = None, as_json: AsJson = False) -> Next:
    """Remove the least recently used engines until the rest fits.

    Options:
        max_mb: What the engines that stay may take, in MiB; 0 removes all.
        cache_dir: Default: the one in your cache folder.
    """
    found = _open(cache_dir)
    # A negative size stays negative: `EngineCache.prune` refuses it by name.
    _show(found.root, "removed", found.prune(max_mb * 2**20), as_json)
    return [typed("cache", "list", *_of(cache_dir))]


def _of(cache_dir: Path | None) -> list[object]:
    return [] if cache_dir is None else ["--cache-dir", cache_dir]


cache = {"list": list_engines, "prune": prune}
