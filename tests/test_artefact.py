"""Artefacts: read without trust, and described as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from handmade import model_of

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy._artefact import read_model, signature
from smoothl1_deploy._model import Port
from smoothl1_deploy._spec import DTYPES
from smoothl1_deploy.backends._base import load
from smoothl1_deploy.errors import ArtefactError
from smoothl1_deploy.graph._metadata import is_changed, read_spec

SPEC = LossSpec(0.5)


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return export(SPEC, shape=("N", 4))


def difference(*inputs: str) -> onnx.ModelProto:
    """`Sub` of the first two inputs, by their types and names."""
    first, second = (inputs * 2)[:2]
    names = (first.split()[-1], second.split()[-1])
    text = f"g ({', '.join(inputs)}) => (float[?, 4] c) {{ c = Sub({', '.join(names)}) }}"
    return model_of(text)


# Reading


def test_reads_a_model_its_bytes_and_its_file(model: onnx.ModelProto, tmp_path: Path) -> None:
    data = model.SerializeToString()
    path = tmp_path / "loss.onnx"
    path.write_bytes(data)
    assert read_model(model) is model
    assert read_model(data) == model
    assert read_model(path) == model
    assert read_model(str(path)) == model


def test_what_is_no_file_and_no_source(tmp_path: Path) -> None:
    for path in (str(tmp_path / "nowhere.onnx"), "", "\0", "a\0b.onnx", "x" * 5000):
        with pytest.raises(ArtefactError) as caught:
            read_model(path)
        assert str(caught.value).endswith("does not exist; give the path of an .onnx file")
    with pytest.raises(ArtefactError) as caught:
        read_model(tmp_path)
    assert str(caught.value) == f"{tmp_path} is a folder; give the path of an .onnx file"
    for source in (None, 5, bytearray(b"x"), ["loss.onnx"], SPEC):
        with pytest.raises(ArtefactError) as caught:
            read_model(source)  # type: ignore[arg-type]
        text = f"expected an onnx.ModelProto, bytes or a path, got {type(source).__name__}"
        assert str(caught.value) == text


@pytest.mark.filterwarnings("ignore:The onnxtxt format is experimental")
def test_files_and_bytes_of_another_format(model: onnx.ModelProto, tmp_path: Path) -> None:
    text, binary, half = b"not a model at all\n", b"\0" * 64, model.SerializeToString()[:500]
    for content in (b"", b"hello", text, b"<html></html>", b"\x89PNG\r\n\x1a\n", binary, half):
        for suffix in (".onnx", ".txt", ".json", ".textproto", ".onnxtxt", ""):
            path = tmp_path / f"loss{suffix}"
            path.write_bytes(content)
            with pytest.raises(ArtefactError) as caught:
                read_model(path)
            assert str(caught.value).startswith(f"{path} ")
            assert str(caught.value).endswith("it is damaged, or of another format")
        with pytest.raises(ArtefactError, match=f"^{len(content)} bytes .*it is damaged, or of an"):
            read_model(content)
    empty = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    with pytest.raises(ArtefactError, match="holds no ONNX graph; it is damaged"):
        read_model(empty.SerializeToString())


def _spec_of_itself(data: bytes) -> LossSpec | None:
    """The spec of what was exported; None for what is refused, or known as changed since.

    Any error but ArtefactError is the test's failure.
    """
    try:
        model = read_model(data)
        signature(model)
        spec = read_spec(model)
    except ArtefactError:
        return None
    return None if is_changed(model) else spec


def test_a_model_cut_off_anywhere_never_passes_for_itself(model: onnx.ModelProto) -> None:
    data = model.SerializeToString()
    assert _spec_of_itself(data) == SPEC
    passed = [cut for cut in range(len(data)) if _spec_of_itself(data[:cut])]
    assert passed == []


@pytest.mark.parametrize("mask", [0x01, 0x80])
def test_a_model_with_a_changed_byte_never_passes_for_itself(
    model: onnx.ModelProto, mask: int
) -> None:
    data = model.SerializeToString()
    for i in range(len(data)):
        changed = data[:i] + bytes([data[i] ^ mask]) + data[i + 1 :]
        if _spec_of_itself(changed):  # protobuf ignores some bits of a long varint
            assert read_model(changed) == model


# Describing


def test_signature_of_an_export() -> None:
    for dtype in DTYPES:
        model = export(LossSpec(reduction="none", dtype=dtype), shape=("N", 3), target_shape=(1, 3))
        found = signature(model)
        assert found.input == Port("input", dtype, ("N", 3))
        assert found.target == Port("target", dtype, (1, 3))
        assert found.outputs == (Port("loss", dtype, ("N", 3)),)
        assert str(found.input) == f"input: {dtype}[N,3]"
    found = signature(export(LossSpec()))
    assert (found.input.shape, found.target.shape, found.outputs[0].shape) == (None, None, ())
    assert str(found.input) == "input: float32 of any rank"
    assert str(found.outputs[0]) == "loss: float32[]"


def test_signature_finds_input_and_target_by_name_or_in_their_order() -> None:
    found = signature(difference("float[3] target", "float[3] input"))
    assert (found.input.name, found.target.name) == ("input", "target")
    model = difference("float[3] x", "float[3] y", "float beta")
    model.graph.initializer.append(onnx.helper.make_tensor("beta", 1, [], [1.0]))
    found = signature(model)  # no input that has an initialiser counts
    assert (found.input.name, found.target.name) == ("x", "y")


def test_signature_refuses_another_number_of_inputs() -> None:
    for inputs in (["float[3] x"], ["float[3] x", "float[3] y", "float[3] z"]):
        listed = ", ".join(repr(each.split()[-1]) for each in inputs)
        with pytest.raises(ArtefactError) as caught:
            signature(difference(*inputs))
        assert str(caught.value) == (
            f"the model has {len(inputs)} inputs ({listed}); a loss artefact has two, or inputs "
            "called input, target, weight, mask, beta, divisor, grad_output. verify can be told "
            "which are compared (input_name, target_name)"
        )


def test_signature_refuses_an_element_type_that_is_no_loss() -> None:
    for element, text in ((7, "INT64"), (8, "STRING"), (0, "UNDEFINED"), (999, "999")):
        model = difference("float[3] x", "float[3] y")
        model.graph.input[0].type.tensor_type.elem_type = element
        with pytest.raises(ArtefactError) as caught:
            signature(model)
        assert str(caught.value) == (
            f"'x' has the element type {text}; "
            "a loss artefact takes and gives float32, float16, bfloat16, float64"
        )


def test_axes_without_a_name_are_independent() -> None:
    """`None` in two shapes says nothing about one being the other: such a model may broadcast."""
    model = difference("float[?, 4] x", "float[?, 4] y")
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].Clear()
    found = signature(model)
    assert found.input.shape is not None and found.target.shape is not None
    assert found.input.shape[0] != found.target.shape[0]
    a, b = np.ones((3, 4), np.float32), np.ones((1, 4), np.float32)
    assert load(model).run(a, b)["c"].shape == (3, 4)
