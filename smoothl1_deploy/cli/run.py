"""`smoothl1-deploy run`: the loss of two arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidInputError
from .console import json_number, print_fields, print_json, print_note

if TYPE_CHECKING:
    from ..floats import Array

__all__ = ["EXAMPLE", "run"]

EXAMPLE = "smoothl1-deploy run loss.onnx --input input.npy --target target.npy"


@dataclass(frozen=True, slots=True)
class Summary:
    """An output in a few numbers; min, max and mean leave NaN out and are None without a rest.

    `value` is the number itself where the output has rank 0, as its dtype prints it in full.
    """

    dtype: str
    shape: tuple[int, ...]
    nan: int
    value: str | None = None
    minimum: str | None = None
    maximum: str | None = None
    mean: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; NaN and infinities are strings."""

        def number(value: str | float | None) -> float | str | None:
            return None if value is None else json_number(value)

        fields: dict[str, Any] = {"dtype": self.dtype, "shape": list(self.shape)}
        if self.value is not None:
            return {**fields, "value": number(self.value)}
        return {
            **fields,
            "min": number(self.minimum),
            "max": number(self.maximum),
            "mean": number(self.mean),
            "nan": self.nan,
        }


def _summarise(array: Array) -> Summary:
    import numpy as np

    dtype = array.dtype.name
    missing = np.isnan(array)
    nan = int(np.count_nonzero(missing))
    if array.ndim == 0:
        return Summary(dtype, (), nan, value=str(array[()]))
    numbers = array[~missing] if nan else array
    if numbers.size == 0:
        return Summary(dtype, array.shape, nan)
    return Summary(
        dtype,
        array.shape,
        nan,
        minimum=str(numbers.min()),
        maximum=str(numbers.max()),
        mean=float(numbers.mean(dtype=np.float64)),
    )


def _backend_names() -> list[str]:
    from ..backends.base import BACKENDS

    return list(BACKENDS)


def run(
    model: Annotated[
        Path,
        typer.Argument(
            help="A .onnx file, or an .engine with --backend trt; with --url a model's name."
        ),
    ],
    input: Annotated[
        Path | None, typer.Option("--input", help="A .npy file; big ones are mapped, not read.")
    ] = None,
    target: Annotated[Path | None, typer.Option("--target", help="A .npy file.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="An .npz file with arrays called input, target (and weight, grad_output).",
        ),
    ] = None,
    weight: Annotated[
        Path | None,
        typer.Option("--weight", help="A .npy file, for an artefact that takes a weight."),
    ] = None,
    grad_output: Annotated[
        Path | None,
        typer.Option("--grad-output", help="A .npy file, for an artefact with an upstream."),
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="For an artefact that takes beta at run time.")
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="What runs it; smoothl1-deploy doctor lists them.", autocompletion=_backend_names
        ),
    ] = "ort-cpu",
    threads: Annotated[
        int, typer.Option(min=0, help="For the call; 0: as many as the backend thinks fit.")
    ] = 0,
    url: Annotated[
        str | None,
        typer.Option(help="Ask a server instead: http://HOST:PORT or grpc://HOST:PORT."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Write the result to a .npy or .npz file."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compute the loss of two arrays with an artefact, or with a model of a server (--url).

    A loss of rank 0 is printed as a bare number in full precision, anything else as a summary.
    bfloat16, which numpy writes as raw items of two bytes, is recognised by the artefact's dtype.
    """
    if data is not None:
        complete = not any((input, target, weight, grad_output))
    else:
        complete = input is not None and target is not None
    if not complete:
        raise InvalidInputError(
            "give the arrays by --input A.npy --target B.npy or --data PAIR.npz"
        )

    from ..files import check_apart
    from ..npy import check_output, read_archive, read_array, write_arrays

    files = {"input": input, "target": target, "weight": weight, "grad_output": grad_output}
    named = {"MODEL": Path(model) if url is None else None, "--data": data}
    check_apart([("-o", output)], [*named.items(), *((f"--{n}", p) for n, p in files.items())])
    runner = _runner(model, backend, threads) if url is None else _client(model, url)
    if output is not None:
        check_output(output, runner.outputs)
    if data is not None:
        arrays = read_archive(data, runner.dtype)
    else:
        arrays = {
            name: read_array(path, runner.dtype) for name, path in files.items() if path is not None
        }
    results = runner.run(**arrays, beta=beta)
    if output is not None:
        write_arrays(output, results)
        if runner.dtype == "bfloat16":
            print_note(
                f"numpy writes bfloat16 without its name; read {output} with "
                "numpy.load(path).view(ml_dtypes.bfloat16)"
            )
    _show({name: _summarise(array) for name, array in results.items()}, output, as_json)


@dataclass(frozen=True, slots=True)
class _Runner:
    """What computes: the dtype it takes, how many outputs it has, and how to call it."""

    dtype: str
    outputs: int
    run: Callable[..., dict[str, Array]]


def _runner(model: Path, backend: str, threads: int) -> _Runner:
    from ..backends.base import load

    loaded = load(str(model), backend, threads=threads)
    signature = loaded.signature
    return _Runner(signature.input.dtype, len(signature.outputs), loaded.run)


def _client(model: Path, url: str) -> _Runner:
    from ..serving import Client

    client = Client(url, str(model))
    return _Runner(client.dtype, len(client.metadata()["outputs"]), client.run)


def _show(summaries: dict[str, Summary], output: Path | None, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "outputs": {name: summary.to_dict() for name, summary in summaries.items()},
                "path": None if output is None else str(output),
            }
        )
        return
    values = [summary.value for summary in summaries.values()]
    if len(values) == 1 and values[0] is not None:
        print(values[0])  # alone on its line: loss=$(smoothl1-deploy run ...)
    else:
        for name, summary in summaries.items():
            fields = {"output": name, **summary.to_dict()}
            print_fields({key: value for key, value in fields.items() if value is not None})
    if output is not None:
        print_note(f"wrote {output}")
