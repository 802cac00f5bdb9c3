"""`attach`: the loss on models of every kind, what was there before bit-identical."""

# ruff: noqa: E501 (a table of refusals reads best in rows)

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import ml_dtypes  # noqa: F401  (numpy then knows bfloat16)
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from smoothl1_deploy import LossSpec, attach
from smoothl1_deploy.errors import ArtefactError, SpecError
from smoothl1_deploy.floats import ulp_distance
from smoothl1_deploy.reference.module import eager_outputs

W = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)


def model_of(text: str, opset: int = 18, ir: int = 8, **constants: np.ndarray) -> onnx.ModelProto:
    model = parser.parse_model(f'<ir_version: {ir}, opset_import: ["" : {opset}]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in constants.items())
    onnx.checker.check_model(model)
    return model


def linear(opset: int = 18, ir: int = 8, rest: str = "boxes = Relu(h)") -> onnx.ModelProto:
    body = f"g (float[N, 6] x) => (float[N, 4] boxes) {{ h = MatMul(x, w) {rest} }}"
    return model_of(body, opset, ir, w=W)


def run(model: onnx.ModelProto, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Fusions across the new nodes would be another program; the graph itself is compared.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


X = np.random.default_rng(1).standard_normal((5, 6)).astype(np.float32)
T = np.random.default_rng(2).standard_normal((5, 4)).astype(np.float32)


def untouched(before: onnx.ModelProto, after: onnx.ModelProto, **feeds: np.ndarray) -> dict:
    """Outputs that were there before are bit-identical; gives all outputs of `after`."""
    onnx.checker.check_model(after, full_check=True)
    old = run(
        before, **{k: v for k, v in feeds.items() if k in {i.name for i in before.graph.input}}
    )
    new = run(after, **feeds)
    for name, value in old.items():
        assert value.tobytes() == new[name].tobytes()
    return new


def assert_loss(spec: LossSpec, outputs: dict, prediction: np.ndarray, target: np.ndarray) -> None:
    for name, expected in eager_outputs(spec, prediction, target).items():
        assert int(ulp_distance(outputs[name], expected).max()) <= 4, name


@pytest.mark.parametrize("opset", range(13, 24))
@pytest.mark.parametrize("route", ["function", "inlined"])
def test_every_opset(opset: int, route: str) -> None:
    before = linear(opset, 10 if opset > 20 else 8)
    spec = LossSpec(0.5)
    after = attach(before, "boxes", "boxes_gt", spec, route=route)
    outputs = untouched(before, after, x=X, boxes_gt=T)
    assert_loss(spec, outputs, outputs["boxes"], T)
    assert _opsets(after)[""] == opset
    assert bool(after.functions) == (route == "function")


def _opsets(model: onnx.ModelProto) -> dict[str, int]:
    return {entry.domain: entry.version for entry in model.opset_import}


EXTENDED = [
    LossSpec(reduction="none"),
    LossSpec(reduction="sum", per_sample=True),
    LossSpec(0.1, per_sample=True, gradient=True),
    LossSpec(0.0, gradient=True),
    LossSpec(2.0, "none", gradient=True),
]


@pytest.mark.parametrize("spec", EXTENDED, ids=lambda spec: spec.name)
@pytest.mark.parametrize("prediction", ["boxes", "h", "x"])
def test_outputs_internal_tensors_and_inputs(spec: LossSpec, prediction: str) -> None:
    before = linear()
    after = attach(before, prediction, "gt", spec)
    truth = np.random.default_rng(3).standard_normal(X.shape if prediction == "x" else T.shape)
    outputs = untouched(before, after, x=X, gt=truth.astype(np.float32))
    value = {"x": X, "h": X @ W, "boxes": outputs["boxes"]}[prediction]
    if prediction == "h":
        after.graph.output.append(helper.make_tensor_value_info("h", 1, ("N", 4)))
        value = run(after, x=X, gt=truth.astype(np.float32))["h"]
    assert_loss(spec, outputs, value, truth.astype(np.float32))


def test_an_autoencoder_against_its_own_input() -> None:
    before = model_of(
        "g (float[N, 6] x) => (float[N, 6] y) { h = MatMul(x, w) y = MatMul(h, v) }",
        w=W, v=np.ascontiguousarray(W.T),
    )  # fmt: skip
    spec = LossSpec(0.5, per_sample=True)
    after = attach(before, "y", "x", spec)
    assert [value.name for value in after.graph.input] == ["x"]
    outputs = untouched(before, after, x=X)
    assert_loss(spec, outputs, outputs["y"], X)


def test_a_constant_and_an_initialiser_as_targets() -> None:
    before = linear()
    for target in (T, "w_like"):
        base = onnx.ModelProto()
        base.CopyFrom(before)
        if isinstance(target, str):
            base.graph.initializer.append(numpy_helper.from_array(T, "w_like"))
        after = attach(base, "boxes", target)
        outputs = untouched(base, after, x=X)
        assert_loss(LossSpec(), outputs, outputs["boxes"], T)


def test_several_losses_in_one_model() -> None:
    before = linear()
    one = attach(before, "boxes", "gt", LossSpec(0.5))
    two = attach(one, "h", "gt", LossSpec(2.0, "sum", gradient=True), loss_name="coarse")
    three = attach(two, "boxes", "gt", LossSpec(0.0))
    assert [o.name for o in three.graph.output] == [
        "boxes",
        "loss",
        "coarse",
        "grad_input",
        "loss_1",
    ]
    outputs = untouched(before, three, x=X, gt=T)
    assert_loss(LossSpec(0.5), outputs, outputs["boxes"], T)
    assert_loss(LossSpec(0.0), {"loss": outputs["loss_1"]}, outputs["boxes"], T)
    assert '"coarse"' in next(e.value for e in three.metadata_props if e.key.endswith("attached"))


def test_names_that_are_taken_are_avoided_the_same_way_each_time() -> None:
    before = linear(
        rest="loss = Relu(h) grad_input = Abs(loss) beta = Neg(h) boxes = Identity(loss)"
    )
    spec = LossSpec(gradient=True, runtime_beta=True)
    one, two = attach(before, "boxes", "gt", spec), attach(before, "boxes", "gt", spec)
    assert one.SerializeToString() == two.SerializeToString()
    assert [o.name for o in one.graph.output] == ["boxes", "loss_1", "grad_input_1"]
    assert [i.name for i in one.graph.input] == ["x", "gt", "beta_1"]
    outputs = untouched(before, one, x=X, gt=T, beta_1=np.array(1, np.float32))
    assert_loss(LossSpec(), {"loss": outputs["loss_1"]}, outputs["boxes"], T)


def test_names_below_the_loss_s_own_are_avoided() -> None:
    """The tensors in between are called `loss/...`, and so may one of the model's be."""
    before = linear(rest="losses = Relu(h) boxes = Identity(losses)")
    spec = LossSpec(gradient=True)
    (inner,) = (
        t.name for t in attach(before, "boxes", "gt", spec).graph.initializer if "/" in t.name
    )
    before.graph.node[1].output[0] = before.graph.node[2].input[0] = inner
    outputs = untouched(before, attach(before, "boxes", "gt", spec), x=X, gt=T)
    assert_loss(spec, outputs, outputs["boxes"], T)


def test_weights_as_input_and_as_constant() -> None:
    spec = LossSpec(0.5, weight="weights")
    weights = np.abs(T) + 0.5
    for given in ("w8", weights):
        after = attach(linear(), "boxes", "gt", spec, weight=given)
        feeds = {"w8": weights} if isinstance(given, str) else {}
        outputs = untouched(linear(), after, x=X, gt=T, **feeds)
        expected = eager_outputs(spec, outputs["boxes"], T, weights)["loss"]
        assert int(ulp_distance(outputs["loss"], expected)) <= 4


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_half_and_double_models(dtype: int) -> None:
    name = {TensorProto.FLOAT16: "float16", TensorProto.DOUBLE: "float64"}[dtype]
    before = model_of(
        f"g ({'float16' if name == 'float16' else 'double'}[N, 6] x) => "
        f"({'float16' if name == 'float16' else 'double'}[N, 4] boxes) {{ boxes = MatMul(x, w) }}",
        w=W.astype(name),
    )
    after = attach(before, "boxes", "gt")
    outputs = untouched(before, after, x=X.astype(name), gt=T.astype(name))
    assert outputs["loss"].dtype == name
    assert_loss(LossSpec(dtype=name), outputs, outputs["boxes"], T.astype(name))


def test_integers_and_narrower_floats_are_widened_and_nothing_is_narrowed() -> None:
    integers = np.arange(20, dtype=np.int64).reshape(5, 4)
    outputs = untouched(linear(), attach(linear(), "boxes", integers), x=X)
    assert_loss(LossSpec(), outputs, outputs["boxes"], integers.astype(np.float32))
    half = T.astype(np.float16)
    outputs = untouched(linear(), attach(linear(), "boxes", half), x=X)
    assert_loss(LossSpec(), outputs, outputs["boxes"], half.astype(np.float32))
    with pytest.raises(SpecError, match=r"float64, and float32 would lose.*dtype='float64'"):
        attach(linear(), "boxes", T.astype(np.float64))
    other = model_of("g (float16[N, 4] x) => (float16[N, 4] boxes) { boxes = Relu(x) }")
    with pytest.raises(SpecError, match="is bfloat16, and float16 would lose some of it"):
        attach(other, "boxes", T.astype("bfloat16"))
    other = model_of("g (bfloat16[N, 4] x) => (bfloat16[N, 4] boxes) { boxes = Relu(x) }")
    with pytest.raises(SpecError, match="is float16, and bfloat16 would lose some of it"):
        attach(other, "boxes", T.astype(np.float16))
    wide = LossSpec(dtype="float64")
    outputs = untouched(linear(), attach(linear(), "boxes", T.astype(np.float64), wide), x=X)
    assert_loss(wide, outputs, outputs["boxes"].astype(np.float64), T.astype(np.float64))


def test_only_the_loss() -> None:
    before = linear(rest="boxes = Relu(h) junk = Exp(boxes)")
    after = attach(before, "h", "gt", only_loss=True)
    assert [o.name for o in after.graph.output] == ["loss"]
    assert not {"Relu", "Exp"} & {node.op_type for node in after.graph.node}
    assert_loss(LossSpec(), run(after, x=X, gt=T), X @ W, T)


BRANCH = """g (float[N, 6] x, bool c) => (float[N, 4] boxes) {
    h = MatMul(x, w)
    boxes = If (c) <
        then_branch = t () => (float[N, 4] a) { a = Relu(h) },
        else_branch = e () => (float[N, 4] b) { b = Neg(h) }
    > }"""


def test_a_model_with_subgraphs() -> None:
    before = model_of(BRANCH, w=W)
    for only in (False, True):
        after = attach(before, "boxes", "gt", only_loss=only)
        outputs = run(after, x=X, gt=T, c=np.array(False))
        assert_loss(LossSpec(), outputs, -(run_h()), T)


def run_h() -> np.ndarray:
    return run(linear(rest="boxes = Identity(h)"), x=X)["boxes"]


def test_a_model_with_functions_of_its_own() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "mine" : 1]>
    g (float[N, 6] x) => (float[N, 6] boxes) { boxes = mine.Twice(x) }
    <domain: "mine", opset_import: ["" : 17]> Twice (a) => (b) { b = Add(a, a) }"""
    before = parser.parse_model(text)
    after = attach(before, "boxes", "gt", LossSpec(0.5))
    outputs = untouched(before, after, x=X, gt=X)
    assert_loss(LossSpec(0.5), outputs, X + X, X)
    inlined = attach(before, "boxes", "gt", LossSpec(0.5), route="inlined")
    assert [function.name for function in inlined.functions] == ["Twice"]


def test_initialisers_that_are_inputs_too() -> None:
    before = linear()
    before.graph.input.append(helper.make_tensor_value_info("w", 1, (6, 4)))
    outputs = untouched(before, attach(before, "boxes", "gt"), x=X, gt=T)
    assert_loss(LossSpec(), outputs, outputs["boxes"], T)


def test_external_data_stays_where_it_is(tmp_path: Path) -> None:
    onnx.save(
        linear(),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="w.bin",
        size_threshold=0,
    )
    bare = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    after = attach(bare, "boxes", "gt")
    onnx.save(after, tmp_path / "scored.onnx")
    session = ort.InferenceSession(tmp_path / "scored.onnx")
    boxes, loss = session.run(None, {"x": X, "gt": T})
    assert_loss(LossSpec(), {"loss": loss}, boxes, T)


def test_an_unknown_rank_and_a_custom_operator_before_it() -> None:
    before = linear()
    after = attach(_without_shapes(before), "boxes", "gt", LossSpec(gradient=True))
    outputs = run(after, x=X, gt=T)
    assert_loss(LossSpec(gradient=True), outputs, outputs["boxes"], T)


def _without_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in (*copy.graph.input, *copy.graph.output):
        value.type.tensor_type.ClearField("shape")
    return copy


SEQUENCE = """g (float[N, 4] x) => (float[N, 4] boxes, seq(float[N, 4]) s) {
    s = SequenceConstruct(x)
    boxes = Relu(x) }"""
MAPS = """<ir_version: 8, opset_import: ["" : 18, "ai.onnx.ml" : 3]>
    g (float[N, 4] x) => (seq(map(int64, float[])) scores) {
    p = Softmax(x)
    scores = ai.onnx.ml.ZipMap<classlabels_int64s = [0, 1, 2, 3]>(p) }"""
HIDDEN = "g (float[N, 4] x) => (float[N, 4] y) { s = SequenceConstruct(x) y = SequenceAt(s, i) }"
NAMESAKE = """<ir_version: 8, opset_import: ["" : 18, "smoothl1_deploy" : 1]>
    g (float[N, 6] x) => (float[N, 6] boxes) { boxes = smoothl1_deploy.SmoothL1Loss(x) }
    <domain: "smoothl1_deploy", opset_import: ["" : 18]> SmoothL1Loss (a) => (b) { b = Neg(a) }"""

REFUSED: list[tuple[str, Callable[[], object], str]] = [
    ("close matches first", lambda: attach(linear(), "boxs", "gt"), r"no tensor 'boxs' to be the prediction; it has 'boxes', "),
    ("an old opset", lambda: attach(linear(12), "boxes", "gt"), r"of opset 12, and this loss needs 13.*--convert-opset"),
    ("shapes", lambda: attach(linear(), "boxes", np.zeros((5, 3), np.float32)), r"shape \('N', 4\), the target .*\(5, 3\).*4 against 3"),
    ("a route", lambda: attach(linear(), "boxes", "gt", route="torch"), "unknown route 'torch'"),
    ("a missing weight", lambda: attach(linear(), "boxes", "gt", LossSpec(weight="count")), "say which tensor or array it is"),
    ("a weight too many", lambda: attach(linear(), "boxes", "gt", weight="w8"), "for a spec without one"),
    ("strings", lambda: attach(linear(), "boxes", np.array([["a"]])), "can't be a constant|STRING"),
    ("an integer prediction", lambda: attach(model_of("g (int64[N] x) => (int64[N] y) { y = Neg(x) }"), "y", "gt"), "is INT64; a loss needs a float tensor"),
    ("a name inside a subgraph", lambda: attach(model_of(BRANCH, w=W), "boxes", "a"), "target 'a' is no tensor of the main graph but inside a graph of If, where only that can read it; name one that is, 'boxes' for instance"),
    ("a prediction inside a subgraph", lambda: attach(model_of(BRANCH, w=W), "b", "gt"), "prediction 'b' is .* but inside a graph of If"),
    ("a sequence", lambda: attach(model_of(SEQUENCE), "boxes", "s"), "the target 's' is .* but of the type sequence; name one that is, 'x' for instance"),
    ("a sequence as the prediction", lambda: attach(model_of(SEQUENCE), "s", "gt"), "the prediction 's' is .* but of the type sequence; name one that is, 'x' for instance"),
    ("a sequence that nothing declares", lambda: attach(model_of(HIDDEN, i=np.array(0)), "s", "gt"), "'s' is .* but a sequence or the like; name one that is, 'x' for instance"),
    ("a sequence of maps", lambda: attach(parser.parse_model(MAPS), "scores", "gt"), "'scores' is .* but of the type sequence; name one that is, 'p' for instance"),
    ("an optional input", lambda: attach(model_of("g (float[N] x, optional(float[N]) o) => (float[N] y) { y = Relu(x) }"), "o", "gt"), "'o' is .* but of the type optional; name one that is$"),
    ("the prediction as its own target", lambda: attach(linear(), "boxes", "boxes"), "target 'boxes' is the prediction itself, and such a loss is 0"),
    ("an array for the prediction", lambda: attach(linear(), T, "boxes"), "the prediction must be the name of a tensor, got"),  # type: ignore[arg-type]
    ("a function of our name", lambda: attach(parser.parse_model(NAMESAKE), "boxes", "gt", LossSpec(reduction="none")), "a function smoothl1_deploy.SmoothL1Loss that computes something else"),
    ("a model without tensors", lambda: attach(onnx.ModelProto(), "boxes", "gt"), "it has none at all"),
    ("rank 0 per sample", lambda: attach(model_of("g (float x) => (float y) { y = Neg(x) }"), "y", "gt", LossSpec(per_sample=True)), "rank 0"),
]  # fmt: skip


def test_a_function_of_ours_in_which_one_input_was_changed_is_another() -> None:
    spec = LossSpec(reduction="none")
    model = attach(linear(), "boxes", "gt", spec)
    assert attach(model, "boxes", "gt2", spec, loss_name="second")
    nodes = [node for function in model.functions for node in function.node]
    node = next(node for node in nodes if node.op_type == "Sub")
    swapped = list(reversed(node.input))
    node.input[:] = swapped
    with pytest.raises(ArtefactError, match="that computes something else"):
        attach(model, "boxes", "gt2", spec, loss_name="second")


@pytest.mark.parametrize(
    ("call", "text"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED]
)
def test_what_is_refused(call: Callable[[], object], text: str) -> None:
    with pytest.raises((SpecError, ArtefactError), match=text):
        call()


@pytest.mark.parametrize(
    ("opset", "spec", "needed"),
    [(7, LossSpec(), 13), (12, LossSpec(0.5, "none", gradient=True), 14), (13, LossSpec(gradient=True), 14)],
)  # fmt: skip
def test_an_old_opset_is_converted_to_the_lowest_that_the_loss_needs(
    opset: int, spec: LossSpec, needed: int
) -> None:
    """A gradient of what a constant was broadcast with needs a Reshape of opset 14."""
    before = linear(opset, rest="boxes = LeakyRelu(h)")
    before.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    with pytest.raises(ArtefactError, match=rf"opset {opset}, and this loss needs {needed}; conv"):
        attach(before, "boxes", T, spec)
    after = attach(before, "boxes", T, spec, convert_opset=True)
    assert _opsets(after)[""] == needed
    outputs = untouched(before, after, x=np.ascontiguousarray(X[:1]))
    assert_loss(spec, outputs, outputs["boxes"], T)


def test_the_functions_of_an_old_model_survive_the_conversion() -> None:
    text = """<ir_version: 8, opset_import: ["" : 12, "mine" : 1]>
    g (float[N, 6] x) => (float[N, 6] boxes) { boxes = mine.Flat(x) }
    <domain: "mine", opset_import: ["" : 12]> Flat (a) => (b) { b = Softmax<axis = 0>(a) }"""
    before = parser.parse_model(text)
    outputs = untouched(
        before, attach(before, "boxes", "gt", convert_opset=True, loss_name="l"), x=X, gt=X
    )
    assert_loss(LossSpec(), {"loss": outputs["l"]}, outputs["boxes"], X)


def test_an_output_whose_type_nothing_tells() -> None:
    before = linear()
    before.graph.output[0].ClearField("type")
    before.graph.node[-1].domain = "com.microsoft"
    before.graph.node[-1].op_type = "Gelu"
    before.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    outputs = run(attach(before, "boxes", "gt", LossSpec(gradient=True)), x=X, gt=T)
    assert_loss(LossSpec(gradient=True), outputs, outputs["boxes"], T)


def test_one_new_input_for_target_and_weight() -> None:
    after = attach(linear(), "boxes", "gt", LossSpec(weight="count"), weight="gt")
    assert [value.name for value in after.graph.input] == ["x", "gt"]
    outputs = untouched(linear(), after, x=X, gt=T)
    expected = eager_outputs(LossSpec(weight="count"), outputs["boxes"], T, weight=T)["loss"]
    assert int(ulp_distance(outputs["loss"], expected)) <= 4


def test_an_optional_output_left_out_keeps_no_node() -> None:
    body = (
        'g (float[N, 6] x) => (float[N, 6] boxes) { m, junk = TopK(x, k) boxes = Clip(x, "", c) }'
    )
    before = model_of(body, k=np.array([1]), c=np.array(1, np.float32))
    before.graph.node[0].output[0] = ""
    after = attach(before, "boxes", "gt", only_loss=True)
    assert "TopK" not in {node.op_type for node in after.graph.node}


def test_the_model_given_stays_as_it_was() -> None:
    before = linear()
    bytes_before = before.SerializeToString()
    attach(before, "boxes", "gt", LossSpec(gradient=True))
    assert before.SerializeToString() == bytes_before


@pytest.mark.parametrize("step", ["inlined", "convert"])
def test_more_than_protobuf_reads_is_refused_where_a_step_takes_bytes(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("smoothl1_deploy.graph.hosted")
    monkeypatch.setattr(module, "_PARSED", 64)
    with pytest.raises(ArtefactError, match=r"and .* takes 64 at most .*load_external_data=False"):
        if step == "inlined":
            attach(linear(), "boxes", "gt", route="inlined")
        else:
            attach(linear(11), "boxes", "gt", convert_opset=True)
    assert attach(linear(), "boxes", "gt").functions  # which takes none
