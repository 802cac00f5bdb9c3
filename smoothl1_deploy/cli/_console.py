"""What the commands print: results for people or as JSON on stdout, everything else on stderr."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from .._files import descriptors_written
from .._records import plain
from .._table import Table
from ..errors import ModelWarning, OutputError, reason_of

if TYPE_CHECKING:
    from rich.console import Console

# Exit codes: 128 + SIGINT and 128 + SIGPIPE, as a shell reports them.
INTERRUPTED = 130
BROKEN_PIPE = 141

_INTERRUPTION = "interrupted; once more ends it at once"
_on_interrupt: list[Callable[[], str]] = []


def on_interrupt(tell: Callable[[], str]) -> None:
    """Say what `tell` gives, where Ctrl-C comes from now on until the command ends."""
    _on_interrupt.append(tell)


@contextmanager
def interrupts_told() -> Iterator[None]:
    """Ctrl-C is told when it comes, once: to end what is under way may take seconds.

    Each is a KeyboardInterrupt within; afterwards, where one came, none is until the caller says.
    """
    told = telling = False
    show_unraisable = sys.unraisablehook

    def send_again() -> None:
        with suppress(RuntimeError):  # the interpreter ends, and starts no thread any more
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()

    def tell(number: int, frame: object) -> None:
        nonlocal told, telling
        if telling:  # raised here, it and the first would be one
            send_again()
            return
        if not told:
            told = telling = True
            text = _on_interrupt[-1]() if _on_interrupt else _INTERRUPTION
            line = "\n" if os.isatty(2) else ""  # where a bar stands, or what the terminal echoes
            with suppress(OSError):  # not sys.stderr, which may be in the middle of a write
                os.write(2, f"{line}note: {text}\n".encode())
            telling = False
        raise KeyboardInterrupt

    def unraisable(lost: Any) -> None:
        """Python drops what is raised while it runs a destructor or a weak reference's callback."""
        if lost.exc_type is KeyboardInterrupt:
            send_again()
        else:
            show_unraisable(lost)

    _on_interrupt.clear()
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # no interrupt comes here, or whoever calls has a way of its own
        return
    signal.signal(signal.SIGINT, tell)
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        sys.unraisablehook = show_unraisable
        signal.signal(signal.SIGINT, signal.SIG_IGN if told else signal.default_int_handler)


class _Stream:
    """stdout or stderr, which may be full, closed, or taken."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._failure_told():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._failure_told():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _failure_told(self) -> Iterator[None]:
        """A failure of stderr is told to nobody: there is nowhere to, and the exit code stays."""
        try:
            yield
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """Lead the stream to nowhere: its buffer would fail once more at the interpreter's end."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class _Results(_Stream):
    """stdout; where it is an output of the command itself, what else is said goes to stderr."""

    #: The first failure. It is raised again at the end, since libraries swallow what a stream says.
    _failure: Exception | None = None

    def write(self, text: str) -> int:
        return sys.stderr.write(text) if 1 in descriptors_written else super().write(text)

    @contextmanager
    def _failure_told(self) -> Iterator[None]:
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except OSError as exc:
            self._drop()
            self._failure = exc
            if isinstance(exc, BrokenPipeError):  # whoever read it has stopped, which is no fault
                raise
            self._failure = OutputError(
                f"can't write the result to stdout: {reason_of(exc)}; send it elsewhere. Files "
                "that were asked for are written"
            )
            raise self._failure from exc


@contextmanager
def safe_streams() -> Iterator[None]:
    """Streams that fail in a sentence; one that is closed fails when something is written to it."""
    for name, access in (("stdin", os.O_RDONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, access)  # it takes the stream's number: no file gets that
            os.set_inheritable(handle, True)
            setattr(sys, name, open(handle, "r" if name == "stdin" else "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    descriptors_written.clear()
    results: Any = _Results(sys.stdout)
    remarks: Any = _Stream(sys.stderr)
    with redirect_stdout(results), redirect_stderr(remarks):
        yield


#: The characters that a terminal obeys, as signs: names and metadata are anyone's. Lines and tabs
#: stay.
_SIGNS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
_SIGNS |= {127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)


def open_console(stderr: bool = False) -> Console:
    """A console on the stream of this moment.

    Markup is off: install commands such as pip install 'smoothl1-deploy[cpu]' are no markup.
    """
    from rich.console import Console
    from rich.segment import Segment

    class QuietConsole(Console):
        def render(self, *arguments: Any, **options: Any) -> Iterator[Segment]:
            for text, style, control in super().render(*arguments, **options):
                yield Segment(text if control else text.translate(_SIGNS), style, control)

        def on_broken_pipe(self) -> NoReturn:
            raise BrokenPipeError  # rich would exit with 1, which means a failed check here

    stream = sys.stderr if stderr else sys.stdout
    # A file or pipe has no width; rich would take it for 80 columns and cut names short.
    width = None if stream.isatty() or "COLUMNS" in os.environ else 160
    return QuietConsole(
        stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True, width=width
    )


#: Of each command that runs, the outermost first (`deploy` calls others): whether -q was given.
_running: list[bool] = []


@contextmanager
def command_running(quiet: bool) -> Iterator[None]:
    """A command runs within; where it is `quiet` there are neither notes nor progress."""
    _running.append(quiet)
    try:
        yield
    finally:
        _running.pop()


def progress_console() -> Console | None:
    """Where progress is shown: on stderr if that is a terminal, unless -q was given."""
    console = open_console(stderr=True)
    return console if console.is_terminal and not any(_running) else None


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A live progress bar on stderr; nothing where stderr is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console = progress_console()
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, Remaining(), console=console, disable=console is None) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_error(message: str) -> None:
    """One message on stderr, never wrapped, so that it can be searched and pasted."""
    try:
        from rich.text import Text

        text = Text.assemble(("error: ", "bold red"), (message, "red"))
        open_console(stderr=True).print(text)
    except (ImportError, OSError, MemoryError):  # rich itself may be what can't be imported
        print(f"error: {message}", file=sys.stderr)


def print_note(message: str) -> None:
    """A remark on stderr, unless -q was given."""
    from rich.text import Text

    if not any(_running):
        open_console(stderr=True).print(Text.assemble(("note: ", "bold yellow"), message))


def typed(*words: object) -> str:
    """A command of this program as it is typed.

    >>> typed("verify", "my loss.onnx")
    "smoothl1-deploy verify 'my loss.onnx'"
    """
    return shlex.join(["smoothl1-deploy", *map(str, words)])


def print_next(*commands: str) -> None:
    """What can be typed next, for who reads the result of a command on a terminal.

    Not after a command that another one calls, and not with -q.
    """
    from rich.text import Text

    if len(_running) > 1 or any(_running) or not sys.stdout.isatty():
        return
    for word, command in zip_longest(("next",), commands, fillvalue="  or"):
        open_console().print(Text.assemble((f"{word}: ", "bold green"), command))


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Each `ModelWarning` is a remark on stderr, and made once; others are Python's to show."""
    told = set[str]()
    with warnings.catch_warnings():
        warnings.simplefilter("always", ModelWarning)
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **how: Any) -> None:
            if category is not ModelWarning:
                shown(message, category, *place, **how)
            elif str(message) not in told:
                told.add(str(message))
                print_note(str(message))

        warnings.showwarning = show
        yield


def print_lines(lines: Iterable[str]) -> None:
    """Lines on stdout, never wrapped."""
    console = open_console()
    for line in lines:
        console.print(line)


def print_prose(text: str) -> None:
    """Sentences without a command in them, which a terminal shows between words."""
    console = open_console()
    console.print(text, soft_wrap=not console.is_terminal)


def print_fields(fields: Mapping[str, object]) -> None:
    """One `name  value` line each; on a terminal a long value goes on below, between its words."""
    from rich.text import Text

    console = open_console()
    width = max(map(len, fields))
    room = max(1, console.width - width - 2) if console.is_terminal else sys.maxsize
    for name, value in fields.items():
        text = str(value).replace("\n", "\u240a")  # a second line would pass for another field
        if len(text) > room:  # a path or a hash stays whole, to be copied
            lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
            text = f"\n{'':{width}}  ".join(lines)
        console.print(Text.assemble((f"{name:<{width}}  ", "bold"), text))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table without a title."""
    open_console().print(Table("", tuple(columns), [*map(tuple, rows)], "l" * len(columns)))


def print_tables(tables: Iterable[Table]) -> None:
    """Tables with titles, an empty line behind each."""
    console = open_console()
    for table in tables:
        console.print(table, "")


def print_json(value: object) -> None:
    """Strict JSON on stdout, records and numbers that JSON lacks as `records.plain` has them."""
    print(json.dumps(plain(value), indent=2, allow_nan=False))


def print_result(value: object, as_json: bool, tell: Callable[[], object]) -> None:
    """What a command found or made: as JSON, or as `tell` prints it for people."""
    if as_json:
        print_json(value)
    else:
        tell()


def human_size(count: int) -> str:
    """`1,234 bytes`, from a megabyte on with MiB."""
    return f"{count:,} bytes" + (f" ({count / 2**20:.1f} MiB)" if count >= 2**20 else "")
