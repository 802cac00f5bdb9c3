"""The targets of the GPU report, on measurements that are made up."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from smoothl1_deploy.gpu_report.plan import SmallCell, SpeedCell, bytes_to_move, plan_speed, twin_of
from smoothl1_deploy.gpu_report.speed import SmallRow, SpeedRow
from smoothl1_deploy.gpu_report.targets import Target, judge, winners
from smoothl1_deploy.gpu_report.timing import summarise

BANDWIDTH = 1e12


def row(name: str, reduction: str, dtype: str, log2: int, seconds: float) -> SpeedRow:
    moved = bytes_to_move(reduction, dtype, 1 << log2)
    return SpeedRow(SpeedCell(name, reduction, dtype, log2), moved, summarise([seconds]))


def at_share(name: str, reduction: str, dtype: str, share: float) -> SpeedRow:
    """A row at 2^26 that reaches a share of the bandwidth."""
    seconds = bytes_to_move(reduction, dtype, 1 << 26) / BANDWIDTH / share
    return row(name, reduction, dtype, 26, seconds)


def small(name: str, reduction: str, graph: bool, seconds: float) -> SmallRow:
    return SmallRow(SmallCell(name, reduction, graph), summarise([seconds]))


def the(targets: tuple[Target, ...], what: str, name: str = "trt") -> Target:
    (found,) = [t for t in targets if t.what.startswith(what) and t.contestant == name]
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_share_of_the_bandwidth(reduction: str, dtype: str) -> None:
    what = f"{reduction} {dtype} 2^26: share"
    for share, verdict in ((0.86, "met"), (0.425, "missed by 50.0%")):
        found = the(judge([at_share("trt", reduction, dtype, share)], [], BANDWIDTH), what)
        assert found.found == pytest.approx(share)
        assert found.verdict == verdict and found.met is (verdict == "met")
    other = "float16" if dtype == "float32" else "float32"
    found = the(judge([at_share("trt", reduction, other, 0.9)], [], BANDWIDTH), what)
    assert found.met is None and found.verdict == "not measured"
    without = judge([at_share("trt", reduction, dtype, 0.9)], [], None)
    assert the(without, what).verdict == "not measured"


def test_never_slower_than_torch_compile() -> None:
    rows = [row("trt", "mean", "float32", n, 1e-3) for n in (10, 26)]
    rows += [row("torch-compile", "mean", "float32", n, 1e-3) for n in (10, 20)]
    found = the(judge(rows, [], BANDWIDTH), "any cell: time over torch.compile's")
    assert found.verdict == "met" and found.found == 1 and found.where == "mean float32 2^10"
    rows += [row("trt", "sum", "float16", 20, 1.26e-3),
             row("torch-compile", "sum", "float16", 20, 1e-3)]  # fmt: skip
    found = the(judge(rows, [], BANDWIDTH), "any cell: time over torch.compile's")
    assert found.verdict == "missed by 20.0%" and found.where == "sum float16 2^20"
    alone = judge([row("trt", "mean", "float32", 26, 1e-3)], [], BANDWIDTH)
    assert the(alone, "any cell").verdict == "not measured"


def test_three_times_as_fast_as_eager_for_mean() -> None:
    rows = [
        row("trt", "mean", "float32", 26, 1e-3),
        row("torch-eager", "mean", "float32", 26, 3e-3),
        row("trt", "mean", "float16", 26, 1e-3),
        row("torch-eager", "mean", "float16", 26, 2e-3),
    ]
    targets = judge(rows, [], BANDWIDTH)
    assert the(targets, "mean float32 2^26: times as fast").verdict == "met"
    assert the(targets, "mean float16 2^26: times as fast").verdict == "missed by 33.3%"


def test_small_calls() -> None:
    rows = [
        small("torch-eager", "mean", False, 2e-5),
        small("torch-eager", "mean", True, 5e-6),
        small("trt", "mean", False, 2e-5),
        small("trt", "mean", True, 1.1e-5),
        small("trt", "none", False, 2e-5),
    ]
    targets = judge([], rows, None)
    assert the(targets, "mean 64x16 call by call").verdict == "met"
    # Half of eager's call, not of eager's own graph.
    assert the(targets, "mean 64x16 in a CUDA graph").verdict == "missed by 10.0%"
    assert the(targets, "none 64x16 call by call").verdict == "not measured"
    assert the(targets, "none 64x16 in a CUDA graph").verdict == "not measured"


def test_an_error_is_not_measured() -> None:
    failed = replace(at_share("trt", "mean", "float32", 0.9), timing=None, error="no memory")
    assert the(judge([failed], [], BANDWIDTH), "mean float32 2^26: share").met is None


def test_nothing_measured_is_said_of_every_target() -> None:
    targets = judge([row("torch-eager", "mean", "float32", 26, 1e-3)], [], BANDWIDTH)
    assert {t.contestant for t in targets} == {"any backend"}
    assert {t.verdict for t in targets} == {"not measured"} and len(targets) == 6 + 1 + 2 + 4
    assert json.loads(json.dumps([t.to_dict() for t in targets]))[0]["met"] is None


def test_every_backend_is_judged_and_no_twin() -> None:
    rows = [row(n, "mean", "float32", 26, 1e-3) for n in ("trt", twin_of("trt"), "ort-cuda")]
    assert [*dict.fromkeys(t.contestant for t in judge(rows, [], BANDWIDTH))] == ["trt", "ort-cuda"]


def test_one_stage_against_two() -> None:
    rows = [
        row("ort-cuda", "mean", "float32", 26, 4e-3),
        row("ort-cuda, two stages", "mean", "float32", 26, 2e-3),
        row("ort-cuda, two stages", "mean", "float32", 20, 2e-3),
        row("torch-triton", "mean", "float32", 18, 1e-5),
        row("torch-triton, one launch", "mean", "float32", 18, 4e-5),
    ]
    assert [str(each) for each in winners(rows)] == [
        "ort-cuda mean float32 2^26: two stages takes 0.50 of the default's time",
        "torch-triton mean float32 2^18: the default takes 0.25 of the time of one launch",
    ]


def test_twins_come_before_the_half_formats() -> None:
    groups = plan_speed(("torch-eager", "trt", "torch-triton"), ("trt", "torch-triton"))
    names = [group.contestant for group in groups]
    assert names[9:11] == ["trt, two stages", "torch-triton, one launch"]
    assert {g.dtype for g in groups[:11]} == {"float32"}
    assert {g.dtype for g in groups[11:]} == {"float16"}
    assert [cell.log2 for cell in groups[9].cells] == [26, 20, 18]
