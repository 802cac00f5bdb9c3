"""The benchmark and the report of a GPU, where there is none: everything but the card is real."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import child
import pytest
from host_device import HostDevice

from smoothl1_deploy import LossSpec
from smoothl1_deploy.bench import _gpu as gpu
from smoothl1_deploy.bench import _gpu_report as gpu_report
from smoothl1_deploy.bench._gpu import ALONE, GRAPH, IN_A_ROW, Job, plan
from smoothl1_deploy.bench._gpu_report import Parity, condense, run_parity
from smoothl1_deploy.bench._rows import COMPILED, EAGER
from smoothl1_deploy.bench._timing import Timing, copy_bandwidth, time_calls
from smoothl1_deploy.cli import main as cli
from smoothl1_deploy.parity._cases import CaseResult
from smoothl1_deploy.parity._matrix import Matrix, run_matrix

ROOT = Path(__file__).parents[2]


class Card:
    """A torch whose events tell the time of a clock that each call moves on."""

    def __init__(self, *seconds: float) -> None:
        self.now, self._seconds, self.calls = 0.0, seconds, 0
        self.cuda = SimpleNamespace(Event=lambda enable_timing: event(lambda: self.now))

    def call(self) -> None:
        self.now += self._seconds[min(self.calls, len(self._seconds) - 1)]
        self.calls += 1


def event(clock: Callable[[], float]) -> Any:
    found = SimpleNamespace(synchronize=lambda: None)
    found.record = lambda: setattr(found, "at", clock())
    found.elapsed_time = lambda end: (end.at - found.at) * 1e3
    return found


# Timing


def test_many_calls_are_one_sample() -> None:
    card = Card(1e-5)
    timing = time_calls(card, card.call, calls=100)
    assert math.isclose(timing.median, 1e-5, rel_tol=1e-6)
    assert timing.calls == 100 and timing.samples == 200  # the most


def test_neither_the_warm_up_nor_what_sweeps_the_caches_is_timed() -> None:
    card, swept = Card(9.0, 9.0, 9.0, 0.05), []

    def before() -> None:
        swept.append(card.calls)
        card.now += 9.0

    timing = time_calls(card, card.call, before=before)
    assert math.isclose(timing.median, 0.05) and timing.samples == 10
    assert swept == [*range(3, 3 + 1 + 10)]


def test_a_copy_is_counted_twice() -> None:
    card: Any = Card(0.001)
    target = SimpleNamespace(copy_=lambda source: card.call())
    card.uint8 = None
    card.zeros, card.empty_like = (lambda *a, **k: None), (lambda source: target)
    assert math.isclose(copy_bandwidth(card), 2 * (1 << 30) / 0.001, rel_tol=1e-6)


# The plan and its run


def test_the_plan_is_whole_and_begins_with_what_matters_most() -> None:
    jobs = plan((EAGER, "trt"))
    small, large = jobs[:8], jobs[8:]
    assert {(job.spec.reduction, job.contestant, job.way) for job in small} == {
        (reduction, name, way)
        for reduction in ("mean", "none")
        for name in (EAGER, "trt")
        for way in (IN_A_ROW, GRAPH)
    }
    assert {job.sizes for job in small} == {(10,)} and {job.way for job in large} == {ALONE}
    assert len({(j.spec, j.contestant) for j in large}) == len(large) == 2 * 3 * 2
    assert large[0].spec == LossSpec() and large[0].sizes == (26, 24, 22, 20, 18, 14, 10)
    assert [job.spec.dtype for job in large] == ["float32"] * 6 + ["float16"] * 6


def test_an_error_is_a_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(job: Job) -> Any:
        if job.contestant == "absent":
            raise RuntimeError("no | kernel image")
        return None, None

    def timed(job: Job, log2: int, call: Any, runner: Any) -> Timing:
        if log2 == 20:
            raise MemoryError("out of memory")
        return Timing.of([1e-3])

    monkeypatch.setattr(gpu, "prepare", prepare)
    jobs = [Job(name, LossSpec(), ALONE, (26, 20)) for name in ("absent", "trt")]
    rows, dropped = gpu.run(jobs, timed, 1e6)
    assert not dropped and [(row.contestant, row.problem) for row in rows] == [
        *[("absent", "RuntimeError: no | kernel image")] * 2,
        ("trt", None),
        ("trt", "MemoryError: out of memory"),
    ]
    assert rows[2].timing and rows[2].bytes == (2 * 4 << 26) + 4
    (shown,) = gpu_report.row_tables(rows, copy=2 * rows[2].bytes / 1e-3)
    assert shown.rows[0] == ("absent", "2^26", "error", "", "", "", "")
    assert shown.rows[2] == ("trt", "2^26", "1 ms", "1 ms - 1 ms", "1 ms", "536.87", "50%")
    assert shown.below[0] == "absent, 2^26 elements: RuntimeError: no | kernel image"


def test_what_there_is_no_time_for_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def timed(*_: Any) -> Timing:
        now[0] += 3.0  # much slower than planned
        return Timing.of([3.0])

    monkeypatch.setattr(gpu, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu, "prepare", lambda job: (None, None))
    jobs = [job for job in plan((EAGER,)) if job.way == ALONE][:2]
    rows, dropped = gpu.run(jobs, timed, 10.0)
    assert [row.elements.bit_length() - 1 for row in rows] == [26, 24, 22, 20]
    assert now[0] <= 10 + 3
    assert dropped[0] == f"torch eager, mean, float32, {ALONE}: 2^18"
    assert dropped[-1] == f"torch eager, none, float32, {ALONE}: 2^26, 2^24, 2^22, 2^20, 2^18, " \
        "2^14, 2^10"  # fmt: skip


@pytest.mark.parametrize("module", ["onnx", "onnxscript"])
def test_where_torch_alone_is_there_is_pytorch_to_time(module: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from smoothl1_deploy.bench import _gpu as gpu, _gpu_report as gpu_report\n"
        "found, reasons = gpu.usable_backends()\n"
        "assert found == () and len(set(reasons.values())) == 1, reasons\n"
        "assert 'no model can be exported here' in reasons['trt']\n"
        "assert gpu_report.main(['--plan']) == 0\n"
        "call, _ = gpu.prepare(gpu.plan(gpu.TORCH)[0])\n"
        "import torch; assert call(torch.tensor([3.0]), torch.tensor([0.0])).item() == 2.5\n"
        "problem = gpu_report.run_parity((), 1.0).problem\n"
        'assert problem.startswith("the matrix can\'t run here"), problem\n'
    )
    child.run("-c", code, check=True)


# Parity


def test_red_cells_are_kept_with_their_command_and_the_reference_is_apart() -> None:
    matrix = Matrix(("ort-cpu", "onnx-reference"), betas=(0.5,), dtypes=("float16",),
                    routes=("function",), extensions=False, quick=True)  # fmt: skip
    whole = run_matrix(matrix)
    assert condense(whole).ok
    first, second, *rest = whole.cells
    worst = first.worst
    assert worst is not None
    failed = replace(worst.verdict, ok=False, ulp=9, detail="9 ULP of 2")
    failures = (CaseResult(worst.case, failed, worst.shares, worst.sample),)
    cells = (
        replace(first, failures=failures, ulp=9),
        replace(second, failures=failures, backend="torch-cuda"),
        *rest,
    )
    found = condense(replace(whole, cells=cells))
    assert not found.ok and len(found.red) == len(found.reference) == 1
    assert found.red[0]["detail"] == "9 ULP of 2" and found.red[0]["ulp"] == 9
    assert "--backend ort-cpu" in found.red[0]["command"]
    assert found.backends["torch-cuda"]["red"] == found.backends["ort-cpu"]["red"] == 1
    assert sum(counts["cells"] for counts in found.backends.values()) == len(cells)
    assert "1 red cell" in found._text and "leaves what its CPU kernel allows in 1 cells" in (
        found._text
    )


def test_a_matrix_that_dies_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    import smoothl1_deploy.parity._matrix as module

    def dies(matrix: Matrix, **settings: Any) -> None:
        assert matrix.backends == ("trt", "torch-cuda") and matrix.betas[:2] == (1.0, 0.0)
        assert settings["workers"] >= 2 and settings["seconds"] == 7.0
        raise RuntimeError("a worker was killed")

    monkeypatch.setattr(module, "run_matrix", dies)
    found = run_parity(("trt",), 7.0)
    assert found.problem == "the matrix ended early: RuntimeError: a worker was killed"
    assert not found.ok and run_parity((), -1.0).problem == "no time was left"


# The command


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A card that is the host, small and quick; what was asked of the matrix goes into the list."""
    import torch

    asked: list[Any] = []
    monkeypatch.setattr(
        torch.cuda, "Event", lambda enable_timing: event(time.perf_counter), raising=False
    )
    properties = SimpleNamespace(total_memory=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(gpu_report, "find_device", lambda what: HostDevice())
    monkeypatch.setattr(gpu_report, "copy_bandwidth", lambda torch: 1e10)
    monkeypatch.setattr(gpu_report, "TORCH", (EAGER,))
    monkeypatch.setattr(gpu, "BACKENDS", ("ort-cpu", "nobody"))
    monkeypatch.setattr(gpu, "SIZES", (12, 10))
    monkeypatch.setattr("smoothl1_deploy.bench._timing._SWEPT", 1 << 10)
    monkeypatch.setattr("smoothl1_deploy.bench._timing._ENOUGH", 0.0)

    def parity(backends: tuple[str, ...], seconds: float) -> Parity:
        asked.append((backends, seconds))
        return Parity(True, _text="# all is equal\n")

    monkeypatch.setattr(gpu_report, "run_parity", parity)
    return asked


def test_a_whole_run_writes_both_files(
    machine: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_report.main(["-o", str(tmp_path / "results")]) == 0
    written = sorted((tmp_path / "results").iterdir())
    assert [path.suffix for path in written] == [".json", ".md"]
    assert written[0].name.startswith("gpu-a-host-20")
    found, text = json.loads(written[0].read_text()), written[1].read_text()
    assert found["format"] == 3 and found["gpu"]["compute_capability"] == "8.9"
    assert found["absent"]["nobody"].startswith("SpecError: ") and found["dropped"] == []
    assert len(found["rows"]) == 2 * 2 * 2 + 2 * 2 * 3 * 2
    for row in found["rows"]:
        # What stands in for a CUDA graph takes mappings, and ort-cpu has none.
        assert row["way"] == GRAPH or (row["timing"]["median"] > 0 and not row["problem"]), row
    ((backends, seconds),) = machine
    assert backends == ("ort-cpu",) and 380 < seconds <= 440  # of the 480, with a reserve
    assert text.startswith("# a host, ") and "A copy on the device moves 10 GB/s" in text
    assert "# all is equal\n" in text and "- `nobody`: SpecError: " in text
    assert f"### smooth_l1_loss_beta_1.0_mean_float32, {ALONE}\n" in text
    assert "| x torch eager | GB/s | of a copy |" in text
    assert "wrote " in capsys.readouterr().out


def test_bench_on_a_gpu_is_the_speed_of_the_report(
    machine: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["bench", "--gpu", "-o", str(tmp_path / "bench")]) == 0
    shown = capsys.readouterr().out
    assert "a host" in shown and "wrote " in shown and "torch eager" in shown
    assert [path.suffix for path in sorted((tmp_path / "bench").iterdir())] == [".json", ".md"]
    assert not machine  # no parity
    for words in (
        ["--size", "1024"], ["--beta", "0.5"], ["--constant"], ["--threads", "1"], ["--memory"],
        ["--no-once"],
    ):  # fmt: skip
        assert cli(["bench", "--gpu", *words]) == 2
        assert f"leave {words[0]} out" in capsys.readouterr().err


def test_red_cells_end_with_1_and_what_goes_wrong_in_a_sentence(
    machine: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu_report, "run", lambda *_: ([], ["trt: 2^10"]))
    monkeypatch.setattr(gpu_report, "run_parity", lambda *_: Parity(red=({"ulp": 9},)))
    assert gpu_report.main(["-o", str(tmp_path)]) == 1
    text = next(tmp_path.glob("*.md")).read_text()
    assert text.endswith("## No time for\n\n- trt: 2^10\n")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_report, "run", interrupted)
    assert gpu_report.main(["-o", str(tmp_path)]) == 130
    assert capsys.readouterr().out.endswith("interrupted; nothing was written\n")
    (tmp_path / "file").write_text("")
    # It is told before eight minutes of measuring, and not after.
    assert gpu_report.main(["-o", str(tmp_path / "file" / "results")]) == 2
    assert "/file/results/gpu.json: Not a directory" in capsys.readouterr().out


def test_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu_report.main(["-o", str(tmp_path / "results")]) == 3
    assert "error: the GPU report needs an NVIDIA GPU" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
    assert cli(["bench", "--gpu", "-o", str(tmp_path)]) == 3
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_the_script_is_thin_and_shows_its_plan(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "gpu_report"
    assert script.stat().st_mode & 0o111 == 0o111
    assert len(script.read_text().splitlines()) < 12
    done = subprocess.run(
        [str(script), "--plan"], env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("torch eager, mean, float32, 100 calls in a row: 2^10\n")
    assert f"{COMPILED}, mean, float32, {ALONE}: 2^26, 2^24," in done.stdout
    assert done.stdout.endswith("float32 first, for the time that is left\n")
