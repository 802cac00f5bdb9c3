"""Inputs that visit every part of the loss, and the rule by which a result is right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smoothl1_deploy import LossSpec
from smoothl1_deploy._floats import CLASS_NAMES, NUMPY_DTYPE, ieee_class, ulp_distance
from smoothl1_deploy.reference._module import eager
from smoothl1_deploy.reference._oracle import oracle

Array = NDArray[Any]


def pair(spec: LossSpec, shape: tuple[int, ...], *, special: bool = False) -> tuple[Array, Array]:
    """Input and target of `shape`: differences on both sides of beta, at it, at 0, cancelling.

    With `special`, infinities, NaN, the ends of the format and subnormals too.
    """
    generator = np.random.default_rng(11)
    count = math.prod(shape)
    beta = min(spec.effective_beta, 1e4) or 1.0
    target = generator.standard_normal(count)
    difference = (
        beta
        * generator.choice([-1, 1], count)
        * generator.choice([0.0, 1e-3, 0.5, 1 - 2**-11, 1.0, 1 + 2**-11, 1.9, 30.0], count)
    )
    target[::3] = 0  # where the difference is not lost in rounding the sum
    with np.errstate(over="ignore"):
        a = (target + difference).astype(NUMPY_DTYPE[spec.dtype])
        b = target.astype(NUMPY_DTYPE[spec.dtype])
    if special:
        finfo = np.finfo(np.float16) if spec.dtype == "float16" else np.finfo(np.float32)
        values = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, float(finfo.tiny), float(finfo.max) / 2]
        grid = [v.reshape(-1) for v in np.meshgrid(values, values)]
        a[: len(grid[0])], b[: len(grid[1])] = (v[:count] for v in grid)
    return a.reshape(shape), b.reshape(shape)


def _lost_in_subnormals(
    spec: LossSpec, got: Array, exact: Array, input: Array, target: Array
) -> NDArray[np.bool_]:
    """Every loss is rounded before it is summed: by half the smallest number, if it is subnormal.

    PyTorch's sums have this too. It shows only where the whole sum is next to nothing.
    """
    if spec.reduction == "none":
        return np.zeros(got.shape, bool)
    count = np.broadcast(input, target).size
    smallest = np.finfo(spec.compute_dtype).smallest_subnormal
    slack = (count if spec.reduction == "sum" else 1) * (np.longdouble(smallest) / 2)
    distance = np.abs(got.astype(np.longdouble) - exact.astype(np.longdouble))
    return np.asarray(distance <= slack)


def disagreement(spec: LossSpec, got: Array, input: Array, target: Array) -> str:
    """Why `got` is not the loss; empty where it is.

    The IEEE class of each element is the oracle's or PyTorch's, and the distance to the oracle
    at most max(2, PyTorch's own + 1) ULP; but for what a sum loses among subnormal numbers.
    """
    exact, contract = oracle(spec, input, target), eager(spec, input, target)
    with np.errstate(invalid="ignore"):
        lost = _lost_in_subnormals(spec, got, exact, input, target)
    return difference(got, exact, contract, lost)


def difference(got: Array, exact: Array, contract: Array, lost: Any = False) -> str:
    """Where `got` is neither near enough to `exact` nor of its class; empty where it is nowhere.

    Args:
        got: the answer.
        exact: the truth, rounded once.
        contract: PyTorch's answer.
        lost: the elements that may differ all the same.
    """
    if not isinstance(got, np.ndarray) or (got.dtype, got.shape) != (exact.dtype, exact.shape):
        return f"{type(got)} {got.dtype} {got.shape} instead of {exact.dtype} {exact.shape}"
    classes = [ieee_class(v) for v in (got, exact, contract)]
    spared = np.broadcast_to(lost, exact.shape)
    wrong = (classes[0] != classes[1]) & (classes[0] != classes[2]) & ~spared
    if wrong.any():
        i = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        names = [CLASS_NAMES[v[i]] for v in classes]
        return f"at {i}: {names[0]}, the oracle {names[1]}, PyTorch {names[2]}"
    finite = np.isfinite(exact) & np.isfinite(got) & ~spared
    allowed = np.where(
        np.isfinite(contract), np.maximum(2, ulp_distance(contract, exact) + np.uint64(1)), 2
    )
    distance = ulp_distance(got, exact)
    off = finite & (distance > allowed)
    if off.any():
        i = np.unravel_index(int(np.argmax(np.where(off, distance, 0))), off.shape)
        return f"at {i}: {got[i]}, the oracle {exact[i]}: {distance[i]} ULP of {allowed[i]} allowed"
    return ""


def assert_right(spec: LossSpec, got: Array, input: Array, target: Array, note: str = "") -> None:
    """`got` is the loss of `input` and `target`."""
    reason = disagreement(spec, got, input, target)
    assert not reason, f"{spec} {note}: {reason}"
