"""Who is measured: this tool's artefacts, and what people would run instead."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..errors import SmoothL1DeployError, require
from ..floats import Array
from ..graph.export import ROUTES, export
from ..spec import LossSpec

__all__ = ["COMPILED", "OURS", "PLAIN", "Contestant", "contestants", "read_everything"]

OURS = "ort-cpu, function"
PLAIN = "plain export"
COMPILED = "torch.compile"

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
        f"ort-cpu, {route}": partial(_ours, spec, route, columns, threads) for route in ROUTES
    }
    makers |= {
        PLAIN: partial(_plain, spec, columns, threads),
        "torch eager": partial(_torch, spec),
        COMPILED: partial(_compiled, spec),
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


def _ours(spec: LossSpec, route: str, columns: int, threads: int) -> Call:
    from ..backends.base import load

    if route == "torch" and spec.per_sample:
        raise _LeftOutError("the torch route exports what torch.nn.SmoothL1Loss computes")
    runner = load(export(spec, route, ("N", columns)), threads=threads)
    return lambda input, target: runner.run(input, target)["loss"]


def _plain_model(spec: LossSpec, columns: int) -> Any:
    from ..parity.plain_export import plain_export

    if spec.per_sample:
        raise _LeftOutError("torch.nn.SmoothL1Loss has no loss per sample")
    arguments = {"beta": spec.beta, "reduction": spec.reduction}
    return plain_export(arguments, spec.dtype, ("N", columns))


def _plain(spec: LossSpec, columns: int, threads: int) -> Call:
    from ..parity.plain_export import PlainExport

    return PlainExport(_plain_model(spec, columns), threads).run


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

    if not (shutil.which("g++") or shutil.which("clang++")):
        raise _LeftOutError("torch.compile needs a C++ compiler: install g++")
    compiled = torch.compile(loss, dynamic=False)

    def call(input: Array, target: Array) -> Any:
        with torch.no_grad():
            return compiled(torch.from_numpy(input), torch.from_numpy(target))

    return call


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


def read_everything(input: Array, target: Array) -> Any:
    """Read both arrays once and do next to nothing: the time no one can beat on one core."""
    return [np.add.reduce(a.reshape(-1).view(np.int64)) for a in (input, target)]
