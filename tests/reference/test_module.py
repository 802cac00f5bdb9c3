"""`SmoothL1Loss`: torch's own module in every respect, that refuses nonsense when it is made."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import warnings
from itertools import product

import ml_dtypes
import numpy as np
import pytest
import torch

from smoothl1_deploy import LossSpec
from smoothl1_deploy._dlpack import from_torch, to_torch
from smoothl1_deploy._floats import NUMPY_DTYPE
from smoothl1_deploy._spec import DTYPES, REDUCTIONS
from smoothl1_deploy.errors import SpecError
from smoothl1_deploy.reference._module import SmoothL1Loss, eager


def test_signature_is_that_of_torch() -> None:
    assert issubclass(SmoothL1Loss, torch.nn.SmoothL1Loss)

    def shape(cls: type) -> list[tuple[object, ...]]:
        parameters = inspect.signature(cls).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    assert shape(SmoothL1Loss) == shape(torch.nn.SmoothL1Loss)
    assert SmoothL1Loss.forward is torch.nn.SmoothL1Loss.forward


def test_the_loss_of_a_spec_with_an_upstream_gradient_is_that_of_the_spec_without() -> None:
    a, b = np.linspace(-3, 3, 24, dtype=np.float32), np.ones(24, np.float32)
    spec = LossSpec(0.5, gradient=True, upstream=True)
    assert eager(spec, a, b) == eager(LossSpec(0.5), a, b)


def _warned(cls: type, *args: object, **kwargs: object) -> tuple[object, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = cls(*args, **kwargs)
    return module, [str(w.message) for w in caught]


@pytest.mark.parametrize(
    "args", [(), (False,), (True, False), (None, True), (None, None, "sum", 2.0)]
)
def test_deprecated_and_positional_arguments(args: tuple[object, ...]) -> None:
    ours, our_warnings = _warned(SmoothL1Loss, *args)
    theirs, their_warnings = _warned(torch.nn.SmoothL1Loss, *args)
    assert (ours.reduction, ours.beta) == (theirs.reduction, theirs.beta)  # type: ignore[attr-defined]
    assert our_warnings == their_warnings
    assert repr(ours) == repr(theirs)


def test_nonsense_is_refused_when_the_module_is_made() -> None:
    for beta in (-1.0, -1e-30, -math.inf, math.nan, "1", None, True, 1j):
        with pytest.raises(SpecError, match="^beta must "):
            SmoothL1Loss(beta=beta)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="unknown reduction 'avg'; choose one of none, mean, sum"):
        SmoothL1Loss(reduction="avg")


def test_a_beta_changed_later_is_refused_by_the_spec() -> None:
    module = SmoothL1Loss()
    module.beta = -2.0
    with pytest.raises(SpecError, match=r"got -2\.0"):
        module.spec()


def test_a_pickled_or_copied_module_is_ours_and_knows_its_spec() -> None:
    module = SmoothL1Loss(reduction="sum", beta=0.25)
    for again in (pickle.loads(pickle.dumps(module)), copy.copy(module), copy.deepcopy(module)):
        assert type(again) is SmoothL1Loss
        assert again.spec() == module.spec() == LossSpec(0.25, "sum")
        x = torch.arange(4.0)
        assert torch.equal(again(x, x / 2), module(x, x / 2))


def test_spec_and_module_are_inverse() -> None:
    for dtype, reduction, beta in product(DTYPES, REDUCTIONS, (0.0, 0.1, math.inf)):
        spec = LossSpec(beta, reduction, dtype)
        assert SmoothL1Loss.from_spec(spec).spec(dtype) == spec
        assert SmoothL1Loss.from_spec(spec).spec(getattr(torch, dtype)) == spec


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_torch_and_back(dtype: str) -> None:
    for shape in ((), (0,), (3,), (2, 3)):
        array = np.linspace(0, 2, math.prod(shape)).reshape(shape).astype(NUMPY_DTYPE[dtype])
        tensor = to_torch(array)
        assert (tensor.dtype, tuple(tensor.shape)) == (getattr(torch, dtype), shape)
        assert tensor.double().numpy().tolist() == array.astype(np.float64).tolist()
        again = from_torch(tensor)
        assert (again.dtype, again.shape) == (array.dtype, shape)
        assert again.tobytes() == array.tobytes()
    shared = np.zeros(3, NUMPY_DTYPE[dtype])
    to_torch(shared).fill_(2)
    assert (shared.astype(np.float64) == 2).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_read_only_and_strided_arrays(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(NUMPY_DTYPE[dtype]).T
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = to_torch(array)
    assert from_torch(tensor).tolist() == array.tolist()
    grown = torch.ones(2, 3, dtype=getattr(torch, dtype), requires_grad=True)
    assert from_torch(grown.T).shape == (3, 2)
    assert from_torch(grown.T).dtype == NUMPY_DTYPE[dtype]


def test_eager_is_torch() -> None:
    a, b = np.linspace(-2, 2, 7, dtype=np.float32), np.zeros(7, np.float32)
    for reduction in REDUCTIONS:
        expected = torch.nn.functional.smooth_l1_loss(
            torch.from_numpy(a), torch.from_numpy(b), reduction=reduction, beta=0.3
        )
        assert (eager(LossSpec(0.3, reduction), a, b) == expected.numpy()).all()


def test_eager_broadcasts_without_a_warning_and_gives_the_dtype_of_the_spec() -> None:
    a, b = np.ones((2, 3), ml_dtypes.bfloat16), np.zeros(3, ml_dtypes.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = eager(LossSpec(1.0, "none", "bfloat16"), a, b)
    assert (loss.shape, loss.dtype) == ((2, 3), ml_dtypes.bfloat16)
    assert (loss.astype(np.float64) == 0.5).all()
