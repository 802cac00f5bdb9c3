"""The canary: a small request with a known answer, which tells a model that works from one that
only says so. A model whose process died stays "ready" to Triton.

The answer of a loss is the oracle's; that of another ONNX model, the ONNX reference evaluator's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..artefact import check_spec, read_model, signature
from ..errors import ArtefactError, ServerError
from ..floats import NUMPY_DTYPE, Array, dtype_name, ulp_distance
from ..graph.metadata import SPEC, read_spec
from ..model import axes_of, inputs_of
from ..parity.cases import with_beta
from ..reference.oracle import oracle, oracle_gradient
from ..spec import LossSpec
from .loss_metrics import CANARY_ID
from .transport import Transport

__all__ = ["Canary", "make_canary"]

_BETA = 0.5
_ROWS = 2
_ULP = 8  # of a loss: the accuracy itself is the parity matrix's to judge
#: Of another model, as a part of its largest output: sums of any length, in any order.
_RELATIVE = {"float16": 2e-2, "bfloat16": 1e-1, "float32": 1e-3, "float64": 1e-6}


@dataclass(frozen=True, slots=True, eq=False)
class Canary:
    """A request to one version of a model, and the right answer.

    Attributes:
        exact: whether the answer is the oracle's, to be met within a few ULP.
    """

    model: str
    version: str
    inputs: Mapping[str, Array]
    expected: Mapping[str, Array]
    exact: bool

    def check(self, transport: Transport) -> None:
        """Ask, and compare.

        Raises:
            ServerError: on a wrong number, and as `Transport.infer`.
        """
        outputs = transport.infer(self.model, self.version, self.inputs, CANARY_ID)
        for name, expected in self.expected.items():
            got = outputs.get(name)
            if got is None or not self._same(got, expected):
                raise ServerError(
                    f"the canary of {self.model!r} is wrong: {name} is {_shown(got)}, and should "
                    f"be {_shown(expected)}"
                )

    def _same(self, got: Array, expected: Array) -> bool:
        # A server's shape may have an axis of size 1 more than the oracle's.
        if got.dtype != expected.dtype or got.size != expected.size:
            return False
        a, b = got.reshape(-1), expected.reshape(-1)
        if self.exact:
            return bool(np.all(ulp_distance(a, b) <= _ULP)) and not np.isnan(a).any()
        if dtype_name(a.dtype) not in _RELATIVE:
            return bool(np.array_equal(a, b))
        wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
        allowed = _RELATIVE[dtype_name(a.dtype)] * float(np.max(np.abs(wide_b), initial=0.0))
        return bool(np.all(np.abs(wide_a - wide_b) <= allowed))


def _shown(array: Array | None) -> str:
    return "missing" if array is None else f"{np.ravel(array)[:4].tolist()} {array.dtype}"


def make_canary(file: Path, model: str, version: str) -> Canary | None:
    """The canary of a model file; None where what is right can't be told.

    Args:
        file: the ONNX file that the server serves.
        model: its name on the server.
        version: the version of it.

    Raises:
        ArtefactError: when the file can't be read, or says of itself what isn't so.
    """
    graph = read_model(file)
    inputs = _inputs(graph)
    if inputs is None:
        return None
    spec = read_spec(graph)
    if spec is None:
        expected = _evaluated(graph, inputs)
        return expected and Canary(model, version, inputs, expected, False)
    ports = signature(graph)
    check_spec(ports, spec)
    roles = {role: inputs[port.name] for role, port in ports.inputs.items()}
    try:
        return Canary(model, version, inputs, _exact(spec, roles), True)
    except (TypeError, ValueError) as exc:  # of the oracle, by dtypes and by shapes
        raise ArtefactError(
            f"the model's metadata say that it computes {spec.to_dict()}, and its inputs don't fit "
            f"that ({exc}); delete its entry {SPEC}, or export the loss again"
        ) from exc


def _exact(spec: LossSpec, inputs: Mapping[str, Array]) -> dict[str, Array]:
    number = with_beta(spec, _BETA) if spec.runtime_beta else spec
    arrays = inputs["input"], inputs["target"], inputs.get("weight")
    expected = {"loss": oracle(number, *arrays)}
    if spec.gradient:
        expected["grad_input"] = oracle_gradient(number, *arrays)
    return expected


def _evaluated(graph: onnx.ModelProto, inputs: Mapping[str, Array]) -> Any:
    from onnx.reference import ReferenceEvaluator

    try:
        values = ReferenceEvaluator(graph).run(None, dict(inputs))
    except Exception:  # an operator that it doesn't have, in as many classes as operators
        return None
    names = [value.name for value in graph.graph.output]
    return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}


def _inputs(model: onnx.ModelProto) -> dict[str, Array] | None:
    """Numbers on either side of beta = 1, the same each time; None for a type that has none."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Array] = {}
    for value in inputs_of(model):
        try:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        except KeyError:
            return None
        shape = [dim if isinstance(dim, int) else _ROWS for dim in axes_of(value) or ()]
        numbers = rng.normal(size=shape) * 2
        if value.name in ("weight", "beta"):
            numbers = np.full(shape, _BETA)
        if dtype_name(dtype) not in NUMPY_DTYPE:
            numbers = np.ones(shape)
        arrays[value.name] = numbers.astype(dtype)
    return arrays
