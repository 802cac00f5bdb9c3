"""`smoothl1-deploy verify`: one artefact against PyTorch and the exact loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import check_writable, write_atomic
from .._spec import LossSpec
from ..errors import require
from ._arrays import read_data
from ._console import print_lines, print_result, print_tables, typed
from ._options import AsJson, BackendName, Count, Next, end_unless, takes_spec

if TYPE_CHECKING:
    import onnx

    from ..parity._verify import Verification
    from ..parity._whole import ModelVerification

EXAMPLE = "smoothl1-deploy verify loss.onnx --backend ort-cpu"


@takes_spec(panel="A model of other origin")
def verify(
    model: Path,
    given: dict[str, Any],
    *,
    backend: BackendName = "ort-cpu",
    input_name: str | None = None,
    target_name: str | None = None,
    output_name: str | None = None,
    drift: bool = True,
    large: bool = False,
    certificate: bool = False,
    html: Path | None = None,
    md: Path | None = None,
    against: Path | None = None,
    data: Path | None = None,
    seed: Count = 0,
    as_json: AsJson = False,
) -> Next:
    """Hold one artefact against PyTorch and the exact loss, on every input family.

    Exits with 1 where a case is red, and names the likeliest fault. What the artefact computes is
    read from its metadata, though something else may have changed it since; a model of other origin
    needs --beta and --reduction, and an option for whatever else it computes. Of a model with
    losses attached, each loss is held by itself, and the whole model is run.

    Options:
        model: An ONNX file.
        drift: Measure the error of what adds up at 2^10 to 2^22 elements.
        large: At 2^24 as well; takes up to 1.6 GB of memory, 2.7 GB for float64 with weights; with
            a gradient 2.6 and 4.7 GB.
        certificate: Write what was found beside the model.
        html: Write what was found as one page, which opens from disk.
        md: Write what was found as Markdown.
        seed: Which inputs are made.

    A model with losses attached:
        against: The model that they were attached to: what both give must have the same bits.
        data: An .npz file with an array for each input, by its name, to run the whole model on.

    A model of other origin:
        input_name: Which input is the prediction.
        target_name: Which input is the target.
        output_name: Which output is the loss.
    """
    from .._artefact import read_model, select_ports
    from .._model import Port
    from ..backends._whole import takes
    from ..parity._certificate import certificate_path, certify
    from ..parity._verify import verify as hold_against_references
    from ..parity.views import _html, _markdown

    pages = [(at, view.render) for at, view in ((html, _html), (md, _markdown)) if at is not None]
    if html is not None:
        require("jinja2", "report", "the HTML page")
    proto = read_model(model)
    for path in (certificate_path(model) if certificate else None, html, md):
        if path is not None:
            check_writable(path)
    names = {"input_name": input_name, "target_name": target_name, "output_name": output_name}
    spec = _completed(given, select_ports(proto, **names)) if given else None
    result = hold_against_references(
        proto,
        backend,
        spec=spec,
        seed=seed,
        drift=drift,
        large=large,
        against=None if against is None else str(against),
        data=None if data is None else read_data(data, takes(proto)),
        **names,
    )
    written = [certify(result, model)] if certificate else []
    written += [write_atomic(path, render(result).encode()) for path, render in pages]
    print_result(result, as_json, lambda: _show(result, written))
    end_unless(result)
    if Port.of(proto.graph.input[0]).axes is None:  # of any rank, which no server takes
        return [typed("inspect", model)]
    return [typed("repository", "models", "--model", model)]


def _show(result: Verification | ModelVerification, written: list[Path]) -> None:
    from ..parity.views._tables import equal_text, verified

    print_tables(verified(result))
    wrote = [f"wrote {', '.join(map(str, written))}"] if written else []
    print_lines([equal_text(result), *wrote])


def _completed(given: dict[str, Any], proto: onnx.ModelProto) -> LossSpec:
    """What the options say, and of the rest what the model's metadata say, or its dtype."""
    from .._artefact import signature
    from ..graph._metadata import read_spec

    known = read_spec(proto)
    if known is None:
        found = signature(proto)
        # What is there to be right is held against what is right.
        gradient = any(port.name == "grad_input" for port in found.outputs)
        known = LossSpec(dtype=found.input.dtype, gradient=gradient)
    return replace(known, **given)
