"""`halved`: the model in half, its losses and ports as they were."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from handmade import model_of, run
from onnx import TensorProto

from smoothl1_deploy import LossSpec, attach, build_engine
from smoothl1_deploy._model import main_tensors
from smoothl1_deploy.errors import SpecError
from smoothl1_deploy.parity._whole import verify_model
from smoothl1_deploy.tensorrt._half import halved

pytest.importorskip("onnxruntime", reason="it has the converter")

RANDOM = np.random.default_rng(0)


def numbers(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


IMAGES, BOXES = numbers(2, 3, 32, 32), numbers(2, 10, 4)
DETECTOR = """g (float[N, 3, 32, 32] images) => (float[N, 10, 4] boxes) {
    c = Conv<strides = [4, 4]>(images, k)  r = Relu(c)  flat = Flatten(r)  h = MatMul(flat, w)
    boxes = Reshape(h, shape)
}"""
LINEAR = "g (float[6, 6] x) => (float[6, 6] y) { h = MatMul(x, w)  y = Relu(h) }"
W = numbers(6, 6)


def detector() -> onnx.ModelProto:
    shape = np.array([-1, 10, 4])
    return model_of(DETECTOR, k=numbers(8, 3, 4, 4) / 7, w=numbers(512, 40) / 22, shape=shape)


def in_half(model: onnx.ModelProto) -> set[str]:
    found = main_tensors(model).values()
    return {tensor.name for tensor in found if tensor.element == TensorProto.FLOAT16}


@pytest.mark.parametrize("route", ["function", "inlined"])
def test_the_model_is_in_half_and_its_losses_and_ports_are_as_they_were(route: str) -> None:
    """The loss is PyTorch's of the prediction that the model in half makes, in the same run."""
    model = attach(detector(), "boxes", "boxes_gt", LossSpec(0.5, per_sample=True), route=route)
    model = attach(model, "r", "r_gt", LossSpec(0.5), loss_name="inner", route=route)
    half, notes = halved(model, "float16")
    assert {"k", "w", "c", "flat", "h"} <= in_half(half)
    assert [*half.graph.input] == [*model.graph.input]
    assert [*half.graph.output] == [*model.graph.output]
    own = len(detector().graph.node)
    assert [*half.graph.node][own - len(model.graph.node) :] == [*model.graph.node][own:]
    assert half.functions == model.functions and half.metadata_props == model.metadata_props
    assert len(notes) == 1 and "its losses (loss, inner) are computed as" in notes[0]
    assert verify_model(half, drift=False)
    feeds = {"images": IMAGES, "boxes_gt": BOXES, "r_gt": numbers(2, 8, 8, 8)}
    before, after = run(model, feeds), run(half, feeds)
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert 0 < np.abs(after[name] - value).max() < 2e-3 * np.abs(value).max(), name


def test_what_a_loss_reads_is_not_narrowed() -> None:
    """A weight of the model and its own input, as targets: each has float32 numbers."""
    both = attach(model_of(LINEAR, w=W), "y", "w", LossSpec(0.5))
    both = attach(both, "y", "x", LossSpec(0.5), loss_name="of_input")
    half, _ = halved(both, "float16")
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in half.graph.initializer}
    assert [*map(str, (constants[n].dtype for n in ("w", "w/of_the_model")))] == [
        "float32",
        "float16",
    ]
    assert constants["w"].tobytes() == W.tobytes()
    assert verify_model(half, drift=False)


def test_constants_of_every_kind_and_functions_of_the_model_are_converted() -> None:
    """The converter looks into no function, and takes a number in an attribute for no constant."""
    text = """g (float[N, 6] x) => (float[N, 6] y) { a = mine.F(x)  y = Clip(a, , most) }
    <domain: "mine", opset_import: ["" : 18]> F (a) => (b) {
        c = Constant<value_float = 0.5>()  b = Mul(a, c)
    }"""
    before = model_of(text, imports=', "mine" : 1', most=np.array(1e5, np.float32))
    half, notes = halved(attach(before, "y", "t", LossSpec(0.5)), "float16")
    assert notes[1:] == ("constants beyond the range of float16 became +-65504: most",)
    assert verify_model(half, drift=False)


def test_what_has_nothing_to_convert_or_no_valid_result_is_refused() -> None:
    half = "g (float16[N, 6] x) => (float16[N, 6] y) { y = Relu(x) }"
    with pytest.raises(SpecError, match="nothing of the model but its losses is float32"):
        halved(attach(model_of(half), "y", "t"), "float16")
    with pytest.raises(SpecError, match="unknown precision 'fp8'; choose float16 or bfloat16"):
        halved(attach(model_of(LINEAR, w=W), "y", "t"), "fp8")


def test_a_model_in_half_is_built(rtx) -> None:
    model = attach(detector(), "boxes", "boxes_gt", LossSpec(0.5, per_sample=True))
    plain, half = (build_engine(model, flavour=rtx, precision=p) for p in (None, "float16"))
    assert half.sidecar.outputs == plain.sidecar.outputs
    assert half.sidecar.onnx_sha256 != plain.sidecar.onnx_sha256
