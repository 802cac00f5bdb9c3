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
from security_page import table

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

CASES: dict[str, Callable[[Path], object]] = {}


def case(title: str) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    """Enter a function under its row of the table."""

    def enter(function: Callable[[Path], object]) -> Callable[[Path], object]:
        assert title not in CASES
        CASES[title] = function
        return function

    return enter


def _external(folder: Path, location: str, **entries: str) -> str:
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
    path = inside / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return str(path)


def test_weights_beside_the_model_are_read(tmp_path: Path) -> None:
    """What the refusals below do not refuse."""
    assert len(read_model(_external(tmp_path, "weights")).graph.initializer[0].raw_data) == 256


@case("forty tensors that each ask for all of a file of 256 MB")
def _forty(folder: Path) -> object:
    path = Path(_external(folder, "weights"))
    os.truncate(folder / "model" / "weights", 256 << 20)
    model = onnx.load(path, load_external_data=False)
    tensor = model.graph.initializer[0]
    for number in range(39):
        model.graph.initializer.add().CopyFrom(tensor)
        model.graph.initializer[-1].name = f"w{number}"
    path.write_bytes(model.SerializeToString())
    return read_model(path)


@case("a model in bytes whose weights lie in a file")
def _bytes_with_files(folder: Path) -> object:
    data = Path(_external(folder, "weights")).read_bytes()
    os.chdir(folder / "model")  # where ONNX Runtime would look for them
    return load(data, input_name="x", target_name="label")


@case("a function that calls its own name in another domain, for TensorRT")
def _by_name(folder: Path) -> object:
    pytest.importorskip("tensorrt_rtx")
    model = recursive(1)
    model.functions[0].node[0].domain = ""
    return load(model, "trt-network", input_name="x", target_name="label", output_name="z")


@case("functions that unfold to 2^40 nodes")
def _laughs(folder: Path) -> object:
    model = recursive(40)
    for number, function in enumerate(model.functions):
        node = function.node[0]
        if number == 39:
            node.op_type, node.domain = "Identity", ""
        else:
            function.node.append(node)
    return load(model)


@case("a graph of 1,000,001 nodes without a function")
def _wide(folder: Path) -> object:
    model = foreign()
    model.graph.node.extend([model.graph.node[0]] * (1_000_001 - len(model.graph.node)))
    return read_model(model)


@case("a constant of 2^31 elements in a file of 3 kB")
def _swollen(folder: Path) -> object:
    model = export(LossSpec(reduction="none"), "inlined", ("N", 16))
    shape = model.graph.node.add(op_type="Constant", output=["shape"])
    shape.attribute.append(helper.make_attribute("value", helper.make_tensor("s", 7, [1], [1])))
    shape.attribute[0].t.dims[:] = [2**31]
    model.graph.node.add(op_type="Expand", input=["loss", "shape"], output=["wide"])
    assert model.ByteSize() < 3000
    return load(model.SerializeToString())


@case("an ONNX file that names an engine beside it")
def _named_engine(folder: Path) -> object:
    model = carrying("subgraph", "TensorrtExecutionProvider")
    branch = next(subgraphs(model.graph.node[-1]))
    branch.node[0].attribute.append(helper.make_attribute("embed_mode", 0))
    return read_model(_written(folder, "m.onnx", model.SerializeToString()))


@case("a file of `build --format epcontext`, one byte changed")
def _changed_context(folder: Path) -> object:
    pytest.importorskip("tensorrt_rtx")
    path = folder / "c.onnx"
    build_engine(export(LossSpec(), shape=("N", 16)), path, format="epcontext")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return load(path)


def _said(key: str, value: object, model: onnx.ModelProto | None = None) -> onnx.ModelProto:
    """A model whose metadata say something of it."""
    model = model or attach(foreign(), "hidden", "hidden_gt", LossSpec(reduction="none"))
    helper.set_model_props(model, {key: json.dumps(value)})
    return model


@case("metadata of an attached loss that no nodes make, for a certificate")
def _unmade(folder: Path) -> object:
    loss = Loss.of(LossSpec()).to_dict() | {"inputs": {"input": "x", "target": "label"}}
    model = _said(ATTACHED, [loss | {"outputs": {"loss": "w"}}])
    return certify_model(_written(folder, "m.onnx", model.SerializeToString()))


@case("metadata of a spec in another dtype than the graph's, for `serve`")
def _other_dtype(folder: Path) -> object:
    model = _said(SPEC, LossSpec(dtype="float64").to_dict(), _sized(4, 16))
    return make_canary(_written(folder, "m.onnx", model.SerializeToString()), "m", "1")


@case("metadata of a spec whose inputs fit no arrays, for `serve`")
def _unfit_spec(folder: Path) -> object:
    model = _said(SPEC, {}, foreign())
    return make_canary(_written(folder, "m.onnx", model.SerializeToString()), "m", "1")


def _sized(*dims: int) -> onnx.ModelProto:
    port = f"float[{', '.join(map(str, dims))}]"
    ports = f"({port} input, {port} target) => ({port} loss)"
    return model_of(f"g {ports} {{ loss = Sub(input, target) }}", ir=10)


@case("`verify` of a model whose input and target fit no arrays")
def _unfit(folder: Path) -> object:
    means = "a = ReduceMean<keepdims=0>(input) b = ReduceMean<keepdims=0>(target)"
    ports = "float[N, 16] input, float[N, 4] target"
    model = model_of(f"g ({ports}) => (float loss) {{{means} loss = Sub(a, b)}}", ir=10)
    return verify(model, spec=LossSpec())


@case("a float64 constant without its number, for TensorRT")
def _numberless(folder: Path) -> object:
    model = _sized(4, 16)
    model.graph.initializer.append(TensorProto(name="empty", data_type=TensorProto.DOUBLE))
    return build_engine(model)


@case("two functions of one name, for TensorRT")
def _twins(folder: Path) -> object:
    pytest.importorskip("tensorrt_rtx")
    model = export(LossSpec(), shape=(4, 16))
    model.functions.append(model.functions[0])
    return build_engine(model)


@case("an operator of a function that is given a type it never takes, for TensorRT")
def _mistyped(folder: Path) -> object:
    """The smallest of what `scripts/fuzz` (models, seed 36) ended the process with."""
    pytest.importorskip("tensorrt_rtx")
    model = export(LossSpec(reduction="none"), shape=(4, 16))
    terms = next(f for f in model.functions if f.name == "SmoothL1LossTerms")
    next(node for node in terms.node if node.op_type == "Abs").op_type = "ConstantOfShape"
    with pytest.warns(ModelWarning):
        return build_engine(model)


@case("an operator with a name of 5 million letters")
def _long_name(folder: Path) -> object:
    model = foreign()
    model.graph.node[0].op_type = "x" * 5_000_000
    return load(model, input_name="x", target_name="label")


@case("an operator whose name is no text")
def _no_text(folder: Path) -> object:
    data = export(LossSpec(), "inlined", shape=(4, 16)).SerializeToString()
    return load(data.replace(b"\x08Constant", b"\x08C\xccnstant"))


@case("an input whose name is no text")
def _nameless(folder: Path) -> object:
    data = export(LossSpec(), shape=(4, 16)).SerializeToString()
    return load(data.replace(b"\x06target", b"\x06t\xccrget"))


def _npy(folder: Path, header: str, data: bytes = b"") -> Path:
    raw = header.encode() + b"\n"
    path = folder / "a.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw + data)
    return path


def _header(shape: object) -> str:
    return f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}"


class _Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("harmed", "w"))


def _pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([_Harm()], object), allow_pickle=True)
    return buffer.getvalue()


def _written(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def _archive(folder: Path, input: bytes, target: bytes | None = None) -> Path:
    with zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("input.npy", input)
        archive.writestr("target.npy", input if target is None else target)
    return folder / "a.npz"


@case("a zip bomb: .npz of 6 MB, an array of 1.25 GiB")
def _bomb(folder: Path) -> object:
    path = folder / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in ("input.npy", "target.npy"):
            with archive.open(name, "w", force_zip64=True) as file:
                rows = 80 << 20 if name == "input.npy" else 1
                file.write(_npy(folder, _header((rows, 4))).read_bytes())
                for _ in range(max(rows >> 20, 1)):
                    file.write(bytes(16 * min(rows, 1 << 20)))
    return read_archive(path, "float32")


@case("output through a link into its own ring")
def _ring(folder: Path) -> object:
    os.symlink("b", folder / "a")
    os.symlink("a", folder / "b")
    return write_atomic(folder / "a", b"data")


@case("an unfinished file that somebody planted, were its name known")
def _planted(folder: Path) -> object:
    planted = folder / ".loss.onnx.0123456789abcdef"
    os.symlink(folder / "harmed", planted)
    with unittest.mock.patch("secrets.token_hex", lambda size: "0123456789abcdef"):
        try:
            return write_atomic(folder / "loss.onnx", b"data")
        finally:
            assert planted.is_symlink()


@case("a slice of a FakeTensor of torch")
def _fake(folder: Path) -> object:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(5, 4)[2:]  # its pointer is near 0, and reading it ends the process
    return load(export(LossSpec()), "onnx-reference").run(fake, np.ones((3, 4), np.float32))


@case("arrays in a pipe")
def _pipe(folder: Path) -> object:
    os.mkfifo(folder / "a.npy")
    return read_array(folder / "a.npy", "float32")


@case("an engine that is a pipe")
def _engine_pipe(folder: Path) -> object:
    os.mkfifo(folder / "a.engine")
    return read_verified(folder / "a.engine")


@case("a sidecar that is a pipe")
def _sidecar_pipe(folder: Path) -> object:
    os.mkfifo(folder / "a.json")
    return Sidecar.read(folder / "a.json")


@case("a .npy file that is cut while it is scored")
def _cut(folder: Path) -> object:
    """Mapped into memory, it ended the process by SIGBUS."""
    np.save(folder / "a.npy", np.ones((1 << 16, 4), np.float32))
    source = open_source(Location(folder / "a.npy", "input"))
    source.read(0, 16)
    os.truncate(folder / "a.npy", 4096)
    return source.read(1 << 15, 1 << 16).sum()


def _score(folder: Path, **options: Any) -> object:
    """Of two shards, each a piece."""
    paths = {name: folder / name for name in ("input", "target")}
    for path in paths.values():
        path.mkdir(exist_ok=True)
        for name in ("0.npy", "1.npy"):
            if not (path / name).exists():
                np.save(path / name, np.ones((4, 16), np.float32))
    job = make_job(LossSpec(per_sample="output" in options))
    return score_files(job, locate(paths, {}), **options)


@case("a journal that is a pipe")
def _journal(folder: Path) -> object:
    os.mkfifo(folder / "journal")
    return _score(folder, journal=folder / "journal")


@case("a journal with a sum of `1e300000000`")
def _endless(folder: Path) -> object:
    """As a Fraction it has 300 million digits."""
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


@case("`--restart` with the data as the journal")
def _data_as_journal(folder: Path) -> object:
    np.save(folder / "other.npy", np.ones(4))
    before = (folder / "other.npy").read_bytes()
    try:
        return _score(folder, journal=folder / "other.npy", restart=True)
    finally:
        assert (folder / "other.npy").read_bytes() == before


@case("scores that would go into the journal")
def _scores_as_journal(folder: Path) -> object:
    return _score(folder, output=folder / "s.npy", journal=folder / "s.npy")


@case("scores that would go into the data, by a link")
def _scores_as_data(folder: Path) -> object:
    os.symlink(folder / "input" / "1.npy", folder / "s.npy")
    try:
        return _score(folder, output=folder / "s.npy")
    finally:
        assert len(np.load(folder / "s.npy")) == 4 and (folder / "s.npy").is_symlink()


def _served(folder: Path, name: str) -> object:
    pytest.importorskip("tritonclient")
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


def _engine(folder: Path) -> Path:
    pytest.importorskip("tensorrt_rtx")
    path = folder / "e.engine"
    build_engine(export(LossSpec(), shape=("N", 16)), path)
    return path


@case("an engine without a sidecar")
def _alone(folder: Path) -> object:
    path = _engine(folder)
    sidecar_path(path).unlink()
    return read_engine(path)


@case("an engine with the sidecar of another")
def _other(folder: Path) -> object:
    path = _engine(folder)
    path.write_bytes(path.read_bytes() + b"more")
    return read_engine(path)


@case("an edited sidecar")
def _edited(folder: Path) -> object:
    path = sidecar_path(_engine(folder))
    path.write_text(path.read_text().replace('"tf32": false', '"tf32": true'))
    return Sidecar.read(path)


def _asked(said: bytes | Callable[[], Iterable[bytes]]) -> object:
    pytest.importorskip("tritonclient")
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


#: What is said in one line each.
CASES |= {
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
    "a dtype with a name of 5 million letters": lambda f: LossSpec(dtype="x" * 5_000_000),
    "a .npy header whose element count overflows int64": lambda f: read_array(
        _npy(f, _header((2**62, 2**62))), "float32"
    ),
    "a .npy header of no elements and a size that no array has": lambda f: read_array(
        _npy(f, _header((0, 2**63 - 1))), "float32"
    ),
    "a .npy header with more elements than the file": lambda f: read_array(
        _npy(f, _header((2**40,)), bytes(64)), "float32"
    ),
    "a .npy header with a size that is no number": lambda f: read_array(
        _npy(f, _header((True,)), bytes(4)), "float32"
    ),
    "a .npy header that is a program": lambda f: read_array(
        _npy(f, "__import__('os').system('true')"), "float32"
    ),
    "a pickle called .npy": lambda f: read_array(
        _written(f, "a.npy", pickle.dumps(_Harm())), "float32"
    ),
    "a pickled array in a .npy file": lambda f: read_array(
        _written(f, "a.npy", _pickled()), "float32"
    ),
    "a pickled array in an .npz file": lambda f: read_archive(_archive(f, _pickled()), "float32"),
    "an .npz header with more elements than the archive": lambda f: read_archive(
        _archive(f, _npy(f, _header((2**40,)), bytes(64)).read_bytes()), "float32"
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


ROWS = table("Bad input")


def test_each_row_has_its_case_and_each_case_its_row() -> None:
    assert set(ROWS) == set(CASES)


@pytest.mark.parametrize("title", CASES)
def test_it_is_refused_as_the_page_says(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, said = re.fullmatch(r"`(\w+)`: (.+)", ROWS[title]).groups()  # type: ignore[union-attr]
    monkeypatch.chdir(tmp_path)
    if any(word in title for word in ("trt-network", "message", "profile", "calls itself")):
        pytest.importorskip("tensorrt_rtx")
    with pytest.raises(errors.SmoothL1DeployError) as caught:
        CASES[title](tmp_path)
    assert type(caught.value).__name__ == kind
    assert said in str(caught.value)
    assert len(str(caught.value)) < 5000
    assert not (tmp_path / "harmed").exists() and not (tmp_path / "outside").exists()
    assert Path("/dev/null").is_char_device()
