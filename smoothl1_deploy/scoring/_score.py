"""`loss_over` batches, and `score_files`: one exact result of data larger than memory."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .._artefact import ModelSource
from .._dlpack import as_array
from .._files import check_apart, refusal_told
from .._records import Record
from .._spec import LossSpec
from ..errors import InvalidInputError, OutputError, SpecError
from ._journal import Journal, default_journal
from ._output import ScoreFile
from ._partial import Partial
from ._scorer import Job, Scorer, TaskResult, make_job, score_locally
from ._shards import Plan, Task, make_plan

Engine = Callable[[Job, Plan, Sequence[Task]], Generator[TaskResult, None, None]]
_ROLES = ("input", "target", "weight", "mask")


@dataclass(frozen=True, slots=True)
class Score(Record):
    """The loss of all data.

    Attributes:
        loss: the exact mean or sum of the losses, rounded once to float64.
        sum: the exact sum, rounded likewise.
        count: the number of elements.
        spec: what was computed.
        shards: the number of shards, or of the batches of `loss_over`.
        seconds: how long this run took.
        resumed: the number of elements that an interrupted run had done.
        output: where the scores of the rows are.

    >>> import numpy as np
    >>> from smoothl1_deploy import LossSpec, loss_over
    >>> score = loss_over([(np.ones(4, "f4"), np.zeros(4, "f4"))], LossSpec())
    >>> score.loss, score.sum, score.count
    (0.5, 2.0, 4)
    """

    loss: float
    sum: float
    count: int
    spec: LossSpec
    shards: int
    seconds: float
    resumed: int = 0
    output: Path | None = None
    derived: ClassVar[tuple[str, ...]] = ("rate",)

    def __repr__(self) -> str:
        of = f"{self.spec.reduction} of {self.count:,} elements, {self.shards:,} shards"
        where = "" if self.output is None else f", rows in {self.output}"
        return f"<Score {self.loss!r}: {of} in {self.seconds:.1f} s{where}>"

    @property
    def rate(self) -> float:
        """Elements scored a second, in this run."""
        return (self.count - self.resumed) / self.seconds if self.seconds else math.nan


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is, in elements; the last task was of the shard called `shard`.

    `forgotten` says why the run, once it is interrupted, begins again: None where it goes on.
    """

    done: int
    total: int
    shard: str = ""
    forgotten: str | None = None

    @property
    def percent(self) -> int:
        """The share of the elements that is done."""
        return self.done * 100 // max(self.total, 1)


def loss_over(
    batches: Iterable[Any],
    spec: LossSpec | None = None,
    artefact: ModelSource | None = None,
    *,
    backend: str = "ort-cpu",
    beta: Any = None,
    threads: int = 0,
    loss: str | None = None,
) -> Score:
    """The loss of all batches together, of which one at a time is in memory.

    With a `spec` the losses of the elements are added without rounding: the result is the same for
    every size and order of the batches, and for a mean it is the sum over the number of all
    elements, not the mean of means. With an `artefact` what it gives for each batch is combined in
    the same way.

    Args:
        batches: pairs `(input, target)`, triples with a `weight`, or mappings of these names and
            `mask`; each array as `run` takes it. For a model with a loss attached, mappings of the
            names of its inputs.
        spec: what is computed; its reduction is `mean` or `sum`.
        artefact: instead of a spec, or beside one that says how its losses are combined.
        backend: what runs it.
        beta: for an artefact that takes it at run time.
        threads: how many one call may use; 0 means every core.
        loss: of a model with several losses attached, the output that is meant.

    Raises:
        SpecError: on a reduction that combines nothing.
        InvalidInputError: on arrays that don't fit; the message says which batch.

    >>> import numpy as np
    >>> from smoothl1_deploy import LossSpec, loss_over
    >>> batches = ((np.full(rows, 2, "f4"), np.zeros(rows, "f4")) for rows in (1000, 24))
    >>> loss_over(batches, LossSpec(beta=0.5, reduction="mean")).loss
    1.75
    """
    start = time.monotonic()
    job = make_job(spec, artefact, backend=backend, beta=beta, threads=threads, loss=loss)
    scorer = Scorer(job)
    partial, number = Partial(), 0
    for number, batch in enumerate(batches, 1):
        try:
            partial += scorer.score(_arrays(batch, job.inputs))[0]
        except InvalidInputError as exc:
            raise InvalidInputError(f"batch {number}: {exc}") from exc
    return _result(job, partial, number, start)


def _result(job: Job, partial: Partial, shards: int, start: float, **more: Any) -> Score:
    loss = partial.mean if job.spec.reduction == "mean" else partial.sum
    of_nothing = not (partial.divisor.finite or partial.divisor.special or partial.total.special)
    if job.spec.empty == "zero" and of_nothing:
        loss = 0.0
    seconds = time.monotonic() - start
    return Score(loss, partial.sum, partial.count, job.spec, shards, seconds, **more)


def _arrays(batch: Any, inputs: Collection[str]) -> dict[str, Any]:
    if inputs:
        if not isinstance(batch, Mapping):
            raise InvalidInputError(
                f"a {type(batch).__name__} is no batch of this model; give a mapping of "
                f"{', '.join(inputs)}"
            )
        return {name: as_array(value, name) for name, value in batch.items()}
    if isinstance(batch, Mapping):
        if unknown := sorted(str(key) for key in {*batch} - {*_ROLES}):
            raise InvalidInputError(
                f"it has {', '.join(unknown)}; a mapping has input, target and, for a spec with "
                "them, weight and mask"
            )
        given = dict(batch)
    elif isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        given = dict(zip(_ROLES, batch, strict=False))
    else:
        raise InvalidInputError(
            f"a {type(batch).__name__} is no batch; give (input, target) or a mapping"
        )
    if absent := [role for role in _ROLES[:2] if role not in given]:
        raise InvalidInputError(f"{' and '.join(absent)} is missing")
    return {role: as_array(value, role) for role, value in given.items()}


def score_files(
    job: Job,
    located: Mapping[str, Mapping[str, Any]],
    *,
    output: Path | None = None,
    journal: Path | None = None,
    restart: bool = False,
    batch: int | None = None,
    engine: Engine = score_locally,
    on_progress: Callable[[Progress], object] = lambda progress: None,
) -> Score:
    """The loss of all shards, in bounded memory, to be resumed where it was interrupted.

    Args:
        job: as `make_job` gives it.
        located: as `locate` gives it.
        output: for one score a row, .npy or .parquet; for a job that gives scores.
        journal: its file. Default: one in the user's cache folder, for this request; where that
            can't be, one that goes with the run.
        restart: throw away what an interrupted run has done.
        batch: rows at a time. Default: about 2^18 elements, or what the artefact is fixed to.
        engine: `score_locally`, or a `RayEngine`.
        on_progress: called at the start and after each task.

    Raises:
        InvalidInputError: on files that don't fit together, or that changed; it names the shard.
        OutputError: when scores or journal can't be written, or would take the place of another of
            the files that are named.

    >>> import numpy as np
    >>> from pathlib import Path
    >>> from smoothl1_deploy import LossSpec
    >>> from smoothl1_deploy.scoring import locate, make_job, score_files
    >>> paths = {"input": Path("input.npy"), "target": Path("target.npy")}
    >>> np.save(paths["input"], np.ones((6, 4), "f4"))
    >>> np.save(paths["target"], np.zeros((6, 4), "f4"))
    >>> score_files(make_job(LossSpec(reduction="sum")), locate(paths, {})).sum
    12.0
    """
    if output is not None and not job.spec.per_sample:
        raise SpecError(f"{output} is for one score a row; give --per-sample, or leave it out")
    if batch is not None and batch < 1:
        raise SpecError(f"a batch of {batch} rows; give at least one")
    if job.rows is not None and batch not in (None, job.rows):
        raise SpecError(f"the artefact takes {job.rows} rows at a time, not {batch}")
    read = [
        (f"the file of {role}", at.path) for files in located.values() for role, at in files.items()
    ]
    check_apart([("-o", output), ("--journal", journal)], read)
    start = time.monotonic()
    flat = job.elementwise and job.any_rank
    plan = make_plan(located, flat=flat, rows=job.rows or batch, compared=not job.inputs)
    forgotten = None
    with contextlib.ExitStack() as stack:
        if journal is None:
            try:
                journal = default_journal(job, plan, output, batch)
            except OutputError as exc:
                forgotten = f"an interrupted run begins again: {exc}"
                with refusal_told("can't keep a journal anywhere", "give a file with --journal"):
                    own = stack.enter_context(tempfile.TemporaryDirectory())
                journal = Path(own, "journal")
        log = stack.enter_context(contextlib.closing(Journal(journal, job, plan, output, restart)))
        scores = None if output is None else ScoreFile(output, plan, job.spec.dtype, log)
        if scores is not None and log.done and not scores.kept:
            log.forget()
        resumed = sum(partial.count for partial in log.done.values())
        todo = [task for task in plan.tasks if task.index not in log.done]
        total = sum(map(plan.elements, plan.tasks))
        done = total - sum(map(plan.elements, todo))
        on_progress(Progress(done, total, forgotten=forgotten))
        try:
            # An interrupt comes here: closing makes the engine let go of files and workers.
            with contextlib.closing(engine(job, plan, todo)) as results:
                for result in results:  # each is on the disk before the next is taken
                    if scores is not None and result.scores is not None:
                        scores.write(result.task, result.scores)
                    log.add(result)
                    task = plan.tasks[result.task]
                    done += plan.elements(task)
                    shard = plan.shards[task.shard].name
                    on_progress(Progress(done, total, shard, forgotten))
        except BaseException:
            if scores is not None:
                scores.close(keep=bool(log.done) and forgotten is None)
            raise
        partial = sum(log.done.values(), Partial())
        if scores is not None:
            scores.finish()
        log.finish()
    return _result(job, partial, len(plan.shards), start, resumed=resumed, output=output)
