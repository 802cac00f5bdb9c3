"""The command `repository`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import yaml
from conftest_cli import Done, model, spawn
from handmade import model_of

from smoothl1_deploy.errors import BackendUnavailableError
from smoothl1_deploy.ops import library
from smoothl1_deploy.parity._certificate import read_certificate

pytest.importorskip("tritonclient", reason="the extra serve")


def test_what_is_written_passes_the_lint_and_another_config_does_not(
    cli: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "no-triton"))  # nor is one on PATH
    monkeypatch.setattr("shutil.which", lambda *_: None)
    done = cli("repository", "models", "--per-sample", "--beta", "0", "--name", "score")
    assert done.code == 0, done.err
    assert "wrote        models/score" in done.out
    assert "batching     up to 64 rows of any requests together" in done.out
    assert (
        "certificate  no certificate; smoothl1-deploy verify --certificate writes one" in done.out
    )
    done = cli("repository", "models", "--reduction", "sum", "--shape", "rows,3,4", "--name", "sum")
    assert "batching     none: loss is a sum over all rows of a batch" in done.out
    config = Path("models/sum/config.pbtxt").read_text()
    assert "dims: -1\n  dims: 3\n  dims: 4\n" in config
    done = cli("repository", "--lint", "models")
    assert (done.code, done.err) == (0, "")
    assert (
        "no findings in 2 models\nwhat Triton itself refuses was not asked: there is no" in done.out
    )

    assert cli("verify", "models/score/1/model.onnx", "--certificate").code == 0
    found = json.loads(cli("repository", "--lint", "models", "--json").out)
    assert found["note"].startswith("there is no Triton Inference Server")
    assert found["ok"] and found["certificates"]["score/1/model.onnx"]["state"] == "matches"
    assert found["certificates"]["sum/1/model.onnx"]["state"] == "absent"

    Path("models/score/config.pbtxt").write_text(config)
    done = cli("repository", "--lint", "models")
    assert done.code == 1
    assert "score: wrong-dims: the input 'input' has the dims [-1, 3, 4], in the model" in done.out
    assert "    write the dims as the model has them" in done.out
    assert "findings in 2 models" in done.out


def test_a_model_of_ones_own_and_a_cluster(cli: Callable[..., Done]) -> None:
    done = cli(
        "repository", "my_models", "--model", model(), "--kserve", "isvc.yaml", "--json"
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["kserve"] == "isvc.yaml"
    (written,) = found["models"]
    assert (written["name"], written["max_batch_size"]) == ("loss", 0)
    assert written["certificate"]["state"] == "absent"
    service = yaml.safe_load(Path("isvc.yaml").read_text())
    assert service["metadata"]["name"] == "my-models"
    assert service["spec"]["predictor"]["model"]["storageUri"] == "pvc://models/my_models"


def test_with_ops_the_server_is_told_of_the_operators_and_the_certificate_is_of_them(
    cli: Callable[..., Done],
) -> None:
    try:
        path = library()
    except BackendUnavailableError as exc:
        pytest.skip(str(exc))
    assert cli("repository", "a", "--name", "one", "--route", "function").code == 0
    assert cli("repository", "a", "--name", "two", "--ops", "--certify").code == 0
    without, told = (Path(f"a/{name}/config.pbtxt").read_text() for name in ("one", "two"))
    field = f'model_operations {{\n  op_library_filename: "{path}"\n}}\n'
    assert told == without.replace("one", "two") + field
    assert Path("a/one/1/model.onnx").read_bytes() == Path("a/two/1/model.onnx").read_bytes()
    assert read_certificate("a/two/1/model.onnx").content["backend"] == "ort-cpu"
    assert "no findings" in cli("repository", "--lint", "a").out

    done = cli("repository", "b", "--ops", "--route", "inlined")
    assert done.code == 2 and not Path("b").exists()
    assert "operators compute nodes of the domain smoothl1_deploy, and the model has" in done.err


def test_certified_as_it_is_written(cli: Callable[..., Done]) -> None:
    assert cli("repository", "a", "--per-sample", "--name", "own", "--certify").code == 0
    grafted = model(reduction="none")
    arguments = ("--prediction", "loss", "--target", "gt", "--only-loss", "-o", "attached.onnx")
    assert cli("attach", grafted, *arguments).code == 0
    done = cli("repository", "a", "--model", "attached.onnx", "--certify", "--json")
    (written,) = json.loads(done.out)["models"]
    assert (done.code, written["certificate"]["state"]) == (0, "matches")
    done = cli("repository", "--lint", "a")
    assert (done.code, done.out.count("cases green on")) == (0, 2)

    assert cli("attach", "attached.onnx", "--prediction", "gt", "--target", "loss",
               "-o", "two.onnx").code == 0  # fmt: skip
    assert cli("repository", "b", "--model", "two.onnx", "--certify").code == 0
    certificate = json.loads(Path("b/two/1/model.onnx.certificate.json").read_text())
    assert {name: each["verdict"] for name, each in certificate["losses"].items()} == {
        "loss_1": "green",
        "loss_2": "green",
    }
    onnx.save(model_of("g (float[N, 4] x) => (float[N, 4] y) {y = Abs(x)}"), "none.onnx")
    done = cli("repository", "c", "--model", "none.onnx", "--certify")
    assert (done.code, Path("c").exists()) == (2, False)
    assert "the model says of no loss that it computes it" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give the folder to write into, or --lint FOLDER to check one"),
        (("a", "--lint", "b"), "--lint writes nothing; give the folder to check alone"),
        (("--lint", "b", "--beta", "0"), "--lint writes nothing"),
        (
            ("a", "--model", "loss.onnx", "--beta", "0", "--per-sample"),
            "--model brings its own loss, and --beta, --per-sample would be ignored",
        ),
        (("a", "--storage-uri", "pvc://a/b"), "--storage-uri is what --kserve FILE says"),
        (("a", "--tensorrt-version", "10"), "--tensorrt-version is what --lint holds plans"),
        (("a", "--kserve", "x", "--storage-uri", "b"), "the storage URI 'b' has no scheme"),
        (("a", "--model", "nope.onnx"), "nope.onnx does not exist"),
        (("a", "--shape", "4,16"), "a served loss takes any number of rows"),
        (("a", "--max-batch-size", "8"), "requests must not be batched together"),
        (("--lint", "nowhere"), "nowhere is no folder"),
    ],
)
def test_bad_requests_write_nothing(
    cli: Callable[..., Done], arguments: tuple[str, ...], message: str
) -> None:
    done = cli("repository", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert list(Path().iterdir()) == []


def test_without_tritonclient_it_says_how_to_get_it(cli: Callable[..., Done]) -> None:
    done = spawn("repository", "models", without="tritonclient")
    assert done.code == 3
    assert "pip install 'smoothl1-deploy[serve]'" in done.err
    assert not Path("models").exists()
