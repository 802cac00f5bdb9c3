"""The torch reference module, and PyTorch eager as a function of numpy arrays: the contract."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from .._dlpack import from_torch, to_torch
from .._floats import Array
from .._spec import LossSpec
from ..errors import SpecError


class SmoothL1Loss(torch.nn.SmoothL1Loss):
    """`torch.nn.SmoothL1Loss` itself, every argument included, that knows its `LossSpec`.

    Unlike its parent it refuses a nonsensical beta when it is made, not when it is called.

    >>> SmoothL1Loss(beta=0.5, size_average=False).spec().reduction
    'sum'
    """

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        beta: float = 1.0,
    ) -> None:
        super().__init__(size_average, reduce, reduction, beta)
        self.spec()

    def spec(self, dtype: Any = "float32") -> LossSpec:
        """This module as a `LossSpec` for tensors of `dtype`."""
        return LossSpec.from_module(self, dtype)

    @classmethod
    def from_spec(cls, spec: LossSpec) -> SmoothL1Loss:
        """The module that a spec describes.

        Raises:
            SpecError: for a Huber loss, which is a `torch.nn.HuberLoss`.
        """
        if spec.loss == "huber":
            raise SpecError("a Huber loss is no SmoothL1Loss; use torch.nn.HuberLoss")
        return cls(reduction=spec.reduction, beta=spec.beta)


def module_of(spec: LossSpec) -> torch.nn.Module:
    """The module of PyTorch's that computes a spec's loss, but for what only a spec can ask for."""
    if spec.delta is not None:
        return torch.nn.HuberLoss(reduction=spec.reduction, delta=spec.delta)
    return SmoothL1Loss.from_spec(spec)


def eager(spec: LossSpec, input: Array, target: Array) -> Array:
    """The loss that PyTorch eager computes on the CPU, in the spec's dtype."""
    return eager_outputs(spec.without_gradient(), input, target)["loss"]


def eager_outputs(
    spec: LossSpec,
    input: Array,
    target: Array,
    weight: Array | None = None,
    mask: Array | None = None,
    beta: Array | None = None,
    divisor: Array | None = None,
    grad_output: Array | None = None,
) -> dict[str, Array]:
    """What PyTorch eager and its autograd compute on the CPU for every output of a spec.

    Per sample, that is a loop over the rows (vectorised above 1024 of them). No module takes an
    array of betas: the losses are then those of a module for each of the different numbers, of the
    elements that have it.
    """
    given = (weight, mask, beta, divisor, grad_output)
    more = [None if array is None else to_torch(array) for array in given]
    outputs = eager_tensors(spec, to_torch(input), to_torch(target), *more)
    return {name: from_torch(tensor) for name, tensor in outputs.items()}


def eager_tensors(
    spec: LossSpec,
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    divisor: torch.Tensor | None = None,
    grad_output: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """`eager_outputs` from tensors to tensors, on whatever device they are on."""
    if beta is not None and not ((beta > 0) | ((beta == 0) & (spec.loss != "huber"))).any():
        # PyTorch raises on such a beta or delta; an artefact, which can't, answers NaN everywhere.
        known = spec.at(torch.ones(spec.beta_shape))
        outputs = eager_tensors(known, input, target, weight, mask, None, divisor, grad_output)
        return {
            name: tensor if name == "differences" else torch.full_like(tensor, torch.nan)
            for name, tensor in outputs.items()
        }
    spec = spec if beta is None else spec.at(beta)
    x = input
    if spec.gradient:
        x = x.detach().clone().requires_grad_()  # a leaf that nobody else holds
    tensors = {"input": x, "target": target, "weight": weight, "mask": mask}
    if spec.beta_shape:
        tensors["beta"] = torch.tensor(spec.knee, dtype=torch.float64, device=x.device)
    operands = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with warnings.catch_warnings(), torch.set_grad_enabled(spec.gradient):
        warnings.filterwarnings("ignore", message="Using a target size")  # broadcasting is meant
        loss = _eager_loss(spec, operands, divisor)
        if spec.loss_weight != 1.0:
            loss = spec.loss_weight * loss
        outputs = {"loss": loss.detach()}
        if spec.elements == "losses":
            each = spec.loss_weight * _eager_loss(spec.of_elements, operands, None)
            outputs["losses"] = each.detach()
        elif spec.elements:
            whole = torch.broadcast_tensors(*operands.values())  # type: ignore[no-untyped-call]
            named = dict(zip(operands, whole, strict=True))
            difference = (named["input"] - named["target"]).detach()
            outputs["differences"] = (
                difference.masked_fill(~named["mask"], 0) if spec.mask else difference
            )
        if spec.gradient:
            upstream = torch.ones_like(loss) if grad_output is None else grad_output
            (outputs["grad_input"],) = torch.autograd.grad(loss, x, upstream)
    return outputs


@lru_cache
def _module(spec: LossSpec, reduction: str) -> torch.nn.Module:
    """The module, kept: it holds no state, and a loop over rows would make one for each."""
    return module_of(LossSpec(reduction=reduction, loss=spec.loss).at(spec.knee))


def _eager_loss(
    spec: LossSpec, tensors: dict[str, torch.Tensor], divisor: torch.Tensor | None
) -> torch.Tensor:
    """The loss of the spec's operands, by name, before the constant factor."""
    losses: torch.Tensor
    if replace(spec, gradient=False, upstream=False, loss_weight=1.0).is_of_torch:
        losses = _module(spec, spec.reduction).forward(tensors["input"], tensors["target"])
        return losses
    if spec.keeps_axes or spec.mask or spec.beta_shape:
        whole = torch.functional.broadcast_tensors(*tensors.values())  # type: ignore[no-untyped-call]
        tensors = dict(zip(tensors, whole, strict=True))
    if spec.axes:  # as rows, one for each number of the loss
        shape = tuple(tensors["input"].shape)
        kept, out = spec.kept_axes(len(shape)), spec.loss_shape(shape)
        rows = {
            name: x.movedim(kept, tuple(range(len(kept)))).reshape(
                math.prod(out), spec.count(shape)
            )
            for name, x in tensors.items()
        }
        loss = _eager_loss(replace(spec, axes=None, per_sample=True), rows, divisor)
        return loss.reshape(out)
    if spec.per_sample and 0 < len(tensors["input"]) <= 1024:
        alone = replace(spec, per_sample=False)
        each = [dict(zip(tensors, row, strict=True)) for row in zip(*tensors.values(), strict=True)]
        return torch.stack([_eager_loss(alone, row, divisor) for row in each])
    mask, betas = tensors.pop("mask", None), tensors.pop("beta", None)
    if mask is not None:  # 0 for what isn't selected, whatever it is, and for its gradient
        tensors = {name: tensor.masked_fill(~mask, 0) for name, tensor in tensors.items()}
    if betas is None:
        losses = _module(spec, "none").forward(tensors["input"], tensors["target"])
    else:
        numbers = np.unique(spec.knee).tolist()
        masks = [betas == number for number in numbers]
        parts = (
            _Parts.apply(tensors[name], *masks)  # type: ignore[no-untyped-call]
            for name in ("input", "target")
        )
        losses = torch.zeros_like(tensors["input"])
        for number, here, *pair in zip(numbers, masks, *parts, strict=True):
            losses = losses.masked_scatter(here, _module(spec.at(number), "none").forward(*pair))
    if spec.weight:
        losses = losses * tensors["weight"]
    if spec.reduction == "none":
        return losses
    first = 1 if spec.per_sample else 0
    total = _summed(losses, first)
    if spec.reduction == "sum":
        return total
    if divisor is None and spec.weight == "weights":
        divisor = _summed(tensors["weight"].expand_as(losses), first)
    elif divisor is None and mask is not None:
        divisor = _summed(mask, first)
    by = torch.tensor(math.prod(losses.shape[first:])) if divisor is None else divisor
    by = by.to(torch.promote_types(total.dtype, torch.float32))  # a half has no room for a count
    if spec.empty == "zero":
        by = by.masked_fill(by == 0, math.inf)
    return (total / by).to(total.dtype)


class _Parts(torch.autograd.Function):
    """The elements that each mask selects, each one that of one of them.

    Their gradients are put together: a sum of them, which autograd makes, is 0 for -0.
    """

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, *masks: torch.Tensor) -> Any:
        ctx.save_for_backward(*masks)
        return tuple(values[mask] for mask in masks)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        masks = ctx.saved_tensors
        whole = gradients[0].new_empty(masks[0].shape)
        for mask, gradient in zip(masks, gradients, strict=True):
            whole[mask] = gradient
        return whole, *(None for _ in masks)


def _summed(values: torch.Tensor, first: int) -> torch.Tensor:
    """The sum over the axes from `first` on; of one number too it makes 0 of -0."""
    return values.unsqueeze(-1).flatten(first).sum(first)
