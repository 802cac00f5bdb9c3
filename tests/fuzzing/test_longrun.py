"""The long run, small: and that it sees what grows and what is wrong."""

from __future__ import annotations

import mmap
import os

import child
import pytest

from fuzzing import longrun

LICENSE = child.ROOT / "LICENSE"


def test_ten_thousand_calls_and_two_hundred_sessions_are_flat() -> None:
    done = child.run("-m", "fuzzing.longrun", "--calls", 10_000, "--sessions", 200)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout
    assert lines[0].startswith("10,000 run calls, ") and lines[0].endswith("; flat")
    assert lines[1].startswith("200 session opens, ") and lines[1].endswith("; flat")
    assert lines[2] == "64 threads on one runner, 960 calls: 0 wrong answers"
    assert lines[-1] == "long run: all flat, all right"


def test_memory_and_handles_that_grow_are_seen(capsys: pytest.CaptureFixture[str]) -> None:
    kept: list[mmap.mmap] = []
    opened: list[int] = []

    def leak(number: int) -> None:
        # Pages of its own: malloc may have as much in hand from the tests before this one.
        kept.append(mmap.mmap(-1, 1 << 20))
        kept[-1].write(bytes(1 << 20))

    assert not longrun._measured("leaks", 200, leak)
    assert not longrun._measured("handles", 200, lambda number: opened.append(os.open(LICENSE, 0)))
    assert longrun._measured("nothing", 200, lambda number: None)
    assert capsys.readouterr().out.count("GROWN") == 2
    for file in opened:
        os.close(file)


def test_wrong_answers_of_threads_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        def run(self, input: object, target: object) -> dict[str, float]:
            return {"loss": 7.0}

    monkeypatch.setattr(longrun, "_open", lambda spec: Wrong())
    assert not longrun.run_threads(4, 2)
