"""Timing by events, the rows of the tables, and what happens to a contestant that fails."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from smoothl1_deploy.errors import UnsupportedError
from smoothl1_deploy.gpu_report import contestants
from smoothl1_deploy.gpu_report.plan import Budget, SpeedCell, plan_groups, plan_small
from smoothl1_deploy.gpu_report.speed import Bench, run_small, run_speed
from smoothl1_deploy.gpu_report.timing import copy_bandwidth, summarise, time_calls


class Card:
    """A torch whose events tell the time of a clock that each call moves on."""

    def __init__(self, seconds: list[float]) -> None:
        self.now, self._seconds, self.calls = 0.0, seconds, 0
        card = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.synchronized = False

            def record(self) -> None:
                self.at = card.now

            def synchronize(self) -> None:
                self.synchronized = True

            def elapsed_time(self, end: Any) -> float:
                assert end.synchronized
                return float(end.at - self.at) * 1e3

        self.cuda = SimpleNamespace(Event=Event)

    def call(self) -> None:
        self.now += self._seconds[self.calls % len(self._seconds)]
        self.calls += 1


def test_quartiles() -> None:
    timing = summarise([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (timing.lower, timing.median, timing.upper, timing.samples) == (2.0, 3.0, 4.0, 5)
    assert summarise([1.0, 2.0]).median == 1.5
    assert summarise([7.0]).upper == 7.0


def test_the_warm_up_is_not_timed() -> None:
    card = Card([9.0, 9.0, 9.0] + [0.05] * 1000)
    timing = time_calls(card, card.call)
    assert math.isclose(timing.median, 0.05) and timing.samples == 10
    assert card.calls == 3 + 1 + 10


def test_many_calls_are_one_sample() -> None:
    card = Card([1e-5])
    timing = time_calls(card, card.call, calls=100)
    assert math.isclose(timing.median, 1e-5, rel_tol=1e-6)
    assert timing.calls == 100 and timing.samples == 200  # the most
    assert timing.to_dict()["calls_per_sample"] == 100


def test_what_sweeps_the_caches_is_not_timed() -> None:
    card, swept = Card([0.05]), []

    def before() -> None:
        swept.append(card.calls)
        card.now += 9.0

    assert math.isclose(time_calls(card, card.call, before=before).median, 0.05)
    assert swept == [*range(3, 3 + 1 + 10)]


def test_a_copy_is_counted_twice() -> None:
    card = Card([0.001])
    target = SimpleNamespace(copy_=lambda source: card.call())
    torch = SimpleNamespace(
        cuda=card.cuda,
        uint8=None,
        zeros=lambda *a, **k: None,
        empty_like=lambda source: target,
    )
    assert math.isclose(copy_bandwidth(torch), 2 * (1 << 30) / 0.001, rel_tol=1e-6)


def bench(**other: Any) -> Bench:
    def prepare(name: str, reduction: str, dtype: str, small: bool = False) -> Any:
        if name == "absent":
            raise RuntimeError("no kernel image")
        return (lambda x, t: (name, x, t)), None

    def record(call: Any, runner: Any, x: Any, t: Any) -> Any:
        raise UnsupportedError("can't be recorded")

    def time(call: Any, calls: int) -> Any:
        result = call()
        if result[1] == (1 << 20) // 16:
            raise MemoryError("out of memory")
        return summarise([1e-3])

    tensors = lambda rows, dtype: (rows, dtype)  # noqa: E731
    parts = {"tensors": tensors, "prepare": prepare, "record": record, "time": time}
    return Bench(**{**parts, **other})


def test_an_error_is_a_row_and_the_others_go_on() -> None:
    groups = plan_groups(("absent", "trt"))[:2]
    rows = run_speed(groups, bench(), Budget(1e6), 0)
    assert [row.cell for row in rows] == [cell for group in groups for cell in group.cells]
    errors = {row.error for row in rows if row.cell.contestant == "absent"}
    assert errors == {"RuntimeError: no kernel image"}
    trt = {row.cell.log2: row for row in rows if row.cell.contestant == "trt"}
    assert trt[20].error == "MemoryError: out of memory" and trt[20].timing is None
    assert trt[26].timing and trt[26].bytes == (2 * 4 << 26) + 4
    assert trt[26].to_dict()["timing"]["median_s"] == 1e-3
    assert trt[26].to_dict()["contestant"] == "trt"


def test_what_there_is_no_time_for_is_not_begun() -> None:
    now = [0.0]
    budget = Budget(30.0, lambda: now[0])

    def time(call: Any, calls: int) -> Any:
        now[0] += 3.0  # much slower than planned
        return summarise([3.0])

    groups = plan_groups(("torch-eager",))[:2]
    rows = run_speed(groups, bench(time=time), budget, keep=10.0)
    measured = [row.cell.log2 for row in rows]
    assert measured == [26, 24, 22, 20, 18, 14, 10][: len(measured)] and 0 < len(measured) < 14
    assert now[0] <= 20 + 3
    assert len(measured) + len(budget.dropped) == 14
    assert budget.dropped[-1] == str(SpeedCell("torch-eager", "none", "float32", 10))


def test_small_calls_that_can_not_be_recorded() -> None:
    rows = run_small(plan_small(("trt",))[:2], bench(), Budget(1e6), 0)
    assert rows[0].timing is not None
    assert rows[1].error == "UnsupportedError: can't be recorded"


def test_the_real_bench_on_memory_of_the_host() -> None:
    import torch
    from host_device import HostDevice

    real = Bench.on(torch, HostDevice())
    x, t = real.tensors(64, "float16")
    assert x.shape == t.shape == (64, 16) and x.dtype == torch.float16
    assert x.is_contiguous() and not torch.equal(x, t)
    again, _ = real.tensors(64, "float16")
    assert torch.equal(x, again)
    call, runner = real.prepare("torch-eager", "none", "float16")
    replay = real.record(lambda x, t: {"loss": call(x, t)}, runner, x, t)
    replay()


# Contestants


def test_pytorch_as_a_contestant() -> None:
    import torch

    call, runner = contestants.prepare("torch-eager", "sum", "float32")
    assert runner is None
    assert call(torch.tensor([3.0, 0.0]), torch.zeros(2)).item() == 2.5


def test_why_a_backend_is_no_contestant() -> None:
    found, reasons = contestants.usable_backends()
    assert {*found, *reasons} == {*contestants.BACKENDS}
    for name, reason in reasons.items():
        assert reason.split(":")[0].endswith("Error"), (name, reason)


@pytest.mark.parametrize("module", ["onnx", "onnxscript", "ml_dtypes"])
def test_without_what_an_export_needs(module: str) -> None:
    """On a bare machine with torch alone, the report still has PyTorch to time."""
    import subprocess
    import sys

    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from smoothl1_deploy.gpu_report import command, contestants, parity\n"
        "found, reasons = contestants.usable_backends()\n"
        "assert found == () and len(set(reasons.values())) == 1, reasons\n"
        "assert 'no model can be exported here' in reasons['trt']\n"
        "assert command.main(['--plan']) == 0\n"
        "problem = parity.run_parity((), 0.0).problem\n"
        'assert problem.startswith("the matrix can\'t run here"), problem\n'
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
