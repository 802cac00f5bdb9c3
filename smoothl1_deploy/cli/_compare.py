"""`smoothl1-deploy compare`: two artefacts on the same data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .._table import Table
from ..errors import InvalidInputError, SpecError
from ._arrays import named_files
from ._console import open_console, print_lines, print_note, print_result, typed
from ._options import AsJson, BackendNames, Next, end_unless

if TYPE_CHECKING:
    from .._artefact import ModelSource
    from .._floats import Array
    from ..parity._differences import Comparison

EXAMPLE = "smoothl1-deploy compare loss.onnx loss.engine --data pair.npz --ulp 1"


def compare(
    first: Path,
    second: Path,
    *,
    input: list[str] | None = None,
    target: Path | None = None,
    data: Path | None = None,
    backend: BackendNames = None,
    ulp: Annotated[int | None, typer.Option(min=0)] = None,
    as_json: AsJson = False,
) -> Next:
    """Compare the answers of two artefacts on your own data, by IEEE class and in ULP.

    Each takes of the data what it has an input for, floats in its own format. Outputs are compared
    by their names, two formats of floats in the narrower. Exits with 1 where an element is of
    another IEEE class (NaN, +inf, -inf, finite, +0, -0), or further than --ulp.

    Options:
        first: An ONNX file, anyone's, or an .engine, which is run on the GPU.
        second: Likewise.
        input: A .npy file, or NAME=FILE for each input.
        target: A .npy file.
        data: An .npz file with an array for each input, by its name.
        backend: What runs the ONNX files, ort-cpu by default. Twice: what runs each.
        ulp: How far apart two numbers may be; by default as far as they are.
    """
    from ..parity._differences import compare as tell_apart

    backends = backend or ["ort-cpu"]
    if len(backends) > 2:
        raise SpecError(f"--backend {len(backends)} times, and there are two artefacts; give two")
    (a, dtypes), (b, others) = map(_opened, (first, second))
    arrays = _arrays(others | dtypes, input, target, data)
    found = tell_apart(a, b, arrays, backend=(backends[0], backends[-1]), ulp=ulp)
    print_result(found, as_json, lambda: _show(found, first, second))
    end_unless(found)
    is_engine = isinstance(b, Path)
    return [typed("inspect", second) if is_engine else typed("verify", second, "--certificate")]


def _opened(path: Path) -> tuple[ModelSource, dict[str, str]]:
    """A model, or the path of an engine; and the dtype of each of its inputs."""
    from .._artefact import read_model
    from ..backends._base import ENGINE_SUFFIXES
    from ..backends._whole import takes
    from ..tensorrt._engine import read_verified

    if path.suffix in ENGINE_SUFFIXES:
        return path, {port.name: port.dtype for port in read_verified(path).sidecar.inputs}
    model = read_model(path)
    return model, {port.name: port.dtype for port in takes(model).values()}


def _arrays(
    dtypes: dict[str, str], input: list[str] | None, target: Path | None, data: Path | None
) -> dict[str, Array]:
    """Arrays by name: of an artefact's inputs, or of what a loss calls its own."""
    from .._artefact import ROLES
    from .._npy import ARCHIVE_REMEDY, read_array, read_named

    known = dict.fromkeys(ROLES, next(iter(dtypes.values()), "float32")) | dtypes
    alone, files = named_files(input)
    pair = len(alone) == 1 and target is not None
    if [data is not None, bool(files), pair].count(True) != 1 or (not pair and (alone or target)):
        raise InvalidInputError(
            "give the arrays by --input A.npy --target B.npy, by --input NAME=A.npy for each "
            "input, or by --data FILE.npz"
        )
    if alone and target is not None:
        files = {"input": alone[0], "target": target}
    if data is not None:
        return read_named(data, {}, known, ARCHIVE_REMEDY)
    if unknown := [name for name in files if name not in known]:
        raise InvalidInputError(
            f"no input {', '.join(unknown)}; the two take {', '.join(dtypes) or 'none'}"
        )
    return {name: read_array(path, known[name]) for name, path in files.items()}


def _show(found: Comparison, first: Path, second: Path) -> None:
    rows: list[tuple[str, ...]] = []
    outputs = found.outputs.items()
    for name, each in outputs:
        where = each.problem
        if each.at is not None and each.values is not None:
            where = f"{list(each.at)}: {' and '.join(each.values)}"
        counts = (each.elements, each.other_bits, each.other_class, each.ulp)
        rows.append((name, *(f"{count:,}" for count in counts), where))
    columns = ("output", "elements", "other bits", "other class", "ULP", "the worst")
    open_console().print(Table("", columns, rows, "lrrrrl"))
    for path, names in zip((first, second), found.alone, strict=True):
        if names:
            print_note(f"{path} alone gives {', '.join(names)}")
    red = [f"{name} ({each})" for name, each in outputs if not each.within(found.limit)]
    furthest = max(each.ulp for each in found.outputs.values())
    if found.same_bits:
        print_lines(["the same bits"])
    elif red:
        print_lines([f"too different: {', '.join(red)}"])
    else:
        print_lines([f"the same IEEE classes, {furthest:,} ULP apart at most"])
