"""`smoothl1-deploy attach`: the loss inside somebody's model."""

from __future__ import annotations

import contextlib
import difflib
import filecmp
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import check_apart, check_writable, replacing
from ..errors import ArtefactError, OutputError, SpecError, reason_of
from ._console import human_size, print_note, typed
from ._options import AsJson, Next, Normalizer, PlainRoute, parse_shape, takes_spec

if TYPE_CHECKING:
    import onnx

EXAMPLE = (
    "smoothl1-deploy attach detector.onnx --prediction boxes --target boxes_gt --per-sample "
    "-o scored.onnx"
)

_PROTOBUF_LIMIT = 2**31


@takes_spec("weight", "mask")
def attach(
    model: Path,
    given: dict[str, Any],
    *,
    prediction: str,
    target: str,
    output: Path,
    weight: str | None = None,
    mask: str | None = None,
    normalizer: Normalizer = None,
    target_shape: str | None = None,
    loss_name: str = "loss",
    only_loss: bool = False,
    route: PlainRoute = "function",
    convert_opset: bool = False,
    overwrite: bool = False,
    as_json: AsJson = False,
) -> Next:
    """Graft the loss onto any ONNX model, after its own nodes.

    Weights beside the model stay beside it: their files are copied to where the result goes. Run
    it again on the result to attach another loss.

    Options:
        model: An ONNX file of opset 13 or newer.
        prediction: A tensor of it: an output, an input, or one in between.
        target: Another tensor, a new input's name, or a .npy file (a constant).
        output: The model to write.
        weight: Weights of the elements; like --target.
        mask: Booleans or integers that select elements; like --target.
        normalizer: What a weighted mean is divided by; count by default.
        target_shape: The axes of a new target, where they aren't the prediction's: N,4.
        loss_name: The name of the output.
        only_loss: Drop the other outputs and what only they need.
        route: One node with its body in the file, or plain ONNX operators.
        convert_opset: Convert a model that is too old to the lowest opset that does.
        overwrite: Let -o be the model itself.
    """
    if normalizer is not None and weight is None:
        raise SpecError("--normalizer without --weight; say what the weights are with --weight")

    from .._model import external_locations, float_dtype_of
    from .._spec import LossSpec
    from ..graph._attach import attach as graft
    from ._inspect import write_shown

    proto = _read(model)
    operands = {"target": target, "weight": weight, "mask": mask}
    folders = (model.parent, output.parent)
    read = [
        ("the model, which --overwrite gives up,", None if overwrite else model),
        *(("its weights", at / name) for name in external_locations(proto) for at in folders),
        *((f"--{role}", Path(name)) for role, name in operands.items() if name and _is_array(name)),
    ]
    check_apart([("-o", output)], read)
    check_writable(output)  # before any weights are copied
    given.setdefault("dtype", float_dtype_of(proto, prediction) or "float32")
    if weight is not None:
        given["weight"] = normalizer or "count"
    given |= {"mask": True} if mask is not None else {}
    spec = LossSpec(**given)
    grafted = graft(
        proto,
        prediction,
        spec=spec,
        **{role: _operand(name, spec.dtype) for role, name in operands.items()},
        target_shape=parse_shape(target_shape, "--target-shape"),
        loss_name=loss_name,
        only_loss=only_loss,
        route=route,
        convert_opset=convert_opset,
    )
    if grafted.ByteSize() >= _PROTOBUF_LIMIT:
        raise OutputError(
            "can't write the model: with what is attached it takes "
            f"{human_size(grafted.ByteSize())}, and protobuf writes less than 2 GiB; keep the "
            "model's weights in a file beside it"
        )
    _carry(grafted, *folders)
    for role, name in operands.items():
        if name is not None:
            _note_near_miss(role, name, proto, grafted)
    write_shown(output, grafted, spec, route, as_json)
    origin = [] if overwrite else ["--against", model]
    return [typed("verify", output, *origin, "--certificate")]


def _read(path: Path) -> onnx.ModelProto:
    """The model; weights in files of their own stay there, however many there are."""
    import onnx

    from .._artefact import read_model
    from .._model import external_locations

    bare = onnx.ModelProto()
    with contextlib.suppress(Exception):  # read_model says what is wrong with the file
        if os.path.isfile(path):
            bare = onnx.load(str(path), load_external_data=False)
    return bare if external_locations(bare) else read_model(path)


def _carry(model: onnx.ModelProto, source: Path, target: Path) -> None:
    """Copy the files that the model's weights are in to where it goes."""
    from .._model import external_locations

    for location in external_locations(model):
        # Unlike Path.resolve, realpath comes to an end in a ring of links too.
        old, new, *folders = (
            Path(os.path.realpath(path))
            for path in (source / location, target / location, source, target)
        )
        if not (old.is_relative_to(folders[0]) and new.is_relative_to(folders[1])):
            raise ArtefactError(
                f"the model's weights are in {location!r}, outside of its folder; that is not read"
            )
        if not old.is_file():
            raise ArtefactError(f"the model's weights are in {old}, which does not exist")
        try:
            if old != new and not new.exists():
                with old.open("rb") as file, replacing(new) as copy:
                    shutil.copyfileobj(file, copy)
            elif not filecmp.cmp(old, new, shallow=False):  # as those of an earlier run are
                raise OSError(0, "it exists with other content")
        except OSError as exc:
            raise OutputError(
                f"can't copy the weights of the model to {new}: {reason_of(exc)}; choose another "
                "folder with -o"
            ) from exc


def _is_array(given: str) -> bool:
    return given.lower().endswith(".npy")


def _operand(given: str | None, dtype: str) -> Any:
    """A tensor's name, or the array of a .npy file."""
    if given is None or not _is_array(given):
        return given
    from .._npy import read_array

    return read_array(Path(given), dtype)


def _note_near_miss(role: str, name: str, before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """A name that no tensor has makes a new input, and a typing error would too, unseen."""
    known = [value.name for value in before.graph.input]
    known += [output for node in before.graph.node for output in node.output]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if close and name not in known and name in {value.name for value in after.graph.input}:
        print_note(f"the {role} {name!r} is a new input; the model has {close[0]!r} too")
