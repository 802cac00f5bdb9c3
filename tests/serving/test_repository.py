"""`write_loss` and `write_model`: what lies in the folders, and that nothing is half-written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import onnx
import pytest
import yaml
from conftest_serving import tensorrt_engine

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy.errors import (
    ArtefactError,
    ModelWarning,
    OutputError,
    SpecError,
    UnsupportedError,
)
from smoothl1_deploy.graph._metadata import is_changed, is_served, read_spec
from smoothl1_deploy.serving import _repository as repository
from smoothl1_deploy.serving._repository import inference_service, write_loss, write_model

pytest.importorskip("tritonclient", reason="the extra serve")

from smoothl1_deploy.serving._config import dump_config, read_config


def config_of(folder: Path) -> Any:
    return read_config((folder / "config.pbtxt").read_bytes())


def dims(ports: Any) -> dict[str, list[int]]:
    return {port.name: list(port.dims) for port in ports}


def test_the_config_of_each_variant(tmp_path: Path) -> None:
    for spec, batch, inputs, output in (
        (LossSpec(reduction="none"), 64, [16], [16]),
        (LossSpec(per_sample=True), 64, [16], [1]),
        (LossSpec(), 0, [-1, 16], [1]),
        (LossSpec(reduction="sum"), 0, [-1, 16], [1]),
    ):
        (written,) = write_loss(tmp_path, spec)
        assert written.folder == tmp_path / spec.name and written.file.is_file()
        config = config_of(written.folder)
        assert (config.name, config.platform) == (spec.name, "onnxruntime_onnx")
        assert config.max_batch_size == written.max_batch_size == batch
        assert dims(config.input) == {"input": inputs, "target": inputs}
        assert dims(config.output) == {"loss": output}
        assert config.HasField("dynamic_batching") == (batch > 0)
        assert {field.name for field, _ in config.ListFields()} <= {
            *("name", "platform", "max_batch_size", "input", "output", "dynamic_batching"),
            "instance_group",
        }
        assert (written.folder / "config.pbtxt").read_bytes() == dump_config(config)


def test_a_batch_of_any_size_where_rows_are_independent(tmp_path: Path) -> None:
    (written,) = write_loss(tmp_path, LossSpec(per_sample=True), max_batch_size=8)
    assert config_of(written.folder).max_batch_size == 8
    (written,) = write_loss(tmp_path, LossSpec(per_sample=True), name="one", max_batch_size=0)
    assert dims(config_of(written.folder).input)["input"] == [-1, 16]


def test_bad_requests_leave_nothing(tmp_path: Path) -> None:
    rows, of_request = LossSpec(per_sample=True), LossSpec(runtime_beta=True, reduction="none")
    for spec, options, message in (
        (LossSpec(), {"max_batch_size": 8}, "Leave it out, or serve a loss with per_sample"),
        (of_request, {"max_batch_size": 8}, "beta is one number for a whole batch, and two reques"),
        (rows, {"max_batch_size": -1}, "must be 0 to 2147483647, got -1; 0 is no batching"),
        (rows, {"max_batch_size": 1 << 31}, "must be 0 to 2147483647, got 2147483648"),
        (rows, {"shape": (4, 16)}, r"got the shape \(4, 16\); give a name for"),
        (rows, {"shape": ()}, r"got the shape \(\); give a name for"),
        (rows, {"name": "../x"}, r"'../x' can't be a model's name"),
        (rows, {"name": ".x"}, r"'.x' can't be a model's name"),
    ):
        with pytest.raises(SpecError, match=message):
            write_loss(tmp_path / "new" / "models", spec, **options)  # type: ignore[arg-type]
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


def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (written,) = write_loss(tmp_path, LossSpec(), name="loss")
    before, replace_ = written.file.read_bytes(), os.replace
    for failing in (0, 1):
        calls = iter(range(10))

        def full(old: Any, new: Any, calls: Any = calls, failing: int = failing) -> None:
            if next(calls) == failing:
                raise OSError(28, "No space left on device")
            replace_(old, new)

        monkeypatch.setattr(repository.os, "replace", full)
        with pytest.raises(OutputError, match="can't write into .*: No space left on device; cho"):
            write_loss(tmp_path, LossSpec(2.0), name="loss", overwrite=True)
        assert written.file.read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["loss"]
    monkeypatch.setattr(repository.os, "replace", lambda *_: replace_(tmp_path / "no", "no"))
    with pytest.raises(OutputError, match="No such file"):
        write_loss(tmp_path / "new" / "models", LossSpec())
    monkeypatch.undo()
    with pytest.raises(OutputError, match="can't write into .*onnx.*: Not a directory"):
        write_loss(written.file / "models", LossSpec())
    assert [path.name for path in tmp_path.iterdir()] == ["loss"]


def test_an_engine_becomes_a_model_of_its_own(tmp_path: Path) -> None:
    (plain,) = write_loss(tmp_path / "a", LossSpec(reduction="none"), name="loss")
    engine = tensorrt_engine(plain.file, tmp_path / "loss.engine")
    models = write_loss(tmp_path / "b", LossSpec(reduction="none"), name="loss", engine=engine)
    assert [model.name for model in models] == ["loss", "loss_trt"]
    trt = models[1]
    assert (trt.platform, trt.file.name) == ("tensorrt_plan", "model.plan")
    assert trt.file.read_bytes() == engine.read_bytes()
    assert trt.file.with_name("model.plan.json").is_file()
    config = config_of(trt.folder)
    assert (config.name, config.platform, config.max_batch_size) == ("loss_trt", trt.platform, 64)
    assert dims(config.input) == {"input": [16], "target": [16]}


def test_an_engine_that_triton_cant_load_or_of_another_graph(tmp_path: Path) -> None:
    spec = LossSpec(reduction="none")
    (plain,) = write_loss(tmp_path / "a", spec, name="loss")
    engine = tensorrt_engine(plain.file, tmp_path / "rtx.engine", flavour="tensorrt_rtx")
    refused = r"is an engine of tensorrt_rtx 10\..*; build it with --flavour tensorrt on a machine"
    with pytest.raises(UnsupportedError, match=refused):
        write_loss(tmp_path / "models", spec, engine=engine)
    engine = tensorrt_engine(plain.file, tmp_path / "other.engine", onnx_sha256="0" * 64)
    with pytest.raises(ArtefactError, match="was built from another graph than the served one"):
        write_loss(tmp_path / "models", spec, engine=engine)
    assert not (tmp_path / "models").exists()


def test_a_changed_model_stays_known_as_changed(tmp_path: Path) -> None:
    """A fresh hash would say that this tool exported the graph."""
    model = export(LossSpec(0.5), shape=("N", 4))
    model.graph.node[0].attribute[0].f = 0.25
    with pytest.warns(ModelWarning, match="changed by something else after"):
        (written,) = write_model(tmp_path / "models", model, name="mine")
    served = onnx.load(written.file)
    assert (read_spec(served), is_changed(served), is_served(served)) == (LossSpec(0.5), True, True)


# On a cluster

#: Written from the v1beta1 Go types of kserve/kserve and the checks of its webhook.
SCHEMA = json.loads(Path(__file__).with_name("inference_service.schema.json").read_text())


def test_the_file_passes_the_schema_and_says_what_a_cluster_needs() -> None:
    for gpus in (0, 1):
        read = yaml.safe_load(inference_service("null", "s3://bucket/a:", gpus=gpus))
        jsonschema.validate(read, SCHEMA)
        model = read["spec"]["predictor"]["model"]
        assert ("nvidia.com/gpu" in model["resources"]["limits"]) == bool(gpus)
    assert (read["metadata"]["name"], model["storageUri"]) == ("null", "s3://bucket/a:")
    assert model["runtimeVersion"] == "25.07-py3"  # the runtime's own default is older
    assert (model["runtime"], model["protocolVersion"]) == ("kserve-tritonserver", "v2")
    assert read["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "hpa"
    model["runtimeversion"] = model.pop("runtimeVersion")  # the API has no such field
    assert not jsonschema.Draft202012Validator(SCHEMA).is_valid(read)


def test_what_kserve_would_refuse() -> None:
    for name, uri, message in (
        ("smooth_l1", "pvc://a/b", "'smooth_l1' can't be the name of an InferenceService, which"),
        ("a" * 64, "pvc://a/b", "63 characters at most"),
        ("smooth-l1", "models", "the storage URI 'models' has no scheme; write where"),
    ):
        with pytest.raises(SpecError, match=message):
            inference_service(name, uri)
