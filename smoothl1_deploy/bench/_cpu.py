"""The benchmark on the CPU: this tool's file, and what people would run instead, in one process."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import ops
from .._floats import NUMPY_DTYPE, Array
from .._spec import LossSpec
from ..backends._base import load
from ..backends._ort_cpu import default_threads
from ..errors import MissingDependencyError, SmoothL1DeployError, UnsupportedError, require
from ..graph._export import export
from ..parity._contract import as_anyone, plain_export
from ..reference._oracle import oracle
from ._gpu import torch_loss
from ._rows import COMPILED, EAGER, PLAIN, READ, Row
from ._timing import Timing, in_turn

OURS = "the file, with the operators"
BARE = "the file, bare"
RUN = "load().run"
AHEAD = "AOTInductor"
WAY = "in turn"

_PURPOSE = "ONNX Runtime as a contestant"
#: One way to the loss; it gives something that numpy.asarray takes.
Call = Callable[[Array, Array], Any]


def contestants(
    spec: LossSpec, columns: int, threads: int, without: Collection[str] = (), only: str = ""
) -> tuple[dict[str, Call], dict[str, str]]:
    """Everyone who can compute `spec` here, this tool's first; and who can't, with the reason.

    Args:
        spec: float16, float32 or float64; no extension but `per_sample`.
        columns: the arrays are [N, columns].
        threads: for each of them.
        without: names of those to leave out.
        only: the name of the one to take; empty for all.
    """
    ours = partial(export, spec, "function", ("N", columns))
    plain = partial(_plain_export, spec, columns)
    makers: dict[str, Callable[[], Call]] = {
        OURS: lambda: as_anyone(ours(), threads, _PURPOSE, ops.register),
        BARE: lambda: as_anyone(ours(), threads, _PURPOSE),
        RUN: lambda: _runner(ours(), threads),
        PLAIN: lambda: as_anyone(plain(), threads, _PURPOSE),
        EAGER: lambda: _torch(torch_loss(spec)),
        COMPILED: lambda: _torch(_compiled(spec)),
        AHEAD: lambda: _ahead(spec, columns),
        "openvino, ours": lambda: on_openvino(export(spec, "inlined", ("N", columns)), threads),
        "openvino, plain": lambda: on_openvino(plain(), threads),
    }
    found: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for name, make in makers.items():
        if name in without or only not in ("", name):
            continue
        try:
            found[name] = make()
        except SmoothL1DeployError as exc:
            missing[name] = str(exc)
    return found, missing


def _runner(model: Any, threads: int) -> Call:
    runner = load(model, threads=threads)
    return lambda input, target: runner.run(input, target)["loss"]


def _plain_export(spec: LossSpec, columns: int) -> Any:
    if spec.per_sample:
        raise UnsupportedError("torch.nn.SmoothL1Loss has no loss per sample")
    arguments = {"beta": spec.beta, "reduction": spec.reduction}
    return plain_export(arguments, spec.dtype, ("N", columns))


def _torch(loss: Callable[[Any, Any], Any]) -> Call:
    import torch

    def call(input: Array, target: Array) -> Any:
        with torch.no_grad():
            return loss(torch.from_numpy(input), torch.from_numpy(target))

    return call


def _compiled(spec: LossSpec) -> Callable[[Any, Any], Any]:
    loss = torch_loss(spec)
    import torch

    need_a_compiler(COMPILED)
    compiled: Callable[[Any, Any], Any] = torch.compile(loss, dynamic=False)
    return compiled


@cache
def _ahead(spec: LossSpec, columns: int) -> Call:
    """Compiled once for every number of rows, as it is deployed; it takes its time."""
    loss = torch_loss(spec)
    import torch

    dtype = getattr(torch, spec.dtype)
    pair = tuple(torch.zeros(32, columns, dtype=dtype) for _ in range(2))
    return _torch(compiled_ahead(loss, pair, ({0: torch.export.Dim("rows", min=2)},) * 2))


def compiled_ahead(loss: Callable[[Any, Any], Any], pair: tuple[Any, ...], axes: Any) -> Any:
    """A loss of two tensors like `pair` by AOTInductor; `axes` are the dynamic ones of each.

    Raises:
        MissingDependencyError: where no C++ compiler is.
    """
    import torch

    need_a_compiler(AHEAD)

    class Module(torch.nn.Module):
        def forward(self, input: Any, target: Any) -> Any:
            return loss(input, target)

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(Module(), pair, dynamic_shapes=axes)
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder) / "loss.pt2")
        )
        return torch._inductor.aoti_load_package(path)


def need_a_compiler(name: str) -> None:
    """Refuse what compiles C++ where nothing does.

    Raises:
        MissingDependencyError: it says what to install.
    """
    if not (shutil.which("g++") or shutil.which("clang++")):
        raise MissingDependencyError(f"{name} needs a C++ compiler: install g++")


def on_openvino(model: Any, threads: int) -> Call:
    """OpenVINO on a model of two inputs; its answer's memory is its own: copy what stays.

    Raises:
        UnsupportedError: where it can't compile the model.
    """
    openvino = require("openvino", "bench", "OpenVINO as a contestant")
    core = openvino.Core()
    # By itself it may compute in a narrower format than the graph says.
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    try:
        compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings)
    except RuntimeError as exc:
        raise UnsupportedError(f"OpenVINO can't compile the model: {exc}") from exc
    request = compiled.create_infer_request()
    # By position: not every exporter calls its inputs so.
    return lambda input, target: request.infer([input, target], share_inputs=True)[0]


def reading(input: Array, target: Array) -> Callable[[], Any]:
    """One pass over both arrays that keeps nothing: torch.dot, the fastest found (bench/NOTES.md).

    Of float16 the bits are read as float32; what comes out means nothing.
    """
    torch = require("torch", "torch", "reading the inputs, to be compared with,")
    wide = np.float64 if input.dtype == np.float64 else np.float32
    flat = [torch.from_numpy(array.reshape(-1).view(wide)) for array in (input, target)]
    return partial(torch.dot, *flat)


def data(spec: LossSpec, shape: tuple[int, int], constant: bool = False) -> tuple[Array, Array]:
    """Input and target: normal, or constant, which shows what a sum loses on its way."""
    dtype = NUMPY_DTYPE[spec.dtype]
    if constant:
        return np.full(shape, 0.1, dtype), np.zeros(shape, dtype)
    rng = np.random.default_rng(0)
    input, target = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    return input, target


def measure(
    spec: LossSpec,
    shape: tuple[int, int],
    *,
    threads: int = 0,
    constant: bool = False,
    memory: bool = False,
    rounds: int = 15,
    turn: float = 0.01,
    without: Collection[str] = (),
) -> tuple[list[Row], dict[str, str]]:
    """Every contestant at one shape, and why others are missing.

    Args:
        spec: float16, float32 or float64; no extension but `per_sample`.
        shape: two axes.
        threads: for each contestant; 0 for this tool's default.
        constant: whether the data are.
        memory: measure the peak memory too, each in a process of its own.
        rounds: turns of each contestant.
        turn: seconds of a turn.
        without: contestants to leave out.
    """
    threads = threads or default_threads()
    found, missing = contestants(spec, shape[1], threads, without)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)
    input, target = data(spec, shape, constant)
    calls: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    for name, call in found.items():
        try:
            got = np.asarray(call(input, target)).copy()
        except Exception as exc:  # contestants raise what they like
            missing[name] = f"it fails: {type(exc).__name__}: {str(exc).splitlines()[0]}"
            continue
        calls[name], errors[name] = partial(call, input, target), _error(spec, got, input, target)
    try:
        calls[READ] = reading(input, target)
    except SmoothL1DeployError as exc:
        missing[READ] = str(exc)
    timings = in_turn([*calls.values()], rounds=rounds, turn=turn)
    others = os.getloadavg()[0]
    weighed = (OURS, BARE, RUN, PLAIN, EAGER) if memory else ()
    rows = [
        Row(
            spec, shape, name, WAY, timing, None, errors.get(name), threads, others,
            peak_ratio(name, input.size, threads) if name in weighed else None,
        )
        for name, timing in zip(calls, timings, strict=True)
    ]  # fmt: skip
    return rows, missing


def _error(spec: LossSpec, got: Array, input: Array, target: Array) -> float:
    """The largest relative distance to the exact loss."""
    if spec.reduction == "none" or spec.per_sample:
        exact = oracle(spec, input, target).astype(np.float64)
    else:  # in float64, so that an error below the rounding of the loss's dtype is seen too
        wide = replace(spec, beta=spec.effective_beta, dtype="float64")
        exact = oracle(wide, input.astype(np.float64), target.astype(np.float64))
        if spec.dtype == "float16":  # whose range a sum may leave
            exact = exact.astype(np.float16)
    found = np.asarray(got, np.float64)
    if found.shape != exact.shape or (np.isfinite(found) != np.isfinite(exact)).any():
        return math.inf
    scale = np.where(exact == 0, 1, np.abs(exact))
    with np.errstate(invalid="ignore"):
        return float(np.nan_to_num(np.abs(found - exact) / scale).max())


def peak_ratio(name: str, size: int, threads: int) -> float | None:
    """Peak memory of a `mean` over float32 arrays, the inputs included, over that of the inputs.

    It is measured in a process of its own (Linux).

    Args:
        name: of a contestant.
        size: elements.
        threads: for it.

    Returns:
        The ratio; None where the system doesn't tell, or the contestant isn't there.
    """
    code = f"from {__name__} import _peak; print(_peak({name!r}, {size}, {threads}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    try:
        return float(done.stdout)
    except ValueError:  # it has failed
        return None


def _peak(name: str, size: int, threads: int) -> float:
    spec = LossSpec()
    call = contestants(spec, 16, threads, only=name)[0][name]
    input, target = data(spec, (size // 16, 16))
    few = slice(0, 1 << 14)  # sessions and code take their memory in the first calls
    for _ in range(2):
        call(input[few], target[few])
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    before = status("VmRSS")
    call(input, target)
    return 1 + max(0, status("VmHWM") - before) / (input.nbytes + target.nbytes)


def once(repeats: int = 5) -> dict[str, Timing | str]:
    """What is paid once: imports, an export, a session, an engine, the command line; by name."""
    package = __name__.split(".")[0]

    def python(code: str) -> Callable[[], Any]:
        command = [sys.executable, "-c", code]
        return partial(subprocess.run, command, check=True, capture_output=True)

    model = export(LossSpec(), "function", ("N", 16))
    steps: dict[str, Callable[[], Any]] = {
        "python itself": python("pass"),
        "import smoothl1_deploy": python(f"import {package}"),
        "command line: --help": python(f"from {package}.cli import main; main(['--help'])"),
        "export from a cold start": python(
            f"from {package} import LossSpec, export; export(LossSpec(), shape=('N', 16))"
        ),
        "export, function": lambda: export(LossSpec(), "function", ("N", 16)),
        "export, inlined": lambda: export(LossSpec(), "inlined", ("N", 16)),
        "session start": lambda: load(model),
        "engine build": lambda: _build(model),
    }
    found: dict[str, Timing | str] = {}
    for name, step in steps.items():
        seconds = []
        try:
            for _ in range(repeats):
                started = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - started)
        except (SmoothL1DeployError, subprocess.CalledProcessError) as exc:
            found[name] = f"left out: {exc}"
        else:
            found[name] = Timing.of(seconds)
    return found


def _build(model: Any) -> None:
    from ..tensorrt._build import build_engine

    with tempfile.TemporaryDirectory() as folder:
        build_engine(model, str(Path(folder) / "loss.engine"), profile={"input": (1, 64, 1024)})
