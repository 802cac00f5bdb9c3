"""Runs every operator on shapes that end in the middle of everything, with little imported."""

import ctypes
import itertools
import sys

import numpy as np
import onnxruntime as ort
from handmade import run_session
from onnx import TensorProto, helper

SHAPES = [
    ((), (), ()),
    ((3, 7), (3, 7), (3, 7)),
    ((5, 1), (1, 7), (7,)),
    ((0, 3), (1, 3), ()),
    ((2, 40_001), (2, 40_001), (2, 1)),
    ((300_001,), (300_001,), (300_001,)),
    ((1030, 33), (33,), (1030, 1)),
]
ELEMENTS = {
    "": TensorProto.FLOAT,
    "Float16": TensorProto.FLOAT16,
    "BFloat16": TensorProto.BFLOAT16,
    "Float64": TensorProto.DOUBLE,
}

Value = tuple[str, int]


def opened(name: str, inputs: list[Value], outputs: list[Value]) -> ort.InferenceSession:
    """A session of the operator alone."""
    names = [[name for name, _ in values] for values in (inputs, outputs)]
    graph = helper.make_graph(
        [helper.make_node(name, *names, domain="smoothl1_deploy")],
        "one",
        *([helper.make_tensor_value_info(*value, None) for value in v] for v in (inputs, outputs)),
    )
    versions = [helper.make_opsetid("", 18), helper.make_opsetid("smoothl1_deploy", 2)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()
    options = ort.SessionOptions()
    options.register_custom_ops_library(sys.argv[1])
    options.intra_op_num_threads = 2
    return ort.InferenceSession(model, options)


use = ctypes.CDLL(sys.argv[1]).smoothl1_deploy_use
for suffix, reduction, row, weighted, gradient in itertools.product(
    ELEMENTS, ("", "Sum", "Mean", "Average"), ("", "Row"), ("", "Weighted"), ("", "Gradient")
):
    if (row and not reduction) or (reduction == "Average" and not weighted):
        continue
    upstream = "Upstream" * bool(gradient and weighted)
    element = ELEMENTS[suffix]
    names = ["input", "target", *["weight"] * bool(weighted)]
    inputs = [*((name, element) for name in names), ("beta", TensorProto.FLOAT)]
    inputs += [("grad_output", element)] * bool(upstream)
    session = opened(
        f"{weighted}SmoothL1Loss{row}{reduction}At{gradient}{upstream}{suffix}",
        inputs,
        [(name, element) for name in ("loss", *["grad_input"] * bool(gradient))],
    )
    for shapes, number in itertools.product(SHAPES, range(1, use(0) + 1)):
        if (row and not any(shapes)) or (shapes[0] == (300_001,) and number > 1):
            continue  # no rows; or threads, which one instruction set has like another
        use(number)
        dtype = helper.tensor_dtype_to_np_dtype(element)
        feeds = {name: np.ones(shape, dtype) for name, shape in zip(names, shapes, strict=False)}
        whole = np.broadcast_shapes(*(array.shape for array in feeds.values()))
        feeds["beta"] = np.asarray(0.5, np.float32)
        if upstream:
            loss = whole if not reduction else whole[:1] if row else ()
            feeds["grad_output"] = np.ones(loss, dtype)
        run_session(session, feeds)
for suffix, form, loss, weighted, masked in itertools.product(
    ELEMENTS,
    ("Elements", "Totals", "TotalsAndLosses", "TotalsAndDifferences", "Slopes"),
    ("HuberLoss", "SmoothL1Loss"),
    ("", "Weighted"),
    ("", "Masked"),
):
    if "And" in form and bool(masked) != bool(weighted):
        continue  # what is beside the sums is fetched as the elements are
    element, wide = ELEMENTS[suffix], TensorProto.DOUBLE
    kinds = {"input": element, "target": element}
    kinds |= {"weight": element} if weighted else {}
    kinds |= {"mask": TensorProto.BOOL} if masked else {}
    kinds["beta"] = wide if suffix == "Float64" else TensorProto.FLOAT
    kinds |= {"axes": TensorProto.INT64} if "Totals" in form else {}
    kinds |= {"flowing": wide} if form == "Slopes" else {}
    totals = {"total": wide, "count": wide} | ({"weights": wide} if weighted else {})
    each = {"out": element} if "And" in form or "Totals" not in form else {}
    session = opened(
        f"{masked}{weighted}{loss}{form}{suffix}",
        [*kinds.items()],
        [*((totals if "Totals" in form else {}) | each).items()],
    )
    for at, shapes in enumerate(SHAPES):
        sizes = dict(zip(("input", "target", "weight"), shapes, strict=True))
        sizes |= {"mask": shapes[2], "beta": shapes[0][-1:] if at % 2 else (), "flowing": ()}
        rank = len(np.broadcast_shapes(*(sizes[name] for name in kinds if name != "axes")))
        for number, axes in enumerate(([], [*range(rank)], [*range(rank)][:1], [*range(rank)][1:])):
            use(1 + (at + number) % use(0))
            if number and "Totals" not in form:
                break
            feeds = {name: np.ones(size, helper.tensor_dtype_to_np_dtype(kinds[name]))
                     for name, size in sizes.items() if name in kinds}  # fmt: skip
            if "Totals" in form:
                feeds["axes"] = np.asarray(axes, np.int64)
            run_session(session, feeds)
print("done")
