"""Targets on specs and what is made from them: `LossSpec`, `export`, `attach`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from smoothl1_deploy import LossSpec, attach, export
from smoothl1_deploy._spec import DTYPES, LOSSES, NORMALIZERS, REDUCTIONS
from smoothl1_deploy.cli._options import parse_shape
from smoothl1_deploy.graph._export import ROUTES
from smoothl1_deploy.graph._metadata import read_spec

from .damage import bases, damaged_models
from .target import Target
from .values import ARRAYS, JSON, NAMES, NUMBERS, SHAPES, SPECS, THINGS, mostly, some

_FLAGS = mostly(st.booleans(), THINGS)
_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "beta": NUMBERS,
    "reduction": mostly(st.sampled_from(REDUCTIONS), THINGS),
    "dtype": mostly(st.sampled_from(DTYPES), THINGS),
    "per_sample": _FLAGS,
    "gradient": _FLAGS,
    "runtime_beta": _FLAGS,
    "weight": mostly(st.sampled_from([None, *NORMALIZERS]), THINGS),
    "loss": mostly(st.sampled_from(LOSSES), THINGS),
    "delta": mostly(st.none(), NUMBERS),
    "loss_weight": NUMBERS,
}
_LEGACY = {name: _FIELDS[name] for name in ("beta", "reduction", "dtype")}


def _spec(case: tuple[str, Any], folder: Path) -> None:
    how, given = case
    if how == "fields":
        spec = LossSpec(**given)
    elif how == "dict":
        spec = LossSpec.from_dict(given)
    elif how == "legacy":
        spec = LossSpec.from_legacy(**given)
    elif how == "module":
        import torch

        module = torch.nn.SmoothL1Loss()
        module.__dict__.update(given)
        spec = LossSpec.from_module(module)
    else:
        spec = LossSpec.from_module(given)
    assert LossSpec.from_dict(spec.to_dict()) == spec
    assert isinstance(spec.name, str) and spec.effective_beta >= 0


def _export(case: tuple[Any, ...], folder: Path) -> None:
    spec, route, shape, target, weight = case
    model = export(spec, route, shape, target_shape=target, weight_shape=weight)
    assert read_spec(model) == spec


def _parse(text: str, folder: Path) -> None:
    export(LossSpec(), shape=parse_shape(text))


def _attach(case: tuple[Any, ...], folder: Path) -> None:
    model, prediction, target, spec, options = case
    grafted = attach(model, prediction, target, spec, **options)
    assert len(grafted.graph.output) > 0


_SHAPE_TEXT = st.one_of(
    st.lists(st.sampled_from(["N", "16", "-1", "", " 4", "1e3", "9" * 30, "Nx16", "0x10"]))
    .map(",".join)
    .filter(lambda text: len(text) < 200),
    NAMES,
)
_ATTACH_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "weight": NAMES | ARRAYS,
        "target_shape": SHAPES,
        "loss_name": NAMES,
        "only_loss": st.booleans(),
        "route": st.sampled_from(["function", "inlined", "torch"]),
        "convert_opset": st.booleans(),
    },
)
_TENSORS = st.sampled_from(["hidden", "y", "z", "x", "w", "label", "input", "target", "loss"])

TARGETS = [
    Target(
        "spec",
        some(
            st.tuples(st.just("fields"), st.fixed_dictionaries({}, optional=_FIELDS)),
            st.tuples(st.just("dict"), some(st.fixed_dictionaries({}, optional=_FIELDS), JSON)),
            st.tuples(st.just("legacy"), st.fixed_dictionaries({}, optional=_LEGACY)),
            st.tuples(
                st.just("module"),
                st.fixed_dictionaries({}, optional={k: _LEGACY[k] for k in ("beta", "reduction")}),
            ),
            st.tuples(st.just("other"), THINGS),
        ),
        _spec,
        share=20,
    ),
    Target(
        "export",
        st.tuples(
            mostly(SPECS, THINGS),
            # The torch route takes a second: it has a target of its own.
            mostly(st.sampled_from(ROUTES[:2]), THINGS),
            SHAPES,
            mostly(st.none(), SHAPES),
            mostly(st.none(), SHAPES),
        ),
        _export,
        share=10,
    ),
    Target("shape", _SHAPE_TEXT, _parse, share=3),
    Target(
        "torch-route",
        st.tuples(SPECS, st.just("torch"), SHAPES, mostly(st.none(), SHAPES), st.none()),
        _export,
        share=1,
    ),
    Target(
        "attach",
        st.tuples(
            mostly(some(st.sampled_from(bases()), damaged_models()), THINGS),
            mostly(_TENSORS, some(NAMES, THINGS)),
            mostly(_TENSORS, some(NAMES, ARRAYS)),
            some(st.none(), SPECS),
            mostly(st.just({}), _ATTACH_OPTIONS),
        ),
        _attach,
        share=10,
    ),
]
