"""Which commands there are. A command's module is imported only when the command is called.

To add one: write `cli/_<name>.py` with a function of that name, as `_options.as_command` takes it,
and an `EXAMPLE` line that a user can paste, and enter it in `COMMANDS`. The function imports what
it works with in its body, raises this package's errors for bad input, and has `end_unless` end a
check that failed. It returns what may be typed next, which tests/cli/test_typed.py wants to know.
"""

from __future__ import annotations

import importlib
import re
import shutil
import textwrap
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .._environment import docstring
from ._console import BROKEN_PIPE
from ._options import as_command, help_of

# What typer hands to a group is of its own copy of click, or of click itself, by typer's version:
# `Any` below.

#: The line of each command in `--help`, in the order of work.
COMMANDS = {
    "export": "Write a Smooth L1 loss as an ONNX file.",
    "attach": "Graft the loss onto a model that has the prediction.",
    "deploy": "Attach, verify, build and serve in one go.",
    "build": "Build a TensorRT engine from an ONNX file.",
    "run": "Compute the loss of two arrays with an artefact.",
    "score": "Compute the loss of data larger than memory.",
    "verify": "Hold one artefact against PyTorch and the exact loss.",
    "compare": "Compare the answers of two artefacts on your own data.",
    "parity": "Check a whole matrix of specs, routes and backends.",
    "prove": "Try all 2^32 pairs of a half format.",
    "bench": "Time the loss beside what people would run instead.",
    "serve": "Serve a model repository with a real Triton.",
    "inspect": "Show what is inside an ONNX file or an engine.",
    "repository": "Write models for a Triton server, or check its repository.",
    "cache": "Look into the engine cache, and make room in it.",
    "doctor": "Show what is installed, what can run here, and what to install.",
}


_HELP = {"help_option_names": ["--help", "-h"]}


class _Help:
    """What typer's `--help` shows, but for the type of a flag, which takes no value; an example."""

    example = ""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The example stands below all that rich prints, whose lines end in blanks.

        One behind the sign that joins two lines would part them where they are pasted.
        """
        super().format_help(ctx, formatter)  # type: ignore[misc]
        formatter.write(self.example)

    def get_params(self, ctx: Any) -> Any:
        """The parameters, that of `--help` among them."""
        found = super().get_params(ctx)  # type: ignore[misc]
        for flag in (each for each in found if getattr(each, "is_flag", False)):
            flag.metavar = ""
        return found


class _Command(_Help, TyperCommand): ...


class _Group(_Help, TyperGroup): ...


def _load(name: str) -> Any:
    """The command of that name: a function, or sub-commands by their names."""
    module = importlib.import_module(f"._{name}", __package__)
    found: Any = getattr(module, name)
    app = typer.Typer(
        cls=_Group, rich_markup_mode="rich", add_completion=False, help=COMMANDS[name],
        no_args_is_help=isinstance(found, dict), context_settings=_HELP,
    )  # fmt: skip
    for own, function in found.items() if isinstance(found, dict) else [(name, found)]:
        text, _ = help_of(function)
        app.command(own, cls=_Command, help=text)(as_command(function))
    command: Any = typer.main.get_command(app)
    for each in (command, *getattr(command, "commands", {}).values()):
        each.example = f"\nExample:\n{_in_lines(module.EXAMPLE)}\n"
    return command


def _in_lines(command: str) -> str:
    """A command in lines that fit the terminal and can be pasted; an option keeps its value."""
    words = re.sub(r" (?!-)", "\0", command)
    width = shutil.get_terminal_size().columns - len("  \\")
    lines = textwrap.wrap(words, width, break_long_words=False, break_on_hyphens=False)
    return " \\\n".join(lines).replace("\0", " ")


class LazyGroup(_Group):
    """Lists every command by its entry alone, and loads the one that is called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, text in COMMANDS.items():
            self.add_command(TyperCommand(name, help=text))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Put the real command in the place of its listing."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, _load(name) if name in COMMANDS else command, rest

    def invoke(self, ctx: Any) -> Any:
        """Let a broken pipe through to `main`; typer would end with 1, a failed check here."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise typer.Exit(BROKEN_PIPE) from None


def _show_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Smooth L1 loss from PyTorch to ONNX to TensorRT, proven equal."""


def root_command() -> Any:
    """The whole command line."""
    app = typer.Typer(
        cls=LazyGroup,
        rich_markup_mode="rich",
        no_args_is_help=True,
        context_settings=_HELP,
        pretty_exceptions_enable=False,
        epilog="Exit codes: 0 done, 1 a check failed, 2 bad usage or bad input, "
        "3 something needed is not installed, 70 a bug.",
    )
    app.callback(help=docstring(_root))(_root)
    return typer.main.get_command(app)
