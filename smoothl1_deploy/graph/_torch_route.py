"""The `torch` route: torch.onnx.export of the reference module, with our function bodies.

The exporter's own graph accumulates full reductions in float32 (1.9e-2 off at 2^24 constant
elements under ONNX Runtime, microsoft/onnxruntime#28450). A translation table puts the bodies
of `_functions` in its place.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import logging
import threading
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import onnx
import torch

from .._shapes import Shape
from .._spec import LossSpec
from ..errors import SpecError, UnsupportedError
from ..reference._module import module_of
from . import _functions as f
from ._export import fold_scalars
from ._torch_table import translation_table

_patching = threading.RLock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter, which reports its progress and that torchvision is absent."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@contextlib.contextmanager
def kept_registry() -> Iterator[None]:
    """While it holds, the exporter copies its table of operators, made once; a thread at a time.

    torch.onnx.export reads the source of some 500 functions anew for each model, which takes longer
    than all the rest of a small one (torch 2.13). Each export gets a table of its own to add to.
    Where PyTorch keeps the table elsewhere, nothing is changed.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        original = ONNXRegistry.__dict__["from_torchlib"]
    except (ImportError, KeyError):
        yield
        return

    def from_torchlib(cls: type, **settings: Any) -> Any:
        own = copy.copy(_table(original.__func__, cls, **settings))
        own.functions = {target: [*metas] for target, metas in own.functions.items()}
        return own

    with _patching:
        ONNXRegistry.from_torchlib = classmethod(from_torchlib)  # type: ignore[method-assign, assignment, arg-type]
        try:
            yield
        finally:
            ONNXRegistry.from_torchlib = original  # type: ignore[method-assign]


@lru_cache(maxsize=4)
def _table(make: Any, registry: type, **settings: Any) -> Any:
    return make(registry, **settings)


def _example(shape: Shape, dtype: torch.dtype, sizes: dict[str, int]) -> torch.Tensor:
    """A tensor of zeros, one in memory however many it has."""
    size = [sizes[d] if isinstance(d, str) else d for d in shape]
    return torch.zeros((), dtype=dtype).expand(size)


def torch_model(spec: LossSpec, shape: Shape | None, target_shape: Shape | None) -> onnx.ModelProto:
    """The model that torch.onnx.export makes of the reference module, tidied and nameless.

    Raises:
        SpecError: without a shape, and when a dynamic axis meets another axis that isn't 1:
            torch.export has to know how the two broadcast.
        UnsupportedError: for the extensions of a spec.
    """
    if not spec.is_of_torch:
        raise UnsupportedError(
            "the torch route exports a module of PyTorch's as it is, which knows nothing of "
            "a spec's extensions; use the route function or inlined"
        )
    if shape is None or target_shape is None:
        raise SpecError(
            "the torch route can't export any rank; give a shape, or use the route function"
        )
    for x, y in zip(reversed(shape), reversed(target_shape), strict=False):
        if x != y and 1 not in (x, y) and (isinstance(x, str) or isinstance(y, str)):
            raise SpecError(
                f"the torch route can't broadcast the axis {x!r} with {y!r}; give both the same "
                "name, or one of them the size 1, or use the route function"
            )
    names = sorted({d for d in (*shape, *target_shape) if isinstance(d, str)})
    # Distinct sizes above 1, and no fixed axis's: the exporter specialises on 0 and 1, and on axes
    # that are equal.
    free = (size for size in itertools.count(2) if size not in (*shape, *target_shape))
    sizes = dict(zip(names, free, strict=False))
    dims = {name: torch.export.Dim(name) for name in names}

    def dynamic(axes: Shape) -> dict[int, Any]:
        return {i: dims[d] for i, d in enumerate(axes) if isinstance(d, str)}

    dtype = getattr(torch, spec.dtype)
    with quiet(), kept_registry():
        program = torch.onnx.export(
            module_of(spec).eval(),
            (_example(shape, dtype, sizes), _example(target_shape, dtype, sizes)),
            input_names=["input", "target"],
            output_names=["loss"],
            dynamic_shapes=(dynamic(shape), dynamic(target_shape)),
            opset_version=f.OPSET,
            custom_translation_table=translation_table(),
            dynamo=True,
            # Its rules drop a division by a beta within 1e-5 of 1 and a subtraction of one
            # below 2e-8; we fold constants and nothing else.
            optimize=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    model = fold_scalars(model)
    # What the exporter notes about itself holds stack traces and paths of this machine.
    del model.metadata_props[:]
    for item in [
        model.graph,
        *model.graph.node,
        *model.graph.value_info,
        *model.graph.input,
        *model.graph.output,
    ]:
        del item.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
    return model
