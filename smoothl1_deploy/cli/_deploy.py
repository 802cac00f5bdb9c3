"""`smoothl1-deploy deploy`: from a model to a served one with a loss, by the other commands."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import typer

from ..errors import InvalidInputError, OutputError, SmoothL1DeployError, SpecError
from ._console import print_lines, print_note, typed
from ._options import Next, takes_spec, typed_options

EXAMPLE = "smoothl1-deploy deploy detector.onnx --prediction boxes --target boxes_gt -o out/deploy"


@takes_spec("weight", "mask")
def deploy(
    model: Path,
    given: dict[str, Any],
    *,
    prediction: str,
    target: str,
    output: Path = Path("out/deploy"),
    name: str | None = None,
    data: Path | None = None,
    profile: list[str] | None = None,
) -> Next:
    """Attach a loss to a model, prove it, build an engine, and write a Triton repository.

    Each step is one of the other commands, and is shown as it would be typed. Run again, a step
    whose result is there is not repeated. Where TensorRT can't be used, or can't build the model,
    the engine is left out, and the reason is said.

    Options:
        model: An ONNX file of opset 13 or newer.
        prediction: A tensor of it: an output, an input, or one in between.
        target: Another tensor, a new input's name, or a .npy file (a constant).
        output: Folder for scored.onnx, its certificate, its engine, and the repository models.
        name: What the served model is called; by default as the file.
        data: An .npz file with an array for each input, to run the whole model on.
        profile: As of build, for the engine: NAME=MIN,OPT,MAX. Repeat for more inputs.
    """
    from ..parity._certificate import read_certificate
    from ..serving._repository import CONTAINER

    scored, models = output / "scored.onnx", output / "models"
    called = name or model.stem
    compared = ["--prediction", prediction, "--target", target]
    _step(["attach", model, *compared, *typed_options(given), "-o", scored])
    known = read_certificate(scored)
    if known and any(run["same"] for run in known.content.get("runs", ())):
        print_note(f"the certificate of {scored} matches it: it is not proved again")
    else:
        chosen = [] if data is None else ["--data", data]
        _step(["verify", scored, "--against", model, *chosen, "--certificate"])
    ranges = [part for text in profile or () for part in ("--profile", text)]
    try:
        _step(["build", scored, *ranges])
    except (InvalidInputError, OutputError, SpecError):  # what was asked for makes no sense
        raise
    except SmoothL1DeployError as exc:
        print_note(f"no engine: {exc}")
    _step(["repository", models, "--model", scored, "--name", called, "--certify", "--overwrite"])
    mounted = shlex.quote(f"{models.resolve()}:/models")
    return [
        typed("serve", models),
        f"docker run --rm -p 8000-8002:8000-8002 -v {mounted} "
        f"nvcr.io/nvidia/tritonserver:{CONTAINER} tritonserver --model-repository=/models",
        typed("repository", "--lint", models),
    ]


def _step(words: list[Any]) -> None:
    """Show a command and call it; one that ends with another code than 0 ends this one."""
    from ._registry import root_command

    print_lines(["", f"$ {typed(*words)}"])
    code = root_command().main(
        [*map(str, words)], prog_name="smoothl1-deploy", standalone_mode=False
    )
    if code:
        raise typer.Exit(code)
