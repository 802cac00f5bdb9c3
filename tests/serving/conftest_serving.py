"""What the tests of serving share: the embedded Triton, set up once, and a repository for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from smoothl1_deploy import LossSpec
from smoothl1_deploy.errors import SmoothL1DeployError
from smoothl1_deploy.serving.install import Triton, install
from smoothl1_deploy.serving.launcher import Server

#: name on the server -> what it computes.
SPECS = {
    "none": LossSpec(reduction="none"),
    "mean": LossSpec(),
    "sum": LossSpec(reduction="sum", dtype="float16"),
    "scores": LossSpec(per_sample=True, dtype="bfloat16"),
    "beta": LossSpec(runtime_beta=True, dtype="float64"),
    "weighted": LossSpec(weight="weights", gradient=True),
}


@pytest.fixture(scope="session")
def triton() -> Triton:
    """The embedded one; the first test that asks for it sets it up."""
    pytest.importorskip("tritonclient")
    try:
        return install()
    except SmoothL1DeployError as exc:
        pytest.skip(f"the embedded Triton can't run here: {exc}")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, triton: Triton) -> Path:
    from smoothl1_deploy.serving.repository import write_loss

    folder = tmp_path_factory.mktemp("repository")
    for name, spec in SPECS.items():
        write_loss(folder, spec, name=name)
    return folder


@pytest.fixture(scope="module")
def server(repository: Path, triton: Triton) -> Iterator[Server]:
    """All of SPECS, loaded; it must be left as it was found."""
    server = Server(repository, triton, admin_key="of the tests", loss_metrics=True)
    server.start()
    yield server
    server.stop(at_once=True)
