"""Which branch |d| = beta takes, read off a graph's own conditions.

`<=` for `<` changes no value where the two formulas meet, so no answer shows it. A graph that
chooses by a condition (`Where`) tells: ONNX's evaluator computes the condition one step below
beta, at beta, and one above.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from ...artefact import Signature
from ...floats import NUMPY_DTYPE
from ...model import inlined
from ...spec import LossSpec
from ..shapes import ShapePlan, elements
from .names import Diagnosis, Evidence, Fault

__all__ = ["choice_at_beta"]

_MOST = 1 << 16  # elements: the evaluator is slow, and fixed shapes may be large


def choice_at_beta(
    model: onnx.ModelProto, signature: Signature, spec: LossSpec
) -> Diagnosis | None:
    """`<= for <`, where the graph sends |d| = beta to the branch of smaller differences.

    Args:
        model: with its inputs in the order input, target.
        signature: of it.
        spec: what it ought to compute.

    Returns:
        None where the comparison is right, and where nothing can be read: no `Where`, a beta that
        the dtype doesn't hold, other inputs, an operator that ONNX's evaluator lacks.
    """
    beta, dtype = spec.effective_beta, NUMPY_DTYPE[spec.dtype]
    shapes = ShapePlan.of(signature).small()
    held = 0 < beta < math.inf and float(np.asarray(beta).astype(dtype)) == beta
    if not held or set(signature.inputs) != {"input", "target"}:
        return None
    if not 0 < elements(shapes) <= _MOST:
        return None
    knee = np.asarray(beta, dtype)
    below, above = (np.nextafter(knee, np.asarray(end, dtype)) for end in (0, np.inf))
    steps = []
    for d in (below, knee, above):
        feeds = {
            signature.input.name: np.full(shapes[0], d, dtype),
            signature.target.name: np.zeros(shapes[1], dtype),
        }
        steps.append(feeds)
    try:
        chosen = list(_conditions(model, steps))
    except Exception:  # whatever an evaluator dies of, it says nothing about the comparison
        return None
    if not any(low == at != high for low, at, high in chosen):
        return None
    value = 0.5 * beta
    return Diagnosis(
        Fault.LESS_OR_EQUAL,
        "the graph sends |d| = beta to the quadratic part, PyTorch to the linear one. Both give "
        f"beta/2 there, so with beta = {beta:g} no answer differs; with beta = 0 it would be 0/0",
        (Evidence(f"the graph's condition at d = beta = {beta:g}", value, value),),
    )


def _conditions(
    model: onnx.ModelProto, steps: list[dict[str, np.ndarray]]
) -> Iterator[tuple[bool, ...]]:
    """For each `Where` whose condition is the same in all elements: its value at every step."""
    flat = inlined(model)
    names = dict.fromkeys(node.input[0] for node in flat.graph.node if node.op_type == "Where")
    made = {name for node in flat.graph.node for name in node.output}
    wanted = [name for name in names if name in made]
    if not wanted:
        return
    evaluator = ReferenceEvaluator(flat)
    with np.errstate(all="ignore"):  # beta may be as large as its dtype takes
        found = [evaluator.run(wanted, feeds) for feeds in steps]
    for values in zip(*found, strict=True):
        if all(value.size and (value.all() or not value.any()) for value in values):
            yield tuple(bool(value.all()) for value in values)
