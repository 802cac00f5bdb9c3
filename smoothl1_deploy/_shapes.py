"""Shapes as an export takes them: integers, names for dynamic axes, or None for any rank."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .errors import SpecError

Dim = int | str
Shape = tuple[Dim, ...]

MOST_AXES = 64  # what numpy and PyTorch have at most
_MOST_ELEMENTS = 1 << 60  # of 8 bytes each, which a signed 64-bit offset still reaches
_REMEDY = "give integers >= 0 for fixed axes and identifiers for dynamic ones, as in ('N', 16)"


def check_shape(shape: Sequence[Dim] | None, what: str = "shape") -> Shape | None:
    """The shape as a tuple, validated.

    Raises:
        SpecError: for anything but a sequence of integers >= 0 and identifiers, and for a shape
            of more axes or elements than any tensor has.
    """
    if shape is None:
        return None
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence):
        raise SpecError(f"{what} must be a sequence or None (any rank), got {shape!r}; {_REMEDY}")
    for dim in shape:
        is_size = isinstance(dim, int) and not isinstance(dim, bool) and 0 <= dim < 2**63
        is_name = isinstance(dim, str) and dim.isidentifier()
        if not (is_size or is_name):
            raise SpecError(f"{what} {tuple(shape)!r} has the axis {dim!r}; {_REMEDY}")
    return check_size(tuple(shape), what)


def check_size(shape: Shape, what: str = "shape") -> Shape:
    """`shape` itself, a dynamic axis counted as 1.

    Raises:
        SpecError: for more than 64 axes or 2^60 elements. Beyond, numpy and PyTorch have no such
            tensor, and an element count in int64 may overflow to a small one.
    """
    elements = math.prod(dim for dim in shape if isinstance(dim, int) and dim)
    if len(shape) > MOST_AXES or elements > _MOST_ELEMENTS:
        raise SpecError(
            f"{what} {shape!r} has {len(shape)} axes and at least {elements:,} elements; no tensor "
            f"has more than {MOST_AXES} axes or 2^60 elements"
        )
    return shape


def broadcast(a: Shape, b: Shape) -> Shape:
    """The shape that `a` and `b` broadcast to; unequal names may still meet at run time.

    Raises:
        SpecError: when two fixed axes can't be broadcast.

    >>> broadcast(("N", 16), (16,))
    ('N', 16)
    >>> broadcast(("N", 1), ("M", 4))
    ('N_or_M', 4)
    """
    rank = max(len(a), len(b))
    pairs = zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True)
    out: list[Dim] = []
    for x, y in pairs:
        if x == 1 or (isinstance(x, str) and isinstance(y, int) and y != 1):
            out.append(y)
        elif x == y or y == 1 or (isinstance(x, int) and isinstance(y, str)):
            out.append(x)
        elif isinstance(x, str):
            out.append(f"{x}_or_{y}")
        else:
            raise SpecError(f"shapes {a} and {b} can't be broadcast: {x} against {y}")
    return tuple(out)


def summed_axes(shape: Shape | None, *others: Shape | None) -> tuple[int, ...] | None:
    """The axes of the broadcast result along which `shape` was repeated.

    None where only the sizes at run time tell: an unknown rank, or a dynamic axis that meets one
    of another name or size.

    >>> summed_axes(("N", 16), ("N", 16))
    ()
    >>> summed_axes((1, 16), (4, "N", 16))
    (0, 1)
    """
    full = shape
    for other in others:
        full = None if full is None or other is None else broadcast(full, other)
    if shape is None or full is None:
        return None
    missing = len(full) - len(shape)
    kept = list(zip(shape, full[missing:], strict=True))
    if any(own != whole and own != 1 for own, whole in kept):
        return None
    repeated = [missing + i for i, (own, whole) in enumerate(kept) if own != whole]
    return (*range(missing), *repeated)


def describe(shape: Shape | None) -> str:
    """The shape in a word: `"Nx16"`, `"scalar"` or `"any"`; no two shapes have the same.

    >>> describe(("Nx16",))
    '<Nx16>'
    """
    if shape is None:
        return "any"

    def text(dim: Dim) -> str:
        ambiguous = isinstance(dim, str) and ("x" in dim or dim in ("scalar", "any"))
        return f"<{dim}>" if ambiguous else str(dim)

    return "x".join(map(text, shape)) or "scalar"
