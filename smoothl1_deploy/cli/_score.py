"""`smoothl1-deploy score`: the loss of data larger than memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .._spec import DTYPES, NORMALIZERS, LossSpec
from ..errors import OutputError, SpecError
from ._console import on_interrupt, open_console, print_fields, print_json, print_note
from ._options import AsJson, BackendName

if TYPE_CHECKING:
    from ..scoring._score import Engine, Progress, Score
    from ..scoring._scorer import Job

EXAMPLE = "smoothl1-deploy score --input predictions.npy --target targets.npy --beta 0.5"

_NAMES = "Arrays in .npz and Parquet"
_RESUME = "Interruptions"
_ENGINE = "Engines"


def score(
    input: Annotated[
        Path, typer.Option(help="A .npy, .npz or Parquet file, or a folder of such shards.")
    ],
    target: Annotated[
        Path, typer.Option(help="Likewise; in a folder, shards of the same names as of --input.")
    ],
    weight: Annotated[
        Path | None, typer.Option(help="Likewise, to multiply the losses of the elements.")
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="Where the quadratic part ends, >= 0. Default: 1.")
    ] = None,
    reduction: Annotated[str | None, typer.Option(help="mean or sum. Default: mean.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help=f"To compute in: {', '.join(DTYPES)}. Default: that of the files."),
    ] = None,
    normalizer: Annotated[
        str,
        typer.Option(help=f"What a weighted mean divides by: {' or '.join(NORMALIZERS)}."),
    ] = "count",
    model: Annotated[
        Path | None, typer.Option(help="Run this ONNX file instead of a loss of these options.")
    ] = None,
    backend: BackendName = "ort-cpu",
    per_sample: Annotated[
        bool, typer.Option("--per-sample", help="One score for each row, to be written to -o.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File for the scores, .npy or .parquet."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(metavar="ROWS", help="Rows at a time. Default: 2^18 elements.")
    ] = None,
    input_name: Annotated[
        str | None,
        typer.Option(help="Name of the array or column; input by default.", rich_help_panel=_NAMES),
    ] = None,
    target_name: Annotated[
        str | None, typer.Option(help="Default: target.", rich_help_panel=_NAMES)
    ] = None,
    weight_name: Annotated[
        str | None, typer.Option(help="Default: weight.", rich_help_panel=_NAMES)
    ] = None,
    journal: Annotated[
        Path | None,
        typer.Option(
            help="File that remembers what is done. Default: one in your cache folder.",
            rich_help_panel=_RESUME,
        ),
    ] = None,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Throw away what an interrupted run has done.",
            rich_help_panel=_RESUME,
        ),
    ] = False,
    engine: Annotated[
        str, typer.Option(help="local, or ray for many machines.", rich_help_panel=_ENGINE)
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Of a Ray cluster; 'auto' finds one. Default: one is started on this machine.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4096,
            help="Actors of the ray engine. Default: every CPU.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    threads: Annotated[
        int,
        typer.Option(
            min=0,
            help="Of one session. Default: every core; with ray, one.",
            rich_help_panel=_ENGINE,
        ),
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Compute the loss of data larger than memory.

    Files are read a part at a time, and the parts are added without rounding: their size and order
    don't change the result. A run that was interrupted, in any way, goes on where it was when the
    same command is given again.
    """
    from ..scoring._score import Progress, score_files
    from ..scoring._scorer import make_job
    from ..scoring._shards import float_dtype, locate

    chosen = _engine(engine, ray_address, workers)
    paths = {"input": input, "target": target, "weight": weight}
    names = {"input": input_name, "target": target_name, "weight": weight_name}
    given = {role: path for role, path in paths.items() if path is not None}
    if model is None:
        located = locate(given, names, dtype or "float32")
        job = make_job(
            LossSpec(
                1.0 if beta is None else beta,
                reduction or "mean",
                dtype or float_dtype(located),
                per_sample=per_sample,
                weight=normalizer if weight else None,
            ),
            backend=backend,
            threads=threads,
        )
    else:
        if dtype is not None:
            raise SpecError("--dtype is the model's own; leave it out")
        job = _job_of_model(model, beta, reduction, per_sample, backend, threads)
        located = locate(given, names, job.spec.dtype)
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
    if per_sample and output is None:
        print_note("no scores were written; -o scores.npy writes them")
    _show(result, as_json)


def _job_of_model(
    model: Path,
    beta: float | None,
    reduction: str | None,
    per_sample: bool,
    backend: str,
    threads: int,
) -> Job:
    """The spec of the model, with what the options add where it says nothing."""
    from dataclasses import replace

    from .._artefact import read_model
    from ..graph._metadata import read_spec
    from ..scoring._scorer import make_job

    proto = read_model(str(model))
    own = read_spec(proto)
    if own is None:
        spec = None
        if beta is not None or reduction is not None:
            spec = LossSpec(
                1.0 if beta is None else beta, reduction or "mean", per_sample=per_sample
            )
        return make_job(spec, proto, backend=backend, threads=threads)
    if per_sample and not own.per_sample:
        raise SpecError(
            f"{model} gives no score for each row; export it with --per-sample, or leave "
            "--model out"
        )
    if beta is not None and not own.runtime_beta and beta != own.beta:
        raise SpecError(f"{model} has beta={own.beta!r}, not {beta!r}; leave --beta out")
    spec = None if reduction is None else replace(own, reduction=reduction)
    given = beta if own.runtime_beta else None
    return make_job(spec, proto, backend=backend, beta=given, threads=threads)


def _engine(name: str, address: str | None, workers: int | None) -> Engine:
    if name not in ("local", "ray"):
        raise SpecError(f"unknown engine {name!r}; choose one of local, ray")
    if name == "local":
        if address is not None or workers is not None:
            raise SpecError("--ray-address and --workers are for --engine ray; give that too")
        from ..scoring._engine import score_locally

        return score_locally
    from ..errors import require
    from ..scoring._ray_engine import RayEngine

    require("ray", "ray", "--engine ray")
    return RayEngine(address, workers)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """A bar with rate and time left on a terminal; nothing elsewhere."""
    from rich import progress as bars

    console = open_console(stderr=True)
    if not console.is_terminal:
        yield lambda progress: None
        return
    columns = (
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[shard]}"),
    )
    with bars.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("score", total=None, rate="", shard="")

        def show(progress: Progress) -> None:
            bar.update(task, completed=progress.done, total=progress.total, shard=progress.shard)
            speed = bar.tasks[0].speed
            if speed:
                bar.update(task, rate=f"{_rate(speed)} elements/s")

        yield show


def _rate(speed: float) -> str:
    """`12 k`, `3.4 M`: of elements a second."""
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if speed >= factor:
            return f"{speed / factor:.3g} {unit}"
    return f"{speed:.3g}"


def _show(result: Score, as_json: bool) -> None:
    if as_json:
        print_json(result.to_dict())
        return
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
