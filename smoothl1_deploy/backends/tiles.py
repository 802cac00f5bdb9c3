"""Large arrays in tiles that stay in the cache, on a few threads; ONNX Runtime computes each tile.

In one call on whole arrays every operator writes its result to memory and the next one reads it
back: at 2^24 elements that is what the time goes into, and several copies of the input are alive.
A tile's intermediate values stay in the cache. What a tile computes is `graph.tiles`; here the
arrays are cut, without a copy, and the answers put together:

* elements and rows are written where they belong in the whole output;
* sums, in float64, are added exactly (`math.fsum`), divided, and rounded once.

So a result doesn't depend on the number of threads, and depends on the tiles' size only by the
float64 roundings within a tile.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import numpy as np

from ..floats import NUMPY_DTYPE, Array, round_to
from ..graph.elements import ELEMENT_TYPE
from ..graph.tiles import COUNT, WEIGHT_TOTAL, is_summed, tile_model
from ..spec import LossSpec

__all__ = ["Tiles", "default_threads"]

_ALIGNED = 64

#: Of a large machine one loss takes a part: beyond it Python hands out tiles no faster.
_MOST_THREADS = 8


def default_threads() -> int:
    """Every core this process may run on, but `_MOST_THREADS` at most."""
    try:
        found = len(os.sched_getaffinity(0))
    except AttributeError:  # not every system has affinities
        found = os.cpu_count() or 1
    return min(found, _MOST_THREADS)


class Tiles:
    """The tiles of one artefact.

    Args:
        spec: of the artefact; `why_not_tiled` has no objection.
        open_session: opens an ONNX Runtime session on the bytes of a model, for one thread.
        tile: elements of a tile.
        threads: that work on a call, the calling one included.

    `run` may be called from many threads at once.
    """

    def __init__(
        self, spec: LossSpec, open_session: Callable[[bytes], Any], tile: int, threads: int
    ) -> None:
        self._spec = spec
        self._session = open_session(tile_model(spec).SerializeToString())
        self._names = [port.name for port in self._session.get_outputs()]
        self._tile = tile
        self._threads = threads
        self._pool = ThreadPoolExecutor(max(1, threads - 1), "smoothl1-tile")

    def run(self, feeds: dict[str, Array], shape: tuple[int, ...]) -> dict[str, Array]:
        """The artefact's outputs for checked arrays, all of `shape` (but beta)."""
        call = _Call(self._spec, self._session, self._names, feeds, shape, self._tile)
        helpers = [self._pool.submit(call.work) for _ in range(min(self._threads, call.tiles) - 1)]
        try:
            call.work()
        finally:
            call.stop()  # after an error the others need not go on
            started = [helper for helper in helpers if not helper.cancel()]
            errors = [helper.exception() for helper in started]
        for error in errors:
            if error is not None:
                raise error
        return call.outputs()


class _Call:
    """One call of `Tiles.run`: which tiles are left, and where their answers go."""

    def __init__(
        self,
        spec: LossSpec,
        session: Any,
        names: list[str],
        feeds: dict[str, Array],
        shape: tuple[int, ...],
        tile: int,
    ) -> None:
        self._spec = spec
        self._session = session
        self._size = math.prod(shape)
        # What can't be cut is a row, or an element.
        columns = math.prod(shape[1:]) if spec.per_sample else 1
        self._units = self._size // columns
        self._step = _step(self._units, max(1, tile // columns))
        self.tiles = -(-self._units // self._step)
        self._next = count()
        self._stopped = threading.Event()

        self._scalars = {}
        if "beta" in feeds:
            self._scalars["beta"] = feeds["beta"]
        if is_summed(spec) and spec.gradient and spec.reduction == "mean":
            self._scalars[COUNT] = np.asarray(float(self._size))
        cell = (columns,) if spec.per_sample else ()
        self._inputs = [_Cut(n, array, cell) for n, array in feeds.items() if n != "beta"]
        self._whole: dict[str, Array] = {}
        self._outputs: list[_Cut] = []
        dtype = NUMPY_DTYPE[spec.dtype]
        for name in names:
            if is_summed(spec) and name in ("loss", WEIGHT_TOTAL):
                self._whole[name] = np.empty(self.tiles)
                self._outputs.append(_Cut(name, self._whole[name], None))
            elif name == "loss" and spec.per_sample:
                self._whole[name] = np.empty(self._units, dtype)
                self._outputs.append(_Cut(name, self._whole[name], ()))
            else:
                self._whole[name] = np.empty(shape, dtype)
                self._outputs.append(_Cut(name, self._whole[name], cell))

    def work(self) -> None:
        """Compute tiles until none is left."""
        binding = self._session.io_binding()
        for name, scalar in self._scalars.items():
            binding.bind_input(*_Cut(name, scalar, None).part(0, 0, 1))
        for index in self._next:  # a tile goes to one thread: next() is one step of the interpreter
            if index >= self.tiles or self._stopped.is_set():
                return
            start = index * self._step
            part = (index, start, min(self._step, self._units - start))
            for cut in self._inputs:
                binding.bind_input(*cut.part(*part))
            for cut in self._outputs:
                binding.bind_output(*cut.part(*part))
            self._session.run_with_iobinding(binding)

    def stop(self) -> None:
        """Take no further tile."""
        self._stopped.set()

    def outputs(self) -> dict[str, Array]:
        """The artefact's outputs, once every tile is done."""
        found = {name: self._whole[name] for name in self._spec.outputs}
        if is_summed(self._spec):
            found["loss"] = self._total()
        return found

    def _total(self) -> Array:
        total = np.float64(_exact_sum(self._whole["loss"]))
        with np.errstate(all="ignore"):  # weights may add up to 0
            if self._spec.weight == "weights":
                total = total / np.float64(_exact_sum(self._whole[WEIGHT_TOTAL]))
            elif self._spec.reduction == "mean":
                total = total / np.float64(self._size)
        return round_to(np.asarray(total), self._spec.dtype)


class _Cut:
    """A contiguous array to be bound part by part, by address.

    `cell` is the shape of what belongs to a unit (a row or an element); None for an array that
    holds one number for each tile.
    """

    def __init__(self, name: str, array: Array, cell: tuple[int, ...] | None) -> None:
        self._name = name
        self._element = ELEMENT_TYPE[array.dtype.name]
        self._address = array.ctypes.data
        self._cell = cell
        self._bytes = array.itemsize * math.prod(cell or ())

    def part(self, index: int, start: int, units: int) -> tuple[Any, ...]:
        """The arguments of ONNX Runtime's bind_input and bind_output for one tile."""
        at, shape = (index, ()) if self._cell is None else (start, (units, *self._cell))
        return self._name, "cpu", 0, self._element, shape, self._address + at * self._bytes


def _step(units: int, most: int) -> int:
    """Units of a tile: alike for every tile, so that the last is no remnant; at cache lines."""
    if most < _ALIGNED:
        return most
    tiles = -(-units // most)
    return -(-units // (tiles * _ALIGNED)) * _ALIGNED


def _exact_sum(parts: Array) -> float:
    """The sum as IEEE 754 has it, but rounded once; fsum raises where that isn't finite."""
    try:
        return math.fsum(parts)
    except (OverflowError, ValueError):
        with np.errstate(all="ignore"):
            return float(np.sum(parts))
