"""`build` and `cache`: engines, their cache, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import onnx
import onnx.parser
import pytest
from conftest_cli import Cli, assert_refused, model

from smoothl1_deploy import LossSpec
from smoothl1_deploy.tensorrt._engine import read_verified
from smoothl1_deploy.tensorrt._options import BuildOptions

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx builds without a GPU")

RTX = ("--flavour", "tensorrt_rtx")
DETECTOR = """<ir_version: 8, opset_import: ["" : 18]>
g (float[N, 4] x) => (float[N, 4] y) { y = Sigmoid(x) }"""


def test_the_engine_and_its_sidecar(cli: Cli) -> None:
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
    assert engine.sidecar.spec == LossSpec() and engine.sidecar.options == BuildOptions()


def test_the_name_of_the_engine_and_the_cache(cli: Cli) -> None:
    path = model("my.onnx")
    first = json.loads(cli("build", path, *RTX, "--json").out)
    assert (first["path"], first["cached"]) == ("my.engine", False)
    second = cli("build", path, *RTX)
    assert "earlier, taken from the cache" in second.out
    third = cli("build", path, *RTX, "--profile", "input=1x16,2x16,3x16")
    assert third.code == 0
    assert "note: changed since the last build: profile: " in third.err
    assert json.loads(cli("build", path, *RTX, "--no-cache", "--json").out)["cached"] is False


def test_an_onnx_file_that_carries_the_engine_or_names_it(cli: Cli) -> None:
    for mode, beside in ((0, {"loss_ctx.engine", "loss_ctx.engine.json"}), (1, set())):
        for path in Path().glob("loss_ctx*"):
            path.unlink()
        done = cli("build", model(), *RTX, "--format", "epcontext", "--embed-mode", mode)
        assert done.code == 0, done.err
        data = Path("loss_ctx.onnx").read_bytes()
        assert f"loss_ctx.onnx, {len(data):,} bytes" in done.out
        assert hashlib.sha256(data).hexdigest() in done.out
        wrote = {path.name for path in Path().glob("loss_ctx*")}
        assert wrote == {"loss_ctx.onnx", "loss_ctx.onnx.json", *beside}
    done = cli("build", "loss_ctx.onnx", *RTX)
    assert (done.code, "Plugin not found" in done.err) == (2, True)


def test_half_precision_is_told_and_is_another_engine(cli: Cli) -> None:
    onnx.save(onnx.parser.parse_model(DETECTOR), "detector.onnx")
    cli("attach", "detector.onnx", *["--prediction", "y", "--target", "t", "-o", "scored.onnx"])
    plain = json.loads(cli("build", "scored.onnx", *RTX, "--json").out)
    done = cli("build", "scored.onnx", *RTX, "--fp16")
    assert "note: changed since the last build: onnx_sha256: " in done.err
    digest = plain["sidecar"]["onnx_sha256"]
    assert "own nodes were put in float16 by onnxruntime.transformers.float16 (" in done.err
    assert f"had the sha256 {digest}, and its losses (loss) are computed as they were" in done.err
    half = json.loads(cli("build", "scored.onnx", *RTX, "--fp16", "--json").out)
    assert half["cached"] and half["sha256"] != plain["sha256"]
    assert half["sidecar"]["inputs"] == plain["sidecar"]["inputs"]  # float32, as before
    assert half["sidecar"]["outputs"] == plain["sidecar"]["outputs"]


def test_every_option_reaches_the_build(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
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
        "--cache-dir", "engines", "--format", "epcontext", "--embed-mode", "0", "--fp16",
    )  # fmt: skip
    assert done.err == "error: enough seen\n"
    assert seen.pop("options") == BuildOptions(("8.6", "8.9"))
    assert seen.pop("cache_dir").root == Path("engines")  # type: ignore[attr-defined]
    assert seen == {
        "model": "a.onnx",
        "path": Path("b.engine"),
        "flavour": "tensorrt",
        "profile": ["x=1,2,3", "y=1"],
        "format": "epcontext",
        "embed_mode": 0,
        "precision": "float16",
        "on_progress": None,  # no terminal, no spinner
    }


def test_bad_input_exits_with_2_and_writes_nothing(cli: Cli) -> None:
    model()
    model("f64.onnx", dtype="float64")
    model("f16.onnx", dtype="float16")
    onnx.save(onnx.parser.parse_model(DETECTOR), "detector.onnx")
    cli("attach", "detector.onnx", *["--prediction", "y", "--target", "t", "-o", "scored.onnx"])
    cli("export", "-o", "any.onnx")
    Path("text.onnx").write_text("not a model")
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    is_model = "loss.onnx is the model it is built from; give another name"
    for words, message in (
        ("nope.onnx", "nope.onnx does not exist"),
        ("text.onnx", "text.onnx"),
        ("f64.onnx", "the graph input 'input' is float64"),
        ("any.onnx", "has an unknown rank"),
        ("loss.onnx --flavour nvidia", "unknown flavour 'nvidia'; choose one of auto, tensorrt"),
        ("loss.onnx --profile 16", "can't read the profile '16'"),
        ("loss.onnx --profile input=4x16,2x16,1x16", "0 <= min <= opt <= max must hold"),
        ("loss.onnx --profile x=1x16", "names the input 'x'; the model's inputs are input"),
        ("loss.onnx --compute-capability new", "can't read the compute capability 'new'"),
        ("loss.onnx --fp16", "here float32; type smoothl1-deploy export --dtype float16 with"),
        ("loss.onnx --bf16", "here float32; type smoothl1-deploy export --dtype bfloat16 with"),
        ("f16.onnx --fp16", "its spec, here float16; build it as it is"),
        ("f64.onnx --fp16", "the graph input 'input' is float64"),
        ("detector.onnx --fp16", "the model says of no node that it is a loss"),
        ("scored.onnx --bf16", "export the model in it (module.bfloat16(), and torch.onnx.export"),
        ("scored.onnx --bf16 --fp16", "--fp16 and --bf16 exclude each other"),
        ("loss.onnx --no-cache --cache-dir x", "--no-cache and --cache-dir exclude each other"),
        ("loss.onnx --cache-dir loss.onnx", "can't use loss.onnx as an engine cache"),
        ("loss.onnx --embed-mode 0", "--embed-mode goes with --format epcontext"),
        ("loss.onnx --format plan", "unknown format 'plan'; choose one of engine, epcontext"),
        ("loss.onnx --format epcontext -o l.engine", "name it *.onnx, not l.engine"),
        ("loss.onnx --format epcontext -o loss.onnx", "is the model it is built from"),
        ("loss.onnx -o loss.onnx/l.engine", "can't write loss.onnx/l.engine: Not a directory"),
        ("loss.onnx -o .", "can't write .: it is a folder"),
        ("loss.onnx -o loss.onnx", is_model),
        ("loss.onnx -o ./loss.onnx", is_model),
    ):
        flavour = () if "--flavour" in words else RTX
        assert_refused(cli("build", *words.split(), *flavour), message)
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before
    Path("loss.onnx").rename("loss.engine")
    assert_refused(cli("build", "loss.engine", *RTX), "loss.engine is the model it is built from")
    assert Path("loss.engine").read_bytes() == before[Path("loss.onnx")]


def test_the_cache_can_be_listed_and_pruned(cli: Cli) -> None:
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


def test_a_damaged_entry_is_listed_as_damaged(cli: Cli) -> None:
    cli("build", model(), *RTX, "--cache-dir", "engines")
    (sidecar,) = Path("engines/engines").glob("*.json")
    sidecar.write_text("{}")
    assert "damaged" in cli("cache", "list", "--cache-dir", "engines").out


def test_bad_input_to_the_cache_leaves_every_folder_as_it_is(cli: Cli) -> None:
    Path("foreign").mkdir()
    Path("foreign/a.engine").write_text("somebody's")
    for words, message in (
        ("list --cache-dir nowhere", "nowhere is no folder"),
        ("prune --max-mb -1", "max_bytes must be a number of bytes >= 0"),
        ("prune --max-mb 0 --cache-dir nowhere", "nowhere is no folder"),
        ("list --cache-dir foreign", "foreign is no engine cache"),
        ("prune --max-mb 0 --cache-dir foreign", "foreign is no engine cache"),
    ):
        assert_refused(cli("cache", *words.split()), message)
    assert not Path("nowhere").exists()
    assert [path.name for path in Path("foreign").iterdir()] == ["a.engine"]
