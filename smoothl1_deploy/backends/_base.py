"""The protocol of a backend: `load` a model to get a `Runner`, and `run` that.

A backend module is imported only when its backend is asked for, because what it lives on may
not be installed. To add one: subclass `Runner` and `Backend` in a module of its own and enter
it in `_names.BACKENDS`. One of somebody else's needs no entry: it is called `module:Class`, or by
the name that its package gives it in an entry point of the group `smoothl1_deploy.backends`.
"""

from __future__ import annotations

import importlib
import os
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import onnx

from .._artefact import ModelSource, read_model, select_ports
from .._model import read_attached
from .._spec import LossSpec
from ..errors import (
    BackendUnavailableError,
    MissingDependencyError,
    SpecError,
    UnsupportedError,
)
from ..graph._metadata import warn_if_changed
from ._names import BACKENDS, others
from ._runner import Runner
from ._whole import ModelRunner, Session

_MOST_THREADS = 4096  # more than any machine has

#: The suffixes of files that `load` takes for TensorRT engines.
ENGINE_SUFFIXES = (".engine", ".plan")


class Backend(ABC):
    """Something that runs artefacts.

    Attributes:
        name: what it is asked for by: its key in `BACKENDS`, or `module:Class`.
        any_rank: whether it runs an artefact exported without a shape.
        accumulator: the dtype it adds up in where an artefact asks for float64; None where it
            does not run the artefact's own operators.
        of_the_spec: whether it computes what an artefact says it computes, and not its graph.
        over_the_wire: whether each artefact takes a process, and half a second.
        layouts: those of the matrix that it is fed, where an artefact for the axes of another
            takes long; None for every one.
        large: whether it can be fed 2^24 elements without taking minutes or gigabytes.
        threads: how many a call uses; 0 leaves the number to the backend. Set before `load`.
        slow: what it runs on, where a million elements take it many seconds; None elsewhere.

    >>> from smoothl1_deploy import LossSpec, export
    >>> from smoothl1_deploy.backends import get_backend
    >>> backend = get_backend("onnx-reference")
    >>> backend.refuses(LossSpec()), backend.load(export(LossSpec())).spec == LossSpec()
    (None, True)
    """

    name: str
    any_rank: bool = True
    accumulator: str | None = "float64"
    of_the_spec: bool = False
    over_the_wire: bool = False
    layouts: tuple[str, ...] | None = None
    large: bool = True
    threads: int = 0
    slow: str | None = None

    def refuses(self, spec: LossSpec) -> str | None:
        """Why this backend can't carry out `spec` faithfully; None where it can."""
        return None

    @abstractmethod
    def load(self, model: onnx.ModelProto) -> Runner:
        """Prepare `model` to be run."""

    def load_body(self, model: onnx.ModelProto) -> Runner | None:
        """What runs the nodes of `model` by the bodies that it carries.

        None where the runner of `load` does.
        """
        return None

    def open(self, model: onnx.ModelProto) -> Session:
        """Prepare the whole of a model, whatever else it computes, to be run by its own names."""
        raise UnsupportedError(
            f"the backend {self.name} runs losses alone, and not the model that one is attached "
            "to; use the backend ort-cpu"
        )

    def load_engine(self, path: Path) -> Runner | ModelRunner:
        """Prepare a TensorRT engine to be run, where the backend runs engines."""
        raise UnsupportedError(
            f"{path} is a TensorRT engine, and the backend {self.name} runs ONNX models; "
            "use the backend trt, or give the model it was built from"
        )


class OfTensorrt(Backend):
    """What the backends share in which TensorRT reads the model."""

    any_rank = False
    accumulator = "float32"

    def refuses(self, spec: LossSpec) -> str | None:
        """Refuse float64, which TensorRT doesn't have."""
        told = "TensorRT has no float64; its parser would narrow the loss to float32"
        return told if spec.dtype == "float64" else None


def imported(name: str, what: str, as_told: str) -> Any:
    """What stands at `module:name`, the module one that Python finds from the current folder.

    Args:
        name: as the user wrote it, or as the entry point of another package says.
        what: it is, for a message.
        as_told: how it is written: `module:Class`.

    Raises:
        SpecError: where it isn't there.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script looks in its own folder instead
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as exc:
        raise SpecError(
            f"there is no {what} {name!r} ({exc}); give {as_told}, the module one that Python "
            "finds from the current folder"
        ) from exc


def backend_class(name: str) -> type[Backend]:
    """The class of a backend, which tells what it is like without anything it needs.

    Raises:
        SpecError: for an unknown name, and for a `module:Class` that isn't there or no backend.
    """
    if name in BACKENDS:
        module, cls = BACKENDS[name]
        known: type[Backend] = getattr(importlib.import_module(f".{module}", __package__), cls)
        return known
    place = name
    if ":" not in name:
        theirs = others()
        if name not in theirs:
            raise SpecError(
                f"unknown backend {name!r}; choose one of {', '.join([*BACKENDS, *theirs])}, or "
                "give one of your own as module:Class"
            )
        place = theirs[name]
    found = imported(place, "backend", "module:Class")
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise SpecError(
            f"{name!r} is no backend; subclass smoothl1_deploy.backends.Backend, as CONTRIBUTING "
            "says"
        )
    return found


def get_backend(name: str, threads: int = 0) -> Backend:
    """The backend called `name`, to use `threads` threads a call (0: as many as it thinks fit).

    Args:
        name: one of `BACKENDS`, one that another package adds, or `module:Class` of anyone's own.
        threads: of each call.

    Raises:
        SpecError: for an unknown name, or a number of threads that no machine has.
        MissingDependencyError: when what it lives on is not installed.

    >>> get_backend("onnx-reference").refuses(LossSpec()) is None
    True
    """
    cls = backend_class(name)
    if not 0 <= threads <= _MOST_THREADS:
        raise SpecError(
            f"threads must be 1 to {_MOST_THREADS}, or 0 for the default, got {threads}"
        )
    backend = cls()
    backend.name, backend.threads = name, threads
    return backend


def load(
    model: ModelSource,
    backend: str = "ort-cpu",
    *,
    threads: int = 0,
    input_name: str | None = None,
    target_name: str | None = None,
    output_name: str | None = None,
) -> Any:
    """Load an artefact into a backend.

    One that something else has changed since it was exported runs as it is, with a
    `ModelWarning`.

    Args:
        model: an `onnx.ModelProto`, its bytes, or the path of a file; the backend `trt` takes an
            `.engine` file too.
        backend: one of `BACKENDS`.
        threads: how many a call uses; 0 leaves it to the backend (`ort-cpu`: every core this
            process may run on, 8 at most).
        input_name: the graph input to feed `input` to, in a model of other origin; by default the
            one called so, or the first of two.
        target_name: the graph input to feed `target` to, likewise.
        output_name: the output that is the loss, where the model has several and none is called
            `loss`.

    Returns:
        A `Runner`, whose `run` takes input and target. Of a model with losses attached, where no
        names are given, a `ModelRunner`, whose `run` takes every input by its own name and gives
        every output.

    Raises:
        ArtefactError: when `model` is no loss artefact.
        SpecError: for an unknown backend.
        MissingDependencyError: when the backend's packages are not installed.
        UnsupportedError: when the backend can't run the model.

    >>> import numpy
    >>> from smoothl1_deploy import export
    >>> runner = load(export(LossSpec(0.5)), "onnx-reference")
    >>> float(runner.run(numpy.ones(3, "float32"), numpy.zeros(3, "float32"))["loss"])
    0.75
    """
    chosen = get_backend(backend, threads)
    if isinstance(model, (str, os.PathLike)) and Path(model).suffix in ENGINE_SUFFIXES:
        return chosen.load_engine(Path(model))
    read = read_model(model)
    warn_if_changed(read)
    named = (input_name, target_name, output_name)
    if read_attached(read) and named == (None, None, None):
        return ModelRunner(read, chosen.open)
    return chosen.load(select_ports(read, *named))


def missing(name: str) -> str | None:
    """Why the backend `name` can't be used on this machine; None where it can."""
    try:
        get_backend(name)
    except (MissingDependencyError, BackendUnavailableError) as exc:
        return str(exc)
    return None
