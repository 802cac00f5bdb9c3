"""`smoothl1-deploy export`: a spec to an ONNX file."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SpecError
from ..spec import DTYPES, NORMALIZERS, REDUCTIONS, LossSpec
from .console import human_size, print_fields, print_json, print_note

__all__ = ["EXAMPLE", "export", "parse_shape"]

EXAMPLE = "smoothl1-deploy export --beta 0.5 --reduction mean --shape N,16 -o loss.onnx"

_EXTENSIONS = "Beyond PyTorch's arguments"
_DEPRECATED = "Deprecated arguments of PyTorch"

# The extensions of a spec, as every command takes them.
PerSample = Annotated[
    bool,
    typer.Option(
        "--per-sample",
        help="Reduce every axis but the first: one score per row.",
        rich_help_panel=_EXTENSIONS,
    ),
]
Gradient = Annotated[
    bool,
    typer.Option(
        "--gradient",
        help="A second output grad_input, the gradient with respect to input.",
        rich_help_panel=_EXTENSIONS,
    ),
]
Upstream = Annotated[
    bool,
    typer.Option(
        "--upstream",
        help="Multiply the gradient by an input grad_output, of the loss's shape.",
        rich_help_panel=_EXTENSIONS,
    ),
]
RuntimeBeta = Annotated[
    bool,
    typer.Option(
        "--runtime-beta",
        help="beta is an input of the graph: one file for every beta.",
        rich_help_panel=_EXTENSIONS,
    ),
]
Weight = Annotated[
    str | None,
    typer.Option(
        help="An input weight multiplies the losses of the elements; a mean divides "
        f"by: {' or '.join(NORMALIZERS)} (the number of elements or the sum of weights).",
        rich_help_panel=_EXTENSIONS,
    ),
]


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written; `inputs` and `outputs` as `ports.graph_ports` gives them."""

    path: Path
    bytes: int
    sha256: str
    route: str
    spec: LossSpec
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "sha256": self.sha256,
            "route": self.route,
            "spec": self.spec.to_dict(),
            "inputs": self.inputs,
            "outputs": self.outputs,
        }


def parse_shape(text: str | None, what: str = "--shape") -> tuple[int | str, ...] | None:
    """`"N,16"` to `("N", 16)`; `"scalar"` or `""` to `()`; None stays None (any rank).

    Raises:
        SpecError: for `"Nx16"`, which would otherwise be one axis of that name.

    >>> parse_shape("N, 16")
    ('N', 16)
    """
    if text is None:
        return None
    if text.strip() in ("", "scalar"):
        return ()
    axes = [axis.strip() for axis in text.split(",")]
    for axis in axes:
        if re.fullmatch(r"\w+(x\d+)+", axis):
            commas = axis.replace("x", ",")
            raise SpecError(f"{what} {text!r}: separate the axes by commas, as in {commas}")
    return tuple(int(axis) if re.fullmatch(r"-?\d+", axis) else axis for axis in axes)


def export(
    beta: Annotated[
        float, typer.Option(help="Where the quadratic part ends, >= 0; 0 is the L1 loss.")
    ] = 1.0,
    reduction: Annotated[str, typer.Option(help=f"One of {', '.join(REDUCTIONS)}.")] = "mean",
    dtype: Annotated[
        str, typer.Option(help=f"Of input, target and loss: {', '.join(DTYPES)}.")
    ] = "float32",
    route: Annotated[
        str,
        typer.Option(
            help="function (one node with its body in the file), inlined (plain ONNX "
            "operators) or torch (torch.onnx.export; needs torch and --shape)."
        ),
    ] = "function",
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="AXES",
            help="Of input, separated by commas: sizes, and names for dynamic axes; 'scalar' for "
            "rank 0. Without it any rank is taken, by ONNX Runtime but not by TensorRT.",
        ),
    ] = None,
    target_shape: Annotated[
        str | None,
        typer.Option(metavar="AXES", help="Of target where it differs and broadcasts."),
    ] = None,
    any_rank: Annotated[
        bool, typer.Option("--any-rank", help="Say that no --shape is meant.")
    ] = False,
    per_sample: PerSample = False,
    gradient: Gradient = False,
    upstream: Upstream = False,
    runtime_beta: RuntimeBeta = False,
    weight: Weight = None,
    weight_shape: Annotated[
        str | None,
        typer.Option(
            metavar="AXES",
            help="Of weight where it differs and broadcasts.",
            rich_help_panel=_EXTENSIONS,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The file to write; the spec's name by default."),
    ] = None,
    size_average: Annotated[
        bool | None,
        typer.Option(
            "--size-average/--no-size-average",
            help="Overrides --reduction, as in PyTorch.",
            show_default=False,
            rich_help_panel=_DEPRECATED,
        ),
    ] = None,
    reduce: Annotated[
        bool | None,
        typer.Option(
            "--reduce/--no-reduce",
            help="Overrides --reduction, as in PyTorch.",
            show_default=False,
            rich_help_panel=_DEPRECATED,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a Smooth L1 loss as an ONNX file.

    The graph takes input and target and gives loss. The same arguments give the same bytes.
    """
    spec = replace(
        LossSpec.from_legacy(size_average, reduce, reduction, beta, dtype),
        per_sample=per_sample,
        gradient=gradient,
        upstream=upstream,
        runtime_beta=runtime_beta,
        weight=weight,
    )
    axes = parse_shape(shape)
    target_axes = parse_shape(target_shape, "--target-shape")
    weight_axes = parse_shape(weight_shape, "--weight-shape")
    if any_rank and axes is not None:
        raise SpecError(f"--any-rank and --shape {shape!r} exclude each other; give one of them")

    from ..artefact import sha256, write_atomic
    from ..graph.export import export as export_model
    from .ports import graph_ports, show_ports

    model = export_model(spec, route, axes, target_shape=target_axes, weight_shape=weight_axes)
    data = model.SerializeToString(deterministic=True)
    path = write_atomic(output or Path(f"{spec.name}.onnx"), data)
    done = Exported(path, len(data), sha256(data), route, spec, *graph_ports(model))
    if size_average is not None or reduce is not None:
        print_note(
            "--size-average and --reduce are deprecated in PyTorch and here; "
            f"write --reduction {spec.reduction}"
        )
    if as_json:
        print_json(done.to_dict())
        return
    print_fields(
        {
            "wrote": f"{done.path}, {human_size(done.bytes)}",
            "spec": ", ".join(f"{name}={value}" for name, value in spec.to_dict().items()),
            "route": route,
            "inputs": show_ports(done.inputs),
            "outputs": show_ports(done.outputs),
            "sha256": done.sha256,
        }
    )
    if axes is None and not any_rank:
        print_note("no --shape: any rank is taken, by ONNX Runtime but not by TensorRT")
