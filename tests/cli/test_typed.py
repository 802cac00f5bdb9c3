"""What people type, and what they read when it is done: the same for every command."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import child
import numpy as np
import onnx
import pytest
from conftest_cli import Cli, assert_refused, model, spawn
from handmade import model_of

from smoothl1_deploy._spec import DTYPES, NORMALIZERS, REDUCTIONS, ROUTES
from smoothl1_deploy.backends._names import BACKENDS
from smoothl1_deploy.cli import _console as console
from smoothl1_deploy.cli import _deploy, _registry
from smoothl1_deploy.cli._registry import COMMANDS
from smoothl1_deploy.tensorrt._build import FORMATS
from smoothl1_deploy.tensorrt._flavour import FLAVOURS

RELU = "g (float[N, 16] x) => (float[N, 16] boxes) { boxes = Relu(x) }"
_GRAFT = "detector.onnx --prediction boxes --target gt"
_CELL = "--backend onnx-reference --beta 1 --reduction mean --dtype float32 --route function"
#: Command -> what a person types, and what comes next; in an order in which each has its files.
TYPED = {
    "export": ("--shape N,16 -o new/loss.onnx", "verify new/loss.onnx --certificate"),
    "attach": (
        f"{_GRAFT} -o new/scored.onnx",
        "verify new/scored.onnx --against detector.onnx --certificate",
    ),
    "build": ("new/loss.onnx --no-cache -o new/engine/loss", "inspect new/engine/loss"),
    "run": (
        "new/loss.onnx --input input.npy --target target.npy -o new/out/loss.npy",
        "verify new/loss.onnx --certificate",
    ),
    "compare": (
        "new/loss.onnx new/loss.onnx --input input.npy --target target.npy",
        "verify new/loss.onnx --certificate",
    ),
    "score": (
        "--input input.npy --target target.npy --per-sample -o new/s.npy --journal new/j/j",
        "export --per-sample --dtype float32 -o loss.onnx",
    ),
    "verify": ("new/loss.onnx --no-drift", "repository models --model new/loss.onnx"),
    "inspect": ("new/loss.onnx", "verify new/loss.onnx --certificate"),
    "deploy": (f"{_GRAFT} -o new/out", "serve new/out/models"),
    "parity": (
        f"--quick --no-extensions --workers 1 -o new/parity {_CELL}",
        "xdg-open new/parity/report.html",
    ),
    "prove": (
        "--beta 2 -o new/proofs/pairs.json",
        "prove --dtype bfloat16 --beta 2.0 --route function -o new/proofs/pairs.json",
    ),
    "bench": ("--quick -o new/bench", "xdg-open new/bench/bench.png"),
    "repository": (
        "new/models --per-sample --name score --kserve new/k/service.yaml",
        "serve new/models",
    ),
    "serve": ("new/models", "run score --url http://127.0.0.1:1 --data pair.npz"),
    "cache": ("list", "cache prune --max-mb 100"),
    "doctor": ("", "export --beta 0.5 --reduction mean --shape N,16 -o loss.onnx"),
}
_NEEDS = {"build": "tensorrt_rtx", "repository": "tritonclient", "serve": "psutil"}


class _Served:
    """A server that is ready, and ended by Ctrl-C."""

    addresses = SimpleNamespace(to_dict=lambda: {"http": "http://127.0.0.1:1"})

    def __init__(self, *given: object, **options: object) -> None: ...

    def warnings(self) -> list[str]:
        return ["anyone may ask"]


@contextlib.contextmanager
def _service(*given: object) -> Iterator[object]:
    certificate = SimpleNamespace(state="absent", message="")
    score = SimpleNamespace(name="score", version="1", certificate=certificate)
    yield SimpleNamespace(models={"score": score})


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch, pair: object) -> None:
    """What takes long is done at once: the steps, the pairs, the turns, the server."""
    from smoothl1_deploy.bench import _cpu, _rows
    from smoothl1_deploy.parity import _pairs
    from smoothl1_deploy.serving import _server, _supervise

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    def step(words: list[Any]) -> None:
        if words[0] == "attach":
            Path(words[-1]).parent.mkdir(exist_ok=True)
            Path(words[-1]).touch()

    onnx.save(model_of(RELU), "detector.onnx")
    monkeypatch.setattr(_deploy, "_step", step)
    monkeypatch.setattr(_pairs, "prove", lambda proof, **options: iter(()))
    monkeypatch.setattr(_cpu, "measure", lambda *given, **options: ([], {}))
    monkeypatch.setattr(_rows, "plot_png", lambda rows, **origin: b"")
    monkeypatch.setattr(_server, "Server", _Served)
    monkeypatch.setattr(_supervise, "service", _service)
    monkeypatch.setattr(time, "sleep", interrupt)


def _next(out: str) -> str:
    lines = [line for line in out.splitlines() if line.startswith("next: ")]
    assert len(lines) == 1, out
    return lines[0].removeprefix("next: ")


def test_every_command_ends_with_what_comes_next_and_makes_its_folders(
    quickly: None, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal; and what comes next is a command that has these arguments."""
    assert {*TYPED} == {*COMMANDS}
    monkeypatch.setattr(console._Results, "isatty", lambda stream: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")  # no colours
    for name, (words, following) in TYPED.items():
        if name in _NEEDS and not importlib.util.find_spec(_NEEDS[name]):
            continue
        done = cli(name, *shlex.split(words))
        assert done.code == 0, (name, done.err)
        told = _next(done.out)
        program, *rest = shlex.split(told)
        assert told == (following if program == "xdg-open" else f"smoothl1-deploy {following}")
        if program != "xdg-open":
            _registry._load(rest[0]).make_context(rest[0], rest[1:])  # it has these options
        for path in re.findall(r"(?:-o|--journal|--kserve) (\S+)", words):
            assert Path(path).exists() or "score" in name or name == "deploy", (name, path)
    assert "\n  or: docker run " in cli("deploy", *shlex.split(TYPED["deploy"][0])).out


def test_a_terminal_is_told_what_comes_next_and_a_pipe_is_not() -> None:
    words = ("-m", "smoothl1_deploy", "export", "-o", "loss.onnx")

    def on_a_terminal(*more: str) -> str:
        ours, theirs = os.openpty()
        child.run(*words, *more, stdout=theirs, variables={"TERM": "dumb"}, check=True)
        os.close(theirs)
        with open(ours, "rb", buffering=0) as terminal:
            return terminal.read(100_000).decode()

    assert _next(on_a_terminal()) == "smoothl1-deploy verify loss.onnx --certificate"
    for told in (
        child.run(*words).stdout,
        on_a_terminal("--quiet"),
        on_a_terminal("--json"),
    ):
        assert "loss.onnx" in told and "next:" not in told


def test_quiet_leaves_the_result_and_the_error(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COMMANDS:
        command = _registry._load(name)
        for each in getattr(command, "commands", {name: command}).values():
            assert any({"-q", "--quiet"} == {*p.opts} for p in each.params), each.name
    assert cli("export").err.startswith("note: no --shape")
    loud, quiet = cli("export", "-o", "a.onnx"), cli("export", "-o", "a.onnx", "-q")
    assert (quiet.out, quiet.err) == (loud.out, "")
    assert_refused(cli("export", "--beta", "-1", "-q"), "beta must not be negative")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with console.command_running(quiet=False):
        assert console.progress_console() is not None
        with console.command_running(quiet=True):
            assert console.progress_console() is None
        console.print_next("not after a command within another")
    assert console.progress_console() is not None


def _options() -> Iterator[tuple[str, Any]]:
    for name in COMMANDS:
        command = _registry._load(name)
        for each in getattr(command, "commands", {name: command}).values():
            yield from ((name, p) for p in each.params if p.param_type_name == "option")


def test_an_option_with_choices_shows_and_completes_those_that_there_are() -> None:
    chosen = {
        "backend": (*BACKENDS,),
        "dtype": DTYPES,
        "engine": ("local", "ray"),
        "flavour": ("auto", *FLAVOURS),
        "format": FORMATS,
        "normalizer": NORMALIZERS,
        "reduction": REDUCTIONS,
        "route": ROUTES,
        "weight": NORMALIZERS,
    }
    fewer = {
        ("score", "reduction"): REDUCTIONS[1:],
        ("prove", "dtype"): ("float16", "bfloat16"),
        ("prove", "route"): ROUTES[:2],
        ("attach", "route"): ROUTES[:2],
        ("attach", "weight"): (),  # a tensor's name
    }
    seen = set()
    for command, option in _options():
        kind = str(option.type_descriptor.annotation)
        if option.name in chosen and "Path" not in kind:
            names = fewer.get((command, option.name), chosen[option.name])
            completed = [item.value for item in option.shell_complete(None, "")]
            assert completed == [*names], (command, option.name)
            shown = f"One of {', '.join(names)}." in option.help
            assert shown == bool(names and option.name != "backend"), (command, option.name)
            seen.add(option.name)
    assert seen == {*chosen}


def test_a_shell_completes_without_what_a_value_lives_on() -> None:
    code = (
        "import os, sys\nfrom smoothl1_deploy.cli import main\n"
        "words = sys.argv[2:]\n"
        "os.environ |= {'_SMOOTHL1_DEPLOY_COMPLETE': 'complete_bash',"
        " 'COMP_WORDS': ' '.join(['smoothl1-deploy', *words]), 'COMP_CWORD': str(len(words))}\n"
        "assert main([]) == 0\n"
        "heavy = ('numpy', 'onnx', 'onnxruntime', 'torch', 'tensorrt_rtx')\n"
        "assert not [name for name in heavy if name in sys.modules]"
    )
    for words, completed in (
        ("inspe", ["inspect"]),
        ("parity --backend trit", ["triton-http", "triton-grpc"]),
        ("build loss.onnx --flavour tensorrt_", ["tensorrt_rtx"]),
        ("export --rout", ["--route"]),
    ):
        done = spawn(*words.split(), code=code)
        assert (done.code, done.out.split()) == (0, completed), done


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_help_cuts_no_word_of_its_example_and_gives_no_flag_a_type(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert not re.search(r"(?i)\bbool\b", cli("--help").out)
    for name in COMMANDS:
        out = cli(name, "--help").out
        assert not re.search(r"(?i)\bbool\b", out), name
        assert max(map(len, out.splitlines())) <= columns
        pasted = out.partition("Example:\n")[2]
        example = importlib.import_module(f"smoothl1_deploy.cli._{name}").EXAMPLE
        assert pasted.replace("\\\n", "") == f"{example}\n"  # as a shell joins the lines


def test_what_is_refused_leaves_no_folder_and_is_told_before_the_work(
    quickly: None, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smoothl1_deploy.bench import _cpu
    from smoothl1_deploy.parity import _matrix, _pairs, _verify
    from smoothl1_deploy.scoring import _score

    def work(*given: object, **options: object) -> None:
        pytest.fail("the work had begun")

    for module, name in (
        (_cpu, "measure"), (_matrix, "run_matrix"), (_pairs, "prove"), (_verify, "verify")
    ):  # fmt: skip
        monkeypatch.setattr(module, name, work)
    monkeypatch.setattr(_score, "_tasks", work, raising=False)
    model()
    Path("file").touch()
    Path("loss.onnx.certificate.json").mkdir()
    pair = "--input input.npy --target target.npy"
    for words in (
        "bench --quick -o file/out",
        f"parity --quick {_CELL} -o file/out",
        "prove -o file/pairs.json",
        "prove -o file/pairs/pairs.json",
        "verify loss.onnx --certificate",
        f"score {pair} --per-sample -o file/s.npy",
        f"run loss.onnx {pair} -o file/out.npy",
        f"attach {_GRAFT} -o file/scored.onnx",
        "repository models --kserve file/service.yaml",
        "export -o file/loss.onnx",
    ):
        assert_refused(cli(*words.split()), "can't write ")
    before = sorted(Path().rglob("*"))
    for words in (
        "export --beta -1 -o new/loss.onnx",
        f"attach {_GRAFT} --reduction max -o new/scored.onnx",
        "run loss.onnx --input input.npy --target no.npy -o new/out.npy",
        "parity --dtype int8 -o new/out",
        "prove --dtype float32 -o new/pairs.json",
        "bench --size 7 -o new/out",
        "verify no.onnx --certificate",
    ):
        assert cli(*words.split()).code == 2
    assert sorted(Path().rglob("*")) == before


#: Bad input whose message a caller of Python reads too.
BAD = (
    "export --per-sample --reduction none",
    "export --upstream",
    "export --weight weights --reduction sum",
    "export --runtime-beta --beta 2",
    "export --beta -1",
    "export --route torch",
    "export --route torch --shape N,16 --gradient",
    "export --shape N,16 --weight-shape N,1",
    "export --target-shape N,16",
    f"attach {_GRAFT} --target-shape N,1 --route torch -o s.onnx",
    "attach detector.onnx --prediction boxes --target x --target-shape N,1 -o s.onnx",
    "attach old.onnx --prediction boxes --target gt -o s.onnx",
    "attach double.onnx --prediction boxes --target gt --dtype float16 -o s.onnx",
    "build any.onnx --no-cache",
    "build double-loss.onnx --no-cache",
    "build loss.onnx --no-cache --profile input=x",
    "build loss.onnx --no-cache --compute-capability 9.0",
    "build loss.onnx --format epcontext -o l.engine",
    "run loss.onnx --input double.npy --target target.npy",
    "run loss.onnx --input narrow.npy --target target.npy",
    "run loss.onnx --data input.npy",
    "run loss.onnx --input pair.npz --target target.npy",
    "run detector.onnx --input input.npy --target target.npy",
    "run new.engine --input input.npy --target target.npy",
    "run loss.onnx --input whole.npy --target whole.npy",
    "run loss.onnx --input objects.npy --target target.npy",
    "run detector.onnx --input x=whole.npy",
    "score --input input.npy --target target.npy --reduction none",
    "score --input input.npy --target target.npy --model detector.onnx",
    "score --input whole.npy --target whole.npy",
    "score --input input.npy --target target.npy --model runtime.onnx",
    "verify detector.onnx",
    "verify three.onnx --beta 1",
    "verify three.onnx --beta 1 --input-name x",
    "verify loss.onnx --dtype float16",
    "verify loss.onnx --input-name z",
    "repository models --shape 4,16",
    "repository models --reduction none --max-batch-size 4 --shape N",
    "repository models --max-batch-size 4",
)


def test_no_message_on_the_command_line_speaks_python(quickly: None, cli: Cli) -> None:
    model()
    for name, words in (
        ("any", ""),
        ("double-loss", "--dtype float64 --shape N,16"),
        ("runtime", "--runtime-beta"),
    ):
        assert cli("export", *words.split(), "-o", f"{name}.onnx").code == 0
    onnx.save(model_of(RELU, opset=9), "old.onnx")
    onnx.save(model_of(RELU.replace("float", "double")), "double.onnx")
    three = (
        "g (float[N] x, float[N] y, float[N] z) => (float[N] o) { s = Sum(x, y)  o = Sub(s, z) }"
    )
    onnx.save(model_of(three), "three.onnx")
    Path("new.engine").write_bytes(b"ftrt")
    np.save("double.npy", np.ones((5, 16)))
    np.save("narrow.npy", np.ones((5, 15), "f4"))
    np.save("whole.npy", np.ones((5, 16), "i8"))
    np.save("objects.npy", np.array([None]))
    np.savez("pair.npz", input=np.ones(3))
    for words in BAD:
        done = cli(*words.split())
        assert done.code in (2, 3) and done.err.startswith("error: "), (words, done)
        said = re.sub(r"input=[\dx,]+", "", done.err)  # as --profile takes it
        assert not re.search(
            r"\b[a-z_]+=|[(:] ?None\b|\bTrue\b|\w\(.*\)\.|\w\.\w+\(|LossSpec", said
        ), said
