"""Input that is made to harm: each is refused with the error that docs/security.md names."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import time
import unittest.mock
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from handmade import model_of
from onnx import TensorProto, helper
from security_page import Table

import smoothl1_deploy.errors as errors
from fuzzing.answers import OUTPUT, FakeServer, answer, inferred
from fuzzing.damage import carrying, foreign, nested, recursive
from smoothl1_deploy import LossSpec, attach, build_engine, export, load, verify
from smoothl1_deploy._artefact import read_model, sidecar_path
from smoothl1_deploy._files import write_atomic
from smoothl1_deploy._model import ATTACHED, Loss, subgraphs
from smoothl1_deploy._npy import read_archive, read_array
from smoothl1_deploy.cli._options import parse_shape
from smoothl1_deploy.errors import ModelWarning
from smoothl1_deploy.graph._metadata import SPEC
from smoothl1_deploy.scoring._score import Progress, score_files
from smoothl1_deploy.scoring._scorer import make_job
from smoothl1_deploy.scoring._shards import locate
from smoothl1_deploy.scoring._sources import Location, open_source
from smoothl1_deploy.serving import Client
from smoothl1_deploy.serving._graph import serve
from smoothl1_deploy.serving._repository import certify_model
from smoothl1_deploy.serving._supervise import make_canary
from smoothl1_deploy.tensorrt._engine import Sidecar, read_engine, read_verified

INPUTS = Table("Bad input")


def _written(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def _saved(folder: Path, model: onnx.ModelProto) -> Path:
    return _written(folder, "m.onnx", model.SerializeToString())


def _changed(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _external(folder: Path, location: str, **entries: str) -> Path:
    """A model whose weights lie at `location`, beside a secret outside its folder."""
    inside = folder / "model"
    inside.mkdir()
    (folder / "secret").write_bytes(bytes(256))
    (inside / "weights").write_bytes(bytes(256))
    os.symlink(folder / "secret", inside / "link")
    model = foreign()
    tensor = model.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location.format(folder=folder), **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return _saved(inside, model)


def test_weights_beside_the_model_are_read(tmp_path: Path) -> None:
    """The refusals below are of other weights."""
    assert len(read_model(_external(tmp_path, "weights")).graph.initializer[0].raw_data) == 256


@INPUTS.row("forty tensors that each ask for all of a file of 256 MB")
def _forty(folder: Path) -> object:
    path = _external(folder, "weights")
    os.truncate(folder / "model" / "weights", 256 << 20)
    model = onnx.load(path, load_external_data=False)
    tensor = model.graph.initializer[0]
    for number in range(39):
        model.graph.initializer.add().CopyFrom(tensor)
        model.graph.initializer[-1].name = f"w{number}"
    return read_model(_saved(folder / "model", model))


@INPUTS.row("a model in bytes whose weights lie in a file")
def _bytes_with_files(folder: Path) -> object:
    data = _external(folder, "weights").read_bytes()
    os.chdir(folder / "model")  # where ONNX Runtime would look for them
    return load(data, input_name="x", target_name="label")


@INPUTS.row("a function that calls its own name in another domain, for TensorRT")
def _by_name(folder: Path) -> object:
    model = recursive(1)
    model.functions[0].node[0].domain = ""
    return load(model, "trt-network", input_name="x", target_name="label", output_name="z")


@INPUTS.row("functions that unfold to 2^40 nodes")
def _laughs(folder: Path) -> object:
    model = recursive(40)
    for number, function in enumerate(model.functions):
        node = function.node[0]
        if number == 39:
            node.op_type, node.domain = "Identity", ""
        else:
            function.node.append(node)
    return load(model)


@INPUTS.row("a graph of 1,000,001 nodes without a function")
def _wide(folder: Path) -> object:
    more = onnx.ModelProto()
    more.graph.node.add()
    sound = foreign()  # messages one after the other are read as one
    count = 1_000_001 - len(sound.graph.node)
    return read_model(sound.SerializeToString() + more.SerializeToString() * count)


@INPUTS.row("a constant of 2^31 elements in a file of 3 kB")
def _swollen(folder: Path) -> object:
    model = export(LossSpec(reduction="none"), "inlined", ("N", 16))
    shape = model.graph.node.add(op_type="Constant", output=["shape"])
    shape.attribute.append(helper.make_attribute("value", helper.make_tensor("s", 7, [1], [1])))
    shape.attribute[0].t.dims[:] = [2**31]
    model.graph.node.add(op_type="Expand", input=["loss", "shape"], output=["wide"])
    assert model.ByteSize() < 3000
    return load(model.SerializeToString())


@INPUTS.row("an ONNX file that names an engine beside it")
def _named_engine(folder: Path) -> object:
    model = carrying("subgraph", "TensorrtExecutionProvider")
    branch = next(subgraphs(model.graph.node[-1]))
    branch.node[0].attribute.append(helper.make_attribute("embed_mode", 0))
    return read_model(_saved(folder, model))


def _said(key: str, value: object, model: onnx.ModelProto | None = None) -> onnx.ModelProto:
    """A model whose metadata say something of it."""
    model = model or attach(foreign(), "hidden", "hidden_gt", LossSpec(reduction="none"))
    helper.set_model_props(model, {key: json.dumps(value)})
    return model


@INPUTS.row("metadata of an attached loss that no nodes make, for a certificate")
def _unmade(folder: Path) -> object:
    loss = Loss.of(LossSpec()).to_dict() | {"inputs": {"input": "x", "target": "label"}}
    model = _said(ATTACHED, [loss | {"outputs": {"loss": "w"}}])
    return certify_model(_saved(folder, model))


def _sized(*dims: int) -> onnx.ModelProto:
    port = f"float[{', '.join(map(str, dims))}]"
    ports = f"({port} input, {port} target) => ({port} loss)"
    return model_of(f"g {ports} {{ loss = Sub(input, target) }}", ir=10)


@INPUTS.row("`verify` of a model whose input and target fit no arrays")
def _unfit(folder: Path) -> object:
    means = "a = ReduceMean<keepdims=0>(input) b = ReduceMean<keepdims=0>(target)"
    ports = "float[N, 16] input, float[N, 4] target"
    model = model_of(f"g ({ports}) => (float loss) {{{means} loss = Sub(a, b)}}", ir=10)
    return verify(model, spec=LossSpec())


@INPUTS.row("a float64 constant without its number, for TensorRT")
def _numberless(folder: Path) -> object:
    model = _sized(4, 16)
    model.graph.initializer.append(TensorProto(name="empty", data_type=TensorProto.DOUBLE))
    return build_engine(model)


@INPUTS.row("two functions of one name, for TensorRT")
def _twins(folder: Path) -> object:
    model = export(LossSpec(), shape=(4, 16))
    model.functions.append(model.functions[0])
    return build_engine(model)


@INPUTS.row("an operator of a function that is given a type it never takes, for TensorRT")
def _mistyped(folder: Path) -> object:
    """The smallest of what `scripts/fuzz` (models, seed 36) ended the process with."""
    model = export(LossSpec(reduction="none"), shape=(4, 16))
    terms = next(f for f in model.functions if f.name == "SmoothL1LossTerms")
    next(node for node in terms.node if node.op_type == "Abs").op_type = "ConstantOfShape"
    with pytest.warns(ModelWarning):
        return build_engine(model)


@INPUTS.row("an operator with a name of 5 million letters")
def _long_name(folder: Path) -> object:
    model = foreign()
    model.graph.node[0].op_type = "x" * 5_000_000
    return load(model, input_name="x", target_name="label")


def _misspelt(name: bytes) -> bytes:
    """A model in which the second letter of a name, given with its length, is no UTF-8."""
    data = export(LossSpec(), "inlined", shape=(4, 16)).SerializeToString()
    assert name in data
    return data.replace(name, name[:2] + b"\xcc" + name[3:])


def _npy(header: str) -> bytes:
    raw = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw


def _shaped(*shape: int) -> bytes:
    return _npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}")


def _read(folder: Path, data: bytes) -> object:
    return read_array(_written(folder, "a.npy", data), "float32")


class _Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("harmed", "w"))


def _pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([_Harm()], object), allow_pickle=True)
    return buffer.getvalue()


def _unpacked(folder: Path, data: bytes) -> object:
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        for name in ("input.npy", "target.npy"):
            archive.writestr(name, data)
    return read_archive(folder / "a.npz", "float32")


@INPUTS.row("a zip bomb: .npz of 6 MB, an array of 1.25 GiB")
def _bomb(folder: Path) -> object:
    path = folder / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("target.npy", _shaped(1, 4) + bytes(16))
        with archive.open("input.npy", "w", force_zip64=True) as file:
            file.write(_shaped(80 << 20, 4))
            for _ in range(80):
                file.write(bytes(16 << 20))
    return read_archive(path, "float32")


@INPUTS.row("output through a link into its own ring")
def _ring(folder: Path) -> object:
    os.symlink("b", folder / "a")
    os.symlink("a", folder / "b")
    return write_atomic(folder / "a", b"data")


@INPUTS.row("an unfinished file that somebody planted, were its name known")
def _planted(folder: Path) -> object:
    planted = folder / ".loss.onnx.0123456789abcdef"
    os.symlink(folder / "harmed", planted)
    with unittest.mock.patch("secrets.token_hex", lambda size: "0123456789abcdef"):
        try:
            return write_atomic(folder / "loss.onnx", b"data")
        finally:
            assert planted.is_symlink()


@INPUTS.row("a slice of a FakeTensor of torch")
def _fake(folder: Path) -> object:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(5, 4)[2:]  # its pointer is near 0, and reading it ends the process
    return load(export(LossSpec()), "onnx-reference").run(fake, np.ones((3, 4), np.float32))


@INPUTS.row("a .npy file that is cut while it is scored")
def _cut(folder: Path) -> object:
    """A file that was mapped into memory ended the process by SIGBUS."""
    np.save(folder / "a.npy", np.ones((1 << 16, 4), np.float32))
    source = open_source(Location(folder / "a.npy", "input"))
    source.read(0, 16)
    os.truncate(folder / "a.npy", 4096)
    return source.read(1 << 15, 1 << 16).sum()


def _score(folder: Path, **options: Any) -> object:
    """The score of two small shards."""
    paths = {name: folder / name for name in ("input", "target")}
    for path in paths.values():
        path.mkdir(exist_ok=True)
        for name in ("0.npy", "1.npy"):
            np.save(path / name, np.ones((4, 16), np.float32))
    job = make_job(LossSpec(per_sample="output" in options))
    return score_files(job, locate(paths, {}), **options)


@INPUTS.row("a journal with a sum of `1e300000000`")
def _endless(folder: Path) -> object:
    """The number has 300 million digits as a Fraction."""
    journal = folder / "journal"

    def interrupt(progress: Progress) -> None:
        if progress.done:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        _score(folder, journal=journal, on_progress=interrupt)
    *lines, last = journal.read_bytes().splitlines(keepends=True)
    text, changed = re.subn(rb'"finite":"[^"]*"', b'"finite":"1e300000000"', last[9:-1])
    assert changed == 2
    journal.write_bytes(b"".join([*lines, b"%08x %s\n" % (zlib.crc32(text), text)]))
    return _score(folder, journal=journal)


@INPUTS.row("`--restart` with the data as the journal")
def _data_as_journal(folder: Path) -> object:
    np.save(folder / "other.npy", np.ones(4))
    before = (folder / "other.npy").read_bytes()
    try:
        return _score(folder, journal=folder / "other.npy", restart=True)
    finally:
        assert (folder / "other.npy").read_bytes() == before


@INPUTS.row("scores that would go into the data, by a link")
def _scores_as_data(folder: Path) -> object:
    os.symlink(folder / "input" / "1.npy", folder / "s.npy")
    try:
        return _score(folder, output=folder / "s.npy")
    finally:
        assert len(np.load(folder / "s.npy")) == 4 and (folder / "s.npy").is_symlink()


def _served(folder: Path, name: str) -> object:
    from smoothl1_deploy.serving._repository import write_loss

    return write_loss(folder / "repository", LossSpec(), name=name)


def _shown(folder: Path, name: str, words: str) -> object:
    """What a server would be shown of a repository with one model."""
    _served(folder, "mean")
    from smoothl1_deploy.serving._private import models_of

    (folder / "repository/mean").rename(folder / "repository" / name)
    with (folder / "repository" / name / "config.pbtxt").open("a") as config:
        config.write(words)
    return models_of(folder / "repository")


def _engine(folder: Path, name: str = "e.engine", **options: Any) -> Path:
    build_engine(export(LossSpec(), shape=("N", 16)), folder / name, **options)
    return folder / name


def _flipped(data: bytes) -> bytes:
    """Its middle byte has another last bit."""
    half = len(data) // 2
    return data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]


def _asked(said: bytes | Callable[[], Iterable[bytes]]) -> object:
    with FakeServer() as server:
        server.answers = said
        try:
            with Client(server.url, "m", timeout=0.5 if callable(said) else 60) as client:
                return client.loss(np.ones((1, 16), "f4"), np.ones((1, 16), "f4"))
        finally:
            server.shutdown()


def _dripped() -> Iterator[bytes]:
    for byte in inferred([OUTPUT], bytes(64)):
        time.sleep(0.02)
        yield bytes([byte])


#: Trials that are told in one expression.
INPUTS.trials |= {
    "weights of a model at an absolute path": lambda f: read_model(_external(f, "{folder}/secret")),
    "weights of a model in `..`": lambda f: read_model(_external(f, "../secret")),
    "weights of a model behind a symbolic link": lambda f: read_model(_external(f, "link")),
    "weights of a model beyond the end of their file": lambda f: read_model(
        _external(f, "weights", length=str(2**62))
    ),
    "a function that calls itself": lambda f: build_engine(recursive(1)),
    "functions that call each other in a ring": lambda f: attach(recursive(3), "hidden", "label"),
    "2,000 graphs inside one another, as a message": lambda f: load(nested(2000), "trt-network"),
    "2,000 graphs inside one another, in a file": lambda f: load(nested(2000).SerializeToString()),
    "an engine inside an ONNX file": lambda f: load(carrying("graph")),
    "an engine in a function's default for a graph": lambda f: verify(
        carrying("default").SerializeToString()
    ),
    "metadata of an attached loss without roles": lambda f: attach(
        _said(ATTACHED, [{"spec": {}, "inputs": {}, "outputs": {}}]), "hidden", "label"
    ),
    "metadata of attached losses that are no list": lambda f: serve(_said(ATTACHED, 1)),
    "metadata of a spec whose fields have other types": lambda f: serve(
        _said(SPEC, {"beta": [], "reduction": {}}, _sized(4, 16))
    ),
    "a model whose element count overflows int64": lambda f: load(_sized(2**40, 2**40)),
    "`verify` of a model of 2^40 elements": lambda f: verify(
        _sized(2**40), spec=LossSpec(reduction="none")
    ),
    "an export whose element count overflows int64": lambda f: export(
        LossSpec(), shape=parse_shape(f"{2**31},{2**32},2")
    ),
    "shapes that overflow when they are broadcast": lambda f: export(
        LossSpec(), shape=(2**40, 1), target_shape=(1, 2**40)
    ),
    "an export of 65 axes": lambda f: export(LossSpec(), shape=(1,) * 65),
    "a profile whose element count overflows int64": lambda f: build_engine(
        export(LossSpec(), shape=("N", 16)), profile=f"input=1x16,4x16,{2**62}x16"
    ),
    "a file of `build --format epcontext`, one byte changed": lambda f: load(
        _changed(_engine(f, "c.onnx", format="epcontext"), _flipped)
    ),
    "metadata of a spec in another dtype than the graph's, for `serve`": lambda f: make_canary(
        _saved(f, _said(SPEC, LossSpec(dtype="float64").to_dict(), _sized(4, 16))), "m", "1"
    ),
    "metadata of a spec whose inputs fit no arrays, for `serve`": lambda f: make_canary(
        _saved(f, _said(SPEC, {}, foreign())), "m", "1"
    ),
    "an operator whose name is no text": lambda f: load(_misspelt(b"\x08Constant")),
    "an input whose name is no text": lambda f: load(_misspelt(b"\x06target")),
    "arrays in a pipe": lambda f: read_array(_pipe(f / "a.npy"), "float32"),
    "an engine that is a pipe": lambda f: read_verified(_pipe(f / "a.engine")),
    "a sidecar that is a pipe": lambda f: Sidecar.read(_pipe(f / "a.json")),
    "a journal that is a pipe": lambda f: _score(f, journal=_pipe(f / "journal")),
    "scores that would go into the journal": lambda f: _score(
        f, output=f / "s.npy", journal=f / "s.npy"
    ),
    "an engine without a sidecar": lambda f: read_engine(_engine(f).rename(f / "alone.engine")),
    "an engine with the sidecar of another": lambda f: read_engine(
        _changed(_engine(f), lambda data: data + b"more")
    ),
    "an edited sidecar": lambda f: Sidecar.read(
        _changed(sidecar_path(_engine(f)), lambda data: data.replace(b'"STRICT_NANS"', b'"TF32"'))
    ),
    "a dtype with a name of 5 million letters": lambda f: LossSpec(dtype="x" * 5_000_000),
    "a .npy header whose element count overflows int64": lambda f: _read(f, _shaped(2**62, 2**62)),
    "a .npy header of no elements and a size that no array has": lambda f: _read(
        f, _shaped(0, 2**63 - 1)
    ),
    "a .npy header with more elements than the file": lambda f: _read(
        f, _shaped(2**40) + bytes(64)
    ),
    "a .npy header with a size that is no number": lambda f: _read(f, _shaped(True) + bytes(4)),
    "a .npy header that is a program": lambda f: _read(f, _npy("__import__('os').system('true')")),
    "a pickle called .npy": lambda f: _read(f, pickle.dumps(_Harm())),
    "a pickled array in a .npy file": lambda f: _read(f, _pickled()),
    "a pickled array in an .npz file": lambda f: _unpacked(f, _pickled()),
    "an .npz header with more elements than the archive": lambda f: _unpacked(
        f, _shaped(2**40) + bytes(64)
    ),
    "output to a folder": lambda f: write_atomic(f, b"data"),
    "a file name with a NUL": lambda f: read_array(f / "a\0b.npy", "float32"),
    "a repository with a model called `$(reboot)`": lambda f: _shown(f, "$(reboot)", ""),
    "a config that names an instance `` `reboot` ``": lambda f: _shown(
        f, "mean", 'instance_group { name: "`reboot`" }'
    ),
    "a served model called `../outside`": lambda f: _served(f, "../outside"),
    "a served model called `..`": lambda f: _served(f, ".."),
    "a sidecar of 100,000 brackets": lambda f: Sidecar.read(_written(f, "a.json", b"[" * 100_000)),
    "a server's answer of 100,000 brackets": lambda f: _asked(answer(b"[" * 100_000)),
    "a server's answer of bytes in place of a loss": lambda f: _asked(
        inferred([{**OUTPUT, "datatype": "BYTES"}], b"\xff" * 64)
    ),
    "a server's answer of 64 kB that unpacks to 64 MB": lambda f: _asked(
        answer(zlib.compress(bytes(2**26)), "Content-Encoding: deflate")
    ),
    "a server's answer that goes on and on": lambda f: _asked(inferred([OUTPUT], bytes(2**21))),
    "a server's answer of a byte now and then": lambda f: _asked(_dripped),
}


def test_each_row_has_its_case_and_each_case_its_row() -> None:
    assert set(INPUTS.rows) == set(INPUTS.trials)


@pytest.mark.parametrize("title", INPUTS.trials)
def test_it_is_refused_as_the_page_says(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, said = re.fullmatch(r"`(\w+)`: (.+)", INPUTS.rows[title]).groups()  # type: ignore[union-attr]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.SmoothL1DeployError) as caught:
        INPUTS.trials[title](tmp_path)
    if isinstance(caught.value, errors.MissingDependencyError):
        pytest.skip(str(caught.value))  # TensorRT or the client
    assert type(caught.value).__name__ == kind
    assert said in str(caught.value)
    assert len(str(caught.value)) < 5000
    assert not (tmp_path / "harmed").exists() and not (tmp_path / "outside").exists()
    assert Path("/dev/null").is_char_device()
