"""Small inputs whose answers tell one fault from another, and the asking of a runner."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from ...backends.base import Runner
from ...errors import SmoothL1DeployError
from ...floats import NUMPY_DTYPE, Array, round_to, wide_dtype
from ...reference.oracle import oracle
from ...spec import LossSpec
from ..bounds import UNIT_ROUNDOFF
from ..shapes import ShapePlan, Shapes, elements

__all__ = [
    "Answer",
    "Probe",
    "ask",
    "ask_all",
    "boundary_probe",
    "formula_probes",
    "narrow_probe",
    "place_probes",
    "run_spec",
    "special_probes",
]

#: Differences around every knee, and around none: the response of a model is read off these.
_TIMES_BETA = (0.125, 0.5, 0.75, 1.0, 1.25, 2.0, 8.0)
_ABSOLUTE = (2.0**-6, 0.125, 0.75, 1.0, 3.0, 8.0, 64.0, 1024.0)
#: Pairs whose parts or difference an integer can't hold; targets that stand for "no value".
_FRACTIONS = (
    *((2.75, 0.5), (-1.5, 1.25), (0.75, 0.5), (3.5, -0.75)),
    *((-0.5, -1.0), (-99.5, -100.0), (254.5, 255.0)),
)
_MOST_PLACES = 256  # of a row that are asked one by one


@dataclass(frozen=True, slots=True)
class Probe:
    """One input pair; `kind` says what it is for, `text` what it is.

    `weight` is all 1, which leaves every formula as it is; None where the model takes none.
    """

    kind: str
    text: str
    input: Array
    target: Array
    weight: Array | None = None

    @property
    def arrays(self) -> tuple[Array, ...]:
        """What broadcasts together."""
        pair = (self.input, self.target)
        return pair if self.weight is None else (*pair, self.weight)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said, beside the oracle.

    Attributes:
        got: in the shape of `expected` where the counts agree; None where an error came.
        shape: as it came.
        gradient: the output `grad_input`, where there is one.
        error: in words; empty where there was none.
    """

    probe: Probe
    expected: Array
    got: Array | None
    shape: tuple[int, ...] = ()
    gradient: Array | None = None
    error: str = ""

    @property
    def overflowed(self) -> bool:
        """Whether it is infinite where the truth is not: a matter of range, not of a formula."""
        if self.got is None:
            return False
        return bool(np.isinf(self.got).any() and np.isfinite(self.expected).all())


def run_spec(
    runner: Runner, spec: LossSpec, input: Array, target: Array, weight: Array | None = None
) -> dict[str, Array]:
    """Run with what the artefact takes beside its pair: weights, beta where it is an input, and
    an upstream gradient of 1.
    """
    beta = spec.effective_beta if "beta" in runner.signature.inputs else None
    upstream = None
    if "grad_output" in runner.signature.inputs:
        arrays = [input, target] if weight is None else [input, target, weight]
        shape = np.broadcast_shapes(*(array.shape for array in arrays))
        if spec.reduction != "none":
            shape = shape[:1] if spec.per_sample else ()
        upstream = np.ones(shape, NUMPY_DTYPE[spec.dtype])
    return runner.run(input, target, weight=weight, beta=beta, grad_output=upstream)


def ask(runner: Runner, spec: LossSpec, probe: Probe) -> Answer:
    """Run one probe."""
    expected = oracle(spec, probe.input, probe.target, probe.weight)
    try:
        outputs = run_spec(runner, spec, probe.input, probe.target, probe.weight)
    except SmoothL1DeployError as exc:
        return Answer(probe, expected, None, error=f"{type(exc).__name__}: {exc}")
    got = outputs[runner.signature.loss.name]
    shape = got.shape
    if got.size == expected.size:
        got = got.reshape(expected.shape)
    return Answer(probe, expected, got, shape, outputs.get("grad_input"))


def ask_all(runner: Runner, spec: LossSpec, probes: Sequence[Probe]) -> list[Answer]:
    """Run several."""
    return [ask(runner, spec, probe) for probe in probes]


def _full(spec: LossSpec, shapes: Shapes, a: float, b: float = 0.0) -> tuple[Array, ...]:
    """Input, target and, where there is one, weight, each of one number."""
    dtype = NUMPY_DTYPE[spec.dtype]
    with np.errstate(over="ignore"):
        parts = zip(shapes, (a, b, 1.0), strict=False)
        return tuple(np.full(shape, value).astype(dtype) for shape, value in parts)


def _range(spec: LossSpec) -> tuple[float, float]:
    info = ml_dtypes.finfo(NUMPY_DTYPE[spec.dtype])  # type: ignore[no-untyped-call]
    return float(info.tiny), float(info.max)


def _usable(spec: LossSpec, d: float, count: int) -> bool:
    """Whether any sane order of evaluation stays in the range of the dtype.

    A square that over- or underflows is a matter of rounding and range, not of the formula.
    """
    tiny, largest = _range(spec)
    beta = spec.effective_beta
    if not tiny < abs(d) < largest / 4:
        return False
    if abs(d) <= beta:
        return tiny < d * d < largest / (2 * count) and 0.5 * d * d / beta > tiny
    return abs(d) * count < largest / 4


def _differences(spec: LossSpec) -> list[float]:
    beta = spec.effective_beta
    values = list(_ABSOLUTE)
    if 0 < beta < math.inf:
        values += [factor * beta for factor in _TIMES_BETA]
    with np.errstate(over="ignore"):
        rounded = round_to(np.asarray(values, wide_dtype(spec.dtype)), spec.dtype)
    differences = {float(value) for value in rounded.astype(np.float64)}
    # Where the dtype can't hold beta, a model's own rounding decides which side of it is which.
    blurred = 0.0 if beta in differences else 4 * UNIT_ROUNDOFF[spec.dtype] * beta
    return sorted(d for d in differences if not abs(d - beta) < blurred)


def _knee(spec: LossSpec) -> float:
    """A size of differences for which the branches mix, if they can."""
    return min(max(spec.effective_beta, 2.0**-6), 32.0)


def _mixed(spec: LossSpec, shapes: Shapes) -> Iterator[Probe]:
    """All elements different, in the dtype's full precision; signs mostly unlike, so that what is
    lost of input and target is not much more of their difference.
    """
    rng = np.random.default_rng(20)
    dtype = NUMPY_DTYPE[spec.dtype]
    for scale, targets in ((0.4, None), (1.0, None), (4.0, None), (1.0, (-0.6, 0.0, 0.15))):
        size = _knee(spec) * scale
        left = rng.uniform(0.3, 1.0, shapes[0]) * size
        right = rng.uniform(-1.0, -0.3, shapes[1]) * size
        if targets is not None:  # of either sign and 0, as a mask is made of
            right = rng.permutation(np.resize(targets, right.size)).reshape(right.shape) * size
        sign = rng.choice([-1.0, 1.0])
        low, high = (0.6, 2.0) if targets is None else (0.15, 1.6)
        probe = Probe(
            "mixed",
            f"random differences of {low * size:g} to {high * size:g}, shapes {shapes[0]} and "
            f"{shapes[1]}",
            (left * sign).astype(dtype),
            (right * sign).astype(dtype),
            *_full(spec, shapes, 0.0)[2:],
        )
        wide = np.abs(probe.input.astype(np.float64) - probe.target.astype(np.float64))
        if all(_usable(spec, float(d), max(wide.size, 1)) for d in (wide.min(), wide.max())):
            yield probe


def formula_probes(spec: LossSpec, plan: ShapePlan, any_rank: bool) -> list[Probe]:
    """Ordinary numbers: what they give depends on the formula and the reduction alone."""
    probes: list[Probe] = []
    first, second = plan.small(3), plan.small(5)
    if not elements(first):
        return []
    for d in _differences(spec):
        for sign in (1, -1):
            if _usable(spec, d, elements(first)):
                text = f"d = {sign * d:g} in all {elements(first)} elements"
                probes.append(Probe("constant", text, *_full(spec, first, sign * d)))
    for a, b in _FRACTIONS:
        if _usable(spec, a - b, elements(first)):
            text = f"input {a:g}, target {b:g} in all {elements(first)} elements"
            probes.append(Probe("fraction", text, *_full(spec, first, a, b)))
    sizes = _differences(spec)
    others = {second: sizes[::3]}
    # One row, where |d| counts most: the fewer elements, the less can be rounding. Per sample one
    # row can't be told from all.
    if not spec.per_sample:
        others[plan.small(1)] = [d for d in sizes if d >= spec.effective_beta][:2]
    if any_rank:
        others[((3, 1), (1, 4), (1, 4))[: len(first)]] = sizes[::3]
    for shapes in {first: [], **others}:
        probes += _mixed(spec, shapes)
        for d in others[shapes] if shapes != first else []:
            if _usable(spec, d, elements(shapes)):
                text = f"d = {d:g}, shapes {shapes[0]} and {shapes[1]}"
                probes.append(Probe("constant", text, *_full(spec, shapes, d)))
    return probes


def place_probes(spec: LossSpec, plan: ShapePlan) -> list[Probe]:
    """One place of a row different from the target, each in turn: what it counts shows alone.

    Where every axis is fixed the row is the whole. None of one place, nor of very many.
    """
    shapes, d = plan.small(), 3.0
    whole = np.broadcast_shapes(*shapes)
    row = whole if plan.growing is None else whole[1:]
    places = math.prod(row)
    if shapes[0] != whole or not 1 < places <= _MOST_PLACES or not _usable(spec, d, 1):
        return []
    probes = []
    for place in range(places):
        input, target, *weight = _full(spec, shapes, 0.0)
        input.reshape(-1, places)[:, place] = d
        probes.append(
            Probe("place", f"d = {d:g} in place {place} of a row", input, target, *weight)
        )
    return probes


def narrow_probe(spec: LossSpec, plan: ShapePlan, bits: int) -> Probe | None:
    """A difference of 4.25 that is 4 where the inputs keep only `bits` of significand."""
    shapes = plan.small()
    base = 2.0**bits
    _, largest = _range(spec)
    if not elements(shapes) or base >= largest:
        return None
    text = f"input {base:g} + 0.25, target {base:g} - 4"
    return Probe("narrow", text, *_full(spec, shapes, base + 0.25, base - 4))


def boundary_probe(spec: LossSpec, plan: ShapePlan) -> Probe | None:
    """|d| exactly beta, where the two formulas agree unless a square leaves the range."""
    beta, shapes = spec.effective_beta, plan.small()
    tiny, largest = _range(spec)
    if not elements(shapes) or not tiny < beta < largest / (4 * elements(shapes)):
        return None
    dtype = NUMPY_DTYPE[spec.dtype]
    if float(np.asarray(beta).astype(dtype)) != beta:
        return None  # no difference of this dtype is exactly beta
    return Probe("boundary", f"d = beta = {beta:g}", *_full(spec, shapes, beta))


def special_probes(spec: LossSpec, plan: ShapePlan) -> list[Probe]:
    """NaN, infinities, zeros, and nothing at all."""
    shapes = plan.small()
    probes: list[Probe] = []
    if elements(shapes):
        for kind, text, a, b in (
            ("nan", "one NaN in the input", math.nan, None),
            ("nan", "one NaN in the target", None, math.nan),
            ("inf", "one +inf in the input", math.inf, None),
            ("inf", "one -inf in the input", -math.inf, None),
            ("inf", "one +inf in the target", None, math.inf),
            ("inf-inf", "+inf in input and target at the same place", math.inf, math.inf),
        ):
            input, target, *weight = _full(spec, shapes, 0.5)
            for array, value in ((input, a), (target, b)):
                if value is not None:
                    array.reshape(-1)[0] = value
            probes.append(Probe(kind, text, input, target, *weight))
        probes.append(Probe("zero", "input equal to target", *_full(spec, shapes, 0.5, 0.5)))
        probes.append(Probe("zero", "input -0, target +0", *_full(spec, shapes, -0.0, 0.0)))
    if plan.free:
        probes.append(Probe("empty", "no elements", *_full(spec, plan.empty(), 0.0)))
    return probes
