"""`smoothl1-deploy verify`: one artefact against PyTorch and the exact loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import open_console, print_json, print_lines

if TYPE_CHECKING:
    from ..spec import LossSpec

__all__ = ["EXAMPLE", "verify"]

EXAMPLE = "smoothl1-deploy verify loss.onnx --backend ort-cpu"

_OTHERS = "A model of other origin"


def verify(
    model: Annotated[Path, typer.Argument(help="An ONNX file.")],
    backend: Annotated[
        str, typer.Option(help="What runs it; smoothl1-deploy doctor lists them.")
    ] = "ort-cpu",
    beta: Annotated[
        float | None,
        typer.Option(help="What it ought to compute with.", rich_help_panel=_OTHERS),
    ] = None,
    reduction: Annotated[
        str | None, typer.Option(help="none, mean or sum.", rich_help_panel=_OTHERS)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the inputs.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Hold one artefact against PyTorch and the exact loss, on every input family.

    Exits with 1 where a case is red. What the artefact computes is read from its metadata; a
    model of other origin needs --beta and --reduction.
    """
    from ..artefact import read_model
    from ..parity.verify import verify as hold_against_references
    from ..parity.verify import verify_table

    proto = read_model(model)
    spec = _given_spec(proto, beta, reduction)
    result = hold_against_references(proto, backend, spec=spec, seed=seed)
    if as_json:
        print_json(result.to_dict())
    else:
        open_console().print(verify_table(result))
        red, cases = len(result.failures), len(result.results)
        print_lines([f"{cases - red} of {cases} cases equal to PyTorch, or nearer to the truth"])
    if not result:
        raise typer.Exit(1)


def _given_spec(proto: object, beta: float | None, reduction: str | None) -> LossSpec | None:
    """What the options say, completed by the model's metadata and dtype; None without options."""
    if beta is None and reduction is None:
        return None
    from dataclasses import replace

    import onnx

    from ..artefact import signature
    from ..graph.metadata import read_spec
    from ..spec import LossSpec

    assert isinstance(proto, onnx.ModelProto)
    known = read_spec(proto) or LossSpec(dtype=signature(proto).input.dtype)
    return replace(
        known,
        beta=known.beta if beta is None else beta,
        reduction=known.reduction if reduction is None else reduction,
    )
