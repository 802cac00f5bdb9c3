"""How a function becomes a command, and the options of a loss, made of `LossSpec`'s fields."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.models import OptionInfo

from .._environment import docstring
from .._spec import DTYPES, ELEMENTS, EMPTIES, LOSSES, NORMALIZERS, REDUCTIONS, ROUTES
from ..backends._names import BACKENDS
from ..errors import SmoothL1DeployError, SpecError
from ._console import command_running, print_next

_EXTENSIONS = "Beyond PyTorch's arguments"

#: What a command gives: what may be typed next, the likeliest first.
Next = list[str] | None
Command = Callable[..., Next]

#: Field of a `LossSpec` -> the type of its option, what `--help` says, and the choices.
SPEC_OPTIONS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "beta": (
        float,
        "Where the quadratic part ends, >= 0; 0 is the L1 loss, [[0.5], [1]] an array. 1 by "
        "default.",
        (),
    ),
    "reduction": (str, "Over the losses of the elements; mean by default.", REDUCTIONS),
    "dtype": (str, "The dtype of input, target and loss.", DTYPES),
    "per_sample": (bool, "Reduce every axis but the first: one score per row.", ()),
    "axes": (str, "The axes to reduce, negative ones from the end, as in 1,2; all by default.", ()),
    "gradient": (bool, "A second output grad_input, the gradient with respect to input.", ()),
    "upstream": (bool, "Multiply the gradient by an input grad_output, of the loss's shape.", ()),
    "runtime_beta": (bool, "beta is an input of the graph: one file for every beta.", ()),
    "weight": (
        str,
        "An input weight multiplies the losses of the elements; a mean divides by the count of "
        "elements or by the sum of the weights.",
        NORMALIZERS,
    ),
    "elements": (str, "A further output: each element's loss, or input less target.", ELEMENTS),
    "mask": (bool, "An input mask of booleans selects the elements that count.", ()),
    "divisor": (bool, "A mean is divided by an input divisor, and not by a count.", ()),
    "empty": (str, "What a mean over nothing is; nan by default, as in PyTorch.", EMPTIES),
    "loss": (str, "smooth_l1 by default; l1 is that with beta 0.", LOSSES),
    "delta": (float, "Where the quadratic part of huber ends, > 0. 1 by default.", ()),
    "loss_weight": (float, "A number that the loss, once reduced, is multiplied by.", ()),
}

#: dtype as other tools spell it -> as PyTorch and numpy do.
_DTYPES = {
    "half": "float16", "fp16": "float16", "f16": "float16", "bf16": "bfloat16",
    "float": "float32", "fp32": "float32", "f32": "float32",
    "double": "float64", "fp64": "float64", "f64": "float64",
}  # fmt: skip


def one_of(*names: str, **settings: Any) -> Any:
    """An option with choices: `--help` lists them, and a shell completes them.

    The function itself refuses other values, in the words that a caller from Python reads too.
    """
    return typer.Option(autocompletion=lambda: names, **settings)


def number_or_array(text: str) -> Any:
    """A number, or an array of them as JSON has it: `[[0.5], [1.0]]`."""
    try:
        return json.loads(text) if text.lstrip().startswith("[") else float(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no number and no array of them such as [0.5, 1.0]"
        ) from None


_BETA: dict[str, Any] = {"parser": number_or_array, "metavar": "NUMBER|ARRAY"}
Beta = Annotated[float | None, typer.Option(**_BETA)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Count = Annotated[int, typer.Option(min=0)]
Workers = Annotated[int, typer.Option(min=0, max=4096)]
Route = Annotated[str, one_of(*ROUTES)]
PlainRoute = Annotated[str, one_of(*ROUTES[:2])]  # what needs no torch
Normalizer = Annotated[str | None, one_of(*NORMALIZERS)]
#: The backends are many, and others' are module:Class: `--help` leaves the list to `doctor`.
_Backend = one_of(
    *BACKENDS, show_choices=False, help="What runs it; smoothl1-deploy doctor lists them."
)
BackendName = Annotated[str, _Backend]
BackendNames = Annotated[list[str] | None, _Backend]
Dtypes = Annotated[list[str] | None, one_of(*DTYPES)]
Reductions = Annotated[list[str] | None, one_of(*REDUCTIONS)]
_Quiet = typer.Option("-q", "--quiet", help="No notes, no progress, and not what comes next.")


def help_of(command: Command) -> tuple[str, dict[str, tuple[str, str | None]]]:
    """What a command's docstring says: of itself, and of each option, with the panel it is in.

    The options stand at the end, under the title `Options:` or that of a panel of theirs:

        Options:
            model: An ONNX file.

        Cache:
            cache_dir: Folder of an engine cache. Default: one in your cache folder.
    """
    text, _, listed = docstring(command).partition("\n\nOptions:\n")
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", text)  # a paragraph is as wide as the terminal
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


def as_command(function: Command) -> Callable[..., None]:
    """`function` as typer takes it, its arguments and options told by its signature and docstring.

    What can be given by position is an argument, what stands behind the `*` an option. `output` is
    -o too, and a flag that is off by default has no opposite. An annotation with a `typer.Option`
    adds what is special, such as a least number. A dtype and a reduction may be spelled as other
    tools spell them. Every command takes -q, and ends with what comes next, as it returns it.
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
            flag = _flag(parameter.name)
            if parameter.name == "output":
                info.param_decls = ("-o", flag)
            elif parameter.default is False:
                info.param_decls = (flag,)
        if parameter.name in texts:
            info.help, info.rich_help_panel = texts[parameter.name]
        if info.autocompletion and info.show_choices:
            info.help = f"{info.help or ''} One of {', '.join(info.autocompletion())}."
        return parameter.replace(annotation=Annotated[kind, info])

    @functools.wraps(function)
    def command(quiet: bool, **arguments: Any) -> None:
        for name in ("dtype", "reduction"):
            if isinstance(given := arguments.get(name), str):
                arguments[name] = spelled(given)
            elif given:
                arguments[name] = [spelled(each) for each in given]
        with command_running(quiet), _options_named(*own.parameters):
            following = function(**arguments)
            if following and not arguments.get("as_json"):
                print_next(*following)

    own = inspect.signature(function, eval_str=True)
    last = inspect.Parameter(
        "quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, _Quiet]
    )
    command.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[*map(told, own.parameters.values()), last]
    )
    return command


@contextlib.contextmanager
def _options_named(*names: str) -> Iterator[None]:
    """An error that names an argument of Python's, as target_shape, names its option instead.

    Of one word (beta, shape) the two are told by the same word, and are left as they are; so is
    grad_output, which is an array first.
    """
    words = [name for name in names if "_" in name and name != "grad_output"]
    # Not within a path, a quoted name or an option.
    pattern = rf"(?<![-\w./'])({'|'.join(words) or '(?!)'})(?![-\w/']|\.\w)"
    try:
        yield
    except SmoothL1DeployError as exc:
        exc.told = re.sub(pattern, lambda found: _flag(found[1]), str(exc))
        raise


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def takes_spec(
    *without: str, panel: str | None = None, **fewer: tuple[str, ...]
) -> Callable[[Command], Command]:
    """Give a command the options of a loss in the place of its parameter `given`.

    The command gets those that the user gave, by the names of `LossSpec`'s fields.

    Args:
        without: fields that it has no option for, or one of its own.
        panel: of `--help`; None puts the extensions of PyTorch's arguments into one of their own.
        fewer: field -> the choices that the command takes, where those are not all.
    """
    names = [name for name in SPEC_OPTIONS if name not in without]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def wrapper(**arguments: Any) -> Next:
            said = {name: arguments.pop(name) for name in names}
            # A beta of 0 is given, and equals False.
            given = {k: v for k, v in said.items() if v is not None and v is not False}
            return command(given=given, **arguments)

        own = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in own.parameters.values():
            parameters += map(option, names) if parameter.name == "given" else [parameter]
        wrapper.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=sorted(parameters, key=lambda p: p.default is not p.empty)
        )
        return wrapper

    def option(name: str) -> inspect.Parameter:
        kind, text, names = SPEC_OPTIONS[name]
        is_plain = name in ("beta", "reduction", "dtype")
        said = typer.Option(
            _flag(name),  # alone: typer would add its negation
            help=text,
            rich_help_panel=panel or (None if is_plain else _EXTENSIONS),
            **(_BETA if name in ("beta", "delta") else {}),
        )
        if chosen := fewer.get(name, names):
            said.autocompletion = lambda: chosen
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
    return [_flag(name) for name in given]


def typed_options(given: dict[str, Any]) -> list[str]:
    """The options of a loss as they are typed.

    >>> typed_options({"beta": 0.5, "per_sample": True})
    ['--beta', '0.5', '--per-sample']
    """
    words = ([_flag(k)] if value is True else [_flag(k), str(value)] for k, value in given.items())
    return [word for option in words for word in option]


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


def end_unless(good: object) -> None:
    """End the command with 1, a check that failed, where something is not as it should be."""
    if not good:
        raise typer.Exit(1)


def processes(workers: int) -> int:
    """How many `--workers` asks for: where it is 0 one a core, 8 at most."""
    return workers or min(os.cpu_count() or 1, 8)
