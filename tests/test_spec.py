"""`LossSpec`: what it accepts, what it refuses and in which words, and that it survives a trip."""

from __future__ import annotations

import copy
import dataclasses
import decimal
import enum
import functools
import itertools
import json
import math
import pickle
import re
import warnings
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st

from smoothl1_deploy import LossSpec
from smoothl1_deploy._spec import DTYPES, REDUCTIONS, resolve_reduction
from smoothl1_deploy.errors import SpecError

betas = st.floats(min_value=0, allow_nan=False, allow_infinity=True)
specs = st.builds(
    lambda spec, loss, factor: dataclasses.replace(
        spec
        if loss is None
        else LossSpec(1.0, spec.reduction, spec.dtype, loss="huber", delta=loss),
        loss_weight=factor,
    ),
    st.builds(LossSpec, betas, st.sampled_from(REDUCTIONS), st.sampled_from(DTYPES)),
    st.none() | betas.filter(bool),
    st.just(1.0) | st.floats(allow_nan=False, allow_infinity=False),
)


def test_defaults_are_those_of_torch() -> None:
    module = torch.nn.SmoothL1Loss()
    assert LossSpec() == LossSpec(module.beta, module.reduction, "float32")


def test_the_loss_alone_is_a_spec_whatever_flows_into_the_gradient() -> None:
    """Without the gradient alone, `upstream` would be left over, which is no spec."""
    for upstream in (False, True):
        spec = LossSpec(0.5, "sum", weight="count", gradient=True, upstream=upstream)
        assert spec.without_gradient() == LossSpec(0.5, "sum", weight="count")
    assert LossSpec(0.5).without_gradient() == LossSpec(0.5)


def test_is_frozen_and_hashable() -> None:
    spec = LossSpec(0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.beta = 2.0  # type: ignore[misc]
    assert not hasattr(spec, "__dict__")
    assert {spec: 1}[LossSpec(beta=0.5)] == 1
    assert dataclasses.replace(spec, reduction="sum") == LossSpec(0.5, "sum")
    with pytest.raises(SpecError, match="negative"):
        dataclasses.replace(spec, beta=-1)


def test_beta_is_any_real_number() -> None:
    for beta, expected in (
        (0, 0.0),
        (2, 2.0),
        (5e-324, 5e-324),
        (1e300, 1e300),
        (math.inf, math.inf),
        (2**1023, 2.0**1023),
        (Fraction(1, 3), 1 / 3),
        (np.float16(0.1), float(np.float16(0.1))),
        (np.float64(0.1), 0.1),
        (np.longdouble("0.1"), 0.1),
        (np.uint64(2**63), 2.0**63),
    ):
        spec = LossSpec(beta)  # type: ignore[arg-type]
        assert spec.beta == expected
        assert type(spec.beta) is float
    assert math.copysign(1, LossSpec(beta=-0.0).beta) == 1


def refusal(**fields: object) -> str:
    """Why a spec of these fields is refused; a SpecError is a ValueError too."""
    with pytest.raises(ValueError) as caught:
        LossSpec(**fields)  # type: ignore[arg-type]
    assert type(caught.value) is SpecError
    return str(caught.value)


def test_a_beta_that_is_none_is_refused() -> None:
    for beta in (-1, -math.inf, -5e-324, np.float32(-1), Fraction(-1, 2), Fraction(-1, 10**400)):
        assert refusal(beta=beta).startswith("beta must not be negative, got -")
    assert refusal(beta=-1) == (
        "beta must not be negative, got -1.0; give a number >= 0, for instance 1.0 (0 is the "
        "L1 loss, inf the zero loss)"
    )
    for beta in (math.nan, np.float32("nan")):
        assert refusal(beta=beta).startswith("beta must not be NaN; give a number >= 0")
    for beta in (
        "1.0", b"1", None, True, np.bool_(True), 1 + 0j, np.complex64(1), {}, object,
        decimal.Decimal(1),
    ):  # fmt: skip
        text = f"beta must be a real number, got {beta!r} ({type(beta).__name__}); give a number >="
        assert refusal(beta=beta).startswith(text)
    for beta in (10**400, -(10**5000), Fraction(10**5000)):
        text = refusal(beta=beta)  # without its digits
        assert text.startswith(f"beta is a {type(beta).__name__} that no float can hold; ")
        assert len(text) < 200


def test_an_unknown_reduction_or_dtype_is_refused() -> None:
    for reduction in ("Mean", "", "elementwise_mean", "none ", None, 1, [], sum, torch.mean):
        text = f"unknown reduction {reduction!r}; choose one of none, mean, sum"
        assert refusal(reduction=reduction) == text
    for dtype in ("float", "Float32", "int32", "", None, float, torch.int32, np.int8, 32, []):
        text = f"unknown dtype {dtype!r}; choose one of float32, float16, bfloat16, float64"
        assert refusal(dtype=dtype) == text


def test_dtype_objects_of_torch_and_numpy_are_accepted() -> None:
    for dtype, expected in (
        (torch.float32, "float32"),
        (torch.half, "float16"),
        (torch.bfloat16, "bfloat16"),
        (torch.double, "float64"),
        ("torch.float16", "float16"),
        (np.float32, "float32"),
        (np.dtype("<f8"), "float64"),
        (ml_dtypes.bfloat16, "bfloat16"),
        (np.dtype(ml_dtypes.bfloat16), "bfloat16"),
    ):
        assert LossSpec(dtype=dtype).dtype == expected  # type: ignore[arg-type]


class _Reduction(enum.StrEnum):
    SUM = "sum"


def test_a_string_of_another_class_becomes_a_string() -> None:
    for text in (np.str_("sum"), _Reduction.SUM):
        assert type(LossSpec(reduction=text).reduction) is str
        assert LossSpec(reduction=text).name == LossSpec(reduction="sum").name


@given(betas, st.sampled_from(DTYPES))
def test_beta_is_rounded_to_the_compute_dtype_and_to_no_half_format(
    beta: float, dtype: str
) -> None:
    """Rounded to float16, 1e5 would become inf."""
    compute = "float64" if dtype == "float64" else "float32"
    assert LossSpec(dtype=dtype).compute_dtype == compute
    with np.errstate(over="ignore"):
        expected = float(np.dtype(compute).type(beta))
    assert LossSpec(beta, dtype=dtype).effective_beta == expected


@given(specs, specs)
def test_two_specs_have_one_name_only_if_they_are_equal(a: LossSpec, b: LossSpec) -> None:
    assert (a.name == b.name) == (a == b)


@given(betas)
def test_neighbouring_betas_have_names_of_their_own(beta: float) -> None:
    if not math.isinf(beta):
        assert LossSpec(beta).name != LossSpec(math.nextafter(beta, math.inf)).name


@given(specs)
def test_dictionary_round_trip_through_strict_json(spec: LossSpec) -> None:
    text = json.dumps(spec.to_dict(), allow_nan=False)  # Infinity is no JSON
    assert LossSpec.from_dict(json.loads(text)) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert copy.deepcopy(spec) == spec


def test_a_dictionary_holds_the_fields_and_may_leave_defaults_out() -> None:
    fields = {"beta": "inf", "reduction": "sum", "dtype": "float64"}
    assert LossSpec(math.inf, "sum", "float64").to_dict() == fields
    assert LossSpec.from_dict({}) == LossSpec()
    assert LossSpec.from_dict({"beta": 2}) == LossSpec(2.0)
    for fields in (None, [], "beta", 5, [("beta", 1.0)]):
        with pytest.raises(SpecError, match="a loss spec is a mapping of its fields, got "):
            LossSpec.from_dict(fields)
    for beta in ("1.0", "infinity", None, True):
        with pytest.raises(SpecError, match="beta must be a real number"):
            LossSpec.from_dict({"beta": beta})


def test_dictionary_of_a_newer_version_is_refused() -> None:
    with pytest.raises(SpecError) as caught:
        LossSpec.from_dict({"beta": 1.0, "huber": True, "alpha": 2, 3: 4})
    assert str(caught.value) == (
        "unknown field(s) 3, alpha, huber in a loss spec; "
        "it was written by a newer version of smoothl1-deploy: upgrade this one"
    )


def test_deprecated_arguments_resolve_as_in_pytorch() -> None:
    choices = (None, True, False, 0, 1)
    for size_average, reduce, reduction in itertools.product(choices, choices, REDUCTIONS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.nn.SmoothL1Loss(size_average, reduce, reduction, beta=0.25)
        expected = LossSpec(0.25, module.reduction)
        assert resolve_reduction(size_average, reduce, reduction) == module.reduction
        assert LossSpec.from_legacy(size_average, reduce, reduction, 0.25) == expected
        assert LossSpec.from_module(module) == expected


def test_from_module_takes_a_subclass_a_tensor_of_one_number_and_a_dtype() -> None:
    class Child(torch.nn.SmoothL1Loss):
        def __init__(self) -> None:
            super().__init__(reduction="sum", beta=0.75)

    assert LossSpec.from_module(Child()) == LossSpec(0.75, "sum")
    spec = LossSpec.from_module(torch.nn.SmoothL1Loss(), torch.bfloat16)
    assert spec == LossSpec(dtype="bfloat16")
    half = torch.tensor(0.5, dtype=torch.bfloat16)
    for beta in (half, torch.tensor([0.5]), torch.tensor(0.5, requires_grad=True)):
        module = torch.nn.SmoothL1Loss(beta=beta)  # type: ignore[arg-type]
        assert LossSpec.from_module(module) == LossSpec(0.5)


def test_from_module_validates() -> None:
    for beta, text in (
        (-1.0, "beta must not be negative, got -1.0"),
        (torch.tensor(math.nan), "beta must not be NaN"),
        (torch.tensor(1j), "beta must be a real number, got 1j"),
        (torch.tensor(True), "beta must be a real number, got True"),
        (torch.ones(0), "beta must be one number, got a tensor of shape (0,); export one loss for"),
        (torch.empty(1, device="meta"), "beta is a Tensor without a number ("),
        (torch.ones(2, 3), "beta must be one number, got a tensor of shape (2, 3); export one los"),
    ):
        with pytest.raises(SpecError, match=re.escape(text)):
            LossSpec.from_module(torch.nn.SmoothL1Loss(beta=beta))  # type: ignore[arg-type]


def test_from_module_refuses_what_is_no_smooth_l1_loss() -> None:
    class SmoothL1Loss:  # as mmpose's, whose reduction is its own
        beta = 1.0

    for module in (torch.nn.MSELoss(), torch.nn.SmoothL1Loss, SmoothL1Loss(), print, None, 1.0):
        with pytest.raises(SpecError) as caught:
            LossSpec.from_module(module)
        assert str(caught.value) == (
            "expected a torch.nn.SmoothL1Loss, HuberLoss or L1Loss, or a function of such a name, "
            f"got {type(module).__name__}; write LossSpec(beta=..., reduction=...) for anything "
            "else"
        )


def test_from_module_takes_huber_and_l1_with_what_the_module_does_not_say() -> None:
    huber = torch.nn.HuberLoss("sum", 0.5)
    assert LossSpec.from_module(huber) == LossSpec(reduction="sum", loss="huber", delta=0.5)
    assert LossSpec.from_module(torch.nn.L1Loss(size_average=False)) == LossSpec(0.0, "sum")
    spec = LossSpec.from_module(torch.nn.L1Loss(), "float16", weight="count", gradient=True)
    assert spec == LossSpec(0.0, "mean", "float16", weight="count", gradient=True)
    with pytest.raises(SpecError, match="^reduction: the L1Loss says that itself; leave it out$"):
        LossSpec.from_module(torch.nn.L1Loss(), reduction="sum")


def test_from_module_knows_the_losses_of_mmdetection_by_their_attributes() -> None:
    """Its classes, with what `__init__` sets: mmdet/models/losses/smooth_l1_loss.py, 3.3."""

    class SmoothL1Loss(torch.nn.Module):
        def __init__(self, beta: float = 1.0, reduction: str = "mean", loss_weight: float = 1.0):
            super().__init__()
            self.beta, self.reduction, self.loss_weight = beta, reduction, loss_weight

    class L1Loss(torch.nn.Module):
        def __init__(self, reduction: str = "mean", loss_weight: float = 1.0):
            super().__init__()
            self.reduction, self.loss_weight = reduction, loss_weight

    given = LossSpec.from_module(SmoothL1Loss(1 / 9, "sum", 2.0), weight="count")
    assert given == LossSpec(1 / 9, "sum", weight="count", loss_weight=2.0)
    assert LossSpec.from_module(L1Loss(loss_weight=0)) == LossSpec(loss="l1", loss_weight=0.0)


def test_from_module_knows_functions_with_their_arguments() -> None:
    def fvcore(input: object, target: object, beta: float, reduction: str = "none") -> None: ...

    def old_torchvision(
        input: object, target: object, beta: float = 1.0 / 9, size_average: bool = True
    ) -> None: ...

    def own(prediction: object, truth: object, beta: float = 1.0) -> None: ...

    for function in (fvcore, old_torchvision, own):
        function.__name__ = "smooth_l1_loss"
    fvcore.__module__ = "fvcore.nn.smooth_l1_loss"
    of, part = LossSpec.from_module, functools.partial
    assert of(part(fvcore, beta=0.1)) == LossSpec(0.1, "none")
    assert of(part(fvcore, beta=9e-6, reduction="sum")) == LossSpec(0.0, "sum")  # as it computes
    assert of(part(fvcore, beta=1e-5)) == LossSpec(1e-5, "none")
    assert of(old_torchvision) == LossSpec(1 / 9, "mean")
    assert of(part(old_torchvision, size_average=False)) == LossSpec(1 / 9, "sum")
    assert of(part(F.smooth_l1_loss, beta=1e-9), "float16") == LossSpec(1e-9, dtype="float16")
    huber = LossSpec(reduction="none", loss="huber", delta=2.0)
    assert of(part(F.huber_loss, delta=2, reduction="none")) == huber
    assert of(F.l1_loss) == LossSpec(loss="l1")
    for function, text in (
        (fvcore, "smooth_l1_loss has no beta by default, and is given none; give it, as in"),
        (own, "smooth_l1_loss has no reduction by default, and is given none"),
        (part(F.huber_loss, weight=torch.ones(3)), "huber_loss is given weight, which is no part"),
        (part(F.l1_loss, beta=1.0), "l1_loss: got an unexpected keyword argument 'beta'; write"),
        (torch._C._nn.smooth_l1_loss, "smooth_l1_loss: no signature found for builtin"),
    ):
        with pytest.raises(SpecError, match=re.escape(text)):
            of(function)


def test_a_huber_loss_has_a_delta_and_no_beta_and_the_l1_loss_is_one_of_beta_0() -> None:
    huber = LossSpec(loss="huber")
    assert (huber.delta, huber.knee, huber.effective_beta) == (1.0, 1.0, 1.0)
    assert dataclasses.replace(huber, delta=0.1).name == "huber_loss_delta_0.1_mean_float32"
    assert LossSpec(loss="l1", beta=0).name == LossSpec(0).name
    assert LossSpec(loss="huber", runtime_beta=True).name.startswith("huber_loss_delta_runtime_")
    for spec in (
        huber,
        LossSpec(loss="huber", delta=math.inf, loss_weight=-2),
        LossSpec(loss="l1"),
    ):
        text = json.dumps(spec.to_dict(), allow_nan=False)
        assert LossSpec.from_dict(json.loads(text)) == spec
    for fields, text in (
        ({"loss": "mse"}, "unknown loss 'mse'; choose one of smooth_l1, huber, l1"),
        ({"loss": "huber", "beta": 0.5}, "a Huber loss has no beta, got 0.5; call it delta"),
        ({"delta": 0.5}, "delta 0.5 is of the loss huber, and smooth_l1 has none; use"),
        ({"loss": "l1", "delta": 1}, "delta 1 is of the loss huber, and l1 has none; use"),
        ({"loss": "l1", "beta": 0.5}, "the loss l1 is smooth_l1 with beta 0, got the beta 0.5;"),
        ({"loss": "l1", "runtime_beta": True}, "runtime_beta takes beta as an input at run time,"),
        ({"loss": "huber", "delta": 0}, "delta must be above 0, as PyTorch has it, got 0.0; give"),
        ({"loss": "huber", "delta": math.nan}, "delta must not be NaN; give a number > 0"),
        ({"loss": "huber", "delta": 2, "runtime_beta": True}, "runtime_beta takes delta as an inp"),
        ({"loss_weight": math.inf}, "loss_weight must be finite, got inf; give a finite number"),
        ({"loss_weight": "2"}, "loss_weight must be a real number, got '2' (str); give a finite"),
    ):
        assert refusal(**fields).startswith(text), refusal(**fields)
