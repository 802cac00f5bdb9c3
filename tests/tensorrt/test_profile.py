"""Optimization profiles: the forms of a request, what is filled in, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy.errors import SpecError
from smoothl1_deploy.tensorrt._profile import (
    InputShape,
    Profile,
    input_shapes,
    resolve_profile,
    wide_profile,
)

SAME = (InputShape("input", ("N", 16)), InputShape("target", ("N", 16)))
ROWS = ((1, 16), (64, 16), (4096, 16))


def shapes(**dims):
    return tuple(InputShape(name, axes) for name, axes in dims.items())


def test_the_forms_mean_the_same():
    for request in (
        "input=1x16,64x16,4096x16",
        ["input=1x16,64x16,4096x16"],
        "input:1x16,64x16,4096x16",
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
        assert Profile.from_dict(found.to_dict()) == found


#: What is asked for, of which inputs, and the profile.
FILLED = {
    "one shape stands for all three, and target follows": (
        "input=8x16",
        SAME,
        "input=8x16,8x16,8x16 target=8x16,8x16,8x16",
    ),
    "target follows without names too": (
        {"input": (2, 4, 8)},
        shapes(input=(None, 16), target=(None, 16)),
        "input=2x16,4x16,8x16 target=2x16,4x16,8x16",
    ),
    "but not where its shape is another": (
        {"input": (2, 4, 8)},
        shapes(input=(None, 16), target=(None, 1)),
        "input=2x16,4x16,8x16 target=1x1,64x1,4096x1 (default 1, 64, 4096 for target[0])",
    ),
    "an axis follows its name": (
        {"input": (2, 4, 8)},
        shapes(input=("N", 16), target=("N", 1)),
        "input=2x16,4x16,8x16 target=2x1,4x1,8x1",
    ),
    "what nothing is said of takes the default, which is named": (
        {"input": (2, 4, 8)},
        shapes(input=("N", 16), x=(None, "M")),
        "input=2x16,4x16,8x16 x=1x1,64x64,4096x4096 (default 1, 64, 4096 for x[0], M)",
    ),
    "no default asks for more than a gibibyte of float32, nor does what shares an axis's name": (
        None,
        shapes(images=("N", 3, 640, 640), boxes=("N", 4)),
        "boxes=1x4,64x4,218x4 images=1x3x640x640,64x3x640x640,218x3x640x640 "
        "(default 1, 64, 4096 for N)",
    ),
    "an empty axis is a size": (
        {"x": (0, 0, 8)},
        shapes(x=("N", 16)),
        "x=0x16,0x16,8x16",
    ),
    "static inputs need none": (None, shapes(input=(4, 16), target=(4, 16)), "static"),
    "and may be named": ("input=4x16", shapes(input=(4, 16), target=(4, 16)), "static"),
}


@pytest.mark.parametrize("case", FILLED)
def test_what_is_left_open_is_filled_in(case):
    request, inputs, text = FILLED[case]
    assert str(resolve_profile(request, inputs)) == text


def test_shapes_are_read_from_the_graph():
    model = export(LossSpec(reduction="none"), shape=("N", 16), target_shape=(16,))
    assert [str(s) for s in input_shapes(model)] == ["input[N, 16]", "target[16]"]


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
def test_a_profile_that_makes_no_sense_is_refused(case):
    request, message = REFUSED[case]
    with pytest.raises(SpecError) as caught:
        resolve_profile(request, SAME)
    assert message in str(caught.value)


def test_three_values_need_one_dynamic_axis_and_a_name_one_range():
    for dims, request, message in (
        (("N", "M"), (1, 2, 3), "gives one axis, and 2 of its axes are dynamic; give three"),
        ((4, 16), (1, 2, 3), r"x\[4, 16\] has no dynamic axis; leave it out"),
        (("N", "N"), ((1, 1), (2, 2), (4, 8)), r"'N' has the range \(1, 2, 4\) .* \(1, 2, 8\)"),
    ):
        with pytest.raises(SpecError, match=message):
            resolve_profile({"x": request}, shapes(x=dims))


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
