"""The engine cache: each key is built once, hits are sound, what changed is said."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import child
import onnx
import pytest

from smoothl1_deploy import LossSpec, build_engine, export
from smoothl1_deploy._artefact import sidecar_path
from smoothl1_deploy.errors import SpecError
from smoothl1_deploy.tensorrt import _build as module
from smoothl1_deploy.tensorrt._cache import EngineCache, default_cache_dir
from smoothl1_deploy.tensorrt._engine import read_engine, write_engine
from smoothl1_deploy.tensorrt._flavour import Gpu
from smoothl1_deploy.tensorrt._options import BuildOptions

ROOT = Path(__file__).parents[2]


@pytest.fixture
def flavour(fake):
    """A quick one: the cache doesn't care which."""
    return fake("rtx-1.7.1")


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "cache")


def models(count):
    return [export(LossSpec(beta=1.0 + i), shape=("N", 16)) for i in range(count)]


def backdate(entry, seconds):
    then = time.time() - seconds
    os.utime(entry.path, (then, then))


def test_a_hit_is_the_engine_that_was_built_and_is_written_where_it_is_asked_for(
    flavour, cache, mean_model, tmp_path
):
    first = build_engine(mean_model, flavour=flavour, cache_dir=cache)
    second = build_engine(mean_model, flavour=flavour, cache_dir=cache)
    assert (first.cached, second.cached, flavour.trt.built) == (False, True, 1)
    assert second.data == first.data and second.sidecar == first.sidecar
    assert first.path == cache.path(first.sidecar.key) == second.path
    path = tmp_path / "loss.engine"
    written = build_engine(mean_model, path, flavour, cache_dir=cache.root)
    assert written.cached and written.path == path
    for each in (first.path, path):
        assert read_engine(each, flavour=flavour).data == first.data


def test_without_a_cache_nothing_is_kept(flavour, mean_model, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        build_engine(mean_model, flavour=flavour)
    assert flavour.trt.built == 2
    assert list(tmp_path.iterdir()) == []
    assert default_cache_dir().parts[-2:] == ("smoothl1-deploy", "engines")


def test_what_changed_is_said(flavour, cache, mean_model):
    def build(**kwargs):
        model = kwargs.pop("model", mean_model)
        return build_engine(model, cache_dir=cache, **{"flavour": flavour, **kwargs})

    assert build().changed == ()  # the first of its graph name
    assert build(profile={"input": (1, 64, 8192)}).changed == (
        "profile: input=1x16,64x16,4096x16 target=1x16,64x16,4096x16 -> "
        "input=1x16,64x16,8192x16 target=1x16,64x16,8192x16",
    )
    for_one = BuildOptions(["8.6"])
    change = "option compute_capabilities: [] -> ['8.6']"
    assert build(options=for_one).changed == (change,)
    # Compared with the nearest of the three.
    again = build(options=for_one, profile={"input": (1, 64, 8192)})
    assert len(again.changed) == 1
    newer = dataclasses.replace(flavour, version="1.8.0")
    assert build(flavour=newer).changed == ("version: 1.7.1 -> 1.8.0",)
    edited = onnx.ModelProto()
    edited.CopyFrom(mean_model)
    edited.doc_string = "edited"
    del edited.metadata_props[:]
    (change,) = build(model=edited).changed
    assert change.startswith("onnx_sha256: ") and " -> " in change
    assert build(model=models(1)[0]).changed == ()  # another graph name is no relative


def test_a_difference_in_any_part_is_another_engine(flavour, cache, mean_model):
    """Of the tool's version too, which prepares the model."""
    key = build_engine(mean_model, flavour=flavour, cache_dir=cache).sidecar.key
    other = {
        "options": BuildOptions(["8.6"]),
        "profile": dataclasses.replace(key.profile, ranges={}),
        "gpu": Gpu("H100", "9.0", "580"),
    }
    assert cache.get(key).cached
    for field in dataclasses.fields(key):
        changed = dataclasses.replace(key, **{field.name: other.get(field.name, "other")})
        assert cache.get(changed) is None and len(changed.changes(key)) == 1, field.name


def test_a_damaged_entry_is_built_again(flavour, cache, mean_model):
    path = build_engine(mean_model, flavour=flavour, cache_dir=cache).path
    for damage in (
        lambda: path.write_bytes(b"damage"),
        lambda: sidecar_path(path).write_text("{}"),
        lambda: sidecar_path(path).unlink(),
    ):
        damage()
        again = build_engine(mean_model, flavour=flavour, cache_dir=cache)
        assert not again.cached and again.changed == ("the cached engine was damaged",)
        assert build_engine(mean_model, flavour=flavour, cache_dir=cache).cached


def test_a_sound_engine_under_a_false_name_is_no_hit(flavour, cache, mean_model):
    other = build_engine(models(1)[0], flavour=flavour)
    first = build_engine(mean_model, flavour=flavour, cache_dir=cache)
    write_engine(first.path, other.data, other.sidecar)
    assert not build_engine(mean_model, flavour=flavour, cache_dir=cache).cached


# --- many at once ----------------------------------------------------------------------------


def test_a_storm_builds_each_key_once(rtx, cache, monkeypatch):
    """200 threads, 5 keys, the real TensorRT."""
    five, builds = models(5), []
    build = module._build
    monkeypatch.setattr(module, "_build", lambda *args: builds.append(args[2]) or build(*args))
    start = threading.Barrier(200)

    def ask(number):
        start.wait()
        return build_engine(five[number % 5], flavour=rtx, cache_dir=cache)

    with ThreadPoolExecutor(200) as pool:
        engines = list(pool.map(ask, range(200)))
    assert len(builds) == 5 == len({key.digest for key in builds})
    assert sum(not engine.cached for engine in engines) == 5
    for number, engine in enumerate(engines):
        assert engine.data == engines[number % 5].data
    assert len({engine.sha256 for engine in engines}) == 5


SCRIPT = """
import sys
from smoothl1_deploy import LossSpec, build_engine, export
engine = build_engine(
    export(LossSpec(beta=0.5, reduction="mean"), shape=("N", 16)),
    flavour="tensorrt_rtx", cache_dir=sys.argv[1],
)
print(engine.cached, engine.sha256)
"""


def test_processes_build_a_key_once_and_the_same_bytes(rtx, mean_model, tmp_path):
    running = [child.start("-c", SCRIPT, tmp_path) for _ in range(2)]
    answers = [process.communicate(timeout=300)[0].split() for process in running]
    assert sorted(cached for cached, _ in answers) == ["False", "True"]
    cached = build_engine(mean_model, flavour=rtx, cache_dir=tmp_path)
    assert {sha for _, sha in answers} == {cached.sha256}


# --- size ------------------------------------------------------------------------------------


def test_prune_takes_the_least_recently_used(flavour, cache):
    four = models(4)
    for model in four:
        build_engine(model, flavour=flavour, cache_dir=cache)
    by_name = {entry.sidecar.graph_name: entry for entry in cache.list()}
    order = [by_name[model.graph.name] for model in four]
    for age, entry in enumerate(reversed(order)):
        backdate(entry, 100 * (age + 1))
    # A hit makes the oldest the youngest.
    assert build_engine(four[0], flavour=flavour, cache_dir=cache).cached
    listed = [entry.key for entry in cache.list()]
    assert listed == [order[i].key for i in (0, 3, 2, 1)]
    keep = order[0].bytes + order[3].bytes
    assert [entry.key for entry in cache.prune(keep)] == [order[1].key, order[2].key]
    assert {entry.key for entry in cache.list()} == {order[0].key, order[3].key}
    assert cache.prune(keep) == ()
    assert len(cache.prune(0)) == 2 and cache.list() == ()


def test_the_cache_stays_within_its_size(flavour, tmp_path):
    three = models(3)
    one = build_engine(three[0], flavour=flavour, cache_dir=tmp_path / "other")
    size = EngineCache(tmp_path / "other").list()[0].bytes
    cache = EngineCache(tmp_path / "cache", max_bytes=size + size // 2)
    for model in three:
        engine = build_engine(model, flavour=flavour, cache_dir=cache)
        assert [entry.key for entry in cache.list()] == [engine.sidecar.key.digest]
    assert one.path.exists()


def test_an_engine_larger_than_the_cache_is_kept_until_the_next(flavour, tmp_path, mean_model):
    cache = EngineCache(tmp_path / "cache", max_bytes=1)
    assert build_engine(mean_model, flavour=flavour, cache_dir=cache).path.exists()
    assert build_engine(mean_model, flavour=flavour, cache_dir=cache).cached


def test_prune_leaves_what_is_being_built(flavour, cache, mean_model):
    key = build_engine(mean_model, flavour=flavour, cache_dir=cache).sidecar.key
    with cache._locked(key.digest):
        assert cache.prune(0) == ()
    assert len(cache.prune(0)) == 1


def test_prune_sweeps_what_a_crash_left(flavour, cache, mean_model):
    engine = build_engine(mean_model, flavour=flavour, cache_dir=cache)
    old, new = (
        engine.path.with_name(f".{engine.path.name}.{tail}") for tail in ("0" * 16, "1" * 16)
    )
    for path in (old, new):
        path.write_bytes(b"half a file")
    os.utime(old, (1, 1))
    cache.prune(1 << 30)
    assert (old.exists(), new.exists()) == (False, True)


def test_sizes_are_numbers_of_bytes(tmp_path):
    for size in (-1, 1.5, True, "1G"):
        with pytest.raises(SpecError, match="must be a number of bytes >= 0"):
            EngineCache(tmp_path, max_bytes=size)


def test_entries_are_json_ready(flavour, cache, mean_model):
    build_engine(mean_model, flavour=flavour, cache_dir=cache)
    (entry,) = cache.list()
    assert entry.to_dict()["sidecar"]["graph_name"] == mean_model.graph.name
    assert entry.bytes == entry.path.stat().st_size + sidecar_path(entry.path).stat().st_size
