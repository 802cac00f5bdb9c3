"""`LossSpec`: what is computed. The one currency of the package; imports nothing heavy.

    l = 0.5 * d^2 / beta     if |d| < beta
    l = |d| - 0.5 * beta     otherwise,          d = input - target

The Huber loss is delta times that, with delta in the place of beta, and the L1 loss is that of
beta 0.

Source: the documentation of `torch.nn.SmoothL1Loss`, whose argument names are used throughout, and
of `torch.nn.HuberLoss`.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import numbers
import reprlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from ._shapes import MOST_AXES, broadcast, check_shape, describe
from .errors import SpecError

_Shape = TypeVar("_Shape", tuple[int, ...], tuple[int | str, ...] | None)

REDUCTIONS = ("none", "mean", "sum")

#: The losses by name; `l1` is `smooth_l1` with beta 0.
LOSSES = ("smooth_l1", "huber", "l1")

#: How a spec becomes ONNX.
ROUTES = ("function", "inlined", "torch")

#: What a weighted mean is divided by.
NORMALIZERS = ("count", "weights")

#: What of each element may be given beside a loss that is reduced.
ELEMENTS = ("losses", "differences")

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


#: Field -> which numbers it is none of, that in words, and what to give instead.
_LIMITS: Mapping[str, tuple[Callable[[Any], bool], str, str]] = {
    "beta": (
        lambda value: value < 0,  # not its float: a Fraction may be negative and round to -0.0
        "must not be negative",
        "give a number >= 0, for instance 1.0 (0 is the L1 loss, inf the zero loss)",
    ),
    "delta": (
        lambda value: float(value) <= 0,
        "must be above 0, as PyTorch has it",
        "give a number > 0, for instance 1.0 (inf is half the squared difference)",
    ),
    "loss_weight": (math.isinf, "must be finite", "give a finite number, for instance 2.0"),
}


def _valid_number(name: str, value: Any) -> float:
    is_wrong, limit, remedy = _LIMITS[name]
    kind = type(value).__name__
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise SpecError(f"{name} must be a real number, got {value!r} ({kind}); {remedy}")
    try:
        number = float(value)
    except OverflowError:  # the digits would be the whole message, or too many for Python to print
        raise SpecError(f"{name} is a {kind} that no float can hold; {remedy}") from None
    if math.isnan(number):
        raise SpecError(f"{name} must not be NaN; {remedy}")
    if is_wrong(value):
        raise SpecError(f"{name} {limit}, got {number!r}; {remedy}")
    return number + 0.0  # -0.0 becomes 0.0, so that equal specs have equal names


def _valid_knees(name: str, value: Any, axes: int = MOST_AXES) -> Any:
    """A number, or those of an array, a tensor or a list as nested tuples."""
    if hasattr(value, "tolist") and hasattr(value, "__len__"):  # not a number of numpy's
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return _valid_number(name, value)
    if not axes:
        raise SpecError(f"{name} has more than {MOST_AXES} axes; give an array of fewer")
    parts = tuple(_valid_knees(name, part, axes - 1) for part in value)
    if len({*map(_shape_of, parts)}) != 1:
        raise SpecError(
            f"{name} must be a number or an array of at least one, whose rows are as long as each "
            f"other, got {reprlib.repr(value)}; give a numpy array, for instance"
        )
    return parts


def _shape_of(knees: Any) -> tuple[int, ...]:
    return (len(knees), *_shape_of(knees[0])) if isinstance(knees, tuple) else ()


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """What `change` makes of a value, or of each in nested tuples or lists."""
    if isinstance(value, (tuple, list)):
        return tuple(_each(change, part) for part in value)
    return change(value)


def _valid_choice(kind: str, value: object, choices: tuple[str, ...]) -> str:
    name = value if isinstance(value, str) else ""
    if kind == "dtype":
        # torch.float32 and numpy.dtype("float32") name themselves; nothing is imported to see it.
        name = name or str(getattr(value, "__name__", value))
        name = name.removeprefix("torch.")
    if name not in choices:
        raise SpecError(f"unknown {kind} {value!r}; choose one of {', '.join(choices)}")
    return choices[choices.index(name)]  # the plain str of a numpy.str_ or an enumeration


def _valid_axes(axes: Any) -> tuple[int, ...]:
    given = (
        axes.split(",")
        if isinstance(axes, str)
        else [axes]
        if isinstance(axes, numbers.Integral)
        else axes
    )
    try:
        found = sorted({*map(int, given)}) if len(given) else []
    except (TypeError, ValueError):
        found = []
    if not found or len(found) < len(given) or isinstance(axes, bool):
        raise SpecError(
            f"axes must be different integers, at least one, got {axes!r}; write axes=(1, 2), or "
            "leave it out to reduce all"
        )
    return tuple(found)


def _valid_sizes(shape: Any) -> tuple[int, ...]:
    sizes = check_shape([shape] if isinstance(shape, int) else shape, "runtime_beta")
    if not sizes or not all(isinstance(size, int) and size for size in sizes):
        raise SpecError(
            f"runtime_beta must be True, for a number, or an array's shape of sizes above 0, got "
            f"{shape!r}; write runtime_beta=(3, 1, 1), for instance"
        )
    return tuple(map(int, sizes))


_SMALLEST_NORMAL_FLOAT32 = 2.0**-126


def _round_to_float32(value: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:  # struct refuses what rounds to infinity; IEEE 754 doesn't
        return math.copysign(math.inf, value)


@dataclass(frozen=True, slots=True)
class LossSpec:
    """A Smooth L1, Huber or L1 loss: which beta, which reduction, in which dtype.

    Args:
        beta: where the quadratic part ends, >= 0; 0 is exactly the L1 loss. Any real number; or an
            array of them, a tensor or nested lists, which broadcasts with the element losses as
            input and target do, and is kept as nested tuples: `[[[0.5]], [[1.0]]]` for two channels
            of [N, 2, H, W].
        reduction: `"none"` (the broadcast shape of input and target), `"mean"` (the sum over
            the number of elements after broadcasting) or `"sum"` (both rank 0).
        dtype: the format of input, target and loss: `"float32"`, `"float16"`, `"bfloat16"`,
            `"float64"`, or the torch or numpy dtype of that name.
        per_sample: reduce every axis but axis 0: one score per row; needs `mean` or `sum`.
        axes: the axes of the element losses that are reduced, negative ones from the end: `(1,)` of
            [N, C, H, W] gives a map [N, H, W]. A number, several, or a text such as `"1,2"`.
        gradient: a second output `grad_input`, the gradient of the sum of the loss with respect
            to input, in the shape of input.
        upstream: with `gradient`, a further input `grad_output` in the shape of the loss, as
            `torch.autograd.grad(loss, input, grad_outputs=...)` takes it: `grad_input` is then
            the gradient of the sum of `grad_output * loss`.
        runtime_beta: beta is a further input (float32, rank 0), one artefact for every beta; the
            field `beta` stays at its default. A negative or NaN beta gives NaN. A shape, such as
            `(3, 1, 1)` for three channels of [N, C, H, W], makes it an array of that shape.
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
        loss: `"smooth_l1"`; `"huber"`, with `delta` for beta; or `"l1"`, another name for beta 0.
        delta: where the quadratic part of `"huber"` ends, > 0; 1.0 by default, as PyTorch has it.
            An array as beta may be; None for the other losses. With `runtime_beta` the input `beta`
            is delta, and 0 gives NaN too.
        loss_weight: a finite number that the loss, once reduced, is multiplied by; its gradient
            too.
        elements: a further output, in the shape of the element losses: `"losses"`, which the
            reduction none would give, or `"differences"`, input less target, and 0 where a mask
            leaves out.

    Raises:
        SpecError: a `ValueError` that names the value and the remedy.

    >>> LossSpec(beta=0.5).name
    'smooth_l1_loss_beta_0.5_mean_float32'
    >>> LossSpec(beta=1e-50).effective_beta
    0.0
    >>> LossSpec(loss="huber", delta=0.5).name
    'huber_loss_delta_0.5_mean_float32'
    >>> LossSpec(loss="l1") == LossSpec(beta=0)
    True
    >>> LossSpec(beta=[0.5, 1]).beta, LossSpec(beta=[0.5, 1]).name
    ((0.5, 1.0), 'smooth_l1_loss_beta_2_58a60ca0_mean_float32')
    """

    beta: Any = 1.0
    reduction: str = "mean"
    dtype: str = "float32"
    per_sample: bool = False
    gradient: bool = False
    runtime_beta: Any = False
    weight: str | None = None
    upstream: bool = False
    mask: bool = False
    divisor: bool = False
    empty: str = "nan"
    loss: str = "smooth_l1"
    delta: Any = None
    loss_weight: float = 1.0
    axes: tuple[int, ...] | None = None
    elements: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", _valid_choice("loss", self.loss, LOSSES))
        object.__setattr__(self, "beta", _valid_knees("beta", self.beta))
        object.__setattr__(
            self, "reduction", _valid_choice("reduction", self.reduction, REDUCTIONS)
        )
        object.__setattr__(self, "dtype", _valid_choice("dtype", self.dtype, DTYPES))
        object.__setattr__(self, "loss_weight", _valid_number("loss_weight", self.loss_weight))
        self._name_the_knee()
        self._check_extensions()

    def _name_the_knee(self) -> None:
        """Let a Huber loss have a delta and no beta, an L1 loss the beta 0, and others no delta."""
        if self.loss == "huber":
            if self.beta != 1.0:
                raise SpecError(f"a Huber loss has no beta, got {self.beta!r}; call it delta")
            delta = 1.0 if self.delta is None else self.delta
            object.__setattr__(self, "delta", _valid_knees("delta", delta))
        elif self.delta is not None:
            raise SpecError(
                f"delta {self.delta!r} is of the loss huber, and {self.loss} has none; use "
                "loss='huber', or beta"
            )
        elif self.loss == "l1":
            if self.beta not in (0.0, 1.0):
                raise SpecError(
                    f"the loss l1 is smooth_l1 with beta 0, got the beta {self.beta!r}; leave it "
                    "out, or use smooth_l1"
                )
            object.__setattr__(self, "loss", "smooth_l1")
            object.__setattr__(self, "beta", 0.0)

    def _check_extensions(self) -> None:
        if not isinstance(self.runtime_beta, bool):
            object.__setattr__(self, "runtime_beta", _valid_sizes(self.runtime_beta))
        for name in ("per_sample", "gradient", "upstream", "mask", "divisor"):
            if not isinstance(getattr(self, name), bool):
                raise SpecError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.weight is not None:
            object.__setattr__(self, "weight", _valid_choice("weight", self.weight, NORMALIZERS))
        object.__setattr__(self, "empty", _valid_choice("empty", self.empty, EMPTIES))
        if self.elements is not None:
            chosen = _valid_choice("elements", self.elements, ELEMENTS)
            object.__setattr__(self, "elements", chosen)
            if (chosen, self.reduction) == ("losses", "none"):
                raise SpecError(
                    "the elements 'losses' are the loss itself with the reduction none; leave them "
                    "out, or ask for the differences"
                )
        if self.axes is not None:
            object.__setattr__(self, "axes", _valid_axes(self.axes))
        if self.reduction == "none" and (self.per_sample or self.axes):
            which = f"the axes {self.axes}" if self.axes else "every axis but 0"
            raise SpecError(
                f"{'axes' if self.axes else 'per_sample'} reduces {which}, and the reduction none "
                "reduces nothing; use mean or sum with it"
            )
        if self.per_sample and self.axes:
            raise SpecError(
                f"per_sample reduces every axis but 0, and axes {self.axes}; give one of the two"
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
        if self.runtime_beta and self.knee != 1.0:
            name = "delta" if self.loss == "huber" else "beta"
            raise SpecError(
                f"runtime_beta takes {name} as an input at run time, so {name} {self.knee!r} would "
                f"be ignored; leave {name} at its default"
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
    def from_module(cls, module: Any, dtype: Any = "float32", **fields: Any) -> LossSpec:
        """The spec of a loss as people have it: a module, or a function with its arguments.

        Nothing is imported to recognise it. mmdetection's mean of nothing is 0, and so is fvcore's,
        where PyTorch's is NaN, and the spec's without `empty="zero"`.

        Args:
            module: a `torch.nn.SmoothL1Loss`, `HuberLoss` or `L1Loss`, or a subclass; a module
                whose class, or a parent, has one of these names and has the attributes that the
                name asks for, as mmdetection's with their `loss_weight`; or a function
                `smooth_l1_loss`, `huber_loss` or `l1_loss`, as PyTorch's, torchvision's and
                fvcore's, which `functools.partial` may have given its arguments.
            dtype: of the tensors: a loss has no parameters, and so no dtype of its own.
            fields: further ones of the spec, of which the module says nothing: mmdetection's
                argument `weight`, for instance, is `weight="count"`.

        Raises:
            SpecError: for any other object, and a field that the module says itself.

        >>> class SmoothL1Loss:  # as mmdetection's
        ...     beta, reduction, loss_weight = 0.11, "mean", 2.0
        >>> LossSpec.from_module(SmoothL1Loss(), weight="count").name
        'smooth_l1_loss_beta_0.11_mean_weight_by_count_times_2.0_float32'
        """
        said = _said_by_function(module) or _said_by_module(module)
        if not said:
            raise SpecError(
                "expected a torch.nn.SmoothL1Loss, HuberLoss or L1Loss, or a function of such a "
                f"name, got {type(module).__name__}; write LossSpec(beta=..., reduction=...) for "
                "anything else"
            )
        if both := sorted(said.keys() & fields.keys()):
            raise SpecError(
                f"{', '.join(both)}: the {type(module).__name__} says that itself; leave it out"
            )
        return cls(dtype=dtype, **said, **fields)

    @property
    def compute_dtype(self) -> str:
        """The dtype the arithmetic is done in: float32, or float64 for float64 and a tiny beta."""
        return "float64" if self.has_subnormal_beta else COMPUTE_DTYPE[self.dtype]

    @property
    def has_subnormal_beta(self) -> bool:
        """Whether a beta is subnormal in float32 and dtype no wider: half of it may be 0."""
        if self.dtype == "float64":
            return False
        knees = self.effective_beta.flat if self.beta_shape else [self.effective_beta]
        return any(0 < knee < _SMALLEST_NORMAL_FLOAT32 for knee in knees)

    @property
    def is_of_torch(self) -> bool:
        """Whether a module of PyTorch's, which takes one number for beta, is all of it."""
        alone = LossSpec(reduction=self.reduction, dtype=self.dtype, loss=self.loss)
        return not self.beta_shape and self == alone.at(self.knee)

    @property
    def knee(self) -> Any:
        """Where the quadratic part ends: beta, or the delta of a Huber loss."""
        return self.beta if self.delta is None else self.delta

    @property
    def beta_shape(self) -> tuple[int, ...]:
        """The shape of the knee, known or an input; that of a number is ().

        >>> LossSpec(beta=[[0.5], [1.0]]).beta_shape, LossSpec(runtime_beta=(2, 1)).beta_shape
        ((2, 1), (2, 1))
        """
        return _shape_of(self.knee) if isinstance(self.runtime_beta, bool) else self.runtime_beta

    @property
    def effective_beta(self) -> Any:
        """The knee, rounded to float32 where dtype is no wider, as PyTorch rounds it first.

        A float, or an array of float64.
        """
        knee = self.knee if self.dtype == "float64" else _each(_round_to_float32, self.knee)
        if not self.beta_shape:
            return knee
        import numpy as np

        return np.array(knee, np.float64)

    @property
    def effective_loss_weight(self) -> float:
        """loss_weight, rounded likewise."""
        wide = self.dtype == "float64"
        return self.loss_weight if wide else _round_to_float32(self.loss_weight)

    @property
    def name(self) -> str:
        """A name that no other spec has; used for graphs, networks and files.

        Of an array of betas it has the shape and a hash.
        """
        knee = "runtime" if self.runtime_beta else repr(self.knee)
        if self.beta_shape:  # all of them would be no name
            digest = hashlib.sha256(knee.encode()).hexdigest()[:8]
            digest = knee if self.runtime_beta else digest
            knee = f"{describe(self.beta_shape)}_{digest}"
        named = "beta" if self.delta is None else "delta"
        parts = [f"{self.loss}_loss", named, knee, self.reduction]
        if self.per_sample:
            parts.append("per_sample")
        if self.axes:
            parts += ["axes", *map(str, self.axes)]
        if self.weight:
            parts.append(f"weight_by_{self.weight}")
        parts += ["mask"] * self.mask + ["divisor"] * self.divisor
        if self.empty != "nan":
            parts.append(f"empty_{self.empty}")
        if self.gradient:
            parts.append("gradient_with_upstream" if self.upstream else "gradient")
        parts += [f"and_{self.elements}"] * bool(self.elements)
        if self.loss_weight != 1.0:
            parts.append(f"times_{self.loss_weight!r}")
        return "_".join([*parts, self.dtype])

    def at(self, knee: Any) -> LossSpec:
        """The same loss with this for beta, or delta, where it is no input.

        >>> LossSpec(runtime_beta=True).at(0.5) == LossSpec(0.5)
        True
        """
        number: Any = {"beta" if self.delta is None else "delta": knee}
        return replace(self, runtime_beta=False, **number)

    def without_gradient(self) -> LossSpec:
        """The same loss alone: no `grad_input`, and no `grad_output` that would flow into it.

        >>> LossSpec(0.5, gradient=True, upstream=True).without_gradient() == LossSpec(0.5)
        True
        """
        return replace(self, gradient=False, upstream=False)

    def broadcast_with_betas(self, operands: Any) -> Any:
        """The shape of the element losses, where the operands broadcast to `operands`.

        None stands for any rank.

        Raises:
            SpecError: where an array of betas doesn't broadcast with them.

        >>> LossSpec(beta=[[0.5], [1.0]]).broadcast_with_betas(("N", 2, 8))
        ('N', 2, 8)
        """
        try:
            return None if operands is None else broadcast(operands, self.beta_shape)
        except SpecError as exc:
            raise SpecError(
                f"beta has the shape {self.beta_shape}, the element losses {operands}: {exc}; give "
                "one that broadcasts, as (C, 1, 1) does with (N, C, H, W)"
            ) from exc

    def loss_shape(self, full: _Shape) -> _Shape:
        """The shape of the loss, where input, target and weight broadcast to `full`.

        None stands for any rank.

        >>> LossSpec().loss_shape((8, 4)), LossSpec(per_sample=True).loss_shape(("N", 4))
        ((), ('N',))
        """
        if full is None:
            return full if self.keeps_axes else ()
        return tuple(full[axis] for axis in self.kept_axes(len(full)))

    @property
    def keeps_axes(self) -> bool:
        """Whether the loss has axes of the element losses, and is no single number."""
        return self.reduction == "none" or self.per_sample or self.axes is not None

    @property
    def mixes_rows(self) -> bool:
        """Whether the first axis is reduced, or may be: counted from the end it isn't known."""
        return min(self.axes) <= 0 if self.axes else not self.keeps_axes

    def kept_axes(self, rank: int) -> tuple[int, ...]:
        """The axes that the loss has of element losses of that many.

        Raises:
            SpecError: where an axis to be reduced isn't among them.

        >>> LossSpec(axes=(1, -1)).kept_axes(4)
        (0, 2)
        """
        if not self.keeps_axes:
            return ()
        if self.per_sample:
            return tuple(range(min(rank, 1)))
        reduced = [axis % rank for axis in self.axes or () if -rank <= axis < rank]
        if len({*reduced}) < len(self.axes or ()):
            raise SpecError(
                f"axes {self.axes} of element losses with {rank} axes; give different ones of "
                f"{-rank} to {rank - 1}" + " (which have none)" * (not rank)
            )
        return tuple(axis for axis in range(rank) if axis not in reduced)

    def of_rank(self, rank: int) -> LossSpec:
        """The same loss of element losses of that many axes, none of which is counted from the end.

        >>> LossSpec(axes=(1, -1)).of_rank(4).axes
        (1, 3)
        """
        kept = self.kept_axes(rank)
        reduced = tuple(axis for axis in range(rank) if axis not in kept)
        return replace(self, axes=reduced) if self.axes else self

    def shape_over_axes(self, full: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the loss where those axes that it lacks have size 1.

        >>> LossSpec(axes=(1,)).shape_over_axes((8, 3, 4))
        (8, 1, 4)
        """
        kept = self.kept_axes(len(full))
        return tuple(size if axis in kept else 1 for axis, size in enumerate(full))

    def count(self, full: tuple[int, ...]) -> int:
        """How many element losses go into one number of the loss."""
        kept = self.kept_axes(len(full))
        return math.prod(size for axis, size in enumerate(full) if axis not in kept)

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
        beside = () if self.elements is None else (self.elements,)
        return ("loss", *beside, *["grad_input"] * self.gradient)

    @property
    def of_elements(self) -> LossSpec:
        """The loss of each element that this one is of."""
        plain = self.without_gradient()
        nothing: dict[str, Any] = {"axes": None, "elements": None, "divisor": False, "empty": "nan"}
        weight = self.weight and "count"
        return replace(plain, reduction="none", per_sample=False, weight=weight, **nothing)

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-ready: an infinite beta is `"inf"`; extensions not used are left out."""
        return {
            each.name: _each(lambda number: "inf" if number == math.inf else number, value)
            for each in fields(self)
            if (value := getattr(self, each.name)) != each.default
            or each.name in ("beta", "reduction", "dtype")
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
        for name in ("beta", "delta"):
            if name in values:
                values[name] = _each(_read_infinity, values[name])
        return cls(**values)


def _read_infinity(value: Any) -> Any:
    return math.inf if isinstance(value, str) and value == "inf" else value


#: The class of a module -> the loss.
_MODULES = {"SmoothL1Loss": "smooth_l1", "HuberLoss": "huber", "L1Loss": "l1"}
#: The loss -> what it has beside a reduction.
_KNEES: Mapping[str, tuple[str, ...]] = {"smooth_l1": ("beta",), "huber": ("delta",), "l1": ()}
_REDUCING = ("size_average", "reduce", "reduction")
_LEAST_OF_FVCORE = 1e-5  # of a beta below, fvcore computes the L1 loss


def _said_by_module(module: Any) -> dict[str, Any]:
    """The fields of a spec that a module says; none where it is no loss that is known."""
    for loss in filter(None, (_MODULES.get(kind.__name__) for kind in type(module).__mro__)):
        names = ["reduction", *_KNEES[loss]]
        if all(hasattr(module, name) for name in names):
            names += ["loss_weight"] * hasattr(module, "loss_weight")
            return {"loss": loss, **{name: _number(getattr(module, name), name) for name in names}}
    return {}


def _said_by_function(function: Any) -> dict[str, Any]:
    """Likewise of a function, with the arguments that a `functools.partial` has for it."""
    own = getattr(function, "func", function)
    name = str(getattr(own, "__name__", ""))
    loss = name.removesuffix("_loss")
    if loss == name or loss not in _KNEES:
        return {}
    args, keywords = getattr(function, "args", ()), getattr(function, "keywords", {})
    try:
        bound = inspect.signature(own).bind_partial(*args, **keywords)
    except (TypeError, ValueError) as exc:  # the latter of what has no signature
        raise SpecError(f"{name}: {exc}; write LossSpec(beta=..., reduction=...)") from exc
    known = {*_REDUCING, *_KNEES[loss]}
    if other := [n for n, value in bound.arguments.items() if n not in known and value is not None]:
        raise SpecError(
            f"{name} is given {', '.join(other)}, which is no part of a spec; leave it out. "
            'A weight is an input: from_module(..., weight="count")'
        )
    bound.apply_defaults()
    given = {n: value for n, value in bound.arguments.items() if n in known}
    reducing = {n: given.pop(n) for n in _REDUCING if n in given}
    if missing := [n for n in _KNEES[loss] if n not in given] or ["reduction"] * (not reducing):
        raise SpecError(
            f"{name} has no {missing[0]} by default, and is given none; give it, as in "
            f"functools.partial({name}, {missing[0]}=...)"
        )
    said = {n: _number(value, n) for n, value in given.items()}
    is_of_fvcore = str(getattr(own, "__module__", "")).startswith("fvcore.")
    if is_of_fvcore and _valid_number("beta", said.get("beta")) < _LEAST_OF_FVCORE:
        said["beta"] = 0.0
    return {"loss": loss, "reduction": resolve_reduction(**reducing), **said}


def _number(value: Any, name: str) -> Any:
    """`value`, or the number that a tensor of PyTorch's holds."""
    if not hasattr(value, "numel"):
        return value
    if value.numel() != 1:
        raise SpecError(
            f"{name} must be one number, got a tensor of shape {tuple(value.shape)}; "
            "export one loss for each"
        )
    try:
        return value.item()
    except Exception as exc:  # a FakeTensor or meta tensor
        raise SpecError(
            f"{name} is a {type(value).__name__} without a number ({exc}); give one with data"
        ) from exc
