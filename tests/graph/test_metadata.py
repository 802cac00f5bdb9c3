"""What an export says about itself, and that it can't be changed unnoticed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import onnx
import pytest

import smoothl1_deploy
from smoothl1_deploy import LossSpec, export
from smoothl1_deploy._model import metadata_of
from smoothl1_deploy.errors import ArtefactError
from smoothl1_deploy.graph._metadata import content_hash, is_changed, read_route, read_spec, stamp

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


def test_spec_and_route_are_read_back_and_reading_changes_nothing() -> None:
    infinite = LossSpec(math.inf, "none", "float64")
    for spec in (LossSpec(0.1), LossSpec(0.0, "sum", "bfloat16"), infinite):
        for route in ("function", "inlined"):
            data = export(spec, route).SerializeToString()
            model = onnx.load_model_from_string(data)
            assert (read_spec(model), read_route(model)) == (spec, route)
            assert len(content_hash(model)) == 64
            assert model.SerializeToString() == data
    del model.metadata_props[:]  # as one of other origin
    assert read_spec(model) is read_route(model) is None
    assert not is_changed(model)


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


CHANGES: dict[str, Callable[[onnx.ModelProto], object]] = {
    "an attribute": lambda m: setattr(m.graph.node[0].attribute[0], "f", 0.25),
    "the spec": lambda m: setattr(m.metadata_props[0], "value", '{"beta": 0.25}'),
    "the route": lambda m: setattr(m.metadata_props[1], "value", "torch"),
    "a function's body": lambda m: m.functions[0].node.pop(),
    "the graph's name": lambda m: setattr(m.graph, "name", "main_graph"),
    "a shape": lambda m: m.graph.input[0].type.tensor_type.shape.dim.pop(),
    "the opset": lambda m: setattr(m.opset_import[0], "version", 19),
    "one more entry": lambda m: m.metadata_props.add(key="author", value="somebody"),
    "no hash": lambda m: m.metadata_props.pop(3),
    "an empty hash": lambda m: setattr(m.metadata_props[3], "value", ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_and_the_spec_still_read(change: str) -> None:
    model = export(LossSpec(0.5), shape=("N", 4))
    assert not is_changed(model)
    CHANGES[change](model)
    assert is_changed(model)
    assert read_spec(model) == LossSpec(0.25 if change == "the spec" else 0.5)


def test_a_damaged_entry_is_refused() -> None:
    refused, damaged = (f"{kind}metadata entry smoothl1_deploy.spec: " for kind in ("", "damaged "))
    for text, reason in (
        ("", f"{damaged}Expecting value"),
        ("[" * 100_000, damaged),
        ("null", f"{refused}a loss spec is a mapping of its fields"),
        ("[]", f"{refused}a loss spec is a mapping of its fields, got []"),
        ('{"beta": -1}', f"{refused}beta must not be negative, got -1.0"),
        ('{"beta": NaN}', f"{refused}beta must not be NaN"),
        ('{"beta": "1"}', f"{refused}beta must be a real number, got '1'"),
        ('{"dtype": "int8"}', f"{refused}unknown dtype 'int8'"),
        ('{"huber": true}', f"{refused}unknown field(s) huber in a loss spec; it was written by a"),
    ):
        with pytest.raises(ArtefactError) as caught:
            read_spec(with_spec_entry(text))
        assert str(caught.value).startswith(f"the model's {reason}")


def test_a_route_that_is_no_utf_8_is_text_that_can_be_written_again() -> None:
    """protobuf reads it as bytes, which it takes for no entry of another model."""
    data = export(LossSpec(0.5)).SerializeToString()
    data = data.replace(b"\x12\x08function", b"\x12\x08func\xc4ion")
    damaged = onnx.ModelProto.FromString(data)
    assert read_route(damaged) == "func�ion"
    onnx.helper.set_model_props(damaged, metadata_of(damaged))
