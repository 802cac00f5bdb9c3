"""`smoothl1-deploy run`: the loss of two arrays."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInputError
from ._arrays import named_files, read_data
from ._console import print_fields, print_note, print_result, typed
from ._options import AsJson, BackendName, Beta, Count, Next

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .._floats import Array
    from .._model import Port

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
    mask: Path | None = None,
    grad_output: Path | None = None,
    beta: Beta = None,
    divisor: float | None = None,
    backend: BackendName = "ort-cpu",
    threads: Count = 0,
    url: str | None = None,
    output: Path | None = None,
    as_json: AsJson = False,
) -> Next:
    """Compute the loss of two arrays with an artefact, or with a model of a server (--url).

    A model with losses attached, or one of a server that is no loss, runs whole, and gives every
    output. A loss of rank 0 is printed as a bare number in full precision, anything else as a
    summary. bfloat16, which numpy writes as raw items of two bytes, is recognised by the artefact's
    dtype.

    Options:
        model: A .onnx file, or an .engine with --backend trt; with --url a model's name.
        input: A .npy file; of a whole model NAME=FILE, for each of its inputs.
        target: A .npy file.
        data: An .npz file with arrays called input, target (and weight, mask, grad_output), or as
            the inputs of a whole model.
        weight: A .npy file, for an artefact that takes a weight.
        mask: A .npy file of booleans, for an artefact that takes a mask.
        grad_output: A .npy file, for an artefact with an upstream.
        beta: For an artefact that takes beta at run time; an array as in [[0.5], [1]].
        divisor: For an artefact that takes one, what its mean is divided by.
        threads: For the call; 0: as many as the backend thinks fit.
        url: Ask a server instead: http://HOST:PORT or grpc://HOST:PORT.
        output: Write the result to a .npy or .npz file.
    """
    given, named = named_files(input)
    if data is not None:
        complete = not any((given, named, target, weight, mask, grad_output))
    else:
        complete = bool(named) or (len(given) == 1 and target is not None)
    if not complete or (named and any((given, target, weight, mask, grad_output))):
        raise InvalidInputError(
            "give the arrays by --input A.npy --target B.npy or --data PAIR.npz; those of a model "
            "with losses attached by --input NAME=A.npy for each of its inputs, or --data"
        )

    from .._files import check_apart
    from .._npy import check_output, read_archive, read_array

    first = given[0] if given else None
    files = {"input": first, "target": target, "weight": weight, "mask": mask}
    files["grad_output"] = grad_output
    numbers = {"beta": beta, "divisor": divisor}
    read = {"MODEL": model if url is None else None, "--data": data}
    read |= {f"--{name}": path for name, path in files.items()}
    read |= {f"--input {name}": path for name, path in named.items()}
    check_apart([("-o", output)], read.items())
    runner: Any
    arrays: dict[str, Any]
    if url is None:
        from ..backends._base import load
        from ..backends._whole import ModelRunner

        runner = load(str(model), backend, threads=threads)
        whole = isinstance(runner, ModelRunner)
        outputs = runner.outputs if whole else runner.signature.outputs
        dtype = "" if whole else runner.signature.input.dtype
    else:
        from ..serving import Client

        runner = Client(url, str(model))
        whole, outputs = not runner.is_loss, runner.metadata()["outputs"]
        dtype = "" if whole else runner.dtype
    if output is not None:
        check_output(output, len(outputs))
    if whole:
        arrays = _arrays_of(runner.inputs, named, data, numbers)
    elif named:
        raise InvalidInputError(
            f"{model} is a loss of its own; give its arrays by --input A.npy --target B.npy"
        )
    elif data is not None:
        arrays = {**read_archive(data, dtype), **numbers}
    else:
        arrays = {n: read_array(path, dtype) for n, path in files.items() if path} | numbers
    _give(runner.run(**arrays), output, as_json)
    if url is not None:
        return None
    if backend == "trt":  # what is verified is the model that the engine was built from
        return [typed("inspect", model)]
    return [typed("verify", model, "--certificate")]


def _arrays_of(
    ports: Mapping[str, Port],
    files: dict[str, Path],
    data: Path | None,
    numbers: Mapping[str, float | None],
) -> dict[str, Array]:
    """An array for each input of a model, of files by their names or of one archive."""
    import numpy as np

    from .._npy import read_array
    from ..backends._whole import check_names

    arrays: dict[str, Array] = {}
    for name, number in numbers.items():
        if number is not None:
            port = ports.get(name)
            axes = int(port is not None and port.axes == (1,))  # of a served graph's number
            dtype = port.dtype if port is not None else "float32"
            arrays[name] = np.array(number, dtype, ndmin=axes)
    if data is not None:
        return {**read_data(data, ports, without=arrays), **arrays}
    check_names(ports, [*files, *arrays])
    return {n: read_array(path, ports[n].dtype) for n, path in files.items()} | arrays


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
    summaries = {name: _summarise(array) for name, array in results.items()}
    given = {"outputs": summaries, "path": output}
    print_result(given, as_json, lambda: _show(summaries, output))


def _show(summaries: dict[str, dict[str, Any]], output: Path | None) -> None:
    values = [summary.get("value") for summary in summaries.values()]
    if len(values) == 1 and values[0] is not None:
        print(values[0])  # alone on its line: loss=$(smoothl1-deploy run ...)
    else:
        for name, summary in summaries.items():
            fields = {"output": name, **summary}
            print_fields({key: value for key, value in fields.items() if value is not None})
    if output is not None:
        print_note(f"wrote {output}")
