"""A run that was killed at any moment goes on: nothing is lost, nothing counted twice."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest_cli import _ROOT, Done
from rich.console import Console

from smoothl1_deploy._files import is_unfinished
from smoothl1_deploy.errors import InvalidInputError, OutputError
from smoothl1_deploy.scoring import _shards as shards
from smoothl1_deploy.scoring._journal import Journal
from smoothl1_deploy.scoring._scorer import TaskResult

Cli = Callable[..., Done]
Report = Callable[..., Any]
FILES = ("--input", "p.npy", "--target", "t.npy")
OPTIONS = (*FILES, "--journal", "j", "--per-sample", "-o", "s.npy", "--json")
TASKS = 25

#: Runs the command line in small tasks, and kills itself in the 8th of them, at a moment.
_KILLED = """
import os, signal, sys
from smoothl1_deploy.cli import main
from smoothl1_deploy.scoring import _journal as journal, _output as output, _shards as shards
shards.BATCH_ELEMENTS, shards.TASK_ELEMENTS = 4, 12
moment, sign, *arguments = sys.argv[1:]
cls, name = {
    "before the scores": (output.ScoreFile, "write"),
    "between scores and journal": (journal.Journal, "add"),
    "after the journal": (journal.Journal, "add"),
}[moment]
inner, number = getattr(cls, name), 0

def method(self, *given):
    global number
    number += 1
    if moment == "after the journal":
        inner(self, *given)
    if number == 8:
        os.kill(os.getpid(), getattr(signal, sign))
    if moment != "after the journal":
        inner(self, *given)

setattr(cls, name, method)
sys.exit(main(arguments))
"""


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BATCH_ELEMENTS", 4)
    monkeypatch.setattr(shards, "TASK_ELEMENTS", 12)
    rng = np.random.default_rng(0)
    for name in "pt":
        np.save(f"{name}.npy", rng.standard_normal((TASKS * 3, 4)).astype(np.float32))


def killed(moment: str, sign: str = "SIGKILL", *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _KILLED, moment, sign, "score", *(options or OPTIONS)]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def unfinished() -> list[Path]:
    return [path for path in Path().iterdir() if is_unfinished(path.name)]


def interrupted(cli: Cli) -> None:
    """After eight tasks, in this process: what is left is what a kill leaves."""
    add = Journal.add

    def stop(self: Journal, result: TaskResult) -> None:
        if result.task == 8:
            raise KeyboardInterrupt
        add(self, result)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", stop)
        assert cli("score", *OPTIONS).code == 130


def test_a_terminal_gets_a_bar_with_rate_and_time_left(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, shown = Journal.add, io.StringIO()
    monkeypatch.setattr(Journal, "add", lambda *given: (time.sleep(0.02), add(*given)))
    terminal = Console(file=shown, force_terminal=True, width=100)
    monkeypatch.setattr("smoothl1_deploy.cli._score.progress_console", lambda: terminal)
    assert cli("score", *FILES, "--json").code == 0
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown.getvalue())  # without colours
    assert re.search(r"\d+%.* [\d.]+ [kM]? ?elements/s.* 0:00:0\d.* p\.npy", text), text


@pytest.fixture
def whole(score: Report) -> Any:
    """The report of a run that was not interrupted; its scores are in whole.npy."""
    return score("--per-sample", "-o", "whole.npy")


@pytest.mark.parametrize(
    ("moment", "finished"),
    [
        ("before the scores", 7),
        ("between scores and journal", 7),
        ("after the journal", 8),
    ],
)
def test_after_a_kill_the_same_command_goes_on(
    cli: Cli, whole: Any, moment: str, finished: int
) -> None:
    assert killed(moment).returncode == -signal.SIGKILL
    assert not Path("s.npy").exists() and unfinished()
    done = cli("score", *OPTIONS)
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["resumed"] == finished * 12
    assert {key: found[key] for key in ("loss", "sum", "count")} == {
        key: whole[key] for key in ("loss", "sum", "count")
    }
    assert Path("s.npy").read_bytes() == Path("whole.npy").read_bytes()
    assert not Path("j").exists() and not unfinished()


def test_ctrl_c_says_how_to_go_on(score: Report, whole: Any) -> None:
    """The journal, of which nothing is said, is found by the request."""
    options = (*FILES, "--per-sample", "-o", "s.npy", "--json")
    done = killed("after the journal", "SIGINT", *options)
    assert done.returncode == 130
    assert done.stderr == (
        "note: interrupted with 28 % done; the same command goes on from there\n"
    )
    found = score("--per-sample", "-o", "s.npy")
    assert (found["loss"], found["resumed"]) == (whole["loss"], 96)


def test_without_a_cache_folder_it_goes_on_and_says_what_that_costs(
    cli: Cli, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    note = (
        "note: an interrupted run begins again: can't make the folder "
        f"{tmp_path}/file/smoothl1-deploy/score: Not a directory; choose another with --journal\n"
    )
    options = (*FILES, "--per-sample", "-o", "s.npy", "--json")
    done = killed("after the journal", "SIGINT", *options)
    assert done.returncode == 130
    assert done.stderr == (
        f"{note}note: interrupted with 28 % done; the same command begins again\n"
    )
    left = {path.name for path in Path().iterdir()}
    assert left == {"p.npy", "t.npy", "whole.npy", "file", "user-cache"}
    again = cli("score", *options)
    assert (again.code, again.err) == (0, note)
    found = json.loads(again.out)
    assert (found["loss"], found["resumed"]) == (whole["loss"], 0)


def edit(row: int, hidden: bool = False) -> None:
    """Another number in a row of the target; its time of change can be set back, not all of it."""
    before = os.stat("t.npy")
    array = np.load("t.npy")
    array[row, 3] += 1
    np.save("t.npy", array)
    if hidden:
        os.utime("t.npy", ns=(before.st_atime_ns, before.st_mtime_ns))


def shorten() -> None:
    for name in "pt":
        np.save(f"{name}.npy", np.load(f"{name}.npy")[:-1])


def journal(change: Callable[[list[bytes]], list[bytes]]) -> None:
    Path("j").write_bytes(b"".join(change(Path("j").read_bytes().splitlines(keepends=True))))


def forge(lines: list[bytes]) -> list[bytes]:
    lines[4] = lines[4].replace(b'"task":2', b'"task":9')
    return lines


def other_scores() -> None:
    path = unfinished()[0]
    path.write_bytes(path.read_bytes().replace(b"<f4", b"<i4"))


#: What happens between an interrupted run and the next: the elements that need not be scored
#: again, or why it is refused.
MEANWHILE: dict[str, tuple[Callable[[], object], int | str]] = {
    "nothing": (lambda: None, 96),
    "an untouched copy": (lambda: np.save("t.npy", np.load("t.npy")), 96),
    "a change where nothing was scored yet": (lambda: edit(TASKS * 3 - 1), 96),
    "a change where it was scored": (
        lambda: edit(0),
        "t.npy has changed since the interrupted run scored a part of it (journal j); restore it, "
        "or start again with --restart",
    ),
    "a change that hides its time": (lambda: edit(0, hidden=True), "t.npy has changed since"),
    "rows that went": (shorten, "the journal j is of another run: its shard p.npy was {"),
    "scores that went": (lambda: unfinished()[0].unlink(), 0),
    "scores of another kind": (other_scores, 0),
    "a damaged line, after which nothing is believed": (lambda: journal(forge), 24),
    "a line cut off": (lambda: journal(lambda lines: [*lines[:-1], lines[-1][:30]]), 84),
    "a journal of one line": (lambda: journal(lambda lines: lines[:1]), 0),
    "a journal that is hardly begun": (lambda: journal(lambda lines: [lines[0][:20]]), 0),
    "a journal without a byte": (lambda: journal(lambda lines: []), 0),
    "other notes": (lambda: Path("j").write_text("notes\n"), "j is not a journal of this version"),
}


@pytest.mark.parametrize("what", MEANWHILE)
def test_what_happens_meanwhile_is_seen(cli: Cli, score: Report, what: str) -> None:
    happen, expected = MEANWHILE[what]
    interrupted(cli)
    happen()
    before = Path("j").read_bytes()
    done = cli("score", *OPTIONS)
    if isinstance(expected, str):
        assert done.code == 2 and expected in done.err
        assert Path("j").read_bytes() == before
        return
    assert json.loads(done.out)["resumed"] == expected
    score("--per-sample", "-o", "whole.npy")
    assert Path("s.npy").read_bytes() == Path("whole.npy").read_bytes()
    assert not Path("j").exists()


def test_restart_throws_the_old_work_away(cli: Cli) -> None:
    interrupted(cli)
    edit(0)
    assert json.loads(cli("score", *OPTIONS, "--restart").out)["resumed"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--beta", "2"], "its spec was {'beta': 1.0, "),
        (["-o", "other.npy"], "its output was "),
        (["--batch", "2"], "its batch was 1, and is 2"),
    ],
)
def test_a_journal_of_another_run_is_refused(cli: Cli, options: list[str], message: str) -> None:
    interrupted(cli)
    before = Path("j").read_bytes()
    done = cli("score", *OPTIONS, *options)
    assert done.code == 2 and "the journal j is of another run: " in done.err
    assert message in done.err
    assert Path("j").read_bytes() == before


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("p.npy/j", "can't write the journal p.npy/j: "),
        (".", "it is a folder, a pipe or a device; give a file"),
        ("x" * 300, ": File name too long; give another place with --journal"),
    ],
)
def test_a_journal_that_can_not_be_is_refused(cli: Cli, path: str, message: str) -> None:
    done = cli("score", *FILES, "--journal", path)
    assert done.code == 2 and message in done.err


def test_two_runs_at_once_on_one_journal_are_refused(cli: Cli) -> None:
    with open("j", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = cli("score", *OPTIONS)
    assert done.code == 2 and "another process works with the journal j;" in done.err


@pytest.fixture
def at_the_sixth(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Journal], object]], None]:
    """Does something when the sixth task is finished, before it is in the journal."""
    add = Journal.add

    def does(something: Callable[[Journal], object]) -> None:
        def after(self: Journal, result: TaskResult) -> None:
            if result.task == 5:
                something(self)
            add(self, result)

        monkeypatch.setattr(Journal, "add", after)

    return does


def test_a_file_that_changes_under_the_run_is_refused(
    cli: Cli, at_the_sixth: Callable[..., None]
) -> None:
    at_the_sixth(lambda journal: os.utime("p.npy"))
    done = cli("score", *OPTIONS)
    assert done.code == 2 and "p.npy has changed while it was scored" in done.err


def test_what_was_done_before_a_failure_is_said_to_be_kept(
    cli: Cli, at_the_sixth: Callable[..., None]
) -> None:
    def full(journal: Journal) -> None:
        raise OutputError("can't write the journal j: No space left on device")

    at_the_sixth(full)
    done = cli("score", *OPTIONS)
    assert done.code == 2 and "error: can't write the journal j: " in done.err
    assert "note: 20 % are done and kept; the same command goes on from there" in done.err


def test_of_two_runs_into_one_file_the_one_that_ends_well_leaves_its_own_scores(
    cli: Cli, whole: Any, at_the_sixth: Callable[..., None]
) -> None:
    options = (*FILES, "--per-sample", "-o", "s.npy", "--journal")

    def cross(journal: Journal) -> None:
        if str(journal.path) == "first":
            assert cli("score", *options, "second").code == 0
            raise InvalidInputError("the first run fails")

    at_the_sixth(cross)
    assert cli("score", *options, "first", "--beta", "2").code == 2
    assert Path("s.npy").read_bytes() == Path("whole.npy").read_bytes()
    assert len(unfinished()) == 1 and Path("first").exists()  # to go on with


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_scores_go_through_a_link_and_keep_the_permissions(cli: Cli, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    Path("deep").mkdir()
    Path("deep/real").touch(mode=0o600)
    os.symlink("deep/real", f"s{suffix}")
    assert cli("score", *FILES, "--per-sample", "-o", f"s{suffix}").code == 0
    assert os.readlink(f"s{suffix}") == "deep/real" and os.listdir("deep") == ["real"]
    assert os.stat("deep/real").st_mode & 0o777 == 0o600 and os.stat("deep/real").st_size > 128


def test_scores_can_be_piped(cli: Cli, whole: Any) -> None:
    os.mkfifo("s.npy")
    with subprocess.Popen(["cat", "s.npy"], stdout=subprocess.PIPE) as reader:
        assert cli("score", *OPTIONS).code == 0
        assert reader.communicate(timeout=60)[0] == Path("whole.npy").read_bytes()
    assert not unfinished() and not Path("j").exists()


def test_a_file_beside_the_scores_or_the_journal_is_left_alone(cli: Cli) -> None:
    Path("secret").write_text("of somebody else")
    others = ("j.lock", ".s.npy.part", ".s.npy.whole")
    for name in others:
        os.symlink("secret", name)
    assert cli("score", *OPTIONS).code == 0
    assert Path("secret").read_text() == "of somebody else"
    assert all(Path(name).is_symlink() for name in others)
