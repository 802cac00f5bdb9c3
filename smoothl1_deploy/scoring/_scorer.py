"""What is computed, one session that computes it, and the engine of this machine.

A `Job` is fit to be sent to another machine; a `Scorer` is one session that does it, a batch at a
time. An engine is a function of a job, a plan and the tasks to do, and yields a `TaskResult` for
each, in any order: partial results are exact, so the order doesn't show in the result.
`score_locally` is the engine of this machine.

What a job adds up is one of three things.
Case 1, a spec: the element losses in its dtype, summed exactly. The result doesn't depend on how
the data are cut into batches.
Case 2, a spec with `per_sample`, or an artefact that has it: the scores, in the artefact's dtype;
the loss is combined exactly from the scores.
Case 3, any other artefact: what it gives for each batch, combined exactly; a batch is then rounded
by the artefact, and the size of the batches shows in the last digits.

Of a model with losses attached, one is computed anew of what the model makes of a batch: that is
case 1, or, for a loss of one score a row, case 2.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import onnx

from .._artefact import ModelSource, read_model, select_ports, sha256, signature
from .._floats import Array
from .._model import Loss, Port, read_attached
from .._spec import LossSpec
from ..backends._base import get_backend
from ..backends._runner import as_number
from ..backends._whole import ModelRunner, constant_operands, listed, showing, takes
from ..errors import ArtefactError, InvalidInputError, SmoothL1DeployError, SpecError
from ..graph._attach import attached_anew
from ..graph._metadata import read_spec, warn_if_changed
from ._partial import ExactSum, Partial, exact_sum
from ._shards import Plan, Shard, Task
from ._sources import Source, open_source


@dataclass(frozen=True, slots=True)
class Job:
    """What is computed.

    Attributes:
        model: the artefact that runs, serialised.
        spec: what is reported; its reduction says how the batches are combined.
        elementwise: whether the artefact gives a loss for each element (case 1).
        backend: what runs it.
        beta: for an artefact that takes it at run time.
        threads: for one call; 0 means every core.
        rows: the fixed length of the artefact's first axis, None where it is dynamic.
        any_rank: whether the artefact takes arrays of any shape.
        inputs: what a whole model takes, by name; empty for a loss of its own.
    """

    model: bytes
    spec: LossSpec
    elementwise: bool
    backend: str = "ort-cpu"
    beta: Any = None
    threads: int = 0
    rows: int | None = None
    any_rank: bool = True
    inputs: Mapping[str, Port] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What the result depends on, JSON-ready."""
        return {
            "spec": self.spec.to_dict(),
            "backend": self.backend,
            "beta": None if self.beta is None else repr(np.asarray(self.beta, float).tolist()),
            "model": sha256(self.model),
        }


def make_job(
    spec: LossSpec | None = None,
    artefact: ModelSource | None = None,
    *,
    backend: str = "ort-cpu",
    beta: Any = None,
    threads: int = 0,
    loss: str | None = None,
) -> Job:
    """The job of a spec, of an artefact, or of an artefact of other origin that a spec describes.

    Args:
        spec: alone: what is computed. Beside an artefact with `reduction="none"`: how its losses
            are combined. Beside a model of other origin: what it computes.
        artefact: an `onnx.ModelProto`, its bytes, or a path.
        backend: one of `backends.BACKENDS`.
        beta: for an artefact with `runtime_beta`.
        threads: for one call; 0 means every core.
        loss: of a model with several losses attached, the output that is scored.

    Raises:
        SpecError: where neither is given, or nothing can be combined, and where it can't be told
            which loss of a model is meant.
        ArtefactError: when `artefact` is no loss artefact.

    >>> from smoothl1_deploy import LossSpec
    >>> from smoothl1_deploy.scoring import make_job
    >>> make_job(LossSpec(beta=0.5)).spec.beta
    0.5
    """
    if artefact is None:
        if spec is None:
            raise SpecError("give spec=LossSpec(...) or artefact='loss.onnx'")
        return _job_of_spec(spec, backend, threads)
    read = read_model(artefact)
    warn_if_changed(read)
    attached = attached_loss(read, loss)
    model = read if attached else select_ports(read)
    own = attached.spec if attached else read_spec(model)
    known = own or spec
    if known is None:
        raise SpecError(
            "the model doesn't say what it computes; give the spec, its beta and its reduction"
        )
    if own is not None and own.reduction == "none":
        known = replace(own, reduction=spec.reduction if spec else "mean")
    if spec is not None and replace(known, dtype=spec.dtype) != spec:
        raise SpecError(
            f"the artefact computes {known.to_dict()}, not {spec.to_dict()}; ask for what it "
            "computes, or leave the artefact out"
        )
    _check_combined(known)
    if attached:
        asked = Job(b"", known, not known.per_sample, backend, beta, threads, any_rank=False)
        return _job_of_attached(read, attached, asked)
    ports = signature(model)
    known = replace(known, dtype=ports.input.dtype)
    many = bool(ports.loss.shape)
    elementwise = own.reduction == "none" if own else many and not known.keeps_axes
    shape = ports.input.shape
    rows = shape[0] if shape and isinstance(shape[0], int) else None
    data = model.SerializeToString(deterministic=True)
    return Job(data, known, elementwise, backend, beta, threads, rows, shape is None)


def _job_of_spec(spec: LossSpec, backend: str, threads: int) -> Job:
    from ..graph._export import export

    _check_combined(spec)
    if spec.runtime_beta:
        raise SpecError("runtime_beta leaves beta open; give beta as a number")
    spec = spec.without_gradient()
    data = export(_added_up(spec)).SerializeToString(deterministic=True)
    return Job(data, spec, not spec.per_sample, backend, None, threads)


def _added_up(spec: LossSpec) -> LossSpec:
    """What runs, so that nothing is rounded between an element, or a score, and the result."""
    return replace(spec, elements=None) if spec.per_sample else spec.of_elements


def attached_loss(model: onnx.ModelProto, name: str | None = None) -> Loss | None:
    """The loss of that name among those attached to a model; None where nothing was attached.

    Raises:
        SpecError: where there is none of that name, and where there are several and no name.
    """
    losses = {loss.outputs["loss"]: loss for loss in read_attached(model)}
    if name is None and len(losses) < 2:
        return next(iter(losses.values()), None)
    if name not in losses:
        asked = "several losses" if name is None else f"no loss {name!r} attached"
        raise SpecError(
            f"the model has {asked}; choose one of {', '.join(losses) or 'none'} with loss= "
            "(--loss)"
        )
    return losses[name]


def _job_of_attached(model: onnx.ModelProto, loss: Loss, job: Job) -> Job:
    """`job` with what runs, for one loss of a model."""
    spec, beta = job.spec, job.beta
    runs = _added_up(spec.without_gradient())
    if bool(spec.runtime_beta) != (beta is not None):
        raise SpecError(
            f"beta is {'missing' if spec.runtime_beta else 'fixed'} in the loss "
            f"{loss.outputs['loss']}; " + ("give it" if spec.runtime_beta else "leave it out")
        )
    if beta is not None:  # the input of such a loss is float32
        runs = runs.at(as_number(beta, shape=spec.beta_shape))
    alone = attached_anew(model, loss, runs)
    inputs = takes(alone)
    rows = {port.axes[:1] if port.axes is not None else (None,) for port in inputs.values()}
    sizes = {axis if isinstance(axis, int) else None for axes in rows for axis in axes}
    if () in rows or len(sizes) != 1:
        raise ArtefactError(
            f"the model takes {listed(inputs)}, and score gives each input some rows of its file, "
            "as many to each: their first axes have to be dynamic, or of one size. Make a constant "
            "of what has no rows"
        )
    data = alone.SerializeToString(deterministic=True)
    return replace(job, model=data, rows=sizes.pop(), inputs=inputs)


def _check_combined(spec: LossSpec) -> None:
    if spec.reduction == "none":
        raise SpecError(
            "the reduction none combines nothing; use mean or sum, per_sample for one score a "
            "row, or smoothl1-deploy run for the loss of every element"
        )
    if spec.divisor:
        raise SpecError(
            "the loss is divided by an input divisor, and for files there is none; take the sum, "
            "and divide it by the number of all data"
        )


class Scorer:
    """One loaded artefact.

    Raises:
        MissingDependencyError: when the backend's packages are not installed.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        model = onnx.load_model_from_string(job.model)  # which `make_job` has read without trust
        backend = get_backend(job.backend, job.threads)
        self._runner: Any
        if job.inputs:
            self._runner = ModelRunner(showing(model), backend.open)
            self._constants = constant_operands(model)
        else:
            self._runner = backend.load(model)

    def score(self, arrays: Mapping[str, Array]) -> tuple[Partial, Array | None]:
        """What one batch adds, and the score of each of its rows where there are scores.

        Args:
            arrays: `input`, `target` and, where the artefact takes them, `weight` and `mask`; of a
                whole model an array for each input.

        Raises:
            InvalidInputError: on arrays that don't fit the artefact.
        """
        spec = self.job.spec
        if not spec.keeps_axes and not all(array.size for array in arrays.values()):
            return Partial(), None  # an artefact's mean of no elements would be NaN
        if self.job.inputs:
            arrays, losses = self._of_the_model(arrays)
        else:
            outputs = self._runner.run(**arrays, beta=self.job.beta)
            losses = outputs[self._runner.signature.loss.name]
        operands = np.broadcast_shapes(*(array.shape for array in arrays.values()))
        shape = spec.broadcast_with_betas(operands)
        expected = shape if self.job.elementwise else spec.loss_shape(shape)
        if losses.shape != expected:
            raise InvalidInputError(
                f"the artefact gave a loss of shape {losses.shape} for a batch of {shape}, where "
                f"{expected} was expected; its metadata or the given reduction is wrong"
            )
        partial = self._partial(losses, arrays, shape)
        return partial, losses if spec.per_sample else None

    def _of_the_model(self, arrays: Mapping[str, Array]) -> tuple[dict[str, Array], Array]:
        """What a model makes of a batch: the operands of its loss by role, and their losses."""
        outputs = self._runner.run(**arrays)
        (loss,) = self._runner.losses
        tensors = {**self._constants, **arrays, **outputs}
        losses = outputs[loss.outputs["loss"]]
        rows = len(next(iter(arrays.values())))
        if self.job.spec.per_sample and len(losses) != rows:
            raise InvalidInputError(
                f"the model gave {len(losses)} scores for {rows} rows; its loss is not one score a "
                "row of its inputs"
            )
        return {role: tensors[name] for role, name in loss.inputs.items()}, losses

    def _partial(
        self, losses: Array, arrays: Mapping[str, Array], shape: tuple[int, ...]
    ) -> Partial:
        spec, count = self.job.spec, math.prod(shape)
        weight = arrays.get("weight") if spec.weight == "weights" else None
        mask = np.asarray(arrays["mask"], bool) if spec.mask else None
        if mask is not None:  # what an element counts, or weighs, in the divisor
            weight = mask if weight is None else np.where(mask, weight, weight.dtype.type(0))
        divisor = ExactSum(Fraction(count))
        if weight is not None:
            divisor = exact_sum(weight).times(count // max(weight.size, 1))
        if self.job.elementwise or spec.reduction == "sum":
            return Partial(exact_sum(losses), divisor, count)
        if weight is None:
            total = exact_sum(losses).times(count // max(losses.size, 1))
            return Partial(total, divisor, count)
        if not spec.keeps_axes:
            return Partial(_product(exact_sum(losses), divisor), divisor, count)
        kept = spec.kept_axes(len(shape))
        rows = np.moveaxis(np.broadcast_to(weight, shape), kept, range(len(kept)))
        total = ExactSum()
        for at in np.ndindex(losses.shape):  # this is slow, and rarely asked for
            total += _product(exact_sum(losses[at][None]), exact_sum(rows[at]))
        return Partial(total, divisor, count)


def _product(mean: ExactSum, weights: ExactSum) -> ExactSum:
    """A weighted mean times its weights: the total it came from; NaN and infinities spread.

    The mean over nothing is NaN, and came from nothing.
    """
    if not (weights.finite or weights.special):
        return ExactSum()
    if not (mean.special or weights.special):
        return ExactSum(mean.finite * weights.finite)
    signs = (x.special or (-1.0 if x.finite < 0 else 1.0) for x in (mean, weights))
    return ExactSum(special=math.prod(signs))


# Tasks


@dataclass(frozen=True, slots=True)
class TaskResult:
    """A finished task.

    Attributes:
        task: its index in the plan.
        partial: what it adds to the result.
        checksums: role -> CRC-32 of the rows that were read.
        scores: one for each of its rows, where the job gives scores.
    """

    task: int
    partial: Partial
    checksums: dict[str, int]
    scores: Array | None = None


class _Reader:
    """The files of the shard read last stay open: its next task goes on where this one ends."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._shard: Shard | None = None
        self._sources: dict[str, Source] = {}

    def batches(self, task: Task) -> Iterator[dict[str, Array]]:
        """The arrays of each batch by role, valid until the next one is taken."""
        shard = self._plan.shards[task.shard]
        if self._shard is not shard:
            self.close()
            self._open(shard)
        for start in range(task.start, task.stop, task.batch):
            stop = min(start + task.batch, task.stop)
            yield {role: source.read(start, stop) for role, source in self._sources.items()}

    def _open(self, shard: Shard) -> None:
        for role, location in shard.files.items():
            self._sources[role] = source = open_source(location)
            if source.shape != shard.shapes[role]:
                raise InvalidInputError(
                    f"{location} has changed while it was scored: its shape was "
                    f"{shard.shapes[role]} and is {source.shape}; score it again from the start"
                )
            if shard.flat:
                source.flatten()
        self._shard = shard

    def close(self) -> None:
        for source in self._sources.values():
            source.close()
        self._shard, self._sources = None, {}


def _add(sums: dict[str, int], batch: dict[str, Array]) -> None:
    for role, array in batch.items():
        data: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        sums[role] = zlib.crc32(data, sums.get(role, 0))


class TaskScorer:
    """One session, and the files of the shard that it works on."""

    def __init__(self, job: Job, plan: Plan) -> None:
        self._plan = plan
        self._scorer = Scorer(job)
        self._reader = _Reader(plan)
        self._beside = ThreadPoolExecutor(1, "smoothl1-deploy checksum")

    def score(self, task: Task) -> TaskResult:
        """Read a task batch by batch and score it.

        Raises:
            SmoothL1DeployError: naming the shard and the rows.
        """
        partial, sums, scores = Partial(), dict[str, int](), list[Array]()
        try:
            for batch in self._reader.batches(task):
                # The checksum is a third of the work, and zlib lets other threads run meanwhile.
                summed = self._beside.submit(_add, sums, batch)
                try:
                    added, rows = self._scorer.score(batch)
                finally:
                    summed.result()
                partial += added
                if rows is not None:
                    scores.append(rows)
        except SmoothL1DeployError as exc:
            shard = self._plan.shards[task.shard]
            where = "" if shard.flat else f", rows {task.start} to {task.stop}"
            raise type(exc)(f"shard {shard.name}{where}: {exc}") from exc
        joined = np.concatenate(scores) if scores else None
        return TaskResult(task.index, partial, sums, joined)

    def close(self) -> None:
        """Let go of the files, and end the thread of the checksums."""
        self._beside.shutdown()
        self._reader.close()


def score_locally(job: Job, plan: Plan, tasks: Iterable[Task]) -> Generator[TaskResult, None, None]:
    """One task after the other, in this process."""
    with contextlib.closing(TaskScorer(job, plan)) as scorer:
        for task in tasks:
            yield scorer.score(task)


def checksums(plan: Plan, tasks: Iterable[Task]) -> Iterator[tuple[Task, dict[str, int]]]:
    """Read `tasks` again, without scoring them; the checksums are those of a `TaskResult`."""
    with contextlib.closing(_Reader(plan)) as reader:
        for task in tasks:
            sums: dict[str, int] = {}
            for batch in reader.batches(task):
                _add(sums, batch)
            yield task, sums
