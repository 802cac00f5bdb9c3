"""`smoothl1-deploy attach`: the loss inside somebody's model."""

from __future__ import annotations

import difflib
import filecmp
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ArtefactError, OutputError, SpecError
from ._console import human_size, print_fields, print_note
from ._options import parse_shape, takes_spec

if TYPE_CHECKING:
    import onnx

EXAMPLE = (
    "smoothl1-deploy attach detector.onnx --prediction boxes --target boxes_gt --per-sample "
    "-o scored.onnx"
)

_PROTOBUF_LIMIT = 2**31 - 2**20  # with room for what is written around the weights


@takes_spec("weight")
def attach(
    model: Annotated[Path, typer.Argument(help="An ONNX file of opset 13 or newer.")],
    prediction: Annotated[
        str, typer.Option(help="A tensor of it: an output, an input, or one in between.")
    ],
    target: Annotated[
        str, typer.Option(help="Another tensor, a new input's name, or a .npy file (a constant).")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The model to write.")],
    given: dict[str, Any],
    *,
    weight: Annotated[
        str | None, typer.Option(help="Weights of the elements; like --target.")
    ] = None,
    normalizer: Annotated[
        str | None,
        typer.Option(help="What a weighted mean is divided by: count (by default) or weights."),
    ] = None,
    target_shape: Annotated[
        str | None, typer.Option(help="Of a new input, where it isn't the prediction's: N,4.")
    ] = None,
    loss_name: Annotated[str, typer.Option(help="Of the output.")] = "loss",
    only_loss: Annotated[
        bool, typer.Option("--only-loss", help="Drop the other outputs and what only they need.")
    ] = False,
    route: Annotated[str, typer.Option(help="function or inlined.")] = "function",
    convert_opset: Annotated[
        bool,
        typer.Option(
            "--convert-opset", help="Convert a model that is too old to the lowest opset that does."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Let -o be the model itself.")
    ] = False,
) -> None:
    """Graft the loss onto any ONNX model, after its own nodes.

    Weights beside the model stay beside it: their files are copied to where the result goes. Run
    it again on the result to attach another loss.
    """
    if normalizer is not None and weight is None:
        raise SpecError("--normalizer without --weight; say what the weights are with --weight")

    from .._model import float_dtype_of, inputs_of
    from .._spec import LossSpec
    from ..graph._attach import attach as graft

    proto = _read(model)
    _check_output(output, proto, model, [target, weight], overwrite)
    given.setdefault("dtype", float_dtype_of(proto, prediction) or "float32")
    if weight is not None:
        given["weight"] = normalizer or "count"
    spec = LossSpec(**given)
    grafted = graft(
        proto,
        prediction,
        _operand(target, spec.dtype),
        spec,
        weight=None if weight is None else _operand(weight, spec.dtype),
        target_shape=parse_shape(target_shape, "--target-shape"),
        loss_name=loss_name,
        only_loss=only_loss,
        route=route,
        convert_opset=convert_opset,
    )
    _carry(grafted, model.parent, output.parent)
    _save(grafted, output)
    for role, name in (("target", target), ("weight", weight)):
        if name is not None:
            _note_near_miss(role, name, proto, grafted)
    print_fields(
        {
            "wrote": f"{output}, {human_size(output.stat().st_size)}",
            "inputs": ", ".join(value.name for value in inputs_of(grafted)),
            "outputs": ", ".join(value.name for value in grafted.graph.output),
        }
    )


def _read(path: Path) -> onnx.ModelProto:
    """The model; weights in files of their own stay there, however many there are."""
    import onnx

    from .._artefact import read_model
    from .._model import external_locations

    if not os.path.isfile(path):
        return read_model(path)
    try:
        bare = onnx.load(str(path), load_external_data=False)
    except Exception:  # read_model says what is wrong with the file
        return read_model(path)
    return bare if external_locations(bare) else read_model(path)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve, for a ring of links too


def _note_near_miss(role: str, name: str, before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """A name that no tensor has makes a new input, and a typing error would too, unseen."""
    known = [value.name for value in before.graph.input]
    known += [output for node in before.graph.node for output in node.output]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if close and name not in known and name in {value.name for value in after.graph.input}:
        print_note(f"the {role} {name!r} is a new input; the model has {close[0]!r} too")


def _check_output(
    path: Path,
    model: onnx.ModelProto,
    source: Path,
    operands: list[str | None],
    overwrite: bool,
) -> None:
    """Refuse, before any weights are copied, where the model can't be written or would harm."""
    from .._model import external_locations

    if os.path.isdir(path) or not os.path.isdir(path.parent):
        problem = "is a folder" if os.path.isdir(path) else "lies in a folder that doesn't exist"
        raise OutputError(f"can't write the model: {path} {problem}; give a file name")
    weights = [_real(where / name) for name in external_locations(model)
               for where in (source.parent, path.parent)]  # fmt: skip
    if _real(path) in weights:
        raise OutputError(f"can't write the model: {path} holds its weights; give another name")
    arrays = [given for given in operands if given and _is_array(given) and os.path.isfile(given)]
    if _real(path) in [_real(Path(given)) for given in arrays]:
        raise OutputError(f"can't write the model: {path} is an array of it; give another name")
    if _real(path) == _real(source) and not overwrite:
        raise OutputError(
            f"can't write the model: {path} is the one that is read; give another name, or say "
            "--overwrite to lose it"
        )


def _carry(model: onnx.ModelProto, source: Path, target: Path) -> None:
    """Copy the files that the model's weights are in to where it goes."""
    from .._files import replacing
    from .._model import external_locations

    for location in external_locations(model):
        old, new = _real(source / location), _real(target / location)
        if not old.is_relative_to(_real(source)) or not new.is_relative_to(_real(target)):
            raise ArtefactError(
                f"the model's weights are in {location!r}, outside of its folder; that is not read"
            )
        if not old.is_file():
            raise ArtefactError(f"the model's weights are in {old}, which does not exist")
        if old == new:
            continue
        if new.exists():
            if _same_bytes(old, new):  # of an earlier run
                continue
            raise OutputError(
                f"can't copy the weights of the model to {new}: it exists with other content; "
                "choose another folder"
            )
        try:
            new.parent.mkdir(parents=True, exist_ok=True)
            with old.open("rb") as file, replacing(new) as copy:
                shutil.copyfileobj(file, copy)
        except OSError as exc:
            raise OutputError(
                f"can't copy the weights of the model to {new}: {exc.strerror or exc}; choose "
                "another -o"
            ) from exc


def _same_bytes(a: Path, b: Path) -> bool:
    try:
        return filecmp.cmp(a, b, shallow=False)
    except OSError:
        return False


def _is_array(given: str) -> bool:
    return given.lower().endswith(".npy")


def _operand(given: str, dtype: str) -> Any:
    """A tensor's name, or the array of a .npy file."""
    if not _is_array(given):
        return given
    from .._npy import read_array

    return read_array(Path(given), dtype)


def _save(model: onnx.ModelProto, path: Path) -> None:
    """In one file, written whole or not at all; beyond protobuf's limit with the weights beside."""
    import onnx

    from .._files import put, unfinished, write_atomic

    if model.ByteSize() < _PROTOBUF_LIMIT:
        write_atomic(path, model.SerializeToString(deterministic=True))
        return
    weights = path.with_name(f"{path.name}.data")
    folder = unfinished(path)
    try:
        folder.mkdir()
        try:
            whole = str(folder / path.name)
            onnx.save(model, whole, save_as_external_data=True, location=weights.name)
            for place in (weights, path):
                put(folder / place.name, place)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as exc:
        raise OutputError(f"can't write {path}: {exc.strerror or exc}; choose another -o") from exc
