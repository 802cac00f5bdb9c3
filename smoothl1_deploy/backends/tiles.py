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
from collections.abc import Callable
from typing import Any

import numpy as np

from ..floats import NUMPY_DTYPE, Array, round_to
from ..graph.elements import ELEMENT_TYPE
from ..graph.tiles import COUNT, WEIGHT_TOTAL, is_summed, tile_model
from ..spec import LossSpec
from .crew import Crew

__all__ = ["Tiles", "finished"]

_ALIGNED = 64


class Tiles:
    """The tiles of one artefact.

    Args:
        spec: of the artefact; `why_not_tiled` has no objection.
        open_session: opens an ONNX Runtime session on the bytes of a model, for one thread.
        tile: elements of a tile.
        crew: whose threads share the tiles.

    `run` may be called from many threads at once.
    """

    def __init__(
        self, spec: LossSpec, open_session: Callable[[bytes], Any], tile: int, crew: Crew
    ) -> None:
        self._spec = spec
        self._session = open_session(tile_model(spec).SerializeToString())
        self._names = [port.name for port in self._session.get_outputs()]
        self._tile = tile
        self._crew = crew

    def run(self, feeds: dict[str, Array], shape: tuple[int, ...]) -> dict[str, Array]:
        """The artefact's outputs for checked arrays, all of `shape` (but beta)."""
        call = _Call(self._spec, self._session, self._names, feeds, shape, self._tile)
        self._crew.share(call.tiles, call.begin)
        return call.outputs()


class _Call:
    """One call of `Tiles.run`: what its tiles are, and where their answers go."""

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

    def begin(self) -> Callable[[int], None]:
        """What a thread needs of its own; gives the function that computes a tile."""
        binding = self._session.io_binding()
        for name, scalar in self._scalars.items():
            binding.bind_input(*_Cut(name, scalar, None).part(0, 0, 1))

        def do(index: int) -> None:
            start = index * self._step
            part = (index, start, min(self._step, self._units - start))
            for cut in self._inputs:
                binding.bind_input(*cut.part(*part))
            for cut in self._outputs:
                binding.bind_output(*cut.part(*part))
            self._session.run_with_iobinding(binding)

        return do

    def outputs(self) -> dict[str, Array]:
        """The artefact's outputs, once every tile is done."""
        found = {name: self._whole[name] for name in self._spec.outputs}
        if is_summed(self._spec):
            found["loss"] = self._total()
        return found

    def _total(self) -> Array:
        total = _exact_sum(self._whole["loss"])
        if self._spec.weight == "weights":
            return finished(self._spec, total, _exact_sum(self._whole[WEIGHT_TOTAL]))
        return finished(self._spec, total, self._size)


def finished(spec: LossSpec, total: float, divisor: float) -> Array:
    """The loss, rank 0, from the sum of all element losses and what a mean divides it by."""
    with np.errstate(all="ignore"):  # weights may add up to 0
        loss = np.float64(total) / divisor if spec.reduction == "mean" else total
    return round_to(np.asarray(loss), spec.dtype)


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
