"""The benchmark runs, and shows what is wrong as well as what is slow. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from smoothl1_deploy import LossSpec
from smoothl1_deploy.bench import contestants as module
from smoothl1_deploy.bench import measure as measuring
from smoothl1_deploy.bench.contestants import AHEAD, BARE, COMPILED, OURS, PLAIN, Contestant
from smoothl1_deploy.bench.measure import READ, measure
from smoothl1_deploy.bench.memory import peak_ratio
from smoothl1_deploy.bench.report import append_rows, bench_table, plot_png
from smoothl1_deploy.bench.timing import Timing, interleaved
from smoothl1_deploy.cli import main
from smoothl1_deploy.errors import OutputError

WITHOUT = (COMPILED, AHEAD, "openvino, ours", "openvino, plain")


def test_everyone_gets_as_many_turns() -> None:
    seen: list[str] = []
    first, second = interleaved(
        [lambda: seen.append("a"), lambda: seen.append("b")], rounds=3, turn=0, most=5
    )
    assert first.calls == second.calls == 3
    assert seen == ["a", "a", "b", "b"] * 3  # one of two is for the caches


def test_quartiles() -> None:
    timing = Timing.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (timing.q1, timing.median, timing.q3, timing.calls) == (2, 3, 4, 5)


@pytest.mark.parametrize(
    "spec",
    [
        LossSpec(),
        LossSpec(0.3, "none"),
        LossSpec(0.3, "mean", "float16"),
        LossSpec(0.5, "sum", "float64"),
        LossSpec(per_sample=True),
    ],
    ids=lambda spec: spec.name,
)
def test_rows_are_right_and_strict_json(spec: LossSpec, tmp_path: Path) -> None:
    rows, missing = measure(spec, (64, 16), threads=1, rounds=1, turn=0, without=WITHOUT)
    names = [row.contestant for row in rows]
    assert names[:2] == [OURS, BARE] and names[-1] == READ
    assert ("torch.nn.SmoothL1Loss has no loss per sample" in missing.values()) == spec.per_sample
    allowed = {"float16": 2e-3, "float32": 3e-7, "float64": 1e-15}[spec.dtype]
    for row in rows:
        assert row.contestant == READ or (row.error is not None and row.error <= allowed)
        assert set(row.speedup) == set(names) - {row.contestant}
        ratio = {r.contestant: r.timing.median / row.timing.median for r in rows}
        assert all(row.speedup[name] == ratio[name] for name in row.speedup)
    path = tmp_path / "bench.jsonl"
    append_rows(path, [row.to_dict() for row in rows])
    append_rows(path, [rows[0].to_dict()])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == len(rows) + 1
    assert lines[0] == lines[-1]
    assert LossSpec.from_dict(lines[0]["spec"]) == spec
    assert bench_table(rows).row_count == len(rows)
    assert plot_png(rows).startswith(b"\x89PNG")


def test_a_fast_wrong_answer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def crowd(*_: object) -> tuple[list[Contestant], dict[str, str]]:
        def broken(input: object, target: object) -> None:
            raise ValueError("out of order\nand more")

        return [
            Contestant("wrong", lambda a, b: np.float32(0.25)),
            Contestant("lost", lambda a, b: np.float32(np.nan)),
            Contestant("vector", lambda a, b: np.zeros(3, np.float32)),
            Contestant("broken", broken),
        ], {}

    monkeypatch.setattr(measuring, "contestants", crowd)
    rows, missing = measure(LossSpec(), (64, 16), threads=1, rounds=1, turn=0)
    errors = {row.contestant: row.error for row in rows}
    assert 0.1 < (errors["wrong"] or 0) < 1
    assert errors["lost"] == errors["vector"] == float("inf")
    assert missing == {"broken": "it fails: ValueError: out of order"}
    assert json.dumps([row.to_dict() for row in rows], allow_nan=False).count('"inf"') == 2


def test_a_sum_that_drifts_is_seen() -> None:
    rows, _ = measure(
        LossSpec(), (1 << 16, 16), threads=1, kind="constant", rounds=1, turn=0, without=WITHOUT
    )
    errors = {row.contestant: row.error for row in rows}
    assert max(errors[OURS] or 0, errors[BARE] or 0) <= 2e-7 < 1e-5 < (errors[PLAIN] or 0)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    without = [*WITHOUT[2:], PLAIN, OURS, BARE, "load().run"]
    found, missing = module.contestants(LossSpec(), 16, 1, without)
    assert [who.name for who in found] == ["torch eager"]
    assert missing == {n: f"{n} needs a C++ compiler: install g++" for n in (COMPILED, AHEAD)}


def test_peak_memory() -> None:
    ours = peak_ratio(OURS, 1 << 22, 1)
    assert ours is None or 1 <= ours <= 1.05
    assert peak_ratio("nobody", 1 << 10, 1) is None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "bench"
    assert main(["bench", "--quick", "--size", "1024", "--threads", "1", "-o", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "2^10 elements" in shown
    rows = [json.loads(line) for line in (folder / "bench.jsonl").read_text().splitlines()]
    assert {"load().run", PLAIN, "torch eager", READ} <= {row["contestant"] for row in rows}
    assert all(row["environment"]["packages"]["onnxruntime"] and row["date"] for row in rows)
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--size", "100"], "--size is the number of elements, a multiple of 16, got 100"),
        (["--per-sample", "64"], "--per-sample is rows x columns, such as 64x16, got '64'"),
        (["--beta", "-1"], "beta must not be negative"),
    ],
)
def test_bad_usage(
    arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "-o", str(tmp_path), *arguments]) == 2
    assert text in capsys.readouterr().err


def test_a_file_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="choose another folder with -o"):
        append_rows(tmp_path, [{}])


@pytest.mark.parametrize("load", [0.9, 1.1])
def test_a_loaded_machine_is_told_beside_the_result(
    load: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    assert main(["bench", "--quick", "--size", "1024", "--threads", "1", "-o", str(tmp_path)]) == 0
    assert ("the load was 1.1 at the start" in capsys.readouterr().err) == (load > 1)
