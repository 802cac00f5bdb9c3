"""`verify` of a model with losses attached: each loss by itself, then the whole model's answers.

1. Each loss, from prediction and target to its outputs, is cut out and held against PyTorch and the
   oracle as an artefact is, on every input family (`verify_loss`).
2. The whole model runs on data, and each loss is held against both references' loss of the
   prediction that the model made in that same run.
3. Where the model is given that the losses were attached to, both run on that data, and what both
   give has to be equal in every bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx

from .._artefact import NUMBERS, ModelSource, read_model, sha256
from .._dlpack import as_array
from .._environment import environment, now
from .._floats import NUMPY_DTYPE, Array
from .._model import Loss, read_attached
from .._records import Record
from ..backends._base import get_backend
from ..backends._whole import ModelRunner, constant_operands, showing, takes
from ..errors import ArtefactError, InvalidInputError
from ..graph._attach import loss_part
from ..reference._oracle import exact_outputs, selected
from ._cases import torch_alike
from ._compare import Verdict, compare
from ._verify import Verification, _shown, verify_loss

_ROWS = 3  # of every axis whose size the model leaves open
_BETA = 0.5  # where a loss takes beta as an input


@dataclass(frozen=True, slots=True)
class Run(Record):
    """The whole model on some data.

    Attributes:
        data: what it was: `given`, or what was made up for the model's inputs.
        losses: for each output of a loss, the verdict on it beside PyTorch's loss of the very
            prediction that the model made.
        same: of each output that the model had before, whether its bits are the same; empty where
            that model was not given.
    """

    data: str
    losses: Mapping[str, Verdict]
    same: Mapping[str, bool]
    derived: ClassVar = ("ok",)

    @property
    def ok(self) -> bool:
        """Whether every loss is green, and what was there before is as it was."""
        return all(verdict.ok for verdict in self.losses.values()) and all(self.same.values())


@dataclass(frozen=True, slots=True)
class ModelVerification(Record):
    """What `verify` found of a model with losses attached. True where all of it is green.

    Attributes:
        name: of the graph.
        sha256: of the model as it was read.
        backend: what ran it.
        losses: the verification of each loss alone, by the name of its output.
        runs: of the whole model.
        environment: versions and hardware.
        date: when it was found, ISO 8601, UTC.
    """

    name: str
    sha256: str
    backend: str
    losses: Mapping[str, Verification]
    runs: tuple[Run, ...]
    environment: Mapping[str, Any]
    date: str = field(default_factory=now, compare=False)
    derived: ClassVar = ("ok",)

    def __repr__(self) -> str:
        said = ", ".join(f"{n} {'green' if v else 'red'}" for n, v in self.losses.items())
        runs = f"{sum(run.ok for run in self.runs)} of {len(self.runs)} runs of the whole green"
        return f"<ModelVerification of {self.name} on {self.backend}: {said}; {runs}>"

    _repr_html_ = _shown

    def __bool__(self) -> bool:
        return all(self.losses.values()) and all(run.ok for run in self.runs)

    @property
    def ok(self) -> bool:
        """Whether all of it is green."""
        return bool(self)


def verify_model(
    model: ModelSource,
    backend: str = "ort-cpu",
    *,
    against: ModelSource | None = None,
    data: Mapping[str, Any] | None = None,
    seed: int = 0,
    drift: bool = True,
    large: bool = False,
) -> ModelVerification:
    """Hold a model with losses attached against PyTorch, the oracle, and what it was before.

    Args:
        model: as `verify` takes it.
        backend: what runs it.
        against: the model that the losses were attached to; None compares nothing with it.
        data: an array for each input of the model; None makes some up, of both normal and large
            numbers, in the shapes that the inputs declare.
        seed: of the inputs.
        drift: as of `verify`, for each loss.
        large: likewise.

    Raises:
        ArtefactError: where nothing is attached, and where the made-up data can't be run: give
            data of the model's own then.
        UnsupportedError: when the backend can't run the model.
        MissingDependencyError: when torch or the backend is not installed.
    """
    read = read_model(model)
    found = read_attached(read)
    if not found:
        raise ArtefactError("no loss was attached to the model; attach one, or verify it as it is")
    losses = {
        loss.outputs["loss"]: verify_loss(
            loss_part(read, loss), backend, seed=seed, drift=drift, large=large
        )
        for loss in found
    }
    chosen = get_backend(backend)
    runner = ModelRunner(showing(read), chosen.open)
    before = None if against is None else ModelRunner(read_model(against), chosen.open)
    if before is not None:
        _check_comparable(before, runner)
    given = _made_up(read, seed) if data is None else [("given", data)]
    constants = constant_operands(read)
    runs = tuple(_run(runner, before, found, constants, *named) for named in given)
    digest = sha256(read.SerializeToString(deterministic=True))
    return ModelVerification(read.graph.name, digest, backend, losses, runs, environment())


def _check_comparable(before: ModelRunner, now: ModelRunner) -> None:
    """Refuse a model whose outputs could not all be compared: nothing of it would be proved.

    Raises:
        ArtefactError: where it takes or gives what the model with the losses doesn't.
    """
    for kind, old, new in (
        ("input", before.inputs, now.inputs),
        ("output", before.outputs, now.outputs),
    ):
        if lacking := [name for name in old if name not in new]:
            raise ArtefactError(
                f"the model has no {kind} {', '.join(lacking)}, which the one that it is held "
                "against has; give the model that the losses were attached to, or leave it out"
            )


def _made_up(model: onnx.ModelProto, seed: int) -> Iterator[tuple[str, dict[str, Array]]]:
    """Arrays for the inputs of a model: of usual numbers, and of some so large that losses split.

    Integers are 0, which is an index of everything.
    """
    losses = read_attached(model)
    numbers_of = {loss.inputs.get(role) for loss in losses for role in NUMBERS}
    masks = {loss.inputs.get("mask") for loss in losses}
    for data, scale in (("normal", 1.0), ("normal, a hundred times as large", 100.0)):
        random = np.random.default_rng(seed)
        arrays = {}
        for name, port in takes(model).items():
            if port.axes is None:
                raise ArtefactError(
                    f"the input {name} may have any shape; give data of the model's own"
                )
            shape = [axis if isinstance(axis, int) else _ROWS for axis in port.axes]
            numbers = random.normal(size=shape) * scale
            numbers = numbers if port.dtype in NUMPY_DTYPE else np.zeros(shape)
            if name in masks:  # a third is left out
                numbers = np.resize([0.0, 1.0, 1.0], shape)
            if name in numbers_of:
                numbers = np.full(shape, _BETA)
            arrays[name] = np.asarray(numbers).astype(port.dtype)
        yield data, arrays


def _run(
    runner: ModelRunner,
    before: ModelRunner | None,
    losses: tuple[Loss, ...],
    constants: Mapping[str, Array],
    name: str,
    data: Mapping[str, Any],
) -> Run:
    arrays = {port: as_array(array, port) for port, array in data.items()}
    try:
        outputs = runner.run(**arrays)
        old = {} if before is None else before.run(**{n: arrays[n] for n in before.inputs})
    except InvalidInputError as exc:
        if name == "given":
            raise
        raise ArtefactError(
            f"the model can't be run on what was made up for its inputs ({exc}); give data of its "
            "own"
        ) from exc
    tensors = {**constants, **arrays, **outputs}
    verdicts: dict[str, Verdict] = {}
    for loss in losses:
        verdicts |= _judged(loss, tensors)
    same = {n: _equal(array, outputs[n]) for n, array in old.items()}
    return Run(name, verdicts, same)


def _judged(loss: Loss, tensors: Mapping[str, Array]) -> dict[str, Verdict]:
    """The verdict on each output of a loss, beside the references' loss of what went in."""
    from ..reference._module import eager_outputs

    spec = loss.spec
    roles = {role: tensors[tensor] for role, tensor in loss.inputs.items()}
    if spec.runtime_beta:
        spec = spec.at(roles["beta"].reshape(spec.beta_shape))
    given = {
        role: np.asarray(roles[role], NUMPY_DTYPE.get(spec.dtype_of(role), bool), order="C")
        for role in spec.inputs
    }
    exact = exact_outputs(spec, **given)
    torch = eager_outputs(spec, **given)
    pair, alike = selected(**given), torch_alike("normal", spec)
    verdicts = {}
    for role, tensor in loss.outputs.items():
        answers, like = (tensors[tensor], torch[role], exact[role]), alike.get(role, 0)
        verdicts[tensor] = compare(spec, *answers, *pair, role, torch_alike=like)
    return verdicts


def _equal(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
