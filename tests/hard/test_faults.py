"""Faults under a running command: nothing lost, nothing half-written, and the next run recovers."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import child
import numpy as np
import onnx
import pytest
from security_page import Table

from smoothl1_deploy import LossSpec, build_engine, export
from smoothl1_deploy._files import write_atomic
from smoothl1_deploy.cli import main
from smoothl1_deploy.errors import OutputError
from smoothl1_deploy.tensorrt._cache import EngineCache

FAULTS = Table("Faults")
#: Ends the process, as kill -9 does, at the n-th call of a function of `os`.
_KILLED = """
import os, signal, sys
from smoothl1_deploy.cli import main

name, left = sys.argv[1], int(sys.argv[2])
real = getattr(os, name)

def dying(*arguments, **options):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)

setattr(os, name, dying)
sys.exit(main(sys.argv[3:]))
"""


def _command(*arguments: object, **streams: Any) -> subprocess.CompletedProcess[str]:
    done = child.run("-m", "smoothl1_deploy", *arguments, **streams)
    assert "Traceback" not in (done.stderr or "") and "this is a bug" not in (done.stderr or "")
    return done


#: The command once with all that it likes, and then with no more of a resource than is in use.
_LIMITED = """
import resource, sys
from smoothl1_deploy.cli import main

assert main(sys.argv[1:]) == 0
pages = int(open("/proc/self/statm").read().split()[0])
most = {"NOFILE": 3, "AS": pages * resource.getpagesize() + (32 << 20)}[NAME]
resource.setrlimit(getattr(resource, f"RLIMIT_{NAME}"), (most, most))
sys.exit(main(sys.argv[1:]))
"""


def _limited(name: str, *arguments: object) -> str:
    done = child.run("-c", f"NAME = {name!r}{_LIMITED}", *arguments)
    assert done.returncode == 2 and "damaged" not in done.stderr, done.stderr
    return done.stderr


def _shards(folder: Path, count: int = 1, rows: int = 20_000) -> list[object]:
    """How to score rows that lie in some files."""
    rng = np.random.default_rng(0)
    for role in ("input", "target"):
        (folder / role).mkdir()
        for shard in range(count):
            np.save(folder / role / f"{shard}.npy", rng.normal(size=(rows, 4)).astype("f4"))
    return ["score", "--input", folder / "input", "--target", folder / "target"]


def _kill_at(function: str, count: int, *arguments: object) -> None:
    done = child.run("-c", _KILLED, function, count, *arguments)
    assert done.returncode == -signal.SIGKILL, done.stderr


def _call(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def _shown(folder: Path) -> list[str]:
    """What is there by name; a killed process may leave a hidden file behind."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@FAULTS.row("kill -9 in the middle of `export`")
def _export(folder: Path) -> None:
    path = folder / "loss.onnx"
    for point in ("fsync", "replace"):
        _kill_at(point, 0, "export", "-o", path)
        assert _shown(folder) == []
    _call("export", "-o", path)
    before = path.read_bytes()
    _kill_at("replace", 0, "export", "--beta", "7", "-o", path)
    assert path.read_bytes() == before
    _call("export", "--beta", "7", "-o", path)
    assert path.read_bytes() != before


@FAULTS.row("kill -9 in the middle of `attach`")
def _attach(folder: Path) -> None:
    path = folder / "loss.onnx"
    _call("export", "--reduction", "none", "--shape", "N,16", "-o", path)
    before = path.read_bytes()
    words = ["attach", path, "--prediction", "loss", "--target", "t", "-o", path, "--overwrite"]
    _kill_at("replace", 0, *words)
    assert path.read_bytes() == before  # it was to be written over
    _call(*words)
    assert len(onnx.load(path).graph.output) == 2


@FAULTS.row("kill -9 in the middle of `build`, and of a write to the cache", needs="tensorrt_rtx")
def _build(folder: Path) -> None:
    model, path, cache = folder / "loss.onnx", folder / "out" / "e.engine", folder / "cache"
    _call("export", "--shape", "N,16", "-o", model)
    words = ["build", model, "-o", path, "--cache-dir", cache]
    # Four files are renamed: engine and sidecar of the cache, then those that were asked for.
    for count in range(4):
        shutil.rmtree(cache, ignore_errors=True)
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir()
        _kill_at("replace", count, *words)
        _call(*words)  # the lock of the dead process holds nothing up
        assert _shown(path.parent) == ["e.engine", "e.engine.json"]
        assert all(entry.sidecar is not None for entry in EngineCache(cache).list())
        _call("inspect", path, "--json")


@FAULTS.row("kill -9 in the middle of `score`")
def _score(folder: Path) -> None:
    words = [*_shards(folder, 4, 50), "--per-sample"]
    whole, again = folder / "whole.npy", folder / "again.npy"
    _call(*words, "-o", whole)
    for count in (1, 3):
        _kill_at("fsync", count, *words, "-o", again)
        assert not again.exists()
    _call(*words, "-o", again)
    assert again.read_bytes() == whole.read_bytes()


@FAULTS.row("kill -9 in the middle of the reports of `parity`", needs="torch")
def _report(folder: Path) -> None:
    cell = "--beta 1 --reduction mean --dtype float32 --route function --backend onnx-reference"
    without = "--no-extensions --no-engines --workers 1"
    words = ["parity", "--quick", *cell.split(), *without.split(), "-o", folder]
    _kill_at("replace", 1, *words)
    assert _shown(folder) == ["report.json"]  # the first, and whole
    assert json.loads((folder / "report.json").read_text())
    _call(*words)
    assert {"report.json", "junit.xml", "report.md"} <= set(_shown(folder))


@contextlib.contextmanager
def _mounted(folder: Path, size: str) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A small file system of its own, and a function that mounts it anew with other options."""
    small = folder / "small"
    small.mkdir()

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(small)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a tmpfs can't be mounted here: {done.stderr.strip()}")

    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    mount(f"size={size}")
    try:
        yield small, lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@FAULTS.row("a full disk")
def _full(folder: Path) -> None:
    with _mounted(folder, "32k") as (small, _):
        path, filler = small / "loss.onnx", small / "filler"
        path.write_bytes(b"old")
        with contextlib.suppress(OSError):
            filler.write_bytes(bytes(64 << 10))
        with pytest.raises(OutputError, match=r"can't write .*: No space left on device; choose"):
            write_atomic(path, bytes(8192))
        assert main(["export", "-o", str(path)]) == 2
        assert path.read_bytes() == b"old"
        assert sorted(os.listdir(small)) == ["filler", "loss.onnx"]
        filler.unlink()
        _call("export", "-o", path)
        onnx.load(path)


@FAULTS.row("a full disk under `score -o`")
def _full_scores(folder: Path) -> None:
    """There is room for the scores of the first shard, but not for all."""
    words = [*_shards(folder, 5, 1000), "--per-sample"]
    with _mounted(folder, "16k") as (small, remount):
        path = small / "s.npy"
        done = _command(*words, "-o", path)
        assert done.returncode == 2
        assert f"error: can't write {path}: No space left on device; choose" in done.stderr
        assert os.listdir(small) == []
        remount("size=4m")
        _call(*words, "-o", path)
        assert len(np.load(path)) == 5000


@FAULTS.row("a full disk under the journal of `score`")
def _full_journal(folder: Path) -> None:
    words = _shards(folder)
    with _mounted(folder, "16k") as (small, _):
        (small / "filler").write_bytes(bytes(16 << 10))
        done = _command(*words, "--journal", small / "j")
        assert done.returncode == 2
        assert "can't write the journal" in done.stderr and "No space left" in done.stderr
        assert os.listdir(small) == ["filler"]


@FAULTS.row("a full disk under stdout")
def _full_stdout(folder: Path) -> None:
    words = _shards(folder)
    for arguments in (words, ["--version"]):
        with open("/dev/full", "wb") as full:
            done = _command(*arguments, stdout=full)
        assert done.returncode == 2
        assert done.stderr == (
            "error: can't write the result to stdout: No space left on device; send it elsewhere. "
            "Files that were asked for are written\n"
        )


@FAULTS.row("stdout or stderr that is closed")
def _closed(folder: Path) -> None:
    """The number of a closed one is the next file's, into which a library might print."""
    path = folder / "s.npy"
    words = [*_shards(folder), "--per-sample", "-o", path]
    done = _command(*words, preexec_fn=lambda: os.close(1))
    assert done.returncode == 2
    assert "can't write the result to stdout: Bad file descriptor;" in done.stderr
    assert len(np.load(path)) == 20_000  # written all the same
    assert _command("export", "--beta", "-1", preexec_fn=lambda: os.close(2)).returncode == 2
    with open("/dev/full", "wb") as full:
        assert _command("exprot", stderr=full).returncode == 2


@FAULTS.row("too many open files")
def _files(folder: Path) -> None:
    _call("export", "-o", folder / "loss.onnx")
    array = folder / "a.npy"
    np.save(array, np.ones((4, 16), np.float32))
    for command in (["score"], ["run", folder / "loss.onnx"]):
        words = [*command, "--input", array, "--target", array]
        assert "refuses more to this process (Too many open files" in _limited("NOFILE", *words)


@FAULTS.row("too little memory")
def _memory(folder: Path) -> None:
    np.save(folder / "a.npy", np.zeros(1 << 24, np.float32))
    _call("export", "-o", folder / "loss.onnx")
    words = ["run", folder / "loss.onnx", "--input", folder / "a.npy", "--target", folder / "a.npy"]
    assert "error: not enough memory for this (" in _limited("AS", *words)


@FAULTS.row("a full disk under the engine cache", needs="tensorrt_rtx")
def _full_cache(folder: Path) -> None:
    model = export(LossSpec(), shape=("N", 16))
    with _mounted(folder, "16k") as (small, remount):
        cache = EngineCache(small)
        with pytest.raises(OutputError, match="No space left on device"):
            build_engine(model, cache_dir=cache)
        assert cache.list() == ()
        remount("size=4m")
        assert not build_engine(model, cache_dir=cache).cached
        assert build_engine(model, cache_dir=cache).cached


@FAULTS.row("a limit on the size of files")
def _limit(folder: Path) -> None:
    path = folder / "loss.onnx"
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OutputError, match=r"can't write .*: File too large"):
            write_atomic(path, bytes(8192))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(folder) == ["loss.onnx"] and path.read_bytes() == b"old"


@FAULTS.row("a read-only folder")
def _read_only(folder: Path) -> None:
    with _mounted(folder, "4m") as (small, remount):
        path = small / "loss.onnx"
        _call("export", "-o", path)
        before = path.read_bytes()
        remount("ro")
        with pytest.raises(OutputError, match=r"can't write .*: Read-only file system; choose"):
            write_atomic(path, b"new")
        assert main(["export", "--beta", "7", "-o", str(path)]) == 2
        assert os.listdir(small) == ["loss.onnx"] and path.read_bytes() == before


@FAULTS.row("a read-only engine cache", needs="tensorrt_rtx")
def _read_only_cache(folder: Path) -> None:
    model = export(LossSpec(), shape=("N", 16))
    with _mounted(folder, "4m") as (small, remount):
        build_engine(model, cache_dir=small)
        remount("ro")
        assert build_engine(model, cache_dir=small).cached
        other = export(LossSpec(2.0), shape=("N", 16))
        with pytest.raises(OutputError, match=r"can't lock .*Read-only file system"):
            build_engine(other, cache_dir=small)


@FAULTS.row("no permission")
def _no_permission(folder: Path) -> None:
    path = folder / "closed" / "loss.onnx"
    path.parent.mkdir()
    _call("export", "-o", path)  # and everything is imported
    before = path.read_bytes()
    for part in (folder, *folder.parents[:3]):
        part.chmod(0o755)  # so that what is refused is this folder, not the way to it
    path.parent.chmod(0o555)
    root = os.geteuid() == 0  # whom permission bits don't stop
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(OutputError, match=r"can't write .*: Permission denied; choose"):
            write_atomic(path, b"new")
        with pytest.raises(OutputError, match=r"can't use .* as an engine cache.*Permission"):
            EngineCache(path.parent / "cache")
    finally:
        if root:
            os.seteuid(0)
    assert os.listdir(path.parent) == ["loss.onnx"] and path.read_bytes() == before


@FAULTS.row("a folder that is removed under the command")
def _removed(folder: Path) -> None:
    path = folder / "gone" / "loss.onnx"
    write_atomic(path, b"old")
    shutil.rmtree(path.parent)
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    shutil.rmtree(path.parent)
    assert main(["export", "-o", str(path)]) == 0


@FAULTS.row("an engine cache that is removed while it is open", needs="tensorrt_rtx")
def _removed_cache(folder: Path) -> None:
    model = export(LossSpec(), shape=("N", 16))
    cache = EngineCache(folder / "cache")
    build_engine(model, cache_dir=cache)
    shutil.rmtree(folder / "cache")
    assert cache.list() == () and cache.prune(0) == ()
    assert not build_engine(model, cache_dir=cache).cached
    assert build_engine(model, cache_dir=cache).cached


@FAULTS.row("a clock that goes backwards", needs="tensorrt_rtx")
def _clock(folder: Path) -> None:
    models = [export(LossSpec(beta), shape=("N", 16)) for beta in (1.0, 2.0)]
    cache = EngineCache(folder)
    engines = [build_engine(model, cache_dir=cache) for model in models]
    paths = [engine.path for engine in engines]
    assert paths[0] is not None and paths[1] is not None
    tomorrow = time.time() + 86400  # used before the clock was set back
    os.utime(paths[0], (tomorrow, tomorrow))
    unfinished = folder / "engines" / ".k.engine.0123456789abcdef"
    unfinished.write_bytes(b"half")
    os.utime(unfinished, (tomorrow, tomorrow))
    assert [entry.path for entry in cache.list()] == [paths[0], paths[1]]
    assert build_engine(models[1], cache_dir=cache).cached
    assert build_engine(models[0], cache_dir=cache).cached  # and its time is now's again
    assert paths[0].stat().st_mtime < tomorrow - 3600
    assert len(cache.prune(0)) == 2 and cache.list() == ()
    assert unfinished.exists()  # its writer may be alive: nobody can say how old the file is


_WRITER = """
import sys
from smoothl1_deploy._files import write_atomic

for _ in range(60):
    write_atomic(sys.argv[1], sys.argv[2].encode() * 100_000)
"""


@FAULTS.row("processes that write one target")
def _two(folder: Path) -> None:
    path = folder / "target"
    write_atomic(path, b"0" * 100_000)
    writers = [child.start("-c", _WRITER, path, digit) for digit in "123"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        data = path.read_bytes()
        assert len(data) == 100_000 and len(set(data)) == 1
        seen.add(data[:1])
    assert [writer.communicate() and writer.returncode for writer in writers] == [0, 0, 0]
    assert len(seen) > 1 and os.listdir(folder) == ["target"]


_BUILDER = """
import sys
from smoothl1_deploy import LossSpec, build_engine, export

engine = build_engine(export(LossSpec(), shape=("N", 16)), cache_dir=sys.argv[1])
print(engine.cached, engine.sha256)
"""


@FAULTS.row("processes that build one engine into one cache", needs="tensorrt_rtx")
def _builders(folder: Path) -> None:
    builders = [child.start("-c", _BUILDER, folder) for _ in range(2)]
    said = [builder.communicate(timeout=300)[0].split() for builder in builders]
    assert sorted(cached for cached, _ in said) == ["False", "True"]
    assert len({digest for _, digest in said}) == 1


def test_each_row_has_its_fault_and_each_fault_its_row() -> None:
    assert set(FAULTS.rows) == set(FAULTS.trials)


@pytest.mark.parametrize("title", FAULTS.trials)
def test_the_fault(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".user-cache"))
    FAULTS.trials[title](tmp_path)
