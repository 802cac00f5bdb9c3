"""A reproduction bundle: one case as files that show its difference without this package.

`inputs.npz` (bfloat16 as its uint16 bits), `artefact.onnx`, `repro.py` (numpy, torch and what
ran the artefact) and `environment.json`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..artefact import ModelSource, read_model, sha256, signature, write_atomic
from ..backends.base import get_backend
from ..environment import environment
from ..errors import ArtefactError, OutputError, SmoothL1DeployError, reason_of
from ..floats import Array, dtype_name
from ..graph.export import export
from ..graph.metadata import read_spec
from ..spec import LossSpec
from .cases import LAYOUTS, Case, CaseResult, References, check, with_beta
from .compare import Verdict
from .draws import Draw
from .report import Cell, repeat_command
from .repro_script import repro_script

__all__ = ["Bundle", "write_bundle"]


@dataclass(frozen=True, slots=True)
class Bundle:
    """What was written.

    Attributes:
        folder: where; `files` are in it.
        verdict: on the case, run once more for the bundle; None where it gave an error.
        error: that error; empty otherwise.
        reproduced: whether the difference was there again.
    """

    folder: Path
    files: tuple[str, ...]
    verdict: Verdict | None
    error: str

    @property
    def reproduced(self) -> bool:
        """Whether the case is red again."""
        return self.verdict is None or not self.verdict.ok

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "folder": str(self.folder),
            "files": list(self.files),
            "verdict": self.verdict.to_dict() if self.verdict else None,
            "error": self.error,
            "reproduced": self.reproduced,
        }


def _matrix_model(cell: Cell, case: Case) -> onnx.ModelProto:
    """The artefact that the matrix made for a case."""
    from .plan import artefact_axes

    any_rank = get_backend(cell.backend).any_rank
    if cell.draw is not None:
        return Draw.of(cell.draw).model(any_rank)
    if case.layout not in LAYOUTS:
        raise ArtefactError(
            f"the case's layout {case.layout!r} is not one of the matrix's "
            f"({', '.join(LAYOUTS)}), so its artefact can't be exported again; give the model"
        )
    axes = artefact_axes(cell.spec, cell.route, case.layout, any_rank)
    return export(cell.spec, cell.route, **axes)


def _stored(array: Array) -> Array:
    return array.view(np.uint16) if dtype_name(array.dtype) == "bfloat16" else array


@dataclass(frozen=True, slots=True)
class _Again:
    """The case, run once more."""

    outputs: Mapping[str, Array]
    result: CaseResult | None
    error: str

    @property
    def is_right(self) -> bool:
        return self.result is not None and self.result.verdict.ok


def _run_again(model: onnx.ModelProto, case: Case, refs: References, backend: str) -> _Again:
    try:
        chosen = get_backend(backend, threads=1)
        runner = chosen.load(model)
        accumulator = chosen.accumulator if runner.exported else None
        beta = refs.beta if "beta" in runner.signature.inputs else None
        outputs = runner.run(
            refs.input, refs.target, weight=refs.weight, beta=beta, grad_output=refs.grad_output
        )
        return _Again(outputs, check(runner, case, refs, accumulator), "")
    except SmoothL1DeployError as exc:
        return _Again({}, None, f"{type(exc).__name__}: {exc}")


def write_bundle(
    found: Cell | CaseResult,
    model: ModelSource | None,
    folder: str | Path,
    *,
    spec: LossSpec | None = None,
    backend: str = "ort-cpu",
) -> Bundle:
    """Write one case out, with a script that shows its difference.

    Args:
        found: a cell of the matrix (its worst case is taken), or one case of `verify`.
        model: the artefact it was run with (of several inputs, as `select_ports` leaves it); None
            for a cell: exported again, as the matrix did.
        folder: made where it is missing; its parent must exist.
        spec: what is computed; needed only for a case whose model doesn't say so.
        backend: what ran a case; a cell knows its own.

    Returns:
        What was written. The case is run once more: `reproduced` says whether the difference
        is still there.

    Raises:
        ArtefactError: for a cell that was not run, a model that doesn't say what it computes,
            or no model where none can be made.
        OutputError: when the folder can't be made or written.
    """
    if isinstance(found, Cell):
        if found.worst is None:
            raise ArtefactError(f"the cell was not run ({found.refused}): there is no case to show")
        result, spec, backend = found.worst, found.spec, found.backend
        proto = _matrix_model(found, result.case) if model is None else read_model(model)
    else:
        if model is None:
            raise ArtefactError("a single case needs the model it was run with; give its path")
        result, proto = found, read_model(model)
        spec = spec if spec is not None else read_spec(proto)
        if spec is None:
            raise ArtefactError(
                "the model does not say what it computes; say it with spec=LossSpec(...)"
            )
    case = result.case
    if isinstance(found, Cell) and found.draw is not None:
        refs = Draw.of(found.draw).references(case)
    else:
        beta = found.beta if isinstance(found, Cell) else spec.beta
        refs = References.of(with_beta(spec, beta), case)
    again, shown_by = _run_again(proto, case, refs, backend), backend
    if backend == "ort-cpu":
        alone = _run_again(proto, case, refs, "ort-cpu-bare")
        # A script of a bare session shows what the file does alone; an operator's answer it can't.
        if not alone.is_right or again.is_right:
            again, shown_by = alone, "ort-cpu-bare"
    sample = (again.result and again.result.sample) or result.sample
    output, at = (sample.output, sample.index) if sample else ("loss", None)
    arrays = {"input": refs.input, "target": refs.target, "exact": refs.oracle[output]}
    if refs.weight is not None:
        arrays["weight"] = refs.weight
    if refs.grad_output is not None:
        arrays["grad_output"] = refs.grad_output
    if spec.runtime_beta:
        arrays["beta"] = np.asarray(refs.beta, np.float32)
    if again.outputs:
        arrays["got"] = again.outputs.get(output, next(iter(again.outputs.values())))
    packed = io.BytesIO()
    np.savez_compressed(packed, **{key: _stored(array) for key, array in arrays.items()})  # type: ignore[arg-type]
    artefact = proto.SerializeToString(deterministic=True)
    facts = {
        "spec": spec.to_dict(),
        "case": result.to_dict(),
        "backend": backend,
        "repeat": repeat_command(found, case.seed) if isinstance(found, Cell) else None,
        "artefact_sha256": sha256(artefact),
        "arrays": {key: f"{a.dtype}{list(a.shape)}" for key, a in arrays.items()},
        "bfloat16_as": "uint16 bits",
        "exact": "the oracle's answer: long double, rounded once",
        "again": again.result.to_dict() if again.result else {"error": again.error},
        "environment": environment(),
    }
    script = repro_script(
        refs.spec,
        refs.beta,
        case,
        signature(proto),
        shown_by,
        output=output,
        at=at,
        allowed=result.verdict.allowed,
        error=again.error,
    )
    files = {
        "inputs.npz": packed.getvalue(),
        "artefact.onnx": artefact,
        "repro.py": script.encode(),
        "environment.json": (json.dumps(facts, indent=1, allow_nan=False) + "\n").encode(),
    }
    folder = Path(folder)
    try:
        folder.mkdir(exist_ok=True)
    except (OSError, ValueError) as exc:
        raise OutputError(
            f"can't make the folder {folder}: {reason_of(exc)}; choose one whose parent "
            "exists and that you may write to"
        ) from exc
    for name, content in files.items():
        write_atomic(folder / name, content)
    verdict = again.result.verdict if again.result else None
    return Bundle(folder, tuple(files), verdict, again.error)
