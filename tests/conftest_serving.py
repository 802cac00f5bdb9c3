"""What the tests of serving share: the embedded Triton, set up once, and a repository for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from embedded import embedded_triton
from handmade import detector, model_of

from smoothl1_deploy import LossSpec, attach
from smoothl1_deploy.serving._embedded import Triton
from smoothl1_deploy.serving._server import Server

#: name on the server -> what it computes.
SPECS = {
    "none": LossSpec(reduction="none"),
    "mean": LossSpec(),
    "sum": LossSpec(reduction="sum", dtype="float16"),
    "scores": LossSpec(per_sample=True, dtype="bfloat16"),
    "beta": LossSpec(runtime_beta=True, dtype="float64"),
    "weighted": LossSpec(weight="weights", gradient=True),
    "masked": LossSpec(mask=True, gradient=True),
    "divided": LossSpec(divisor=True),
    "betas": LossSpec(runtime_beta=(16,), per_sample=True, mask=True),
}

_HEAD = model_of("g (float[N, 3, 8, 8] images) => (float[N, 192] boxes) {boxes = Flatten(images)}")
#: name on the server -> a whole model: with two losses, and with one whose rows may be batched.
WHOLE = {
    "detector": detector(),
    "head": attach(_HEAD, "boxes", "boxes_gt", LossSpec(0.5, per_sample=True)),
}


@pytest.fixture(scope="session")
def triton() -> Triton:
    """The embedded one."""
    found: Triton = embedded_triton()
    return found


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, triton: Triton) -> Path:
    from smoothl1_deploy.serving._repository import write_loss, write_model

    folder = tmp_path_factory.mktemp("repository")
    for name, spec in SPECS.items():
        write_loss(folder, spec, name=name)
    for name, model in WHOLE.items():
        write_model(folder, model, name=name)
    return folder


@pytest.fixture(scope="module")
def server(repository: Path, triton: Triton) -> Iterator[Server]:
    """All of SPECS and WHOLE, loaded; it must be left as it was found."""
    server = Server(repository, triton, admin_key="of the tests", loss_metrics=True)
    server.start()
    yield server
    server.stop(at_once=True)


def tensorrt_engine(model: Path, path: Path, **fields: Any) -> Path:
    """A real engine of TensorRT for RTX, whose sidecar says that TensorRT 10.13 built it.

    Args:
        model: what it is built from.
        path: where it goes.
        fields: what else its sidecar says otherwise.
    """
    pytest.importorskip("tensorrt_rtx")
    from smoothl1_deploy import build_engine
    from smoothl1_deploy.tensorrt._engine import read_verified, write_engine

    build_engine(model, path, flavour="tensorrt_rtx", profile={"input": (1, 8, 64)})
    engine = read_verified(path)
    said = {"flavour": "tensorrt", "version": "10.13.0.35", **fields}
    write_engine(path, engine.data, replace(engine.sidecar, **said))
    return path
