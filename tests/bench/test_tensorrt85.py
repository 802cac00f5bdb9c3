"""The process that runs TensorRT 8.5: `bench/tensorrt85`, with ONNX Runtime in TensorRT's place."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy.errors import BackendUnavailableError, UnsupportedError
from smoothl1_deploy.reference import oracle

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

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


def test_the_card_s_steps_are_taken_in_turn_and_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a machine with a GPU is asked for in its few minutes, with the fake in its place."""
    from bench.tensorrt85 import card
    from smoothl1_deploy.parity import _matrix

    small = _matrix.Matrix((card.BACKEND,), betas=(1.0,), dtypes=("float16",), routes=("function",),
                           reductions=("mean", "none"), extensions=False, quick=True)  # fmt: skip
    command = ([sys.executable, FAKE], None)
    monkeypatch.setattr(engine, "unpacked", lambda: command)
    monkeypatch.setattr(card, "unpacked", lambda: command)
    monkeypatch.setattr(card, "Matrix", lambda *_, **__: small)
    engine._worker.cache_clear()
    assert card.main(tmp_path, log2=8) == 0
    out = capsys.readouterr().out
    assert out.startswith("GO: one engine")
    found = json.loads((tmp_path / "tensorrt85.json").read_text())
    assert found["matrix"]["cells"] == 2 and found["matrix"]["red"] == 0
    assert found["nothing"] == {"mean": "nan", "sum": "0.0"}
    assert found["stages"]["two"]["ulp"] <= 2
    assert found["nan through clip"] == {
        "clip of nan, -2, 0.5, inf to -1..1": ["nan", "-1.0", "0.5", "1.0"]
    }
    assert "has no attribute 'deserialize'" in found["damaged engine"]["byte at 50%"]
    cells = json.loads((tmp_path / "report.json").read_text())["cells"]
    assert {cell["backend"] for cell in cells} == {card.BACKEND}
    engine._worker.cache_clear()


def asked_nothing() -> None:
    raise UnsupportedError("Unsupported SM: 0x900")


def test_without_an_engine_the_words_of_tensorrt_are_the_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.tensorrt85 import card

    monkeypatch.setattr(engine, "unpacked", lambda: ([sys.executable, FAKE], None))
    monkeypatch.setattr(engine, "EngineRunner", lambda *_: asked_nothing())
    engine._worker.cache_clear()
    assert card.main(tmp_path) == 1
    assert (
        "NO GO: one engine" in (out := capsys.readouterr().out) and "Unsupported SM: 0x900" in out
    )
    engine._worker.cache_clear()


def test_what_the_worker_refuses_is_refused_with_its_words(asked: Worker) -> None:
    with pytest.raises(UnsupportedError, match=r"Fail|InvalidProtobuf|INVALID_PROTOBUF"):
        asked.ask("build", b"no model", profile={})
    with pytest.raises(UnsupportedError, match="IndexError: list index out of range"):
        asked.ask("run", engine=99, inputs=[])


def test_where_it_is_not_unpacked_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TENSORRT85", str(tmp_path))
    with pytest.raises(BackendUnavailableError, match=r"bench/tensorrt85/pack\.py fills"):
        unpacked()


def test_a_spec_that_it_has_no_kernels_for_is_refused() -> None:
    backend = Tensorrt85.__new__(Tensorrt85)
    assert "no float64" in str(backend.refuses(LossSpec(dtype="float64")))
    assert "no bfloat16" in str(backend.refuses(LossSpec(dtype="bfloat16")))
    assert "IsInf" in str(backend.refuses(LossSpec(gradient=True)))
    assert backend.refuses(LossSpec()) is None
