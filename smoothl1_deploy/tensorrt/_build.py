"""`build_engine`: an ONNX model to a TensorRT engine and its sidecar.

`tensorrt_rtx` builds on a machine without a GPU, and the same model and options give the same
bytes there. `tensorrt` measures kernels on the GPU while it builds; that path is written against
the attribute names of 10.0 to 11.4 and has not been run by this package's authors.

TensorRT builds inside one call. It reports steps to a progress monitor, nearly all of them in
the first few milliseconds, and an exception in a monitor is swallowed (tried with tensorrt_rtx
1.7.1). So the build runs in a thread of its own; the caller waits, is told the elapsed time, and
an interrupt reaches the waiting thread, which asks the monitor to stop the build.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import onnx

from .. import __version__
from .._artefact import ModelSource, read_model, sha256
from .._environment import now
from .._files import check_writable, is_same
from ..errors import BuildError, OutputError, SpecError, UnsupportedError
from ..graph._metadata import CHANGED, is_changed, read_spec, warn_if_changed
from ._cache import EngineCache
from ._engine import BuildKey, Engine, Sidecar, context_engine, write_context, write_engine
from ._flavour import Flavour, current_gpu, get_flavour
from ._half import halved
from ._options import BuildOptions, configure
from ._parse import ParsedNetwork, network_name, parse, serialized
from ._prepare import prepare
from ._profile import Profile, ProfileRequest, input_shapes, resolve_profile

#: The names of the formats that an engine is written in.
FORMATS = ("engine", "epcontext")

_THREAD = "smoothl1-deploy build"
_TICK = 0.05  # seconds between two reports of progress: a spinner moves, and nobody waits for it
T = TypeVar("T")

OnProgress = Callable[[float, str | None], None]


def build_engine(
    model: ModelSource,
    path: str | Path | None = None,
    flavour: str | Flavour = "auto",
    profile: ProfileRequest = None,
    *,
    options: BuildOptions | None = None,
    cache_dir: str | Path | EngineCache | None = None,
    format: str = "engine",
    embed_mode: int = 1,
    precision: str | None = None,
    on_progress: OnProgress | None = None,
) -> Engine:
    """Build an engine, or take it from a cache.

    Args:
        model: an `onnx.ModelProto`, its bytes, or the path of a file; float64 is refused, all
            but casts to it inside the model, as our own reductions accumulate: they become casts
            to float32, and the sidecar's notes name them. One that something else has changed
            since it was exported is built as it is: a `ModelWarning`, and a note too.
        path: where to write the engine; its sidecar goes to `<path>.json`. None writes nothing
            outside the cache.
        flavour: `"tensorrt"`, `"tensorrt_rtx"`, or `"auto"` for the first that can be used.
        profile: the range of every dynamic axis, in a form of `_profile`. Default: 1, 64, 4096, or
            less where an input would have more than 2^28 elements.
        options: see `BuildOptions`.
        cache_dir: folder of an engine cache (`default_cache_dir()` for the user's), or an
            `EngineCache`; None builds without.
        format: `"engine"`, or `"epcontext"` for an ONNX file that carries the engine, as ONNX
            Runtime's providers for TensorRT read and write it.
        embed_mode: 1 puts the engine inside that file; 0 leaves it beside, in
            `context_engine(path)`.
        precision: `"float16"` puts the nodes of a model with losses attached in it, before it is
            built; inputs, outputs and losses stay as they are. None builds what the graph says,
            which is where TensorRT takes its types from.
        on_progress: called in this thread about 20 times a second while a build runs, with the
            seconds since it began and TensorRT's name for what it does, None before it says so.

    Returns:
        The engine, written to `path` if one was given. `cached` says whether a cache had it, else
        `changed` what differs from the nearest engine of the same graph name that it has.

    Raises:
        ArtefactError: when `model` can't be read.
        SpecError: for a profile or option that makes no sense.
        UnsupportedError: for what TensorRT or the flavour can't do faithfully.
        BuildError: when TensorRT refuses.
        OutputError: when `path` or the cache can't be written; `path` is checked first.
        MissingDependencyError, BackendUnavailableError: when TensorRT can't be used here.

    >>> from smoothl1_deploy import LossSpec, build_engine, export
    >>> model = export(LossSpec(beta=0.5), shape=("N", 16))
    >>> engine = build_engine(model, "loss.engine", profile={"input": (1, 64, 4096)})
    >>> engine.sidecar.flavour in ("tensorrt", "tensorrt_rtx")
    True
    >>> build_engine(export(LossSpec(dtype="float64"), shape=("N", 16)))
    Traceback (most recent call last):
        ...
    smoothl1_deploy.errors.UnsupportedError: the graph input 'input' is float64. ...
    """
    if format not in FORMATS:
        raise SpecError(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}")
    if embed_mode not in (0, 1):
        raise SpecError(
            f"embed_mode must be 1 (engine inside) or 0 (engine beside), got {embed_mode!r}"
        )
    target = _checked_path(path, model)
    if format == "epcontext":
        if target is None or target.suffix != ".onnx":
            raise SpecError(f"the format epcontext is an ONNX file: name it *.onnx, not {path}")
        if embed_mode == 0:
            _checked_path(context_engine(target), model)
    loaded = read_model(model)
    warn_if_changed(loaded)
    options = options or BuildOptions()
    if not isinstance(options, BuildOptions):
        raise SpecError(f"options must be BuildOptions, got {type(options).__name__}")
    chosen = get_flavour(flavour)
    prepare(loaded)  # what can't be built is refused before a cache is asked or a thread started
    notes: tuple[str, ...] = ()
    if precision is not None:
        loaded, notes = halved(loaded, precision)
    wanted = resolve_profile(profile, input_shapes(loaded))
    # An engine of tensorrt_rtx depends on the compute capabilities it is told, and on no GPU.
    local = chosen.name == "tensorrt" or "current" in options.compute_capabilities
    key = BuildKey(
        sha256(serialized(loaded)),
        network_name(loaded),
        chosen.name,
        chosen.version,
        options,
        wanted,
        current_gpu() if local else None,
    )

    def build() -> tuple[bytes, Sidecar]:
        watch = BuildWatch()
        return run_watched(lambda: _build(loaded, chosen, key, watch, notes), watch, on_progress)

    if cache_dir is None:
        data, sidecar = build()
        engine = Engine(target, sidecar, data)
    else:
        cache = cache_dir if isinstance(cache_dir, EngineCache) else EngineCache(cache_dir)
        engine = cache.get_or_build(key, build)
    if target is None:
        return engine
    if format == "epcontext":
        file = os.path.basename(model) if isinstance(model, (str, os.PathLike)) else ""
        return write_context(target, engine, loaded, file, embed_mode)
    write_engine(target, engine.data, engine.sidecar)
    return Engine(target, engine.sidecar, engine.data, engine.cached, engine.changed)


def _checked_path(path: str | Path | None, model: ModelSource) -> Path | None:
    if path is None:
        return None
    target = Path(path)
    if isinstance(model, (str, os.PathLike)) and is_same(target, model):
        raise OutputError(
            f"can't write the engine: {target} is the model it is built from; give another name"
        )
    check_writable(target)
    return target


def _build(
    model: onnx.ModelProto,
    flavour: Flavour,
    key: BuildKey,
    watch: BuildWatch,
    before: tuple[str, ...],
) -> tuple[bytes, Sidecar]:
    """Parse, configure, build; the work of the building thread. `before` are notes on the model."""
    start = time.monotonic()
    parsed = parse(model, flavour)
    config = parsed.builder.create_builder_config()
    with flavour.capture() as log:
        flags = configure(config, key.options, flavour)
        _add_profile(config, parsed, key.profile)
        config.progress_monitor = watch.monitor(flavour.trt)
        memory = parsed.builder.build_serialized_network(parsed.network, config)
    if memory is None:
        hint = ""
        if "current" in key.options.compute_capabilities:
            hint = "; compute capability 'current' needs a GPU: name one, as in '8.6'"
        raise BuildError(f"{flavour} can't build {key.graph_name!r}: {log.reason()}{hint}")
    data = bytes(memory)
    notes = [*before, *parsed.notes]
    if is_changed(model):
        notes.append(CHANGED)
    if "STRICT_NANS" not in flags:
        notes.append(f"{flavour} has no STRICT_NANS: it may reorder operations on NaN")
    sidecar = Sidecar(
        engine_sha256=sha256(data),
        engine_bytes=len(data),
        onnx_sha256=key.onnx_sha256,
        spec=read_spec(model),
        graph_name=key.graph_name,
        flavour=flavour.name,
        version=flavour.version,
        options=key.options,
        flags=flags,
        profile=key.profile,
        inputs=parsed.inputs,
        outputs=parsed.outputs,
        notes=tuple(notes),
        gpu=current_gpu(),
        gpu_dependent=key.gpu is not None,
        build_seconds=round(time.monotonic() - start, 3),
        built_at=now(),
        tool_version=__version__,
    )
    return data, sidecar


def _add_profile(config: Any, parsed: ParsedNetwork, profile: Profile) -> None:
    """One optimization profile for all dynamic inputs; TensorRT reports a bad one in three ways."""
    for index in range(parsed.network.num_inputs):
        tensor = parsed.network.get_input(index)
        if tensor.is_shape_tensor:
            raise UnsupportedError(
                f"the input {tensor.name!r} sets the shape of another tensor, which needs a range "
                "of values; make it a constant of the model"
            )
    if not profile.ranges:
        return
    problem = ""
    with parsed.flavour.capture() as log:
        made = parsed.builder.create_optimization_profile()
        try:
            for name, (low, usual, high) in profile.ranges.items():
                made.set_shape(name, low, usual, high)
            accepted = config.add_optimization_profile(made) >= 0
        except (ValueError, TypeError, RuntimeError) as exc:
            accepted, problem = False, str(exc)
    if not accepted:
        raise SpecError(
            f"{parsed.flavour} refused the profile {profile}: {problem or log.reason()}"
        )


# Waiting for a build


class BuildWatch:
    """What the waiting and the building thread tell each other.

    Attributes:
        phase: TensorRT's name for what it does.
        stopped: whether the build is to end at its next step.
    """

    def __init__(self) -> None:
        self.phase: str | None = None
        self.stopped = False

    def monitor(self, trt: Any) -> Any:
        """An `IProgressMonitor` of the module `trt` that stops the build on request."""
        watch = self

        class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
            def phase_start(self, phase_name: str, *_: object) -> None:
                watch.phase = phase_name

            def step_complete(self, phase_name: str, step: int) -> bool:
                return not watch.stopped

            def phase_finish(self, phase_name: str) -> None:
                pass

        return Monitor()


def is_building() -> bool:
    """Whether a build that nobody waits for any more, or still does, runs in this process."""
    return any(thread.name == _THREAD and thread.is_alive() for thread in threading.enumerate())


def run_watched(
    work: Callable[[], T],
    watch: BuildWatch,
    on_progress: OnProgress | None = None,
) -> T:
    """Run `work` in a thread and wait for it; what it returns or raises is returned or raised.

    An exception in the waiting thread (KeyboardInterrupt, or one of `on_progress`) stops the build
    and is raised when the build has ended; a second interrupt doesn't wait.
    """
    outcome: Future[T] = Future()
    done = threading.Event()  # not the future: an interrupt of its wait may leave its lock taken

    def body() -> None:
        try:
            outcome.set_result(work())
        except BaseException as exc:  # the waiting thread raises it again
            outcome.set_exception(exc)
        finally:
            done.set()

    start = time.monotonic()
    threading.Thread(target=body, name=_THREAD, daemon=True).start()
    try:
        while not done.wait(_TICK):
            if on_progress is not None:
                on_progress(time.monotonic() - start, watch.phase)
    except BaseException:
        watch.stopped = True
        done.wait()
        raise
    return outcome.result()
