"""`smoothl1-deploy run`: the loss of two arrays."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInputError
from ._console import print_fields, print_json, print_note, typed
from ._options import AsJson, BackendName, Count, Next

if TYPE_CHECKING:
    from .._floats import Array
    from ..backends._whole import ModelRunner

EXAMPLE = "smoothl1-deploy run loss.onnx --input input.npy --target target.npy"


def _summarise(array: Array) -> dict[str, Any]:
    """An output of rank 0 as its number, any other by what it spans, in the digits of its dtype.

    min, max and mean leave NaN out, and are None where nothing else is left.
    """
    import numpy as np

    fields = {"dtype": array.dtype.name, "shape": list(array.shape)}
    if array.ndim == 0:
        return {**fields, "value": float(str(array[()]))}
    numbers = array[~np.isnan(array)]
    some = numbers.size > 0
    return {
        **fields,
        "min": float(str(numbers.min())) if some else None,
        "max": float(str(numbers.max())) if some else None,
        "mean": float(numbers.mean(dtype=np.float64)) if some else None,
        "nan": array.size - numbers.size,
    }


def run(
    model: Path,
    *,
    input: list[str] | None = None,
    target: Path | None = None,
    data: Path | None = None,
    weight: Path | None = None,
    grad_output: Path | None = None,
    beta: float | None = None,
    backend: BackendName = "ort-cpu",
    threads: Count = 0,
    url: str | None = None,
    output: Path | None = None,
    as_json: AsJson = False,
) -> Next:
    """Compute the loss of two arrays with an artefact, or with a model of a server (--url).

    A model with losses attached runs whole, and gives every output. A loss of rank 0 is printed as
    a bare number in full precision, anything else as a summary. bfloat16, which numpy writes as raw
    items of two bytes, is recognised by the artefact's dtype.

    Options:
        model: A .onnx file, or an .engine with --backend trt; with --url a model's name.
        input: A .npy file; of a model with losses attached NAME=FILE, for each of its inputs.
        target: A .npy file.
        data: An .npz file with arrays called input, target (and weight, grad_output), or as the
            inputs of a model with losses attached.
        weight: A .npy file, for an artefact that takes a weight.
        grad_output: A .npy file, for an artefact with an upstream.
        beta: For an artefact that takes beta at run time.
        threads: For the call; 0: as many as the backend thinks fit.
        url: Ask a server instead: http://HOST:PORT or grpc://HOST:PORT.
        output: Write the result to a .npy or .npz file.
    """
    given = list(input or ())
    named = dict(
        entry.split("=", 1) for entry in given if "=" in entry and not Path(entry).exists()
    )
    if data is not None:
        complete = not any((given, target, weight, grad_output))
    else:
        complete = bool(named) or (len(given) == 1 and target is not None)
    if not complete or (named and (len(named) < len(given) or target or weight or grad_output)):
        raise InvalidInputError(
            "give the arrays by --input A.npy --target B.npy or --data PAIR.npz; those of a model "
            "with losses attached by --input NAME=A.npy for each of its inputs, or --data"
        )

    from .._files import check_apart
    from .._npy import check_output, read_archive, read_array

    first = Path(given[0]) if given and not named else None
    files = {"input": first, "target": target, "weight": weight, "grad_output": grad_output}
    read = {"MODEL": model if url is None else None, "--data": data}
    read |= {f"--{name}": path for name, path in files.items()}
    read |= {f"--input {name}": Path(path) for name, path in named.items()}
    check_apart([("-o", output)], read.items())
    runner: Any
    arrays: dict[str, Any]
    if url is None:
        from ..backends._base import load
        from ..backends._whole import ModelRunner

        runner = load(str(model), backend, threads=threads)
        if isinstance(runner, ModelRunner):
            if output is not None:
                check_output(output, len(runner.outputs))
            arrays = _arrays_of(runner, named, data, beta)
            _give(runner.run(**arrays), output, as_json)
            return [typed("verify", model, "--certificate")]
        dtype, outputs = runner.signature.input.dtype, len(runner.signature.outputs)
    else:
        from ..serving import Client

        runner = Client(url, str(model))
        dtype, outputs = runner.dtype, len(runner.metadata()["outputs"])
    if named:
        raise InvalidInputError(
            f"{model} is a loss of its own; give its arrays by --input A.npy --target B.npy"
        )
    if output is not None:
        check_output(output, outputs)
    if data is not None:
        arrays = read_archive(data, dtype)
    else:
        arrays = {name: read_array(path, dtype) for name, path in files.items() if path is not None}
    _give(runner.run(**arrays, beta=beta), output, as_json)
    if url is not None:
        return None
    if backend == "trt":  # what is verified is the model that the engine was built from
        return [typed("inspect", model)]
    return [typed("verify", model, "--certificate")]


def _arrays_of(
    runner: ModelRunner, files: dict[str, str], data: Path | None, beta: float | None
) -> dict[str, Array]:
    """An array for each input of a model, of files by their names or of one archive."""
    import numpy as np

    from .._npy import read_array

    arrays: dict[str, Array] = {} if beta is None else {"beta": np.array(beta, np.float32)}
    if data is not None:
        return {**read_data(data, runner, without=arrays), **arrays}
    unknown = [name for name in files if name not in runner.inputs]
    if unknown:
        raise InvalidInputError(
            f"no input {', '.join(unknown)}; the model takes {', '.join(runner.inputs.values())}"
        )
    dtypes = runner.dtypes
    return {n: read_array(Path(f), dtypes[n].name) for n, f in files.items()} | arrays


def read_data(path: Path, runner: ModelRunner, without: Container[str] = ()) -> dict[str, Array]:
    """The arrays of an .npz file for the inputs of a model, less those that are had otherwise."""
    from .._npy import read_named

    wanted = {n: dtype.name for n, dtype in runner.dtypes.items() if n not in without}
    remedy = f"the model takes {', '.join(runner.inputs.values())}"
    return read_named(path, wanted, {}, remedy)


def _give(results: dict[str, Array], output: Path | None, as_json: bool) -> None:
    """Write the outputs where they are asked for, and show them."""
    from .._npy import write_arrays

    if output is not None:
        write_arrays(output, results)
        if any(array.dtype.name == "bfloat16" for array in results.values()):
            print_note(
                f"numpy writes bfloat16 without its name; view what is read from {output} as "
                "ml_dtypes.bfloat16"
            )
    _show({name: _summarise(array) for name, array in results.items()}, output, as_json)


def _show(summaries: dict[str, dict[str, Any]], output: Path | None, as_json: bool) -> None:
    if as_json:
        print_json({"outputs": summaries, "path": output})
        return
    values = [summary.get("value") for summary in summaries.values()]
    if len(values) == 1 and values[0] is not None:
        print(values[0])  # alone on its line: loss=$(smoothl1-deploy run ...)
    else:
        for name, summary in summaries.items():
            fields = {"output": name, **summary}
            print_fields({key: value for key, value in fields.items() if value is not None})
    if output is not None:
        print_note(f"wrote {output}")
