"""The target on the command line: every command, with options of its own and odd values."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from smoothl1_deploy.cli import _registry as registry
from smoothl1_deploy.cli import main
from smoothl1_deploy.errors import SmoothL1DeployError

from .damage import bases, damaged_bytes
from .files import FILES
from .target import Target

#: The commands that are left out, and why: a case takes too long, or doesn't end.
SLOW = {
    "parity": "seconds a cell",
    "prove": "minutes a beta, in processes of its own",
    "bench": "measures for seconds",
    "serve": "serves until it is stopped",
    "doctor": "has no arguments worth the time",
}

_FILES = st.sampled_from([
    "loss.onnx", "loss.onnx", "other.onnx", "other.onnx", "bad.onnx", "input.npy", "target.npy",
    "pair.npz", "odd", "out.npy", "out.npz", "out.onnx", "out.engine", "missing", "folder",
    "folder/new", "no/such", "", ".", "a\0b", "x" * 300, "\udcff", "loss.engine", "%s[red]",
    "input.npy", "target.npy", "link", "loop", "fifo",
])  # fmt: skip
_TEXTS = st.one_of(
    st.sampled_from([
        "N,16", "4,16", "scalar", "mean", "sum", "none", "float32", "bfloat16", "inlined",
        "function", "ort-cpu", "onnx-reference", "trt-network", "x", "input", "target", "hidden",
        "input=1x16,4x16,8x16", "8.6", "count", "weights", "new", "", "-", "\ud800", "9" * 400,
        "1e999", "nan", "-1", "0", "1.5", "\0", "[/red]", "N,16", "z", "y", "x", "label",
    ]),
    st.text(max_size=6),
)  # fmt: skip
_COMMANDS = [name for name in registry.COMMANDS if name not in SLOW]


def _parameters(command: Any) -> tuple[list[Any], list[Any]]:
    """The arguments and the options of a command, those of completion left out."""
    own = [p for p in command.params if p.name not in ("install_completion", "show_completion")]
    arguments = [p for p in own if p.param_type_name == "argument"]
    return arguments, [p for p in own if p.param_type_name == "option" and p.name != "help"]


def _value(parameter: Any) -> st.SearchStrategy[str]:
    """Values of about the right kind; typer names a parameter's type differently by version."""
    described = getattr(parameter, "type_descriptor", None)
    kind = str(getattr(described, "annotation", None) or parameter.type).lower()
    if "path" in kind:
        return _FILES
    if "int" in kind or "float" in kind:
        return _NUMBERS
    return _TEXTS


_NUMBERS = st.sampled_from(["0", "1", "2", "-1", "0.5", "nan", "inf", "1e400", "9" * 400, "x"])
#: Sound lines; a case changes some of their words.
_SOUND = {
    "export": [
        "--shape N,16 -o out.onnx",
        "--reduction none --json",
        "--dtype float16 -o out.onnx",
    ],
    "attach": [
        "other.onnx --prediction hidden --target label -o out.onnx",
        "other.onnx --prediction z --target new -o out.onnx --only-loss --gradient",
    ],
    "build": ["loss.onnx -o out.engine", "loss.onnx --no-cache --profile input=1x16,4x16,8x16"],
    "run": [
        "loss.onnx --input input.npy --target target.npy -o out.npy",
        "loss.onnx --data pair.npz --json",
        "other.onnx --data pair.npz --backend onnx-reference",
    ],
    "inspect": ["loss.onnx --json", "other.onnx"],
    "score": [
        "--input input.npy --target target.npy --json",
        "--input pair.npz --target pair.npz --per-sample -o out.npy --journal journal",
    ],
    "verify": ["loss.onnx --backend x --no-drift", "bad.onnx --no-drift --certificate"],
}


@st.composite
def _lines(draw: st.DrawFn) -> list[str]:
    """A command line: a sound one, or the command's own options, with some words changed."""
    name = draw(st.sampled_from(_COMMANDS))
    command, words = registry._load(name), [name]
    if hasattr(command, "commands"):
        sub = draw(st.sampled_from(sorted(command.commands)))
        command, words = command.commands[sub], [name, sub]
    arguments, options = _parameters(command)
    if name in _SOUND and draw(st.integers(0, 3)):
        words += draw(st.sampled_from(_SOUND[name])).split()
    else:
        words += [draw(_value(argument)) for argument in arguments]
        for option in options:
            if option.required:
                words += [option.opts[0], draw(_value(option))]
    for option in draw(st.lists(st.sampled_from(options), max_size=3)) if options else []:
        words.append(draw(st.sampled_from([*option.opts, *option.secondary_opts])))
        if not option.is_flag:
            words.append(draw(_value(option)))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(words) - 1))
        words[at : at + draw(st.integers(0, 1))] = [draw(st.one_of(_FILES, _TEXTS, _NUMBERS))]
    return words


def _prepare(bad: bytes, odd: bytes) -> None:
    """What the names in `_FILES` stand for, in the current folder."""
    Path("loss.onnx").write_bytes(bases()[0].SerializeToString(deterministic=True))
    Path("other.onnx").write_bytes(bases()[-1].SerializeToString(deterministic=True))
    Path("bad.onnx").write_bytes(bad)
    Path("odd").write_bytes(odd)
    Path("folder").mkdir()
    array = np.ones((4, 16), np.float32)
    np.save("input.npy", array)
    np.save("target.npy", array)
    np.savez("pair.npz", input=array, target=array)
    os.symlink("loss.onnx", "link")
    os.symlink("loop", "loop")
    os.mkfifo("fifo")
    os.environ["XDG_CACHE_HOME"] = os.path.abspath("user-cache")


@contextlib.contextmanager
def _reader(pipe: str) -> Iterator[None]:
    """Somebody at the other end: without one a writer waits, as it is to."""
    handle = os.open(pipe, os.O_RDWR)
    fcntl.fcntl(handle, fcntl.F_SETPIPE_SZ, 1 << 20)  # more than any output here
    try:
        yield
    finally:
        os.close(handle)


def _call(case: tuple[Any, ...], folder: Path) -> None:
    words, bad, odd = case
    _prepare(bad, odd)
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")  # as strict as a terminal
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    with _reader("fifo"), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    said = "".join(texts)
    assert code in (0, 1, 2, 3), f"exit code {code}: {said}"
    assert "Traceback" not in said, said
    assert code == 0 or code == 1 or texts[1].strip(), f"exit code {code} without a word"
    if code == 2:
        raise CommandRefusedError(said)


class CommandRefusedError(SmoothL1DeployError):
    """Exit code 2: counted as refused."""


TARGETS = [
    Target(
        "command",
        st.tuples(_lines(), damaged_bytes(bases()[0].SerializeToString()), FILES),
        _call,
        share=25,
    )
]
