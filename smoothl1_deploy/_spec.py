"""`LossSpec`: what is computed. The one currency of the package; imports nothing heavy.

    l = 0.5 * d^2 / beta     if |d| < beta
    l = |d| - 0.5 * beta     otherwise,          d = input - target

Source: the documentation of `torch.nn.SmoothL1Loss`, whose argument names are used throughout.
"""

from __future__ import annotations

import math
import numbers
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from .errors import SpecError

_Shape = TypeVar("_Shape", tuple[int, ...], tuple[int | str, ...] | None)

REDUCTIONS = ("none", "mean", "sum")

#: How a spec becomes ONNX.
ROUTES = ("function", "inlined", "torch")

#: What a weighted mean is divided by.
NORMALIZERS = ("count", "weights")

#: What a mean is whose divisor is 0.
EMPTIES = ("nan", "zero")

#: dtype of input, target and loss -> dtype the arithmetic is done in. The two half formats are
#: computed in float32 and rounded once at the end, as PyTorch's own decomposition does.
COMPUTE_DTYPE: Mapping[str, str] = {
    "float32": "float32",
    "float16": "float32",
    "bfloat16": "float32",
    "float64": "float64",
}
DTYPES = tuple(COMPUTE_DTYPE)


def resolve_reduction(
    size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean"
) -> str:
    """The reduction that PyTorch derives from its deprecated pair of arguments.

    A pair of `None` leaves `reduction` as it is; otherwise the pair overrides it, and the
    missing half of the pair counts as true.

    >>> resolve_reduction()
    'mean'
    >>> resolve_reduction(size_average=False, reduction="none")
    'sum'
    >>> resolve_reduction(size_average=True, reduce=False)
    'none'

    Source: `torch.nn._reduction.legacy_get_string`.
    """
    if size_average is None and reduce is None:
        return reduction
    average = True if size_average is None else bool(size_average)
    reduces = True if reduce is None else bool(reduce)
    if not reduces:
        return "none"
    return "mean" if average else "sum"


def _valid_beta(beta: object) -> float:
    remedy = "give a number >= 0, for instance 1.0 (0 is the L1 loss, inf the zero loss)"
    if isinstance(beta, bool) or not isinstance(beta, numbers.Real):
        raise SpecError(
            f"beta must be a real number, got {beta!r} ({type(beta).__name__}); {remedy}"
        )
    try:
        value = float(beta)
    except OverflowError:  # the digits would be the whole message, or too many for Python to print
        raise SpecError(
            f"beta is a {type(beta).__name__} that no float can hold; {remedy}"
        ) from None
    if math.isnan(value):
        raise SpecError(f"beta must not be NaN; {remedy}")
    if beta < 0:  # not `value`: a Fraction may be negative and round to -0.0
        raise SpecError(f"beta must not be negative, got {value!r}; {remedy}")
    return value + 0.0  # -0.0 becomes 0.0, so that equal specs have equal names


def _valid_choice(kind: str, value: object, choices: tuple[str, ...]) -> str:
    name = value if isinstance(value, str) else ""
    if kind == "dtype":
        # torch.float32 and numpy.dtype("float32") name themselves; nothing is imported to see it.
        name = name or str(getattr(value, "__name__", value))
        name = name.removeprefix("torch.")
    if name not in choices:
        raise SpecError(f"unknown {kind} {value!r}; choose one of {', '.join(choices)}")
    return choices[choices.index(name)]  # the plain str of a numpy.str_ or an enumeration


#: What an extension's field holds where it isn't used.
_UNUSED = (False, None, "nan")

_SMALLEST_NORMAL_FLOAT32 = 2.0**-126


def _round_to_float32(value: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:  # struct refuses what rounds to infinity; IEEE 754 doesn't
        return math.copysign(math.inf, value)


@dataclass(frozen=True, slots=True)
class LossSpec:
    """A Smooth L1 loss: which beta, which reduction, in which dtype.

    Args:
        beta: where the quadratic part ends, >= 0; 0 is exactly the L1 loss. Any real number.
        reduction: `"none"` (the broadcast shape of input and target), `"mean"` (the sum over
            the number of elements after broadcasting) or `"sum"` (both rank 0).
        dtype: the format of input, target and loss: `"float32"`, `"float16"`, `"bfloat16"`,
            `"float64"`, or the torch or numpy dtype of that name.
        per_sample: reduce every axis but axis 0: one score per row; needs `mean` or `sum`.
        gradient: a second output `grad_input`, the gradient of the sum of the loss with respect
            to input, in the shape of input.
        upstream: with `gradient`, a further input `grad_output` in the shape of the loss, as
            `torch.autograd.grad(loss, input, grad_outputs=...)` takes it: `grad_input` is then
            the gradient of the sum of `grad_output * loss`.
        runtime_beta: beta is a third input (float32, rank 0), one artefact for every beta; the
            field `beta` stays at its default. A negative or NaN beta gives NaN.
        weight: a further input `weight` that broadcasts with the element losses and multiplies
            them before the reduction. `"count"`: a mean divides by the number of elements, as
            without weights. `"weights"`: it divides by the sum of the (broadcast) weights.
        mask: a further input `mask`, boolean, that broadcasts with the element losses and selects
            some: the others, whatever their numbers, count for nothing. Their loss without a
            reduction and their gradient are 0, and a mean divides by those selected.
        divisor: a mean is divided by a further input `divisor` (rank 0; float32, or float64 where
            the dtype is), and not by a count: that of the positives of every worker, for instance.
        empty: a mean whose divisor is 0, as where nothing is selected: `"nan"` is what a division
            gives, as in PyTorch; `"zero"` is 0, and so is its gradient.

    Raises:
        SpecError: a `ValueError` that names the value and the remedy.

    >>> LossSpec(beta=0.5).name
    'smooth_l1_loss_beta_0.5_mean_float32'
    >>> LossSpec(beta=1e-50).effective_beta
    0.0
    """

    beta: float = 1.0
    reduction: str = "mean"
    dtype: str = "float32"
    per_sample: bool = False
    gradient: bool = False
    runtime_beta: bool = False
    weight: str | None = None
    upstream: bool = False
    mask: bool = False
    divisor: bool = False
    empty: str = "nan"

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", _valid_beta(self.beta))
        object.__setattr__(
            self, "reduction", _valid_choice("reduction", self.reduction, REDUCTIONS)
        )
        object.__setattr__(self, "dtype", _valid_choice("dtype", self.dtype, DTYPES))
        self._check_extensions()

    def _check_extensions(self) -> None:
        for name in ("per_sample", "gradient", "runtime_beta", "upstream", "mask", "divisor"):
            if not isinstance(getattr(self, name), bool):
                raise SpecError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.weight is not None:
            object.__setattr__(self, "weight", _valid_choice("weight", self.weight, NORMALIZERS))
        object.__setattr__(self, "empty", _valid_choice("empty", self.empty, EMPTIES))
        if self.per_sample and self.reduction == "none":
            raise SpecError(
                "per_sample reduces every axis but 0, and the reduction none reduces nothing; use "
                "mean or sum with it"
            )
        if self.weight == "weights" and self.reduction != "mean":
            raise SpecError(
                "the weight 'weights' divides a mean by the sum of the weights, and the reduction "
                f"{self.reduction} is no mean; use the weight 'count', or the reduction mean"
            )
        if self.divisor and (self.reduction != "mean" or self.weight == "weights"):
            what = "weight 'weights'" if self.reduction == "mean" else f"reduction {self.reduction}"
            raise SpecError(
                f"divisor is what a mean is divided by, and the {what} takes none; use the "
                "reduction mean, with the weight 'count' if any"
            )
        if self.empty == "zero" and self.reduction != "mean":
            raise SpecError(
                "empty says what a mean over nothing is, and the reduction "
                f"{self.reduction} is no mean; leave it out, or use the reduction mean"
            )
        if self.upstream and not self.gradient:
            raise SpecError(
                "upstream is the gradient that flows into grad_input, and without gradient there "
                "is no such output; ask for gradient too"
            )
        if self.runtime_beta and self.beta != 1.0:
            raise SpecError(
                f"runtime_beta takes beta as an input at run time, so beta {self.beta!r} would be "
                "ignored; leave beta at its default"
            )

    @classmethod
    def from_legacy(
        cls,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        beta: float = 1.0,
        dtype: str = "float32",
    ) -> LossSpec:
        """The spec of `torch.nn.SmoothL1Loss(size_average, reduce, reduction, beta)`."""
        return cls(beta, resolve_reduction(size_average, reduce, reduction), dtype)

    @classmethod
    def from_module(cls, module: Any, dtype: Any = "float32") -> LossSpec:
        """The spec of a `torch.nn.SmoothL1Loss` (or a subclass of it).

        A loss module has no parameters and so no dtype of its own: `dtype` says which one its
        tensors have.

        Raises:
            SpecError: for any other object.
        """
        from .errors import require

        torch = require("torch", "torch", "LossSpec.from_module")
        if not isinstance(module, torch.nn.SmoothL1Loss):
            raise SpecError(
                f"expected a torch.nn.SmoothL1Loss, got {type(module).__name__}; "
                "write LossSpec(beta=..., reduction=...) for anything else"
            )
        beta = module.beta
        if isinstance(beta, torch.Tensor):
            if beta.numel() != 1:
                raise SpecError(
                    f"beta must be one number, got a tensor of shape {tuple(beta.shape)}; "
                    "export one loss for each beta"
                )
            try:
                beta = beta.item()
            except Exception as exc:  # a FakeTensor or meta tensor
                raise SpecError(
                    f"beta is a {type(beta).__name__} without a number ({exc}); give one with data"
                ) from exc
        return cls(beta=beta, reduction=module.reduction, dtype=dtype)

    @property
    def compute_dtype(self) -> str:
        """The dtype the arithmetic is done in: float32, or float64 for float64 and a tiny beta."""
        return "float64" if self.has_subnormal_beta else COMPUTE_DTYPE[self.dtype]

    @property
    def has_subnormal_beta(self) -> bool:
        """Whether beta is subnormal in float32 and dtype no wider: half of such a beta may be 0."""
        return self.dtype != "float64" and 0 < self.effective_beta < _SMALLEST_NORMAL_FLOAT32

    @property
    def effective_beta(self) -> float:
        """beta rounded to float32 where dtype is no wider, as PyTorch rounds it first."""
        return self.beta if self.dtype == "float64" else _round_to_float32(self.beta)

    @property
    def name(self) -> str:
        """A name that no other spec has; used for graphs, networks and files."""
        beta = "runtime" if self.runtime_beta else repr(self.beta)
        parts = ["smooth_l1_loss", "beta", beta, self.reduction]
        if self.per_sample:
            parts.append("per_sample")
        if self.weight:
            parts.append(f"weight_by_{self.weight}")
        parts += ["mask"] * self.mask + ["divisor"] * self.divisor
        if self.empty != "nan":
            parts.append(f"empty_{self.empty}")
        if self.gradient:
            parts.append("gradient_with_upstream" if self.upstream else "gradient")
        return "_".join([*parts, self.dtype])

    def without_gradient(self) -> LossSpec:
        """The same loss alone: no `grad_input`, and no `grad_output` that would flow into it.

        >>> LossSpec(0.5, gradient=True, upstream=True).without_gradient() == LossSpec(0.5)
        True
        """
        return replace(self, gradient=False, upstream=False)

    def loss_shape(self, full: _Shape) -> _Shape:
        """The shape of the loss, where input, target and weight broadcast to `full`.

        None stands for any rank.

        >>> LossSpec().loss_shape((8, 4)), LossSpec(per_sample=True).loss_shape(("N", 4))
        ((), ('N',))
        """
        if self.reduction == "none":
            return full
        return full and full[:1] if self.per_sample else ()

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of the graph's inputs that broadcast with each other."""
        return ("input", "target", *["weight"] * bool(self.weight), *["mask"] * self.mask)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the graph's inputs.

        >>> LossSpec(mask=True, runtime_beta=True).inputs
        ('input', 'target', 'mask', 'beta')
        """
        names = [*self.operands]
        names += ["beta"] if self.runtime_beta else []
        names += ["divisor"] if self.divisor else []
        names += ["grad_output"] if self.upstream else []
        return tuple(names)

    def dtype_of(self, name: str) -> str:
        """The dtype of one of the inputs or outputs.

        >>> LossSpec(dtype="float16").dtype_of("loss"), LossSpec(mask=True).dtype_of("mask")
        ('float16', 'bool')
        """
        if name in ("beta", "divisor"):
            return "float64" if (name, self.dtype) == ("divisor", "float64") else "float32"
        return "bool" if name == "mask" else self.dtype

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the graph's outputs."""
        return ("loss", "grad_input") if self.gradient else ("loss",)

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-ready: an infinite beta is `"inf"`; extensions not used are left out."""
        fields = asdict(self)
        fields["beta"] = "inf" if math.isinf(self.beta) else self.beta
        return {
            name: value
            for name, value in fields.items()
            if name in ("beta", "reduction", "dtype") or value not in _UNUSED
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LossSpec:
        """The inverse of `to_dict`.

        Raises:
            SpecError: on an unknown field (a newer version wrote it) or a bad value.
        """
        if not isinstance(fields, Mapping):
            raise SpecError(f"a loss spec is a mapping of its fields, got {fields!r}")
        unknown = sorted(str(key) for key in set(fields) - set(cls.__slots__))
        if unknown:
            raise SpecError(
                f"unknown field(s) {', '.join(unknown)} in a loss spec; "
                "it was written by a newer version of smoothl1-deploy: upgrade this one"
            )
        values = dict(fields)
        if isinstance(values.get("beta"), str) and values["beta"] == "inf":
            values["beta"] = math.inf
        return cls(**values)
