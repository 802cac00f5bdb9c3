"""The worst element of a result, with the numbers that went in: what a reader checks by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..floats import Array
from ..records import Record

_SHOWN = 4  # of the elements behind a reduced result


@dataclass(frozen=True, slots=True)
class Sample(Record):
    """One element of a result, its inputs and both references.

    Numbers are text, the shortest that reads back as the same number of the dtype: NaN and the
    infinities have no other place in JSON.

    Attributes:
        output: which result, `loss` or `grad_input`.
        index: of the element in the result; empty for rank 0.
        behind: how many element losses it is computed from.
        inputs: `input`, `target` and, where there is one, `weight`: those elements after
            broadcasting, the first four at most.
        got, torch, oracle: the three answers; `got` is empty where there was none.
    """

    output: str
    index: tuple[int, ...]
    behind: int
    inputs: Mapping[str, tuple[str, ...]]
    got: str
    torch: str
    oracle: str


def sample_of(
    output: str,
    arrays: Mapping[str, Array],
    got: Array | None,
    torch: Array,
    oracle: Array,
    worst: int | None,
) -> Sample | None:
    """The sample at the flat index `worst` of the result; None where there is no such element.

    Args:
        output: which result.
        arrays: as the case was fed, by name; they broadcast with one another.
        got: the answer, or None where an error came instead.
        torch: PyTorch's answer.
        oracle: the truth, same shape and dtype.
        worst: None for an empty result.
    """
    if worst is None or worst >= oracle.size or (got is not None and got.shape != oracle.shape):
        return None
    at = tuple(map(int, np.unravel_index(worst, oracle.shape)))
    whole = dict(zip(arrays, np.broadcast_arrays(*arrays.values()), strict=True))
    if output == "grad_input":  # every place that this element of input was broadcast to
        places = np.arange(arrays["input"].size).reshape(arrays["input"].shape)
        here = np.broadcast_to(places, whole["input"].shape) == worst
        parts = {name: values[here] for name, values in whole.items()}
    else:  # the axes of a loss are the leading ones of its inputs, the others are reduced
        parts = {name: np.asarray(values[at]) for name, values in whole.items()}
    return Sample(
        output,
        at,
        parts["input"].size,
        {name: tuple(map(str, values.flat[:_SHOWN])) for name, values in parts.items()},
        "" if got is None else str(got[at]),
        str(torch[at]),
        str(oracle[at]),
    )
