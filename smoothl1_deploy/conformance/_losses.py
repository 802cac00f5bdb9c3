"""The losses that the suite has by name: what people compute Smooth L1 with.

Each takes numpy arrays, `beta` and `reduction`, as a loss of anyone's does, and gives an array.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from .._dlpack import from_torch, to_torch
from .._environment import version_of
from .._floats import Array
from .._spec import LossSpec
from ..backends._base import imported
from ..errors import MissingDependencyError, SpecError, require
from ..parity._shapes import Shape

Loss = Callable[..., Any]
_Shapes = tuple[Shape, Shape]

_MOST_SHAPES = 1 << 16  # of one function; torch.compile stops at 8, and runs eager from there on


def _spec(input: Array, beta: float, reduction: str) -> LossSpec:
    return LossSpec(beta, reduction, str(input.dtype))


def eager(input: Array, target: Array, *, beta: float, reduction: str) -> Array:
    """PyTorch's own function."""
    from ..reference._module import eager

    return eager(_spec(input, beta, reduction), input, target)


def compiled(input: Array, target: Array, *, beta: float, reduction: str) -> Array:
    """`torch.compile` of the same, for shapes that change."""
    return _by_torch(_spec(input, beta, reduction), None, input, target)


def aot(input: Array, target: Array, *, beta: float, reduction: str) -> Array:
    """AOTInductor of the same: programs that take seconds each to make."""
    return _by_torch(_spec(input, beta, reduction), (input.shape, target.shape), input, target)


def _by_torch(spec: LossSpec, ahead: _Shapes | None, input: Array, target: Array) -> Array:
    torch = require("torch", "torch", "a compiler of PyTorch's")
    loss = _made(spec, ahead, torch.get_num_threads())
    limits = {"recompile_limit": _MOST_SHAPES, "accumulated_recompile_limit": _MOST_SHAPES}
    with torch.no_grad(), torch._dynamo.config.patch(limits):
        return from_torch(loss(to_torch(input), to_torch(target)))


@lru_cache(maxsize=4)
def _made(spec: LossSpec, ahead: _Shapes | None, threads: int) -> Loss:
    """PyTorch's loss, compiled: ahead for some ranks, else when it is called.

    Axes of 0 and 1 stay what they are, the others are dynamic. The number of threads stands in the
    code that is made.
    """
    from ..bench._cpu import compiled_ahead, need_a_compiler
    from ..bench._gpu import torch_loss

    loss = torch_loss(spec)
    import torch

    need_a_compiler("a compiler of PyTorch's")
    if ahead is None:
        torch.compiler.reset()
        compiled: Loss = torch.compile(loss, dynamic=True)
        return compiled
    pair = tuple(torch.zeros(shape, dtype=getattr(torch, spec.dtype)) for shape in ahead)
    axes = tuple(dict.fromkeys(range(len(shape)), torch.export.Dim.AUTO) for shape in ahead)
    return compiled_ahead(loss, pair, axes)  # type: ignore[no-any-return]


@lru_cache(maxsize=4)
def _on_openvino(spec: LossSpec, shapes: _Shapes) -> Loss:
    from ..bench._cpu import on_openvino
    from ..graph._export import export

    model = export(spec, "inlined", shapes[0], target_shape=shapes[1])
    return on_openvino(model, threads=0)  # as many as it thinks fit for its cores


def openvino(input: Array, target: Array, *, beta: float, reduction: str) -> Array:
    """OpenVINO on a file of the route `inlined`: it reads neither local functions nor any rank."""
    loss = _on_openvino(_spec(input, beta, reduction), (input.shape, target.shape))
    answer = np.array(loss(input, target))
    # Its Python shows the bits of bfloat16 as float16.
    return answer.view(input.dtype) if str(input.dtype) == "bfloat16" else answer


def numpy(input: Array, target: Array, *, beta: float, reduction: str) -> Array:
    """The formula in numpy, as one writes it from PyTorch's page."""
    with np.errstate(all="ignore"):
        d = np.abs(input - target)
        losses = np.where(d < beta, 0.5 * d**2 / beta, d - 0.5 * beta)
        return losses if reduction == "none" else np.asarray(getattr(losses, reduction)())


def jax(input: Array, target: Array, *, beta: float, reduction: str) -> Array:
    """Huber's loss of optax over beta, in JAX with its 64-bit mode on."""
    import optax
    from jax import config

    config.update("jax_enable_x64", True)
    losses = optax.losses.huber_loss(input, target, delta=beta) / beta
    return np.asarray(losses if reduction == "none" else getattr(losses, reduction)())


def tinygrad(input: Array, target: Array, *, beta: float, reduction: str) -> Array:
    """The formula in tinygrad, on the CPU (it needs clang there)."""
    from tinygrad import Tensor, dtypes

    half = str(input.dtype) == "bfloat16"  # which it takes from no numpy array, and gives to none
    pair = [
        Tensor(x.astype(np.float32)).cast(dtypes.bfloat16) if half else Tensor(x)
        for x in (input, target)
    ]
    d = (pair[0] - pair[1]).abs()
    losses = (d < beta).where(0.5 * d * d / beta, d - 0.5 * beta)
    answer = losses if reduction == "none" else getattr(losses, reduction)()
    return np.asarray(answer.numpy()).astype(input.dtype, copy=False)


#: name -> the loss, and the packages that it lives on.
LOSSES: Mapping[str, tuple[Loss, tuple[str, ...]]] = {
    "eager": (eager, ()),
    "compiled": (compiled, ()),
    "aot": (aot, ()),
    "openvino": (openvino, ("openvino",)),
    "numpy": (numpy, ()),
    "jax": (jax, ("jax", "optax")),
    "tinygrad": (tinygrad, ("tinygrad",)),
}


def versions_of(name: str) -> dict[str, str | None]:
    """The versions of what one of `LOSSES` lives on, beside PyTorch and numpy."""
    return {package: version_of(package) for package in LOSSES.get(name, (None, ()))[1]}


def find_loss(name: str) -> Loss:
    """One of `LOSSES`, or anyone's at `module:callable`.

    Raises:
        SpecError: for a name that is none, and for what isn't there or can't be called.
        MissingDependencyError: where what it lives on isn't installed.
    """
    if name in LOSSES:
        if lacking := " ".join(k for k, version in versions_of(name).items() if version is None):
            raise MissingDependencyError(
                f"the loss {name} needs what is not installed. Install it with: pip install "
                f"{lacking}"
            )
        return LOSSES[name][0]
    if ":" not in name:
        raise SpecError(
            f"unknown loss {name!r}; choose one of {', '.join(LOSSES)}, or give one of your own as "
            "module:callable"
        )
    found: Loss = imported(name, "loss", "module:callable")
    if not callable(found):
        raise SpecError(f"{name!r} is a {type(found).__name__}; give what can be called")
    return found
