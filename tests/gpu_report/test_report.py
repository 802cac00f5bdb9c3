"""The GPU report as JSON and Markdown, and the command around it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from host_device import HostDevice

from smoothl1_deploy import LossSpec
from smoothl1_deploy.cli import main as cli
from smoothl1_deploy.gpu_report import command
from smoothl1_deploy.gpu_report.parity import Parity, condense, run_parity
from smoothl1_deploy.gpu_report.passes import Counted
from smoothl1_deploy.gpu_report.plan import SmallCell, SpeedCell
from smoothl1_deploy.gpu_report.report import GpuReport, file_stem, markdown
from smoothl1_deploy.gpu_report.speed import SmallRow, SpeedRow
from smoothl1_deploy.gpu_report.timing import summarise
from smoothl1_deploy.parity.cases import CaseResult
from smoothl1_deploy.parity.matrix import Matrix, run_matrix

ROOT = Path(__file__).parents[2]
GPU = {"name": "NVIDIA L4", "compute_capability": "8.9", "driver": "580.65", "memory_bytes": 1}


def report(**changes: Any) -> GpuReport:
    cell = SpeedCell("trt", "none", "float32", 26)
    compiled = SpeedCell("torch-compile", "none", "float32", 26)
    small = [SmallCell("trt", "mean", graph) for graph in (False, True)]
    fields: dict[str, Any] = {
        "gpu": GPU,
        "date": "2026-11-22T22:00:00+00:00",
        "environment": {"packages": {"torch": "2.13.0"}},
        "bandwidth": 3 * (4 << 26) / 1e-3,
        "speed": (
            SpeedRow(cell, 3 * (4 << 26), summarise([2e-3])),
            SpeedRow(compiled, 3 * (4 << 26), error="RuntimeError: no | compiler"),
        ),
        "small": (SmallRow(small[0], summarise([1.5e-5])), SmallRow(small[1], error="no graph")),
        "parity": Parity({"trt": {"cells": 3, "red": 0, "refused": 1, "cases": 40}}),
        "absent": {"ort-cuda": "no provider"},
        "dropped": ("trt sum float16 2^10",),
        "seconds": 12.34,
    }
    return GpuReport(**{**fields, **changes})


def test_the_markdown() -> None:
    text = markdown(report())
    assert text.startswith("# NVIDIA L4, 2026-11-22\n")
    assert "Compute capability 8.9, driver 580.65, torch 2.13.0; 12 s." in text
    assert "| `trt` | 3 | 0 | 1 | 40 |" in text
    assert "### `none`, float32\n\n| contestant | 2^26 |\n| --- | ---: |\n" in text
    assert "| trt | 2,000.0 (50%) |" in text  # twice the time of a copy of those bytes
    assert "| torch-compile | error |" in text
    assert "- torch-compile, none, float32: RuntimeError: no \\| compiler" in text
    assert "| trt | mean | 15.0 | no graph |" in text
    assert "| target | asked | trt |\n" in text
    assert (
        "| none float32 2^26: share of the copy's bandwidth | ≥ 0.85 | 0.5: missed by 41.2% |"
    ) in text
    assert "`torch-cuda`), a further reference: not measured." in text
    assert "- `ort-cuda`: no provider" in text
    assert "## No time for\n\n- trt sum float16 2^10\n" in text


def test_a_report_of_nothing() -> None:
    empty = report(speed=(), small=(), bandwidth=None, absent={}, dropped=(),
                   parity=Parity({}, problem="no onnx"))  # fmt: skip
    text = markdown(empty)
    assert "moves not measured" in text and "Not run: no onnx" in text and "Not measured." in text
    assert "No time for" not in text
    assert "| mean float32 2^26: share of the copy's bandwidth | ≥ 0.85 | not measured |" in text
    assert "## One stage or two\n\nNot measured." in text and "Not counted: not counted" in text
    assert json.loads(empty.to_json())["parity"]["ok"] is False


def test_the_json() -> None:
    found = json.loads(report().to_json())
    assert found["format"] == 2 and found["gpu"]["name"] == "NVIDIA L4"
    assert found["speed"][0]["timing"]["median_s"] == 2e-3
    assert found["speed"][0]["bytes"] == 3 * (4 << 26)
    assert found["small"][1] == {
        "contestant": "trt", "reduction": "mean", "graph": True, "timing": None, "error": "no graph"
    }  # fmt: skip
    assert found["dropped"] == ["trt sum float16 2^10"]


def test_the_name_of_the_file() -> None:
    assert file_stem("NVIDIA H100 80GB HBM3", "2026-11-22T10:00") == (
        "gpu-nvidia-h100-80gb-hbm3-2026-11-22"
    )


def test_red_cells_are_kept_with_their_command() -> None:
    from dataclasses import replace

    matrix = Matrix(("ort-cpu", "onnx-reference"), betas=(0.5,), dtypes=("float16",),
                    routes=("function",), extensions=False, quick=True)  # fmt: skip
    whole = run_matrix(matrix)
    first, second, *rest = whole.cells
    worst = first.worst
    assert worst is not None
    failed = replace(worst.verdict, ok=False, ulp=9, detail="9 ULP of 2")
    failures = (CaseResult(worst.case, failed, worst.shares, worst.sample),)
    red = replace(whole, cells=(
        replace(first, failures=failures, ulp=9),
        replace(second, failures=failures, backend="torch-cuda"),
        *rest,
    ))  # fmt: skip
    found = condense(red)
    assert not found.ok and len(found.red) == len(found.reference) == 1
    assert found.red[0]["detail"] == "9 ULP of 2" and found.red[0]["ulp"] == 9
    assert "--backend ort-cpu" in found.red[0]["command"]
    assert found.backends["torch-cuda"]["red"] == 1
    text = markdown(report(parity=found))
    assert "leaves what its CPU kernel allows in 1 cells" in text and "| 9 ULP of 2 |" in text
    assert condense(whole).ok


def test_a_matrix_that_dies_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    import smoothl1_deploy.parity.matrix as module

    def dies(matrix: Matrix, **settings: Any) -> None:
        assert matrix.backends == ("trt", "torch-cuda") and matrix.betas[:2] == (1.0, 0.0)
        assert settings["workers"] >= 2 and settings["seconds"] == 7.0
        raise RuntimeError("a worker was killed")

    monkeypatch.setattr(module, "run_matrix", dies)
    found = run_parity(("trt",), 7.0)
    assert found.problem == "the matrix ended early: RuntimeError: a worker was killed"
    assert not found.ok


# The command


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A machine with a GPU, for the command; what was asked of the matrix goes into the list."""
    import torch

    asked: list[Any] = []
    monkeypatch.setattr(command, "find_device", lambda what: HostDevice())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA L4")
    properties = type("Properties", (), {"total_memory": 1})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(command, "usable_backends", lambda: (("trt",), {"ort-cuda": "no provider"}))
    monkeypatch.setattr(command, "copy_bandwidth", lambda torch: 1e12)
    monkeypatch.setattr(command, "count_forms", lambda: Counted(problem="not tried"))
    monkeypatch.setattr(command, "run_small", lambda cells, *a: [SmallRow(c) for c in cells])
    monkeypatch.setattr(
        command, "run_speed", lambda groups, *a: [SpeedRow(c, 1) for g in groups for c in g.cells]
    )

    def parity(backends: tuple[str, ...], seconds: float) -> Parity:
        asked.append((backends, seconds))
        return Parity({"trt": {"cells": 1, "red": 0, "refused": 0, "cases": 1}})

    monkeypatch.setattr(command, "run_parity", parity)
    return asked


def test_the_command_writes_both_files(
    machine: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["-o", str(tmp_path / "results")]) == 0
    written = sorted((tmp_path / "results").iterdir())
    assert [path.suffix for path in written] == [".json", ".md"]
    assert written[0].name.startswith("gpu-nvidia-l4-20")
    found = json.loads(written[0].read_text())
    assert found["absent"] == {"ort-cuda": "no provider"}
    contestants = {row["contestant"] for row in found["speed"]}
    assert contestants == {"torch-eager", "torch-compile", "trt", "trt, two stages"}
    assert found["passes"] == {"rows": [], "problem": "not tried"}
    ((backends, seconds),) = machine
    assert backends == ("trt",) and 380 < seconds <= 440  # of the 480, with a reserve
    assert "wrote " in capsys.readouterr().out


def test_bench_on_a_gpu_is_the_speed_of_the_report(
    machine: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["bench", "--gpu", "-o", str(tmp_path / "bench")]) == 0
    shown = capsys.readouterr().out
    assert "NVIDIA L4" in shown and "wrote " in shown and "torch-compile" in shown
    assert [path.suffix for path in sorted((tmp_path / "bench").iterdir())] == [".json", ".md"]
    assert not machine  # no parity


def test_bench_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["bench", "--gpu", "-o", str(tmp_path)]) == 3
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_bench_on_a_gpu_has_its_own_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["bench", "--gpu", "--size", "1024"]) == 2
    assert "leave --size out" in capsys.readouterr().err


def test_a_whole_run_on_memory_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the card is real: tensors, calls, contestants, tables."""
    import time

    import torch

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Any) -> float:
            return (float(end.at) - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(command, "find_device", lambda what: HostDevice())
    monkeypatch.setattr(command, "_gpu", lambda torch, index: GPU)
    monkeypatch.setattr(command, "copy_bandwidth", lambda torch: 1e10)
    monkeypatch.setattr(command, "TORCH", ("torch-eager",))
    monkeypatch.setattr("smoothl1_deploy.gpu_report.plan._TWIN_SIZES", (12,))
    monkeypatch.setattr(command, "count_forms", lambda: Counted(problem="not tried"))
    monkeypatch.setattr(command, "usable_backends", lambda: (("ort-cpu",), {}))
    monkeypatch.setattr("smoothl1_deploy.gpu_report.plan.SIZES", (12, 10))
    monkeypatch.setattr("smoothl1_deploy.gpu_report.timing._SWEPT", 1 << 10)
    assert command.main(["-o", str(tmp_path), "--no-parity"]) == 0
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert len(found["speed"]) == 2 * 2 * 3 * 2 + 1 and found["dropped"] == []
    assert [each["contestant"] for each in found["stages"]] == ["ort-cpu"]
    verdicts = {t["target"]: t["verdict"] for t in found["targets"] if t["contestant"] == "ort-cpu"}
    assert verdicts["mean 64x16 call by call: time over PyTorch eager's call"] != "not measured"
    assert all(row["timing"]["median_s"] > 0 for row in found["speed"]), found["speed"]
    graphs = {(row["contestant"], row["graph"]): row["error"] for row in found["small"]}
    assert graphs["torch-eager", False] is graphs["ort-cpu", False] is None
    assert "%)" in next(tmp_path.glob("*.md")).read_text()


def test_red_cells_end_with_1(
    machine: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Parity({"trt": {"cells": 1, "red": 1, "refused": 0, "cases": 1}}, red=(
        {"spec": LossSpec().name, "beta": 1.0, "route": "function", "backend": "trt", "ulp": 9,
         "allowed": 2, "families": ["normal"], "detail": "off"},
    ))  # fmt: skip
    monkeypatch.setattr(command, "run_parity", lambda *a: bad)
    assert command.main(["-o", str(tmp_path), "--no-speed"]) == 1
    assert command.main(["-o", str(tmp_path), "--no-parity"]) == 0


def test_a_folder_that_can_not_be_made(
    machine: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert command.main(["-o", str(tmp_path / "file" / "results")]) == 2
    assert "error: can't make the folder" in capsys.readouterr().out
    assert machine == []  # before eight minutes of measuring, not after


def test_ctrl_c_ends_in_a_sentence(
    machine: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_parity", interrupted)
    assert command.main(["-o", str(tmp_path), "--no-speed"]) == 130
    assert capsys.readouterr().out.endswith("interrupted; nothing was written\n")


def test_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    assert command.main(["-o", str(tmp_path / "results")]) == 3
    assert "error: the GPU report needs an NVIDIA GPU" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_the_script_is_thin_and_shows_its_plan(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "gpu_report"
    assert script.stat().st_mode & 0o111 == 0o111
    assert len(script.read_text().splitlines()) < 12
    done = subprocess.run(
        [str(script), "--plan"], env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("28 small calls, 309 cells of speed:\n  float32 mean torch-eager")
    assert done.stdout.endswith("float32 first, for the time that is left\n")
