"""What is tried: a loss behind the protocol of a backend, and how arrays are handed to it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from .._dlpack import as_array
from .._floats import Array
from ..backends._base import Backend
from ..backends._runner import Runner
from ..errors import UnsupportedError
from ..parity._cases import CaseResult, Judged, References
from ..parity._compare import Verdict
from ..parity._matrix import _checked
from ._losses import Loss

#: How an array is handed over: the same numbers, lying otherwise or locked.
Handing = Callable[[Array], Array]


class LossRunner(Runner):
    """A loss for one spec; what it is given is what it gets, strided or read-only."""

    def __init__(self, model: onnx.ModelProto, loss: Loss) -> None:
        super().__init__(model)
        self._loss = loss

    def run(self, input: Any, target: Any, **given: Any) -> dict[str, Array]:
        """The loss of two arrays of the spec's dtype.

        Raises:
            UnsupportedError: for whatever the loss raises, and for an answer that is no array.
        """
        return self._execute({"input": input, "target": target}, ())

    def _execute(self, feeds: dict[str, Array], shape: tuple[int, ...]) -> dict[str, Array]:
        assert self.spec is not None
        asked = {"beta": self.spec.beta, "reduction": self.spec.reduction}
        try:
            return {"loss": as_array(self._loss(*feeds.values(), **asked), "the answer")}
        except Exception as exc:  # anyone's code
            said = (str(exc).strip() or "no message").splitlines()[0]
            raise UnsupportedError(f"{type(exc).__name__}: {said}") from exc


class LossBackend(Backend):
    """A loss as a backend, which computes what an artefact says it computes."""

    name = "loss"
    accumulator = None
    of_the_spec = True

    def __init__(self, loss: Loss) -> None:
        self._loss = loss

    def load(self, model: onnx.ModelProto) -> Runner:
        """The loss, for the spec that `model` carries."""
        return LossRunner(model, self._loss)


def as_it_is(array: Array) -> Array:
    """The array itself."""
    return array


def read_only(array: Array) -> Array:
    """One that can't be written to, as one that was mapped from a file or shared by a server."""
    locked = array.copy()
    locked.flags.writeable = False
    return locked


def strided(array: Array) -> Array:
    """Every second element of the last axis of a larger array, as a slice of a batch is."""
    if not array.ndim:
        return array
    larger = np.full((*array.shape[:-1], 2 * array.shape[-1]), np.nan, array.dtype)
    larger[..., ::2] = array
    return larger[..., ::2]


@contextlib.contextmanager
def on_one_core() -> Iterator[None]:
    """Keep this thread and what it starts on one core, and PyTorch on one thread."""
    import torch

    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def tried(
    load: Callable[[], Runner], backend: Backend, refs: References, handing: Handing
) -> CaseResult:
    """The verdict on one case; a loss that has changed what it was given is wrong."""
    handed = replace(refs, input=handing(refs.input), target=handing(refs.target))
    before = handed.input.tobytes(), handed.target.tobytes()
    result = _checked(load, backend, handed)
    if before != (handed.input.tobytes(), handed.target.tobytes()):
        verdict = Verdict.failed(refs.oracle["loss"].size, "it wrote into what it was given")
        return CaseResult.of(refs, {"loss": Judged(verdict, None)})
    return result
