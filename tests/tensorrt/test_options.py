"""Build options: read generously, refused by name where a flavour doesn't know them."""

from __future__ import annotations

import numpy as np
import pytest

from smoothl1_deploy.errors import SpecError, UnsupportedError
from smoothl1_deploy.tensorrt._options import BuildOptions, configure


def test_compute_capabilities_have_one_spelling_and_one_order():
    for text in ("8.6", "86", "SM86", "sm_86", 86, 8.6, [8.6], ("SM86", "8.6")):
        assert BuildOptions(text).compute_capabilities == ("8.6",)
    assert BuildOptions(["12.0", "SM75", "8.6"]).compute_capabilities == ("7.5", "8.6", "12.0")


def test_what_is_no_compute_capability_is_refused():
    for given, message in (
        (["Ampere"], "can't read the compute capability 'Ampere'"),
        (["current", "8.6"], "'current' stands alone"),
        (True, "can't read the compute capability True"),
        (np.array(8.6), r"must be a list such as .* got array\(8\.6\)"),
        (b"86", "must be a list such as .* got b'86'"),
    ):
        with pytest.raises(SpecError, match=message):
            BuildOptions(given)


def test_options_of_another_version_are_refused_where_they_were_used():
    options = BuildOptions(["8.6"])
    assert BuildOptions.from_dict(options.to_dict()) == options
    assert BuildOptions.from_dict({**options.to_dict(), "tf32": False, "lean": None}) == options
    with pytest.raises(SpecError, match=r"unknown build option\(s\) tf32, of another version"):
        BuildOptions.from_dict({"tf32": True})


def configured(flavour, *capabilities):
    config = flavour.builder().create_builder_config()
    return config, configure(config, BuildOptions(capabilities), flavour)


def test_nan_is_kept_and_float32_is_not_narrowed(rtx, fake):
    config, flags = configured(rtx)
    assert flags == ("STRICT_NANS",)
    assert not config.get_flag(rtx.trt.BuilderFlag.TF32)  # TensorRT's own default is on
    assert configured(fake("10.0.1"))[1] == ()  # STRICT_NANS came with 10.9


def test_rtx_builds_for_the_compute_capabilities_that_it_is_told(rtx):
    config, _ = configured(rtx, "12.0", "8.6")
    wanted = [config.get_compute_capability(i).name for i in range(config.num_compute_capabilities)]
    assert wanted == ["SM86", "SM120"]


def test_what_a_flavour_lacks_is_refused_by_name(rtx, fake):
    for flavour, capability, message in (
        (rtx, "9.0", r"it knows 7\.5, 8\.0, .*Hopper \(9\.0\) runs"),
        (rtx, "5.0", r"capability 5\.0; it knows 7\.5, .*12\.1$"),
        (fake("10.16.1"), "8.6", "tensorrt 10.* takes no compute capabilities"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            configured(flavour, capability)
