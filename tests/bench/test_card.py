"""What a machine with a GPU is asked for in its few minutes, where there is none.

ONNX Runtime is in the place of TensorRT 8.5 (`bench/tensorrt85`), the CPU's provider in that of
CUDA's, and our kernels for CUDA are compiled for the CPU. Nothing is downloaded here.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import child
import numpy as np
import pytest
import torch
from host_device import HostDevice, on_host_device, operators_on_host

from smoothl1_deploy import LossSpec, export, ops
from smoothl1_deploy.backends import _gpu, _ort_gpu
from smoothl1_deploy.bench._gpu_report import GpuReport, Parity
from smoothl1_deploy.bench._rows import Row
from smoothl1_deploy.bench._timing import Timing
from smoothl1_deploy.errors import BackendUnavailableError, UnsupportedError
from smoothl1_deploy.parity import _matrix
from smoothl1_deploy.reference import oracle

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench import card, pack  # noqa: E402
from bench.tensorrt85 import engine  # noqa: E402
from bench.tensorrt85.engine import EngineRunner, Tensorrt85, Worker, unpacked  # noqa: E402

FAKE = str(Path(__file__).with_name("fake85.py"))


@pytest.fixture(scope="module")
def asked() -> Iterator[Worker]:
    worker = Worker([sys.executable, FAKE])
    yield worker
    with pytest.raises(BackendUnavailableError, match=r"ended at 'build' \(exit code 3\)"):
        worker.ask("build", b"end", profile={})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_arrays_come_and_go_whole_of_any_rank_and_empty(asked: Worker, dtype: str) -> None:
    spec = LossSpec(0.5, "none", dtype)
    runner = EngineRunner(export(spec, "inlined", ("N", 4)), asked)
    assert runner.said == [f"half={dtype == 'float16'}"]
    for rows in (0, 3):
        x = np.linspace(-2, 2, rows * 4, dtype=dtype).reshape(rows, 4)
        np.testing.assert_array_equal(runner.run(x, -x)["loss"], oracle(spec, x, -x))
    mean = EngineRunner(export(LossSpec(runtime_beta=True), "inlined", (4,)), asked)
    x = np.ones(4, np.float32)
    outputs, milliseconds = mean.measure({"input": x, "target": 0 * x, "beta": np.float32(2)}, 7)
    assert outputs["loss"].shape == () and outputs["loss"] == 0.25 and milliseconds == 7


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return operators_on_host(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def machine(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without a card that passes for one with it, and small matrices."""
    fake = [sys.executable, FAKE], None
    small = partial(_matrix.Matrix, betas=(1.0,), dtypes=("float16",), reductions=("mean", "none"),
                    extensions=False, quick=True)  # fmt: skip
    for where, name, stand_in in (
        (engine, "unpacked", lambda: fake),
        (card, "unpacked", lambda: fake),
        (card, "Matrix", lambda backends, routes, **_: small(backends, routes=routes)),
        (card, "run_matrix", lambda matrix, **_: _matrix.run_matrix(matrix)),
        (card, "find_device", lambda what: HostDevice()),
        (_gpu, "find_device", lambda what: HostDevice()),
        (_gpu, "is_on_device", on_host_device),
        (_ort_gpu.OrtCudaBackend, "provider", "CPUExecutionProvider"),
        (ops, "_LIBRARY", library.with_name("libsmoothl1_deploy.so")),
        (torch.cuda, "synchronize", lambda: None),
        (card, "report_into", lambda folder, seconds: (measured(), [])),
        (card, "tests", lambda: {"ok": True}),
        (card.small_calls, "__defaults__", (2,)),
        (card.attached, "__defaults__", (8, 4, 2)),
    ):
        monkeypatch.setattr(where, name, stand_in)
    caches = engine._worker.cache_clear, ops.operators.cache_clear
    for clear in caches:
        clear()
    yield
    for clear in caches:
        clear()


def measured(milliseconds: float = 1.0) -> GpuReport:
    """What `scripts/gpu_report` would find at 100 GB/s of a copy."""
    timing = Timing.of([milliseconds / 1e3])
    shape = (10**6, 16)
    rows = (Row(LossSpec(), shape, name, "", timing) for name in ("ort-cuda", "torch eager"))
    return GpuReport(3, {}, "", {}, 100e9, tuple(rows), Parity(True), {}, (), 1.0)


def test_the_steps_are_taken_in_turn_and_kept(
    machine: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card.main(tmp_path, log2=8)
    out = capsys.readouterr().out
    assert out.startswith("GO: one engine")
    found = json.loads((tmp_path / "card.json").read_text())
    assert not [name for name, each in found.items() if "problem" in each]
    assert list(found)[-1] == "report" and len(found) == 13
    assert found["engines"]["cells"] == 2 and found["engines"]["red"] == 0
    assert found["engines"]["refused"] == 1  # the extension, whose gradient 8.5 has no operator for
    assert found["one engine"]["ok"] and found["nothing"]["ok"]
    assert found["nothing"]["mean"] == "nan" and found["nothing"]["sum"] == "0.0"
    assert found["stages"]["two"]["ulp"] <= 2
    assert found["nan through clip"]["clip of nan, -2, 0.5, inf to -1..1"] == [
        "nan", "-1.0", "0.5", "1.0"
    ]  # fmt: skip
    assert "has no attribute 'deserialize'" in found["damaged engine"]["byte at 50%"]
    assert found["small calls"]["mean"]["right"] and found["small calls"]["none"]["right"]
    assert found["bits"]["ok"] and found["attached"]["bits"]
    assert found["operators"]["cells"] == 2 and found["operators"]["ok"]
    share = found["report"]["share of a copy's bandwidth"]
    assert 1.28 < share["smooth_l1_loss_beta_1.0_mean_float32"] < 1.29 and found["report"]["ok"]
    for name, backend in (("tensorrt85", card.ENGINES), ("operators", "ort-cuda")):
        cells = json.loads((tmp_path / f"{name}.json").read_text())["cells"]
        assert {cell["backend"] for cell in cells} == {backend}
        assert (tmp_path / f"{name}.md").stat().st_size


def test_a_wrong_number_what_changes_and_what_is_slow_is_not_ok(
    machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert card.one_engine()["ok"]
    assert not card.engines(tmp_path, 1.0)["ok"]  # too few cells
    monkeypatch.setattr(card, "LEAST", 2)
    assert card.engines(tmp_path, 1.0)["ok"]
    monkeypatch.setattr(card, "oracle", lambda *_: np.float32(0))
    assert not card.one_engine()["ok"]
    drawn = np.random.default_rng(0)
    changing = SimpleNamespace(run=lambda *_: {"loss": torch.from_numpy(drawn.random(1))})
    monkeypatch.setattr(card, "load", lambda *_: changing)
    found = card.bits(8)
    assert found.pop("ok") is False and {*found.values()} == {20}
    monkeypatch.setattr(card, "report_into", lambda *_: (measured(1.6), []))
    assert card.report(tmp_path, 1.0)["ok"] is False
    monkeypatch.setattr(
        card, "run_matrix", lambda matrix, **_: _matrix.run_matrix(matrix, seconds=0)
    )
    found = card.operators(tmp_path, 1.0)
    assert (found["cells"], found["red"], found["whole"], found["ok"]) == (0, 0, False, False)


def test_without_an_engine_the_words_of_tensorrt_are_the_result(
    machine: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuses(*_: object) -> None:
        raise UnsupportedError("Unsupported SM: 0x900")

    monkeypatch.setattr(engine, "EngineRunner", refuses)
    assert card.main(tmp_path, log2=8) == 1
    out = capsys.readouterr().out
    assert "NO GO: one engine" in out and "Unsupported SM: 0x900" in out
    found = json.loads((tmp_path / "card.json").read_text())
    assert next(iter(found)) == "one engine" and not {"engines", "stages", "speed"} & {*found}
    assert found["bits"]["ok"] and "report" in found  # what needs no TensorRT is done


def test_what_the_worker_refuses_is_refused_with_its_words(asked: Worker) -> None:
    with pytest.raises(UnsupportedError, match=r"Fail|InvalidProtobuf|INVALID_PROTOBUF"):
        asked.ask("build", b"no model", profile={})
    with pytest.raises(UnsupportedError, match="IndexError: list index out of range"):
        asked.ask("run", engine=99, inputs=[])


def test_where_it_is_not_unpacked_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TENSORRT85", str(tmp_path))
    with pytest.raises(BackendUnavailableError, match=r"bench/pack\.py fills"):
        unpacked()


def test_a_spec_that_it_has_no_kernels_for_is_refused() -> None:
    backend = Tensorrt85.__new__(Tensorrt85)
    assert "no float64" in str(backend.refuses(LossSpec(dtype="float64")))
    assert "no bfloat16" in str(backend.refuses(LossSpec(dtype="bfloat16")))
    assert "IsInf" in str(backend.refuses(LossSpec(gradient=True)))
    assert backend.refuses(LossSpec()) is None


# What is packed for that machine


def test_the_pieces_of_an_archive_are_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "PIECE", 4096)
    monkeypatch.setattr(pack, "BLOCK", 10_000)  # streams of xz that end within a piece
    made, home = np.random.default_rng(0).bytes(30_000), tmp_path / "home"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "run").write_bytes(made)
    (home / "bin" / "run").chmod(0o755)
    (home / "empty").touch()
    names, whole = pack.packed(home, tmp_path)
    assert len(names) == 8 and names == sorted(names)
    joined = b"".join((tmp_path / name).read_bytes() for name in names)
    assert hashlib.sha256(joined).hexdigest() == whole
    (tmp_path / "home.tar.xz").write_bytes(joined)
    child.run(
        "-m", "tarfile", "-e", str(tmp_path / "home.tar.xz"), str(tmp_path / "there"), check=True
    )
    found = tmp_path / "there" / "bin" / "run"
    assert found.read_bytes() == made and found.stat().st_mode & 0o111
    assert (tmp_path / "there" / "empty").is_file()
    (home / "empty").touch()
    assert pack.packed(home, tmp_path) == (names, whole)  # whenever it is made


def test_of_a_file_the_code_of_other_cards_is_left_out(tmp_path: Path) -> None:
    def entry(kind: int, number: int) -> bytes:
        header = struct.pack("<HHIQ12xI", kind, 0x101, 64, 8, number)
        return header.ljust(64, b"\0") + b"the code"

    entries = entry(2, 80) + entry(2, 90) + entry(1, 80)
    fat = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries
    file = tmp_path / "library.so"
    file.write_bytes(b"before" + fat + b"between" + fat + b"after")
    pack.blank(file, 90)
    kept = entry(2, 80)[:-8] + bytes(8) + entry(2, 90) + entry(1, 80)
    found = fat[:16] + kept
    assert file.read_bytes() == b"before" + found + b"between" + found + b"after"
