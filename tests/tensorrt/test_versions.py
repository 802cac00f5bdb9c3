"""The adapter on every version of TensorRT: the real names, a fake behaviour.

tensorrt 10.x and 11.x can't be installed without a GPU machine; api/*.json holds the attribute
names of their real bindings, and the fake made of them has no other.
"""

from __future__ import annotations

import dataclasses

import pytest

from smoothl1_deploy import LossSpec, build_engine, export
from smoothl1_deploy.errors import BuildError, SpecError
from smoothl1_deploy.tensorrt import builder, gpu, key
from smoothl1_deploy.tensorrt.engine import diagnose
from smoothl1_deploy.tensorrt.gpu import Gpu, current_gpu
from smoothl1_deploy.tensorrt.options import BuildOptions

VERSIONS = ("10.0.1", "10.4.0", "10.9.0", "10.16.1", "11.4.0", "rtx-1.7.1")

#: What some version lacks, and the adapter therefore asks for before it touches it.
OPTIONAL = {
    ("BuilderFlag", "STRICT_NANS"),  # from 10.9
    ("ComputeCapability", "SM86"),  # rtx
    ("IBuilderConfig", "num_compute_capabilities"),
    ("IBuilderConfig", "set_compute_capability"),
    ("Runtime", "get_engine_validity"),
}


def full_options(version, folder):
    """Every option the version knows."""
    if version.startswith("rtx"):
        return BuildOptions(
            ["8.6"], version_compatible=True, tf32=True, refit=True, strip_plan=True, workspace=1
        )
    return BuildOptions(
        hardware_compatibility="ampere_plus",
        version_compatible=True,
        tf32=True,
        refit=True,
        strip_plan=True,
        workspace=1 << 20,
        timing_cache=str(folder / "timings"),
    )


def exercise(flavour, version, model, folder):
    """Touch everything the adapter can touch."""
    build_engine(model, flavour=flavour)
    engine = build_engine(model, flavour=flavour, options=full_options(version, folder))
    flavour.member("BuilderFlag", "STRICT_NANS")
    diagnose(engine.data, flavour)
    broken = export(LossSpec(reduction="none"), "inlined", ("N",))
    broken.graph.node[0].op_type = "Foo"
    del broken.metadata_props[:]
    with pytest.raises(BuildError, match=r"\(operator Foo\): UNSUPPORTED_NODE: no importer"):
        build_engine(broken, flavour=flavour)
    return engine


@pytest.mark.parametrize("version", VERSIONS)
def test_builds_on(fake, mean_model, tmp_path, version):
    flavour = fake(version)
    engine = exercise(flavour, version, mean_model, tmp_path)
    assert {"REFIT", "STRIP_PLAN", "TF32", "VERSION_COMPATIBLE"} <= set(engine.sidecar.flags)
    assert (engine.sidecar.flavour, engine.sidecar.version) == (flavour.name, flavour.version)
    assert [p.dtype for p in engine.sidecar.inputs] == ["float32", "float32"]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_attribute_touched_is_there(fake, mean_model, tmp_path, version, fake_trt):
    touched = set()
    for other in VERSIONS:
        flavour = fake(other)
        exercise(flavour, other, mean_model, tmp_path)
        touched |= flavour.trt.touched
    assert len(touched) > 40 and touched >= OPTIONAL
    api = fake_trt.FakeTensorRT(version).api
    lacking = {(cls, name) for cls, name in touched if name not in api.get(cls, ())}
    assert lacking <= OPTIONAL


def test_the_names_of_the_installed_rtx(rtx, fake_trt):
    if not rtx.version.startswith("1.7.1"):
        pytest.skip(f"api/ describes 1.7.1, installed is {rtx.version}")
    for cls, names in fake_trt.FakeTensorRT("rtx-1.7.1").api.items():
        real = getattr(rtx.trt, cls)
        assert [name for name in names if not hasattr(real, name)] == []
        if isinstance(names, dict):
            assert {name: int(member) for name, member in real.__members__.items()} == names


def test_fake_and_real_rtx_give_the_same_sidecar(rtx, fake, mean_model):
    """The fake is as good as the real one in everything the sidecar says."""
    options = BuildOptions(["8.6", "12.0"], workspace=1 << 24)
    real, made = (
        build_engine(mean_model, flavour=flavour, options=options, profile={"input": (0, 2, 4)})
        for flavour in (rtx, dataclasses.replace(fake("rtx-1.7.1"), version=rtx.version))
    )
    ours = {"engine_sha256", "engine_bytes", "build_seconds", "built_at"}
    a, b = (
        {k: v for k, v in engine.sidecar.to_dict().items() if k not in ours}
        for engine in (real, made)
    )
    assert a == b


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


# --- three ways to report a bad profile ------------------------------------------------------


def test_a_profile_tensorrt_refuses(fake, mean_model, monkeypatch):
    flavour = fake("11.4.0")
    monkeypatch.setattr(
        flavour.trt.IBuilderConfig, "add_optimization_profile", lambda self, profile: -1
    )
    with pytest.raises(SpecError, match=r"tensorrt 11\.4\.0 refused the profile input=1x16,64x16"):
        build_engine(mean_model, flavour=flavour)


def test_shapes_tensorrt_refuses(fake, mean_model, monkeypatch):
    flavour = fake("11.4.0")

    def set_shape(self, *args):
        raise ValueError("Dimensions do not satisfy the constraints")

    monkeypatch.setattr(flavour.trt.IOptimizationProfile, "set_shape", set_shape)
    with pytest.raises(SpecError, match=r"refused the profile .*do not satisfy the constraints"):
        build_engine(mean_model, flavour=flavour)


def test_a_build_that_returns_none_names_the_reason(fake, mean_model, monkeypatch, fake_trt):
    flavour = fake("11.4.0")

    def fails(self, network, config):
        fake_trt.say(self._logger, "ERROR", "out of tactics")

    monkeypatch.setattr(flavour.trt.Builder, "build_serialized_network", fails)
    with pytest.raises(
        BuildError, match=r"tensorrt 11.4.0 can't build 'smooth_l1.*: out of tactics"
    ):
        build_engine(mean_model, flavour=flavour)


# --- timing cache ----------------------------------------------------------------------------


def build_with_timings(flavour, model, path):
    return build_engine(model, flavour=flavour, options=BuildOptions(timing_cache=str(path)))


def test_the_timing_cache_is_made_and_combined(fake, mean_model, tmp_path):
    path, flavour = tmp_path / "timings", fake("10.16.1")
    build_with_timings(flavour, mean_model, path)
    assert path.read_bytes() == b"|measured"
    build_with_timings(flavour, mean_model, path)
    # What it read, what it measured, and what stood in the file when it wrote.
    assert path.read_bytes() == b"|measured|measured+|measured"


@pytest.mark.parametrize("content", [b"other GPU", b"damaged"])
def test_a_timing_cache_that_does_not_fit_is_noted(fake, mean_model, tmp_path, content):
    path = tmp_path / "timings"
    path.write_bytes(content)
    engine = build_with_timings(fake("10.16.1"), mean_model, path)
    assert f"the timing cache {path} was not used" in str(engine.sidecar.notes)


# --- the GPU is part of the key of tensorrt ---------------------------------------------------


def test_the_gpu_is_part_of_the_key(fake, mean_model, tmp_path, monkeypatch):
    def use(card):
        for module in (builder, key):
            monkeypatch.setattr(module, "current_gpu", lambda: card)

    full, rtx = fake("10.16.1"), fake("rtx-1.7.1")
    card = Gpu("NVIDIA L4", "8.9", "580.1")
    use(card)
    first = build_engine(mean_model, flavour=full, cache_dir=tmp_path)
    build_engine(mean_model, flavour=rtx, cache_dir=tmp_path)
    assert first.sidecar.gpu == card
    assert build_engine(mean_model, flavour=full, cache_dir=tmp_path).cached
    use(Gpu("NVIDIA L4", "8.9", "590.2"))
    again = build_engine(mean_model, flavour=full, cache_dir=tmp_path)
    assert not again.cached
    assert again.changed == (
        "gpu: name=NVIDIA L4 compute_capability=8.9 driver=580.1 -> "
        "name=NVIDIA L4 compute_capability=8.9 driver=590.2",
    )
    # rtx builds for the compute capabilities it is told, whatever GPU is here.
    assert build_engine(mean_model, flavour=rtx, cache_dir=tmp_path).cached


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put a program of that name on PATH."""

    def install(script):
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\n" + script)
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        gpu.current_gpu.cache_clear()

    yield install
    gpu.current_gpu.cache_clear()


def test_the_gpu_is_read_from_nvidia_smi(nvidia_smi, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    nvidia_smi('[ "$3" = --id=2 ] && echo "NVIDIA H100 PCIe, 9.0, 580.65.06"')
    assert current_gpu() == Gpu("NVIDIA H100 PCIe", "9.0", "580.65.06")


@pytest.mark.parametrize("script", ["exit 9", "echo", "echo no devices were found", "exec sleep 0"])
def test_no_gpu(nvidia_smi, script, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvidia_smi(script)
    assert current_gpu() is None


def test_a_hidden_gpu_is_no_gpu(nvidia_smi, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    nvidia_smi('echo "NVIDIA L4, 8.9, 580.1"')
    assert current_gpu() is None
