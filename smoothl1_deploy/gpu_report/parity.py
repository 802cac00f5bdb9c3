"""The parity matrix on the GPU: the backends, and PyTorch's own CUDA kernel as a reference."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..parity.report import Cell, Report

__all__ = ["Parity", "condense", "run_parity"]

#: The betas of the matrix, those first that go by a path of their own.
_BETAS = (1.0, 0.0, 0.5, math.inf, 0.1, 2.0, 10.0, 1e-3, 1e4)
_REFERENCE = "torch-cuda"
_WORKERS = 8  # each holds a CUDA context of its own


@dataclass(frozen=True, slots=True)
class Parity:
    """What the matrix found. `ok` where it ran and no cell of a backend is red.

    Attributes:
        backends: counts by backend: cells, red, refused, cases.
        red: one entry a red cell: what, by how much, and the command that repeats it.
        reference: one entry a cell where PyTorch's CUDA kernel is further from the exact loss
            than its CPU kernel allows: no fault of ours, and of use to who compares with it.
        notes: what was sampled or left out.
        problem: why nothing was run; None where it was.
    """

    backends: dict[str, dict[str, int]]
    red: tuple[dict[str, Any], ...] = ()
    reference: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the matrix ran, and nothing of a backend is red."""
        return self.problem is None and bool(self.backends) and not self.red

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "ok": self.ok,
            "backends": self.backends,
            "red": list(self.red),
            "reference": list(self.reference),
            "notes": list(self.notes),
            "problem": self.problem,
        }


def run_parity(backends: tuple[str, ...], seconds: float) -> Parity:
    """Run as much of the matrix as the seconds allow, the plain losses and the extensions."""
    try:
        from ..graph import functions  # noqa: F401  (the exports need onnxscript)
        from ..parity.matrix import Matrix, run_matrix
    except ImportError as exc:
        return Parity({}, problem=f"the matrix can't run here: {exc}")
    # The torch route is checked with the torch it was written for, not with what is here.
    matrix = Matrix((*backends, _REFERENCE), betas=_BETAS, routes=("function", "inlined"))
    workers = max(2, min(os.cpu_count() or 2, _WORKERS))
    try:
        return condense(run_matrix(matrix, workers=workers, seconds=seconds))
    except Exception as exc:  # a worker that died: what else was measured is kept
        return Parity({}, problem=f"the matrix ended early: {type(exc).__name__}: {exc}")


def condense(report: Report) -> Parity:
    """What is kept of a matrix's report: counts, and every red cell with its first failure."""
    counts: dict[str, dict[str, int]] = {}
    for cell in report.cells:
        found = counts.setdefault(cell.backend, {"cells": 0, "red": 0, "refused": 0, "cases": 0})
        found["refused" if cell.refused else "cells"] += 1
        found["red"] += not cell.ok
        found["cases"] += cell.cases
    entries = [(cell.backend, _entry(cell, report.seed)) for cell in report.red]
    return Parity(
        counts,
        tuple(entry for backend, entry in entries if backend != _REFERENCE),
        tuple(entry for backend, entry in entries if backend == _REFERENCE),
        report.notes,
    )


def _entry(cell: Cell, seed: int) -> dict[str, Any]:
    from ..parity.report import repeat_command

    worst = cell.failures[0]
    return {
        "spec": cell.spec.name,
        "beta": "inf" if math.isinf(cell.beta) else cell.beta,
        "route": cell.route,
        "backend": cell.backend,
        "failures": len(cell.failures),
        "cases": cell.cases,
        "families": sorted({result.case.family for result in cell.failures}),
        "layouts": sorted({result.case.layout for result in cell.failures}),
        "ulp": cell.ulp,
        "allowed": cell.allowed,
        "torch_ulp": cell.torch_ulp,
        "detail": worst.verdict.detail,
        "command": repeat_command(cell, seed),
    }
