"""`run` and `verify` of a model with losses attached, by its own names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest_cli import Cli, assert_refused
from handmade import model_of
from planted import planted

from smoothl1_deploy import LossSpec, load
from smoothl1_deploy._floats import Array
from smoothl1_deploy.errors import BuildError

DETECTOR = """
g (float[N, 3, 8, 8] images) => (float[N, 192] boxes) {
  flat = Flatten(images)
  boxes = Tanh(flat)
}"""
NAMED = ("--input", "images=im.npy", "--input", "boxes_gt=gt.npy")


@pytest.fixture(autouse=True)
def files(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(model_of(DETECTOR), "detector.onnx")
    words = ("--prediction", "boxes", "--target", "boxes_gt", "--per-sample")
    assert cli("attach", "detector.onnx", *words, "-o", "scored.onnx").code == 0
    images = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype("f4")
    arrays = {"images": images, "boxes_gt": images.reshape(2, 192)}
    np.save("im.npy", images)
    np.save("gt.npy", arrays["boxes_gt"])
    np.savez("pair.npz", **arrays, other=np.zeros(1))


def test_every_output_is_shown_and_written_from_files_or_an_archive(cli: Cli) -> None:
    with np.load("pair.npz") as pair:
        expected = load("scored.onnx").run(images=pair["images"], boxes_gt=pair["boxes_gt"])
    for words in (NAMED, ("--data", "pair.npz")):
        found = json.loads(cli("run", "scored.onnx", *words, "--json", "-o", "out.npz").out)
        assert {n: o["shape"] for n, o in found["outputs"].items()} == {
            "boxes": [2, 192],
            "loss": [2],
        }
        with np.load("out.npz") as written:
            for name, array in expected.items():
                np.testing.assert_array_equal(written[name], array)


def test_what_does_not_fit_is_told_of_by_name(cli: Cli) -> None:
    takes = "the model takes images: float32[N,3,8,8], boxes_gt: float32[N,192]"
    for words, text in (
        (("--input", "im.npy", "--target", "gt.npy"), f"boxes_gt is missing; {takes}"),
        (("--input", "image=im.npy"), f"images is missing, boxes_gt is missing; {takes}"),
        (("--input", "images=im.npy"), f"boxes_gt is missing; {takes}"),
        ((*NAMED, "--target", "gt.npy"), "by --input NAME=A.npy for each of its inputs"),
        ((*NAMED[:2], "--input", "gt.npy"), "by --input NAME=A.npy for each of its inputs"),
        ((*NAMED, "-o", "out.npy"), "2 outputs"),
        ((*NAMED[:2], "--input", "boxes_gt=no.npy"), "no.npy"),
        ((*NAMED, "--backend", "torch"), "runs losses alone"),
    ):  # fmt: skip
        assert_refused(cli("run", "scored.onnx", *words), text)
    np.savez("short.npz", images=np.zeros((2, 3, 8, 8), "f4"))
    assert_refused(cli("run", "scored.onnx", "--data", "short.npz"), "no array called boxes_gt")
    assert cli("export", "-o", "loss.onnx").code == 0
    assert_refused(cli("run", "loss.onnx", *NAMED), "loss.onnx is a loss of its own")


def test_verify_proves_the_loss_the_whole_and_what_was_there_before(cli: Cli) -> None:
    words = ("verify", "scored.onnx", "--no-drift", "--against", "detector.onnx")
    done = cli(*words, "--data", "pair.npz", "--certificate")
    assert done.code == 0, done.err
    assert "the whole model on ort-cpu" in done.out and "the same bits" in done.out
    certificate = json.loads(Path("scored.onnx.certificate.json").read_text())
    assert certificate["verdict"] == "green" and certificate["spec"]["per_sample"]
    assert certificate["losses"]["loss"]["verdict"] == "green"
    assert certificate["runs"][0]["same"] == {"boxes": True}
    assert "matches: 13 cases green" in cli("inspect", "scored.onnx").out


def test_other_bits_than_before_end_with_1_and_a_red_certificate(cli: Cli) -> None:
    onnx.save(model_of(DETECTOR.replace("Tanh", "Sigmoid")), "detector.onnx")
    words = ("verify", "scored.onnx", "--no-drift", "--against", "detector.onnx")
    done = cli(*words, "--certificate")
    assert done.code == 1 and "OTHER BITS" in done.out
    certificate = json.loads(Path("scored.onnx.certificate.json").read_text())
    assert certificate["verdict"] == "red" and certificate["red_cases"] == 0


DEPLOY = ("deploy", "detector.onnx", "--prediction", "boxes", "--target", "boxes_gt", "-o", "out")


def test_deploy_is_the_other_commands_and_repeats_no_proof(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = cli(*DEPLOY, "--per-sample", "--beta", 0.5, "--data", "pair.npz")
    assert done.code == 0, done.err
    said = [line for line in done.out.splitlines() if line.startswith("$ smoothl1-deploy ")]
    assert [line.split()[2] for line in said] == ["attach", "verify", "build", "repository"]
    assert "--beta 0.5 --per-sample -o out/scored.onnx" in said[0]
    assert Path("out/models/detector/1/model.onnx.certificate.json").is_file()

    def build(model: Path, *, profile: list[str] | None = None) -> None:
        """Stands in for one that fails."""
        raise BuildError("there is no tactic")

    monkeypatch.setattr("smoothl1_deploy.cli._build.build", build)
    again = cli(*DEPLOY, "--per-sample", "--beta", 0.5)
    assert again.code == 0 and "it is not proved again" in again.err
    assert "no engine: there is no tactic" in again.err
    changed = cli(*DEPLOY, "--per-sample", "--beta", 0.25, "--name", "other")
    assert changed.code == 0 and "not proved again" not in changed.err
    assert Path("out/models/other/config.pbtxt").is_file()


def test_deploy_stops_at_a_step_that_fails(cli: Cli) -> None:
    missing = cli(*DEPLOY, "--data", "no.npz")
    assert missing.code == 2 and "error: no.npz can't be read" in missing.err

    def doubled(spec: LossSpec, input: Array, right: dict[str, Array]) -> dict[str, Array]:
        return {name: 2 * array for name, array in right.items()}

    with planted(doubled):
        done = cli(*DEPLOY)
    assert done.code == 1 and "$ smoothl1-deploy build" not in done.out
    assert not Path("out/models").exists()
