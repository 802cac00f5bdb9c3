"""`smoothl1-deploy score`: the loss of data larger than memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._spec import NORMALIZERS, REDUCTIONS, LossSpec
from ..errors import InvalidInputError, OutputError, SpecError, require
from ._arrays import named_files
from ._console import on_interrupt, print_fields, print_note, print_result, progress_console, typed
from ._options import AsJson, BackendName, Count, Next, one_of, takes_spec, typed_options

if TYPE_CHECKING:
    from ..scoring._score import Engine, Progress, Score
    from ..scoring._scorer import Job

EXAMPLE = "smoothl1-deploy score --input predictions.npy --target targets.npy --beta 0.5"

_ENGINES = ("local", "ray")


@takes_spec(
    *("gradient", "upstream", "runtime_beta", "weight", "mask", "divisor", "elements", "loss"),
    reduction=REDUCTIONS[1:],
)
def score(
    given: dict[str, Any],
    *,
    input: list[str],
    target: Path | None = None,
    weight: Path | None = None,
    mask: Path | None = None,
    normalizer: Annotated[str, one_of(*NORMALIZERS)] = "count",
    model: Path | None = None,
    loss: str | None = None,
    backend: BackendName = "ort-cpu",
    output: Path | None = None,
    batch: int | None = None,
    input_name: str | None = None,
    target_name: str | None = None,
    weight_name: str | None = None,
    mask_name: str | None = None,
    journal: Path | None = None,
    restart: bool = False,
    engine: Annotated[str, one_of(*_ENGINES)] = "local",
    ray_address: str | None = None,
    workers: Annotated[int | None, typer.Option(min=1, max=4096)] = None,
    threads: Count = 0,
    as_json: AsJson = False,
) -> Next:
    """Compute the loss of data larger than memory.

    Files are read a part at a time, and the parts are added without rounding: their size and order
    don't change the result. A run that was interrupted, in any way, goes on where it was when the
    same command is given again.

    Options:
        input: A .npy, .npz or Parquet file, or a folder of such shards; for a --model with a loss
            attached NAME=FILE, for each of its inputs.
        target: Likewise; in a folder, shards of the same names as of --input.
        weight: Weights of the elements, in a file or folder likewise.
        mask: Booleans that select elements, likewise.
        normalizer: What a weighted mean divides by.
        dtype: To compute in; by default that of the files.
        per_sample: One score for each row, to be written to -o.
        model: Run this ONNX file instead of a loss of these options: a loss, or a model with one
            attached.
        loss: smooth_l1 by default, huber or l1; of a --model with several losses, the output that
            is scored.
        output: File for the scores, .npy or .parquet.
        batch: Rows at a time. Default: 2^18 elements.

    Arrays in .npz and Parquet:
        input_name: Name of the array or column; input by default.
        target_name: Default: target.
        weight_name: Default: weight.
        mask_name: Default: mask.

    Interruptions:
        journal: File that remembers what is done. Default: one in your cache folder.
        restart: Throw away what an interrupted run has done.

    Engines:
        engine: ray is for many machines.
        ray_address: The address of a Ray cluster; 'auto' finds one. Default: one is started on this
            machine.
        workers: Actors of the ray engine. Default: every CPU.
        threads: The threads of a session. Default: every core; with ray, one.
    """
    from ..backends._whole import check_names, listed
    from ..scoring._score import Progress, score_files
    from ..scoring._scorer import make_job
    from ..scoring._shards import float_dtype, locate

    chosen = _engine(engine, ray_address, workers)
    alone, named = named_files(input)
    names = {"input": input_name, "target": target_name}
    names |= {"weight": weight_name, "mask": mask_name}
    job = None if model is None else _job_of_model(model, given, backend, threads, loss)
    files: dict[str, Path | None]
    if job is not None and job.inputs:
        if alone or target or weight or mask or any(names.values()):
            raise InvalidInputError(
                f"give the arrays of {model} by --input NAME=FILE for each of its inputs; it takes "
                f"{listed(job.inputs)}"
            )
        check_names(job.inputs, named)
        files = {**named}
    else:
        if named or len(alone) != 1 or target is None:
            raise InvalidInputError(
                "give the arrays of a loss by --input FILE --target FILE; those of a model with a "
                "loss attached (--model) by --input NAME=FILE for each of its inputs"
            )
        files = {"input": alone[0], "target": target, "weight": weight, "mask": mask}
    paths = {role: path for role, path in files.items() if path is not None}
    if job is None:
        given |= {"loss": loss} if loss is not None else {}
        located = locate(paths, names, given.get("dtype", "float32"))
        given.setdefault("dtype", float_dtype(located))
        given |= {"mask": True} if mask else {}
        spec = LossSpec(**given, weight=normalizer if weight else None)
        job = make_job(spec, backend=backend, threads=threads)
    else:
        dtypes = {name: port.dtype for name, port in job.inputs.items()}
        located = locate(paths, names, dtypes or job.spec.dtype)
    last = Progress(0, 0)
    on_interrupt(
        lambda: (
            f"interrupted with {last.percent} % done; the same command "
            + ("begins again" if last.forgotten else "goes on from there")
        )
    )
    with _progress() as show:

        def tell(progress: Progress) -> None:
            nonlocal last
            if progress.forgotten and not last.forgotten:
                print_note(progress.forgotten)
            last = progress
            show(progress)

        try:
            result = score_files(
                job,
                located,
                output=output,
                journal=journal,
                restart=restart,
                batch=batch,
                engine=chosen,
                on_progress=tell,
            )
        except OutputError:
            if last.percent and not last.forgotten:
                print_note(
                    f"{last.percent} % are done and kept; the same command goes on from there"
                )
            raise
    if job.spec.per_sample and output is None:
        print_note("no scores were written; -o scores.npy writes them")
    print_result(result, as_json, lambda: _show(result))
    if model is not None:
        return [typed("verify", model, "--certificate")]
    made = {**given, "weight": normalizer} if weight else given
    return [typed("export", *typed_options(made), "-o", "loss.onnx")]


def _job_of_model(
    model: Path, given: dict[str, Any], backend: str, threads: int, loss: str | None
) -> Job:
    """The job of a model that says what it computes, or of one that the options describe."""
    from .._artefact import read_model
    from ..graph._metadata import read_spec
    from ..scoring._scorer import attached_loss, make_job

    if "dtype" in given:
        raise SpecError("--dtype is the model's own; leave it out")
    proto = read_model(str(model))
    attached = attached_loss(proto, loss)
    own, beta, spec = attached.spec if attached else read_spec(proto), None, None
    if own is None:
        if given.keys() & {"beta", "delta", "reduction"}:
            spec = LossSpec(**given, loss="huber" if "delta" in given else "smooth_l1")
    else:
        if own.runtime_beta:
            beta = given.pop("beta", None)
        if own.reduction == "none":  # its losses can be combined in two ways
            given.setdefault("reduction", "mean")
        spec = replace(own, **given)
    return make_job(spec, proto, backend=backend, beta=beta, threads=threads, loss=loss)


def _engine(name: str, address: str | None, workers: int | None) -> Engine:
    if name == "local":
        if address is not None or workers is not None:
            raise SpecError("--ray-address and --workers are for --engine ray; give that too")
        from ..scoring._scorer import score_locally

        return score_locally
    if name != "ray":
        raise SpecError(f"unknown engine {name!r}; choose one of {', '.join(_ENGINES)}")
    from ..scoring._ray_engine import RayEngine

    require("ray", "ray", "--engine ray")
    return RayEngine(address, workers)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """A bar with rate and time left on a terminal; nothing elsewhere."""
    from rich import progress as bars

    console = progress_console()
    columns: list[Any] = [bars.BarColumn(), bars.TaskProgressColumn(), "{task.fields[rate]}"]
    columns += [bars.TimeRemainingColumn(), "{task.fields[shard]}"]
    with bars.Progress(*columns, console=console, transient=True, disable=not console) as bar:
        task = bar.add_task("score", total=None, rate="", shard="")

        def show(progress: Progress) -> None:
            bar.update(task, completed=progress.done, total=progress.total, shard=progress.shard)
            if speed := bar.tasks[0].speed:
                bar.update(task, rate=f"{_rate(speed)} elements/s")

        yield show


def _rate(speed: float) -> str:
    """`12 k`, `3.4 M`: of elements a second."""
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if speed >= factor:
            return f"{speed / factor:.3g} {unit}"
    return f"{speed:.3g}"


def _show(result: Score) -> None:
    fields: dict[str, object] = {
        "loss": result.loss,
        "elements": f"{result.count:,} in {result.shards} shard(s)",
        "spec": ", ".join(f"{name}={value}" for name, value in result.spec.to_dict().items()),
        "time": f"{result.seconds:.1f} s, {_rate(result.rate)} elements/s",
    }
    if result.output is not None:
        fields["wrote"] = result.output
    if result.resumed:
        fields["resumed"] = f"{result.resumed:,} elements were done before"
    print_fields(fields)
