"""Evaluate, on the CPU, the network that NVIDIA's own ONNX parser made of a model.

It is to TensorRT what `onnx.reference.ReferenceEvaluator` is to ONNX: it shows on any machine
what the parser made of the graph (constants, casts, broadcasts, axes, decompositions) before a
GPU sees it. **The network is checked, the GPU's kernels are not**: how the builder fuses layers,
which kernel it picks and in which order that kernel adds up is not modelled.

Each layer is evaluated in the dtype of its tensors, and its result is the exact one rounded once
to that dtype: arithmetic natively, what has an accumulator inside (reductions, matrix products,
softmax, normalisation) and the transcendental functions in float64 with one rounding at the end.
A choice of an order of summation would be a guess; the correctly rounded sum is what every
kernel approximates, and so a difference from the truth is the network's and not this module's.
"""

from .evaluator import Plan, evaluate, plan

__all__ = ["Plan", "evaluate", "plan"]
