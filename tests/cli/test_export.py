"""`export`: what it writes, what it says, what it refuses."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path

import onnx
import pytest
import typer
from conftest_cli import Cli, assert_refused

from smoothl1_deploy import LossSpec, export
from smoothl1_deploy.cli._options import (
    SPEC_OPTIONS,
    as_command,
    help_of,
    parse_shape,
    takes_spec,
)
from smoothl1_deploy.errors import SpecError
from smoothl1_deploy.graph._export import ROUTES
from smoothl1_deploy.graph._metadata import read_route, read_spec


@pytest.mark.parametrize("route", ROUTES)
def test_the_file_is_what_the_api_exports(cli: Cli, route: str) -> None:
    done = cli(
        "export", "--beta", 0.5, "--reduction", "sum", "--dtype", "float16", "--route", route,
        "--shape", "N,16", "--target-shape", "16", "-o", "loss.onnx", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    spec = LossSpec(0.5, "sum", "float16")
    expected = export(spec, route, ("N", 16), target_shape=(16,))
    data = Path("loss.onnx").read_bytes()
    assert data == expected.SerializeToString(deterministic=True)
    report = json.loads(done.out)
    assert report["sha256"] == hashlib.sha256(data).hexdigest()
    assert report["bytes"] == len(data)
    assert report["path"] == "loss.onnx"
    assert report["spec"] == spec.to_dict()
    assert report["route"] == route
    assert report["inputs"] == [
        {"name": "input", "dtype": "float16", "shape": ["N", 16]},
        {"name": "target", "dtype": "float16", "shape": [16]},
    ]
    assert report["outputs"] == [{"name": "loss", "dtype": "float16", "shape": []}]


def test_every_field_of_a_spec_has_an_option_and_no_option_says_what_was_not_said() -> None:
    assert set(SPEC_OPTIONS) == {field.name for field in fields(LossSpec)}
    said: list[dict[str, object]] = []

    @takes_spec("weight")
    def command(given: dict[str, object], *, route: str = "function") -> None:
        said.append(given)

    for arguments in ([], ["--beta", "0", "--per-sample"]):
        app = typer.Typer()
        app.command()(command)
        app(arguments, standalone_mode=False)
    assert said == [{}, {"beta": 0.0, "per_sample": True}]


def test_a_signature_and_a_docstring_say_what_the_options_of_a_command_are() -> None:
    def command(file: Path, *, output: Path, quick: bool = False, drift: bool = True) -> None:
        """Do it.

        Options:
            file: What is read,
                whole.

        A panel:
            quick: Faster.
        """

    assert help_of(command)[0] == "Do it."
    app = typer.Typer(add_completion=False)
    app.command()(as_command(command))
    found = [
        (p.opts + p.secondary_opts, p.help, getattr(p, "rich_help_panel", None))
        for p in typer.main.get_command(app).params
    ]
    assert found == [
        (["file"], "What is read, whole.", None),
        (["-o", "--output"], None, None),
        (["--quick"], "Faster.", "A panel"),
        (["--drift", "--no-drift"], None, None),
        (["-q", "--quiet"], "No notes, no progress, and not what comes next.", None),
    ]


def test_defaults_and_the_name_of_the_file(cli: Cli) -> None:
    done = cli("export")
    assert done.code == 0
    name = f"{LossSpec().name}.onnx"
    assert name in done.out
    model = onnx.load(name)
    assert (read_spec(model), read_route(model)) == (LossSpec(), "function")
    assert not model.graph.input[0].type.tensor_type.HasField("shape")
    assert "any rank is taken, by ONNX Runtime but not by TensorRT" in done.err


def test_what_a_person_reads(cli: Cli) -> None:
    done = cli("export", "--beta", "inf", "--shape", "N,16", "-o", "loss.onnx")
    assert done.err == ""
    lines = dict(line.split(maxsplit=1) for line in done.out.splitlines())
    data = Path("loss.onnx").read_bytes()
    assert lines["wrote"] == f"loss.onnx, {len(data):,} bytes"
    assert lines["spec"] == "beta=inf, reduction=mean, dtype=float32"
    assert lines["inputs"] == "input: float32[N, 16], target: float32[N, 16]"
    assert lines["outputs"] == "loss: float32[]"
    assert lines["sha256"] == hashlib.sha256(data).hexdigest()


def test_an_opset_is_chosen_and_one_beyond_is_told_the_range(cli: Cli) -> None:
    assert cli("export", "--shape", "N,16", "--opset", 13, "-o", "loss.onnx").code == 0
    assert Path("loss.onnx").read_bytes() == export(
        LossSpec(), shape=("N", 16), opset=13
    ).SerializeToString(deterministic=True)
    done = cli("export", "--opset", 12, "-o", "old.onnx")
    assert_refused(done, "the route 'function' writes this loss in the opsets 13 to 26")
    assert not Path("old.onnx").exists()


def test_the_extensions_reach_the_graph(cli: Cli) -> None:
    done = cli(
        "export", "--shape", "N,16", "--per-sample", "--gradient", "--runtime-beta",
        "--weight", "count", "--weight-shape", "N,1", "-o", "loss.onnx", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    report = json.loads(done.out)
    ports = {port["name"]: port["shape"] for port in report["inputs"] + report["outputs"]}
    assert ports == {
        "input": ["N", 16],
        "target": ["N", 16],
        "weight": ["N", 1],
        "beta": [],
        "loss": ["N"],
        "grad_input": ["N", 16],
    }


def test_bad_input_exits_with_2_and_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    for arguments, message in (
        ("--beta -1", "beta must not be negative, got -1.0"),
        ("--beta [0.5,-1]", "beta must not be negative, got -1.0"),
        ("--reduction avg", "unknown reduction 'avg'; choose one of none, mean, sum"),
        ("--dtype int8", "unknown dtype 'int8'; choose one of float32"),
        ("--route magic", "unknown route 'magic'; choose one of function, inlined, torch"),
        ("--route torch", "the torch route can't export any rank"),
        ("--shape Nx16", "--shape 'Nx16': separate the axes by commas, as in N,16"),
        ("--shape N,-1", "has the axis -1"),
        ("--shape N,,3", "has the axis ''"),
        ("--target-shape 3", "error: --target-shape without shape"),
        ("--shape 4 --target-shape 3", "can't be broadcast"),
        ("--weight heavy", "unknown weight 'heavy'"),
        ("--runtime-beta --beta 2", "so beta 2.0 would be ignored"),
    ):
        assert_refused(cli("export", *arguments.split()), message)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written(cli: Cli, tmp_path: Path) -> None:
    Path("a-file").write_text("the old one")
    for output in ("a-file/loss.onnx", "a-file/nowhere/loss.onnx", "."):
        done = cli("export", "--shape", "3", "-o", output)
        assert_refused(done, f"error: can't write {output}")
        assert ("it is a folder" if output == "." else "a folder that you may write to") in done.err
    assert cli("export", "--beta", "-1", "-o", "a-file").code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"]
    assert Path("a-file").read_text() == "the old one"


def test_shapes_as_they_are_written() -> None:
    for text, shape in (
        (None, None),
        ("", ()),
        ("scalar", ()),
        ("N, 16", ("N", 16)),
        ("0,3", (0, 3)),
        ("x1", ("x1",)),
    ):
        assert parse_shape(text) == shape
    with pytest.raises(SpecError, match="as in 1,3,16"):  # as the names of graphs show it
        parse_shape("1x3x16")


def test_help_names_every_route_reduction_and_dtype(cli: Cli) -> None:
    text = cli("export", "--help").out
    for word in (*ROUTES, "none", "mean", "sum", "float32", "float16", "bfloat16", "float64"):
        assert word in text
