"""The ray engine on a cluster of two workers on this machine, one of which is killed."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from smoothl1_deploy import LossSpec
from smoothl1_deploy.errors import InvalidInputError, SmoothL1DeployError
from smoothl1_deploy.scoring import _ray_engine as ray_engine
from smoothl1_deploy.scoring import _shards as shards
from smoothl1_deploy.scoring._ray_engine import RayEngine
from smoothl1_deploy.scoring._score import Progress, Score, score_files
from smoothl1_deploy.scoring._scorer import TaskResult, TaskScorer, make_job, score_locally

TASKS = 40


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    root = str(Path(shards.__file__).parents[2])
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"PYTHONPATH": root}},
    )
    yield
    ray.shutdown()


@pytest.fixture
def located(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, shards.Location]]:
    """Two shards in two formats, cut into TASKS tasks of many batches."""
    monkeypatch.setattr(shards, "BATCH_ELEMENTS", 8)
    monkeypatch.setattr(shards, "TASK_ELEMENTS", 8 * 100)
    rng = np.random.default_rng(0)
    for folder in ("p", "t"):
        Path(folder).mkdir()
        rows = rng.standard_normal((TASKS * 200 // 2, 4)).astype(np.float32)
        np.save(f"{folder}/a.npy", rows)
        np.savez(f"{folder}/b.npz", rows)
    return shards.locate({"input": Path("p"), "target": Path("t")}, {})


def same(one: Score, other: Score) -> bool:
    fields = {"seconds": 0.0, "output": None}
    return replace(one, **fields) == replace(other, **fields)


def test_a_killed_worker_changes_nothing(
    cluster: None,
    located: dict[str, dict[str, shards.Location]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    spec = LossSpec(0.5, per_sample=True)
    local = score_files(make_job(spec), located, output=Path("local.npy"))
    killed, steps = tmp_path / "killed", list[Progress]()

    class Mortal(ray_engine._Actor):
        """Whoever is the first to take a second task dies with it."""

        def score(self, task: shards.Task) -> TaskResult | SmoothL1DeployError:
            if self._scorer is not None:
                with contextlib.suppress(FileExistsError), killed.open("x"):
                    os.kill(os.getpid(), signal.SIGKILL)
            return super().score(task)

    monkeypatch.setattr(ray_engine, "_Actor", Mortal)
    far = score_files(
        make_job(spec),
        located,
        output=Path("ray.npy"),
        engine=RayEngine(workers=2),
        on_progress=steps.append,
    )
    assert same(far, local)
    assert Path("ray.npy").read_bytes() == Path("local.npy").read_bytes()
    assert killed.exists() and len(steps) == 1 + TASKS  # each task once


@pytest.mark.parametrize(("failures", "works"), [(2, True), (3, False)])
def test_a_task_that_fails_is_tried_three_times(
    located: dict[str, dict[str, shards.Location]],
    monkeypatch: pytest.MonkeyPatch,
    failures: int,
    works: bool,
) -> None:
    score, left = TaskScorer.score, failures
    plan = shards.make_plan(located, flat=True)
    (expected,) = score_locally(make_job(LossSpec()), plan, [plan.tasks[0]])

    def flaky(self: TaskScorer, task: shards.Task) -> TaskResult:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError("the network")
        return score(self, task)

    monkeypatch.setattr(TaskScorer, "score", flaky)
    actor = ray_engine._Actor(make_job(LossSpec()), plan)
    if works:
        assert actor.score(plan.tasks[0]) == expected
    else:
        with pytest.raises(OSError, match="the network"):
            actor.score(plan.tasks[0])


def test_an_error_names_shard_and_worker_and_this_machine_finishes(
    cluster: None, located: dict[str, dict[str, shards.Location]]
) -> None:
    job, whole = make_job(LossSpec()), Path("t/b.npz").read_bytes()
    expected = score_files(job, located)
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1
    Path("t/b.npz").write_bytes(damaged)
    with pytest.raises(InvalidInputError, match=r"^shard b.npz.* damaged .*\(on [^)]+:\d+\)$"):
        score_files(job, located, engine=RayEngine(), journal=Path("j"))
    Path("t/b.npz").write_bytes(whole)
    resumed = score_files(job, located, journal=Path("j"))
    assert 0 < resumed.resumed < resumed.count  # the tasks of the other shard were kept
    assert same(replace(resumed, resumed=0), expected)
