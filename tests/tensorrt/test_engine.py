"""Engine files and their sidecars: nothing damaged, foreign or replaced is taken for sound."""

from __future__ import annotations

import json
import sys

import pytest

from smoothl1_deploy import build_engine
from smoothl1_deploy._artefact import sha256, sidecar_path
from smoothl1_deploy._files import write_atomic
from smoothl1_deploy.errors import ArtefactError, MissingDependencyError, OutputError
from smoothl1_deploy.tensorrt import _engine as module
from smoothl1_deploy.tensorrt import _flavour as flavour_module
from smoothl1_deploy.tensorrt._engine import (
    Sidecar,
    diagnose,
    read_engine,
    write_engine,
)


@pytest.fixture
def pair(built, tmp_path):
    """An engine and its sidecar on disk, fresh for each test."""
    path = tmp_path / "loss.engine"
    write_engine(path, built.data, built.sidecar)
    return path


def edit(path, **entries):
    """Change entries of a sidecar file and keep its own sha256 right: a careful forger."""
    content = json.loads(sidecar_path(path).read_text())
    content.update(entries)
    del content["sha256"]
    text = (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
    content["sha256"] = sha256(text)
    sidecar_path(path).write_text(json.dumps(content))


def test_a_written_engine_is_read_as_it_was(built, pair):
    engine = read_engine(pair)
    assert (engine.data, engine.sidecar, engine.sha256) == (built.data, built.sidecar, built.sha256)
    assert Sidecar.from_dict(built.sidecar.to_dict()) == built.sidecar
    assert read_engine(str(pair)) == engine
    assert json.loads(json.dumps(engine.to_dict()))["sidecar"]["spec"]["beta"] == 0.5


# --- files that are missing, damaged, replaced -----------------------------------------------


def refused(path, message, **kwargs):
    with pytest.raises(ArtefactError, match=message) as caught:
        read_engine(path, **kwargs)
    return caught.value


def test_a_missing_engine_or_sidecar_is_refused(tmp_path, pair):
    refused(tmp_path / "none.engine", r"can't be read as an engine \(No such file")
    refused(tmp_path, r"can't be read as an engine \(it is a folder, a pipe or a device\)")
    sidecar_path(pair).unlink()
    refused(pair, r"sidecar, can't be read.*executable code: build it again")


def test_an_engine_that_was_changed_is_refused(pair, built):
    for data, problem in (
        (b"", r"is empty; build the engine again"),
        (built.data[:1000], f"is truncated, or not .*: it has 1000 bytes, not {len(built.data)}"),
        (built.data[:-1] + bytes([built.data[-1] ^ 1]), "its sha256 is .*damaged or replaced"),
        (built.data + b"x", "is not the engine its sidecar describes"),
    ):
        pair.write_bytes(data)
        refused(pair, problem)


def test_a_sidecar_that_is_no_json_is_refused(pair):
    for text in ("{", "[" * 100_000, "[]"):
        sidecar_path(pair).write_text(text)
        refused(pair, r"engine\.json (is no JSON|holds no JSON object)")


def test_an_edited_sidecar_is_refused_and_a_reformatted_one_is_not(pair, built):
    text = sidecar_path(pair).read_text()
    assert '"beta": 0.5' in text
    sidecar_path(pair).write_text(text.replace('"beta": 0.5', '"beta": 0.25'))
    refused(pair, "was damaged or changed: its content doesn't match its own sha256")
    sidecar_path(pair).write_text(json.dumps(json.loads(text), indent=8))
    assert read_engine(pair).sidecar == built.sidecar


NONSENSE = {
    "has the format 2, this version of smoothl1-deploy reads 1": {"format": 2},
    "makes no sense .*unknown flavour 'onnx'": {"flavour": "onnx"},
    "makes no sense .*beta must not be negative": {"spec": {"beta": -1}},
    r"unknown field\(s\) gamma": {"spec": {"beta": 1, "gamma": 2}},
    r"unknown build option\(s\) turbo": {"options": {"turbo": True}},
    "makes no sense .*unpack": {"profile": {"ranges": {"input": [[1, 2]]}, "defaults": []}},
    "makes no sense .*not a size": {"profile": {"ranges": {"x": [[1.5]] * 3}, "defaults": []}},
    "makes no sense .*int": {"inputs": [1]},
    "makes no sense .*dtype": {"inputs": [{"name": "x"}]},
    "makes no sense .*nmae": {"gpu": {"nmae": "x"}},
    "makes no sense .*OverflowError": {"engine_bytes": float("inf")},
    "makes no sense .*many": {"engine_bytes": "many"},
    "makes no sense .*NoneType": {"notes": None},
    "makes no sense .*IndexError": {"options": [True]},
}


def test_a_sidecar_that_makes_no_sense_is_refused(pair, built):
    for message, entries in NONSENSE.items():
        sidecar_path(pair).write_bytes(built.sidecar.dumps())
        edit(pair, **entries)
        refused(pair, message)


def test_a_sidecar_that_lacks_an_entry_is_refused(built):
    for name in built.sidecar.to_dict():
        fields = built.sidecar.to_dict()
        del fields[name]
        with pytest.raises(ArtefactError, match=f"'{name}'|format None"):
            Sidecar.from_dict(fields)


def test_a_crash_between_the_two_files_leaves_nothing_to_be_taken_for_sound(
    pair, built, mean_model, rtx, monkeypatch
):
    """Whichever write fails, what is left is refused or is the old pair."""
    new = build_engine(mean_model, flavour=rtx, profile={"input": (1, 2, 3)})
    for fails in (pair, sidecar_path(pair)):

        def write(path, data, fails=fails):
            if path == fails:
                raise OutputError("the disk is full")
            return write_atomic(path, data)

        monkeypatch.setattr(module, "write_atomic", write)
        with pytest.raises(OutputError, match="disk is full"):
            write_engine(pair, new.data, new.sidecar)
        if fails == pair:
            assert read_engine(pair).data == built.data
        else:
            refused(pair, "not the engine its sidecar describes")


# --- flavour and version ---------------------------------------------------------------------


def test_engines_run_on_the_version_that_built_them(pair, rtx):
    edit(pair, version="1.6.0.12")
    refused(pair, r"built with tensorrt_rtx 1\.6\.0\.12, here is tensorrt_rtx .*don't carry over")
    edit(pair, version=".".join(rtx.version.split(".")[:3]) + ".9999")
    assert read_engine(pair).data


def test_another_flavour_does_not_run_it(pair, fake):
    full = fake("10.16.1")
    refused(pair, r"built with tensorrt_rtx .*, and tensorrt 10\.16\.1 can't run it", flavour=full)


def test_a_flavour_that_is_not_installed_is_named_with_its_extra(pair, monkeypatch):
    edit(pair, flavour="tensorrt", version="10.16.1")
    monkeypatch.setattr(flavour_module, "_usable", {})
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(
        MissingDependencyError,
        match=r"with tensorrt 10\.16\.1, which can't be used here; .*smoothl1-deploy\[gpu\]",
    ):
        read_engine(pair)


def test_diagnostics_of_the_file_refuse_it_and_those_of_the_machine_do_not(
    fake, mean_model, tmp_path
):
    flavour = fake("rtx-1.7.1")
    path = tmp_path / "loss.engine"
    data = build_engine(mean_model, path, flavour).data
    assert read_engine(path, flavour=flavour).data  # INVALID without a bit says nothing
    assert diagnose(data, flavour) == ()
    flavour.trt.diagnostics = 2 | 4  # of this machine: the file can be read all the same
    assert diagnose(data, flavour) == ("OLD_CUDA_DRIVER", "UNSUPPORTED_CC")
    assert read_engine(path, flavour=flavour).data
    flavour.trt.diagnostics = 1 | 2 | 32
    refused(path, r"is no engine of .*: MALFORMED_ENGINE, VERSION_MISMATCH; build", flavour=flavour)
