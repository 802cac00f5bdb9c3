"""How a run ends: exit codes, messages, what `--help` costs."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from conftest_cli import Done, model, spawn

import smoothl1_deploy
from smoothl1_deploy.cli import main, registry
from smoothl1_deploy.cli.registry import COMMANDS, Entry

_PROGRAM = [sys.executable, "-m", "smoothl1_deploy"]
_ROOT = Path(smoothl1_deploy.__file__).parent.parent


def test_help_lists_every_command_with_its_line(cli: Callable[..., Done]) -> None:
    done = cli("--help")
    assert done.code == 0
    for name, entry in COMMANDS.items():
        assert any(name in line and entry.help in line for line in done.out.splitlines()), name
    assert "3 something needed is not installed" in done.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_loads_and_has_help_with_an_example(
    cli: Callable[..., Done], name: str
) -> None:
    module = importlib.import_module(f"smoothl1_deploy.cli.{COMMANDS[name].module}")
    assert module.EXAMPLE.startswith(f"smoothl1-deploy {name}")
    done = cli(name, "--help")
    assert done.code == 0, done.err
    assert f"Usage: smoothl1-deploy {name}" in done.out
    assert module.EXAMPLE in " ".join(done.out.split())


def test_the_examples_in_the_help_work(cli: Callable[..., Done], pair: object) -> None:
    """In the order a person would paste them, in one folder."""
    names = ["export", "run", "inspect", "doctor", "cache"]
    if importlib.util.find_spec("tensorrt_rtx"):
        names.insert(1, "build")
    for name in names:
        module = importlib.import_module(f"smoothl1_deploy.cli.{COMMANDS[name].module}")
        done = cli(*shlex.split(module.EXAMPLE)[1:])
        assert done.code == 0, (name, done.err)
    assert Path("loss.onnx").is_file()


def test_python_without_asserts_and_docstrings_changes_nothing() -> None:
    """Docstrings are read: for the functions in a model, for --help, for the report."""
    code = (
        "import hashlib\n"
        "from smoothl1_deploy import LossSpec, export\n"
        "from smoothl1_deploy.cli import main\n"
        "from smoothl1_deploy.parity.views.html import FAMILIES, family_meaning\n"
        "specs = [LossSpec(), LossSpec(0.0, 'none', gradient=True), LossSpec(dtype='float64')]\n"
        "models = [export(s, route) for s in specs for route in ('function', 'inlined')]\n"
        "data = [model.SerializeToString(deterministic=True) for model in models]\n"
        "print([hashlib.sha256(each).hexdigest() for each in data])\n"
        "print([*map(family_meaning, FAMILIES)])\n"
        "for words in ([], ['parity'], ['cache']):\n"
        "    main([*words, '--help'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    told = {
        subprocess.run(
            [sys.executable, *flags, "-c", code], env=environment, capture_output=True, check=True
        ).stdout
        for flags in ([], ["-O"], ["-OO"])
    }
    (text,) = told
    assert b"list   Show the engines" in text


def test_help_imports_nothing_heavy() -> None:
    heavy = ("numpy", "ml_dtypes", "onnx", "onnxscript", "torch", "onnxruntime", "tensorrt_rtx")
    code = (
        "import sys\nfrom smoothl1_deploy.cli import main\n"
        f"for arguments in (['--help'], ['export', '--help'], ['build', '--help']):\n"
        "    assert main(arguments) == 0\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    assert spawn(code=code).err.strip() == "[]"


def test_help_takes_less_than_half_a_second() -> None:
    before = os.times()
    subprocess.run([*_PROGRAM, "--help"], capture_output=True, check=True, cwd=_ROOT)
    after = os.times()
    # Processor time: on a shared machine, the clock on the wall measures the neighbours.
    seconds = after.children_user + after.children_system
    assert seconds - before.children_user - before.children_system < 0.5


def test_version(cli: Callable[..., Done]) -> None:
    assert cli("--version") == Done(0, f"{smoothl1_deploy.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exprt"], "No such command 'exprt'. Did you mean 'export'?"),
        (["export", "--beta", "much"], "Invalid value for '--beta'"),
        (["export", "--bata", "1"], "No such option"),
        (["run"], "Missing argument"),
        (["cache", "prune"], "Missing option '--max-mb'"),
    ],
)
def test_usage_errors_exit_with_2(
    cli: Callable[..., Done], arguments: list[str], message: str
) -> None:
    done = cli(*arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert "--help' for help" in done.err


@pytest.mark.parametrize(
    ("package", "arguments", "install"),
    [
        ("onnxruntime", ["run", "loss.onnx"], "pip install 'smoothl1-deploy[cpu]'"),
        ("torch", ["run", "loss.onnx", "--backend", "torch"], "pip install torch==2.13.0"),
        ("torch", ["export", "--route", "torch", "--shape", "4"], "pip install torch==2.13.0"),
        ("tensorrt,tensorrt_rtx", ["build", "loss.onnx"], "pip install 'smoothl1-deploy[rtx]'"),
        ("onnx", ["export"], "pip install --force-reinstall smoothl1-deploy"),
        ("typer", ["doctor"], "pip install --force-reinstall smoothl1-deploy"),
        ("rich", ["doctor"], "pip install --force-reinstall smoothl1-deploy"),
    ],
)
def test_a_missing_package_exits_with_3_and_says_what_to_install(
    pair: object, package: str, arguments: list[str], install: str
) -> None:
    if "loss.onnx" in arguments:
        model()
    if arguments[0] == "run":
        arguments = [*arguments, "--input", "input.npy", "--target", "target.npy"]
    done = spawn(*arguments, without=package)
    assert done.code == 3
    assert install in done.err
    assert f"No module named '{package.split(',')[0]}'" in done.err
    assert done.err.count("error: ") == 1


def _replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> None:
    """Put a command called `boom` with this body into the table."""
    module = type(sys)("smoothl1_deploy.cli.boom")
    exec(f"EXAMPLE = 'boom'\ndef boom() -> None:\n    {body}", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(registry.COMMANDS, "boom", Entry("Boom.", "boom", "boom"))


def test_a_bug_exits_with_70_and_asks_for_a_report(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _replaced(monkeypatch, tmp_path, "raise RuntimeError('the roof is on fire')")
    done = cli("boom")
    assert done.code == 70
    assert "this is a bug in smoothl1-deploy (RuntimeError: the roof is on fire)" in done.err
    assert "SMOOTHL1_DEPLOY_DEBUG=1 shows the traceback" in done.err


def test_debug_shows_the_traceback_of_a_bug(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _replaced(monkeypatch, tmp_path, "raise RuntimeError('the roof is on fire')")
    monkeypatch.setenv("SMOOTHL1_DEPLOY_DEBUG", "1")
    assert main(["boom"]) == 70
    assert "Traceback (most recent call last)" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("raise KeyboardInterrupt", 130, ""),
        ("raise MemoryError('8 EiB')", 2, "error: not enough memory for this (8 EiB)"),
        ("raise MemoryError", 2, "error: not enough memory for this (MemoryError)"),
        ("raise OSError(12, 'Cannot allocate memory')", 2, "error: not enough memory for this"),
        ("raise OSError(24, 'Too many open files', 'a.npy')", 2, "(Too many open files: a.npy)"),
        (
            "raise ImportError('advice\\nlib.so: failed to map segment from shared object')",
            2,
            "error: not enough memory for this (lib.so: failed to map segment from shared object)",
        ),
        ('raise RuntimeError("can\'t start new thread")', 2, "error: not enough memory for this"),
        ("raise FileNotFoundError(2, 'No such file or directory')", 70, "this is a bug"),
        ("import typer; raise typer.Exit(1)", 1, ""),
        ("raise ModuleNotFoundError('no x', name='smoothl1_deploy.x')", 70, "this is a bug"),
        ("raise ModuleNotFoundError('no numpy', name='numpy')", 3, "--force-reinstall"),
    ],
)
def test_every_other_end_has_its_code(
    cli: Callable[..., Done],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    body: str,
    code: int,
    message: str,
) -> None:
    _replaced(monkeypatch, tmp_path, body)
    done = cli("boom")
    assert done.code == code
    assert message in done.err
    assert message or not done.err


def test_markup_in_a_message_is_shown_as_it_is(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """rich would take [red] for a colour and swallow it."""
    body = "from smoothl1_deploy.errors import SpecError; raise SpecError('a [red] b :smile:')"
    _replaced(monkeypatch, tmp_path, body)
    assert cli("boom").err == "error: a [red] b :smile:\n"


def test_a_message_is_one_line_however_narrow_the_terminal(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An install command that is cut can't be pasted."""
    monkeypatch.setenv("COLUMNS", "40")
    done = cli("export", "--beta", "-1")
    assert len(done.err) > 80
    assert done.err.count("\n") == 1


def test_an_interrupt_while_the_command_line_loads(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "root_command", interrupted)
    assert cli("export") == Done(130, "", "")


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["cache", "list", "--json"], ["cache", "list"], ["--help"]])
def test_a_reader_that_stops_reading_is_no_error(arguments: list[str], buffered: str) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": buffered}
    process = subprocess.Popen(
        [*_PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=_ROOT,
        env=environment,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141


def test_where_the_output_is_stdout_nothing_else_goes_there() -> None:
    done = subprocess.run(
        [*_PROGRAM, "export", "--beta", "2", "-o", "/dev/stdout"], capture_output=True, cwd=_ROOT
    )
    assert done.returncode == 0
    assert "beta_2.0" in onnx.load_model_from_string(done.stdout).graph.name
    assert b"wrote" in done.stderr and b"beta=2.0" in done.stderr


#: Each sends its interrupts itself, once it is where they are to arrive: a timer is no such moment.
_INTERRUPTED = """
import atexit, os, signal, sys, threading, time
from smoothl1_deploy.cli import main

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

"""


_TOLD = "note: interrupted; once more ends it at once\n"


def test_an_interrupt_ends_with_130_and_one_sentence() -> None:
    code = _INTERRUPTED + (
        "import smoothl1_deploy.graph.export as module\n"
        "module.export = lambda *a, **k: (interrupt(), time.sleep(600))\n"
        "sys.exit(main(['export']))"
    )
    assert spawn(code=code) == Done(130, "", _TOLD)


def test_a_second_interrupt_does_not_wait_for_tensorrt() -> None:
    """A build goes on in C++, and may crash the interpreter that ends meanwhile (1.7.1)."""
    code = _INTERRUPTED + (
        "import smoothl1_deploy.tensorrt.build as module\n"
        "from smoothl1_deploy.tensorrt.build import BuildWatch, run_watched\n"
        "atexit.register(print, 'the interpreter ended')\n"
        "watch = BuildWatch()\n"
        "def build():\n"
        "    interrupt()\n"
        "    while not watch.stopped:\n"
        "        time.sleep(0.01)\n"
        "    interrupt()\n"
        "    time.sleep(600)\n"
        "module.build_engine = lambda *a, **k: run_watched(build, watch)\n"
        "sys.exit(main(['build', 'loss.onnx']))"
    )
    assert spawn(code=code) == Done(130, "", _TOLD)


def test_a_second_interrupt_while_the_interpreter_ends_is_as_quiet() -> None:
    """It waits for threads, and showed a traceback of its own; a shell reports SIGINT as 130."""
    code = _INTERRUPTED + (
        "import smoothl1_deploy.graph.export as module\n"
        "def late():\n"
        "    threading.main_thread().join()\n"
        "    interrupt()\n"
        "    time.sleep(600)\n"
        "def export(*a, **k):\n"
        "    threading.Thread(target=late).start()\n"
        "    interrupt()\n"
        "module.export = export\n"
        "sys.argv = ['smoothl1-deploy', 'export']\n"
        "sys.exit(main())"
    )
    assert spawn(code=code) == Done(-signal.SIGINT, "", _TOLD)


def test_json_is_all_there_is_on_stdout(cli: Callable[..., Done], pair: object) -> None:
    """A pipe into jq works for every command that has --json."""
    for arguments in (
        ["export", "--shape", "N,16", "-o", "loss.onnx"],
        ["run", "loss.onnx", "--input", "input.npy", "--target", "target.npy"],
        ["inspect", "loss.onnx"],
        ["cache", "list"],
        ["doctor"],
    ):
        done = cli(*arguments, "--json")
        assert done.code == 0, done.err
        json.loads(done.out)
