"""Optimization profiles: the smallest, the usual and the largest shape of every dynamic input.

A request takes one of these forms, each checked before TensorRT sees it:

    "input=1x16,64x16,4096x16"                      min, opt, max; a list of such strings
    "input=64x16"                                   one shape for all three
    "input:64x16"                                   the same, as Polygraphy and trtexec write it
    {"input": (1, 64, 4096)}                        values of the only dynamic axis
    {"input": ((1, 16), (64, 16), (4096, 16))}      three shapes

What the request leaves open is filled in: `target` follows `input` where their shapes are the
same, an axis follows another of the same name, and what remains takes `DEFAULT_RANGE`, or less
where an input would have more than 2^28 elements.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from .._model import axes_of, inputs_of
from .._records import Record
from .._shapes import check_size
from ..errors import ArtefactError, SpecError

#: The sizes min, opt and max of a dynamic axis that no request mentions.
DEFAULT_RANGE = (1, 64, 4096)

_MOST_BY_DEFAULT = 1 << 28  # elements of an input that no request mentions: 1 GiB of float32
_WIDEST = 1 << 26  # the number of elements of an input up to which `wide_profile` reaches

Sizes = tuple[int, ...]
Range = tuple[Sizes, Sizes, Sizes]
ProfileRequest = str | Sequence[str] | Mapping[str, Any] | None

_FORMS = (
    "write input=1x16,64x16,4096x16 (min, opt, max), or a mapping of input to these shapes, or to "
    "three sizes of its only dynamic axis"
)


@dataclass(frozen=True, slots=True)
class InputShape:
    """The shape of a graph input: an int is fixed, a name dynamic, None dynamic without a name."""

    name: str
    dims: tuple[int | str | None, ...]

    @property
    def dynamic(self) -> tuple[int, ...]:
        """The indices of the dynamic axes."""
        return tuple(i for i, dim in enumerate(self.dims) if not isinstance(dim, int))

    def __str__(self) -> str:
        return f"{self.name}[{', '.join('?' if d is None else str(d) for d in self.dims)}]"


@dataclass(frozen=True, slots=True)
class Profile(Record):
    """The ranges of all dynamic inputs; static inputs need none.

    Attributes:
        ranges: input -> (min, opt, max), each a shape.
        defaults: the axes that took `DEFAULT_RANGE`, for instance `"N"` or `"x[0]"`.
    """

    ranges: Mapping[str, Range]
    defaults: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Profile:
        """The inverse of `to_dict`; raises KeyError, TypeError or ValueError on other content."""
        ranges = {name: _range(shapes) for name, shapes in fields["ranges"].items()}
        return cls(ranges, tuple(str(axis) for axis in fields["defaults"]))

    def __str__(self) -> str:
        text = " ".join(
            f"{name}={','.join('x'.join(map(str, shape)) for shape in shapes)}"
            for name, shapes in sorted(self.ranges.items())
        )
        if self.defaults:
            low, usual, high = DEFAULT_RANGE
            text += f" (default {low}, {usual}, {high} for {', '.join(self.defaults)})"
        return text or "static"


def input_shapes(model: onnx.ModelProto) -> tuple[InputShape, ...]:
    """The shapes of the graph inputs, in order, constants left out."""
    found = []
    for value in inputs_of(model):
        axes = axes_of(value)
        if axes is None:
            raise ArtefactError(f"the graph input {value.name!r} has no shape; export with one")
        found.append(InputShape(value.name, axes))
    return tuple(found)


def _label(shape: InputShape, axis: int) -> str:
    """A dynamic axis by its name, which others may share, or by its place."""
    dim = shape.dims[axis]
    return f"{shape.name}[{axis}]" if dim is None else str(dim)


def _highest(inputs: Sequence[InputShape], elements: int) -> dict[str, int]:
    """The largest size of each dynamic axis with which no input has more elements."""
    highest: dict[str, int] = {}
    for shape in inputs:
        fixed = math.prod(dim for dim in shape.dims if isinstance(dim, int))
        for axis in shape.dynamic:
            size = max(1, int((elements // max(fixed, 1)) ** (1 / len(shape.dynamic)) + 1e-9))
            label = _label(shape, axis)
            highest[label] = min(size, highest.get(label, size))
    return highest


def wide_profile(inputs: Sequence[InputShape]) -> dict[str, Range]:
    """Ranges of the dynamic axes from empty to 2^26 elements an input, tuned for 64 rows."""
    highest = _highest(inputs, _WIDEST)

    def sizes(shape: InputShape, limit: int) -> Sizes:
        return tuple(
            dim if isinstance(dim, int) else min(limit, highest[_label(shape, axis)])
            for axis, dim in enumerate(shape.dims)
        )

    return {
        shape.name: (sizes(shape, 0), sizes(shape, 64), sizes(shape, _WIDEST))
        for shape in inputs
        if shape.dynamic
    }


def resolve_profile(request: ProfileRequest, inputs: Sequence[InputShape]) -> Profile:
    """The profile of `inputs` that `request` asks for; None asks for the defaults.

    Raises:
        SpecError: for an input the model doesn't have, a shape of another rank, a fixed axis of
            another size, sizes that don't satisfy 0 <= min <= opt <= max, and for one dimension
            name under two ranges.
    """
    by_name = {shape.name: shape for shape in inputs}
    given: dict[str, Range] = {}
    for name, value in _parsed(request).items():
        if name not in by_name:
            known = ", ".join(str(shape) for shape in inputs) or "none"
            raise SpecError(f"the profile names the input {name!r}; the model's inputs are {known}")
        given[name] = _checked(by_name[name], value)
    pair = by_name.get("input"), by_name.get("target")
    if pair[0] and pair[1] and pair[0].dims == pair[1].dims:
        for name, other in (("input", "target"), ("target", "input")):
            if name in given:
                given.setdefault(other, given[name])

    named: dict[str, tuple[str, Sizes]] = {}  # a dynamic axis -> where it was set, its range
    for shape in inputs:
        for axis in shape.dynamic if shape.name in given else ():
            label, sizes = _label(shape, axis), tuple(s[axis] for s in given[shape.name])
            where, before = named.setdefault(label, (shape.name, sizes))
            if before != sizes:
                raise SpecError(
                    f"the dimension {label!r} has the range {before} through {where!r} and {sizes} "
                    f"through {shape.name!r}; one name is one size: give both inputs one range"
                )

    defaults: list[str] = []
    open_inputs = [shape for shape in inputs if shape.dynamic and shape.name not in given]
    highest = _highest(open_inputs, _MOST_BY_DEFAULT)
    for shape in open_inputs:
        axes: list[Sizes] = []
        for axis, dim in enumerate(shape.dims):
            label = _label(shape, axis)
            if isinstance(dim, int):
                axes.append((dim, dim, dim))
            elif label in named:
                axes.append(named[label][1])
            else:
                low, usual, high = (min(size, highest[label]) for size in DEFAULT_RANGE)
                axes.append((low, usual, high))
                defaults.append(label)
        given[shape.name] = _range(zip(*axes, strict=True))
    ranges = {shape.name: given[shape.name] for shape in inputs if shape.dynamic}
    return Profile(ranges, tuple(dict.fromkeys(defaults)))


def _parsed(request: ProfileRequest) -> dict[str, Any]:
    """Input -> what is asked for it: three shapes, or whatever a mapping holds."""
    if request is None or isinstance(request, Mapping):
        return dict(request or {})
    texts: Any = [request] if isinstance(request, str) else request
    if not isinstance(texts, Sequence):
        raise SpecError(f"can't read the profile {request!r}; {_FORMS}")
    found: dict[str, Any] = {}
    for text in texts:
        name, _, shapes = _split(text) if isinstance(text, str) else ("", "", "")
        if not (name and shapes):
            raise SpecError(f"can't read the profile {text!r}; {_FORMS}")
        if name in found:
            raise SpecError(f"two profiles for the input {name!r}; give one")
        try:
            sizes = tuple(tuple(int(n) for n in shape.split("x")) for shape in shapes.split(","))
        except ValueError:
            raise SpecError(f"can't read the shapes of the profile {text!r}; {_FORMS}") from None
        if len(sizes) not in (1, 3):
            raise SpecError(f"the profile {text!r} has {len(sizes)} shapes, not 1 or 3; {_FORMS}")
        found[name.strip()] = sizes * 3 if len(sizes) == 1 else sizes
    return found


def _split(text: str) -> tuple[str, str, str]:
    """Name and shapes, between them `=`, or `:` as Polygraphy and trtexec write profiles."""
    return text.partition("=") if "=" in text else text.rpartition(":")


def _is_size(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _range(shapes: Any) -> Range:
    """Three shapes as they are kept; raises TypeError or ValueError on anything else."""
    low, usual, high = (tuple(shape) for shape in shapes)
    for size in (*low, *usual, *high):
        if not _is_size(size):
            raise ValueError(f"not a size: {size!r}")
    # numpy's integers become Python's.
    return tuple(map(int, low)), tuple(map(int, usual)), tuple(map(int, high))


def _checked(shape: InputShape, value: Any) -> Range:
    """min, opt and max from three shapes, or from three values of the only dynamic axis."""
    problem = SpecError(f"can't read the profile {value!r} of the input {shape.name!r}; {_FORMS}")
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 3:
        raise problem
    if all(_is_size(size) for size in value):
        if len(shape.dynamic) != 1:
            raise SpecError(
                f"the profile {tuple(value)} of {shape} gives one axis, and {len(shape.dynamic)} "
                "of its axes are dynamic; give three shapes, as in ((1, 16), (64, 16), (4096, 16))"
                if shape.dynamic
                else f"{shape} has no dynamic axis; leave it out of the profile"
            )
        value = [[n if i in shape.dynamic else d for i, d in enumerate(shape.dims)] for n in value]
    try:
        shapes = _range(value)
    except (TypeError, ValueError):
        raise problem from None

    texts = ", ".join("x".join(map(str, sizes)) for sizes in shapes)
    for sizes in shapes:
        if len(sizes) != len(shape.dims):
            raise SpecError(
                f"the profile {texts} has a shape of rank {len(sizes)}, "
                f"and {shape} is of rank {len(shape.dims)}; give a size for each of its axes"
            )
        for axis, (size, dim) in enumerate(zip(sizes, shape.dims, strict=True)):
            if isinstance(dim, int) and size != dim:
                raise SpecError(
                    f"the profile {texts} has the size {size} on axis {axis}, which {shape} fixes "
                    f"at {dim}; export with a name for that axis to make it dynamic"
                )
    for axis, (low, usual, high) in enumerate(zip(*shapes, strict=True)):
        if not 0 <= low <= usual <= high:
            raise SpecError(
                f"the profile {texts} of {shape} has {low}, {usual}, {high} on axis {axis}; "
                "0 <= min <= opt <= max must hold"
            )
    check_size(shapes[2], f"the profile's largest shape of {shape.name!r}")
    return shapes
