"""Concrete shapes for anyone's signature: a usual one, an empty one, one of a wanted size.

Axes that stand above each other when the operands of a loss are broadcast get one size,
whatever their names: an exporter may have called the same axis `s0` in one and `s1` in the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import TypeVar

import numpy as np

from .. import _shapes as graph_shapes
from .._artefact import Signature
from ..errors import ArtefactError

Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]  # of input, target and, where there are some, weight and mask

_T = TypeVar("_T")

_ROWS = 64  # size of a dynamic axis for the families
_USUAL = 1 << 16  # elements at most, where the fixed axes leave the choice
#: What broadcasts together, in the order of `Shapes`.
_BROADCAST = ("input", "target", "weight", "mask")
_ANY_RANK: graph_shapes.Shape = ("N", 16)


@dataclass(frozen=True, slots=True)
class ShapePlan:
    """The shapes a signature leaves open.

    Attributes:
        roles: of the arrays: input, target and, where the signature has them, weight and mask.
        arrays: the axes of each; names are dynamic.
        sizes: what a name must be, where it stands above a fixed axis.
        free: the groups of names whose size is open, in order of appearance.
    """

    roles: tuple[str, ...]
    arrays: tuple[graph_shapes.Shape, ...]
    sizes: Mapping[str, int]
    free: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, signature: Signature, betas: Shape = ()) -> ShapePlan:
        """The plan of a signature, and of an array of betas of that shape.

        An array of any rank is taken to be of the input's shape, that of the target's, or (N, 16);
        of betas of their own shape, and an axis N.

        Raises:
            ArtefactError: when the arrays can't be broadcast, whatever is fed.
        """
        roles = tuple(role for role in _BROADCAST if role in signature.inputs)
        given = [signature.inputs[role].shape for role in roles]
        any_rank: graph_shapes.Shape = ("N", *betas) if betas else _ANY_RANK
        usual = next((axes for axes in given if axes is not None), any_rank)
        arrays = tuple(usual if axes is None else axes for axes in given)
        names = [dim for dim in dict.fromkeys(chain(*arrays)) if isinstance(dim, str)]
        group = {name: {name} for name in names}
        fixed: dict[str, int] = {}
        for column in zip_longest(*map(reversed, (*arrays, betas)), fillvalue=1):
            above = [dim for dim in column if isinstance(dim, str)]
            union = set[str]().union(*(group[name] for name in above))
            group.update(dict.fromkeys(union, union))
            for size in (dim for dim in column if isinstance(dim, int) and dim != 1):
                fixed.update(dict.fromkeys(above, size))
        sizes = {name: fixed[other] for name in group for other in group[name] if other in fixed}
        free = dict.fromkeys(
            tuple(sorted(group[name], key=names.index)) for name in names if name not in sizes
        )
        plan = cls(roles, arrays, sizes, tuple(free))
        try:
            elements(plan.small())
        except ValueError:
            shown = [
                f"{role} ({', '.join(map(str, axes))})"
                for role, axes in zip(roles, arrays, strict=True)
            ]
            raise ArtefactError(
                f"the model takes the shapes {', '.join(shown)}, so no arrays broadcast to one "
                "shape; mend the model"
            ) from None
        return plan

    @property
    def growing(self) -> str | None:
        """The name of the axis that is resized first; None where every size is fixed."""
        return self.free[0][0] if self.free else None

    def shapes(self, *sizes: int) -> Shapes:
        """The shapes of the arrays with the free groups at `sizes`, the last one repeated."""
        known = dict(self.sizes)
        for i, names in enumerate(self.free):
            known.update(dict.fromkeys(names, sizes[min(i, len(sizes) - 1)]))

        def concrete(axes: graph_shapes.Shape) -> Shape:
            return tuple(known[dim] if isinstance(dim, str) else dim for dim in axes)

        return tuple(map(concrete, self.arrays))

    def by_role(self, each: Sequence[_T]) -> dict[str, _T]:
        """What there is one of for each array, by the role of the array."""
        return dict(zip(self.roles, each, strict=True))

    def usual(self) -> Shapes:
        """Every free axis 64, or less where that makes more than 2^16 elements."""
        size = _ROWS
        while size > 2 and elements(self.shapes(size)) > _USUAL:
            size //= 2
        return self.shapes(size)

    def small(self, first: int = 3) -> Shapes:
        """The first free axis `first`, the others 2: counts that no two axes share."""
        return self.shapes(first, 2)

    def empty(self) -> Shapes:
        """The growing axis 0."""
        return self.shapes(0, _ROWS)

    def of_size(self, count: int) -> Shapes:
        """At least `count` elements after broadcasting, by the growing axis; the others usual."""
        rest = 16 if len(self.free) == 2 else 4
        row = max(elements(self.shapes(1, rest)), 1)
        return self.shapes(max(-(-count // row), 1), rest)


def elements(shapes: Shapes) -> int:
    """The count after broadcasting."""
    return math.prod(np.broadcast_shapes(*shapes))
