"""Concrete shapes for anyone's signature: a usual one, an empty one, one of a wanted size.

Axes that stand above each other when input and target are broadcast get one size, whatever
their names: an exporter may have called the same axis `s0` in one and `s1` in the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..artefact import Signature
from ..errors import ArtefactError
from ..graph import shapes as graph_shapes

__all__ = ["Pair", "Shape", "ShapePlan", "elements"]

Shape = tuple[int, ...]
Pair = tuple[Shape, Shape]

_ROWS = 64  # size of a dynamic axis for the families
_USUAL = 1 << 16  # elements at most, where the fixed axes leave the choice
_ANY_RANK: graph_shapes.Shape = ("N", 16)


@dataclass(frozen=True, slots=True)
class ShapePlan:
    """The shapes a signature leaves open.

    Attributes:
        input: axes of the input; names are dynamic.
        target: likewise.
        sizes: what a name must be, where it stands above a fixed axis.
        free: the groups of names whose size is open, in order of appearance.
    """

    input: graph_shapes.Shape
    target: graph_shapes.Shape
    sizes: Mapping[str, int]
    free: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, signature: Signature) -> ShapePlan:
        """The plan of a signature; of any rank is taken as (N, 16).

        Raises:
            ArtefactError: when input and target can't be broadcast, whatever is fed.
        """
        a = signature.input.shape
        b = signature.target.shape
        a, b = (b if a is None else a), (a if b is None else b)
        if a is None or b is None:
            a = b = _ANY_RANK
        group = {dim: {dim} for dim in (*a, *b) if isinstance(dim, str)}
        fixed: dict[str, int] = {}
        for x, y in zip(reversed(a), reversed(b), strict=False):
            if isinstance(x, str) and isinstance(y, str):
                union = group[x] | group[y]
                group.update(dict.fromkeys(union, union))
            elif isinstance(x, str) and isinstance(y, int) and y != 1:
                fixed[x] = y
            elif isinstance(y, str) and isinstance(x, int) and x != 1:
                fixed[y] = x
        sizes = {name: fixed[other] for name in group for other in group[name] if other in fixed}
        order = [dim for dim in dict.fromkeys((*a, *b)) if isinstance(dim, str)]
        free = dict.fromkeys(
            tuple(sorted(group[name], key=order.index)) for name in order if name not in sizes
        )
        plan = cls(a, b, sizes, tuple(free))
        try:
            elements(plan.small())
        except ValueError:
            raise ArtefactError(
                f"the model's input has the shape ({', '.join(map(str, a))}) and its target "
                f"({', '.join(map(str, b))}), so no arrays broadcast to one shape; mend the model"
            ) from None
        return plan

    @property
    def growing(self) -> str | None:
        """The name of the axis that is resized first; None where every size is fixed."""
        return self.free[0][0] if self.free else None

    def shapes(self, *sizes: int) -> Pair:
        """Shapes of input and target with the free groups at `sizes`, the last one repeated."""
        known = dict(self.sizes)
        for i, names in enumerate(self.free):
            known.update(dict.fromkeys(names, sizes[min(i, len(sizes) - 1)]))

        def concrete(axes: graph_shapes.Shape) -> Shape:
            return tuple(known[dim] if isinstance(dim, str) else dim for dim in axes)

        return concrete(self.input), concrete(self.target)

    def usual(self) -> Pair:
        """Every free axis 64, or less where that makes more than 2^16 elements."""
        size = _ROWS
        while size > 2 and elements(self.shapes(size)) > _USUAL:
            size //= 2
        return self.shapes(size)

    def small(self, first: int = 3) -> Pair:
        """The first free axis `first`, the others 2: counts that no two axes share."""
        return self.shapes(first, 2)

    def empty(self) -> Pair:
        """The growing axis 0."""
        return self.shapes(0, _ROWS)

    def of_size(self, count: int) -> Pair:
        """At least `count` elements after broadcasting, by the growing axis; the others usual."""
        rest = 16 if len(self.free) == 2 else 4
        row = max(elements(self.shapes(1, rest)), 1)
        return self.shapes(max(-(-count // row), 1), rest)


def elements(shapes: Pair) -> int:
    """The count after broadcasting."""
    return math.prod(np.broadcast_shapes(*shapes))
