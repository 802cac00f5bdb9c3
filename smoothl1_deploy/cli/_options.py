"""How a function becomes a command, and the options of a loss, made of `LossSpec`'s fields."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import re
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.models import OptionInfo

from .._environment import docstring
from .._spec import DTYPES, NORMALIZERS, REDUCTIONS
from ..errors import SpecError

_EXTENSIONS = "Beyond PyTorch's arguments"

#: Field of a `LossSpec` -> the type of its option, and what `--help` says.
SPEC_OPTIONS: dict[str, tuple[Any, str]] = {
    "beta": (float, "Where the quadratic part ends, >= 0; 0 is the L1 loss. 1 by default."),
    "reduction": (str, f"One of {', '.join(REDUCTIONS)}; mean by default."),
    "dtype": (str, f"The dtype of input, target and loss: {', '.join(DTYPES)}."),
    "per_sample": (bool, "Reduce every axis but the first: one score per row."),
    "gradient": (bool, "A second output grad_input, the gradient with respect to input."),
    "upstream": (bool, "Multiply the gradient by an input grad_output, of the loss's shape."),
    "runtime_beta": (bool, "beta is an input of the graph: one file for every beta."),
    "weight": (
        str,
        "An input weight multiplies the losses of the elements; a mean divides by: "
        f"{' or '.join(NORMALIZERS)} (the number of elements or the sum of weights).",
    ),
}

#: dtype as other tools spell it -> as PyTorch and numpy do.
_DTYPES = {
    "half": "float16", "fp16": "float16", "f16": "float16", "bf16": "bfloat16",
    "float": "float32", "fp32": "float32", "f32": "float32",
    "double": "float64", "fp64": "float64", "f64": "float64",
}  # fmt: skip

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Count = Annotated[int, typer.Option(min=0)]
Workers = Annotated[int, typer.Option(min=0, max=4096)]
#: A backend, of which 17 are known: `--help` leaves the list to `doctor`.
BackendName = Annotated[str, typer.Option(help="What runs it; smoothl1-deploy doctor lists them.")]


def help_of(command: Callable[..., None]) -> tuple[str, dict[str, tuple[str, str | None]]]:
    """What a command's docstring says: of itself, and of each option, with the panel it is in.

    The options stand at the end, under the title `Options:` or that of a panel of theirs:

        Options:
            model: An ONNX file.

        Cache:
            cache_dir: Folder of an engine cache. Default: one in your cache folder.
    """
    text, _, listed = docstring(command).partition("\n\nOptions:\n")
    options: dict[str, tuple[str, str | None]] = {}
    name, panel = "", None
    for line in filter(None, listed.splitlines()):
        if not line.startswith(" "):
            panel = line.removesuffix(":")
        elif entry := re.fullmatch(r" {4}(\w+): (.*)", line):
            name = entry[1]
            options[name] = (entry[2], panel)
        else:
            options[name] = (f"{options[name][0]} {line.strip()}", panel)
    return text, options


def as_command(function: Callable[..., None]) -> Callable[..., None]:
    """`function` as typer takes it, its arguments and options told by its signature and docstring.

    What can be given by position is an argument, what stands behind the `*` an option. `output` is
    -o too, and a flag that is off by default has no opposite. An annotation with a `typer.Option`
    adds what is special, such as a least number. A dtype and a reduction may be spelled as other
    tools spell them.
    """
    _, texts = help_of(function)

    def told(parameter: inspect.Parameter) -> inspect.Parameter:
        kind, special = parameter.annotation, None
        if get_origin(kind) is Annotated:
            kind, special = get_args(kind)
        if special is None:
            named = parameter.kind is parameter.KEYWORD_ONLY
            special = typer.Option() if named else typer.Argument()
        info = copy.copy(special)
        if isinstance(info, OptionInfo) and not info.param_decls and info.default is ...:
            flag = f"--{parameter.name.replace('_', '-')}"
            if parameter.name == "output":
                info.param_decls = ("-o", flag)
            elif parameter.default is False:
                info.param_decls = (flag,)
        if parameter.name in texts:
            info.help, info.rich_help_panel = texts[parameter.name]
        return parameter.replace(annotation=Annotated[kind, info])

    @functools.wraps(function)
    def command(**arguments: Any) -> None:
        for name in ("dtype", "reduction"):
            if isinstance(given := arguments.get(name), str):
                arguments[name] = spelled(given)
            elif given:
                arguments[name] = [spelled(each) for each in given]
        function(**arguments)

    own = inspect.signature(function, eval_str=True)
    command.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[told(parameter) for parameter in own.parameters.values()]
    )
    return command


def takes_spec(
    *without: str, panel: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a loss in the place of its parameter `given`.

    The command gets those that the user gave, by the names of `LossSpec`'s fields.

    Args:
        without: fields that it has no option for, or one of its own.
        panel: of `--help`; None puts the extensions of PyTorch's arguments into one of their own.
    """
    names = [name for name in SPEC_OPTIONS if name not in without]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapper(**arguments: Any) -> None:
            said = {name: arguments.pop(name) for name in names}
            # A beta of 0 is given, and equals False.
            given = {k: v for k, v in said.items() if v is not None and v is not False}
            command(given=given, **arguments)

        own = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in own.parameters.values():
            parameters += map(option, names) if parameter.name == "given" else [parameter]
        wrapper.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=sorted(parameters, key=lambda p: p.default is not p.empty)
        )
        return wrapper

    def option(name: str) -> inspect.Parameter:
        kind, text = SPEC_OPTIONS[name]
        is_plain = name in ("beta", "reduction", "dtype")
        flag = f"--{name.replace('_', '-')}"  # alone: typer would add its negation
        said = typer.Option(
            flag, help=text, rich_help_panel=panel or (None if is_plain else _EXTENSIONS)
        )
        return inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if kind is bool else None,
            annotation=Annotated[kind if kind is bool else kind | None, said],
        )

    return decorate


def spelled(value: str) -> str:
    """A dtype or a reduction as `LossSpec` spells it, whatever its case and the tool it is from.

    >>> spelled("FP16"), spelled("Mean"), spelled("int8")
    ('float16', 'mean', 'int8')
    """
    return _DTYPES.get(value.lower(), value.lower())


def options_of(given: dict[str, Any]) -> list[str]:
    """What the user wrote for what is `given`: `["--per-sample"]`."""
    return [f"--{name.replace('_', '-')}" for name in given]


def parse_shape(text: str | None, what: str = "--shape") -> tuple[int | str, ...] | None:
    """`"N,16"` to `("N", 16)`; `"scalar"` or `""` to `()`; None stays None (any rank).

    Raises:
        SpecError: for `"Nx16"`, which would otherwise be one axis of that name.

    >>> parse_shape("N, 16")
    ('N', 16)
    """
    if text is None:
        return None
    if text.strip() in ("", "scalar"):
        return ()
    axes = [axis.strip() for axis in text.split(",")]
    for axis in axes:
        if re.fullmatch(r"\w+(x\d+)+", axis):
            commas = axis.replace("x", ",")
            raise SpecError(f"{what} {text!r}: separate the axes by commas, as in {commas}")
    return tuple(int(axis) if re.fullmatch(r"-?\d+", axis) else axis for axis in axes)


def processes(workers: int) -> int:
    """How many `--workers` asks for: where it is 0 one a core, 8 at most."""
    return workers or min(os.cpu_count() or 1, 8)
