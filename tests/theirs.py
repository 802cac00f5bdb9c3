"""A loss as someone else writes it: right, or with wrong lines in the place of right ones."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx.checker
from handmade import model_of

from smoothl1_deploy._floats import NUMPY_DTYPE
from smoothl1_deploy._model import ELEMENT_TYPE

#: PyTorch's formula.
ELEMENTS = """
    size = Abs(d)
    inside = Less(size, beta)
    square = Mul(d, d)
    halved = Mul(half, square)
    quadratic = Div(halved, beta)
    offset = Mul(half, beta)
    linear = Sub(size, offset)
    each = Where(inside, quadratic, linear)
"""

#: The three reductions, right at every size: float64 accumulators, 0/0 for an empty mean.
REDUCE = {
    "none": "out = Identity(each)",
    "sum": """
    wide = Cast<to=11>(each)
    total = ReduceSum<keepdims=0>(wide)
    out = Cast<to=1>(total)
""",
    "mean": """
    wide = Cast<to=11>(each)
    total = ReduceSum<keepdims=0>(wide)
    number = Size(each)
    count = Cast<to=11>(number)
    average = Div(total, count)
    out = Cast<to=1>(average)
""",
}


def their_loss(
    faults: str = "",
    *,
    inputs: str = "float[N,4] pred, float[N,4] gt",
    outputs: str = "float out",
    of: tuple[str, str] = ("pred", "gt"),
    more: str = "",
    beta: float = 1.0,
    reduction: str = "mean",
    dtype: str = "float32",
) -> onnx.ModelProto:
    """The right model, with faults: each of their lines replaces the line of what it ends with."""
    body = f"\n    d = Sub({of[0]}, {of[1]}){ELEMENTS}{REDUCE[reduction]}"
    body = body.replace("Cast<to=1>(", f"Cast<to={ELEMENT_TYPE[dtype]}>(")
    for line in filter(None, map(str.strip, faults.splitlines())):
        name = re.findall(r"(\w+) = ", line)[-1]
        body, count = re.subn(rf"^ +{name} = .*$", line, body, flags=re.MULTILINE)
        assert count == 1, line
    constants = {"half": 0.5, "one": 1.0, "beta": beta}
    model = model_of(
        f"their_loss ({inputs}) => ({outputs}) {{ {body} {more} }}",
        ir=10,
        **{name: np.asarray(value, NUMPY_DTYPE[dtype]) for name, value in constants.items()},
    )
    onnx.checker.check_model(model)
    return model
