"""What an export says about itself, and that it can't be changed unnoticed."""

from __future__ import annotations

import json
import math

import onnx
import pytest

import smoothl1_deploy
from smoothl1_deploy import LossSpec, export
from smoothl1_deploy.errors import ArtefactError
from smoothl1_deploy.graph.metadata import content_hash, is_changed, read_route, read_spec, stamp
from smoothl1_deploy.model import metadata_of

KEYS = [f"smoothl1_deploy.{key}" for key in ("spec", "route", "version", "sha256")]


def properties(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def with_spec_entry(text: str) -> onnx.ModelProto:
    """A model whose spec entry is `text`, with a hash that fits."""
    model = export(LossSpec())
    props = {**properties(model), KEYS[0]: text}
    del props[KEYS[3]]
    onnx.helper.set_model_props(model, props)
    onnx.helper.set_model_props(model, {**props, KEYS[3]: content_hash(model)})
    return model


@pytest.mark.parametrize("route", ["function", "inlined"])
@pytest.mark.parametrize(
    "spec", [LossSpec(0.1), LossSpec(0.0, "sum", "bfloat16"), LossSpec(math.inf, "none", "float64")]
)
def test_spec_and_route_are_read_back(spec: LossSpec, route: str) -> None:
    model = onnx.load_model_from_string(export(spec, route).SerializeToString())
    assert read_spec(model) == spec
    assert read_route(model) == route


def test_a_model_of_other_origin_has_neither() -> None:
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    assert read_spec(model) is None
    assert read_route(model) is None


def test_metadata_and_doc_strings() -> None:
    model = export(LossSpec(0.5, "sum"), "inlined", ("N", 4), target_shape=(4,))
    props = properties(model)
    assert list(props) == KEYS
    assert json.loads(props[KEYS[0]]) == {"beta": 0.5, "reduction": "sum", "dtype": "float32"}
    assert props[KEYS[1]] == "inlined"
    assert props[KEYS[2]] == smoothl1_deploy.__version__ == model.producer_version
    assert props[KEYS[3]] == content_hash(model)
    assert len(props[KEYS[3]]) == 64
    assert model.producer_name == "smoothl1-deploy"
    assert model.graph.name == "smooth_l1_loss_beta_0.5_sum_float32_inlined_Nx4-target_4"
    described = "Smooth L1 loss: beta=0.5, reduction=sum, dtype=float32"
    assert model.graph.doc_string == described
    assert model.doc_string == f"{described}; route=inlined, shapes=Nx4-target_4"


def test_stamping_again_replaces() -> None:
    model = export(LossSpec(0.5))
    stamp(model, LossSpec(0.25), "function", "any")
    assert read_spec(model) == LossSpec(0.25)
    assert list(properties(model)) == KEYS


def _other_beta(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute[0].f = 0.25


def _other_spec(model: onnx.ModelProto) -> None:
    model.metadata_props[0].value = model.metadata_props[0].value.replace("0.5", "0.25")


def _other_route(model: onnx.ModelProto) -> None:
    model.metadata_props[1].value = "torch"


def _other_body(model: onnx.ModelProto) -> None:
    del model.functions[0].node[-1]


def _other_name(model: onnx.ModelProto) -> None:
    model.graph.name = "main_graph"


def _other_shape(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "M"


def _other_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 19


def _one_more_entry(model: onnx.ModelProto) -> None:
    model.metadata_props.add(key="author", value="somebody")


def _no_hash(model: onnx.ModelProto) -> None:
    del model.metadata_props[3]


def _empty_hash(model: onnx.ModelProto) -> None:
    model.metadata_props[3].value = ""


@pytest.mark.parametrize(
    "change",
    [
        _other_beta,
        _other_spec,
        _other_route,
        _other_body,
        _other_name,
        _other_shape,
        _other_opset,
        _one_more_entry,
        _no_hash,
        _empty_hash,
    ],
)
def test_a_change_is_noticed_and_the_spec_still_read(change: object) -> None:
    model = export(LossSpec(0.5), shape=("N", 4))
    assert not is_changed(model)
    change(model)  # type: ignore[operator]
    assert is_changed(model)
    assert read_spec(model) == LossSpec(0.25 if change is _other_spec else 0.5)


def test_a_model_of_other_origin_is_not_called_changed() -> None:
    model = export(LossSpec(0.5))
    _other_beta(model)
    del model.metadata_props[:]
    assert read_spec(model) is None
    assert not is_changed(model)


def test_reading_changes_nothing() -> None:
    model = export(LossSpec(0.5))
    before = model.SerializeToString()
    read_spec(model)
    content_hash(model)
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "damaged metadata entry smoothl1_deploy.spec: Expecting value"),
        ("{", "damaged metadata entry"),
        ("null", "metadata entry smoothl1_deploy.spec: a loss spec is a mapping of its fields"),
        ("[]", "a loss spec is a mapping of its fields, got []"),
        ("5", "a loss spec is a mapping"),
        ('{"beta": -1}', "beta must not be negative, got -1.0"),
        ('{"beta": NaN}', "beta must not be NaN"),
        ('{"beta": "1"}', "beta must be a real number, got '1'"),
        ('{"dtype": "int8"}', "unknown dtype 'int8'"),
        ('{"huber": true}', "unknown field(s) huber in a loss spec; it was written by a newer"),
        ("[" * 100_000, "damaged metadata entry smoothl1_deploy.spec"),
    ],
    ids=range(11),
)
def test_a_damaged_entry_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ArtefactError) as caught:
        read_spec(with_spec_entry(text))
    assert str(caught.value).startswith("the model's ")
    assert reason in str(caught.value)


def test_a_route_that_is_no_utf_8_is_text_that_can_be_written_again() -> None:
    """protobuf reads it as bytes, which it takes for no entry of another model."""
    data = (
        export(LossSpec(0.5))
        .SerializeToString()
        .replace(b"\x12\x08function", b"\x12\x08func\xc4ion")
    )
    damaged = onnx.ModelProto.FromString(data)
    assert read_route(damaged) == "func�ion"
    onnx.helper.set_model_props(damaged, metadata_of(damaged))
