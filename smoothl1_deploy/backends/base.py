"""The protocol of a backend: `load` a model, get a runner, `run` it.

A backend module is imported only when its backend is asked for, because what it lives on may
not be installed. To add one: subclass `Runner` and `Backend` in a module of its own and enter
it in `BACKENDS`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import onnx

from ..artefact import ModelSource, Port, Signature, read_model, select_ports, signature
from ..errors import (
    BackendUnavailableError,
    InvalidInputError,
    MissingDependencyError,
    SpecError,
)
from ..floats import Array
from ..graph.metadata import read_spec
from ..spec import LossSpec
from .arrays import as_array, as_beta, check_shapes, promote

__all__ = ["BACKENDS", "Backend", "Runner", "get_backend", "load"]

#: name -> (module of this package that holds it, its class).
BACKENDS: Mapping[str, tuple[str, str]] = {
    "torch": ("torch_eager", "TorchBackend"),
    "onnx-reference": ("onnx_reference", "ReferenceBackend"),
    "ort-cpu": ("ort_cpu", "OrtCpuBackend"),
    "trt-network": ("trt_network", "TrtNetworkBackend"),
}


class Runner(ABC):
    """A loaded artefact.

    Attributes:
        signature: names, dtypes and shapes of the inputs and outputs.
        spec: what is computed, or None for a model of other origin.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.signature: Signature = signature(model)
        self.spec: LossSpec | None = read_spec(model)

    def run(
        self,
        input: Any,
        target: Any,
        *,
        weight: Any = None,
        beta: float | None = None,
        grad_output: Any = None,
    ) -> dict[str, Array]:
        """The loss of `input` and `target`.

        Args:
            input: a numpy array (ml_dtypes for bfloat16) or anything with `__dlpack__`, of the
                artefact's dtype, or of one that promotes to it.
            target: likewise; it broadcasts with `input` where the artefact's shapes allow it.
            weight: likewise, where the artefact takes one.
            beta: a number, where the artefact takes one (`runtime_beta`); it is rounded to
                float32. A negative or NaN beta gives NaN.
            grad_output: an array in the shape of the loss, where the artefact takes one
                (`upstream`).

        Returns:
            `{"loss": array}` in the artefact's dtype: the broadcast shape for `none`, rank 0
            for `mean` and `sum`, [N] per sample; and `"grad_input"`, in the shape of `input`,
            where the artefact has it.

        Raises:
            InvalidInputError: on arrays that don't fit; the message says what would.
        """
        given = {"input": input, "target": target, "weight": weight}
        self._check_given({**given, "beta": beta, "grad_output": grad_output})
        arrays = {name: as_array(x, name) for name, x in given.items() if x is not None}
        shape = check_shapes(arrays, self.signature.inputs)
        if self.spec is not None and self.spec.per_sample and not shape:
            raise InvalidInputError(
                "the artefact gives one loss per sample, and input and target have no axis of "
                "samples; give them one, as in input[None]"
            )
        if grad_output is not None:
            arrays["grad_output"] = self._upstream(grad_output, arrays, shape)
        feeds = promote(arrays, self.signature.input.dtype)
        if beta is not None:
            feeds["beta"] = as_beta(beta)
        return self._execute(feeds, shape)

    def _upstream(
        self, grad_output: Any, arrays: dict[str, Array], shape: tuple[int, ...]
    ) -> Array:
        array = as_array(grad_output, "grad_output")
        expected = self._output_shape(self.signature.loss, arrays, shape)
        if array.shape != tuple(expected):
            raise InvalidInputError(
                f"grad_output has the shape {array.shape}, and the loss {tuple(expected)}; give "
                "one number for each of the loss"
            )
        return array

    def _check_given(self, given: Mapping[str, Any]) -> None:
        for name, value in given.items():
            if (value is not None) == (name in self.signature.inputs):
                continue
            takes = ", ".join(self.signature.inputs)
            if value is None:
                raise InvalidInputError(f"{name} is missing; the artefact takes {takes}")
            raise InvalidInputError(f"the artefact takes {takes}, and no {name}; leave it out")

    @abstractmethod
    def _execute(self, feeds: dict[str, Array], shape: tuple[int, ...]) -> dict[str, Array]:
        """Compute on checked, contiguous arrays of the artefact's dtype.

        `feeds` has an array for each role of the signature's inputs (beta: float32, rank 0;
        grad_output: the shape of the loss);
        `shape` is the one that they broadcast to.
        """

    def _output_shape(self, port: Port, feeds: dict[str, Array], shape: tuple[int, ...]) -> Any:
        """The shape an output will have, told from the spec or, without one, from its port."""
        if port.name == "grad_input":
            return feeds["input"].shape
        if self.spec is None:
            return shape if port.shape is None or port.shape else ()
        if self.spec.per_sample:
            return shape[:1]
        return shape if self.spec.reduction == "none" else ()


class Backend(ABC):
    """Something that runs artefacts.

    Attributes:
        name: its key in `BACKENDS`.
        any_rank: whether it runs an artefact exported without a shape.
        has_float64: whether its accumulators are float64, as the artefacts ask for.
        threads: for the operators of one call; 0 means every core. Set before `load`.
    """

    name: str
    any_rank: bool = True
    has_float64: bool = True
    threads: int = 0

    def refuses(self, spec: LossSpec) -> str | None:
        """Why this backend can't carry out `spec` faithfully; None where it can."""
        return None

    @abstractmethod
    def load(self, model: onnx.ModelProto) -> Runner:
        """Prepare `model` to be run."""


def get_backend(name: str, threads: int = 0) -> Backend:
    """The backend called `name`, to use `threads` cores a call (0: all).

    Raises:
        SpecError: for an unknown name.
        MissingDependencyError: when what it lives on is not installed.
    """
    if name not in BACKENDS:
        raise SpecError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    module, cls = BACKENDS[name]
    backend: Backend = getattr(importlib.import_module(f".{module}", __package__), cls)()
    backend.threads = threads
    return backend


def load(
    model: ModelSource,
    backend: str = "ort-cpu",
    *,
    input_name: str | None = None,
    target_name: str | None = None,
    output_name: str | None = None,
) -> Runner:
    """Load an artefact into a backend.

    Args:
        model: an `onnx.ModelProto`, its bytes, or the path of a file.
        backend: one of `BACKENDS`.
        input_name: of the graph input to feed `input` to, in a model of other origin; by
            default the one called so, or the first of two.
        target_name: likewise.
        output_name: of the loss, where the model has several outputs and none is called `loss`.

    Raises:
        ArtefactError: when `model` is no loss artefact.
        SpecError: for an unknown backend.
        MissingDependencyError: when the backend's packages are not installed.
        UnsupportedError: when the backend can't run the model.
    """
    chosen = get_backend(backend)
    return chosen.load(select_ports(read_model(model), input_name, target_name, output_name))


def missing(name: str) -> str | None:
    """Why the backend `name` can't be used on this machine; None where it can."""
    try:
        get_backend(name)
    except (MissingDependencyError, BackendUnavailableError) as exc:
        return str(exc)
    return None
