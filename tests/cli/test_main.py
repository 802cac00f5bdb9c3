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
from conftest_cli import Cli, Done, model, spawn

import smoothl1_deploy
from smoothl1_deploy.cli import _registry as registry
from smoothl1_deploy.cli import main
from smoothl1_deploy.cli._registry import COMMANDS

_PROGRAM = [sys.executable, "-m", "smoothl1_deploy"]
_ROOT = Path(smoothl1_deploy.__file__).parent.parent


def test_help_lists_every_command_with_its_line(cli: Cli) -> None:
    done = cli("--help")
    assert done.code == 0
    for name, text in COMMANDS.items():
        assert any(name in line and text in line for line in done.out.splitlines()), name
    assert "3 something needed is not installed" in done.out


def test_every_command_loads_and_has_help_with_an_example(cli: Cli) -> None:
    for name in COMMANDS:
        module = importlib.import_module(f"smoothl1_deploy.cli._{name}")
        assert module.EXAMPLE.startswith(f"smoothl1-deploy {name}")
        done = cli(name, "--help")
        assert done.code == 0, done.err
        assert f"Usage: smoothl1-deploy {name}" in done.out
        assert module.EXAMPLE in " ".join(done.out.split())
        command = registry._load(name)
        for each in getattr(command, "commands", {name: command}).values():
            assert all(parameter.help for parameter in each.params), each.name


def test_the_examples_in_the_help_work(cli: Cli, pair: object) -> None:
    """In the order a person would paste them, in one folder."""
    names = ["export", "run", "inspect", "doctor", "cache"]
    if importlib.util.find_spec("tensorrt_rtx"):
        names.insert(1, "build")
    for name in names:
        module = importlib.import_module(f"smoothl1_deploy.cli._{name}")
        done = cli(*shlex.split(module.EXAMPLE)[1:])
        assert done.code == 0, (name, done.err)
    assert Path("loss.onnx").is_file()


_READS_DOCSTRINGS = """
import hashlib
from smoothl1_deploy import LossSpec, export
from smoothl1_deploy.cli import main
from smoothl1_deploy.parity.views._html import FAMILIES, family_meaning
for spec in (LossSpec(), LossSpec(0.0, "none", gradient=True), LossSpec(dtype="float64")):
    for route in ("function", "inlined"):
        data = export(spec, route).SerializeToString(deterministic=True)
        print(hashlib.sha256(data).hexdigest())
print([*map(family_meaning, FAMILIES)])
for words in ([], ["parity"], ["cache"]):
    main([*words, "--help"])
"""


def test_python_without_asserts_and_docstrings_changes_nothing() -> None:
    """Docstrings are read: for the functions in a model, for --help, for the report."""
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    plain, stripped = (
        subprocess.check_output([*command, "-c", _READS_DOCSTRINGS], env=environment)
        for command in ([sys.executable], [sys.executable, "-OO"])
    )
    assert plain == stripped
    assert b"list   Show the engines" in plain


def test_help_imports_nothing_heavy_and_takes_less_than_half_a_second() -> None:
    heavy = ("numpy", "ml_dtypes", "onnx", "onnxscript", "torch", "onnxruntime", "tensorrt_rtx")
    code = (
        "import sys, time\nfrom smoothl1_deploy.cli import main\n"
        # Processor time: on a shared machine, the clock on the wall measures the neighbours.
        "assert main(['--help']) == 0 and time.process_time() < 0.5, time.process_time()\n"
        "assert main(['export', '--help']) == main(['build', '--help']) == 0\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    assert spawn(code=code).err.strip() == "[]"


def test_version(cli: Cli) -> None:
    assert cli("--version") == Done(0, f"{smoothl1_deploy.__version__}\n", "")


def test_usage_errors_exit_with_2(cli: Cli) -> None:
    for arguments, message in (
        (["exprt"], "No such command 'exprt'. Did you mean 'export'?"),
        (["export", "--beta", "much"], "Invalid value for '--beta'"),
        (["export", "--bata", "1"], "No such option"),
        (["run"], "Missing argument"),
        (["cache", "prune"], "Missing option '--max-mb'"),
    ):
        done = cli(*arguments)
        assert (done.code, done.out) == (2, "")
        assert message in done.err
        assert "--help' for help" in done.err


def test_help_is_h_too_and_dtypes_are_spelled_as_others_do(cli: Cli) -> None:
    assert cli("-h").out == cli("--help").out and "--beta" in cli("export", "-h").out
    words = ("export", "--shape", "N,4", "--json", "--dtype")
    for spelled, dtype in (("half", "float16"), ("FP16", "float16"), ("bf16", "bfloat16"),
                           ("Float32", "float32"), ("double", "float64")):  # fmt: skip
        made = json.loads(cli(*words, spelled, "--reduction", "SUM").out)
        assert f"_sum_{dtype}" in made["path"]
    assert "unknown dtype 'int8'" in cli("parity", "--dtype", "int8").err


def test_a_missing_package_exits_with_3_and_says_what_to_install(pair: object) -> None:
    run = f"run {model()} --input input.npy --target target.npy"
    again = "pip install --force-reinstall smoothl1-deploy"
    for package, command, install in (
        ("onnxruntime", run, "pip install 'smoothl1-deploy[cpu]'"),
        ("tensorrt,tensorrt_rtx", "build loss.onnx", "pip install 'smoothl1-deploy[rtx]'"),
        ("psutil", "serve .", "pip install 'smoothl1-deploy[serve]'"),
        ("torch", "prove --quick", "pip install torch==2.13.0"),
        ("onnxruntime", "prove --quick", "pip install 'smoothl1-deploy[cpu]'"),
        ("onnx", "export", again),
        ("typer", "cache list", again),
        ("rich", "cache list", again),
    ):
        done = spawn(*command.split(), without=package)
        assert done.code == 3 and install in done.err, done
        assert f"No module named '{package.split(',')[0]}'" in done.err
        assert done.err.count("error: ") == 1


@pytest.fixture
def boom(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Done]:
    """Calls a command with this body."""

    def call(body: str) -> Done:
        module = type(sys)("smoothl1_deploy.cli._boom")
        exec(f"EXAMPLE = 'boom'\ndef boom() -> None:\n    {body}", module.__dict__)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(registry.COMMANDS, "boom", "Boom.")
        return cli("boom")

    return call


def test_a_bug_exits_with_70_and_asks_for_a_report(
    boom: Callable[[str], Done], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    done = boom("raise RuntimeError('the roof is on fire')")
    assert done.code == 70
    assert "this is a bug in smoothl1-deploy (RuntimeError: the roof is on fire)" in done.err
    assert "SMOOTHL1_DEPLOY_DEBUG=1 shows the traceback" in done.err
    monkeypatch.setenv("SMOOTHL1_DEPLOY_DEBUG", "1")
    assert main(["boom"]) == 70
    assert "Traceback (most recent call last)" in capfd.readouterr().err


def test_every_other_end_has_its_code(boom: Callable[[str], Done]) -> None:
    memory = "error: not enough memory for this"
    for body, code, message in (
        ("raise KeyboardInterrupt", 130, ""),
        ("raise RuntimeError('of __set_name__') from KeyboardInterrupt()", 130, ""),
        ("raise MemoryError('8 EiB')", 2, f"{memory} (8 EiB)"),
        ("raise MemoryError", 2, f"{memory} (MemoryError)"),
        ("raise OSError(12, 'Cannot allocate memory')", 2, memory),
        ("raise OSError(24, 'Too many open files', 'a.npy')", 2, "(Too many open files: a.npy)"),
        ("raise ImportError('advice\\nlib.so: failed to map segment from shared object')", 2,
         f"{memory} (lib.so: failed to map segment from shared object)"),
        ('raise RuntimeError("can\'t start new thread")', 2, memory),
        ("raise FileNotFoundError(2, 'No such file or directory')", 70, "this is a bug"),
        ("import typer; raise typer.Exit(1)", 1, ""),
        ("raise ModuleNotFoundError('no x', name='smoothl1_deploy.x')", 70, "this is a bug"),
        ("raise ModuleNotFoundError('no numpy', name='numpy')", 3, "--force-reinstall"),
    ):  # fmt: skip
        done = boom(body)
        assert done.code == code, body
        assert message in done.err
        assert message or not done.err
    # rich would take [red] for a colour and swallow it.
    body = "from smoothl1_deploy.errors import SpecError; raise SpecError('a [red] b :smile:')"
    assert boom(body).err == "error: a [red] b :smile:\n"


def test_a_message_is_one_line_however_narrow_the_terminal(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An install command that is cut can't be pasted."""
    monkeypatch.setenv("COLUMNS", "40")
    done = cli("export", "--beta", "-1")
    assert len(done.err) > 80
    assert done.err.count("\n") == 1


def test_an_interrupt_while_the_command_line_loads(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "root_command", interrupted)
    assert cli("export") == Done(130, "", "")


@pytest.mark.parametrize(
    ("arguments", "buffered"), [("cache list --json", ""), ("cache list", "1"), ("--help", "")]
)
def test_a_reader_that_stops_reading_is_no_error(arguments: str, buffered: str) -> None:
    process = subprocess.Popen(
        [*_PROGRAM, *arguments.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        cwd=_ROOT, env={**os.environ, "PYTHONUNBUFFERED": buffered},
    )  # fmt: skip
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
_ONCE = """
import smoothl1_deploy.graph._export as module
module.export = lambda *a, **k: (interrupt(), time.sleep(600))
sys.exit(main(['export']))
"""
_IN_TENSORRT = """
import smoothl1_deploy.tensorrt._build as module
from smoothl1_deploy.tensorrt._build import BuildWatch, run_watched
atexit.register(print, 'the interpreter ended')
watch = BuildWatch()
def build():
    interrupt()
    while not watch.stopped:
        time.sleep(0.01)
    interrupt()
    time.sleep(600)
module.build_engine = lambda *a, **k: run_watched(build, watch)
sys.exit(main(['build', 'loss.onnx']))
"""
_AT_THE_END = """
import smoothl1_deploy.graph._export as module
def late():
    threading.main_thread().join()
    interrupt()
    time.sleep(600)
def export(*a, **k):
    threading.Thread(target=late).start()
    interrupt()
module.export = export
sys.argv = ['smoothl1-deploy', 'export']
sys.exit(main())
"""


_TOLD = "note: interrupted; once more ends it at once\n"


def test_an_interrupt_ends_with_130_and_one_sentence() -> None:
    assert spawn(code=_INTERRUPTED + _ONCE) == Done(130, "", _TOLD)


def test_a_second_interrupt_does_not_wait_for_tensorrt() -> None:
    """A build goes on in C++, and may crash the interpreter that ends meanwhile (1.7.1)."""
    assert spawn(code=_INTERRUPTED + _IN_TENSORRT) == Done(130, "", _TOLD)


def test_a_second_interrupt_while_the_interpreter_ends_is_as_quiet() -> None:
    """It waits for threads, and showed a traceback of its own; a shell reports SIGINT as 130."""
    assert spawn(code=_INTERRUPTED + _AT_THE_END) == Done(-signal.SIGINT, "", _TOLD)
