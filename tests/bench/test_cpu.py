"""The benchmark on the CPU shows what is wrong as well as what is slow. No time is asserted."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from smoothl1_deploy import LossSpec
from smoothl1_deploy._environment import environment
from smoothl1_deploy.bench import _cpu as cpu
from smoothl1_deploy.bench._cpu import AHEAD, BARE, OURS, measure, peak_ratio
from smoothl1_deploy.bench._rows import (
    COMPILED,
    EAGER,
    PLAIN,
    READ,
    Row,
    append_rows,
    plot_png,
    row_tables,
)
from smoothl1_deploy.bench._timing import Timing, in_turn
from smoothl1_deploy.cli import main
from smoothl1_deploy.errors import OutputError

WITHOUT = (COMPILED, AHEAD, "openvino, ours", "openvino, plain")
QUICK = {"threads": 1, "rounds": 1, "turn": 0, "without": WITHOUT}


def test_everyone_gets_as_many_turns() -> None:
    seen: list[str] = []
    first, second = in_turn(
        [lambda: seen.append("a"), lambda: seen.append("b")], rounds=3, turn=0, most=5
    )
    assert first.samples == second.samples == 3
    assert seen == ["a", "a", "b", "b"] * 3  # one of two is for the caches


def test_everyone_is_right_and_has_a_row() -> None:
    for spec, allowed, written in (
        (LossSpec(), 3e-7, 1),
        (LossSpec(0.3, "none"), 3e-7, 1024),
        (LossSpec(0.3, "mean", "float16"), 2e-3, 1),
        (LossSpec(0.5, "sum", "float64"), 1e-15, 1),
        (LossSpec(per_sample=True), 3e-7, 64),
    ):
        rows, missing = measure(spec, (64, 16), **QUICK)
        names = [row.contestant for row in rows]
        assert names[:2] == [OURS, BARE] and names[-1] == READ
        without = "torch.nn.SmoothL1Loss has no loss per sample" in missing.values()
        assert without == spec.per_sample
        for row in rows:
            assert row.timing is not None and row.timing.median > 0
            right = row.error is not None and row.error <= allowed
            assert row.contestant == READ or right, (spec, row)
        item = np.dtype(spec.dtype).itemsize
        assert rows[0].bytes == (2048 + written) * item and rows[-1].bytes == 2048 * item


def test_the_table_the_file_and_the_plot(tmp_path: Path) -> None:
    rows, _ = measure(LossSpec(), (64, 16), **QUICK)
    (shown,) = row_tables(rows)
    named = "smooth_l1_loss_beta_1.0_mean_float32, in turn, 2^10 elements, 1 thread(s), load "
    assert shown.title.startswith(named)
    assert shown.columns == (
        *("contestant", "time", "quartiles", "p99", "x plain export", "x torch eager"),
        *("x reading the inputs", "GB/s", "of the read", "error"),
    )  # and no column without an entry
    assert len(shown.rows) == len(rows)
    times = {row.contestant: row.timing.median for row in rows if row.timing}
    assert shown.rows[0][0] == OURS and shown.rows[0][4] == f"{times[PLAIN] / times[OURS]:.2f}"
    assert shown.rows[-1][7:9] == (f"{rows[-1].bytes / times[READ] / 1e9:.2f}", "100%")
    path = tmp_path / "bench.jsonl"
    append_rows(path, [row.to_dict() for row in rows])
    append_rows(path, [rows[0].to_dict()])
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(found) == len(rows) + 1 and found[0] == found[-1]
    assert LossSpec.from_dict(found[0]["spec"]) == LossSpec()
    with pytest.raises(OutputError, match="choose another folder with -o"):
        append_rows(tmp_path, [{}])


def _row(name: str, size: int, spec: LossSpec) -> Row:
    timing = Timing.of([111.1e-6, 222.2e-6, 333.3e-6])
    return Row(spec, (size // 16, 16), name, cpu.WAY, timing, None, 1.2e-8, 2, 0.7, 1.25)


@pytest.mark.parametrize("width", [80, 120])
def test_every_number_is_whole_at_the_widths_of_terminals(width: int) -> None:
    names = [OURS, BARE, PLAIN, EAGER, COMPILED, READ]
    spec = LossSpec(0.1234567890123456, per_sample=True)  # so that the title is longer too
    rows = [_row(name, size, spec) for size in (1 << 20, 1 << 24) for name in names]
    (table,) = row_tables(rows)
    console = Console(file=io.StringIO(), width=width, soft_wrap=True)
    console.print(table)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width and len(table.columns) == 13
    for row in table.rows:
        keys = re.compile(rf"{re.escape(row[0])} +{re.escape(row[1])} ")
        shown = [entry for x in lines if keys.match(x) for entry in re.split("  +", x.strip())[2:]]
        assert shown == [entry for entry in row[2:] if entry]


def test_the_plot_has_a_panel_a_spec_quartiles_and_what_was_measured_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures: list[Figure] = []
    write = Figure.savefig

    def kept(figure: Figure, *place: object, **how: object) -> None:
        figures.append(figure)
        write(figure, *place, **how)

    monkeypatch.setattr(Figure, "savefig", kept)
    specs = (LossSpec(), LossSpec(reduction="none"))
    rows = [_row(name, size, spec) for spec in specs for name in (OURS, READ) for size in (16, 32)]
    about = environment() | {"processor": "a card", "cores": 2}
    assert plot_png(rows, "2026-11-29T10:00:00+00:00", about).startswith(b"\x89PNG")
    figure = figures[0]
    assert [panel.get_title() for panel in figure.axes] == [
        "mean, float32, beta 1", "none, float32, beta 1"
    ]  # fmt: skip
    caption = figure.get_suptitle()
    assert "a card, 2 cores; 2 threads each; load 0.7 to 0.7; 2026-11-29\n" in caption
    _, _, (bars,) = figure.axes[0].containers[0]
    low, high = (y / 1e3 * 16 for _, y in bars.get_segments()[0])
    timing = rows[0].timing
    assert timing and np.allclose((low, high), (timing.q1 * 1e6, timing.q3 * 1e6))
    assert plot_png([], "2026-11-29", about).startswith(b"\x89PNG")


def test_a_fast_wrong_answer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(input: object, target: object) -> None:
        raise ValueError("out of order\nand more")

    crowd = {
        "wrong": lambda a, b: np.float32(0.25),
        "lost": lambda a, b: np.float32(np.nan),
        "vector": lambda a, b: np.zeros(3, np.float32),
        "broken": broken,
    }
    monkeypatch.setattr(cpu, "contestants", lambda *_: (dict(crowd), {}))
    rows, missing = measure(LossSpec(), (64, 16), **QUICK)
    errors = {row.contestant: row.error for row in rows}
    assert 0.1 < (errors["wrong"] or 0) < 1
    assert errors["lost"] == errors["vector"] == float("inf")
    assert missing == {"broken": "it fails: ValueError: out of order"}
    assert json.dumps([row.to_dict() for row in rows], allow_nan=False).count('"inf"') == 2


def test_a_sum_that_drifts_is_seen() -> None:
    rows, _ = measure(LossSpec(), (1 << 16, 16), constant=True, **QUICK)
    errors = {row.contestant: row.error or 0 for row in rows}
    assert max(errors[OURS], errors[BARE]) <= 2e-7 < 1e-5 < errors[PLAIN]


def test_who_needs_a_compiler_is_left_out_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.shutil, "which", lambda name: None)
    without = [*WITHOUT[2:], PLAIN, OURS, BARE, "load().run"]
    found, missing = cpu.contestants(LossSpec(), 16, 1, without)
    assert [*found] == ["torch eager"]
    assert missing == {n: f"{n} needs a C++ compiler: install g++" for n in (COMPILED, AHEAD)}


def test_without_torch_nothing_is_compared_with_the_reading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(cpu, "contestants", lambda *_: ({OURS: lambda a, b: np.float32(0)}, {}))
    rows, missing = measure(LossSpec(), (64, 16), **QUICK)
    assert [row.contestant for row in rows] == [OURS]
    assert "needs the package 'torch'" in missing[READ]
    assert "of the read" not in row_tables(rows)[0].columns


def test_the_operators_need_no_memory_beside_the_inputs() -> None:
    ours = peak_ratio(OURS, 1 << 22, 1)
    assert ours is None or 1 <= ours <= 1.05
    assert peak_ratio("nobody", 1 << 10, 1) is None


def test_the_command_writes_its_rows_and_tells_of_a_loaded_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (1.1, 0, 0))
    words = ["bench", "--quick", "--size", "1024", "--threads", "1", "-o", str(tmp_path)]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "2^10" in shown.out and "the file, with the" in shown.out
    assert "the load was 1.1 at the start" in shown.err
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert {"load().run", PLAIN, "torch eager", READ} <= {row["contestant"] for row in rows}
    assert all(row["environment"]["packages"]["onnxruntime"] and row["date"] for row in rows)
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("os.getloadavg", lambda: (0.9, 0, 0))
    monkeypatch.setattr(cpu, "measure", lambda *_, **__: ([], {}))
    monkeypatch.setattr("smoothl1_deploy.bench._rows.plot_png", lambda *_, **__: b"")
    assert main(words) == 0
    assert "the load was" not in capsys.readouterr().err


def test_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, text in (
        (["--size", "100"], "--size is the number of elements, a multiple of 16, got 100"),
        (["--per-sample", "64"], "--per-sample is rows x columns, such as 64x16, got '64'"),
        (["--beta", "-1"], "beta must not be negative"),
    ):
        assert main(["bench", "-o", str(tmp_path), *words]) == 2
        assert text in capsys.readouterr().err
