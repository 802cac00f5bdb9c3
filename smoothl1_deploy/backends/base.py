"""The protocol of a backend: `load` a model, get a runner, `run` it.

A backend module is imported only when its backend is asked for, because what it lives on may
not be installed. To add one: subclass `Runner` and `Backend` in a module of its own and enter
it in `BACKENDS`.
"""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..artefact import ModelSource, Port, Signature, read_model, select_ports, signature
from ..errors import (
    BackendUnavailableError,
    InvalidInputError,
    MissingDependencyError,
    SpecError,
    UnsupportedError,
)
from ..floats import NUMPY_DTYPE, Array
from ..graph.metadata import is_served, read_spec
from ..spec import LossSpec
from .arrays import as_array, as_beta, check_shapes, promote

__all__ = [
    "BACKENDS",
    "ENGINE_SUFFIXES",
    "PROVING",
    "REFERENCES",
    "TILE",
    "Backend",
    "Runner",
    "get_backend",
    "load",
]

#: Elements of a tile, into which `load` lets a backend cut large arrays; see bench/NOTES.md.
TILE = 1 << 17

_MOST_THREADS = 4096  # of one call, on any machine there is

#: name -> (module of this package that holds it, its class).
BACKENDS: Mapping[str, tuple[str, str]] = {
    "torch": ("torch_eager", "TorchBackend"),
    "onnx-reference": ("onnx_reference", "ReferenceBackend"),
    "ort-cpu": ("ort_cpu", "OrtCpuBackend"),
    "trt-network": ("trt_network", "TrtNetworkBackend"),
    "torch-cuda": ("torch_cuda", "TorchCudaBackend"),
    "torch-triton": ("torch_triton", "TorchTritonBackend"),
    "ort-cuda": ("ort_gpu", "OrtCudaBackend"),
    "ort-tensorrt": ("ort_tensorrt", "OrtTensorrtBackend"),
    "ort-tensorrt-rtx": ("ort_tensorrt", "OrtTensorrtRtxBackend"),
    "trt": ("trt", "TrtBackend"),
    "triton-http": ("triton", "TritonHttpBackend"),
    "triton-grpc": ("triton", "TritonGrpcBackend"),
}

#: Of files that `load` takes for TensorRT engines.
ENGINE_SUFFIXES = (".engine", ".plan")

#: Backends that are PyTorch itself: what the others are compared with.
REFERENCES = ("torch", "torch-cuda")

#: Backends that the matrix checks beside those of `BACKENDS`, and that nobody needs elsewhere.
PROVING: Mapping[str, tuple[str, str]] = {
    "ort-cpu-tiled": ("ort_cpu", "OrtTiledBackend"),  # of ort-cpu, what it does to large arrays
}


class Runner(ABC):
    """A loaded artefact.

    Attributes:
        signature: names, dtypes and shapes of the inputs and outputs.
        spec: what is computed, or None for a model of other origin.
        served: whether the graph has a server's shapes; `run` takes and gives the spec's.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.signature: Signature = signature(model)
        self.spec: LossSpec | None = read_spec(model)
        self.served = self.spec is not None and is_served(model)
        self._dtype = NUMPY_DTYPE[self.signature.input.dtype]
        self._takes_a_pair = list(self.signature.inputs) == ["input", "target"] and not self.served
        self._good_shape: tuple[int, ...] | None = None

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
        # A loop over batches of one shape, as nearly every caller's is, checks the shape once.
        if (
            type(input) is type(target) is np.ndarray
            and input.dtype is target.dtype is self._dtype
            and input.shape == target.shape == self._good_shape
            and input.flags.c_contiguous
            and target.flags.c_contiguous
            and weight is beta is grad_output is None
        ):
            return self._execute_pair(input, target)
        given = {"input": input, "target": target, "weight": weight}
        self._check_given({**given, "beta": beta, "grad_output": grad_output})
        arrays = {name: as_array(x, name) for name, x in given.items() if x is not None}
        shape = self._broadcast(arrays)
        if grad_output is not None:
            arrays["grad_output"] = as_array(grad_output, "grad_output")
            self._check_upstream(arrays["grad_output"].shape, shape)
        feeds = promote(arrays, self.signature.input.dtype)
        if beta is not None:
            feeds["beta"] = self._beta_port(as_beta(beta))
        if self._takes_a_pair and feeds["input"].shape == feeds["target"].shape:
            self._good_shape = shape
        return self._of_the_spec(self._execute(feeds, shape), shape)

    def _beta_port(self, beta: Any) -> Any:
        """beta, of rank 0, in the shape of the graph's input."""
        return beta.reshape((1,) if self.served else ())

    def _of_the_spec(self, outputs: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        """The outputs of a served graph in the shapes of its spec.

        A loss of any other shape stays as it is, for a comparison to see it.
        """
        if not self.served:
            return outputs
        wanted = self._loss_shape(shape)
        if tuple(outputs["loss"].shape) == self._served_shape(wanted):
            outputs["loss"] = outputs["loss"].reshape(wanted)
        return outputs

    def _broadcast(self, arrays: Mapping[str, Any]) -> tuple[int, ...]:
        """The shape that the arrays broadcast to; refuses what the artefact can't take."""
        shape = check_shapes(arrays, self.signature.inputs)
        if self.spec is not None and self.spec.per_sample and not shape:
            raise InvalidInputError(
                "the artefact gives one loss per sample, and input and target have no axis of "
                "samples; give them one, as in input[None]"
            )
        return shape

    def _check_upstream(self, given: tuple[int, ...], shape: tuple[int, ...]) -> None:
        """Whether `grad_output` has the shape of the loss of arrays that broadcast to `shape`."""
        expected = tuple(self._output_shape(self.signature.loss, {}, shape))
        if given != expected:
            raise InvalidInputError(
                f"grad_output has the shape {given}, and the loss {expected}; give one number for "
                "each of the loss"
            )

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

        `feeds` has an array for each role of the signature's inputs (beta: float32, rank 0, or
        [1] of a served graph; grad_output: the shape of the loss); `shape` is the one that the
        others broadcast to.
        """

    def _execute_pair(self, input: Array, target: Array) -> dict[str, Array]:
        """`_execute` for two arrays of one shape and nothing else; a place to be quick."""
        return self._execute({"input": input, "target": target}, input.shape)

    def _output_shape(self, port: Port, feeds: Mapping[str, Any], shape: tuple[int, ...]) -> Any:
        """The shape an output will have, told from the spec or, without one, from its port."""
        if port.name == "grad_input":
            return feeds["input"].shape
        if self.spec is None:
            return shape if port.shape is None or port.shape else ()
        loss = self._loss_shape(shape)
        return self._served_shape(loss) if self.served else loss

    def _loss_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        assert self.spec is not None
        if self.spec.per_sample:
            return shape[:1]
        return shape if self.spec.reduction == "none" else ()

    def _served_shape(self, loss: tuple[int, ...]) -> tuple[int, ...]:
        """A server knows no rank 0, and a batch of scores is [N, 1] to it."""
        assert self.spec is not None
        return loss if self.spec.reduction == "none" else (*loss, 1)


class Backend(ABC):
    """Something that runs artefacts.

    Attributes:
        name: its key in `BACKENDS`.
        any_rank: whether it runs an artefact exported without a shape.
        accumulator: the dtype it adds up in where an artefact asks for float64; None where it
            does not run the artefact's own operators.
        threads: for one call; 0 leaves the number to the backend. Set before `load`.
        tile: elements of the tiles that a backend may cut large arrays into; 0 to run the
            artefact's own graph at every size, which is what parity checks. Set before `load`.
        slow: what it runs on, where a million elements take it many seconds; None elsewhere.
    """

    name: str
    any_rank: bool = True
    accumulator: str | None = "float64"
    threads: int = 0
    tile: int = 0
    slow: str | None = None

    def refuses(self, spec: LossSpec) -> str | None:
        """Why this backend can't carry out `spec` faithfully; None where it can."""
        return None

    @abstractmethod
    def load(self, model: onnx.ModelProto) -> Runner:
        """Prepare `model` to be run."""

    def load_engine(self, path: Path) -> Runner:
        """Prepare a TensorRT engine to be run, where the backend runs engines."""
        raise UnsupportedError(
            f"{path} is a TensorRT engine, and the backend {self.name} runs ONNX models; "
            "use backend='trt', or give the model it was built from"
        )


def get_backend(name: str, threads: int = 0) -> Backend:
    """The backend called `name`, to use `threads` threads a call (0: as many as it thinks fit).

    Raises:
        SpecError: for an unknown name, or a number of threads that no machine has.
        MissingDependencyError: when what it lives on is not installed.
    """
    known = {**BACKENDS, **PROVING}
    if name not in known:
        raise SpecError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    if not 0 <= threads <= _MOST_THREADS:
        raise SpecError(
            f"threads must be 1 to {_MOST_THREADS}, or 0 for the default, got {threads}"
        )
    module, cls = known[name]
    backend: Backend = getattr(importlib.import_module(f".{module}", __package__), cls)()
    backend.threads = threads
    return backend


def load(
    model: ModelSource,
    backend: str = "ort-cpu",
    *,
    threads: int = 0,
    input_name: str | None = None,
    target_name: str | None = None,
    output_name: str | None = None,
) -> Runner:
    """Load an artefact into a backend.

    Args:
        model: an `onnx.ModelProto`, its bytes, or the path of a file; the backend `trt` takes an
            `.engine` file too.
        backend: one of `BACKENDS`.
        threads: for one call; 0 leaves the number to the backend (`ort-cpu`: every core this
            process may run on, 8 at most).
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
    chosen = get_backend(backend, threads)
    if backend not in PROVING:
        chosen.tile = TILE
    if isinstance(model, (str, os.PathLike)) and Path(model).suffix in ENGINE_SUFFIXES:
        return chosen.load_engine(Path(model))
    return chosen.load(select_ports(read_model(model), input_name, target_name, output_name))


def missing(name: str) -> str | None:
    """Why the backend `name` can't be used on this machine; None where it can."""
    try:
        get_backend(name)
    except (MissingDependencyError, BackendUnavailableError) as exc:
        return str(exc)
    return None
