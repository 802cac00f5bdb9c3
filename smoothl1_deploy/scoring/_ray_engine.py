"""The engine for many machines: tasks go to actors of Ray that hold one session each.

An actor that dies is started again by Ray, and so is its task; a task that raises is tried again
where it failed. Every machine reads the files by the same paths. Partial results are exact, so the
result is the local engine's, bit for bit, whoever did which task.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .._environment import silence
from ..errors import BackendUnavailableError, SmoothL1DeployError, require
from ._scorer import Job, TaskResult, TaskScorer
from ._shards import Plan, Shard, Task

_ATTEMPTS = 3  # how often a task is tried before the run ends with its error
_STORE = 256 << 20  # bytes that Ray's object store takes on this machine: results are small


@dataclass(frozen=True, slots=True)
class RayEngine:
    """Score tasks on a Ray cluster.

    Args:
        address: where a cluster is, as `ray.init` takes it; None starts one on this machine, unless
            Ray is initialised already, and ends it afterwards.
        workers: how many actors; None: one for each CPU (or each `threads` CPUs) of the cluster.

    Raises:
        MissingDependencyError: without ray.
    """

    address: str | None = None
    workers: int | None = None

    def __call__(
        self, job: Job, plan: Plan, tasks: Sequence[Task]
    ) -> Generator[TaskResult, None, None]:
        """Score `tasks`, each in one of the actors, and yield the results as they come."""
        if not tasks:
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray = require("ray", "ray", "the ray engine")
        started = not ray.is_initialized()
        if started:
            self._start(ray)
        try:
            yield from self._scored(ray, job, plan, tasks)
        finally:
            if started:
                ray.shutdown()

    def _start(self, ray: Any) -> None:
        options: dict[str, Any] = {"address": self.address, "log_to_driver": False}
        options["logging_level"] = logging.WARNING
        if self.address is None:
            # Workers find the package where this process found it.
            paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
            options |= {
                "num_cpus": self.workers,
                "include_dashboard": False,
                "object_store_memory": _STORE,
                "_node_ip_address": "127.0.0.1",
                "runtime_env": {"env_vars": {"PYTHONPATH": paths}},
            }
        try:
            ray.init(**options)
        except Exception as exc:  # Ray raises ConnectionError, RuntimeError, ValueError, ...
            where = "on this machine" if self.address is None else f"at {self.address}"
            raise BackendUnavailableError(
                f"no Ray cluster {where} ({exc}); `ray status` shows what runs"
            ) from exc

    def _scored(
        self, ray: Any, job: Job, plan: Plan, tasks: Sequence[Task]
    ) -> Iterator[TaskResult]:
        pool_of = require("ray.util", "ray", "the ray engine").ActorPool
        cpus = job.threads or 1
        most = max(1, int(ray.cluster_resources().get("CPU", 1)) // cpus)
        actor = ray.remote(num_cpus=cpus, max_restarts=-1, max_task_retries=_ATTEMPTS)(_Actor)
        given = ray.put(replace(job, threads=cpus)), ray.put(_absolute(plan))
        actors = [actor.remote(*given) for _ in range(min(self.workers or most, len(tasks)))]
        try:
            for done in pool_of(actors).map_unordered(lambda a, p: a.score.remote(p), tasks):
                if isinstance(done, BaseException):
                    raise done
                yield done
        except ray.exceptions.RayError as exc:  # a worker lacks the package, for instance
            raise BackendUnavailableError(
                f"the Ray workers can't do it ({str(exc).strip().splitlines()[-1]}); every machine "
                "needs this version of smoothl1-deploy with its extras cpu and ray"
            ) from exc
        finally:
            for handle in actors:
                ray.kill(handle)


def _absolute(plan: Plan) -> Plan:
    """A worker has another working folder."""

    def shard(found: Shard) -> Shard:
        files = {r: replace(at, path=at.path.absolute()) for r, at in found.files.items()}
        return replace(found, files=files)

    return replace(plan, shards=tuple(map(shard, plan.shards)))


class _Actor:
    """One session on one worker."""

    def __init__(self, job: Job, plan: Plan) -> None:
        silence()
        self._job, self._plan = job, plan
        self._scorer: TaskScorer | None = None
        self._name = f"{socket.gethostname()}:{os.getpid()}"

    def score(self, task: Task) -> TaskResult | SmoothL1DeployError:
        """The task's result, or the error it ends with, which Ray would put into a traceback."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                if self._scorer is None:
                    self._scorer = TaskScorer(self._job, self._plan)
                return self._scorer.score(task)
            except (SmoothL1DeployError, OSError) as exc:
                if self._scorer is not None:  # the next attempt opens files and session anew
                    self._scorer.close()
                    self._scorer = None
                if attempt == _ATTEMPTS:
                    if isinstance(exc, OSError):
                        raise
                    return type(exc)(f"{exc} (on {self._name})")
        raise AssertionError("unreachable")
