"""`attach` on one model of each kind: what was there before, bit for bit; the loss, PyTorch's."""

# ruff: noqa: E501 (a table of models reads best in rows)

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from handmade import Array, assert_kept, assert_near, model_of, run
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from smoothl1_deploy import LossSpec, attach
from smoothl1_deploy.reference._module import eager_outputs

rng = np.random.default_rng(0)


def normal(*shape: int, dtype: str = "float32") -> Array:
    return np.asarray(rng.standard_normal(shape)).astype(dtype)


@dataclass(frozen=True)
class Model:
    """A kind of model, its prediction, and what to feed it; `gt` is the target's input.

    `seen` is an output of the graph that equals the prediction, where that is none itself.
    """

    name: str
    graph: str
    feeds: dict[str, Array]
    constants: dict[str, Array] = field(default_factory=dict)
    prediction: str = "y"
    target: Any = "gt"
    truth: Array | None = None
    opset: int = 18
    ir: int = 8
    imports: str = ""
    seen: str | None = None
    spec: LossSpec | None = None

    def build(self) -> onnx.ModelProto:
        return model_of(self.graph, self.opset, self.ir, self.imports, **self.constants)


X, W, B = normal(5, 6), normal(6, 4), normal(4)
IMAGE, KERNEL = normal(2, 3, 8, 8), normal(4, 3, 3, 3)
SEQUENCE = normal(7, 2, 3)
RELU = "g (float[N, 6] x) => (float[N, 6] y) { y = Relu(x) }"
MINE = ', "mine" : 1'
TWICE = '<domain: "mine", opset_import: ["" : 18]> Twice (a) => (b) { b = Add(a, a) }'

MODELS = [
    Model("one operator", RELU, {"x": X}),
    Model("a linear layer", "g (float[N, 6] x) => (float[N, 4] y) { h = MatMul(x, w) y = Add(h, b) }", {"x": X}, {"w": W, "b": B}),
    Model("a perceptron", "g (float[N, 6] x) => (float[N, 6] y) { h = MatMul(x, w) s = Sigmoid(h) y = MatMul(s, v) }", {"x": X}, {"w": W, "v": normal(4, 6)}),
    Model("an autoencoder against its own input", "g (float[N, 6] x) => (float[N, 6] y) { h = MatMul(x, w) y = MatMul(h, v) }", {"x": X}, {"w": W, "v": normal(4, 6)}, target="x", truth=X, spec=LossSpec(0.5, per_sample=True)),
    Model("a convolution", "g (float[N, 3, 8, 8] x) => (float[N, 4, 6, 6] y) { y = Conv(x, k) }", {"x": IMAGE}, {"k": KERNEL}),
    Model("batch normalisation", "g (float[N, 3, 8, 8] x) => (float[N, 3, 8, 8] y) { y = BatchNormalization(x, s, b, m, v) }", {"x": IMAGE}, {"s": np.ones(3, "f4"), "b": normal(3), "m": normal(3), "v": np.ones(3, "f4")}),
    Model("a recurrent layer", "g (float[T, 2, 3] x) => (float[T, 1, 2, 4] y) { y, h = LSTM<hidden_size = 4>(x, w, r) }", {"x": SEQUENCE}, {"w": normal(1, 16, 3), "r": normal(1, 16, 4)}),
    Model("attention by hand", "g (float[N, 6] x) => (float[N, 6] y) { t = Transpose<perm = [1, 0]>(x) s = MatMul(x, t) a = Softmax(s) y = MatMul(a, x) }", {"x": X}),
    Model("an internal tensor", "g (float[N, 6] x) => (float[N, 6] out, float[N, 6] copy) { h = Abs(x) out = Sqrt(h) copy = Identity(h) }", {"x": X}, prediction="h", seen="copy"),
    Model("an input as the prediction", "g (float[N, 6] x) => (float[N, 6] out, float[N, 6] copy) { out = Neg(x) copy = Identity(x) }", {"x": X}, prediction="x", seen="copy"),
    Model("two heads against each other", "g (float[N, 6] x) => (float[N, 6] y, float[N, 6] z) { y = Relu(x) z = Identity(x) }", {"x": X}, target="z", truth=X),
    Model("a constant array", RELU, {"x": X}, target=normal(5, 6)),
    Model("a constant that broadcasts", RELU, {"x": X}, target=normal(6)),
    Model("an initialiser as the target", RELU, {"x": X}, {"template": X * 2}, target="template", truth=X * 2),
    Model("initialisers that are inputs too", "g (float[N, 6] x, float[6, 4] w) => (float[N, 4] y) { y = MatMul(x, w) }", {"x": X}, {"w": W}),
    Model("a branch (If)", "g (float[N, 6] x, bool c) => (float[N, 6] y) { y = If (c) <then_branch = t () => (float[N, 6] a) { a = Relu(x) }, else_branch = e () => (float[N, 6] b) { b = Neg(x) }> }", {"x": X, "c": np.array(False)}),
    Model("a loop", "g (float[N, 6] x, int64 n, bool go) => (float[N, 6] y) { y = Loop (n, go, x) <body = b (int64 i, bool c, float[N, 6] s) => (bool d, float[N, 6] r) { d = Identity(c) r = Add(s, s) }> }", {"x": X, "n": np.array(3), "go": np.array(True)}),
    Model("a scan", "g (float[6] s, float[N, 6] x) => (float[6] last, float[N, 6] y) { last, y = Scan <num_scan_inputs = 1, body = b (float[6] a, float[6] r) => (float[6] c, float[6] o) { c = Add(a, r) o = Identity(c) }> (s, x) }", {"s": normal(6), "x": X}),
    Model("a subgraph with names of ours", "g (float[N, 6] x, bool c) => (float[N, 6] y) { y = If (c) <then_branch = t () => (float[N, 6] loss) { loss = Relu(x) }, else_branch = e () => (float[N, 6] losses) { losses = Neg(x) }> }", {"x": X, "c": np.array(True)}),
    Model("a function of its own", "g (float[N, 6] x) => (float[N, 6] y) { y = mine.Twice(x) }" + TWICE, {"x": X}, imports=MINE),
    Model("functions that call functions", "g (float[N, 6] x) => (float[N, 6] y) { y = mine.Four(x) }" + TWICE + '<domain: "mine", opset_import: ["" : 18, "mine" : 1]> Four (a) => (b) { c = mine.Twice(a) b = mine.Twice(c) }', {"x": X}, imports=MINE),
    Model("a function with an attribute", "g (float[N, 6] x) => (float[N, 6] y) { y = mine.Scale<k = 3.0>(x) }" + '<domain: "mine", opset_import: ["" : 18]> Scale<k>(a) => (b) { c = Constant<value_float: float = @k>() b = Mul(a, c) }', {"x": X}, imports=MINE),
    Model("double", "g (double[N, 6] x) => (double[N, 6] y) { y = Relu(x) }", {"x": X.astype("f8")}),
    Model("half", "g (float16[N, 6] x) => (float16[N, 6] y) { y = Relu(x) }", {"x": X.astype("f2")}),
    Model("half inside, float outside", "g (float[N, 6] x) => (float[N, 6] y) { h = Cast<to = 10>(x) r = Relu(h) y = Cast<to = 1>(r) }", {"x": X}),
    Model("half against a float loss", "g (float16[N, 6] x) => (float16[N, 6] y) { y = Relu(x) }", {"x": X.astype("f2")}, spec=LossSpec(0.5, dtype="float32")),
    Model("integers before the prediction", "g (int64[N, 6] x) => (float[N, 6] y) { y = Cast<to = 1>(x) }", {"x": np.arange(30).reshape(5, 6)}),
    Model("integers as the target", "g (float[N, 6] x, int32[N, 6] gt) => (float[N, 6] y, int32[N, 6] kept) { y = Relu(x) kept = Identity(gt) }", {"x": X, "gt": np.arange(30, dtype="i4").reshape(5, 6)}, truth=np.arange(30, dtype="i4").reshape(5, 6)),
    Model("every name taken", "g (float[N, 6] x) => (float[N, 6] y, float[N, 6] loss) { losses = Neg(x) total = Abs(losses) loss = Sqrt(total) y = Relu(x) }", {"x": X}),
    Model("node names that are taken", 'g (float[N, 6] x) => (float[N, 6] y) { ["loss"] h = Neg(x) ["loss/losses"] y = Neg(h) }', {"x": X}),
    Model("a name that needs quotes", 'g (float[N, 6] "x:0") => (float[N, 6] "y/out:0") { "y/out:0" = Relu("x:0") }', {"x:0": X}, prediction="y/out:0"),
    Model("one number", "g (float x) => (float y) { y = Neg(x) }", {"x": np.array(1.5, "f4")}),
    Model("no rows", RELU, {"x": X[:0]}, spec=LossSpec(reduction="sum")),
    Model("five axes", "g (float[A, B, C, D, E] x) => (float[A, B, C, D, E] y) { y = Tanh(x) }", {"x": normal(2, 1, 3, 2, 2)}, spec=LossSpec(0.1, "sum", per_sample=True)),
    Model("unnamed axes", "g (float[?, ?] x) => (float[?, ?] y) { y = Relu(x) }", {"x": X}),
    Model("a reshape by data", "g (float[N, 6] x) => (float[A, B] y) { s = Constant<value_ints = [6, -1]>() y = Reshape(x, s) }", {"x": X}),
    Model("an optional output left out", "g (float[N, 6] x) => (float[N, 2] y) { k = Constant<value_ints = [2]>() y, i = TopK(x, k) }", {"x": X}),
    Model("operators of ONNX Runtime", "g (float[N, 6] x) => (float[N, 6] y) { y = com.microsoft.Gelu(x) }", {"x": X}, imports=', "com.microsoft" : 1'),
    Model("operators of ai.onnx.ml", "g (float[N, 6] x) => (float[N, 6] y) { y = ai.onnx.ml.Scaler<offset = [0.5], scale = [2.0]>(x) }", {"x": X}, imports=', "ai.onnx.ml" : 3'),
    Model("opset 16, an old IR", "g (float[N, 6] x) => (float[N, 6] y) { y = LeakyRelu(x) }", {"x": X}, opset=16, ir=7),
    Model("opset 23", "g (float[N, 6] x) => (float[N, 6] y) { y = RMSNormalization(x, s) }", {"x": X}, {"s": np.ones(6, "f4")}, opset=23, ir=11),
]  # fmt: skip
LOSSES = (LossSpec(0.5), LossSpec(reduction="none", gradient=True))


@pytest.mark.parametrize("route", ["function", "inlined"])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_what_was_there_is_untouched_and_the_loss_is_right(model: Model, route: str) -> None:
    before = model.build()
    old = run(before, model.feeds)
    predicted = old[model.seen or model.prediction]
    for spec in (model.spec,) if model.spec else (None, *LOSSES):
        if spec is not None and model.spec is None:
            spec = LossSpec(spec.beta, spec.reduction, predicted.dtype, gradient=spec.gradient)
        after = attach(before, model.prediction, model.target, spec, route=route)
        onnx.checker.check_model(after, full_check=True)
        ours = [f for f in after.functions if f.domain == "smoothl1_deploy"]
        assert bool(ours) == (route == "function")
        assert len(after.functions) == len(before.functions) + len(ours)
        new_inputs = {v.name for v in after.graph.input} - {v.name for v in before.graph.input}
        truth = model.target if isinstance(model.target, np.ndarray) else model.truth
        feeds = dict(model.feeds)
        if truth is None:
            truth = np.asarray(np.full_like(predicted, 0.25))
            feeds["gt"] = truth.astype((spec or LossSpec()).dtype) if model.spec else truth
        assert new_inputs == set(feeds) - set(model.feeds)
        new = run(after, feeds)
        assert_kept(old, new)
        if spec is None and model.seen is None and "gt" in feeds:
            assert_as_it_was(before, after, model.feeds, **feeds)
        used = spec or LossSpec(dtype=predicted.dtype)
        expected = eager_outputs(used, predicted.astype(used.dtype), truth.astype(used.dtype))
        added = [name for name in new if name not in old]
        assert len(added) == len(expected)
        for name, value in zip(added, expected.values(), strict=True):
            assert_near(new[name], value, 4, name)


def test_every_opset_stays_as_it_is() -> None:
    """ONNX's reference evaluator where ONNX Runtime has it not yet."""
    expected = eager_outputs(LossSpec(0.5), np.maximum(X, 0), X)["loss"]
    for opset in range(13, onnx.defs.onnx_opset_version() + 1):
        for route in ("function", "inlined"):
            before = model_of(RELU, opset, 8 if opset < 21 else 11 if opset < 27 else 13)
            after = attach(before, "y", "gt", LossSpec(0.5), route=route)
            onnx.checker.check_model(after, full_check=True)
            assert {e.version for e in after.opset_import if not e.domain} == {opset}
            if opset < 27:
                y, loss = run(after, {"x": X, "gt": X}).values()
            else:
                y, loss = ReferenceEvaluator(after).run(None, {"x": X, "gt": X})
            assert y.tobytes() == np.maximum(X, 0).tobytes()
            assert_near(np.asarray(loss), expected, 4, opset)


def assert_as_it_was(
    before: onnx.ModelProto, after: onnx.ModelProto, feeds: dict[str, Array], **more: Array
) -> None:
    """What `before` computes, `after` does bit for bit, however ONNX Runtime optimises the two."""
    for level in ("ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"):
        assert_kept(run(before, feeds, level), run(after, {**more, **feeds}, level))


#: A normalised convolution, and another in a branch; every weight is an input too.
CONVOLUTIONS = """g (float[N, 3, 8, 8] x, bool c, float[4, 3, 3, 3] k, float[4] s, float[4] b)
    => (float[N, 4, 6, 6] y, float[N, 4, 6, 6] z) {
    h = Conv(x, k)
    y = BatchNormalization(h, s, b, b, s)
    z = If (c) <
        then_branch = then (float[4, 3, 3, 3] k2) => (float[N, 4, 6, 6] a) {
            i = Conv(x, k2)
            a = BatchNormalization(i, s, b, b, s)
        },
        else_branch = other () => (float[N, 4, 6, 6] o) { o = Neg(y) }
    > }"""


def test_the_weights_of_an_ir_before_4_stay_constants_that_a_runtime_may_fold() -> None:
    """In that IR every initialiser is listed as an input; from 4 on that makes it no constant."""
    for opset in (9, 13):
        before = model_of(CONVOLUTIONS, opset, ir=3, k=KERNEL, s=np.abs(B) + 1, b=B)
        branch = next(a.g for a in before.graph.node[-1].attribute if a.name == "then_branch")
        branch.initializer.append(numpy_helper.from_array(KERNEL, "k2"))
        after = attach(before, "y", "gt", convert_opset=True)
        assert [port.name for port in after.graph.input] == ["x", "c", "gt"]
        feeds = {"x": IMAGE, "c": np.array(True)}
        assert_as_it_was(before, after, feeds, gt=normal(2, 4, 6, 6))


#: An int8 model, to which an END has to be written.
INT8 = """g (float[N, 6] x, float[N, 100] other) => (float[N, 100] y, float[N, 100] z) {
    xq = QuantizeLinear(x, s, zero)
    xd = DequantizeLinear(xq, s, zero)
    wd = DequantizeLinear(w, r, zero)
    h = MatMul(xd, wd)
    q = QuantizeLinear(h, s, zero)
    d = DequantizeLinear(q, s, zero)
    END }"""
SOFT = """<domain: "mine", opset_import: ["" : 18]> Soft (h, t, low) => (b) {
    a = Softmax(h)
    p = QuantizeLinear(a, t, low)
    b = DequantizeLinear(p, t, low) }"""
ENDS = {
    "a softmax": "a = Softmax(d) p = QuantizeLinear(a, t, low) y = DequantizeLinear(p, t, low)",
    "a product": "a = Mul(d, d) p = QuantizeLinear(a, s, zero) y = DequantizeLinear(p, s, zero)",
    "a function": "y = mine.Soft(d, t, low)",
}


@pytest.mark.parametrize("end", ENDS)
def test_an_output_that_is_dequantised_keeps_its_bits(end: str) -> None:
    """ONNX Runtime fuses int8 operators with a DequantizeLinear that has one reader alone."""
    constants = {name: np.array(scale, "f4") for name, scale in (("s", 0.1), ("t", 1 / 255))}
    constants |= {"r": np.array(0.01, "f4"), "zero": np.array(0, "i1"), "low": np.array(-128, "i1")}
    constants["w"] = np.random.default_rng(1).integers(-127, 127, (6, 100)).astype("i1")
    other = np.zeros((200, 100), "f4")
    feeds = {"x": np.random.default_rng(2).standard_normal((200, 6)).astype("f4"), "other": other}
    for z, (prediction, target) in itertools.product(["other", "y"], (("y", "gt"), ("other", "y"))):
        graph = INT8.replace("END", f"{ENDS[end]} z = Exp({z})")
        before = model_of(graph + SOFT, imports=MINE, **constants)
        after = attach(before, prediction, target, LossSpec(0.05, "none", gradient=True))
        onnx.checker.check_model(after, full_check=True)
        truth = {"gt": other} if target == "gt" else {}
        assert_as_it_was(before, after, feeds, **truth)
        new = run(after, {**feeds, **truth}, "ORT_ENABLE_ALL")
        pair = (new["y"], other) if target == "gt" else (other, new["y"])
        expected = eager_outputs(LossSpec(0.05, "none"), *pair)["loss"]
        assert_near(new["loss"], expected, 4)


def test_external_data_beside_the_file_is_left_alone(tmp_path: Path) -> None:
    before = MODELS[1].build()
    before_file, after_file = tmp_path / "m.onnx", tmp_path / "scored.onnx"
    options = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 0}
    onnx.save(before, before_file, **options)
    stored = (tmp_path / "w.bin").read_bytes()
    bare = onnx.load(before_file, load_external_data=False)
    onnx.save(attach(bare, "y", "gt"), after_file)
    old = run(before_file, {"x": X})
    new = run(after_file, {"x": X, "gt": old["y"]})
    assert_kept(old, new)
    assert new["loss"] == 0
    assert (tmp_path / "w.bin").read_bytes() == stored
