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
import warnings
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smoothl1_deploy import LossSpec
from smoothl1_deploy.errors import SpecError
from smoothl1_deploy.spec import DTYPES, REDUCTIONS, resolve_reduction

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


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0, 0.0),
        (2, 2.0),
        (1e-50, 1e-50),
        (5e-324, 5e-324),
        (1e-45, 1e-45),
        (3e38, 3e38),
        (1e300, 1e300),
        (math.inf, math.inf),
        (2**1023, 2.0**1023),
        (Fraction(1, 3), 1 / 3),
        (Fraction(0), 0.0),
        (np.float16(0.1), float(np.float16(0.1))),
        (np.float32(0.1), float(np.float32(0.1))),
        (np.float64(0.1), 0.1),
        (np.longdouble("0.1"), 0.1),
        (np.int8(3), 3.0),
        (np.uint64(2**63), 2.0**63),
    ],
)
def test_beta_is_any_real_number(beta: object, expected: float) -> None:
    spec = LossSpec(beta)  # type: ignore[arg-type]
    assert spec.beta == expected
    assert type(spec.beta) is float


def test_negative_zero_is_zero() -> None:
    spec = LossSpec(beta=-0.0)
    assert math.copysign(1, spec.beta) == 1
    assert spec.name == LossSpec(beta=0.0).name


@pytest.mark.parametrize("beta", [-1, -0.5, -math.inf, -5e-324, np.float32(-1), Fraction(-1, 2)])
def test_negative_beta_is_refused(beta: object) -> None:
    with pytest.raises(SpecError) as caught:
        LossSpec(beta)  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"beta must not be negative, got {float(beta)!r}; give a number >= 0, "  # type: ignore[arg-type]
        "for instance beta=1.0 (0 is the L1 loss, inf the zero loss)"
    )


def test_negative_beta_that_rounds_to_zero_is_refused() -> None:
    with pytest.raises(SpecError, match="must not be negative"):
        LossSpec(Fraction(-1, 10**400))  # type: ignore[arg-type]


@pytest.mark.parametrize("beta", [math.nan, np.float32("nan"), np.float64("nan")])
def test_nan_beta_is_refused(beta: object) -> None:
    with pytest.raises(SpecError, match=r"beta must not be NaN; give a number >= 0"):
        LossSpec(beta)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "beta",
    [
        "1.0",
        b"1",
        None,
        True,
        np.bool_(True),
        1 + 0j,
        np.complex64(1),
        [1.0],
        (1.0,),
        {},
        np.array(1.0),
        np.array([1.0]),
        torch.tensor(1.0),
        decimal.Decimal(1),
        object,
    ],
    ids=lambda beta: f"{type(beta).__module__}.{type(beta).__name__}",
)
def test_beta_that_is_no_real_number_is_refused(beta: object) -> None:
    with pytest.raises(SpecError) as caught:
        LossSpec(beta)  # type: ignore[arg-type]
    text = str(caught.value)
    assert text.startswith(f"beta must be a real number, got {beta!r} ({type(beta).__name__}); ")
    assert "give a number >= 0" in text


@pytest.mark.parametrize(
    "beta", [10**400, 10**5000, -(10**5000), Fraction(10**5000)], ids=["400", "5000", "-5000", "q"]
)
def test_beta_too_large_for_a_float_is_refused_without_its_digits(beta: object) -> None:
    with pytest.raises(SpecError) as caught:
        LossSpec(beta)  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"beta is a {type(beta).__name__} that no float can hold; ")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("reduction", ["Mean", "", "avg", "elementwise_mean", "none ", None, 1, []])
def test_unknown_reduction_is_refused(reduction: object) -> None:
    with pytest.raises(SpecError) as caught:
        LossSpec(reduction=reduction)  # type: ignore[arg-type]
    text = f"unknown reduction {reduction!r}; choose one of none, mean, sum"
    assert str(caught.value) == text


@pytest.mark.parametrize("reduction", [sum, np.mean, torch.mean, torch.sum])
def test_a_function_is_no_reduction_whatever_its_name(reduction: object) -> None:
    with pytest.raises(SpecError, match="unknown reduction"):
        LossSpec(reduction=reduction)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "dtype",
    ["float", "Float32", "int32", "", "float128", None, float, int, torch.int32, np.int8, 32, []],
)
def test_unknown_dtype_is_refused(dtype: object) -> None:
    with pytest.raises(SpecError) as caught:
        LossSpec(dtype=dtype)  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"unknown dtype {dtype!r}; choose one of float32, float16, bfloat16, float64"
    )


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, "float32"),
        (torch.float, "float32"),
        (torch.half, "float16"),
        (torch.bfloat16, "bfloat16"),
        (torch.double, "float64"),
        ("torch.float16", "float16"),
        (np.float32, "float32"),
        (np.dtype("float16"), "float16"),
        (np.dtype("<f8"), "float64"),
        (ml_dtypes.bfloat16, "bfloat16"),
        (np.dtype(ml_dtypes.bfloat16), "bfloat16"),
    ],
)
def test_dtype_objects_of_torch_and_numpy_are_accepted(dtype: object, expected: str) -> None:
    assert LossSpec(dtype=dtype).dtype == expected  # type: ignore[arg-type]


class _Reduction(enum.StrEnum):
    SUM = "sum"


@pytest.mark.parametrize("text", [np.str_("sum"), _Reduction.SUM])
def test_a_string_of_another_class_becomes_a_string(text: str) -> None:
    assert type(LossSpec(reduction=text).reduction) is str
    assert LossSpec(reduction=text).name == LossSpec(reduction="sum").name


def test_a_spec_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="negative"):
        LossSpec(-1)


@pytest.mark.parametrize(
    ("beta", "dtype", "effective"),
    [
        (1e-50, "float32", 0.0),
        (1e-50, "float16", 0.0),
        (1e-50, "bfloat16", 0.0),
        (1e-50, "float64", 1e-50),
        (1e39, "float32", math.inf),
        (1e39, "bfloat16", math.inf),
        (1e39, "float64", 1e39),
        (0.1, "float32", float(np.float32(0.1))),
        # A half format's beta is not rounded to the half format: 1e5 would become inf.
        (1e5, "float16", 1e5),
        (0.1, "float16", float(np.float32(0.1))),
        (math.inf, "float32", math.inf),
    ],
)
def test_effective_beta(beta: float, dtype: str, effective: float) -> None:
    assert LossSpec(beta, dtype=dtype).effective_beta == effective


@given(betas)
def test_effective_beta_is_beta_rounded_as_numpy_rounds(beta: float) -> None:
    with np.errstate(over="ignore"):
        assert LossSpec(beta).effective_beta == float(np.float32(beta))
    assert LossSpec(beta, dtype="float64").effective_beta == beta


def test_compute_dtype() -> None:
    found = {dtype: LossSpec(dtype=dtype).compute_dtype for dtype in DTYPES}
    assert found == {
        "float32": "float32",
        "float16": "float32",
        "bfloat16": "float32",
        "float64": "float64",
    }


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


def test_dictionary_holds_every_field() -> None:
    assert LossSpec(math.inf, "sum", "float64").to_dict() == {
        "beta": "inf",
        "reduction": "sum",
        "dtype": "float64",
    }


def test_dictionary_may_leave_defaults_out() -> None:
    assert LossSpec.from_dict({}) == LossSpec()
    assert LossSpec.from_dict({"beta": 2}) == LossSpec(2.0)


def test_dictionary_of_a_newer_version_is_refused() -> None:
    with pytest.raises(SpecError) as caught:
        LossSpec.from_dict({"beta": 1.0, "huber": True, "alpha": 2, 3: 4})
    assert str(caught.value) == (
        "unknown field(s) 3, alpha, huber in a loss spec; "
        "it was written by a newer version of smoothl1-deploy: upgrade this one"
    )


@pytest.mark.parametrize("fields", [None, [], "beta", 5, [("beta", 1.0)]])
def test_what_is_no_mapping_is_refused(fields: object) -> None:
    with pytest.raises(SpecError, match="a loss spec is a mapping of its fields, got "):
        LossSpec.from_dict(fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("beta", ["1.0", "infinity", None, True, [1]])
def test_dictionary_values_are_validated(beta: object) -> None:
    with pytest.raises(SpecError, match="beta must be a real number"):
        LossSpec.from_dict({"beta": beta})


TRISTATE = (None, True, False)


@pytest.mark.parametrize("size_average", [*TRISTATE, 0, 1])
@pytest.mark.parametrize("reduce", [*TRISTATE, 0, 1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_deprecated_arguments_resolve_as_in_pytorch(
    size_average: bool | None, reduce: bool | None, reduction: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.nn.SmoothL1Loss(size_average, reduce, reduction, beta=0.25)
    assert resolve_reduction(size_average, reduce, reduction) == module.reduction
    assert LossSpec.from_legacy(size_average, reduce, reduction, 0.25) == LossSpec(
        0.25, module.reduction
    )
    assert LossSpec.from_module(module) == LossSpec(0.25, module.reduction)


@pytest.mark.parametrize(("size_average", "reduce"), list(itertools.product(TRISTATE, TRISTATE)))
def test_the_pair_alone_resolves_as_legacy_get_string(
    size_average: bool | None, reduce: bool | None
) -> None:
    if size_average is None and reduce is None:
        assert resolve_reduction(None, None, "none") == "none"  # PyTorch never asks it then
    else:
        expected = torch.nn._reduction.legacy_get_string(size_average, reduce, emit_warning=False)
        assert resolve_reduction(size_average, reduce, "none") == expected


class _Child(torch.nn.SmoothL1Loss):
    def __init__(self) -> None:
        super().__init__(reduction="sum", beta=0.75)


def test_from_module_takes_a_subclass() -> None:
    assert LossSpec.from_module(_Child()) == LossSpec(0.75, "sum")


@pytest.mark.parametrize(
    "beta",
    [
        torch.tensor(0.5),
        torch.tensor([0.5]),
        torch.tensor(0.5, requires_grad=True),
        torch.tensor(0.5, dtype=torch.bfloat16),
    ],
)
def test_from_module_takes_a_tensor_of_one_number(beta: torch.Tensor) -> None:
    module = torch.nn.SmoothL1Loss(beta=beta)  # type: ignore[arg-type]
    assert LossSpec.from_module(module) == LossSpec(0.5)


@pytest.mark.parametrize("shape", [(2,), (0,), (2, 3)])
def test_from_module_refuses_a_tensor_of_many_numbers(shape: tuple[int, ...]) -> None:
    module = torch.nn.SmoothL1Loss(beta=torch.ones(shape))  # type: ignore[arg-type]
    with pytest.raises(SpecError) as caught:
        LossSpec.from_module(module)
    assert str(caught.value) == (
        f"beta must be one number, got a tensor of shape {shape}; export one loss for each beta"
    )


@pytest.mark.parametrize(
    ("beta", "text"),
    [
        (-1.0, "beta must not be negative, got -1.0"),
        (torch.tensor(math.nan), "beta must not be NaN"),
        (torch.tensor(1j), "beta must be a real number, got 1j"),
        (torch.tensor(True), "beta must be a real number, got True"),
    ],
)
def test_from_module_validates(beta: object, text: str) -> None:
    with pytest.raises(SpecError, match=text):
        LossSpec.from_module(torch.nn.SmoothL1Loss(beta=beta))  # type: ignore[arg-type]


def test_from_module_takes_a_dtype() -> None:
    spec = LossSpec.from_module(torch.nn.SmoothL1Loss(), torch.bfloat16)
    assert spec.dtype == "bfloat16"


@pytest.mark.parametrize(
    "module", [torch.nn.HuberLoss(), torch.nn.SmoothL1Loss, torch.nn.L1Loss(), None, 1.0]
)
def test_from_module_refuses_what_is_no_smooth_l1_loss(module: object) -> None:
    with pytest.raises(SpecError) as caught:
        LossSpec.from_module(module)
    assert str(caught.value) == (
        f"expected a torch.nn.SmoothL1Loss, got {type(module).__name__}; "
        "write LossSpec(beta=..., reduction=...) for anything else"
    )
