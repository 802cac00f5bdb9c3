"""What is drawn: odd numbers, names, shapes, arrays and JSON, and specs that are sound."""

from __future__ import annotations

import decimal
import fractions
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from smoothl1_deploy import LossSpec
from smoothl1_deploy._spec import DTYPES, NORMALIZERS, REDUCTIONS
from smoothl1_deploy.errors import SpecError


@st.composite
def mostly(draw: st.DrawFn, sound: st.SearchStrategy[Any], odd: st.SearchStrategy[Any]) -> Any:
    """`sound`, one time in eight `odd`; `one_of` counts every strategy inside its arguments."""
    return draw(odd if draw(st.integers(0, 7)) == 7 else sound)


@st.composite
def some(draw: st.DrawFn, *choices: st.SearchStrategy[Any]) -> Any:
    """One of `choices`, each as often as the others."""
    return draw(choices[draw(st.integers(0, len(choices) - 1))])


#: Real numbers, and what could be taken for one.
NUMBERS: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([
        0.0, -0.0, 1.0, 0.5, 1e-50, 1e39, 1e308, 5e-324, float("inf"), float("nan"), -1.0,
        True, None, "1.0", "inf", "nan", b"1", 10**400, -(10**400), 2**63, -(2**63),
        fractions.Fraction(1, 3), fractions.Fraction(-1, 10**400), decimal.Decimal("0.1"),
        decimal.Decimal("NaN"), decimal.Decimal("sNaN"), 1j, [], {}, object,
        np.float16(0.1), np.float64("nan"), np.float32(-0.0), np.int64(-1), np.array(1.0),
        np.array([1.0, 2.0]), np.longdouble("1e4000"), ml_dtypes.bfloat16(0.5),
    ]),
    st.floats(),
    st.integers(-(2**70), 2**70),
)  # fmt: skip

#: Names of tensors, axes, files and choices.
NAMES: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([
        "input", "target", "weight", "beta", "loss", "grad_input", "N", "M", "x", "Nx16", "",
        " ", "a b", "../../up", "/proc/version", "\0", "a\0b", "\n", "\ud800", "é",
        "[red]", "%s", "{}", "x" * 300, "main_graph", "con", "-", "--help", "None", "float32",
    ]),
    st.text(max_size=12),
)  # fmt: skip

#: Values of any type.
THINGS: st.SearchStrategy[Any] = st.one_of(NUMBERS, NAMES, st.binary(max_size=8))

#: What a JSON file may hold.
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | NAMES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)

_DIMS = some(
    st.sampled_from([0, 1, 2, 3, 16, "N", "M", "N"]),
    st.sampled_from([-1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, True, 1.5, None, np.int64(4)]),
    NAMES,
)
#: Shapes for an export, most of them sound.
SHAPES: st.SearchStrategy[Any] = mostly(
    some(
        st.sampled_from([None, ("N", 16), (4, 16), (), ("N",), (0, 3), (1,) * 70, [1, 16]]),
        st.lists(st.sampled_from([0, 1, 2, 3, 16, "N", "M"]), max_size=5).map(tuple),
    ),
    some(st.just((2**31, 2**32, 2)), st.lists(_DIMS, max_size=4).map(tuple), THINGS),
)


@st.composite
def _specs(draw: st.DrawFn) -> LossSpec:
    fields: dict[str, Any] = {
        "beta": draw(st.sampled_from([0.0, 0.5, 1.0, 1e-50, 1e39, float("inf"), 1e-8, 1.000001])),
        "reduction": draw(st.sampled_from(REDUCTIONS)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "per_sample": draw(st.booleans()),
        "gradient": draw(st.booleans()),
        "runtime_beta": draw(st.booleans()),
        "weight": draw(st.sampled_from([None, None, *NORMALIZERS])),
        "loss_weight": draw(st.sampled_from([1.0, 1.0, 1.0, 0.3, -1e300])),
    }
    if draw(st.integers(0, 3)) == 0:
        fields |= {"loss": "huber", "delta": fields.pop("beta")}
    try:
        return LossSpec(**fields)
    except SpecError:
        return LossSpec(reduction=fields["reduction"], dtype=fields["dtype"])


#: Sound specs.
SPECS = _specs()

_ARRAY_SHAPES = mostly(
    st.sampled_from([(4, 16), (4, 16), (4, 16), (0, 16), (1, 16), (), (4,), (16,)]),
    st.lists(st.integers(0, 4), max_size=5).map(tuple),
)
_ARRAY_DTYPES = mostly(
    st.sampled_from(["float32", "float32", "float16", "float64", "bfloat16", "int32"]),
    st.sampled_from([
        "bool", "uint8", "complex64", "S3", "U2", "datetime64[s]", "V2", "longdouble", ">f4",
        "object", "float8_e4m3fn", "int4", "int64",
    ]),
)  # fmt: skip


@st.composite
def _arrays(draw: st.DrawFn) -> Any:
    shape, name, seed = draw(_ARRAY_SHAPES), draw(_ARRAY_DTYPES), draw(st.integers(0, 99))
    kind = getattr(ml_dtypes, name, None) or np.dtype(name)
    values = np.random.default_rng(seed).integers(0, 2, size=shape)
    array = values.astype("V2") if name == "V2" else values.astype(kind)
    view = draw(st.sampled_from(["", "", "", "step", "broadcast", "transpose", "read-only"]))
    if view == "step" and array.ndim:
        return np.repeat(array, 2, axis=0)[::2]
    if view == "broadcast":
        return np.broadcast_to(array, (2, *array.shape))
    if view == "transpose":
        return array.T
    if view == "read-only":
        array.flags.writeable = False
    return array


#: Arrays that `run` may or may not take, and things that are no arrays.
ARRAYS: st.SearchStrategy[Any] = mostly(_arrays(), THINGS)
