"""Two artefacts on one's own data: which outputs differ, in which IEEE class, and by how much."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .._artefact import ModelSource, read_model
from .._dlpack import as_array
from .._floats import CLASS_NAMES, NUMPY_DTYPE, Array, ieee_class, round_to
from .._model import Port, inputs_of, read_attached
from .._records import Record
from ..backends._base import ENGINE_SUFFIXES, get_backend, load
from ..backends._whole import ModelRunner
from ..errors import ArtefactError, SpecError
from ..graph._metadata import read_spec
from ._compare import distances


@dataclass(frozen=True, slots=True)
class Difference(Record):
    """How two arrays differ, the first from the second.

    Attributes:
        dtype: what they are compared in: of two formats of floats the narrower, to which the wider
            is rounded.
        shape: of the first.
        elements: how many each has.
        other_bits: how many differ in their bits.
        other_class: how many differ in their IEEE class (NaN, +inf, -inf, finite, +0, -0); of
            integers and booleans, in anything.
        ulp: the largest distance of two numbers of one class; 0 where nothing is told of one.
        at: the index of the worst: the first of another class, or else the furthest.
        values: the two there, as text in the digits of their dtype.
        problem: why they can't be compared, in words; empty where they can.
    """

    dtype: str
    shape: tuple[int, ...]
    elements: int
    other_bits: int = 0
    other_class: int = 0
    ulp: int = 0
    at: tuple[int, ...] | None = None
    values: tuple[str, str] | None = None
    problem: str = ""

    def __str__(self) -> str:
        if self.problem or self.other_class:
            return self.problem or f"{self.other_class:,} of another class"
        return f"{self.ulp:,} ULP apart" if self.other_bits else "the same bits"

    def within(self, limit: int | None) -> bool:
        """Whether every class is the same, and no distance above `limit`, where that is given."""
        return not (self.problem or self.other_class) and (limit is None or self.ulp <= limit)


@dataclass(frozen=True, slots=True)
class Comparison(Record):
    """What `compare` found. True where no class differs, and nothing is further than `limit`.

    Attributes:
        outputs: by name, of what both artefacts give.
        alone: the outputs that one of them gives, and the other doesn't.
        limit: the largest distance in ULP that was allowed; None for any.

    >>> import numpy as np
    >>> from smoothl1_deploy import LossSpec, compare, export
    >>> data = {"input": np.ones(3, "f4"), "target": np.zeros(3, "f4")}
    >>> compare(export(LossSpec()), export(LossSpec(beta=2.0)), data)
    <Comparison: loss 8,388,608 ULP apart>
    """

    outputs: Mapping[str, Difference]
    alone: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    limit: int | None = None
    derived: ClassVar = ("ok", "same_bits")

    def __repr__(self) -> str:
        return f"<Comparison: {', '.join(f'{name} {each}' for name, each in self.outputs.items())}>"

    def __bool__(self) -> bool:
        return all(each.within(self.limit) for each in self.outputs.values())

    @property
    def ok(self) -> bool:
        """Whether it is true."""
        return bool(self)

    @property
    def same_bits(self) -> bool:
        """Whether every output that both have has the same bits."""
        return not any(each.problem or each.other_bits for each in self.outputs.values())


def compare(
    first: ModelSource,
    second: ModelSource,
    data: Mapping[str, Any],
    *,
    backend: str | tuple[str, str] = "ort-cpu",
    ulp: int | None = None,
) -> Comparison:
    """Run two artefacts on the same data, and tell their outputs apart.

    Outputs are compared by their names; where each gives one alone, its name doesn't count, and a
    loss is called `loss`.

    Args:
        first: an `onnx.ModelProto`, its bytes, or a path: a loss, a model with losses attached, or
            any model of anyone's; an `.engine`, which `trt` runs.
        second: likewise.
        data: an array for each input, by its name; for a loss `input`, `target` and what else it
            takes. Each artefact takes of it what it has an input for, and floats in the format of
            that input, to which they are rounded.
        backend: what runs the models; two run one each.
        ulp: the largest distance that is allowed.

    Raises:
        ArtefactError: where the two have no output in common.
        InvalidInputError: on data that don't fit.
        BackendUnavailableError: for an engine, where there is no GPU.

    >>> import numpy as np
    >>> from smoothl1_deploy import LossSpec, compare, export
    >>> data = {"input": np.ones((2, 4), "f4"), "target": np.zeros((2, 4), "f4")}
    >>> here, there = export(LossSpec(), shape=("N", 4)), export(LossSpec(), "inlined")
    >>> found = compare(here, there, data, backend=("ort-cpu", "onnx-reference"), ulp=0)
    >>> bool(found), found
    (True, <Comparison: loss the same bits>)
    """
    backends = (backend, backend) if isinstance(backend, str) else tuple(backend)
    if len(backends) != 2:
        raise SpecError(f"{len(backends)} backends for two artefacts; give one or two")
    if ulp is not None and ulp < 0:
        raise SpecError(f"a distance of {ulp} ULP can't be; give 0 or more")
    arrays = {name: as_array(value, name) for name, value in data.items()}
    pairs = zip((first, second), backends, strict=True)
    a, b = (_outputs(source, name, arrays) for source, name in pairs)
    if len(a) == len(b) == 1:
        b = dict(zip(a, b.values(), strict=True))
    common = [name for name in a if name in b]
    if not common:
        raise ArtefactError(
            f"the two have no output in common: {', '.join(a)} and {', '.join(b)}; compare models "
            "that give the same"
        )
    alone = tuple(n for n in a if n not in b), tuple(n for n in b if n not in a)
    return Comparison({name: difference(a[name], b[name]) for name in common}, alone, ulp)


def _outputs(source: ModelSource, backend: str, data: Mapping[str, Array]) -> dict[str, Array]:
    """What an artefact gives for what it takes of the data; its loss is called so."""
    runner = _runner(source, backend, {*data})
    whole = isinstance(runner, ModelRunner)
    ports: Mapping[str, Port] = runner.inputs if whole else runner.signature.inputs
    given = {name: _rounded(data[name], port.dtype) for name, port in ports.items() if name in data}
    if whole:
        return dict(runner.run(**given))
    outputs = runner.run(**{"input": None, "target": None, **given})
    loss = runner.signature.loss.name
    return {"loss" if name == loss else name: array for name, array in outputs.items()}


def _runner(source: ModelSource, backend: str, names: set[str]) -> Any:
    """A `ModelRunner`, or the `Runner` of what has to be a loss to take arrays of these names."""
    if isinstance(source, (str, os.PathLike)) and Path(source).suffix in ENGINE_SUFFIXES:
        return load(source, "trt")
    model = read_model(source)
    unnamed = {"input", "target"} <= names and not {v.name for v in inputs_of(model)} <= names
    if read_spec(model) is not None or (unnamed and not read_attached(model)):
        return load(model, backend)
    return ModelRunner(model, get_backend(backend).open)


def _rounded(array: Array, dtype: str) -> Array:
    """Floats in another format of floats; anything else as it is."""
    if array.dtype.name == dtype or not {array.dtype.name, dtype} <= {*NUMPY_DTYPE}:
        return array
    return round_to(array.astype(np.float64), dtype)


def difference(first: Array, second: Array) -> Difference:
    """How two arrays differ, the first from the second."""
    dtypes = [first.dtype.name, second.dtype.name]
    dtype = min(dtypes, key=lambda name: np.dtype(name).itemsize)
    a, b = _rounded(first, dtype), _rounded(second, dtype)
    shapes = [[*array.shape] for array in (first, second)]
    if a.dtype != b.dtype or shapes[0] != shapes[1]:
        problem = " and ".join(f"{n}{x}" for n, x in zip(dtypes, shapes, strict=True))
        return Difference(dtype, a.shape, a.size, problem=problem)
    bits = (_bytes(a) != _bytes(b)).any(axis=-1)
    other, ulp = bits, np.zeros(a.shape, np.uint64)
    if dtype in NUMPY_DTYPE:
        here, there = ieee_class(a), ieee_class(b)
        other = here != there
        ulp = distances(a, b, ~other & (here == CLASS_NAMES.index("finite")))
    worst = other if other.any() else ulp if ulp.any() else bits
    at = tuple(map(int, np.unravel_index(np.argmax(worst), a.shape))) if bits.any() else None
    values = None if at is None else (str(a[at]), str(b[at]))
    found = int(bits.sum()), int(other.sum()), int(ulp.max(initial=0))
    return Difference(dtype, a.shape, a.size, *found, at, values)


def _bytes(array: Array) -> Array:
    size = array.dtype.itemsize
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(*array.shape, size)
