"""Who is measured: this tool's file, by whom it is run, and what people would run instead."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import ops
from ..errors import SmoothL1DeployError, require
from ..floats import Array
from ..graph.export import export
from ..spec import LossSpec

__all__ = ["AHEAD", "BARE", "COMPILED", "OURS", "PLAIN", "Contestant", "contestants", "read"]

OURS = "the file, with the operators"
BARE = "the file, bare"
PLAIN = "plain export"
COMPILED = "torch.compile"
AHEAD = "AOTInductor"

Call = Callable[[Array, Array], Any]


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to the loss; `call` gives something that numpy.asarray takes."""

    name: str
    call: Call


def contestants(
    spec: LossSpec, columns: int, threads: int, without: Collection[str] = (), only: str = ""
) -> tuple[list[Contestant], dict[str, str]]:
    """Everyone who can compute `spec` here, this tool's first; and who can't, with the reason.

    Args:
        spec: float16, float32 or float64; no extension but `per_sample`.
        columns: the arrays are [N, columns].
        threads: for each of them.
        without: names of those to leave out.
        only: the name of the one to take; empty for all.
    """
    makers: dict[str, Callable[[], Call]] = {
        OURS: partial(_file, spec, columns, threads, ops.register),
        BARE: partial(_file, spec, columns, threads),
        "load().run": partial(_runner, spec, columns, threads),
        PLAIN: partial(_plain, spec, columns, threads),
        "torch eager": partial(_torch, spec),
        COMPILED: partial(_compiled, spec),
        AHEAD: partial(_ahead, spec, columns),
        "openvino, ours": partial(_openvino, spec, columns, threads, False),
        "openvino, plain": partial(_openvino, spec, columns, threads, True),
    }
    found: list[Contestant] = []
    missing: dict[str, str] = {}
    for name, make in makers.items():
        if name in without or only not in ("", name):
            continue
        try:
            found.append(Contestant(name, make()))
        except (SmoothL1DeployError, _LeftOutError) as exc:
            missing[name] = str(exc)
    return found, missing


class _LeftOutError(Exception):
    """Why a contestant can't take part."""


def _session(
    model: Any, threads: int, prepare: Callable[[Any], None] = lambda options: None
) -> Call:
    """ONNX Runtime's CPU provider on a model of two inputs, as anyone opens it and calls it."""
    ort = require("onnxruntime", "cpu", "ONNX Runtime as a contestant")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what it says against the plain export is seen in the error
    # Its threads may spin within a call, and not into the next one's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    prepare(options)
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    first, second = (port.name for port in session.get_inputs())
    outputs = [session.get_outputs()[0].name]
    return lambda input, target: session.run(outputs, {first: input, second: target})[0]


def _file(spec: LossSpec, columns: int, threads: int, *prepare: Callable[[Any], None]) -> Call:
    return _session(export(spec, "function", ("N", columns)), threads, *prepare)


def _runner(spec: LossSpec, columns: int, threads: int) -> Call:
    from ..backends.base import load

    runner = load(export(spec, "function", ("N", columns)), threads=threads)
    return lambda input, target: runner.run(input, target)["loss"]


def _plain_model(spec: LossSpec, columns: int) -> Any:
    from ..parity.plain_export import plain_export

    if spec.per_sample:
        raise _LeftOutError("torch.nn.SmoothL1Loss has no loss per sample")
    arguments = {"beta": spec.beta, "reduction": spec.reduction}
    return plain_export(arguments, spec.dtype, ("N", columns))


def _plain(spec: LossSpec, columns: int, threads: int) -> Call:
    return _session(_plain_model(spec, columns), threads)


def _loss(spec: LossSpec) -> Callable[[Any, Any], Any]:
    torch = require("torch", "torch", "PyTorch as a contestant")
    smooth_l1 = torch.nn.functional.smooth_l1_loss
    if not spec.per_sample:
        return lambda a, b: smooth_l1(a, b, reduction=spec.reduction, beta=spec.beta)

    def rows(a: Any, b: Any) -> Any:
        losses = smooth_l1(a, b, reduction="none", beta=spec.beta)
        return losses.mean(1) if spec.reduction == "mean" else losses.sum(1)

    return rows


def _torch(spec: LossSpec) -> Call:
    loss = _loss(spec)
    import torch

    def call(input: Array, target: Array) -> Any:
        with torch.no_grad():
            return loss(torch.from_numpy(input), torch.from_numpy(target))

    return call


def _compiled(spec: LossSpec) -> Call:
    loss = _loss(spec)
    import torch

    _need_a_compiler(COMPILED)
    compiled = torch.compile(loss, dynamic=False)

    def call(input: Array, target: Array) -> Any:
        with torch.no_grad():
            return compiled(torch.from_numpy(input), torch.from_numpy(target))

    return call


@cache
def _ahead(spec: LossSpec, columns: int) -> Call:
    """Compiled once for every number of rows, as it is deployed; it takes its time."""
    loss = _loss(spec)
    import torch

    _need_a_compiler(AHEAD)

    class Module(torch.nn.Module):
        def forward(self, input: Any, target: Any) -> Any:
            return loss(input, target)

    dtype = getattr(torch, spec.dtype)
    pair = tuple(torch.zeros(32, columns, dtype=dtype) for _ in range(2))
    rows = {0: torch.export.Dim("rows", min=2)}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(Module(), pair, dynamic_shapes=(rows, rows))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder) / "loss.pt2")
        )
        compiled = torch._inductor.aoti_load_package(path)
    return lambda input, target: compiled(torch.from_numpy(input), torch.from_numpy(target))


def _need_a_compiler(name: str) -> None:
    if not (shutil.which("g++") or shutil.which("clang++")):
        raise _LeftOutError(f"{name} needs a C++ compiler: install g++")


def _openvino(spec: LossSpec, columns: int, threads: int, plain: bool) -> Call:
    openvino = require("openvino", "bench", "OpenVINO as a contestant")
    model = _plain_model(spec, columns) if plain else export(spec, "inlined", ("N", columns))
    core = openvino.Core()
    # By itself it may compute in a narrower format than the graph says.
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    try:
        compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings)
    except RuntimeError as exc:
        raise _LeftOutError(f"OpenVINO can't compile the model: {exc}") from exc
    request = compiled.create_infer_request()
    # By position: not every exporter calls its inputs so. Its memory is reused: copy what stays.
    return lambda input, target: request.infer([input, target], share_inputs=True)[0]


def read(input: Array, target: Array) -> Any:
    """One pass over both arrays, BLAS' dot product: of what reads them by numpy, the fastest.

    Of float16 the bits are read as float32, which BLAS has; what comes out means nothing.
    """
    wide = np.float64 if input.dtype == np.float64 else np.float32
    return np.dot(*(array.reshape(-1).view(wide) for array in (input, target)))
