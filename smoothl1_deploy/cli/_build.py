"""`smoothl1-deploy build`: an ONNX file to a TensorRT engine, or one that carries it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SpecError
from ..tensorrt._flavour import FLAVOURS
from ._console import human_size, print_fields, print_note, print_result, progress_console, typed
from ._options import AsJson, Next, one_of

if TYPE_CHECKING:
    from ..tensorrt._engine import Engine

EXAMPLE = "smoothl1-deploy build loss.onnx -o loss.engine --profile input=1x16,64x16,4096x16"


@contextlib.contextmanager
def _spinner(name: str) -> Iterator[Callable[[float, str | None], None] | None]:
    """Elapsed time beside a spinner, on a terminal; TensorRT reports next to no progress."""
    console = progress_console()
    if console is None:
        yield None
        return
    with console.status(f"building {name}") as status:

        def show(elapsed: float, phase: str | None) -> None:
            status.update(f"building {name}, {elapsed:.1f} s" + (f": {phase}" if phase else ""))

        yield show


def build(
    model: Path,
    *,
    output: Path | None = None,
    format: Annotated[str, one_of("engine", "epcontext")] = "engine",
    embed_mode: Annotated[int | None, typer.Option(min=0, max=1)] = None,
    profile: list[str] | None = None,
    flavour: Annotated[str, one_of("auto", *FLAVOURS)] = "auto",
    compute_capability: list[str] | None = None,
    fp16: bool = False,
    bf16: bool = False,
    cache_dir: Path | None = None,
    no_cache: bool = False,
    as_json: AsJson = False,
) -> Next:
    """Build a TensorRT engine from an ONNX file.

    The sidecar, NAME.engine.json, ties the engine to its model; the two belong together. An equal
    request is served from the cache; where it differs, what changed is named.

    Options:
        model: An ONNX file, exported with --shape.
        output: The file to write; by default the model's name with .engine or _ctx.onnx.
        format: epcontext is an ONNX file that carries the engine, for ONNX Runtime's providers for
            TensorRT.
        embed_mode: With epcontext: 1 puts the engine inside, 0 into a file beside. Default: 1.
        profile: NAME=MIN,OPT,MAX: shapes of an input with dynamic axes, as in
            input=1x16,64x16,4096x16; one shape stands for all three. Repeat for more inputs; target
            follows input. Default: 1, 64, 4096 for every dynamic axis, or less where an input would
            have more than 2^28 elements (1 GiB of float32).

    GPU and flavour:
        flavour: Which of the two TensorRTs; auto is the first that can be used.
        compute_capability: GPU to build for, as in 8.6, or current; repeat for more (tensorrt_rtx
            only).

    Precision, which TensorRT takes from the graph:
        fp16: Put the nodes of a model with a loss attached in float16 before it is built (needs
            onnxruntime). Its inputs and outputs stay float32, and its loss is computed as it was.
        bf16: Says how to get there in bfloat16, into which nothing here converts a model.

    Cache:
        cache_dir: Folder of an engine cache. Default: one in your cache folder.
        no_cache: Build without a cache.
    """
    if no_cache and cache_dir is not None:
        raise SpecError("--no-cache and --cache-dir exclude each other; give one of them")
    if embed_mode is not None and format == "engine":
        raise SpecError("--embed-mode goes with --format epcontext; leave it out, or give both")
    if fp16 and bf16:
        raise SpecError("--fp16 and --bf16 exclude each other; give one of them")

    from ..tensorrt._build import build_engine
    from ..tensorrt._cache import EngineCache
    from ..tensorrt._options import BuildOptions

    options = BuildOptions(tuple(compute_capability or ()))
    # A folder has no name to change; that it is one is said when it is read.
    ending = ".engine" if format == "engine" else "_ctx.onnx"
    path = output or model.parent / f"{model.stem or 'model'}{ending}"
    with _spinner(model.name) as on_progress:
        engine = build_engine(
            str(model),
            path,
            flavour,
            profile,
            options=options,
            cache_dir=None if no_cache else EngineCache(cache_dir),
            format=format,
            embed_mode=1 if embed_mode is None else embed_mode,
            precision="float16" if fp16 else "bfloat16" if bf16 else None,
            on_progress=on_progress,
        )
    print_result(engine, as_json, lambda: _show(engine))
    return [typed("inspect", path)]


def _show(engine: Engine) -> None:
    from .._artefact import sidecar_path

    sidecar = engine.sidecar
    assert engine.path is not None  # built just now, and written
    capabilities = ", ".join(sidecar.options.compute_capabilities) or "those of the flavour"
    print_fields(
        {
            "wrote": f"{engine.path}, {human_size(engine.path.stat().st_size)}",
            "sidecar": sidecar_path(engine.path),
            "sha256": sidecar.context_sha256 or engine.sha256,
            "flavour": f"{sidecar.flavour} {sidecar.version}",
            "compute capabilities": capabilities,
            "profile": sidecar.profile,
            "flags": ", ".join(sidecar.flags) or "none",
            "built": "earlier, taken from the cache"
            if engine.cached
            else f"in {sidecar.build_seconds:.2f} s",
        }
    )
    for change in engine.changed:
        print_note(f"changed since the last build: {change}")
    for note in sidecar.notes:
        print_note(note)
