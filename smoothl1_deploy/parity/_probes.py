"""Small inputs whose answers tell one fault from another, and a model that is asked them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .._floats import NUMPY_DTYPE, Array, limits, round_to, wide_dtype
from .._spec import LossSpec
from ..backends._runner import Runner
from ..errors import SmoothL1DeployError
from ..reference._oracle import oracle
from ._bounds import UNIT_ROUNDOFF
from ._shapes import ShapePlan, Shapes, elements

#: Differences around every knee, and around none: the response of a model is read off these.
_TIMES_BETA = (0.125, 0.5, 0.75, 1.0, 1.25, 2.0, 8.0)
_ABSOLUTE = (2.0**-6, 0.125, 0.75, 1.0, 3.0, 8.0, 64.0, 1024.0)
#: Pairs whose parts or difference an integer can't hold; targets that stand for "no value".
_FRACTIONS = (
    *((2.75, 0.5), (-1.5, 1.25), (0.75, 0.5), (3.5, -0.75)),
    *((-0.5, -1.0), (-99.5, -100.0), (254.5, 255.0)),
)
#: Kind, text, and what one element of the input, or of the target, is: None leaves it ordinary.
_NOT_FINITE = (
    ("nan", "one NaN in the input", math.nan, None),
    ("nan", "one NaN in the target", None, math.nan),
    ("inf", "one +inf in the input", math.inf, None),
    ("inf", "one -inf in the input", -math.inf, None),
    ("inf", "one +inf in the target", None, math.inf),
    ("inf-inf", "+inf in the same element of input and target", math.inf, math.inf),
)
#: Text, and what every element of input and of target is.
_ZEROS = (("input equal to target", 0.5, 0.5), ("input -0, target +0", -0.0, 0.0))
_LONGEST_ROW = 256  # elements: those of a longer row are not asked one by one


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model said to one probe, beside the oracle.

    Attributes:
        spec: what the model ought to compute.
        kind: what the probe is for, as `constant`, `mixed` or `nan`; `text` says what was fed.
        arrays: input, target and, where the model takes some, weights of 1 and a mask that leaves
            nothing out, which leave every formula as it is.
        expected: the oracle's answer.
        got: the model's, in the shape of `expected` where the counts agree; of no elements where
            an error came instead.
        shape: the shape in which it came.
        gradient: the output `grad_input`, where there is one.
        error: in words; empty where there was none.
    """

    spec: LossSpec
    kind: str
    text: str
    arrays: tuple[Array, ...]
    expected: Array
    got: Array
    shape: tuple[int, ...] = ()
    gradient: Array | None = None
    error: str = ""

    @property
    def count(self) -> int:
        """Elements after broadcasting."""
        return elements(tuple(array.shape for array in self.arrays))

    @property
    def pair(self) -> tuple[Array, Array]:
        """Input and target, broadcast, in a wide format."""
        wide = wide_dtype(self.spec.dtype)
        input, target, *_ = np.broadcast_arrays(*self.arrays)
        return input.astype(wide), target.astype(wide)

    @property
    def overflowed(self) -> bool:
        """Whether it is infinite where the truth is not: a matter of range, not of a formula."""
        return bool(np.isinf(self.got).any() and np.isfinite(self.expected).all())


class Subject:
    """A model that is asked probes.

    Attributes:
        spec: what it ought to compute.
        any_rank: whether it takes arrays of any rank.
        has_gradient: whether it gives one beside the loss.
    """

    def __init__(self, runner: Runner, spec: LossSpec) -> None:
        self.spec = spec
        self.any_rank = runner.signature.input.shape is None
        self.has_gradient = any(port.name == "grad_input" for port in runner.signature.outputs)
        self._runner = runner
        self._plan = ShapePlan.of(runner.signature)
        self._dtype = NUMPY_DTYPE[spec.dtype]
        self._largest, self._tiny, _ = limits(spec.dtype)

    def ask(self, kind: str, text: str, arrays: tuple[Array, ...]) -> Reply:
        """Run one probe, with all that the model takes beside: beta, an upstream gradient of 1.

        A divisor is the count that a mean divides by without one.
        """
        spec, signature = self.spec, self._runner.signature
        given: dict[str, Any] = self._plan.by_role(arrays)
        expected = oracle(spec, **given)
        count = elements(tuple(array.shape for array in arrays)) // max(expected.size, 1)
        also = {
            "beta": spec.effective_beta,
            "divisor": count,
            "grad_output": np.ones_like(expected),
        }
        given |= {role: value for role, value in also.items() if role in signature.inputs}
        try:
            outputs = self._runner.run(**given)
        except SmoothL1DeployError as exc:
            error = f"{type(exc).__name__}: {exc}"
            return Reply(spec, kind, text, arrays, expected, expected.reshape(-1)[:0], error=error)
        answer, gradient = outputs[signature.loss.name], outputs.get("grad_input")
        got = answer.reshape(expected.shape) if answer.size == expected.size else answer
        return Reply(spec, kind, text, arrays, expected, got, answer.shape, gradient)

    @cached_property
    def ordinary(self) -> list[Reply]:
        """To ordinary numbers: these depend on the formula and the reduction alone."""
        first, second, row = (self._plan.small(size) for size in (3, 5, 1))
        if not elements(first):
            return []
        sizes = self._differences()
        others = {second: sizes[::3]}
        # In one row |d| counts most: the fewer the elements, the less can be rounding. For a loss
        # per sample one row can't be told from all.
        if not self.spec.keeps_axes:
            others[row] = [d for d in sizes if d >= self.spec.effective_beta][:2]
        if self.any_rank:
            others[((3, 1), *[(1, 4)] * (len(first) - 1))] = sizes[::3]
        others.pop(first, None)
        signed = [sign * d for d in sizes for sign in (1, -1)]
        replies: list[Reply] = []
        for shapes, differences in {first: signed, **others}.items():
            count = elements(shapes)
            replies += [
                self.ask("constant", f"d = {d:g} in all {count} elements", self._full(shapes, d))
                for d in differences
                if self._is_usable(d, count)
            ]
            replies += self._mixed(shapes)
        count = elements(first)
        for a, b in _FRACTIONS:
            if self._is_usable(a - b, count):
                text = f"input {a:g}, target {b:g} in all {count} elements"
                replies.append(self.ask("fraction", text, self._full(first, a, b)))
        return replies

    def elementwise(self) -> list[Reply]:
        """One element of a row different from the target, each in turn: its weight shows alone.

        Where every axis is fixed the row is the whole. A row of one element tells nothing, and a
        very long one is not asked.
        """
        shapes, d = self._plan.small(), 3.0
        whole = np.broadcast_shapes(*shapes)
        row = math.prod(whole if self._plan.growing is None else whole[1:])
        if shapes[0] != whole or not 1 < row <= _LONGEST_ROW or not self._is_usable(d, 1):
            return []
        replies = []
        for i in range(row):
            arrays = self._full(shapes, 0.0)
            arrays[0].reshape(-1, row)[:, i] = d
            replies.append(self.ask("element", f"d = {d:g} in element {i} of a row", arrays))
        return replies

    def special(self) -> list[Reply]:
        """To NaN, infinities, zeros, and nothing at all."""
        shapes = self._plan.small()
        replies: list[Reply] = []
        if elements(shapes):
            for kind, text, *values in _NOT_FINITE:
                arrays = self._full(shapes, 0.5)
                for array, value in zip(arrays, values, strict=False):
                    if value is not None:
                        array.reshape(-1)[0] = value
                replies.append(self.ask(kind, text, arrays))
            for text, a, b in _ZEROS:
                replies.append(self.ask("zero", text, self._full(shapes, a, b)))
        if self._plan.free:
            replies.append(self.ask("empty", "no elements", self._full(self._plan.empty(), 0.0)))
        return replies

    def _full(self, shapes: Shapes, a: float, b: float = 0.0) -> tuple[Array, ...]:
        """Input, target, weights and mask, each of one number."""
        values, dtypes = {"input": a, "target": b}, {"mask": np.dtype(bool)}
        with np.errstate(over="ignore"):
            return tuple(
                np.full(shape, values.get(role, 1.0)).astype(dtypes.get(role, self._dtype))
                for role, shape in self._plan.by_role(shapes).items()
            )

    def _mixed(self, shapes: Shapes) -> Iterator[Reply]:
        """All elements different, in the dtype's full precision; signs mostly unlike, so that what
        is lost of input and target is not much more of their difference.
        """
        rng = np.random.default_rng(20)
        knee = min(max(self.spec.effective_beta, 2.0**-6), 32.0)  # where the branches mix
        for scale, targets in ((0.4, None), (1.0, None), (4.0, None), (1.0, (-0.6, 0.0, 0.15))):
            size = knee * scale
            left = rng.uniform(0.3, 1.0, shapes[0]) * size
            right = rng.uniform(-1.0, -0.3, shapes[1]) * size
            if targets is not None:  # 0 and either sign are what masks are made of
                right = rng.permutation(np.resize(targets, right.size)).reshape(right.shape) * size
            sign = rng.choice([-1.0, 1.0])
            text = f"random differences around {size:g}, shapes {shapes[0]} and {shapes[1]}"
            arrays = self._full(shapes, 0.0)
            for array, values in zip(arrays, (left, right), strict=False):
                array[...] = (values * sign).astype(self._dtype)
            input, target, *_ = arrays
            wide = np.abs(input.astype(np.float64) - target.astype(np.float64))
            if all(self._is_usable(float(d), wide.size) for d in (wide.min(), wide.max())):
                yield self.ask("mixed", text, arrays)

    def _is_usable(self, d: float, count: int) -> bool:
        """Whether any sane order of evaluation stays in the range of the dtype.

        A square that over- or underflows is a matter of rounding and range, not of the formula.
        """
        beta = self.spec.effective_beta
        if not self._tiny < abs(d) < self._largest / 4:
            return False
        if abs(d) <= beta:
            within = self._tiny < d * d < self._largest / (2 * count)
            return within and 0.5 * d * d / beta > self._tiny
        return abs(d) * count < self._largest / 4

    def _differences(self) -> list[float]:
        beta = self.spec.effective_beta
        values = list(_ABSOLUTE)
        if 0 < beta < math.inf:
            values += [factor * beta for factor in _TIMES_BETA]
        with np.errstate(over="ignore"):
            rounded = round_to(np.asarray(values, wide_dtype(self.spec.dtype)), self.spec.dtype)
        differences = {float(value) for value in rounded.astype(np.float64)}
        # Where the dtype can't hold beta, a model's own rounding decides which side of it is which.
        blurred = 0.0 if beta in differences else 4 * UNIT_ROUNDOFF[self.spec.dtype] * beta
        return sorted(d for d in differences if not abs(d - beta) < blurred)
