"""The adapter on every version of TensorRT: the real names, a fake behaviour.

tensorrt 10.x and 11.x can't be installed without a GPU machine; api/*.json holds the attribute
names of their real bindings, and the fake made of them has no other.
"""

from __future__ import annotations

import dataclasses

import pytest

from smoothl1_deploy import LossSpec, build_engine, export
from smoothl1_deploy.errors import BuildError, SpecError
from smoothl1_deploy.tensorrt import _build as build
from smoothl1_deploy.tensorrt._engine import diagnose
from smoothl1_deploy.tensorrt._flavour import Gpu
from smoothl1_deploy.tensorrt._options import BuildOptions

VERSIONS = ("10.0.1", "10.4.0", "10.9.0", "10.16.1", "11.4.0", "rtx-1.7.1")


@pytest.mark.parametrize("version", VERSIONS)
def test_an_engine_is_built_by_the_names_of_every_version(fake, mean_model, version):
    """Fails where the adapter touches a name that the version lacks."""
    flavour = fake(version)
    options = BuildOptions(["8.6"] if version.startswith("rtx") else [])
    engine = build_engine(mean_model, flavour=flavour, options=options)
    assert (engine.sidecar.flavour, engine.sidecar.version) == (flavour.name, flavour.version)
    assert [p.dtype for p in engine.sidecar.inputs] == ["float32", "float32"]
    assert diagnose(engine.data, flavour) == ()
    broken = export(LossSpec(reduction="none"), "inlined", ("N",))
    broken.graph.node[0].op_type = "Foo"
    del broken.metadata_props[:]
    with pytest.raises(BuildError, match=r"\(operator Foo\): UNSUPPORTED_NODE: no importer"):
        build_engine(broken, flavour=flavour)


def test_the_recorded_names_are_those_of_the_installed_rtx(rtx, fake_trt):
    if not rtx.version.startswith("1.7.1"):
        pytest.skip(f"api/ describes 1.7.1, installed is {rtx.version}")
    for cls, names in fake_trt.FakeTensorRT("rtx-1.7.1").api.items():
        real = getattr(rtx.trt, cls)
        assert [name for name in names if not hasattr(real, name)] == []
        if isinstance(names, dict):
            assert {name: int(member) for name, member in real.__members__.items()} == names


def test_fake_and_real_rtx_give_the_same_sidecar(rtx, fake, mean_model):
    """The fake is as good as the real one in everything the sidecar says."""
    options = BuildOptions(["8.6", "12.0"])
    real, made = (
        build_engine(mean_model, flavour=flavour, options=options, profile={"input": (0, 2, 4)})
        for flavour in (rtx, dataclasses.replace(fake("rtx-1.7.1"), version=rtx.version))
    )
    ours = {"engine_sha256": "", "engine_bytes": 0, "build_seconds": 0.0, "built_at": ""}
    assert dataclasses.replace(real.sidecar, **ours) == dataclasses.replace(made.sidecar, **ours)


def test_networks_are_strongly_typed_by_the_number_of_their_version(fake, mean_model, monkeypatch):
    for version, flags in (("10.16.1", 2), ("11.4.0", 1), ("rtx-1.7.1", 1)):
        flavour, seen = fake(version), []
        create = flavour.trt.Builder.create_network
        monkeypatch.setattr(
            flavour.trt.Builder,
            "create_network",
            lambda self, f, create=create, seen=seen: seen.append(f) or create(self, f),
        )
        build_engine(mean_model, flavour=flavour)
        assert seen == [flags]


def test_strict_nans_lacking_is_noted(fake, mean_model):
    notes = build_engine(mean_model, flavour=fake("10.4.0")).sidecar.notes
    assert notes[-1] == "tensorrt 10.4.0 has no STRICT_NANS: it may reorder operations on NaN"
    assert "STRICT_NANS" not in str(build_engine(mean_model, flavour=fake("10.9.0")).sidecar.notes)


def test_what_tensorrt_refuses_is_told_with_its_reason(fake, mean_model, fake_trt, monkeypatch):
    """A bad profile in two ways, and a build that returns None."""

    def raises(self, *args):
        raise ValueError("Dimensions do not satisfy the constraints")

    def returns_none(self, network, config):
        fake_trt.say(self._logger, "ERROR", "out of tactics")

    for of, name, put, error, message in (
        ("IBuilderConfig", "add_optimization_profile", lambda *_: -1, SpecError, "input=1x16,64x1"),
        ("IOptimizationProfile", "set_shape", raises, SpecError, "do not satisfy the constraints"),
        ("Builder", "build_serialized_network", returns_none, BuildError, ": out of tactics"),
    ):
        flavour = fake("11.4.0")
        monkeypatch.setattr(getattr(flavour.trt, of), name, put)
        said = "refused the profile" if error is SpecError else "can't build 'smooth_l1"
        with pytest.raises(error, match=rf"^tensorrt 11\.4\.0 {said}.*{message}"):
            build_engine(mean_model, flavour=flavour)


def test_the_gpu_is_part_of_the_key(fake, mean_model, tmp_path, monkeypatch):
    def use(driver):
        monkeypatch.setattr(build, "current_gpu", lambda: Gpu("NVIDIA L4", "8.9", driver))

    def made(flavour):
        return build_engine(mean_model, flavour=flavour, cache_dir=tmp_path)

    full, rtx = fake("10.16.1"), fake("rtx-1.7.1")
    use("580.1")
    assert made(full).sidecar.gpu == Gpu("NVIDIA L4", "8.9", "580.1")
    made(rtx)
    assert made(full).cached
    use("590.2")
    again = made(full)
    assert not again.cached
    assert again.changed == (
        "gpu: name=NVIDIA L4 compute_capability=8.9 driver=580.1 -> "
        "name=NVIDIA L4 compute_capability=8.9 driver=590.2",
    )
    # rtx builds for the compute capabilities it is told, whatever GPU is here.
    assert made(rtx).cached
