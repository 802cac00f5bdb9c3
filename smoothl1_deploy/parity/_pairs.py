"""Every pair of a half format: 2^32 inputs and targets, each answer against the exact one.

The exact loss of an element, and the size of its slope, grow with the exact distance |d|. So for
each number of the format there is one threshold of |d| from which on the correctly rounded answer
is at least that number, and the answer to a pair is the number of thresholds that its |d| reaches.

A distance is compared with a threshold exactly, each as two float64 numbers: `high`, the exact
value rounded, and `low`, what that leaves, rounded. Rounding is monotone: the larger of two exact
values has no smaller `high`, and where those are equal no smaller `low`. Where both are equal, what
counts was decided in rational arithmetic when the threshold was made. The difference of two numbers
of a half format is the sum of two float64 numbers (Knuth's TwoSum; Higham, section 4.3).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .._certainty import Certainty
from .._environment import environment
from .._files import read_file
from .._floats import CLASS_NAMES, NUMPY_DTYPE, Array, ieee_class
from .._records import Record
from .._spec import LossSpec
from .._table import Table
from ..backends._base import get_backend
from ..backends._runner import Runner
from ..errors import ArtefactError, SmoothL1DeployError, SpecError, UnsupportedError, require
from ..graph._export import export
from ..reference._oracle import exact_outputs
from ._compare import _torch_lost_it
from ._pool import each

#: The formats of which every pair can be tried.
DTYPES = ("float16", "bfloat16")
#: A file with our operators, and bare.
BACKENDS = ("ort-cpu", "ort-cpu-bare")
CODES = 1 << 16
PAIRS = CODES * CODES
_SIGN = 1 << 15
_NAN = CLASS_NAMES.index("nan")
#: Tasks: each has every 64th input, which meets every target, so that one is a sample of all.
_TASKS = 64
_AT_ONCE = 4  # inputs of a call: what 2^18 pairs are computed with stays in the cache


@dataclass(frozen=True, slots=True)
class Distances(Record):
    """How far answers are from the correctly rounded ones, in ULP.

    Attributes:
        counts: of the pairs at 0, 1, 2, and 3 or more. Those of another class (another sign of
            zero, or NaN or an infinity on one side alone) are in none of them.
        largest: of all.
    """

    counts: tuple[int, int, int, int] = (0, 0, 0, 0)
    largest: int = 0

    def __add__(self, other: Distances) -> Distances:
        first, *rest = (a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Distances((first, *rest), max(self.largest, other.largest))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Tally(Record):
    """One output of a file over some pairs, or all.

    Attributes:
        pairs: how many.
        ours: the file's distances from the correctly rounded answer.
        torch: PyTorch's.
        wrong_class: pairs whose IEEE class is neither PyTorch's nor, where PyTorch lost it, the
            exact one.
        better: pairs whose class is the exact one where PyTorch's isn't.
        worst: a pair with what came out: of a wrong class if there is one, else the furthest.
    """

    pairs: int = 0
    ours: Distances = Distances()
    torch: Distances = Distances()
    wrong_class: int = 0
    better: int = 0
    worst: dict[str, str] | None = None
    derived: ClassVar = ("ok", "allowed")

    @property
    def allowed(self) -> int:
        """ULP, by the rules of the matrix: PyTorch's largest and one more."""
        return max(self.torch.largest + 1, 2 if self.better else 0)

    @property
    def ok(self) -> bool:
        """Whether every pair is what the matrix calls green."""
        return not self.wrong_class and self.ours.largest <= self.allowed

    @property
    def red(self) -> str:
        """What is wrong of one that isn't `ok`."""
        why = f"of another class, {self.wrong_class:,}" if self.wrong_class else "too far off"
        return f"red, {why}, as {json.dumps(self.worst)}"

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Tally:
        """The inverse of `to_dict`, for whole numbers and texts; raises as `Proof.from_dict`."""
        ours, torch = (
            Distances(tuple(int(n) for n in entry[side]["counts"]), int(entry[side]["largest"]))  # type: ignore[arg-type]
            for side in ("ours", "torch")
        )
        pairs, wrong, better = (int(entry[name]) for name in ("pairs", "wrong_class", "better"))
        return cls(pairs, ours, torch, wrong, better, entry["worst"])

    def __add__(self, other: Tally) -> Tally:
        names = ("pairs", "ours", "torch", "wrong_class", "better")
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        nearer, further = sorted((other, self), key=lambda t: (t.wrong_class > 0, t.ours.largest))
        return Tally(**sums, worst=further.worst or nearer.worst)


@dataclass(frozen=True, slots=True)
class Claim(Record):
    """What is to be shown of every pair: `none` and its gradient, of one beta, by some backends."""

    dtype: str
    beta: float
    backends: tuple[str, ...] = BACKENDS
    route: str = "function"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise SpecError(
                f"every pair can be tried of {' and '.join(DTYPES)}, which have 2^32; of "
                f"{self.dtype} there are too many: give one of those, or run parity"
            )

    @property
    def spec(self) -> LossSpec:
        """Both outputs in one graph."""
        return LossSpec(self.beta, "none", self.dtype, gradient=True)

    def runner(self, backend: str) -> Runner:
        """The file by one of the backends; without its gradient where that has none."""
        made, spec = get_backend(backend, threads=1), self.spec
        spec = spec if made.refuses(spec) is None else spec.without_gradient()
        return made.load(export(spec, self.route, ("N", CODES)))


class Thresholds:
    """The exact distances at which a correctly rounded answer becomes the next number.

    Args:
        values: the distance (or, where `squared`, its square) of each threshold, in order.
        squared: how many of the first are squares.
    """

    def __init__(self, values: Sequence[Fraction], squared: int = 0) -> None:
        made = [_threshold(v, is_square=i < squared, ties=i % 2 == 1) for i, v in enumerate(values)]
        self._high = np.array([high for high, _, _ in made] + [math.inf])
        self._before = np.append(-math.inf, self._high[:-1])
        self._low = np.array([low for _, low, _ in made])
        self._reached = np.array([reached for _, _, reached in made], bool)
        if not (np.diff(self._high) > 0).all():
            raise UnsupportedError("two thresholds are nearer to each other than float64 can tell")

    def reached(self, a: Array, b: Array, guess: Array) -> Array:
        """How many of them |a - b| reaches, exactly, of each a with every b.

        Both are float64 numbers of a half format, of shapes [inputs, 1] and [targets]. A `guess`,
        the answers' codes with any sign, saves the search where it proves right.
        """
        distance = np.abs(a - b)
        found = np.minimum(guess & (_SIGN - 1), len(self._low)).astype(np.intp)
        is_right = (self._before[found] < distance) & (distance < self._high[found])
        at = np.flatnonzero(~is_right)  # several times as fast as np.nonzero
        x, y = a[at // b.size, 0], b[at % b.size]
        found.flat[at] = self._search(x, y, found.flat[at])
        return np.asarray(found.astype(np.uint16))

    def _search(self, x: Array, y: Array, guess: Array) -> Array:
        d = x - y
        distance = np.abs(d)
        found: Array = guess - (distance == self._before[guess])
        is_other = self._high[found] != distance
        found[is_other] = np.searchsorted(self._high, distance[is_other])
        (at,) = np.nonzero(self._high[found] == distance)
        x, y, d, equal = x[at], y[at], d[at], found[at]
        back = d - x  # Knuth's TwoSum: d + rest is x - y
        rest = ((x - (d - back)) + (-y - back)) * np.where(d < 0, -1.0, 1.0)
        low = self._low[equal]
        found[at] += (rest > low) | ((rest == low) & self._reached[equal])
        return found


def _threshold(value: Fraction, *, is_square: bool, ties: bool) -> tuple[float, float, bool]:
    """`high` and `low` of one, and whether a distance of exactly their sum reaches it.

    `ties` says whether the threshold itself, where the answer lies in the middle of two numbers,
    goes to the upper one.
    """
    if is_square:
        bits = max(0, 240 + value.denominator.bit_length() - value.numerator.bit_length()) // 2 * 2
        scaled = (value.numerator << bits) // value.denominator
        root = Fraction(math.isqrt(scaled), 1 << bits // 2)
    else:
        root = value
    high = float(root)
    low = float(root - Fraction(high))
    both = Fraction(high) + Fraction(low)
    exact = both * both if is_square else both
    return high, low, exact > value or (exact == value and ties)


class Exact:
    """The correctly rounded answers for one dtype and beta, to any inputs and every target.

    Attributes:
        targets: every number of the format, those that are finite in order, then the others.
        finite: how many are.
    """

    def __init__(self, spec: LossSpec) -> None:
        self.spec = spec
        dtype = NUMPY_DTYPE[spec.dtype]
        every = np.arange(CODES, dtype=np.uint16).view(dtype)
        with np.errstate(invalid="ignore"):  # ml_dtypes tells of NaN that it converts
            wide = every.astype(np.float64)
        finite = np.isfinite(wide)
        order = np.argsort(wide[finite], kind="stable")
        self.targets = np.concatenate([every[finite][order], every[~finite]])
        self.finite = int(finite.sum())
        self._wide = np.concatenate([wide[finite][order], wide[~finite]])
        # What isn't finite is of three kinds, and all of a kind have the same answers.
        odd = np.array([np.inf, -np.inf, np.nan]).astype(dtype)
        self._met = self._by_oracle(every[:, None], odd[None])  # by an input's code, and kind
        self._rows = self._by_oracle(odd[:, None], self.targets[None])  # by an input's kind
        self._one = int(np.ones(1, dtype).view(np.uint16)[0])
        self._loss, self._slope = self._tables(wide)

    def _tables(self, values: Array) -> tuple[Thresholds, Thresholds]:
        """The thresholds of the loss and of the slope's size, at the format's numbers above 0."""
        beta = self.spec.effective_beta
        if math.isinf(beta):
            return Thresholds(()), Thresholds(())
        infinite = int(np.argmax(np.isinf(values)))
        exact = [Fraction(float(v)) for v in values[:infinite]]
        exact.append(2 * exact[-1] - exact[-2])  # what would follow the largest
        middles = [(a + b) / 2 for a, b in pairwise(exact)]
        b = Fraction(beta)
        below = [middle for middle in middles if middle < b / 2]
        above = middles[len(below) :]
        losses = Thresholds([2 * b * m for m in below] + [m + b / 2 for m in above], len(below))
        slopes = [middle * b for middle in middles[: self._one]] if beta else []
        return losses, Thresholds(slopes)

    def answers(self, inputs: Array, guess: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """The bits of the loss and of the gradient: uint16 of shape [inputs, 2^16].

        A `guess` in the same form makes it faster where it is right, and changes nothing.
        """
        with np.errstate(invalid="ignore"):  # numpy tells of a signalling NaN that it converts
            wide = inputs.astype(np.float64)
        is_odd = ~np.isfinite(wide)
        x, targets = np.where(is_odd, 0, wide)[:, None], self._wide[: self.finite]
        none = np.zeros((len(inputs), CODES), np.uint16)
        loss, grad = (
            (guess or {}).get(name, none)[:, : self.finite] for name in ("loss", "grad_input")
        )
        if self.spec.effective_beta == 0:  # the sign of the difference, which of -0 is 0
            slope = np.where(x == targets, 0, np.where(x < targets, self._one | _SIGN, self._one))
        else:
            slope = self._slope.reached(x, targets, grad)
            slope += np.uint16(_SIGN) * np.signbit(x - targets)
        known = {"loss": self._loss.reached(x, targets, loss), "grad_input": slope}
        kinds, found = _kinds(self._wide[self.finite :]), {}
        for name, answers in known.items():
            odd = self._met[name][inputs.view(np.uint16)][:, kinds]
            found[name] = np.concatenate([answers.astype(np.uint16), odd], axis=1)
            found[name][is_odd] = self._rows[name][_kinds(wide[is_odd])]
        return found

    def _by_oracle(self, inputs: Array, targets: Array) -> dict[str, Array]:
        x, t = (np.ascontiguousarray(a) for a in np.broadcast_arrays(inputs, targets))
        return _codes_of(exact_outputs(self.spec, x, t))


def _kinds(odd: Array) -> Array:
    """The kinds of numbers that aren't finite: 0 for inf, 1 for -inf, 2 for NaN."""
    return np.where(np.isnan(odd), 2, odd < 0).astype(int)


@cache
def _codes(dtype: str) -> tuple[Array, Array]:
    """The class of every number of a format, by its bits, and its rank among the numbers."""
    values = np.arange(CODES, dtype=np.uint16).view(NUMPY_DTYPE[dtype])
    magnitude = (np.arange(CODES) & (_SIGN - 1)).astype(np.int32)
    with np.errstate(invalid="ignore"):  # of a signalling NaN numpy tells
        classes = ieee_class(values)
    return classes, np.where(np.signbit(values), -magnitude, magnitude)


def _apart(dtype: str, got: Array, exact: Array) -> tuple[Distances, Array, int]:
    """How answers differ from the exact ones.

    Returns:
        the distances of those in the right class, the indices of the others, and the index of the
        one that is furthest off.
    """
    classes, order = _codes(dtype)
    differs = np.flatnonzero(got != exact)
    ours, truth = got[differs], exact[differs]
    lost = classes[ours] != classes[truth]
    ulp = np.abs(order[ours] - order[truth])
    ulp[lost | (classes[truth] == _NAN)] = 0
    one, two, some = (int(np.count_nonzero(found)) for found in (ulp == 1, ulp == 2, ulp))
    same = int(got.size - np.count_nonzero(lost)) - some
    distances = Distances((same, one, two, some - one - two), int(ulp.max(initial=0)))
    return distances, differs[lost], int(differs[np.argmax(ulp)]) if ulp.size else 0


def tally(
    spec: LossSpec, output: str, got: Array, torch: Array, exact: Array, *pair: Array
) -> Tally:
    """Judge the answers to some pairs by the rules 1 and 2 of the matrix.

    `got`, `torch` and `exact` are their bits, `pair` the inputs and targets; all of them flat.
    """
    classes, _ = _codes(spec.dtype)
    (ours, lost, furthest), (theirs, more, _) = (_apart(spec.dtype, a, exact) for a in (got, torch))
    is_lost = np.zeros(got.shape, bool)
    is_lost[lost] = is_lost[more] = True
    at = np.flatnonzero(is_lost)
    mine, their, truth = (classes[bits[at]] for bits in (got, torch, exact))
    x, y = (side[at] for side in pair)
    by_torch = _torch_lost_it(spec, their, x, y, output)
    healed = np.asarray((mine == truth) & (their != truth) & by_torch)
    wrong = at[~((mine == their) | healed)]
    worst = None
    if wrong.size or ours.largest:
        index = int(wrong[0]) if wrong.size else furthest
        answers = {"got": got, "exact": exact, "torch": torch}
        numbers = {name: bits.view(pair[0].dtype) for name, bits in answers.items()}
        shown = {"input": pair[0], "target": pair[1], **numbers}
        worst = {name: str(array[index]) for name, array in shown.items()}
    return Tally(got.size, ours, theirs, int(wrong.size), int(healed.sum()), worst)


@cache
def _prepared(claim: Claim) -> tuple[Exact, dict[str, Runner]]:
    # glibc gives blocks as large as the arrays here back to the system, which clears them, until it
    # has seen a larger one: a third of the time.
    np.empty(31 << 20, np.uint8)
    return Exact(claim.spec), {backend: claim.runner(backend) for backend in claim.backends}


#: Of each backend the tally of each output, `loss` and `grad_input`.
Tallies = dict[str, dict[str, Tally]]


def _codes_of(outputs: Mapping[str, Array]) -> dict[str, Array]:
    return {name: answer.view(np.uint16) for name, answer in outputs.items()}


def _try_task(task: tuple[Claim, int]) -> Tallies:
    """The tallies of the inputs of a task, by its number, with every target."""
    from ..reference._module import eager_outputs

    claim, number = task
    exact, runners = _prepared(claim)
    found: Tallies = {backend: {} for backend in runners}
    targets = np.tile(exact.targets, (_AT_ONCE, 1))
    mine = exact.targets[number::_TASKS]
    for start in range(0, len(mine), _AT_ONCE):
        inputs = mine[start : start + _AT_ONCE]
        x = np.repeat(inputs, CODES).reshape(_AT_ONCE, CODES)
        got = {backend: _codes_of(runner.run(x, targets)) for backend, runner in runners.items()}
        torch = _codes_of(eager_outputs(claim.spec, x, targets))
        right = exact.answers(inputs, next(iter(got.values())))
        for backend, outputs in got.items():
            for name, bits in outputs.items():
                given = (bits, torch[name], right[name], x, targets)
                made = tally(claim.spec, name, *(array.reshape(-1) for array in given))
                found[backend][name] = found[backend].get(name, Tally()) + made
    return found


@dataclass(frozen=True, slots=True)
class Proof(Record):
    """What was found of a claim, so far.

    Attributes:
        claim: what is to be shown.
        outputs: of each backend the tally of each output, `loss` and `grad_input`.
        left: numbers of the tasks that are still to be done; none where every pair was tried.
        seconds: that it took.
        environment: the versions that it holds for.
    """

    claim: Claim
    outputs: Tallies
    left: tuple[int, ...]
    seconds: float
    environment: dict[str, Any]
    derived: ClassVar = ("pairs", "ok", "command")

    @classmethod
    def begun(cls, claim: Claim) -> Proof:
        """A proof that has tried no pair yet."""
        return cls(claim, {}, tuple(range(_TASKS)), 0.0, environment())

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Proof:
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError, SpecError: on what is no such entry.
        """
        claim = dict(entry["claim"])
        claim |= {"beta": float(claim["beta"]), "backends": tuple(map(str, claim["backends"]))}
        outputs = {
            str(backend): {str(name): Tally.from_dict(made) for name, made in found.items()}
            for backend, found in entry["outputs"].items()
        }
        left = tuple(int(number) for number in entry["left"])
        proof = cls(
            Claim(**claim), outputs, left, float(entry["seconds"]), dict(entry["environment"])
        )
        if any(made.pairs != proof.pairs for made in proof.tallies):
            raise ValueError("the pairs and what is left don't add up to all")
        return proof

    @property
    def command(self) -> str:
        """What repeats it."""
        claim = self.claim
        backends = " ".join(f"--backend {backend}" for backend in claim.backends)
        return (
            f"smoothl1-deploy prove --dtype {claim.dtype} --beta {claim.beta:g} "
            f"{backends} --route {claim.route}"
        )

    @property
    def tallies(self) -> list[Tally]:
        """Those of every output of every backend."""
        return [made for outputs in self.outputs.values() for made in outputs.values()]

    @property
    def pairs(self) -> int:
        """How many were tried."""
        return PAIRS * (_TASKS - len(self.left)) // _TASKS

    @property
    def ok(self) -> bool:
        """Whether every pair was tried, and every output is green."""
        return not self.left and all(made.ok for made in self.tallies)


def read_proofs(path: Path) -> list[Proof]:
    """What a run of `prove` wrote.

    Raises:
        ArtefactError: when the file is not there, or is none of it.
    """
    try:
        return [Proof.from_dict(entry) for entry in json.loads(read_file(path))["entries"]]
    except (ValueError, KeyError, TypeError, AttributeError, SmoothL1DeployError) as exc:
        raise ArtefactError(
            f"{path} is no file of smoothl1-deploy prove ({exc}); give another, or move it"
        ) from exc


def table(proofs: Iterable[Proof]) -> Table:
    """Of each beta and output how much is rounded correctly, and how far the rest is off."""
    proofs = sorted(proofs, key=lambda proof: proof.claim.beta)
    whose = dict.fromkeys(("PyTorch", *(name for proof in proofs for name in proof.outputs)))
    rows = []
    for proof in proofs:
        for output, first in next(iter(proof.outputs.values()), {}).items():
            made = {name: found[output] for name, found in proof.outputs.items() if output in found}
            shown = {name: _share(tally.pairs, tally.ours) for name, tally in made.items()}
            shown["PyTorch"] = _share(first.pairs, first.torch)
            beta = f"{proof.claim.beta:g}"
            rows.append((beta, output, f"{proof.pairs:,}", *(shown.get(n, "") for n in whose)))
    red = [
        f"beta {proof.claim.beta:g}, {backend}, {output}: {made.red}"
        for proof in proofs
        for backend, outputs in proof.outputs.items()
        for output, made in outputs.items()
        if not made.ok
    ]
    sure = Certainty.SAMPLES if any(proof.left for proof in proofs) else Certainty.EVERY_PAIR
    dtypes = ", ".join(dict.fromkeys(proof.claim.dtype for proof in proofs))
    title = f"{dtypes}, rounded correctly: {sure}"
    below = [*dict.fromkeys(_made_with(proof) for proof in proofs), *red]
    columns = ("beta", "output", "pairs", *whose)
    return Table(title, columns, rows, "rlr" + "l" * len(whose), tuple(below), keys=2)


def _made_with(proof: Proof) -> str:
    packages = proof.environment.get("packages", {})
    known = [f"{name} {packages[name]}" for name in ("onnxruntime", "torch") if packages.get(name)]
    return f"made with {', '.join([*known, str(proof.environment.get('processor'))])}"


def _share(pairs: int, found: Distances) -> str:
    """Of them, rounded down; how far the others are off at most; how many are of another class."""
    if found.counts[0] == pairs:
        return "all"
    lost = pairs - sum(found.counts)
    told = f"{found.counts[0] * 10**6 // pairs / 10**4:.4f}%, {found.largest} ULP"
    return f"{told}, class {lost:,}" if lost else told


def prove(
    proof: Proof,
    *,
    workers: int = 1,
    most: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Proof]:
    """Try the pairs that are left, some inputs after others; yields what is known after each step.

    Args:
        proof: what is known already; `Proof.begun` of a claim where nothing is.
        workers: processes; 1 works in this one.
        most: how many of the 64 steps to take; None for all that are left.
        progress: called with the steps done and their number, at the start and after each.

    Raises:
        MissingDependencyError: when torch or the backend is not installed.
    """
    require("torch", "torch", "prove, which compares with PyTorch,")
    for backend in proof.claim.backends:
        get_backend(backend)  # what is missing is said here, and not by each process
    started, before = time.monotonic(), proof.seconds
    progress(_TASKS - len(proof.left), _TASKS)
    tasks = [(proof.claim, number) for number in proof.left[:most]]
    for (_, number), found in each(_try_task, tasks, workers):
        outputs = {
            backend: {
                name: made + proof.outputs.get(backend, {}).get(name, Tally())
                for name, made in more.items()
            }
            for backend, more in found.items()
        }
        left = tuple(other for other in proof.left if other != number)
        seconds = round(before + time.monotonic() - started, 1)
        proof = replace(proof, outputs=outputs, left=left, seconds=seconds)
        progress(_TASKS - len(left), _TASKS)
        yield proof
