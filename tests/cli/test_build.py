"""`build` and `cache`: engines, their cache, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest_cli import Done, model

from smoothl1_deploy import LossSpec
from smoothl1_deploy.tensorrt._engine import read_verified
from smoothl1_deploy.tensorrt._options import BuildOptions

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx builds without a GPU")

RTX = ("--flavour", "tensorrt_rtx")


def test_the_engine_and_its_sidecar(cli: Callable[..., Done]) -> None:
    path = model()
    done = cli("build", path, *RTX, "--profile", "input=1x16,64x16,4096x16", "-o", "l.engine")
    assert done.code == 0, done.err
    engine = read_verified(Path("l.engine"))
    lines = dict(line.split("  ", 1) for line in done.out.splitlines())
    lines = {name: value.strip() for name, value in lines.items()}
    assert lines["wrote"] == f"l.engine, {len(engine.data):,} bytes"
    assert lines["sidecar"] == "l.engine.json"
    assert lines["sha256"] == hashlib.sha256(engine.data).hexdigest()
    shapes = "1x16,64x16,4096x16"
    assert lines["profile"] == f"input={shapes} target={shapes}"
    assert lines["built"].startswith("in ")
    assert "note: computes in float32 on TensorRT" in done.err
    assert engine.sidecar is not None and engine.sidecar.spec == LossSpec()


def test_the_name_of_the_engine_and_the_cache(cli: Callable[..., Done]) -> None:
    path = model("my.onnx")
    first = json.loads(cli("build", path, *RTX, "--json").out)
    assert (first["path"], first["cached"]) == ("my.engine", False)
    second = cli("build", path, *RTX)
    assert "earlier, taken from the cache" in second.out
    third = cli("build", path, *RTX, "--profile", "input=1x16,2x16,3x16")
    assert third.code == 0
    assert "note: changed since the last build: profile: " in third.err
    assert json.loads(cli("build", path, *RTX, "--no-cache", "--json").out)["cached"] is False


@pytest.mark.parametrize("mode", [0, 1])
def test_an_onnx_file_that_carries_the_engine(cli: Callable[..., Done], mode: int) -> None:
    done = cli("build", model(), *RTX, "--format", "epcontext", "--embed-mode", mode)
    assert done.code == 0, done.err
    data = Path("loss_ctx.onnx").read_bytes()
    assert f"loss_ctx.onnx, {len(data):,} bytes" in done.out
    assert hashlib.sha256(data).hexdigest() in done.out
    beside = {"loss_ctx.engine", "loss_ctx.engine.json"} if mode == 0 else set()
    wrote = {path.name for path in Path().glob("loss_ctx*")}
    assert wrote == {"loss_ctx.onnx", "loss_ctx.onnx.json", *beside}
    done = cli("build", "loss_ctx.onnx", *RTX)
    assert (done.code, "Plugin not found" in done.err) == (2, True)


def test_every_option_reaches_the_build(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    import smoothl1_deploy.tensorrt._build as module
    from smoothl1_deploy.errors import BuildError

    seen: dict[str, object] = {}

    def fake(model: str, path: Path, flavour: str, profile: object, **rest: object) -> None:
        seen.update(rest, model=model, path=path, flavour=flavour, profile=profile)
        raise BuildError("enough seen")

    monkeypatch.setattr(module, "build_engine", fake)
    done = cli(
        "build", "a.onnx", "-o", "b.engine", "--flavour", "tensorrt", "--profile", "x=1,2,3",
        "--profile", "y=1", "--compute-capability", "8.9", "--compute-capability", "SM86",
        "--hardware-compatibility", "ampere_plus", "--version-compatible", "--tf32",
        "--cache-dir", "engines", "--format", "epcontext", "--embed-mode", "0",
    )  # fmt: skip
    assert done.err == "error: enough seen\n"
    assert seen.pop("options") == BuildOptions(
        compute_capabilities=("8.6", "8.9"),
        hardware_compatibility="ampere_plus",
        version_compatible=True,
        tf32=True,
    )
    assert seen.pop("cache_dir").root == Path("engines")  # type: ignore[attr-defined]
    assert seen == {
        "model": "a.onnx",
        "path": Path("b.engine"),
        "flavour": "tensorrt",
        "profile": ["x=1,2,3", "y=1"],
        "format": "epcontext",
        "embed_mode": 0,
        "on_progress": None,  # no terminal, no spinner
    }


def test_defaults_of_the_options(cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    import smoothl1_deploy.tensorrt._build as module

    seen: list[object] = []
    monkeypatch.setattr(module, "build_engine", lambda *a, **k: seen.append(k["options"]))
    cli("build", "a.onnx", "--json")
    assert seen == [BuildOptions()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--flavour", "nvidia"], "unknown flavour 'nvidia'; choose one of auto, tensorrt"),
        (["--profile", "16"], "can't read the profile '16'"),
        (["--profile", "input=4x16,2x16,1x16"], "0 <= min <= opt <= max must hold"),
        (["--profile", "x=1x16"], "the profile names the input 'x'; the model's inputs are input"),
        (["--compute-capability", "newest"], "can't read the compute capability 'newest'"),
        (["--hardware-compatibility", "all"], "unknown hardware_compatibility 'all'"),
        (["--no-cache", "--cache-dir", "x"], "--no-cache and --cache-dir exclude each other"),
        (["--cache-dir", "loss.onnx"], "can't use loss.onnx as an engine cache"),
        (["--embed-mode", "0"], "--embed-mode goes with --format epcontext"),
        (["--format", "plan"], "unknown format 'plan'; choose one of engine, epcontext"),
        (["--format", "epcontext", "-o", "l.engine"], "name it *.onnx, not l.engine"),
        (["--format", "epcontext", "-o", "loss.onnx"], "is the model it is built from"),
        (["-o", "loss.onnx/l.engine"], "can't write the engine: loss.onnx/l.engine"),
        (["-o", "."], "can't write the engine: . is a folder"),
        (["-o", "loss.onnx"], "loss.onnx is the model it is built from; give another name"),
        (["-o", "./loss.onnx"], "loss.onnx is the model it is built from; give another name"),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing(
    cli: Callable[..., Done], arguments: list[str], message: str
) -> None:
    flavour = [] if "--flavour" in arguments else RTX
    done = cli("build", model(), *flavour, *arguments)
    assert (done.code, done.out.replace("\n", "")[:1]) != (0, "w")
    assert done.code == 2
    assert done.err.startswith("error: ") and message in done.err
    assert not list(Path().glob("*.engine*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope.onnx", "nope.onnx does not exist"),
        ("text.onnx", "text.onnx"),
        ("f64.onnx", "the graph input 'input' is float64"),
        ("any.onnx", "has an unknown rank"),
    ],
)
def test_models_that_cannot_be_built(cli: Callable[..., Done], name: str, message: str) -> None:
    Path("text.onnx").write_text("not a model")
    model("f64.onnx", dtype="float64")
    cli("export", "-o", "any.onnx")
    done = cli("build", name, *RTX)
    assert done.code == 2
    assert message in done.err
    assert not list(Path().glob("*.engine*"))


def test_a_model_called_like_its_engine_is_not_overwritten(cli: Callable[..., Done]) -> None:
    path = Path(model("loss.engine"))
    before = path.read_bytes()
    done = cli("build", path, *RTX)
    assert done.code == 2
    assert "loss.engine is the model it is built from" in done.err
    assert path.read_bytes() == before


def test_the_cache_can_be_listed_and_pruned(cli: Callable[..., Done]) -> None:
    path = model()
    assert "engines: 0 engines, 0 bytes" in cli("cache", "list").out
    cli("build", path, *RTX)
    cli("build", path, *RTX, "--profile", "input=1x16,2x16,3x16")
    listed = json.loads(cli("cache", "list", "--json").out)
    assert len(listed["entries"]) == 2
    table = cli("cache", "list").out
    for entry in listed["entries"]:
        assert entry["key"][:12] in table
        assert entry["sidecar"]["graph_name"] in table
    one = max(entry["bytes"] for entry in listed["entries"])
    done = json.loads(cli("cache", "prune", "--max-mb", -(-one // 2**20), "--json").out)
    assert len(done["removed"]) <= 1
    assert "removed" in cli("cache", "prune", "--max-mb", 0).out
    assert json.loads(cli("cache", "list", "--json").out)["entries"] == []


def test_a_damaged_entry_is_listed_as_damaged(cli: Callable[..., Done]) -> None:
    cli("build", model(), *RTX, "--cache-dir", "engines")
    (sidecar,) = Path("engines/engines").glob("*.json")
    sidecar.write_text("{}")
    assert "damaged" in cli("cache", "list", "--cache-dir", "engines").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "--cache-dir", "nowhere"], "nowhere is no folder"),
        (["prune", "--max-mb", "-1"], "max_bytes must be a number of bytes >= 0"),
        (["prune", "--max-mb", "0", "--cache-dir", "nowhere"], "nowhere is no folder"),
        (["list", "--cache-dir", "foreign"], "foreign is no engine cache"),
        (["prune", "--max-mb", "0", "--cache-dir", "foreign"], "foreign is no engine cache"),
    ],
)
def test_bad_input_to_the_cache(
    cli: Callable[..., Done], arguments: list[str], message: str
) -> None:
    Path("foreign").mkdir()
    Path("foreign/a.engine").write_text("somebody's")
    done = cli("cache", *arguments)
    assert done.code == 2
    assert message in done.err
    assert not Path("nowhere").exists()
    assert [path.name for path in Path("foreign").iterdir()] == ["a.engine"]
