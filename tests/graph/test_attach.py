"""`attach`: what it adds, what it leaves, what it refuses; `test_attach_models.py` has the kinds."""

# ruff: noqa: E501 (a table of refusals reads best in rows)

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from handmade import Array, assert_kept, assert_near, model_of, run
from onnx import helper

from smoothl1_deploy import LossSpec, attach, export
from smoothl1_deploy.errors import ArtefactError, SpecError
from smoothl1_deploy.graph._metadata import read_spec
from smoothl1_deploy.reference._module import eager_outputs

W, X, T = (
    np.random.default_rng(seed).standard_normal(shape).astype("f4")
    for seed, shape in enumerate(((6, 4), (5, 6), (5, 4)))
)
GRADIENT = LossSpec(gradient=True)


def linear(opset: int = 18, ir: int = 8, rest: str = "boxes = Relu(h)") -> onnx.ModelProto:
    body = f"g (float[N, 6] x) => (float[N, 4] boxes) {{ h = MatMul(x, w) {rest} }}"
    return model_of(body, opset, ir, w=W)


def untouched(before: onnx.ModelProto, after: onnx.ModelProto, **feeds: Array) -> dict[str, Array]:
    """Outputs that were there before are bit-identical; gives all outputs of `after`."""
    onnx.checker.check_model(after, full_check=True)
    known = {value.name for value in before.graph.input}
    new = run(after, feeds)
    assert_kept(run(before, {k: v for k, v in feeds.items() if k in known}), new)
    return new


def assert_loss(
    spec: LossSpec, outputs: dict[str, Array], prediction: Array, target: Array, *weight: Array
) -> None:
    for name, expected in eager_outputs(spec, prediction, target, *weight).items():
        assert_near(outputs[name], expected, 4, (spec, name))


def test_every_spec_on_outputs_internal_tensors_and_inputs() -> None:
    for spec in (
        LossSpec(reduction="sum", per_sample=True),
        LossSpec(0.1, per_sample=True, gradient=True),
        LossSpec(0.0, gradient=True),
        LossSpec(2.0, "none", gradient=True),
    ):
        for prediction, truth in (("boxes", T), ("h", T), ("x", X[::-1].copy())):
            after = attach(linear(), prediction, "gt", spec)
            outputs = untouched(linear(), after, x=X, gt=truth)
            h = run(linear(rest="boxes = Identity(h)"), {"x": X})["boxes"]
            assert_loss(spec, outputs, {"x": X, "h": h, **outputs}[prediction], truth)


def test_several_losses_in_one_model() -> None:
    one = attach(linear(), "boxes", "gt", LossSpec(0.5))
    two = attach(one, "h", "gt", LossSpec(2.0, "sum", gradient=True), loss_name="coarse")
    three = attach(two, "boxes", "gt", LossSpec(0.0))
    names = ["boxes", "loss", "coarse", "grad_input", "loss_1"]
    assert [output.name for output in three.graph.output] == names
    outputs = untouched(linear(), three, x=X, gt=T)
    assert_loss(LossSpec(0.5), outputs, outputs["boxes"], T)
    assert_loss(LossSpec(0.0), {"loss": outputs["loss_1"]}, outputs["boxes"], T)
    assert '"coarse"' in next(e.value for e in three.metadata_props if e.key.endswith("attached"))
    assert [e.domain for e in three.opset_import].count("smoothl1_deploy") == 1
    assert len({(f.domain, f.name) for f in three.functions}) == len(three.functions)
    bare = export(LossSpec(reduction="none"), shape=("N", 4))
    assert read_spec(attach(bare, "loss", "gt")) is None  # it isn't that loss any more


def test_names_that_are_taken_are_avoided_the_same_way_each_time() -> None:
    before = linear(
        rest="loss = Relu(h) grad_input = Abs(loss) beta = Neg(h) boxes = Identity(loss)"
    )
    given = before.SerializeToString()
    spec = LossSpec(gradient=True, runtime_beta=True)
    one, two = attach(before, "boxes", "gt", spec), attach(before, "boxes", "gt", spec)
    assert one.SerializeToString() == two.SerializeToString()
    assert before.SerializeToString() == given
    assert [o.name for o in one.graph.output] == ["boxes", "loss_1", "grad_input_1"]
    assert [i.name for i in one.graph.input] == ["x", "gt", "beta_1"]
    outputs = untouched(before, one, x=X, gt=T, beta_1=np.array(1, np.float32))
    assert_loss(LossSpec(), {"loss": outputs["loss_1"]}, outputs["boxes"], T)
    after = attach(linear(), "boxes", "loss")  # taken by the target's own input
    assert [o.name for o in after.graph.output] == ["boxes", "loss_1"]


def test_names_below_the_loss_s_own_are_avoided() -> None:
    """The tensors in between are called `loss/...`, and so may one of the model's be."""
    before = linear(rest="losses = Relu(h) boxes = Identity(losses)")
    initialisers = attach(before, "boxes", "gt", GRADIENT).graph.initializer
    (inner,) = (tensor.name for tensor in initialisers if "/" in tensor.name)
    before.graph.node[1].output[0] = before.graph.node[2].input[0] = inner
    outputs = untouched(before, attach(before, "boxes", "gt", GRADIENT), x=X, gt=T)
    assert_loss(GRADIENT, outputs, outputs["boxes"], T)


def test_weights_are_an_input_a_constant_or_the_target_itself() -> None:
    spec = LossSpec(0.5, weight="weights")
    weights = np.abs(T) + 0.5
    for given, feeds in (("w8", {"w8": weights}), (weights, {}), ("gt", {})):
        after = attach(linear(), "boxes", "gt", spec, weight=given)
        assert [value.name for value in after.graph.input] == ["x", "gt", *feeds]
        outputs = untouched(linear(), after, x=X, gt=weights, **feeds)
        assert_loss(spec, outputs, outputs["boxes"], weights, weights)


def test_integers_and_narrower_floats_are_widened_and_nothing_is_narrowed() -> None:
    for target in (np.arange(20, dtype=np.int64).reshape(5, 4), T.astype(np.float16)):
        outputs = untouched(linear(), attach(linear(), "boxes", target), x=X)
        assert_loss(LossSpec(), outputs, outputs["boxes"], target.astype(np.float32))
    wide, target = LossSpec(dtype="float64"), T.astype(np.float64)
    outputs = untouched(linear(), attach(linear(), "boxes", target, wide), x=X)
    assert_loss(wide, outputs, outputs["boxes"].astype(np.float64), target)
    with pytest.raises(SpecError, match=r"float64, and float32 would lose.*dtype float64"):
        attach(linear(), "boxes", target)
    for own, other in (("float16", "bfloat16"), ("bfloat16", "float16")):
        model = model_of(f"g ({own}[N, 4] x) => ({own}[N, 4] boxes) {{ boxes = Relu(x) }}")
        with pytest.raises(SpecError, match=f"is {other}, and {own} would lose some of it"):
            attach(model, "boxes", T.astype(other))


BRANCH = """g (float[N, 6] x, bool c) => (float[N, 4] boxes) {
    h = MatMul(x, w)
    boxes = If (c) <
        then_branch = t () => (float[N, 4] a) { a = Relu(h) },
        else_branch = e () => (float[N, 4] b) { b = Neg(h) }
    > }"""


def test_only_the_loss_keeps_no_node_that_it_does_not_need() -> None:
    h = run(linear(rest="boxes = Identity(h)"), {"x": X})["boxes"]
    before = linear(rest="boxes = Relu(h) junk = Exp(boxes)")
    after = attach(before, "h", "gt", only_loss=True)
    assert [o.name for o in after.graph.output] == ["loss"]
    assert not {"Relu", "Exp"} & {node.op_type for node in after.graph.node}
    assert_loss(LossSpec(), run(after, {"x": X, "gt": T}), h, T)
    after = attach(model_of(BRANCH, w=W), "boxes", "gt", only_loss=True)  # what a branch reads too
    assert_loss(LossSpec(), run(after, {"x": X, "gt": T, "c": np.array(False)}), -h, T)
    after = attach(model_of(BRANCH, w=W), "h", "gt", only_loss=True)
    assert [value.name for value in after.graph.input] == ["x", "gt"]
    body = 'g (float[N, 6] x) => (float[N, 6] y) { m, junk = TopK(x, k) y = Clip(x, "", c) }'
    before = model_of(body, k=np.array([1]), c=np.array(1, np.float32))
    before.graph.node[0].output[0] = ""  # left out, as the input of Clip is
    after = attach(before, "y", "gt", only_loss=True)
    assert "TopK" not in {node.op_type for node in after.graph.node}


def test_a_prediction_whose_rank_or_type_nothing_tells() -> None:
    no_rank, no_type = linear(), linear()
    for value in (*no_rank.graph.input, *no_rank.graph.output):
        value.type.tensor_type.ClearField("shape")
    no_type.graph.output[0].ClearField("type")
    no_type.graph.node[-1].domain, no_type.graph.node[-1].op_type = "com.microsoft", "Gelu"
    no_type.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    for before in (no_rank, no_type):
        outputs = run(attach(before, "boxes", "gt", GRADIENT), {"x": X, "gt": T})
        assert_loss(GRADIENT, outputs, outputs["boxes"], T)


SEQUENCE = """g (float[N, 4] x) => (float[N, 4] boxes, seq(float[N, 4]) s) {
    s = SequenceConstruct(x)
    boxes = Relu(x) }"""
MAPS = """g (float[N, 4] x) => (seq(map(int64, float[])) scores) {
    p = Softmax(x)
    scores = ai.onnx.ml.ZipMap<classlabels_int64s = [0, 1, 2, 3]>(p) }"""
HIDDEN = "g (float[N, 4] x) => (float[N, 4] y) { s = SequenceConstruct(x) y = SequenceAt(s, i) }"
NAMESAKE = """g (float[N, 6] x) => (float[N, 6] boxes) { boxes = smoothl1_deploy.SmoothL1Loss(x) }
    <domain: "smoothl1_deploy", opset_import: ["" : 18]> SmoothL1Loss (a) => (b) { b = Neg(a) }"""

REFUSED: list[tuple[str, Callable[[], object], str]] = [
    ("close matches first", lambda: attach(linear(), "boxs", "gt"), r"no tensor 'boxs' to be the prediction; it has 'boxes', "),
    ("an old opset", lambda: attach(linear(12), "boxes", "gt"), r"of opset 12, and this loss needs 13.*with convert_opset, or"),
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
    ("a sequence of maps", lambda: attach(model_of(MAPS, imports=', "ai.onnx.ml" : 3'), "scores", "gt"), "'scores' is .* but of the type sequence; name one that is, 'p' for instance"),
    ("an optional input", lambda: attach(model_of("g (float[N] x, optional(float[N]) o) => (float[N] y) { y = Relu(x) }"), "o", "gt"), "'o' is .* but of the type optional; name one that is$"),
    ("the prediction as its own target", lambda: attach(linear(), "boxes", "boxes"), "target 'boxes' is the prediction itself, and such a loss is 0"),
    ("an array for the prediction", lambda: attach(linear(), T, "boxes"), "the prediction must be the name of a tensor, got"),  # type: ignore[arg-type]
    ("a function of our name", lambda: attach(model_of(NAMESAKE, imports=', "smoothl1_deploy" : 1'), "boxes", "gt", LossSpec(reduction="none")), "a function smoothl1_deploy.SmoothL1Loss that computes something else"),
    ("a model without tensors", lambda: attach(onnx.ModelProto(), "boxes", "gt"), "it has none at all"),
    ("rank 0 per sample", lambda: attach(model_of("g (float x) => (float y) { y = Neg(x) }"), "y", "gt", LossSpec(per_sample=True)), "rank 0"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "text"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED]
)
def test_what_is_refused(call: Callable[[], object], text: str) -> None:
    with pytest.raises((SpecError, ArtefactError), match=text):
        call()


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


def test_an_old_opset_is_converted_to_the_lowest_that_the_loss_needs() -> None:
    """A gradient of what a constant was broadcast with needs a Reshape of opset 14."""
    for opset, spec, needed in (
        (7, LossSpec(), 13),
        (12, LossSpec(0.5, "none", gradient=True), 14),
        (13, GRADIENT, 14),
    ):
        before = linear(opset, rest="boxes = LeakyRelu(h)")
        before.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        with pytest.raises(ArtefactError, match=rf"opset {opset}, and this loss needs {needed}; c"):
            attach(before, "boxes", T, spec)
        after = attach(before, "boxes", T, spec, convert_opset=True)
        assert {e.version for e in after.opset_import if not e.domain} == {needed}
        outputs = untouched(before, after, x=X[:1])
        assert_loss(spec, outputs, outputs["boxes"], T)


def test_the_functions_of_an_old_model_survive_the_conversion() -> None:
    text = """g (float[N, 6] x) => (float[N, 6] boxes) { boxes = mine.Flat(x) }
    <domain: "mine", opset_import: ["" : 12]> Flat (a) => (b) { b = Softmax<axis = 0>(a) }"""
    before = model_of(text, 12, imports=', "mine" : 1')
    after = attach(before, "boxes", "gt", convert_opset=True, loss_name="l")
    outputs = untouched(before, after, x=X, gt=X)
    assert_loss(LossSpec(), {"loss": outputs["l"]}, outputs["boxes"], X)


def test_more_than_protobuf_reads_is_refused_where_a_step_takes_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("smoothl1_deploy.graph._attach._PARSED", 64)
    for opset, how in ((18, {"route": "inlined"}), (11, {"convert_opset": True})):
        with pytest.raises(
            ArtefactError, match=r"takes 64 at most .*onnx.load without external data"
        ):
            attach(linear(opset), "boxes", "gt", **how)
    assert attach(linear(), "boxes", "gt").functions  # which takes none
