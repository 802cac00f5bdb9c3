"""Build options: read generously, refused by name where a flavour doesn't know them."""

from __future__ import annotations

import numpy as np
import pytest

from smoothl1_deploy.errors import SpecError, UnsupportedError
from smoothl1_deploy.tensorrt._options import BuildOptions, configure


def test_compute_capabilities_have_one_spelling_and_one_order():
    for text in ("8.6", "86", "SM86", "sm_86", 86, 8.6, [8.6], ("SM86", "8.6")):
        assert BuildOptions(text).compute_capabilities == ("8.6",)
    given = BuildOptions(["12.0", "SM75", "8.6"])
    assert given.compute_capabilities == ("7.5", "8.6", "12.0")
    assert given == BuildOptions([8.6, "75", "120"])


NONSENSE = {
    "can't read the compute capability 'Ampere'": {"compute_capabilities": ["Ampere"]},
    "'current' stands alone": {"compute_capabilities": ["current", "8.6"]},
    "can't read the compute capability True": {"compute_capabilities": True},
    r"must be a list such as .* got array\(8\.6\)": {"compute_capabilities": np.array(8.6)},
    "must be a list such as .* got b'86'": {"compute_capabilities": b"86"},
    "choose one of none, ampere_plus, same_compute_cap": {"hardware_compatibility": "volta"},
    "tf32 must be true or false, got 'yes'": {"tf32": "yes"},
}


@pytest.mark.parametrize("message", NONSENSE)
def test_nonsense_is_refused(message):
    with pytest.raises(SpecError, match=message):
        BuildOptions(**NONSENSE[message])


def test_round_trip_and_options_of_another_version():
    options = BuildOptions(["8.6"], tf32=True)
    assert BuildOptions.from_dict(options.to_dict()) == options
    assert BuildOptions.from_dict({**options.to_dict(), "refit": False, "lean": None}) == options
    with pytest.raises(SpecError, match=r"unknown build option\(s\) turbo, of another version"):
        BuildOptions.from_dict({"turbo": True})


def configured(flavour, **options):
    config = flavour.builder().create_builder_config()
    return config, configure(config, BuildOptions(**options), flavour)


def test_flags_are_set_and_cleared(rtx):
    config, flags = configured(rtx)
    assert flags == ("STRICT_NANS",)
    assert not config.get_flag(rtx.trt.BuilderFlag.TF32)  # TensorRT's own default is on
    assert configured(rtx, tf32=True)[1] == ("STRICT_NANS", "TF32")


def test_rtx_takes_compute_capabilities(rtx):
    config, _ = configured(rtx, compute_capabilities=["12.0", "8.6"])
    wanted = [config.get_compute_capability(i).name for i in range(config.num_compute_capabilities)]
    assert wanted == ["SM86", "SM120"]


def test_the_options_of_tensorrt_arrive(fake):
    config, flags = configured(
        fake("11.4.0"), hardware_compatibility="ampere_plus", version_compatible=True
    )
    assert flags == ("STRICT_NANS", "VERSION_COMPATIBLE")
    assert config.hardware_compatibility_level.name == "AMPERE_PLUS"
    assert configured(fake("10.0.1"))[1] == ()  # STRICT_NANS came with 10.9


def test_what_a_flavour_lacks_is_refused_by_name(rtx, fake):
    for flavour, option, value, message in (
        (rtx, "compute_capabilities", ["9.0"], r"it knows 7\.5, 8\.0, .*Hopper \(9\.0\) runs"),
        (rtx, "compute_capabilities", ["5.0"], r"capability 5\.0; it knows 7\.5, .*12\.1$"),
        (rtx, "hardware_compatibility", "ampere_plus", "is not supported by tensorrt_rtx"),
        (fake("10.16.1"), "compute_capabilities", ["8.6"], "is not supported by tensorrt 10"),
        (
            fake("10.0.1"),
            "hardware_compatibility",
            "same_compute_capability",
            "hardware_compatibility='same_compute_capability' is not supported by tensorrt 10.0.1",
        ),
    ):
        with pytest.raises(UnsupportedError, match=message):
            configured(flavour, **{option: value})
