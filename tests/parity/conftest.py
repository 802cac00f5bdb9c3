"""Reports to look at: a green one, and a red one full of text that must be escaped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
from planted import planted

from smoothl1_deploy._floats import Array
from smoothl1_deploy._spec import LossSpec
from smoothl1_deploy.errors import InvalidInputError
from smoothl1_deploy.parity._contract import PLAIN, PYTORCH, Answer, Contract, Edge
from smoothl1_deploy.parity._drift import Drift, measure_drift
from smoothl1_deploy.parity._matrix import Matrix, run_matrix
from smoothl1_deploy.parity._report import Build, Report

#: Ends an HTML element, an attribute, a table cell, a code span; holds what XML can't.
HOSTILE = "<script>alert('x')</script> \"& ]]> | `` @someone \x00\x1b[31m {{ 7*7 }} {% raw %}"


@pytest.fixture(scope="session")
def hostile() -> str:
    return HOSTILE


@pytest.fixture(scope="session")
def drift() -> Drift:
    return measure_drift([2**10, 2**14, 2**18])


@pytest.fixture(scope="session")
def contract() -> Contract:
    """A row of each kind of answer."""
    ours = (("equal", "0.5"), ("better", "[125.0, 0.5]"), ("refuses", "SpecError: no beta of -1"))
    edges = tuple(
        Edge(f"edge {kind}", f"Is it {kind}?", (
            Answer(PYTORCH, "reference", "[inf, 0.5]"),
            Answer("ort-cpu", kind, text),
            Answer(PLAIN, "differs", f"an answer of more than 110 characters: {HOSTILE * 2}"),
        ))
        for kind, text in ours
    )  # fmt: skip
    return Contract((PYTORCH, "ort-cpu", PLAIN), edges, 0.5)


@pytest.fixture(scope="session")
def schema() -> dict[str, Any]:
    """What `report.json` holds, as it is published."""
    text = files("smoothl1_deploy.parity.views").joinpath("schema.json").read_text()
    return json.loads(text)  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def fits_schema(schema: dict[str, Any]) -> Callable[[Report], None]:
    """Holds the JSON of a report against the schema."""
    import jsonschema

    def check(report: Report) -> None:
        jsonschema.validate(json.loads(report.to_json()), schema)

    return check


@pytest.fixture(scope="session")
def green() -> Report:
    matrix = Matrix(
        ("ort-cpu", "onnx-reference"), betas=(0.5, float("inf")), dtypes=("float32", "bfloat16"),
        routes=("function", "inlined"), quick=True,
    )  # fmt: skip
    return run_matrix(matrix)


def fault(spec: LossSpec, input: Array, right: dict[str, Array]) -> dict[str, Array]:
    """beta 0.5: an error; beta 1, mean: 1e-4 too large; beta 2: NaN lost."""
    if spec.beta == 0.5 and input.size == 0:
        raise InvalidInputError(f"a planted refusal {HOSTILE}")
    if spec.beta == 1.0 and spec.reduction == "mean":
        return {"loss": np.asarray(right["loss"] * np.float32(1.0001))}
    if spec.beta == 2.0 and np.isnan(input).any():
        return {"loss": np.nan_to_num(right["loss"])}
    return right


def no_float64(spec: LossSpec) -> str | None:
    return f"no float64 here {HOSTILE}" if spec.dtype == "float64" else None


@pytest.fixture(scope="session")
def red() -> Report:
    matrix = Matrix(
        ("ort-cpu",), betas=(0.0, 0.5, 1.0, 2.0), dtypes=("float32", "float64"),
        routes=("function",), extensions=False, seed=7, quick=True,
    )  # fmt: skip
    with planted(fault, refusal=no_float64):
        report = run_matrix(matrix)
    spec = LossSpec(0.5)
    builds = (
        Build(spec, "function", "tensorrt_rtx", 0.25, 20_000),
        Build(LossSpec(dtype="float64"), "function", "auto", refused=f"no float64 {HOSTILE}"),
        Build(LossSpec(2.0), "function", "auto", error=f"BuildError: planted {HOSTILE}"),
    )
    environment = {**report.environment, "processor": HOSTILE}
    return dataclasses.replace(
        report, builds=builds, environment=environment, notes=(*report.notes, HOSTILE)
    )
