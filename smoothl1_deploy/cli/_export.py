"""`smoothl1-deploy export`: a spec to an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._spec import LossSpec
from ._console import print_note, typed
from ._options import AsJson, Next, Route, parse_shape, takes_spec

EXAMPLE = "smoothl1-deploy export --beta 0.5 --reduction mean --shape N,16 -o loss.onnx"


@takes_spec()
def export(
    given: dict[str, Any],
    *,
    route: Route = "function",
    shape: str | None = None,
    target_shape: str | None = None,
    weight_shape: str | None = None,
    mask_shape: str | None = None,
    opset: int | None = None,
    output: Path | None = None,
    as_json: AsJson = False,
) -> Next:
    """Write a Smooth L1 loss as an ONNX file.

    The graph takes input and target and gives loss. The same arguments give the same bytes.

    Options:
        route: function (one node with its body in the file), inlined (plain ONNX operators) or
            torch (torch.onnx.export; needs torch and --shape).
        shape: The axes of input, separated by commas: sizes, and names for dynamic axes; 'scalar'
            for rank 0. Without it any rank is taken, by ONNX Runtime but not by TensorRT.
        target_shape: The axes of target where it differs and broadcasts.
        weight_shape: The axes of weight where it differs and broadcasts.
        mask_shape: The axes of mask, likewise.
        opset: The ONNX opset of the graph, 13 to 26; some losses begin at 14 or 15. Default: 18.
        output: The file to write; the spec's name by default.
    """
    spec = LossSpec(**given)
    axes = parse_shape(shape)
    others = {"target": target_shape, "weight": weight_shape, "mask": mask_shape}
    shapes = {
        f"{name}_shape": parse_shape(text, f"--{name}-shape") for name, text in others.items()
    }

    from ..graph._export import export as export_model
    from ._inspect import write_shown

    model = export_model(spec, route, axes, **shapes, opset=opset)
    path = output or Path(f"{spec.name}.onnx")
    write_shown(path, model, spec, route, as_json)
    if axes is None and not as_json:
        print_note("no --shape: any rank is taken, by ONNX Runtime but not by TensorRT")
    return [typed("verify", path, "--certificate")]
