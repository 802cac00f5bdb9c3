"""Every command and every line of Python in the README and in docs/ is run as it stands there.

A page is followed by a reader: its `console` and `python` blocks run in their order, in one empty
folder, and nothing else is there. A block that is to fail says so behind its kind: `console exits
with 1`. Blocks of another kind (`text`, `yaml`) are only shown. Where a page's commands need a
shell, as those of a server in the background, the whole page is a script.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from reader import follow

from smoothl1_deploy.backends._names import BACKENDS, REFERENCES
from smoothl1_deploy.errors import BackendUnavailableError
from smoothl1_deploy.graph._export import ROUTES
from smoothl1_deploy.ops import library

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"```(console|python)(?: exits with (\d))?\n(.*?)```", re.DOTALL)
#: What a page needs beyond the core, told by what stands on it.
NEEDS = {
    "smoothl1-deploy build": "tensorrt_rtx",
    "smoothl1-deploy repository": "tritonclient",
    "smoothl1-deploy serve": "tritonclient",
    "table.parquet": "pyarrow",
    "--engine ray": "ray",
}


def _script(page: str) -> str:
    parts = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT"]
    for kind, fails, text in BLOCK.findall(page):
        assert not fails, "a page that is one script has no block that fails"
        parts.append(f"python - <<'PAGE'\n{text}PAGE" if kind == "python" else text)
    return "\n".join(parts) + "\n"


def _steps(page: str) -> list[tuple[str, str, int]]:
    """What to do, how, and with which exit code it ends."""
    steps: list[tuple[str, str, int]] = []
    for kind, fails, text in BLOCK.findall(page):
        if kind == "python":
            steps.append((kind, text, 0))
            continue
        for line in text.splitlines():
            program, _, words = line.partition(" ")
            if program != "smoothl1-deploy" or set("$|&;<>()`\\") & {*words}:
                return [("shell", _script(page), 0)]
            steps.append(("command", words, int(fails or 0)))
    return steps


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    programs = tmp_path / "bin"
    programs.mkdir()
    command = programs / "smoothl1-deploy"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m smoothl1_deploy "$@"\n')
    command.chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "COLUMNS": "100"}


def _skip_without_operators(page: Path) -> None:
    try:
        library()
    except BackendUnavailableError as exc:
        pytest.skip(f"{page.name}: {exc}")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_page_runs(page: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    text = page.read_text(encoding="utf-8")
    for words, module in NEEDS.items():
        if words in text:
            pytest.importorskip(module, reason=f"{page.name} runs `{words}`")
    if "ops.register" in text or "repository models --ops" in text:
        _skip_without_operators(page)
    folder = tmp_path / "reader"
    folder.mkdir()
    log = tmp_path / "log"
    for kind, step, expected in _steps(text):
        if kind == "shell":
            with open(log, "ab") as out:
                shell = ["bash", "-euo", "pipefail", "-c", step]
                code = subprocess.run(shell, cwd=folder, env=environment, stdout=out, stderr=out)
                status = code.returncode
        else:
            status = follow(kind, step, folder, environment, log)
        assert status == expected, f"{step}\n{log.read_text()[-3000:]}"


def test_every_command_is_run_by_a_page_in_a_process_of_its_own() -> None:
    """What one process imported, another command would find there and miss elsewhere."""
    from smoothl1_deploy.cli._registry import COMMANDS

    blocks = [block for page in PAGES for block in BLOCK.findall(page.read_text(encoding="utf-8"))]
    text = "\n".join(text for kind, _, text in blocks if kind == "console")
    assert {*COMMANDS} <= set(re.findall(r"^smoothl1-deploy ([a-z]+)", text, re.MULTILINE))


def test_every_option_of_a_command_stands_on_a_page() -> None:
    from smoothl1_deploy.cli._registry import COMMANDS, _load

    pages = [*PAGES, ROOT / "CONTRIBUTING.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    for name in COMMANDS:
        found = _load(name)
        for command in getattr(found, "commands", {"": found}).values():
            for parameter in command.params:
                names = {*parameter.opts, *parameter.secondary_opts} - {"--help", "--json"}
                if parameter.param_type_name == "option" and names:
                    said = any(re.search(rf"{option}\b(?!-)", text) for option in names)
                    assert said, f"{name} {names} stands on no page"


def test_the_readme_has_commands_and_python() -> None:
    kinds = [kind for kind, _, _ in BLOCK.findall(README)]
    assert kinds.count("console") >= 1 and kinds.count("python") >= 2
    assert len(re.findall(r"^smoothl1-deploy ", README, re.MULTILINE)) >= 8


def _anchors(page: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    prose = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_what_it_links_to_exists() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", text):
            target = (page.parent / link).resolve() if link else page
            assert target.exists(), (page.name, link)
            assert not anchor or anchor in _anchors(target.read_text()), (page.name, link, anchor)


def test_the_routes_and_backends_it_names_are_the_routes_and_backends() -> None:
    assert all(f"| `{route}`" in README for route in ROUTES)
    named = set(re.findall(r"^\| `([a-z-]+)` \|", README, re.MULTILINE))
    assert {*BACKENDS} - {*REFERENCES} <= named
