"""Which commands there are. A command's module is imported only when the command is called.

To add one: write `cli/_<name>.py` with the function, an `EXAMPLE` line that a user can paste, and
enter it in `COMMANDS`. The function imports what it works with in its body, raises this package's
errors for bad input, and `typer.Exit(1)` for a check that failed.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .._environment import docstring

# What typer hands to a group is of its own copy of click, or of click itself, by typer's version:
# `Any` below.

BROKEN_PIPE = 141  # exit code: 128 + SIGPIPE, as a shell reports it


@dataclass(frozen=True, slots=True)
class Entry:
    """One command: its line in `--help`, the module beside this one, and the name in it.

    The name is that of a function, or of a `typer.Typer` that holds sub-commands.
    """

    help: str
    module: str
    attribute: str


#: In the order of `--help`, which is the order of work.
COMMANDS: dict[str, Entry] = {
    "export": Entry("Write a Smooth L1 loss as an ONNX file.", "export", "export"),
    "attach": Entry("Graft the loss onto a model that has the prediction.", "attach", "attach"),
    "build": Entry("Build a TensorRT engine from an ONNX file.", "build", "build"),
    "run": Entry("Compute the loss of two arrays with an artefact.", "run", "run"),
    "score": Entry("Compute the loss of data larger than memory.", "score", "score"),
    "verify": Entry("Hold one artefact against PyTorch and the exact loss.", "verify", "verify"),
    "parity": Entry("Check a whole matrix of specs, routes and backends.", "parity", "parity"),
    "bench": Entry("Time the loss beside what people would run instead.", "bench", "bench"),
    "serve": Entry("Serve a model repository with a real Triton.", "serve", "serve"),
    "inspect": Entry("Show what is inside an ONNX file or an engine.", "inspect", "inspect"),
    "repository": Entry(
        "Write models for a Triton server, or check its repository.", "repository", "repository"
    ),
    "cache": Entry("Look into the engine cache, and make room in it.", "cache", "cache"),
    "doctor": Entry(
        "Show what is installed, what can run here, and what to install.", "doctor", "doctor"
    ),
}


def _load(name: str) -> Any:
    entry = COMMANDS[name]
    module = importlib.import_module(f"._{entry.module}", __package__)
    target: Any = getattr(module, entry.attribute)
    epilog = f"Example:  {module.EXAMPLE}"
    if isinstance(target, typer.Typer):
        for command in target.registered_commands:
            assert command.callback is not None
            command.help = docstring(command.callback)
        app = typer.Typer(rich_markup_mode="rich")
        app.add_typer(target, name=name, help=entry.help, epilog=epilog, no_args_is_help=True)
        group = typer.main.get_command(app)
        assert isinstance(group, TyperGroup)
        return group.commands[name]
    app = typer.Typer(rich_markup_mode="rich", add_completion=False)
    app.command(name, help=docstring(target), epilog=epilog)(target)
    return typer.main.get_command(app)


class LazyGroup(TyperGroup):
    """Lists every command by its entry alone, and loads the one that is called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, entry in COMMANDS.items():
            self.add_command(TyperCommand(name, help=entry.help))

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
        pretty_exceptions_enable=False,
        epilog="Exit codes: 0 done, 1 a check failed, 2 bad usage or bad input, "
        "3 something needed is not installed, 70 a bug.",
    )
    app.callback(help=docstring(_root))(_root)
    return typer.main.get_command(app)
