"""Artefacts: read without trust, written whole or not at all, described as they are."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy.artefact import Port, read_model, sha256, signature, write_atomic
from smoothl1_deploy.backends.base import load
from smoothl1_deploy.errors import ArtefactError, OutputError
from smoothl1_deploy.graph.metadata import is_changed, read_spec

SPEC = LossSpec(0.5)


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return export(SPEC, shape=("N", 4))


def two_input_model(*values: onnx.ValueInfoProto, element: int = 1) -> onnx.ModelProto:
    """`Sub` of the first two values."""
    graph = helper.make_graph(
        [helper.make_node("Sub", [values[0].name, values[1].name], ["c"])],
        "foreign",
        list(values),
        [helper.make_tensor_value_info("c", element, None)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def value(name: str, *shape: int | str | None, element: int = 1) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, shape)


# Reading


def test_reads_a_model_its_bytes_and_its_file(model: onnx.ModelProto, tmp_path: Path) -> None:
    data = model.SerializeToString()
    path = tmp_path / "loss.onnx"
    path.write_bytes(data)
    assert read_model(model) is model
    assert read_model(data) == model
    assert read_model(path) == model
    assert read_model(str(path)) == model


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.onnx"
    with pytest.raises(ArtefactError) as caught:
        read_model(path)
    assert str(caught.value) == f"{path} does not exist; give the path of an .onnx file"


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError) as caught:
        read_model(tmp_path)
    assert str(caught.value) == f"{tmp_path} is a folder; give the path of an .onnx file"


@pytest.mark.parametrize("path", ["", "\0", "a\0b.onnx", "x" * 5000], ids=range(4))
def test_a_path_that_can_not_be(path: str) -> None:
    with pytest.raises(ArtefactError, match="does not exist; give the path of an .onnx file"):
        read_model(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"hello",
        b"not a model at all\n",
        b"<html></html>",
        b"\x89PNG\r\n\x1a\n",
        b"\0" * 64,
    ],
    ids=repr,
)
@pytest.mark.filterwarnings("ignore:The onnxtxt format is experimental")
@pytest.mark.parametrize("suffix", [".onnx", ".txt", ".json", ".textproto", ".onnxtxt", ""])
def test_a_file_of_another_format(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"loss{suffix}"
    path.write_bytes(content)
    with pytest.raises(ArtefactError) as caught:
        read_model(path)
    text = str(caught.value)
    assert text.startswith(f"{path} ")
    assert text.endswith("it is damaged, or of another format")


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 64], ids=repr)
def test_bytes_of_another_format(content: bytes) -> None:
    with pytest.raises(
        ArtefactError, match=f"^{len(content)} bytes .*it is damaged, or of another"
    ):
        read_model(content)


def test_a_model_without_outputs() -> None:
    empty = helper.make_model(helper.make_graph([], "empty", [], []))
    with pytest.raises(ArtefactError, match="holds no ONNX graph; it is damaged"):
        read_model(empty.SerializeToString())


@pytest.mark.parametrize("source", [None, 5, bytearray(b"x"), ["loss.onnx"], SPEC])
def test_a_source_of_the_wrong_type(source: object) -> None:
    with pytest.raises(ArtefactError) as caught:
        read_model(source)  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"expected an onnx.ModelProto, bytes or a path, got {type(source).__name__}"
    )


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


@pytest.mark.parametrize("mask", [0x01, 0x10, 0x80, 0xFF])
def test_a_model_with_a_changed_byte_never_passes_for_itself(
    model: onnx.ModelProto, mask: int
) -> None:
    data = model.SerializeToString()
    for i in range(len(data)):
        changed = data[:i] + bytes([data[i] ^ mask]) + data[i + 1 :]
        if _spec_of_itself(changed):  # protobuf ignores some bits of a long varint
            assert read_model(changed) == model


def test_a_truncated_file_is_named(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    path.write_bytes(model.SerializeToString()[:500])
    with pytest.raises(ArtefactError, match=re.escape(str(path)) + ".*damaged"):
        read_model(path)


def test_sha256() -> None:
    assert sha256(b"loss") == hashlib.sha256(b"loss").hexdigest()


# Writing


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_write_atomic_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    assert write_atomic(path, b"one") == path
    assert path.read_bytes() == b"one"
    assert write_atomic(str(path), b"") == path
    assert path.read_bytes() == b""
    assert names(tmp_path) == ["a.bin"]


def test_write_atomic_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_atomic("a.bin", b"one")
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_write_atomic_gives_the_permissions_of_a_plain_file(tmp_path: Path, umask: int) -> None:
    previous = os.umask(umask)
    try:
        write_atomic(tmp_path / "a.bin", b"one")
        assert os.umask(umask) == umask
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == 0o666 & ~umask


def test_write_atomic_leaves_the_umask_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads that set it and set it back can leave the process with the wrong one."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask belongs to the process"))
    write_atomic(tmp_path / "a.bin", b"one")


def test_write_atomic_from_many_threads(tmp_path: Path) -> None:
    """One of the contents is there whole, and nothing beside it."""
    contents = [bytes([i]) * 5000 for i in range(8)]

    def write(data: bytes) -> None:
        for _ in range(25):
            write_atomic(tmp_path / "a.bin", data)

    with ThreadPoolExecutor(len(contents)) as pool:
        list(pool.map(write, contents))
    assert (tmp_path / "a.bin").read_bytes() in contents
    assert names(tmp_path) == ["a.bin"]


def test_write_atomic_to_a_folder_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "no" / "a.bin"
    with pytest.raises(OutputError) as caught:
        write_atomic(path, b"one")
    assert str(caught.value) == (
        f"can't write {path}: No such file or directory; choose a file in a folder that exists "
        "and that you may write to"
    )
    assert names(tmp_path) == []


def test_write_atomic_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="Not a directory; choose a file in a folder that exists"):
        write_atomic(tmp_path / "file" / "a.bin", b"one")


def test_write_atomic_onto_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"can't write .*folder: it is a folder or a disk"):
        write_atomic(tmp_path / "folder", b"one")
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "No space left on device"), OutputError),
    ],
    ids=["interrupted", "disk full"],
)
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: BaseException,
    seen: type[BaseException],
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail(*args: object) -> None:
        assert len(names(tmp_path)) == 2  # the new content is beside the target
        assert path.read_bytes() == b"old"
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(seen):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


# Describing


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_signature_of_an_export(dtype: str) -> None:
    model = export(LossSpec(reduction="none", dtype=dtype), shape=("N", 3), target_shape=(1, 3))
    found = signature(model)
    assert found.input == Port("input", dtype, ("N", 3))
    assert found.target == Port("target", dtype, (1, 3))
    assert found.outputs == (Port("loss", dtype, ("N", 3)),)
    assert str(found.input) == f"input: {dtype}[Nx3]"


def test_signature_of_any_rank() -> None:
    found = signature(export(LossSpec()))
    assert (found.input.shape, found.target.shape) == (None, None)
    assert found.outputs[0].shape == ()
    assert str(found.input) == "input: float32[any]"
    assert str(found.outputs[0]) == "loss: float32[scalar]"


def test_signature_is_frozen(model: onnx.ModelProto) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        signature(model).input.name = "x"  # type: ignore[misc]


def test_signature_finds_input_and_target_by_name_in_any_order() -> None:
    found = signature(two_input_model(value("target", 3), value("input", 3)))
    assert (found.input.name, found.target.name) == ("input", "target")


def test_signature_takes_two_inputs_of_other_names_in_their_order() -> None:
    found = signature(two_input_model(value("x", 3), value("y", 3)))
    assert (found.input.name, found.target.name) == ("x", "y")


def test_signature_counts_no_input_that_has_an_initializer() -> None:
    model = two_input_model(value("x", 3), value("y", 3), value("beta"))
    model.graph.initializer.append(helper.make_tensor("beta", TensorProto.FLOAT, [], [1.0]))
    assert signature(model).target.name == "y"


@pytest.mark.parametrize("count", [1, 3])
def test_signature_refuses_another_number_of_inputs(count: int) -> None:
    values = [value(name, 3) for name in ("x", "y", "z")[:count]]
    model = two_input_model(*values) if count > 1 else two_input_model(values[0], values[0])
    if count == 1:
        del model.graph.input[1:]
    listed = ", ".join(repr(v.name) for v in values)
    with pytest.raises(ArtefactError) as caught:
        signature(model)
    assert str(caught.value) == (
        f"the model has {count} inputs ({listed}); a loss artefact has two, or inputs called "
        "input, target, weight, beta, grad_output. Say which of them are compared with "
        "input_name= and target_name=, on the command line --input-name and --target-name"
    )


@pytest.mark.parametrize(
    ("element", "text"),
    [(TensorProto.INT64, "INT64"), (TensorProto.STRING, "STRING"), (0, "UNDEFINED"), (999, "999")],
)
def test_signature_refuses_an_element_type_that_is_no_loss(element: int, text: str) -> None:
    model = two_input_model(value("x", 3, element=element), value("y", 3))
    with pytest.raises(ArtefactError) as caught:
        signature(model)
    assert str(caught.value) == (
        f"'x' has the element type {text}; "
        "a loss artefact takes and gives float32, float16, bfloat16, float64"
    )


def test_axes_without_a_name_are_independent() -> None:
    """`None` in two shapes says nothing about one being the other: such a model may broadcast."""
    model = two_input_model(value("x", None, 4), value("y", None, 4))
    found = signature(model)
    assert found.input.shape is not None and found.target.shape is not None
    assert found.input.shape[0] != found.target.shape[0]
    runner = load(model)
    a, b = np.ones((3, 4), np.float32), np.ones((1, 4), np.float32)
    assert runner.run(a, b)["c"].shape == (3, 4)
