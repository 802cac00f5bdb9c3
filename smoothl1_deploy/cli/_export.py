"""`smoothl1-deploy export`: a spec to an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._spec import LossSpec
from ._console import human_size, print_fields, print_json, print_note
from ._options import AsJson, parse_shape, takes_spec

EXAMPLE = "smoothl1-deploy export --beta 0.5 --reduction mean --shape N,16 -o loss.onnx"


@takes_spec()
def export(
    given: dict[str, Any],
    *,
    route: str = "function",
    shape: str | None = None,
    target_shape: str | None = None,
    weight_shape: str | None = None,
    opset: int | None = None,
    output: Path | None = None,
    as_json: AsJson = False,
) -> None:
    """Write a Smooth L1 loss as an ONNX file.

    The graph takes input and target and gives loss. The same arguments give the same bytes.

    Options:
        route: function (one node with its body in the file), inlined (plain ONNX operators) or
            torch (torch.onnx.export; needs torch and --shape).
        shape: The axes of input, separated by commas: sizes, and names for dynamic axes; 'scalar'
            for rank 0. Without it any rank is taken, by ONNX Runtime but not by TensorRT.
        target_shape: The axes of target where it differs and broadcasts.
        weight_shape: The axes of weight where it differs and broadcasts.
        opset: The ONNX opset of the graph, 13 to 26; some losses begin at 14 or 15. Default: 18.
        output: The file to write; the spec's name by default.
    """
    spec = LossSpec(**given)
    axes = parse_shape(shape)
    target_axes = parse_shape(target_shape, "--target-shape")
    weight_axes = parse_shape(weight_shape, "--weight-shape")

    from .._artefact import sha256
    from .._files import write_atomic
    from ..graph._export import export as export_model
    from ._inspect import graph_ports, show_ports

    model = export_model(
        spec, route, axes, target_shape=target_axes, weight_shape=weight_axes, opset=opset
    )
    data = model.SerializeToString(deterministic=True)
    path = write_atomic(output or Path(f"{spec.name}.onnx"), data)
    inputs, outputs = graph_ports(model)
    digest = sha256(data)
    if as_json:
        print_json(
            {
                "path": str(path),
                "bytes": len(data),
                "sha256": digest,
                "route": route,
                "spec": spec.to_dict(),
                "inputs": inputs,
                "outputs": outputs,
            }
        )
        return
    print_fields(
        {
            "wrote": f"{path}, {human_size(len(data))}",
            "spec": ", ".join(f"{name}={value}" for name, value in spec.to_dict().items()),
            "route": route,
            "inputs": show_ports(inputs),
            "outputs": show_ports(outputs),
            "sha256": digest,
        }
    )
    if axes is None:
        print_note("no --shape: any rank is taken, by ONNX Runtime but not by TensorRT")
