"""Targets on the readers of files: arrays, sidecars, the engine cache, certificates."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from smoothl1_deploy import LossSpec, build_engine, export
from smoothl1_deploy._artefact import read_model, sha256, sidecar_path
from smoothl1_deploy._model import engines_in
from smoothl1_deploy._npy import read_archive, read_array
from smoothl1_deploy.parity._certificate import certificate_path, read_certificate
from smoothl1_deploy.tensorrt._cache import EngineCache
from smoothl1_deploy.tensorrt._engine import Engine, Sidecar, read_engine, write_context

from .damage import BYTE_EDITS, damage_bytes
from .target import Target
from .values import ARRAYS, JSON, NAMES, mostly, some


def _npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _header(text: str, version: int) -> bytes:
    """A .npy file with any header at all."""
    raw = text.encode("utf-8", "ignore") + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + (len(raw) & 0xFFFF).to_bytes(2, "little") + raw


_HEADERS = st.builds(
    "{{'descr': {!r}, 'fortran_order': {}, 'shape': {}, }}".format,
    st.sampled_from([
        "<f4", "<f8", "|O", "<f2", "<V2", "|b1", "<i8", "x", ["a", "<f4"], 3, "<f999",
    ]),
    st.sampled_from(["False", "True", "1", "x"]),
    st.sampled_from([
        "(2, 3)", "(4,)", "()", "(-1,)", f"({2**63},)", f"({2**62}, 4)", f"({2**32}, {2**32})",
        "(0, 9223372036854775807)", "(True,)", "(1.5,)", "4", "()" * 3, "((1,),)", "(" * 300,
        "[]", "(9" + "9" * 5000 + ",)", "(0,)" + " " * 9000, "(lambda: 1)()",
    ]),
)  # fmt: skip


@st.composite
def _array_files(draw: st.DrawFn) -> bytes:
    kind = draw(st.integers(0, 3))
    if kind == 0:
        array = draw(ARRAYS)
        data = _npy(array if isinstance(array, np.ndarray) else np.asarray([array], object))
    elif kind == 1:
        header = _header(draw(_HEADERS), draw(st.sampled_from([1, 2, 3, 9])))
        data = header + draw(st.binary(max_size=64))
    else:
        data = _npy(np.ones(draw(st.sampled_from([(4,), (2, 3), (), (0, 4)])), np.float32))
    return damage_bytes(data, draw(BYTE_EDITS)) if draw(st.integers(0, 3)) == 0 else data


@st.composite
def _archives(draw: st.DrawFn) -> bytes:
    buffer = io.BytesIO()
    method = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]))
    names = ["input.npy", "target.npy", "weight.npy", "input", "../input.npy", "/target.npy", "x"]
    with zipfile.ZipFile(buffer, "w", method) as archive:
        odd = draw(st.lists(st.sampled_from(names), max_size=4, unique=True))
        for name in sorted({*names[:2], *odd}) if draw(st.booleans()) else odd:
            member = zipfile.ZipInfo(name)  # dated 1980: a name alone would be dated by the clock
            member.compress_type = method
            sound = name not in odd
            archive.writestr(member, _npy(np.ones(4)) if sound else draw(_array_files()))
    data = buffer.getvalue()
    return damage_bytes(data, draw(BYTE_EDITS)) if draw(st.booleans()) else data


def _read_array(case: tuple[Any, ...], folder: Path) -> None:
    data, dtype, name = case
    path = folder / name
    if data is not None:
        (folder / "a.npy").write_bytes(data)
    array = read_array(path, dtype)
    np.asarray(array).sum() if array.dtype.kind in "fiub" else None


def _read_archive(case: tuple[Any, ...], folder: Path) -> None:
    data, dtype = case
    path = folder / "a.npz"
    path.write_bytes(data)
    arrays = read_archive(path, dtype)
    assert {"input", "target"} <= set(arrays)
    assert [file.name for file in folder.iterdir()] == ["a.npz"]


@functools.cache
def _engine() -> tuple[bytes, dict[str, Any]]:
    """A sound engine and the entries of its sidecar; bytes of no use where TensorRT is missing."""
    recorded = json.loads(Path(__file__).with_name("sidecar.json").read_text())
    if importlib.util.find_spec("tensorrt_rtx") is None:
        data = b"no engine"
        return data, {**recorded, "engine_sha256": sha256(data), "engine_bytes": len(data)}
    built = build_engine(export(LossSpec(0.5), shape=("N", 16)))
    # When it was built, and how fast, must not make other cases of the same seed.
    clock = {key: recorded[key] for key in ("built_at", "build_seconds")}
    return built.data, {**built.sidecar.to_dict(), **clock}


@st.composite
def _sidecars(draw: st.DrawFn) -> bytes:
    """A sidecar with odd entries, its own hash right, so that all of it is read."""
    _, sound = _engine()
    entries = json.loads(json.dumps(sound))
    for _ in range(draw(st.integers(0, 3))):
        holder = entries
        key = draw(st.sampled_from(sorted(holder)))
        if isinstance(holder[key], dict) and holder[key] and draw(st.booleans()):
            holder = holder[key]
            key = draw(st.sampled_from(sorted(holder)))
        if draw(st.integers(0, 4)) == 0:
            del holder[key]
            if not entries:
                break
        else:
            holder[key] = draw(JSON)
    if draw(st.integers(0, 9)) == 0:
        entries[draw(NAMES)] = draw(JSON)
    text = (json.dumps(entries, indent=1, sort_keys=True) + "\n").encode()
    whole = json.dumps({**entries, "sha256": sha256(text)}, indent=1, sort_keys=True).encode()
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return b"[" * 100_000
    if kind == 1:
        return json.dumps(draw(JSON)).encode()
    return damage_bytes(whole, draw(BYTE_EDITS)) if kind == 2 else whole


def _read_sidecar(data: bytes, folder: Path) -> None:
    path = folder / "a.engine.json"
    path.write_bytes(data)
    sidecar = Sidecar.read(path)
    path.write_bytes(sidecar.dumps())
    assert Sidecar.read(path).key.digest == sidecar.key.digest


def _read_engine(case: tuple[Any, ...], folder: Path) -> None:
    edits, sidecar, unverified = case
    data = damage_bytes(_engine()[0], edits)
    path = folder / "a.engine"
    path.write_bytes(data)
    if sidecar is not None:
        sidecar_path(path).write_bytes(sidecar)
    engine = read_engine(path, unverified)
    assert unverified or engine.sha256 == sha256(_engine()[0])


def _read_context(case: tuple[Any, ...], folder: Path) -> None:
    """A file that carries an engine: whatever is damaged, its engine comes back or nothing does."""
    mode, edits, which, sidecar = case
    data, entries = _engine()
    whole = Engine(None, Sidecar.from_dict(entries), data)
    path = write_context(folder / "a.onnx", whole, export(LossSpec()), "", mode).path
    assert path is not None
    victim = folder / which
    if victim.exists():
        victim.write_bytes(damage_bytes(victim.read_bytes(), edits))
    if sidecar is not None:
        sidecar_path(path).write_bytes(sidecar)
    carried = engines_in(read_model(path))
    assert not carried or [(e.inside, e.content) for e in carried] == [(True, data)]


def _cache(case: tuple[Any, ...], folder: Path) -> None:
    entries, max_bytes = case
    engines = folder / "engines"
    engines.mkdir()
    for name, sidecar in entries:
        (engines / f"{name}.engine").write_bytes(_engine()[0])
        if sidecar is not None:
            (engines / f"{name}.engine.json").write_bytes(sidecar)
    cache = EngineCache(folder)
    key = Sidecar.from_dict(_engine()[1]).key
    cache.list()
    cache.get(key)
    cache.nearest(key)
    cache.prune(max_bytes)


_CERTIFICATE = {
    "format": 1,
    "verdict": "green",
    "artefact": {"file": "a.onnx", "sha256": sha256(b"model"), "bytes": 5},
    "date": "2026-01-01",
    "red_cases": 0,
    "cases": 10,
}


@st.composite
def _certificates(draw: st.DrawFn) -> bytes:
    content: Any = json.loads(json.dumps(_CERTIFICATE))
    for _ in range(draw(st.integers(0, 2))):
        content[draw(st.sampled_from(sorted(_CERTIFICATE)))] = draw(JSON)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["content_sha256"] = sha256(text.encode())
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return b"[" * 100_000
    data = json.dumps(content if kind > 1 else draw(JSON)).encode()
    return damage_bytes(data, draw(BYTE_EDITS)) if kind == 2 else data


def _certificate(data: bytes, folder: Path) -> None:
    model = folder / "a.onnx"
    model.write_bytes(b"model")
    certificate_path(model).write_bytes(data)
    status = read_certificate(model)
    json.dumps(status.to_dict())


#: Files of any kind, for the command line.
FILES = some(_array_files(), _archives(), _sidecars(), st.binary(max_size=64))

TARGETS = [
    Target(
        "npy",
        st.tuples(
            mostly(_array_files(), st.none()),
            st.sampled_from(["float32", "bfloat16"]),
            mostly(st.just("a.npy"), st.sampled_from(["no.npy", ".", "a\0b", "x" * 300])),
        ),
        _read_array,
        share=15,
    ),
    Target(
        "npz",
        st.tuples(_archives(), st.sampled_from(["float32", "bfloat16"])),
        _read_archive,
        share=15,
    ),
    Target("sidecar", _sidecars(), _read_sidecar, share=15),
    Target(
        "engine",
        st.tuples(some(st.just([]), BYTE_EDITS), mostly(_sidecars(), st.none()), st.booleans()),
        _read_engine,
        share=5,
    ),
    Target(
        "epcontext",
        st.tuples(
            st.integers(0, 1),
            some(st.just([]), BYTE_EDITS),
            st.sampled_from(["a.onnx", "a.engine", "a.onnx.json"]),
            mostly(st.none(), _sidecars()),
        ),
        _read_context,
        share=5,
    ),
    Target(
        "cache",
        st.tuples(
            st.lists(st.tuples(st.sampled_from("abc"), mostly(_sidecars(), st.none())), max_size=2),
            st.sampled_from([0, 1, 10**6, -1, True, None, 2**70, 1.5]),
        ),
        _cache,
        share=5,
    ),
    Target("certificate", _certificates(), _certificate, share=5),
]
