"""`compare`: two artefacts on the same data."""

from __future__ import annotations

import numpy as np
import pytest
from handmade import detector, model_of

from smoothl1_deploy import LossSpec, compare, export
from smoothl1_deploy._floats import NUMPY_DTYPE
from smoothl1_deploy.errors import ArtefactError, InvalidInputError, SpecError
from smoothl1_deploy.parity._differences import difference

PAIR = dict(zip(("input", "target"), np.random.default_rng(0).normal(size=(2, 8, 4)), strict=True))
PAIR = {name: array.astype("f4") for name, array in PAIR.items()}


def floats(*numbers: float, dtype: str = "float32") -> np.ndarray:
    return np.array(numbers, NUMPY_DTYPE[dtype])


def test_a_distance_is_told_with_where_it_is() -> None:
    a = floats(1, 2, np.nan, np.inf, 0)
    b = floats(1, 2, np.nan, np.inf, 0)
    assert (found := difference(a, b)).at is None and not found.other_bits and found.within(0)
    b[1] = np.nextafter(np.nextafter(b[1], np.float32(3)), np.float32(3))
    b[0] = np.nextafter(b[0], np.float32(0))
    found = difference(a, b)
    assert (found.elements, found.other_bits, found.other_class, found.ulp) == (5, 2, 0, 2)
    assert found.at == (1,) and found.values == ("2.0", "2.0000005")
    assert found.within(None) and found.within(2) and not found.within(1)


@pytest.mark.parametrize("dtype", [*NUMPY_DTYPE])
def test_another_class_is_never_within_and_is_the_worst(dtype: str) -> None:
    a = floats(1, 0, np.nan, np.inf, 1, dtype=dtype)
    for index, number in ((1, -0.0), (1, 1e-4), (2, 1), (3, np.nan), (3, -np.inf)):
        b = a.copy()
        b[index], b[4] = number, 1.5
        found = difference(a, b)
        assert (found.other_class, found.other_bits, found.at) == (1, 2, (index,)), (index, number)
        assert not found.within(None)


def test_of_nan_the_payload_counts_among_the_bits_alone() -> None:
    a, b = floats(np.nan), floats(np.nan)
    b.view(np.uint32)[0] ^= 1
    found = difference(a, b)
    assert (found.other_bits, found.other_class, found.ulp) == (1, 0, 0) and found.within(0)


def test_two_formats_are_compared_in_the_narrower() -> None:
    a, b = floats(1 + 2**-12, 65504), floats(1, 65504, dtype="float16")
    assert difference(a, b).dtype == difference(b, a).dtype == "float16"
    assert not difference(a, b).other_bits
    assert difference(floats(1 + 2**-9), floats(1, dtype="float16")).ulp == 2


def test_integers_differ_or_do_not_and_shapes_can_not_be_compared() -> None:
    found = difference(np.array([[1, 2]]), np.array([[1, 3]]))
    assert (found.other_class, found.ulp, found.at) == (1, 0, (0, 1)) and not found.within(None)
    for other, text in (
        (np.array([1, 2]), "int64[1, 2] and int64[2]"),
        (np.array([[1, 2]], "i4"), "int64[1, 2] and int32[1, 2]"),
    ):
        found = difference(np.array([[1, 2]]), other)
        assert found.problem == text and not found.within(None)
    assert difference(floats(), floats()).within(0)


def test_each_artefact_takes_what_it_has_an_input_for() -> None:
    """A model with losses, the model it was, and the same two on another backend."""
    scored, images = detector(), np.ones((2, 3, 8, 8), "f4")
    data = {"images": images, "wide": np.array([4]), "boxes_gt": np.zeros((2, 4), "f4")}
    before = model_of(
        """g (float[N, 3, 8, 8] images) => (float[N, boxes] boxes) {
        flat = Flatten(images) s = Constant<value_ints=[0]>() e = Constant<value_ints=[4]>()
        one = Constant<value_ints=[1]>() boxes = Slice(flat, s, e, one) }"""
    )
    found = compare(scored, before, data)
    assert found.same_bits and [*found.outputs] == ["boxes"]
    assert found.alone == (("loss", "scores"), ())
    found = compare(scored, scored, data, backend=("ort-cpu-bare", "onnx-reference"), ulp=1)
    assert found and [*found.outputs] == ["boxes", "loss", "scores"] and found.to_dict()["ok"]
    with pytest.raises(InvalidInputError, match="boxes_gt is missing; the model takes images"):
        compare(scored, before, {"images": images, "wide": np.array([4])})


def test_a_loss_of_anyone_is_compared_by_what_its_inputs_are() -> None:
    ours = export(LossSpec(0.0), shape=("N", 4))
    text = """g (float[N, 4] y, float[N, 4] y_true) => (float l) {
        d = Sub(y, y_true) a = Abs(d) l = ReduceMean<keepdims=0>(FACTOR) }"""
    theirs = model_of(text.replace("FACTOR", "a"))
    assert compare(ours, theirs, PAIR, ulp=1) and compare(theirs, ours, PAIR, ulp=1)
    squared = model_of(text.replace("FACTOR", "d"))
    assert not compare(ours, squared, PAIR, ulp=1)


def test_beta_and_weight_go_by_their_names_and_floats_in_the_format_of_the_input() -> None:
    spec = LossSpec(weight="count", runtime_beta=True, gradient=True)
    data = {**PAIR, "weight": PAIR["input"], "beta": np.float32(0.5)}
    found = compare(export(spec), export(spec, "inlined"), data, backend="onnx-reference")
    assert [*found.outputs] == ["loss", "grad_input"] and found
    half = compare(export(LossSpec(dtype="float16")), export(LossSpec()), PAIR)
    assert half.outputs["loss"].dtype == "float16" and half


def test_what_can_not_be_compared_is_refused() -> None:
    ours = export(LossSpec(gradient=True))
    other = model_of("g (float[N, 4] input) => (float[N, 4] a, float[N, 4] b) {"
                     "a = Abs(input) b = Neg(input)}")  # fmt: skip
    for arguments, text in (
        ({"second": other}, "no output in common: loss, grad_input and a, b"),
        ({"ulp": -1}, "a distance of -1 ULP can't be"),
        ({"backend": ("ort-cpu",) * 3}, "3 backends for two artefacts"),
    ):
        with pytest.raises((ArtefactError, SpecError), match=text):
            compare(**{"first": ours, "second": ours, "data": PAIR, **arguments})  # type: ignore[arg-type]
