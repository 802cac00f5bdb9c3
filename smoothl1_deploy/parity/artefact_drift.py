"""The drift of a reduction with the number of elements, beside PyTorch's and the proved bound.

Two families say it all: `constant`, where every rounding error of a sum points the same way,
and `normal`, where they partly cancel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table
from rich.text import Text

from ..backends.base import Runner
from ..errors import SmoothL1DeployError
from ..reference.oracle import oracle
from ..spec import LossSpec
from .bounds import bound, in_range
from .cases import Case, CaseResult
from .compare import Verdict, compare
from .families import branch_shares
from .faults.names import json_number
from .faults.probes import run_spec
from .shapes import ShapePlan, elements

__all__ = ["FAMILIES", "SIZES", "DriftPoint", "artefact_drift", "drift_table"]

FAMILIES = ("constant", "normal")
SIZES = tuple(1 << power for power in (10, 14, 16, 18, 20, 22))
LARGE = 1 << 24


@dataclass(frozen=True, slots=True)
class DriftPoint:
    """One reduction of many elements.

    Attributes:
        elements: after broadcasting.
        result: the case and its verdict, ULP measured and allowed.
        value: the model's answer; None where none came.
        oracle: the exact one.
        relative: the distance to the oracle over the oracle; None where one is not finite.
        torch_relative: PyTorch's.
        bound: what the graphs of this package guarantee, in ULP (`parity.bounds`); one of them is
            held to it, anyone else's is only shown beside it. Infinite where float32 sums may be
            off by everything.
    """

    elements: int
    result: CaseResult
    value: float | None
    oracle: float
    relative: float | None
    torch_relative: float | None
    bound: float

    @property
    def family(self) -> str:
        """Of the inputs."""
        return self.result.case.family

    @property
    def ok(self) -> bool:
        """The verdict."""
        return self.result.verdict.ok

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "elements": self.elements,
            "ok": self.ok,
            "value": json_number(self.value),
            "oracle": json_number(self.oracle),
            "relative_error": self.relative,
            "torch_relative_error": self.torch_relative,
            "bound_ulp": json_number(self.bound),
            "case": self.result.to_dict(),
        }


def _relative(value: float | None, truth: float) -> float | None:
    if value is None or not (math.isfinite(value) and math.isfinite(truth)) or truth == 0:
        return None
    return abs(value - truth) / abs(truth)


def _measure(runner: Runner, spec: LossSpec, case: Case, accumulator: str | None) -> DriftPoint:
    from ..reference.module import eager_outputs

    # Not References.of, whose cache would keep gigabytes of inputs.
    input, target = case.arrays(spec)
    weight = case.weights(spec) if spec.weight else None
    exact = oracle(spec, input, target, weight)
    torch = eager_outputs(spec, input, target, weight)["loss"]
    shares = branch_shares(spec, input, target)
    count = elements((input.shape, target.shape))
    limit = bound(spec, count, accumulator or "float64", runner.added_in_float32(count))
    proved = None
    if accumulator is not None and math.isfinite(limit) and in_range(spec, input, target, weight):
        proved = math.floor(limit)
    value: float | None = None
    try:
        loss = run_spec(runner, spec, input, target, weight)[runner.signature.loss.name]
        if loss.size == 1:  # a rank that PyTorch's result doesn't have is judged elsewhere
            loss, value = loss.reshape(exact.shape), float(loss.reshape(-1)[0])
        verdict = compare(spec, loss, torch, exact, input, target, bound=proved)
    except SmoothL1DeployError as exc:  # an answer that doesn't come is a wrong answer
        verdict = Verdict(False, 0, 0, 0, 1, wrong_class=1, detail=f"{type(exc).__name__}: {exc}")
    truth = float(exact)
    return DriftPoint(
        count,
        CaseResult(case, verdict, shares),
        value,
        truth,
        _relative(value, truth),
        _relative(float(torch), truth),
        limit,
    )


def _cases(plan: ShapePlan, sizes: Sequence[int], seed: int) -> Iterator[Case]:
    for shapes in dict.fromkeys(map(plan.of_size, sizes)):
        layout = ",".join(map(str, shapes[0]))
        for family in FAMILIES:
            yield Case(family, layout, *shapes, seed)


def artefact_drift(
    runner: Runner,
    spec: LossSpec,
    *,
    seed: int = 0,
    large: bool = False,
    accumulator: str | None = None,
) -> tuple[DriftPoint, ...]:
    """The error of a reduction at 2^10 to 2^22 elements, with `large` at 2^24 too.

    Of an artefact whose axes are all fixed, at its one size, if that is as large. Nothing is
    measured of `none`, which does not add up, nor per sample, whose rows the first axis leaves
    as they are. The gradient is not looked at.

    Args:
        runner: of the artefact.
        spec: what it ought to compute.
        seed: of the inputs.
        large: 2^24 elements as well.
        accumulator: the dtype in which one of our own artefacts is added up, which is then held
            to the bound that is proved for it; None for anyone else's.
    """
    plan = ShapePlan.of(runner.signature)
    sizes = (*SIZES, LARGE) if large else SIZES
    spec = replace(spec, gradient=False)
    if spec.reduction == "none" or spec.per_sample or elements(plan.of_size(sizes[0])) < sizes[0]:
        return ()
    return tuple(_measure(runner, spec, case, accumulator) for case in _cases(plan, sizes, seed))


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def drift_table(points: Sequence[DriftPoint]) -> Table:
    """One row a size and family: error and ULP, measured, PyTorch's, allowed, bound."""
    table = Table(
        title="error of the reduction by size",
        title_justify="left",
        caption="bound: what is proved of the graphs that smoothl1-deploy makes, in ULP",
        caption_justify="left",
    )
    for column in ("elements", "inputs", "error", "PyTorch's", "ULP", "PyTorch's", "allowed"):
        table.add_column(column, justify="left" if column == "inputs" else "right")
    table.add_column("bound", justify="right")
    for point in sorted(points, key=lambda p: (FAMILIES.index(p.family), p.elements)):
        verdict = point.result.verdict
        wrong = "class" if verdict.wrong_class else f"{verdict.ulp:,}"
        table.add_row(
            f"{point.elements:,}",
            point.family,
            _error(point.relative),
            _error(point.torch_relative),
            Text(wrong, style="green" if point.ok else "bold red"),
            str(verdict.torch_ulp),
            str(verdict.allowed),
            "-" if math.isinf(point.bound) else f"{point.bound:,.1f}",
        )
    return table
