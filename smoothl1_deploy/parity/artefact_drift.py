"""The drift of what adds up with the number of elements, beside PyTorch's and the proved bound.

A loss that is reduced adds up; so does the gradient of an input that was broadcast, and a mean's
gradient is divided by what was added up. Two families say it all: `constant`, where every rounding
error of a sum points the same way, and `normal`, where they partly cancel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from ..backends.base import Runner
from ..errors import SmoothL1DeployError
from ..floats import Array
from ..records import plain as json_number
from ..reference.oracle import oracle, oracle_gradient
from ..spec import LossSpec
from .bounds import bound, in_range
from .cases import Case, CaseResult
from .compare import Verdict, compare
from .families import branch_shares
from .shapes import ShapePlan, elements

__all__ = ["FAMILIES", "SIZES", "DriftPoint", "artefact_drift", "drift_table"]

FAMILIES = ("constant", "normal")
SIZES = tuple(1 << power for power in (10, 14, 16, 18, 20, 22))
LARGE = 1 << 24


@dataclass(frozen=True, slots=True)
class DriftPoint:
    """One output of a model that was fed many elements.

    Attributes:
        elements: after broadcasting.
        result: the case and its verdict, ULP measured and allowed.
        output: `loss` or `grad_input`.
        value: the model's answer, the worst element of a gradient; None where none came.
        oracle: the exact one.
        relative: the distance to the oracle over the oracle; None where one is not finite.
        torch_relative: PyTorch's.
        bound: what the graphs of this package guarantee, in ULP (`parity.bounds`); one of them is
            held to it, anyone else's is only shown beside it. Infinite where float32 sums may be
            off by everything; None for a gradient, of which nothing is proved.
    """

    elements: int
    result: CaseResult
    output: str
    value: float | None
    oracle: float
    relative: float | None
    torch_relative: float | None
    bound: float | None

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
            "output": self.output,
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


def _measure(
    runners: Sequence[Runner],
    spec: LossSpec,
    case: Case,
    names: Sequence[str],
    accumulator: str | None,
) -> Iterator[DriftPoint]:
    """A point for each of the outputs called `names`: that of the runner whose answer is worst."""
    from ..reference.module import eager_outputs

    # Not References.of, whose cache would keep gigabytes of inputs.
    input, target = case.arrays(spec)
    weight = case.weights(spec) if spec.weight else None
    upstream = case.upstream(spec) if spec.upstream else None
    torch = eager_outputs(spec, input, target, weight, grad_output=upstream)
    shares = branch_shares(spec, input, target)
    count = math.prod(case.shape(spec))
    limit = bound(spec, count, accumulator or "float64")
    provable = accumulator is not None and math.isfinite(limit)
    provable = provable and in_range(spec, input, target, weight)
    answers: list[dict[str, Array] | str] = []
    for runner in runners:
        beta = spec.effective_beta if "beta" in runner.signature.inputs else None
        try:
            answers.append(
                runner.run(input, target, weight=weight, beta=beta, grad_output=upstream)
            )
        except SmoothL1DeployError as exc:  # an answer that doesn't come is a wrong answer
            answers.append(f"{type(exc).__name__}: {exc}")
    loss_name = runners[0].signature.loss.name
    for name in names:
        is_loss = name == "loss"
        exact = (
            oracle(spec, input, target, weight)
            if is_loss
            else oracle_gradient(spec, input, target, weight, upstream)
        )
        proved = math.floor(limit) if is_loss and provable else None
        judged: list[tuple[Verdict, Array | None]] = []
        for answer in answers:
            error, outputs = (answer, {}) if isinstance(answer, str) else ("", answer)
            got = outputs.get(loss_name if is_loss else name)
            verdict = Verdict(False, 0, 0, 0, 1, wrong_class=1, detail=error)
            if got is not None:
                if is_loss and got.size == exact.size:
                    got = got.reshape(exact.shape)  # a rank that PyTorch's hasn't: judged elsewhere
                verdict = compare(spec, got, torch[name], exact, input, target, name, proved)
            judged.append((verdict, got))
        verdict, got = max(judged, key=lambda pair: pair[0].badness)
        at = verdict.worst or 0
        value, truth, theirs = (_number(array, at) for array in (got, exact, torch[name]))
        assert truth is not None
        yield DriftPoint(
            count,
            CaseResult(case, verdict, shares),
            name,
            value,
            truth,
            _relative(value, truth),
            _relative(theirs, truth),
            limit if is_loss else None,
        )


def _number(array: Array | None, at: int) -> float | None:
    """An element; None where there is none."""
    return None if array is None or at >= array.size else float(array.reshape(-1)[at])


def _cases(plan: ShapePlan, any_rank: bool, sizes: Sequence[int], seed: int) -> Iterator[Case]:
    """The cases of each size; `any_rank`: with an input of one row, which is broadcast."""
    for shapes in dict.fromkeys(map(plan.of_size, sizes)):
        layout = ",".join(map(str, shapes[0]))
        if any_rank:
            shapes, layout = ((1, *shapes[0][1:]), *shapes[1:]), f"1 of {layout}"
        for family in FAMILIES:
            yield Case.at(family, layout, shapes, seed)


def _outputs(spec: LossSpec, case: Case) -> tuple[str, ...]:
    """What adds up, or is divided by what did."""
    reduced = spec.reduction != "none" and not spec.per_sample
    summed_back = case.input_shape != case.shape(spec)
    gradient = spec.gradient and (reduced or summed_back)
    return (*(["loss"] if reduced else []), *(["grad_input"] if gradient else []))


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
    plan = ShapePlan.of(runner.signature)
    sizes = (*SIZES, LARGE) if large else SIZES
    if elements(plan.of_size(sizes[0])) < sizes[0]:
        return ()
    any_rank = spec.gradient and runner.signature.input.shape is None
    points: list[DriftPoint] = []
    for case in _cases(plan, any_rank, sizes, seed):
        names = _outputs(spec, case)
        points += _measure((runner, *others), spec, case, names, accumulator) if names else ()
    return tuple(points)


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
    columns = ("elements", "inputs", "output", "error", "PyTorch's", "ULP", "PyTorch's", "allowed")
    for column in columns:
        table.add_column(column, justify="left" if column in ("inputs", "output") else "right")
    table.add_column("bound", justify="right")
    for point in sorted(points, key=lambda p: (p.output, FAMILIES.index(p.family), p.elements)):
        verdict = point.result.verdict
        wrong = "class" if verdict.wrong_class else f"{verdict.ulp:,}"
        table.add_row(
            f"{point.elements:,}",
            point.family,
            point.output,
            _error(point.relative),
            _error(point.torch_relative),
            Text(wrong, style="green" if point.ok else "bold red"),
            str(verdict.torch_ulp),
            str(verdict.allowed),
            "-" if point.bound is None or math.isinf(point.bound) else f"{point.bound:,.1f}",
        )
    return table
