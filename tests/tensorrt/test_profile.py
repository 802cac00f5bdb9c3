"""Optimization profiles: the forms of a request, what is filled in, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy.errors import SpecError
from smoothl1_deploy.tensorrt.profile import (
    InputShape,
    Profile,
    input_shapes,
    resolve_profile,
    wide_profile,
)

SAME = (InputShape("input", ("N", 16)), InputShape("target", ("N", 16)))
ROWS = ((1, 16), (64, 16), (4096, 16))


def test_the_forms_mean_the_same():
    for request in (
        "input=1x16,64x16,4096x16",
        ["input=1x16,64x16,4096x16"],
        {"input": (1, 64, 4096)},
        {"input": [1, 64, 4096]},
        {"input": ROWS},
        {"input": [np.int64(1), np.int32(64), 4096]},
        {"target": (1, 64, 4096)},
        {"input": (1, 64, 4096), "target": ROWS},
        ["input=1x16,64x16,4096x16", "target=1x16,64x16,4096x16"],
    ):
        found = resolve_profile(request, SAME)
        assert found == Profile({"input": ROWS, "target": ROWS}), request


def test_one_shape_stands_for_all_three():
    profile = resolve_profile("input=8x16", SAME)
    assert profile.ranges["input"] == ((8, 16),) * 3 == profile.ranges["target"]


def test_target_follows_input_without_names_too():
    pair = (InputShape("input", (None, 16)), InputShape("target", (None, 16)))
    assert resolve_profile({"input": (2, 4, 8)}, pair).ranges["target"] == (
        (2, 16),
        (4, 16),
        (8, 16),
    )
    other = (pair[0], InputShape("target", (None, 1)))
    assert resolve_profile({"input": (2, 4, 8)}, other).defaults == ("target[0]",)


def test_defaults_are_named():
    profile = resolve_profile(None, SAME)
    assert profile == Profile({"input": ROWS, "target": ROWS}, ("N",))
    assert str(profile).endswith("(default 1, 64, 4096 for N)")


def test_an_axis_follows_its_name():
    inputs = (InputShape("input", ("N", 16)), InputShape("target", ("N", 1)))
    profile = resolve_profile({"input": (2, 4, 8)}, inputs)
    assert profile == Profile(
        {"input": ((2, 16), (4, 16), (8, 16)), "target": ((2, 1), (4, 1), (8, 1))}
    )


def test_what_has_no_name_and_no_request_takes_the_default():
    inputs = (InputShape("input", ("N", 16)), InputShape("x", (None, "M")))
    profile = resolve_profile({"input": (2, 4, 8)}, inputs)
    assert profile.ranges["x"] == ((1, 1), (64, 64), (4096, 4096))
    assert profile.defaults == ("x[0]", "M")


def test_static_inputs_need_none():
    inputs = (InputShape("input", (4, 16)), InputShape("target", (4, 16)))
    assert resolve_profile(None, inputs) == Profile({}) == resolve_profile("input=4x16", inputs)
    assert str(Profile({})) == "static"


def test_an_empty_axis_is_a_size():
    assert resolve_profile({"input": (0, 0, 8)}, SAME).ranges["input"][0] == (0, 16)


def test_shapes_are_read_from_the_graph():
    model = export(LossSpec(reduction="none"), shape=("N", 16), target_shape=(16,))
    assert [str(s) for s in input_shapes(model)] == ["input[N, 16]", "target[16]"]


def test_round_trip():
    profile = resolve_profile(None, SAME)
    assert Profile.from_dict(profile.to_dict()) == profile


REFUSED = {
    "unknown input": (
        "inptu=1x16",
        "names the input 'inptu'; the model's inputs are input[N, 16],",
    ),
    "min above opt": ("input=8x16,4x16,16x16", "has 8, 4, 16 on axis 0; 0 <= min <= opt <= max"),
    "opt above max": ({"input": (1, 9, 8)}, "has 1, 9, 8 on axis 0"),
    "negative": ({"input": (-1, 1, 8)}, "has -1, 1, 8 on axis 0"),
    "rank": ("input=1,2,3", "has a shape of rank 1, and input[N, 16] is of rank 2"),
    "fixed axis": (
        "input=1x16,2x16,4x8",
        "has the size 8 on axis 1, which input[N, 16] fixes at 16",
    ),
    "two shapes": ("input=1x16,2x16", "has 2 shapes, not 1 or 3"),
    "no shapes": ("input", "can't read the profile 'input'"),
    "no input": ("=1x16", "can't read the profile '=1x16'"),
    "no numbers": ("input=1xN", "can't read the shapes of the profile 'input=1xN'"),
    "no text": ([3], "can't read the profile 3"),
    "twice": (["input=1x16", "input=2x16"], "two profiles for the input 'input'"),
    "one number": ({"input": 4}, "can't read the profile 4 of the input 'input'"),
    "a string in a mapping": ({"input": "abc"}, "can't read the profile 'abc'"),
    "fractions": ({"input": (1, 2.5, 4)}, "can't read the profile (1, 2.5, 4)"),
    "booleans": ({"input": (True, True, True)}, "can't read the profile (True, True, True)"),
    "mixed": ({"input": (1, (2, 16), 4)}, "can't read the profile"),
    "contradiction": (
        {"input": (1, 2, 4), "target": (1, 2, 8)},
        "the dimension 'N' has the range (1, 2, 4) through 'input' and (1, 2, 8) through 'target'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    request, message = REFUSED[case]
    with pytest.raises(SpecError) as caught:
        resolve_profile(request, SAME)
    assert message in str(caught.value)


def test_three_values_need_one_dynamic_axis():
    two = (InputShape("input", ("N", "M")),)
    with pytest.raises(
        SpecError, match="gives one axis, and 2 of its axes are dynamic; give three"
    ):
        resolve_profile({"input": (1, 2, 3)}, two)
    none = (InputShape("input", (4, 16)),)
    with pytest.raises(SpecError, match=r"input\[4, 16\] has no dynamic axis; leave it out"):
        resolve_profile({"input": (1, 2, 3)}, none)


def test_one_name_within_one_input():
    square = (InputShape("x", ("N", "N")),)
    with pytest.raises(SpecError, match=r"'N' has the range \(1, 2, 4\) .* and \(1, 2, 8\)"):
        resolve_profile("x=1x1,2x2,4x8", square)


# The profile of the backends


def test_the_wide_profile_reaches_from_empty_to_2_26_elements():
    for dims, ranges in (
        (("N", 16), ((0, 16), (64, 16), (1 << 22, 16))),
        (("N", 3, "H", "W"), ((0, 3, 0, 0), (64, 3, 64, 64), (281, 3, 281, 281))),
        (("N", 0), ((0, 0), (64, 0), (1 << 26, 0))),
    ):
        assert wide_profile((InputShape("input", dims),)) == {"input": ranges}
    # One name has one range; what is fixed has none.
    shapes = (InputShape("input", ("N", 16)), InputShape("target", ("N",)), InputShape("beta", ()))
    found = wide_profile(shapes)
    assert found["target"] == ((0,), (64,), (1 << 22,))
    assert [*found] == ["input", "target"]
