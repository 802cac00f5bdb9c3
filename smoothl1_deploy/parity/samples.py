"""The worst element of a result, with the numbers that went in: what a reader checks by hand."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..floats import Array

__all__ = ["Sample", "sample_of"]

_SHOWN = 4  # of the elements behind a reduced result


@dataclass(frozen=True, slots=True)
class Sample:
    """One element of a result, its inputs and both references.

    Numbers are text, the shortest that reads back as the same number of the dtype: NaN and the
    infinities have no other place in JSON.

    Attributes:
        index: of the element in the result; empty for rank 0.
        behind: how many input elements it is computed from.
        input, target: those elements after broadcasting, the first four at most.
        got, torch, oracle: the three answers; `got` is empty where there was none.
    """

    index: tuple[int, ...]
    behind: int
    input: tuple[str, ...]
    target: tuple[str, ...]
    got: str
    torch: str
    oracle: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        fields = asdict(self)
        return {**fields, **{k: list(fields[k]) for k in ("index", "input", "target")}}


def _texts(values: Array) -> tuple[str, ...]:
    return tuple(str(value) for value in values.flat[:_SHOWN])


def sample_of(
    input: Array, target: Array, got: Array | None, torch: Array, oracle: Array, worst: int | None
) -> Sample | None:
    """The sample at the flat index `worst` of the result; None where there is no such element.

    Args:
        input: as the case was fed.
        target: likewise; it broadcasts with `input`.
        got: the answer, or None where an error came instead.
        torch: PyTorch's answer.
        oracle: the truth, same shape and dtype.
        worst: None for an empty result.
    """
    if worst is None or worst >= oracle.size or (got is not None and got.shape != oracle.shape):
        return None
    at = tuple(map(int, np.unravel_index(worst, oracle.shape)))
    left, right = np.broadcast_arrays(input, target)
    # The axes of a result are the leading axes of the broadcast inputs, the others are reduced.
    left, right = np.asarray(left[at]), np.asarray(right[at])
    return Sample(
        at,
        left.size,
        _texts(left),
        _texts(right),
        "" if got is None else str(got[at]),
        str(torch[at]),
        str(oracle[at]),
    )
