"""`Runner`: a loaded artefact, which checks what it is given before a backend computes.

Arrays are promoted as PyTorch promotes, and have shapes that fit, or are refused.
"""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import onnx

from .._artefact import NUMBERS, ROLES, Signature, signature
from .._dlpack import as_array
from .._floats import NUMPY_DTYPE, Array
from .._model import Port
from .._spec import ELEMENTS, LossSpec
from ..errors import ArtefactError, InvalidInputError, SpecError, UnsupportedError
from ..graph._metadata import is_changed, is_served, read_spec

#: Combinations of shapes and dtypes that were found right, or prepared for.
REMEMBERED = 256


def promote(arrays: dict[str, Array], dtype: str) -> dict[str, Array]:
    """All arrays in the artefact's dtype, where PyTorch's promotion has that result.

    Raises:
        InvalidInputError: as `check_promotion` does.
    """
    check_promotion({name: str(array.dtype) for name, array in arrays.items()}, dtype)
    return _converted(arrays, dtype)


def _converted(arrays: dict[str, Array], dtype: str) -> dict[str, Array]:
    wanted = NUMPY_DTYPE[dtype]
    with np.errstate(all="ignore"):  # 70000 is inf in float16, in PyTorch without a word
        return {
            name: array if name == "mask" else array.astype(wanted, copy=False)
            for name, array in arrays.items()
        }


def check_promotion(given: Mapping[str, str], dtype: str) -> None:
    """Hold the dtypes given (by name, for each input) against the artefact's.

    ================  ================  =======================================
    input             target            result
    ================  ================  =======================================
    dtype             dtype             as they are
    dtype             integer or bool   the integers become dtype (and reversed)
    dtype             narrower float    the narrower becomes dtype (and reversed)
    anything else                       refused
    ================  ================  =======================================

    float16 beside bfloat16 promotes to float32; a weight counts like a target. A mask is boolean
    and promotes nothing. Source: `torch.promote_types`; the rank of the arrays plays no part, as
    after the explicit broadcast in `torch.nn.functional`.

    Raises:
        InvalidInputError: where the result would be another dtype.
    """
    if given.get("mask", "bool") != "bool":
        raise InvalidInputError(
            f"mask has the dtype {given['mask']}; give booleans that select, as in mask != 0, or "
            "numbers to multiply with as the weight of another artefact"
        )
    given = {name: each for name, each in given.items() if name != "mask"}
    for name, each in given.items():
        if each not in NUMPY_DTYPE and not re.fullmatch(r"bool|u?int(8|16|32|64)", each):
            raise InvalidInputError(
                f"{name} has the dtype {each}, which is not a number format of a loss"
            )
    floats = {each for each in given.values() if each in NUMPY_DTYPE}
    if floats.isdisjoint((given["input"], given["target"])):
        raise InvalidInputError(
            f"input and target are both integral ({given['input']}, "
            f"{given['target']}); PyTorch refuses that too. Convert one of them to {dtype}"
        )
    result = max(floats, key=lambda name: NUMPY_DTYPE[name].itemsize)
    if {"float16", "bfloat16"} <= floats and NUMPY_DTYPE[result].itemsize == 2:
        result = "float32"
    if result != dtype:
        listed = " and ".join(f"{name} {each}" for name, each in given.items())
        raise InvalidInputError(
            f"{listed} promote to {result}, but the artefact is {dtype}; convert them, or export "
            f"in {result}"
        )


def as_number(
    value: Any, name: str = "beta", dtype: str = "float32", shape: tuple[int, ...] = ()
) -> Array:
    """A run-time beta, or a divisor, as the number of rank 0 or the array that artefacts take.

    Raises:
        InvalidInputError: for anything but one number, or an array of that shape.
    """
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError("a string")
        with np.errstate(over="ignore"):
            if not shape:
                return np.asarray(float(value), dtype)
            listed = isinstance(value, (list, tuple))
            found = as_array(np.asarray(value) if listed else value, name).astype(dtype)
    except Exception as exc:  # the caller's `__float__`, a tensor's without a number among them
        wanted = f"an array of the shape {shape}" if shape else "one number"
        raise InvalidInputError(f"{name} must be {wanted}, got {value!r} ({exc})") from exc
    if found.shape != shape:
        raise InvalidInputError(
            f"{name} has the shape {found.shape}, and the artefact takes {shape}; give an array of "
            "that shape"
        )
    return found


def by_role(*given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays and the numbers of what was given in the order of `ROLES`, None left out."""
    known = {role: value for role, value in zip(ROLES, given, strict=True) if value is not None}
    numbers = {role: known.pop(role) for role in NUMBERS if role in known}
    return known, numbers


def check_shapes(arrays: Mapping[str, Any], ports: Mapping[str, Port]) -> tuple[int, ...]:
    """The broadcast shape of all arrays (or tensors), after each was held against its port.

    Raises:
        InvalidInputError: on a rank, a fixed axis or a repeated axis name that doesn't fit.
    """
    sizes: dict[str, int] = {}
    shapes = {key: tuple(array.shape) for key, array in arrays.items()}
    for key, shape in shapes.items():
        port = ports[key]
        if port.shape is None:
            continue
        fits = len(port.shape) == len(shape)
        for dim, size in zip(port.shape, shape, strict=False):
            fits &= (sizes.setdefault(dim, size) if isinstance(dim, str) else dim) == size
        if not fits:
            known = {name: size for name, size in sizes.items() if name in port.shape}
            where = f" where {', '.join(f'{k} is {v}' for k, v in known.items())}" if known else ""
            raise InvalidInputError(
                f"{key} has the shape {shape}, but the artefact takes "
                f"({', '.join(map(str, port.shape))}){where}; reshape it, or export with another "
                "shape (a target that broadcasts has one of its own)"
            )
    try:
        return np.broadcast_shapes(*shapes.values())
    except ValueError:
        given = " and ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise InvalidInputError(f"{given} can't be broadcast to one shape") from None


def check_interpreter() -> None:
    """Refuse to run in a `__del__` that comes when numpy can't import its parts any more.

    Raises:
        UnsupportedError: it says when to run instead.
    """
    if sys.meta_path is None:
        raise UnsupportedError(
            "the interpreter has shut down and imports nothing any more; run the artefact before, "
            "in a function given to atexit.register for instance"
        )


def not_picklable(loaded: object) -> NoReturn:
    """The `__reduce__` of what is loaded: it refuses to be pickled or copied.

    Raises:
        UnsupportedError: always; it says what to do instead.
    """
    raise UnsupportedError(
        "a loaded artefact holds sessions and memory of its process, so it can't be pickled or "
        "copied; send the model (its path or its bytes), and load() it in each process"
    )


class Runner(ABC):
    """A loaded artefact.

    Attributes:
        signature: names, dtypes and shapes of the inputs and outputs.
        spec: what is computed, or None for a model of other origin.
        exported: whether the graph is the one that this package exported for that spec: nothing
            else has changed it, and what is known of such graphs holds.
        served: whether the graph has a server's shapes; `run` takes and gives the spec's.

    >>> from smoothl1_deploy import export, load
    >>> runner = load(export(LossSpec(0.5), shape=("N", 4)), "onnx-reference")
    >>> str(runner.signature.input), runner.spec == LossSpec(0.5)
    ('input: float32[N,4]', True)
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.signature: Signature = signature(model)
        self.spec: LossSpec | None = read_spec(model)
        self.exported = self.spec is not None and not is_changed(model)
        self.served = self.spec is not None and is_served(model)
        self._dtype = NUMPY_DTYPE[self.signature.input.dtype]
        self._number_shape = (1,) if self.served else ()
        self._takes_a_pair = list(self.signature.inputs) == ["input", "target"] and not self.served
        self._good_shape: tuple[int, ...] | None = None
        self._shapes: dict[Any, tuple[int, ...]] = {}

    def __repr__(self) -> str:
        ports = ", ".join(map(str, self.signature.inputs.values()))
        outputs = ", ".join(map(str, self.signature.outputs))
        return f"<{type(self).__name__}: {ports} -> {outputs}>"

    def run(
        self,
        input: Any,
        target: Any,
        *,
        weight: Any = None,
        mask: Any = None,
        beta: Any = None,
        divisor: float | None = None,
        grad_output: Any = None,
    ) -> dict[str, Array]:
        """The loss of `input` and `target`.

        Args:
            input: a numpy array (ml_dtypes for bfloat16) or anything with `__dlpack__`, of the
                artefact's dtype, or of one that promotes to it.
            target: another such array; it broadcasts with `input` where the artefact's shapes
                allow it.
            weight: a third, where the artefact takes one.
            mask: an array of booleans, likewise: true where an element counts.
            beta: a number, or an array of the spec's shape, where the artefact takes one
                (`runtime_beta`); it is rounded to float32. A negative or NaN beta gives NaN.
            divisor: a number, where the artefact takes one; rounded to float32 likewise, but for
                float64.
            grad_output: an array in the shape of the loss, where the artefact takes one
                (`upstream`).

        Returns:
            `{"loss": array}` in the artefact's dtype: the broadcast shape for `none`, rank 0
            for `mean` and `sum`, [N] per sample; and where the artefact has them `"grad_input"`, in
            the shape of `input`, and `"losses"` or `"differences"`, in the broadcast shape.

        Raises:
            InvalidInputError: on arrays that don't fit; the message says what would.
            UnsupportedError: in a `__del__` that runs when the interpreter has shut down.
        """
        check_interpreter()
        if weight is mask is beta is divisor is grad_output is None:
            found = self._at_once(input, target)
            if found is not None:
                return found
        return self._checked(*by_role(input, target, weight, mask, beta, divisor, grad_output))

    def _at_once(self, input: Any, target: Any) -> dict[str, Any] | None:
        """The answer to arrays of the shape that was right before; None for any other.

        A loop over batches of one shape, as nearly every caller's is, checks the shape once.
        """
        if (
            type(input) is type(target) is np.ndarray
            and input.dtype is target.dtype is self._dtype
            and input.shape == target.shape == self._good_shape
            and input.flags.c_contiguous
            and target.flags.c_contiguous
        ):
            return self._execute({"input": input, "target": target}, input.shape)
        return None

    def _checked(self, given: dict[str, Any], numbers: dict[str, Any]) -> dict[str, Any]:
        """The answer to what was given by role, arrays and numbers, after it was checked."""
        arrays = {name: as_array(x, name) for name, x in given.items()}
        shape = self._checked_shape(arrays, numbers)
        feeds = _converted(arrays, self.signature.input.dtype)
        feeds |= {name: self._number(name, value) for name, value in numbers.items()}
        if self._takes_a_pair and feeds["input"].shape == feeds["target"].shape:
            self._good_shape = shape
        return self._of_the_spec(self._execute(feeds, shape), shape)

    def _checked_shape(self, arrays: dict[str, Any], numbers: dict[str, Any]) -> tuple[int, ...]:
        """The shape that arrays (or tensors) broadcast to, after all was checked.

        A small call must not take longer to check than to run: what was right once is so again.
        """
        key = *numbers, *((name, x.shape, x.dtype) for name, x in arrays.items())
        shape = self._shapes.get(key)
        if shape is None:
            self._check_given({*arrays, *numbers})
            shape = self._broadcast(arrays)
            dtypes = {name: str(x.dtype).removeprefix("torch.") for name, x in arrays.items()}
            check_promotion(dtypes, self.signature.input.dtype)
            if len(self._shapes) >= REMEMBERED:
                self._shapes.clear()
            self._shapes[key] = shape
        return shape

    def _number(self, name: str, value: Any) -> Array:
        """A run-time beta, or a divisor, as the graph takes it."""
        shape = self.spec.beta_shape if self.spec and name == "beta" else ()
        number = as_number(value, name, self.signature.inputs[name].dtype, shape)
        return number.reshape(shape or self._number_shape)

    __reduce__ = not_picklable

    def _of_the_spec(self, outputs: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        """The outputs of a served graph in the shapes of its spec.

        A loss of any other shape stays as it is, for a comparison to see it.
        """
        if not self.served:
            return outputs
        assert self.spec is not None
        port = self.signature.loss
        if tuple(outputs[port.name].shape) == self._output_shape(port, {}, shape):
            outputs[port.name] = outputs[port.name].reshape(self.spec.loss_shape(shape))
        return outputs

    def _check_exported(self, backend: str, instead: str) -> None:
        """Refuse a model whose graph need not be what its spec says.

        Raises:
            ArtefactError: for a model of other origin, and for one that was changed since.
        """
        if self.exported:
            return
        why = "this model carries none"
        if self.spec is not None:
            why = "this model was changed since it was exported: its graph may compute another loss"
        raise ArtefactError(
            f"the {backend} backend computes what an artefact's spec says, and {why}; use a "
            f"backend that runs the graph, such as {instead}"
        )

    def _broadcast(self, arrays: Mapping[str, Any]) -> tuple[int, ...]:
        """The shape of the element losses of arrays (or tensors).

        Raises:
            InvalidInputError: on shapes that the artefact can't take.
        """
        operands = {name: array for name, array in arrays.items() if name != "grad_output"}
        shape = check_shapes(operands, self.signature.inputs)
        try:
            if self.spec is not None:
                shape = self.spec.broadcast_with_betas(shape)
                self.spec.loss_shape(shape)
        except SpecError as exc:
            raise InvalidInputError(str(exc)) from exc
        if self.spec is not None and self.spec.per_sample and not shape:
            raise InvalidInputError(
                "the artefact gives one loss per sample, and input and target have no axis of "
                "samples; give them one"
            )
        if "grad_output" in arrays:
            given = tuple(arrays["grad_output"].shape)
            expected = tuple(self._output_shape(self.signature.loss, {}, shape))
            if given != expected:
                raise InvalidInputError(
                    f"grad_output has the shape {given}, and the loss {expected}; give one number "
                    "for each of the loss"
                )
        return shape

    def _check_given(self, known: set[str]) -> None:
        takes = ", ".join(self.signature.inputs)
        for name in ROLES:
            if name in self.signature.inputs and name not in known:
                raise InvalidInputError(f"{name} is missing; the artefact takes {takes}")
            if name in known and name not in self.signature.inputs:
                raise InvalidInputError(f"the artefact takes {takes}, and no {name}; leave it out")

    @abstractmethod
    def _execute(self, feeds: dict[str, Array], shape: tuple[int, ...]) -> dict[str, Array]:
        """Compute on checked, contiguous arrays of the artefact's dtype.

        `feeds` has an array for each role of the signature's inputs (beta: rank 0, or [1] of a
        served graph; grad_output: the shape of the loss); `shape` is the one that the
        others broadcast to.
        """

    def _output_shape(self, port: Port, feeds: Mapping[str, Any], shape: tuple[int, ...]) -> Any:
        """The shape an output will have, told from the spec or, without one, from its port."""
        if port.name == "grad_input":
            return feeds["input"].shape
        if port.name in ELEMENTS:
            return shape
        if self.spec is None:
            return shape if port.shape is None else shape[: len(port.shape)]
        loss = self.spec.loss_shape(shape)
        # A server knows no rank 0, and a batch of scores is [N, 1] to it.
        is_narrow = len(loss) < 2 and self.spec.reduction != "none"
        return (*loss, 1) if self.served and is_narrow else loss

    def _named(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """What was given by role, by the names of the graph's inputs."""
        return {self.signature.inputs[role].name: value for role, value in feeds.items()}
