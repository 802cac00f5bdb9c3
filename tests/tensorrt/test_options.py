"""Build options: read generously, refused by name where a flavour doesn't know them."""

from __future__ import annotations

import numpy as np
import pytest

from smoothl1_deploy.errors import SpecError, UnsupportedError
from smoothl1_deploy.tensorrt.options import BuildOptions, configure


@pytest.mark.parametrize("text", ["8.6", "86", "SM86", "sm_86", 86, 8.6, [8.6], ("SM86", "8.6")])
def test_compute_capabilities_have_one_spelling(text):
    assert BuildOptions(compute_capabilities=text).compute_capabilities == ("8.6",)


def test_compute_capabilities_are_sorted():
    given = BuildOptions(compute_capabilities=["12.0", "SM75", "8.6"])
    assert given.compute_capabilities == ("7.5", "8.6", "12.0")
    assert given == BuildOptions(compute_capabilities=[8.6, "75", "120"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compute_capabilities": ["Ampere"]}, "can't read the compute capability 'Ampere'"),
        ({"compute_capabilities": ["current", "8.6"]}, "'current' stands alone"),
        ({"compute_capabilities": True}, "can't read the compute capability True"),
        ({"compute_capabilities": np.array(8.6)}, r"must be a list such as .* got array\(8\.6\)"),
        ({"compute_capabilities": b"86"}, "must be a list such as .* got b'86'"),
        ({"hardware_compatibility": "volta"}, "choose one of none, ampere_plus, same_compute_cap"),
        ({"workspace": 0}, "workspace must be a number of bytes, 1 to 2.63 - 1, got 0"),
        ({"workspace": True}, "workspace must be a number of bytes, 1 to 2.63 - 1, got True"),
        ({"workspace": 2**63}, "workspace must be a number of bytes, 1 to 2.63 - 1, got 92"),
        ({"tf32": "yes"}, "tf32 must be true or false, got 'yes'"),
        ({"strict_nans": 1}, "strict_nans must be true or false, got 1"),
        ({"refit": None}, "refit must be true or false, got None"),
    ],
)
def test_nonsense_is_refused(fields, message):
    with pytest.raises(SpecError, match=message):
        BuildOptions(**fields)


def test_round_trip():
    options = BuildOptions(["8.6"], tf32=True, workspace=1 << 20)
    assert BuildOptions.from_dict(options.to_dict()) == options
    with pytest.raises(SpecError, match=r"unknown build option\(s\) turbo; upgrade"):
        BuildOptions.from_dict({"turbo": True})


def configured(flavour, **options):
    config = flavour.builder().create_builder_config()
    return config, configure(config, BuildOptions(**options), flavour)


def test_defaults_clear_tf32_and_set_strict_nans(rtx):
    config, flags = configured(rtx)
    assert flags == ("STRICT_NANS",)
    assert not config.get_flag(rtx.trt.BuilderFlag.TF32)  # TensorRT's own default is on


def test_flags_are_set_and_cleared(rtx):
    _, flags = configured(rtx, tf32=True, strict_nans=False, strip_plan=True)
    assert flags == ("STRIP_PLAN", "TF32")


def test_rtx_takes_compute_capabilities(rtx):
    config, _ = configured(rtx, compute_capabilities=["12.0", "8.6"])
    wanted = [config.get_compute_capability(i).name for i in range(config.num_compute_capabilities)]
    assert wanted == ["SM86", "SM120"]


def test_rtx_takes_a_workspace(rtx):
    config, _ = configured(rtx, workspace=123 << 20)
    assert config.get_memory_pool_limit(rtx.trt.MemoryPoolType.WORKSPACE) == 123 << 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"compute_capabilities": ["9.0"]},
            r"can't build for compute capability 9\.0; it knows 7\.5, 8\.0, .*Hopper \(9\.0\) runs",
        ),
        ({"compute_capabilities": ["5.0"]}, r"capability 5\.0; it knows 7\.5, .*12\.1$"),
        (
            {"hardware_compatibility": "ampere_plus"},
            "hardware_compatibility is not supported by .*rtx",
        ),
        ({"timing_cache": "timings"}, "timing_cache has no effect on tensorrt_rtx"),
    ],
)
def test_rtx_refuses_by_name(rtx, options, message):
    with pytest.raises(UnsupportedError, match=message):
        configured(rtx, **options)


def test_tensorrt_refuses_by_name(fake):
    with pytest.raises(
        UnsupportedError, match=r"compute_capabilities is not supported by tensorrt 10"
    ):
        configured(fake("10.16.1"), compute_capabilities=["8.6"])
    with pytest.raises(
        UnsupportedError, match=r"strict_nans is not supported by tensorrt 10\.0\.1"
    ):
        configured(fake("10.0.1"), strict_nans=True)
    with pytest.raises(
        UnsupportedError, match=r"hardware_compatibility='same_compute_capability' is not supported"
    ):
        configured(fake("10.0.1"), hardware_compatibility="same_compute_capability")


def test_what_an_old_version_lacks_is_left_out_by_default(fake):
    assert configured(fake("10.0.1"))[1] == ()
    assert configured(fake("10.0.1"), strict_nans=False)[1] == ()
    assert configured(fake("10.9.0"))[1] == ("STRICT_NANS",)


def test_the_options_of_tensorrt_arrive(fake):
    config, flags = configured(
        fake("11.4.0"),
        hardware_compatibility="ampere_plus",
        version_compatible=True,
        refit=True,
        workspace=77,
    )
    assert flags == ("REFIT", "STRICT_NANS", "VERSION_COMPATIBLE")
    assert config.hardware_compatibility_level.name == "AMPERE_PLUS"
    assert config._extras == {"WORKSPACE": 77}
