"""A run that was killed at any moment goes on: nothing is lost, nothing counted twice."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest_cli import _ROOT, Done

from smoothl1_deploy.errors import InvalidInputError, OutputError
from smoothl1_deploy.files import is_unfinished

FILES = ("--input", "p.npy", "--target", "t.npy")
OPTIONS = (*FILES, "--journal", "j", "--per-sample", "-o", "s.npy", "--json")
PIECES = 25

#: Runs the command line in small pieces, and kills itself in the 8th of them, at a moment.
_KILLED = """
import os, signal, sys
from smoothl1_deploy.scoring import journal, output, score, shards
shards.BATCH_ELEMENTS, shards.PIECE_ELEMENTS = 4, 12
moment, number = sys.argv[1], 0

def die():
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))

def wrap(cls, name, before):
    inner = getattr(cls, name)
    def method(self, *args):
        global number
        number += 1
        if number == 8 and before:
            die()
        result = inner(self, *args)
        if number == 8:
            die()
        return result
    setattr(cls, name, method)

if moment == "before the scores":
    wrap(output.ScoreFile, "write", True)
elif moment == "between scores and journal":
    wrap(output.ScoreFile, "write", False)
elif moment == "after the journal":
    wrap(journal.Journal, "add", False)
elif moment == "within a line":
    line = journal._line
    def cut(fields):
        global number
        if "piece" not in fields:
            return line(fields)
        number += 1
        return line(fields) if number < 8 else line(fields)[:30]
    journal._line = cut
    wrap(journal.Journal, "add", False)
    number = 0
from smoothl1_deploy.cli import main
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    from smoothl1_deploy.scoring import shards

    monkeypatch.setattr(shards, "BATCH_ELEMENTS", 4)
    monkeypatch.setattr(shards, "PIECE_ELEMENTS", 12)
    rng = np.random.default_rng(0)
    for name in "pt":
        np.save(f"{name}.npy", rng.standard_normal((PIECES * 3, 4)).astype(np.float32))


def killed(moment: str, sign: str = "SIGKILL", *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _KILLED, moment, sign, "score", *(options or OPTIONS)]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def unfinished() -> list[Path]:
    return [path for path in Path().iterdir() if is_unfinished(path.name)]


def test_a_terminal_gets_a_bar_with_rate_and_time_left() -> None:
    import pty

    ours, theirs = pty.openpty()
    code = (
        "import sys, time\n"
        "from smoothl1_deploy.scoring import journal, shards\n"
        "shards.BATCH_ELEMENTS, shards.PIECE_ELEMENTS = 4, 12\n"
        "add = journal.Journal.add\n"
        "journal.Journal.add = lambda *a: (time.sleep(0.02), add(*a))\n"
        "from smoothl1_deploy.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-c", code, "score", *FILES, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment) as child:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the end of the other side
            while part := os.read(ours, 1 << 16):
                shown += part
        assert child.stdout is not None
        assert json.loads(child.stdout.read())["count"] == PIECES * 12
    os.close(ours)
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown.decode())  # without colours
    assert re.search(r"\d+%.* [\d.]+ [kM]? ?elements/s.* 0:00:0\d.* p\.npy", text), text


def whole(cli: Callable[..., Done]) -> dict[str, Any]:
    """The report of a run that was not interrupted; its scores are in whole.npy."""
    done = cli("score", *FILES, "--per-sample", "-o", "whole.npy", "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


@pytest.mark.parametrize(
    ("moment", "finished"),
    [
        ("before the scores", 7),
        ("between scores and journal", 7),
        ("within a line", 3),  # each line is written and each piece added: two counts a piece
        ("after the journal", 8),
    ],
)
def test_after_a_kill_the_same_command_goes_on(
    cli: Callable[..., Done], moment: str, finished: int
) -> None:
    expected = whole(cli)
    assert killed(moment).returncode == -signal.SIGKILL
    assert not Path("s.npy").exists() and unfinished()
    done = cli("score", *OPTIONS)
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["resumed"] == finished * 12
    assert {key: found[key] for key in ("loss", "sum", "count")} == {
        key: expected[key] for key in ("loss", "sum", "count")
    }
    assert Path("s.npy").read_bytes() == Path("whole.npy").read_bytes()
    assert not Path("j").exists() and not unfinished()


def test_ctrl_c_says_how_to_go_on(cli: Callable[..., Done]) -> None:
    expected = whole(cli)
    done = killed("after the journal", "SIGINT")
    assert done.returncode == 130
    assert done.stderr == (
        "note: interrupted with 28 % done; the same command goes on from there\n"
    )
    found = json.loads(cli("score", *OPTIONS).out)
    assert (found["loss"], found["resumed"]) == (expected["loss"], 96)


def test_without_a_cache_folder_it_goes_on_and_says_what_that_costs(
    cli: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(cli)
    Path("file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    note = (
        f"note: can't make the folder {tmp_path}/file/smoothl1-deploy/score (Not a directory), so "
        "an interrupted run begins again; give another place for the journal with --journal\n"
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
    assert (json.loads(again.out)["loss"], json.loads(again.out)["resumed"]) == (
        expected["loss"],
        0,
    )


def test_without_a_journal_option_it_is_found_by_the_request(cli: Callable[..., Done]) -> None:
    options = (*FILES, "--per-sample", "-o", "s.npy", "--json")
    killed("after the journal", "SIGKILL", *options)
    assert json.loads(cli("score", *options).out)["resumed"] == 96


@pytest.mark.parametrize("row", [0, PIECES * 3 - 1])
def test_a_file_that_changed_where_it_was_scored_is_refused(
    cli: Callable[..., Done], row: int
) -> None:
    killed("after the journal")
    array = np.load("t.npy")
    array[row, 3] += 1
    np.save("t.npy", array)
    done = cli("score", *OPTIONS)
    if row:  # not scored yet: the result is that of the file as it is now
        assert json.loads(done.out)["loss"] == whole(cli)["loss"]
        return
    assert done.code == 2
    assert "t.npy has changed since the interrupted run scored a part of it" in done.err
    assert "start again with --restart" in done.err
    assert Path("j").exists()
    assert json.loads(cli("score", *OPTIONS, "--restart").out)["resumed"] == 0


def test_a_change_that_hides_its_time_is_seen_too(cli: Callable[..., Done]) -> None:
    killed("after the journal")
    before = os.stat("t.npy")
    with open("t.npy", "r+b") as file:
        file.seek(128)
        file.write(b"\x00\x00\x00\x00")
    os.utime("t.npy", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "t.npy has changed since" in cli("score", *OPTIONS).err


def test_an_untouched_copy_is_taken_for_what_it_is(cli: Callable[..., Done]) -> None:
    killed("after the journal")
    np.save("t.npy", np.load("t.npy"))
    assert json.loads(cli("score", *OPTIONS).out)["resumed"] == 96


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--beta", "2"], "its spec was {'beta': 1.0, "),
        (["-o", "other.npy"], "its output was "),
        (["--batch", "2"], "its batch was 4, and is 2"),
    ],
)
def test_a_journal_of_another_run_is_refused(
    cli: Callable[..., Done], options: list[str], message: str
) -> None:
    killed("after the journal")
    before = Path("j").read_bytes()
    done = cli("score", *OPTIONS, *options)
    assert done.code == 2 and "the journal j is of another run: " in done.err
    assert message in done.err
    assert Path("j").read_bytes() == before


def test_rows_that_went_are_refused(cli: Callable[..., Done]) -> None:
    killed("after the journal")
    for name in "pt":
        np.save(f"{name}.npy", np.load(f"{name}.npy")[:-1])
    done = cli("score", *OPTIONS)
    assert done.code == 2 and "of another run: its shard p.npy was {" in done.err


def test_a_file_that_is_no_journal_is_left_alone(cli: Callable[..., Done]) -> None:
    Path("j").write_text("notes\n")
    done = cli("score", *OPTIONS)
    assert done.code == 2 and "j is not a journal of this version" in done.err
    assert Path("j").read_text() == "notes\n"


def test_scores_that_are_gone_are_computed_again(cli: Callable[..., Done]) -> None:
    killed("after the journal")
    unfinished()[0].unlink()
    assert json.loads(cli("score", *OPTIONS).out)["resumed"] == 0
    whole(cli)
    assert Path("s.npy").read_bytes() == Path("whole.npy").read_bytes()


def test_an_unfinished_file_of_other_scores_is_not_continued(cli: Callable[..., Done]) -> None:
    whole(cli)
    data = Path("whole.npy").read_bytes()
    killed("after the journal")
    unfinished()[0].write_bytes(data.replace(b"<f4", b"<i4"))
    assert json.loads(cli("score", *OPTIONS).out)["resumed"] == 0
    assert Path("s.npy").read_bytes() == data


def test_a_journal_that_cannot_be_written(cli: Callable[..., Done]) -> None:
    done = cli("score", *FILES, "--journal", "p.npy/j")
    assert done.code == 2 and "can't write the journal p.npy/j (" in done.err


def test_a_journal_that_is_a_folder(cli: Callable[..., Done]) -> None:
    done = cli("score", *FILES, "--journal", ".")
    assert done.code == 2 and "it is a folder, a pipe or a device; give a file" in done.err


def test_a_journal_with_a_name_that_is_too_long(cli: Callable[..., Done]) -> None:
    done = cli("score", *FILES, "--journal", "x" * 300)
    assert done.code == 2 and "(File name too long); give another place with --journal" in done.err


def test_a_damaged_line_ends_what_is_believed(cli: Callable[..., Done]) -> None:
    expected = whole(cli)
    killed("after the journal")
    lines = Path("j").read_bytes().splitlines(keepends=True)
    lines[4] = lines[4].replace(b'"piece":2', b'"piece":9')
    Path("j").write_bytes(b"".join(lines))
    found = json.loads(cli("score", *OPTIONS).out)
    assert (found["loss"], found["resumed"]) == (expected["loss"], 24)


def test_two_runs_at_once_are_refused(cli: Callable[..., Done]) -> None:
    with open("j", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = cli("score", *OPTIONS)
    assert done.code == 2 and "another process works with the journal j;" in done.err


def test_a_file_that_changes_under_the_run_is_refused(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    from smoothl1_deploy.scoring.journal import Journal

    add = Journal.add

    def touched(self: Journal, result: Any) -> None:
        if result.piece == 5:
            os.utime("p.npy")
        add(self, result)

    monkeypatch.setattr(Journal, "add", touched)
    done = cli("score", *OPTIONS)
    assert done.code == 2 and "p.npy has changed while it was scored" in done.err


def test_of_two_runs_into_one_file_the_one_that_ends_well_leaves_its_own_scores(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    from smoothl1_deploy.scoring.journal import Journal

    whole(cli)
    add = Journal.add

    def crossed(self: Journal, result: Any) -> None:
        add(self, result)
        if str(self.path) == "first" and result.piece == 5:
            options = ("--per-sample", "-o", "s.npy", "--journal", "second")
            assert cli("score", *FILES, *options).code == 0
            raise InvalidInputError("the first run fails")

    monkeypatch.setattr(Journal, "add", crossed)
    options = ("--per-sample", "-o", "s.npy", "--journal", "first", "--beta", "2")
    assert cli("score", *FILES, *options).code == 2
    assert Path("s.npy").read_bytes() == Path("whole.npy").read_bytes()
    assert len(unfinished()) == 1 and Path("first").exists()  # to go on with


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_scores_go_through_a_link_and_keep_the_permissions(
    cli: Callable[..., Done], suffix: str
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    Path("deep").mkdir()
    Path("deep/real").touch(mode=0o600)
    os.symlink("deep/real", f"s{suffix}")
    assert cli("score", *FILES, "--per-sample", "-o", f"s{suffix}").code == 0
    assert os.readlink(f"s{suffix}") == "deep/real" and os.listdir("deep") == ["real"]
    assert os.stat("deep/real").st_mode & 0o777 == 0o600 and os.stat("deep/real").st_size > 128


def test_scores_can_be_piped(cli: Callable[..., Done]) -> None:
    whole(cli)
    os.mkfifo("s.npy")
    with subprocess.Popen(["cat", "s.npy"], stdout=subprocess.PIPE) as reader:
        assert cli("score", *OPTIONS).code == 0
        assert reader.communicate(timeout=60)[0] == Path("whole.npy").read_bytes()
    assert not unfinished() and not Path("j").exists()


def test_a_file_beside_the_scores_or_the_journal_is_left_alone(cli: Callable[..., Done]) -> None:
    Path("secret").write_text("of somebody else")
    others = ("j.lock", ".s.npy.part", ".s.npy.whole")
    for name in others:
        os.symlink("secret", name)
    assert cli("score", *OPTIONS).code == 0
    assert Path("secret").read_text() == "of somebody else"
    assert all(Path(name).is_symlink() for name in others)


def test_a_journal_that_a_kill_has_begun_is_begun_again(cli: Callable[..., Done]) -> None:
    killed("after the journal")
    data = Path("j").read_bytes()
    first = data.index(b"\n") + 1
    for size in (0, 20, first, first + 20):
        Path("j").write_bytes(data[:size])
        assert json.loads(cli("score", *OPTIONS).out)["resumed"] == 0
        assert not Path("j").exists()


def test_what_was_done_before_a_failure_is_said_to_be_kept(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    from smoothl1_deploy.scoring.journal import Journal

    add = Journal.add

    def full(self: Journal, result: Any) -> None:
        if result.piece == 5:
            raise OutputError("can't write the journal j: No space left on device")
        add(self, result)

    monkeypatch.setattr(Journal, "add", full)
    done = cli("score", *OPTIONS)
    assert done.code == 2 and "error: can't write the journal j: " in done.err
    assert "note: 20 % are done and kept; the same command goes on from there" in done.err
