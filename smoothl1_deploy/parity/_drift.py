"""Error against size: how far what adds up drifts from the truth as the tensor grows.

A loss that is reduced adds up; so does the gradient of an input that was broadcast, and a mean's
gradient is divided by what was added up. Two families say it all: `constant`, where every rounding
error of a sum points the same way, and `normal`, where they partly cancel.

`artefact_drift` measures one artefact for `verify`; `measure_drift` three ways to the same mean for
the report: this tool's graph and the plain exporter's, both on ONNX Runtime's CPU provider, and
PyTorch eager. The plain graph adds float32 up one after the other (microsoft/onnxruntime#28450).
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from .._artefact import select_ports
from .._records import Record, plain
from .._spec import LossSpec
from ..backends._base import get_backend
from ..backends._runner import Runner
from ..graph._export import export
from ._bounds import bound
from ._cases import Case, CaseResult, Judged, References, judge
from ._contract import plain_export
from ._shapes import ShapePlan, elements

DATA = ("constant", "normal")
#: Elements that an artefact is measured at, `LARGE` on demand; those of the curves in the report.
SIZES = tuple(1 << power for power in (10, 14, 16, 18, 20, 22))
LARGE = 1 << 24
CURVE_SIZES = tuple(1 << power for power in range(10, 25))


@dataclass(frozen=True, slots=True)
class DriftPoint:
    """One output of a model that was fed many elements.

    Attributes:
        elements: after broadcasting.
        result: the case and its verdict, ULP measured and allowed.
        output: `loss` or `grad_input`.
        value: the model's answer, the worst element of a gradient; None where none came.
        torch: PyTorch's answer.
        oracle: the exact one.
        bound: what the graphs of this package guarantee, in ULP (`parity.bounds`); one of them is
            held to it, anyone else's is only shown beside it. Infinite where float32 sums may be
            off by everything; None for a gradient, of which nothing is proved.
    """

    elements: int
    result: CaseResult
    output: str
    value: float | None
    torch: float
    oracle: float
    bound: float | None

    @property
    def family(self) -> str:
        """The family of the inputs."""
        return self.result.case.family

    @property
    def ok(self) -> bool:
        """Whether it is green."""
        return self.result.verdict.ok

    @property
    def relative(self) -> float | None:
        """The distance to the oracle over the oracle; None where one is not finite."""
        return self._relative(self.value)

    @property
    def torch_relative(self) -> float | None:
        """PyTorch's distance, likewise."""
        return self._relative(self.torch)

    def _relative(self, value: float | None) -> float | None:
        truth = self.oracle
        if value is None or not (math.isfinite(value) and math.isfinite(truth)) or truth == 0:
            return None
        return abs(value - truth) / abs(truth)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "elements": self.elements,
            "output": self.output,
            "ok": self.ok,
            "value": plain(self.value),
            "oracle": plain(self.oracle),
            "relative_error": self.relative,
            "torch_relative_error": self.torch_relative,
            "bound_ulp": plain(self.bound),
            "case": self.result.to_dict(),
        }


def artefact_drift(
    runner: Runner,
    spec: LossSpec,
    *,
    seed: int = 0,
    large: bool = False,
    accumulator: str | None = None,
    others: Sequence[Runner] = (),
) -> tuple[DriftPoint, ...]:
    """The error of what adds up at 2^10 to 2^22 elements, with `large` at 2^24 too.

    Of an artefact whose axes are all fixed, at its one size, if that is as large. Nothing is
    measured of `none`, which does not add up, nor per sample, whose rows the first axis leaves
    as they are, but of their gradients where input is broadcast.

    Args:
        runner: of the artefact.
        spec: what it ought to compute.
        seed: of the inputs.
        large: 2^24 elements as well.
        accumulator: the dtype in which one of our own artefacts is added up, which is then held
            to the bound that is proved for it; None for anyone else's.
        others: that run the same artefact in another way; of each point the worst is kept.
    """
    plan = ShapePlan.of(runner.signature, spec.beta_shape)
    sizes = (*SIZES, LARGE) if large else SIZES
    if elements(plan.of_size(sizes[0])) < sizes[0]:
        return ()
    is_broadcast = spec.gradient and runner.signature.input.shape is None
    points: list[DriftPoint] = []
    for shapes, family in product(dict.fromkeys(map(plan.of_size, sizes)), DATA):
        layout = ",".join(map(str, shapes[0]))
        if is_broadcast:
            shapes, layout = ((1, *shapes[0][1:]), *shapes[1:]), f"1 of {layout}"
        case = Case.at(family, layout, plan.by_role(shapes), seed)
        if names := _outputs(spec, case):
            refs = References.of(spec, case)
            # That the rank of a loss is wrong is seen in the cases.
            runners = (runner, *others)
            judged = [judge(one, refs, accumulator, numbers_alone=True) for one in runners]
            limit = bound(spec, math.prod(case.shape(spec)), accumulator or "float64")
            points += [_point(refs, name, judged, limit) for name in names]
    return tuple(points)


def _outputs(spec: LossSpec, case: Case) -> list[str]:
    """What adds up, or is divided by what did."""
    reduced = not spec.keeps_axes
    summed_back = case.input_shape != case.shape(spec)
    gradient = spec.gradient and (reduced or summed_back)
    return ["loss"] * reduced + ["grad_input"] * gradient


def _point(
    refs: References, name: str, judged: Sequence[dict[str, Judged]], limit: float
) -> DriftPoint:
    """One output, as the runner answered whose answer is the worst."""
    answers = [found.get(name, found["loss"]) for found in judged]
    worst = max(answers, key=lambda answer: answer.verdict.badness)
    at = worst.verdict.worst or 0
    value = None if worst.got is None or at >= worst.got.size else float(worst.got.flat[at])
    torch, exact = (float(answer[name].flat[at]) for answer in (refs.torch, refs.oracle))
    result = CaseResult(refs.case, worst.verdict, refs.shares)
    count, proved = math.prod(refs.case.shape(refs.spec)), limit if name == "loss" else None
    return DriftPoint(count, result, name, value, torch, exact, proved)


WAYS = ("smoothl1-deploy", "torch.onnx.export", "PyTorch eager")
_COLUMNS, _SEED = 16, 0
_SPEC = LossSpec(beta=1.0, reduction="mean", dtype="float32")


@dataclass(frozen=True, slots=True)
class Curve(Record):
    """One way of computing the mean, on one kind of data.

    Attributes:
        way: one of `WAYS`.
        data: one of `DATA`.
        elements: the sizes.
        relative_error: against the oracle, rounded to float32, at each size.
        ulp: the distance to it, at each size.
    """

    way: str
    data: str
    elements: tuple[int, ...]
    relative_error: tuple[float, ...]
    ulp: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Drift(Record):
    """The curves of every way on every kind of data, for one spec."""

    spec: LossSpec
    seed: int
    seconds: float
    curves: tuple[Curve, ...]


def measure_drift(
    sizes: Sequence[int] = CURVE_SIZES,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Drift:
    """Measure every way on every kind of data, at each size.

    Args:
        sizes: numbers of elements, multiples of 16.
        progress: called with the measurements done and their number, before and after each size.

    Raises:
        MissingDependencyError: without torch or onnxruntime.
    """
    started = time.perf_counter()
    axes = ("N", _COLUMNS)
    plain_model = select_ports(plain_export({"beta": _SPEC.beta}, _SPEC.dtype, axes))
    models = export(_SPEC, shape=axes), plain_model
    runners = [get_backend("ort-cpu").load(model) for model in models]
    found: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
    measured = [*product(DATA, sizes)]
    progress(0, len(measured))
    for done, (data, size) in enumerate(measured, 1):
        shape = (size // _COLUMNS, _COLUMNS)
        refs = References.of(_SPEC, Case(data, "drift", shape, shape, seed=_SEED))
        ours, plain = (_point(refs, "loss", [judge(each, refs)], math.inf) for each in runners)
        verdict = ours.result.verdict
        errors = ours.relative, plain.relative, ours.torch_relative
        distances = verdict.ulp, plain.result.verdict.ulp, verdict.torch_ulp
        for way, error, ulp in zip(WAYS, errors, distances, strict=True):
            found[way, data].append((error or 0.0, ulp))
        progress(done, len(measured))
    curves = tuple(
        Curve(way, data, tuple(sizes), *map(tuple, zip(*points, strict=True)))
        for (way, data), points in found.items()
    )
    return Drift(_SPEC, _SEED, time.perf_counter() - started, curves)
