"""Every write goes through `files`: to what it is meant for, and to nothing else."""

from __future__ import annotations

import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import child
import pytest

from smoothl1_deploy import _files as files
from smoothl1_deploy._files import (
    check_apart,
    check_writable,
    is_unfinished,
    replacing,
    write_atomic,
)
from smoothl1_deploy.errors import OutputError


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_pipe_gets_the_bytes_and_stays_a_pipe() -> None:
    os.mkfifo("pipe")
    got = list[bytes]()
    reader = threading.Thread(target=lambda: got.append(Path("pipe").read_bytes()))
    reader.start()
    write_atomic("pipe", b"data")
    reader.join(60)
    assert got == [b"data"]
    assert stat.S_ISFIFO(os.stat("pipe").st_mode) and os.listdir() == ["pipe"]


def test_a_device_behind_a_link_is_written_to_and_not_replaced() -> None:
    os.symlink("/dev/null", "out.onnx")
    write_atomic("out.onnx", b"data")
    assert os.readlink("out.onnx") == "/dev/null" and Path("/dev/null").is_char_device()


_STDOUT = """
import sys
from smoothl1_deploy._files import write_atomic
write_atomic(sys.argv[1], b"one ")
write_atomic(sys.argv[1], b"two")
"""


@pytest.mark.parametrize("name", ["/dev/fd/1", "/proc/self/fd/1", "link"])
def test_stdout_is_written_to_where_it_is_even_in_a_file(name: str) -> None:
    """Opened by its path, the file behind it would be written over from its start."""
    os.symlink("/dev/stdout", "link")
    with open("out", "wb") as file:
        file.write(b"zero ")
        file.flush()
        child.run("-c", _STDOUT, name, stdout=file, check=True)
    assert Path("out").read_bytes() == b"zero one two"
    assert Path("link").is_symlink() and Path("/dev/stdout").is_symlink()


def test_a_link_is_followed_and_stays() -> None:
    os.mkdir("deep")
    os.symlink("deep/file", "link")
    for content in (b"new", b"newer"):
        assert write_atomic("link", content) == Path("link")
        assert os.readlink("link") == "deep/file" and Path("deep/file").read_bytes() == content
        assert os.listdir("deep") == ["file"]


def test_a_file_keeps_its_permissions_and_a_new_one_has_those_of_the_umask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, mask = os.umask(0o027), os.umask
    # Two threads that set it and set it back can leave the process with the wrong one.
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask belongs to the process"))
    try:
        for name, mode in (("a", 0o600), ("b", 0o664)):
            Path(name).write_bytes(b"old")
            os.chmod(name, mode)
        seen = []
        for name in "abc":
            with replacing(name) as file:
                file.write(b"new")
                seen.append(stat.S_IMODE(os.fstat(file.fileno()).st_mode))
    finally:
        mask(before)
    # While it is written, too: what is for the owner alone is at no moment for others.
    assert seen == [stat.S_IMODE(os.stat(name).st_mode) for name in "abc"] == [0o600, 0o664, 0o640]


def test_a_name_may_be_as_long_as_the_file_system_takes() -> None:
    for name in ("x" * 255, "é" * 127):
        write_atomic(name, b"data")
    assert len(os.listdir()) == 2


def test_names_of_unfinished_files_are_never_those_of_others() -> None:
    names = set[str]()
    for _ in range(3):
        with replacing("loss.onnx"):
            names |= set(os.listdir()) - {"loss.onnx"}
    assert len(names) == 3 and all(map(is_unfinished, names))
    others = [".loss.onnx.part", "loss.onnx", ".bashrc", "a.0123456789abcdef"]
    assert not any(map(is_unfinished, others))


def test_what_somebody_planted_under_the_name_of_an_unfinished_file_is_not_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(files, "token", lambda: "0" * 16)
    Path("victim").write_bytes(b"own")
    for plant in (os.symlink, os.link):
        plant("victim", files.unfinished(Path("loss.onnx")))
        with pytest.raises(OutputError, match="File exists"):
            write_atomic("loss.onnx", b"new")
        assert Path("victim").read_bytes() == b"own" and not Path("loss.onnx").exists()
        os.unlink(files.unfinished(Path("loss.onnx")))


def test_what_fails_in_the_middle_leaves_the_file_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_atomic("a", b"old")
    with pytest.raises(ZeroDivisionError), replacing("a") as file:
        file.write(b"new")
        raise ZeroDivisionError
    full = OSError(28, "No space left on device")
    for step in ("fsync", "replace"):
        for error, seen in ((KeyboardInterrupt(), KeyboardInterrupt), (full, OutputError)):

            def fail(*args: object, error: BaseException = error) -> None:
                assert len(os.listdir()) == 2  # the new content is beside the target
                assert Path("a").read_bytes() == b"old"
                raise error

            with monkeypatch.context() as patch, pytest.raises(seen):
                patch.setattr(os, step, fail)
                write_atomic("a", b"new")
            assert Path("a").read_bytes() == b"old" and os.listdir() == ["a"]


def test_writers_at_once_leave_one_content_whole_and_nothing_beside_it() -> None:
    contents = [bytes([i]) * 5000 for i in range(8)]

    def write(data: bytes) -> None:
        for _ in range(25):
            write_atomic("a", data)

    with ThreadPoolExecutor(len(contents)) as pool:
        list(pool.map(write, contents))
    assert Path("a").read_bytes() in contents and os.listdir() == ["a"]


def test_a_place_where_no_file_can_be_is_refused() -> None:
    Path("file").touch()
    os.mkdir("folder")
    where = "choose a file in a folder that you may write to"
    for path, reason in (
        ("file/a", f"Not a directory; {where}"),
        ("file/no/a", f"Not a directory; {where}"),
        ("folder", "it is a folder or a disk"),
    ):
        for trial in (check_writable, lambda path: write_atomic(path, b"one")):
            with pytest.raises(OutputError, match=f"^can't write {path}: {reason}"):
                trial(path)
    assert sorted(os.listdir()) == ["file", "folder"]


def test_folders_on_the_way_are_made_and_go_again_with_a_file_that_is_not_written() -> None:
    with pytest.raises(ZeroDivisionError), replacing("a/b/c") as file:
        assert file.write(b"data") and os.listdir("a") == ["b"]
        raise ZeroDivisionError
    check_writable("a/b/c")
    assert os.listdir() == []
    write_atomic("a/b/c", b"data")
    with pytest.raises(ZeroDivisionError), replacing("a/b/d/e"):
        raise ZeroDivisionError
    assert os.listdir("a/b") == ["c"]


def test_a_trial_leaves_a_file_as_it_is_and_sends_nothing_into_a_pipe() -> None:
    write_atomic("a", b"old")
    check_writable("a")
    assert Path("a").read_bytes() == b"old" and os.listdir() == ["a"]
    os.mkfifo("pipe")
    check_writable("pipe")  # it would wait for a reader


def test_a_reader_that_has_stopped_is_told_as_that() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        write_atomic(f"/dev/fd/{writing}", b"data")
    os.close(writing)


def test_a_disk_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("sda").touch()
    monkeypatch.setattr(stat, "S_ISBLK", lambda mode: True)
    with pytest.raises(OutputError, match="it is a folder or a disk"):
        write_atomic("sda", b"data")


def test_a_file_that_is_read_is_not_written_under_whatever_name() -> None:
    Path("a").touch()
    os.link("a", "hard")
    os.symlink("a", "soft")
    os.symlink("new", "to-new")
    for read, written in (("a", "hard"), ("soft", "a"), ("new", "to-new")):
        with pytest.raises(OutputError, match=f"^-o {written} and --input {read} are one file"):
            check_apart([("-o", Path(written))], [("--input", Path(read)), ("--weight", None)])
    with pytest.raises(OutputError, match="^--journal soft and -o a are one file"):
        check_apart([("-o", Path("a")), ("--journal", Path("soft"))], [])
    check_apart([("-o", Path("a")), ("--journal", Path("b"))], [("--input", Path("new"))])
