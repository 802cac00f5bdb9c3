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

use = ctypes.CDLL(sys.argv[1]).smoothl1_deploy_use
for suffix, reduction, row, weighted, gradient in itertools.product(
    ELEMENTS, ("", "Sum", "Mean", "Average"), ("", "Row"), ("", "Weighted"), ("", "Gradient")
):
    if (row and not reduction) or (reduction == "Average" and not weighted):
        continue
    upstream = "Upstream" * bool(gradient and weighted)
    element = ELEMENTS[suffix]
    names = ["input", "target", *["weight"] * bool(weighted)]
    inputs = [helper.make_tensor_value_info(name, element, None) for name in names]
    inputs.append(helper.make_tensor_value_info("beta", TensorProto.FLOAT, None))
    if upstream:
        inputs.append(helper.make_tensor_value_info("grad_output", element, None))
    outputs = ["loss", *["grad_input"] * bool(gradient)]
    node = helper.make_node(
        f"{weighted}SmoothL1Loss{row}{reduction}At{gradient}{upstream}{suffix}",
        [value.name for value in inputs],
        outputs,
        domain="smoothl1_deploy",
    )
    told = [helper.make_tensor_value_info(output, element, None) for output in outputs]
    graph = helper.make_graph([node], "one", inputs, told)
    versions = [helper.make_opsetid("", 18), helper.make_opsetid("smoothl1_deploy", 2)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()
    options = ort.SessionOptions()
    options.register_custom_ops_library(sys.argv[1])
    options.intra_op_num_threads = 2
    session = ort.InferenceSession(model, options)
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
print("done")
