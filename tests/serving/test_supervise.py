"""The models of a running server: refused, new, broken, and changed in their place."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smoothl1_deploy import LossSpec
from smoothl1_deploy.errors import ArtefactError, ServerError
from smoothl1_deploy.serving import Client
from smoothl1_deploy.serving._embedded import Triton
from smoothl1_deploy.serving._repository import write_loss
from smoothl1_deploy.serving._server import Server
from smoothl1_deploy.serving._supervise import Supervisor

_TENSORS = (
    'input { name: "x" data_type: TYPE_FP32 dims: 1 } '
    'output { name: "y" data_type: TYPE_FP32 dims: 1 }'
)
_STEP = (
    "ensemble_scheduling { step { model_name: %r model_version: -1 "
    'input_map { key: "x" value: "x" } output_map { key: "y" value: "y" } } }'
)
_PYTHON = """
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        return [
            pb.InferenceResponse([pb.Tensor.from_dlpack("y", request.inputs()[0].to_dlpack())])
            for request in requests
        ]
"""


def add(root: Path, name: str, config: str, **files: str) -> None:
    (root / name / "1").mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(f"{config} {_TENSORS}")
    for file, text in files.items():
        (root / name / "1" / file.replace("_py", ".py")).write_text(text)


class Watched:
    """A server in this process, its supervisor, and what that has recorded."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.supervisor = Supervisor(server, self._record)

    def _record(self, event: str, **fields: Any) -> None:
        self.seen.append((event, fields))

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.seen
            self.supervisor.check()

    def events(self, *names: str) -> list[dict[str, Any]]:
        return [fields for event, fields in self.seen if event in names]

    def loss(self) -> float:
        """Of elements that differ by 1: beta 1 gives 0.5, beta 0.5 0.75, beta 0.25 0.875."""
        with Client(self.server.addresses.to_dict()["http"], "mean") as client:
            return float(client.loss(np.ones((1, 16), "f4"), np.zeros((1, 16), "f4")))


@contextlib.contextmanager
def watched(root: Path, triton: Triton, **options: Any) -> Iterator[Watched]:
    with Server(root, triton, **options) as server:
        found = Watched(server)
        with contextlib.closing(found.supervisor):
            yield found


def new_version(root: Path, version: str, beta: float) -> None:
    """A version of the model `mean`, whole at once."""
    (model,) = write_loss(root.parent / f"new-{version}-{beta}", LossSpec(beta), name="mean")
    (root / "mean" / version).mkdir(exist_ok=True)
    os.replace(model.file, root / "mean" / version / "model.onnx")


def test_what_triton_refuses_is_left_out_in_its_words_and_the_others_are_served(
    tmp_path: Path, triton: Triton
) -> None:
    root = tmp_path / "models"
    write_loss(root, LossSpec(), name="mean")
    add(root, "python", 'backend: "python"', model_py=_PYTHON)
    add(root, "whole", f'platform: "ensemble" {_STEP % "python"}')
    add(root, "no_file", 'platform: "onnxruntime_onnx"')
    add(root, "plan", 'platform: "tensorrt_plan"')
    add(root, "another", 'name: "called" backend: "python"', model_py=_PYTHON)
    add(root, "part", f'platform: "ensemble" {_STEP % "absent"}')
    (narrow,) = write_loss(root, LossSpec(), name="dtype")
    config = narrow.folder / "config.pbtxt"
    config.write_text(config.read_text().replace("TYPE_FP32", "TYPE_FP64"))
    with watched(root, triton) as found:
        found.supervisor.bring_up()
        assert [*found.supervisor.models] == found.server.models == ["mean", "python", "whole"]
        x = {"x": np.array([3], "f4")}
        with Client(found.server.addresses.to_dict()["grpc"], "whole") as client:
            assert client.infer(x)["y"] == 3
        reasons = {fields["model"]: fields["reason"] for fields in found.events("refused")}
    refused = {"no_file", "plan", "another", "part", "dtype"}
    assert {*reasons} == {*found.server.left_out} == refused
    assert "NO_SUCHFILE" in reasons["no_file"] and "At:" not in reasons["no_file"]
    assert "unable to find backend library for backend 'tensorrt'" in reasons["plan"]
    assert reasons["another"].startswith("unexpected directory name 'another' for model 'called'")
    said = "TYPE_FP64 [-1, 16] in config.pbtxt and tensor(float) [-1, 16] in the graph"
    assert said in reasons["dtype"]
    assert reasons["part"].endswith("not available or ambiguous: absent")
    for name, reason in found.server.left_out.items():
        assert reason.endswith(f"load the model {name!r}: {reasons[name]}")


def test_new_broken_and_changed_versions_without_a_failure_in_between(
    tmp_path: Path, triton: Triton
) -> None:
    root = tmp_path / "models"
    write_loss(root, LossSpec(), name="mean")
    (root / "mean/2").mkdir()
    (root / "mean/2/model.onnx").write_bytes(b"no model")
    with watched(root, triton) as found:
        # The newest one is broken before the start: the one before serves, as it would after it.
        found.supervisor.bring_up()
        (refused,) = found.events("version_refused")
        assert refused["version"] == "2" and "Protobuf parsing failed" in refused["reason"]
        assert found.supervisor.models["mean"].version == "1" and found.loss() == 0.5

        new_version(root, "1", 0.25)  # in its place
        found.until(lambda: bool(found.events("changed")))
        assert found.loss() == 0.875

        new_version(root, "2", 0.5)  # mended
        found.until(lambda: bool(found.events("version")))
        assert found.loss() == 0.75
        assert found.events("version") == [{"model": "mean", "version": "2", "before": "1"}]
        assert found.supervisor.models["mean"].version == "2"

        config = (root / "mean/config.pbtxt").read_text()
        (root / "mean/config.pbtxt").write_text("junk {")
        words = "failed to read text proto"
        found.until(lambda: found.server.log.path.read_text().count(words) > 1)
        assert found.supervisor.check()
        (refused,) = found.events("refused")  # once, however often Triton says it
        assert words in refused["reason"] and found.loss() == 0.75
        (root / "mean/config.pbtxt").write_text(config)
        assert found.events("canary_failed", "reload_failed") == []

        # Version 3 is broken, and the process of version 2 dies: that one comes back.
        (root / "mean/3").mkdir()
        (root / "mean/3/model.onnx").write_bytes(b"no model")
        found.until(lambda: len(found.events("version_refused")) == 2)
        for process in found.supervisor.models["mean"].processes:
            process.kill()
        found.until(lambda: bool(found.events("reloaded")))
        assert found.loss() == 0.75 and len(found.events("version_refused")) == 2


def test_a_server_that_ended_by_itself_is_told_with_its_last_words(
    tmp_path: Path, triton: Triton
) -> None:
    write_loss(tmp_path, LossSpec(), name="mean")
    with watched(tmp_path, triton) as found:
        found.supervisor.bring_up()
        os.kill(found.server.pid, signal.SIGKILL)
        with pytest.raises(ServerError, match="ended by itself with -9; its last words: .*"):
            found.until(lambda: False)


def test_a_server_for_this_process_alone_loads_over_a_socket_of_this_users(
    tmp_path: Path, triton: Triton
) -> None:
    with Server(tmp_path, triton, private=True) as server:
        write_loss(tmp_path, LossSpec(), name="mean")
        server.load("mean")
        path = Path(server.addresses.grpc.removeprefix("unix:"))
        assert path.is_socket() and path.parent.stat().st_mode & 0o77 == 0
        (tmp_path / "mean/1/model.onnx").write_bytes(b"no model")
        with pytest.raises(ArtefactError, match="can't load the model 'mean': .*Protobuf parsing"):
            server.load("mean")
        server.unload("mean")
