"""Every command and every line of Python in the README is run as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
COMMANDS = re.search(r"```console\n(.*?)```", README, re.DOTALL).group(1).splitlines()  # type: ignore[union-attr]
PYTHON = "".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
DETECTOR = """<ir_version: 8, opset_import: ["" : 18]>
g (float[N, 4] x) => (float[N, 4] boxes) { boxes = Relu(x) }"""
RUN = "import sys; from smoothl1_deploy.cli import main; sys.exit(main())"


@pytest.fixture(autouse=True)
def detector(tmp_path: Path) -> None:
    """The reader's own model."""
    onnx.save(parser.parse_model(DETECTOR), tmp_path / "detector.onnx")


def test_the_python_examples(tmp_path: Path) -> None:
    assert "attach(" in PYTHON
    done = subprocess.run(
        [sys.executable, "-c", PYTHON], cwd=tmp_path, env=ENVIRONMENT, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


def test_the_commands_in_their_order(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the README builds an engine")
    np.save(tmp_path / "input.npy", np.ones((4, 16), np.float32))
    np.save(tmp_path / "target.npy", np.zeros((4, 16), np.float32))
    assert len(COMMANDS) >= 7
    for command in COMMANDS:
        program, *words = command.split()
        assert program == "smoothl1-deploy"
        done = subprocess.run(
            [sys.executable, "-c", RUN, *words],
            cwd=tmp_path,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        if words[0] == "run":
            assert done.stdout.strip() == "0.75"
    assert (tmp_path / "loss.engine").is_file() and (tmp_path / "out/parity/report.json").is_file()


def test_what_it_links_to_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).is_file(), link


@pytest.mark.parametrize("route", ["function", "inlined", "torch"])
def test_the_routes_it_names_are_the_routes(route: str) -> None:
    from smoothl1_deploy.graph.export import ROUTES

    assert route in ROUTES and f"| `{route}`" in README


def test_the_backends_it_names_are_the_backends() -> None:
    from smoothl1_deploy.backends.base import BACKENDS

    named = set(re.findall(r"^\| `([a-z-]+)` \|", README, re.MULTILINE))
    assert {name for name in BACKENDS if name != "torch"} <= named
