"""Targets on models and engines: `load` and `run`, damaged models, `build_engine`, `verify`."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st

from smoothl1_deploy import attach, build_engine, load, verify
from smoothl1_deploy._artefact import read_model, select_ports
from smoothl1_deploy._floats import NUMPY_DTYPE
from smoothl1_deploy._model import ATTACHED, Loss, inputs_of, metadata_of, value_names
from smoothl1_deploy.backends._base import BACKENDS, missing
from smoothl1_deploy.backends._whole import ModelRunner
from smoothl1_deploy.cli._inspect import inspect_model
from smoothl1_deploy.graph._attach import loss_part, read_losses
from smoothl1_deploy.graph._metadata import (
    HASH,
    ROUTE,
    SERVED,
    SPEC,
    VERSION,
    forget_spec,
    is_served,
    read_spec,
)
from smoothl1_deploy.scoring._scorer import make_job
from smoothl1_deploy.serving._graph import serve
from smoothl1_deploy.serving._lint import unguarded
from smoothl1_deploy.serving._repository import losses_of
from smoothl1_deploy.serving._supervise import make_canary
from smoothl1_deploy.tensorrt._options import BuildOptions

from .damage import BYTE_EDITS, bases, carries_engine, damage_bytes, damaged_models
from .target import Target
from .values import ARRAYS, JSON, NAMES, NUMBERS, SPECS, THINGS, mostly, some

_HERE = [name for name in BACKENDS if missing(name) is None]
_SOUND = st.sampled_from(bases())


@st.composite
def _bytes(draw: st.DrawFn) -> bytes:
    model = onnx.ModelProto()
    model.CopyFrom(draw(_SOUND))
    if draw(st.booleans()):
        forget_spec(model)
    return damage_bytes(model.SerializeToString(deterministic=True), draw(BYTE_EDITS))


#: Models as `load` may get them: sound, damaged in their bytes or in their content, or none.
MODELS = mostly(some(_SOUND, _bytes(), damaged_models(), damaged_models()), THINGS)


def _dtype(number: int) -> str:
    spec = read_spec(bases()[number])
    assert spec is not None
    return spec.dtype


@functools.cache
def _loaded(number: int, backend: str) -> Any:
    return load(bases()[number], backend)


@st.composite
def _fitting(draw: st.DrawFn, odd: bool = False) -> tuple[Any, ...]:
    """A model, a backend, and arguments of which most fit; with `odd`, few do."""
    number = draw(st.integers(0, 6))
    names = [name for name in _HERE if not (name == "trt-network" and number in (4, 6))]
    takes = [value.name for value in inputs_of(bases()[number])]
    array = np.ones((4, 16), NUMPY_DTYPE[_dtype(number)])
    given = {name: 0.5 if name == "beta" else array for name in takes}
    for name in draw(st.lists(st.sampled_from(takes), max_size=3 if odd else 1)):
        given[name] = draw(NUMBERS if name == "beta" else ARRAYS)
    if odd:
        given[draw(st.sampled_from(["weight", "beta"]))] = draw(ARRAYS)
    return number, draw(st.sampled_from(names)), given


def _run(case: tuple[Any, ...], folder: Path) -> None:
    number, backend, given = case
    runner = _loaded(number, backend)
    outputs = runner.run(**given)
    spec = runner.spec
    if spec is not None:
        assert set(outputs) == set(spec.outputs)
        assert all(value.dtype == NUMPY_DTYPE[spec.dtype] for value in outputs.values())


def _damaged(case: tuple[Any, str], folder: Path) -> None:
    """Load it and run it once on plain arrays of the shape it says."""
    model, backend = case
    runner = load(model, backend)
    read = onnx.load_model_from_string(model) if isinstance(model, bytes) else model
    assert not carries_engine(read), "an engine was passed on"
    if isinstance(runner, ModelRunner):
        asked = {n: (port.axes, np.dtype(port.dtype)) for n, port in runner.inputs.items()}
    else:
        ports = runner.signature.inputs.items()
        asked = {role: (port.shape, NUMPY_DTYPE[port.dtype]) for role, port in ports}
    arrays = {}
    for name, (axes, dtype) in asked.items():
        shape = [dim if isinstance(dim, int) else 3 for dim in axes or ()]
        if any(not 0 <= dim <= 64 for dim in shape) or len(shape) > 6:
            return  # what it asks for can't be given
        arrays[name] = np.ones(shape, dtype)
    if "beta" in arrays and not isinstance(runner, ModelRunner):
        arrays["beta"] = 1.0
    runner.run(**arrays)


def _select(case: tuple[Any, ...], folder: Path) -> None:
    model, names = case
    chosen = select_ports(read_model(model), **names)
    assert chosen.graph.output


def _serve(model: Any, folder: Path) -> None:
    served = serve(read_model(model))
    assert is_served(served.model)


@st.composite
def _said(draw: st.DrawFn) -> tuple[onnx.ModelProto, str, str]:
    """A sound model, an entry of its metadata, and what a stranger has it say."""
    model, key = draw(_SOUND), draw(st.sampled_from([SPEC, ATTACHED, ATTACHED, *_OTHER_ENTRIES]))
    loss = Loss.of(draw(SPECS)).to_dict()
    names = st.sampled_from([*value_names(model.graph)]) | NAMES
    for _ in range(draw(st.integers(0, 3))):
        part = draw(st.sampled_from([loss, *(v for v in loss.values() if isinstance(v, dict))]))
        if part:
            part[draw(st.sampled_from(sorted(part)))] = draw(names | JSON)
    told = draw(mostly(st.just([loss] if key == ATTACHED else loss["spec"]), JSON))
    text = json.dumps(told) if draw(st.integers(0, 3)) else draw(NAMES)
    return model, key, text.encode(errors="ignore").decode()


def _metadata(case: tuple[Any, str], folder: Path) -> None:
    (model, key, text), reader = case
    said = onnx.ModelProto()
    said.CopyFrom(model)
    onnx.helper.set_model_props(said, {**metadata_of(model), key: text})
    (folder / "m.onnx").write_bytes(said.SerializeToString())
    _READERS[reader](said, folder / "m.onnx")


_OTHER_ENTRIES = (ROUTE, VERSION, HASH, SERVED)
#: Whoever asks a model what it says of itself.
_READERS: dict[str, Callable[[onnx.ModelProto, Path], object]] = {
    "inspect": lambda model, file: json.dumps(inspect_model(file).to_dict()),
    "serve": lambda model, file: make_canary(file, "m", "1"),
    "certify": lambda model, file: [
        loss_part(serve(model).model, loss) for loss in losses_of(model)
    ],
    "attach": lambda model, file: attach(model, model.graph.output[0].name, "another"),
    "score": lambda model, file: make_job(artefact=model),
    "lint": lambda model, file: [*unguarded(model, read_losses(model))],
    "load": lambda model, file: load(model),
}


def _build(case: tuple[Any, ...], folder: Path) -> None:
    model, profile, options, name, cached = case
    cache = folder / "cache" if cached else None
    path = folder / name
    engine = build_engine(
        model, path, profile=profile, options=BuildOptions(**options), cache_dir=cache
    )
    assert path.read_bytes() == engine.data


def _verify(case: tuple[Any, ...], folder: Path) -> None:
    model, backend, spec = case
    found = verify(model, backend, spec=spec, drift=False)
    found.to_dict()


_SHAPE_TEXT = st.lists(
    st.sampled_from(["1x16", "64x16", "4096x16", "1", "-1x16", "x", "", "9" * 30 + "x16", "0x16"]),
    min_size=1,
    max_size=3,
).map(",".join)
_SIZES = st.integers(-1, 70) | st.sampled_from([2**31, 2**62, 2**63, 2**70, True, None, "1"])
_PROFILES = some(
    st.none(),
    st.just("input=1x16,4x16,8x16"),
    st.tuples(st.sampled_from(["input", "target", "x", ""]), _SHAPE_TEXT).map("=".join),
    st.dictionaries(
        st.sampled_from(["input", "target", "x"]),
        st.tuples(_SIZES, _SIZES, _SIZES)
        | st.lists(st.lists(_SIZES, max_size=3), max_size=4)
        | THINGS,
        max_size=2,
    ),
    THINGS,
)
_OPTIONS = some(
    st.just({}),
    st.just({}),
    st.just({"compute_capabilities": ["8.6"]}),
    st.fixed_dictionaries(
        {"compute_capabilities": st.lists(st.sampled_from(["8.6", "current", "9.9"])) | THINGS}
    ),
)
_FILES = st.sampled_from(
    ["e.engine", "e.engine", "e.engine", "no/e.engine", ".", "a\0b", "x" * 300]
)

#: Half of them sound: a build is refused at the first thing that is not.
_BUILDS = some(
    st.tuples(_SOUND, st.none(), _OPTIONS, st.just("e.engine"), st.booleans()),
    st.tuples(MODELS, _PROFILES, _OPTIONS, _FILES, st.booleans()),
)

TARGETS = [
    Target("run", mostly(_fitting(), _fitting(odd=True)), _run, share=20),
    Target("models", st.tuples(MODELS, st.sampled_from([*_HERE * 5, "x"])), _damaged, share=30),
    Target(
        "ports",
        st.tuples(
            MODELS,
            st.fixed_dictionaries(
                {}, optional={k: NAMES for k in ("input_name", "target_name", "output_name")}
            ),
        ),
        _select,
        share=10,
    ),
    Target("served", MODELS, _serve, share=10),
    Target("metadata", st.tuples(_said(), st.sampled_from([*_READERS])), _metadata, share=10),
    Target("verify", st.tuples(MODELS, st.sampled_from(_HERE), st.none() | SPECS), _verify, 1),
]
if importlib.util.find_spec("tensorrt_rtx") is not None:
    TARGETS.append(Target("build", _BUILDS, _build, share=3))
