"""`write_loss` and `write_model`: what lies in the folders, and that nothing is half-written."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy.artefact import sha256
from smoothl1_deploy.errors import (
    ArtefactError,
    ModelWarning,
    OutputError,
    SpecError,
    UnsupportedError,
)
from smoothl1_deploy.graph.metadata import is_changed, is_served, read_spec
from smoothl1_deploy.serving import repository
from smoothl1_deploy.serving.repository import write_loss, write_model

pytest.importorskip("tritonclient", reason="the extra serve")

from smoothl1_deploy.serving.model_config import dump_config, read_config


def config_of(folder: Path) -> Any:
    return read_config((folder / "config.pbtxt").read_bytes())


def dims(ports: Any) -> dict[str, list[int]]:
    return {port.name: list(port.dims) for port in ports}


@pytest.mark.parametrize(
    ("spec", "batch", "inputs", "output"),
    [
        (LossSpec(reduction="none"), 64, [16], [16]),
        (LossSpec(per_sample=True), 64, [16], [1]),
        (LossSpec(), 0, [-1, 16], [1]),
        (LossSpec(reduction="sum"), 0, [-1, 16], [1]),
    ],
    ids=lambda value: value.name if isinstance(value, LossSpec) else "",
)
def test_the_config_of_each_variant(
    tmp_path: Path, spec: LossSpec, batch: int, inputs: list[int], output: list[int]
) -> None:
    (written,) = write_loss(tmp_path, spec)
    assert written.folder == tmp_path / spec.name and written.file.is_file()
    config = config_of(written.folder)
    assert (config.name, config.platform) == (spec.name, "onnxruntime_onnx")
    assert config.max_batch_size == written.max_batch_size == batch
    assert dims(config.input) == {"input": inputs, "target": inputs}
    assert dims(config.output) == {"loss": output}
    assert config.HasField("dynamic_batching") == (batch > 0)
    assert {field.name for field, _ in config.ListFields()} <= {
        "name", "platform", "max_batch_size", "input", "output", "dynamic_batching",
        "instance_group",
    }  # fmt: skip
    assert (written.folder / "config.pbtxt").read_bytes() == dump_config(config)


@pytest.mark.parametrize(
    ("dtype", "triton"),
    [("float32", 11), ("float16", 10), ("bfloat16", 14), ("float64", 12)],
)
def test_the_data_types(tmp_path: Path, dtype: str, triton: int) -> None:
    (written,) = write_loss(tmp_path, LossSpec(dtype=dtype, runtime_beta=True), name="loss")
    types = {port.name: port.data_type for port in config_of(written.folder).input}
    assert types == {"input": triton, "target": triton, "beta": 11}
    assert dims(config_of(written.folder).input)["beta"] == [1]


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_loss(tmp_path / name, LossSpec())[0] for name in "ab")
    for file in ("config.pbtxt", "1/model.onnx"):
        assert (first.folder / file).read_bytes() == (second.folder / file).read_bytes()


def test_a_batch_of_any_size_where_rows_are_independent(tmp_path: Path) -> None:
    (written,) = write_loss(tmp_path, LossSpec(per_sample=True), max_batch_size=8)
    assert config_of(written.folder).max_batch_size == 8
    (written,) = write_loss(tmp_path, LossSpec(per_sample=True), name="one", max_batch_size=0)
    assert dims(config_of(written.folder).input)["input"] == [-1, 16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"spec": LossSpec(), "max_batch_size": 8},
            r"max_batch_size=8, but requests must not be batched together: loss is a mean over "
            r"all rows of a batch.*Leave it out, or use per_sample=True",
        ),
        (
            {"spec": LossSpec(runtime_beta=True, reduction="none"), "max_batch_size": 8},
            "beta is one number for a whole batch, and two requests may differ in it",
        ),
        (
            {"spec": LossSpec(per_sample=True), "max_batch_size": -1},
            "max_batch_size must be 0 to 2147483647, got -1; 0 is no batching",
        ),
        (
            {"spec": LossSpec(per_sample=True), "max_batch_size": 1 << 31},
            "max_batch_size must be 0 to 2147483647, got 2147483648",
        ),
        ({"spec": LossSpec(), "shape": (4, 16)}, r"got the shape \(4, 16\); give a name for"),
        ({"spec": LossSpec(), "shape": ()}, r"got the shape \(\); give a name for"),
        ({"spec": LossSpec(), "name": "../x"}, r"'../x' can't be a model's name"),
        ({"spec": LossSpec(), "name": ".x"}, r"'.x' can't be a model's name"),
    ],
)
def test_bad_requests_leave_nothing(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        write_loss(tmp_path / "new" / "models", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_there_is_kept_unless_asked(tmp_path: Path) -> None:
    (written,) = write_loss(tmp_path, LossSpec(), name="loss")
    before = written.file.read_bytes()
    with pytest.raises(OutputError, match=r"loss exists; choose another name with --name, or"):
        write_loss(tmp_path, LossSpec(2.0), name="loss")
    assert written.file.read_bytes() == before
    (written.folder / "2").mkdir()
    write_loss(tmp_path, LossSpec(2.0), name="loss", overwrite=True)
    assert written.file.read_bytes() != before
    assert sorted(path.name for path in written.folder.iterdir()) == ["1", "config.pbtxt"]
    assert [path.name for path in tmp_path.iterdir()] == ["loss"]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    (written,) = write_loss(tmp_path, LossSpec(), name="loss")
    before = written.file.read_bytes()
    calls, replace_ = iter(range(10)), os.replace

    def full(old: object, new: object) -> None:
        if next(calls) == failing:
            raise OSError(28, "No space left on device")
        replace_(old, new)  # type: ignore[call-overload]

    monkeypatch.setattr(repository.os, "replace", full)
    with pytest.raises(OutputError, match="can't write into .*: No space left on device; choose"):
        write_loss(tmp_path, LossSpec(2.0), name="loss", overwrite=True)
    assert written.file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["loss"]


def test_a_write_that_fails_leaves_no_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(old: object, new: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(repository.os, "replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_loss(tmp_path / "new" / "models", LossSpec())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cant_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't write into .*file.*: Not a directory"):
        write_loss(tmp_path / "file" / "models", LossSpec())


def _engine(path: Path, flavour: str, digest: str) -> Path:
    """A real engine of TensorRT for RTX whose sidecar says what the test needs."""
    pytest.importorskip("tensorrt_rtx")
    from smoothl1_deploy import build_engine, export
    from smoothl1_deploy.tensorrt.engine import read_verified, write_engine

    model = export(LossSpec(reduction="none"), "inlined", ("N", 16))
    build_engine(model, path, flavour="tensorrt_rtx", profile={"input": (1, 8, 64)})
    engine = read_verified(path)
    version = {"tensorrt": "10.13.0.35"}.get(flavour, engine.sidecar.version)
    sidecar = replace(engine.sidecar, flavour=flavour, version=version, onnx_sha256=digest)
    write_engine(path, engine.data, sidecar)
    return path


def test_an_engine_becomes_a_model_of_its_own(tmp_path: Path) -> None:
    (plain,) = write_loss(tmp_path / "a", LossSpec(reduction="none"), name="loss")
    engine = _engine(tmp_path / "loss.engine", "tensorrt", sha256(plain.file.read_bytes()))
    models = write_loss(tmp_path / "b", LossSpec(reduction="none"), name="loss", engine=engine)
    assert [model.name for model in models] == ["loss", "loss_trt"]
    trt = models[1]
    assert (trt.platform, trt.file.name) == ("tensorrt_plan", "model.plan")
    assert trt.file.read_bytes() == engine.read_bytes()
    assert trt.file.with_name("model.plan.json").is_file()
    config = config_of(trt.folder)
    assert (config.name, config.platform, config.max_batch_size) == ("loss_trt", trt.platform, 64)
    assert dims(config.input) == {"input": [16], "target": [16]}


def test_an_engine_that_triton_cant_load(tmp_path: Path) -> None:
    engine = _engine(tmp_path / "loss.engine", "tensorrt_rtx", "")
    with pytest.raises(
        UnsupportedError,
        match=r"is an engine of tensorrt_rtx 1\..*, and Triton's backend loads those of tensorrt "
        r"alone; build it with --flavour tensorrt on a machine with a GPU",
    ):
        write_loss(tmp_path / "models", LossSpec(reduction="none"), engine=engine)
    assert not (tmp_path / "models").exists()


def test_an_engine_of_another_graph(tmp_path: Path) -> None:
    engine = _engine(tmp_path / "loss.engine", "tensorrt", "0" * 64)
    with pytest.raises(ArtefactError, match="was built from another graph than the served one"):
        write_loss(tmp_path / "models", LossSpec(reduction="none"), engine=engine)


def test_a_model_from_a_file_has_its_name(tmp_path: Path) -> None:
    onnx.save(export(LossSpec(), shape=("N", 4)), tmp_path / "mine.onnx")
    (written,) = write_model(tmp_path / "models", tmp_path / "mine.onnx")
    assert written.name == "mine"


def test_a_changed_model_stays_known_as_changed(tmp_path: Path) -> None:
    """A fresh hash would say that this tool exported the graph."""
    model = export(LossSpec(0.5), shape=("N", 4))
    model.graph.node[0].attribute[0].f = 0.25
    with pytest.warns(ModelWarning, match="changed by something else after"):
        (written,) = write_model(tmp_path / "models", model, name="mine")
    served = onnx.load(written.file)
    assert (read_spec(served), is_changed(served), is_served(served)) == (LossSpec(0.5), True, True)
