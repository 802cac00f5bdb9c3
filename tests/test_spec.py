"""`LossSpec`: what it accepts, what it refuses and in which words, and that it survives a trip."""

from __future__ import annotations

import copy
import dataclasses
import decimal
import enum
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
from hypothesis import given
from hypothesis import strategies as st

from smoothl1_deploy import LossSpec
from smoothl1_deploy._spec import DTYPES, REDUCTIONS, resolve_reduction
from smoothl1_deploy.errors import SpecError

betas = st.floats(min_value=0, allow_nan=False, allow_infinity=True)
specs = st.builds(LossSpec, betas, st.sampled_from(REDUCTIONS), st.sampled_from(DTYPES))


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
        "1.0", b"1", None, True, np.bool_(True), 1 + 0j, np.complex64(1), [1.0], {}, object,
        np.array(1.0), np.array([1.0]), torch.tensor(1.0), decimal.Decimal(1),
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
    for beta in ("1.0", "infinity", None, True, [1]):
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
        (torch.ones(2, 3), "beta must be one number, got a tensor of shape (2, 3); export one los"),
    ):
        with pytest.raises(SpecError, match=re.escape(text)):
            LossSpec.from_module(torch.nn.SmoothL1Loss(beta=beta))  # type: ignore[arg-type]


def test_from_module_refuses_what_is_no_smooth_l1_loss() -> None:
    for module in (torch.nn.HuberLoss(), torch.nn.SmoothL1Loss, torch.nn.L1Loss(), None, 1.0):
        with pytest.raises(SpecError) as caught:
            LossSpec.from_module(module)
        assert str(caught.value) == (
            f"expected a torch.nn.SmoothL1Loss, got {type(module).__name__}; "
            "write LossSpec(beta=..., reduction=...) for anything else"
        )
