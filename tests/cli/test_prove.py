"""`smoothl1-deploy prove`: what it writes, goes on with, and refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smoothl1_deploy.cli import main
from smoothl1_deploy.parity import _pairs
from smoothl1_deploy.parity._pairs import PAIRS, Distances, Proof, Tally


class Steps:
    """In the place of `prove`: two halves of the pairs, and an interrupt where one is wanted."""

    def __init__(self) -> None:
        self.left: list[int] = []
        self.most: list[int | None] = []
        self.stop = False
        self.ulp = 1

    def __call__(self, proof: Proof, **options: Any) -> Iterator[Proof]:
        self.left.append(len(proof.left))
        self.most.append(options["most"])
        for left in (proof.left[:32], ()) if proof.left else ():
            pairs = PAIRS * (64 - len(left)) // 64
            ours = Distances((pairs - 3, 3, 0, 0), self.ulp)
            yield replace(
                proof,
                left=left,
                outputs={"ort-cpu": {"loss": Tally(pairs, ours, Distances((pairs, 0, 0, 0)))}},
            )
            if self.stop:
                raise KeyboardInterrupt


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Steps:
    made = Steps()
    monkeypatch.setattr(_pairs, "prove", made)
    monkeypatch.chdir(tmp_path)
    return made


def test_an_interrupt_keeps_what_is_known_and_the_same_command_goes_on(
    steps: Steps, capsys: pytest.CaptureFixture[str]
) -> None:
    steps.stop = True
    assert main(["prove", "-o", "p.json"]) == 130
    assert "the same command goes on" in capsys.readouterr().out
    (entry,) = json.loads(Path("p.json").read_text())["entries"]
    assert entry["pairs"] == PAIRS // 2 and not entry["ok"]
    steps.stop = False
    assert main(["prove", "--beta", "1", "--beta", "0", "-o", "p.json"]) == 0
    assert steps.left == [64, 32, 64]
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    for beta in ("1", "0"):
        row = [beta, "loss", "4,294,967,296", "all", "99.9999%,", "1", "ULP"]  # 3 pairs are off
        assert row in lines
    entries = json.loads(Path("p.json").read_text())["entries"]
    assert [(e["claim"]["beta"], e["pairs"], e["ok"]) for e in entries] == [
        (1.0, PAIRS, True),
        (0.0, PAIRS, True),
    ]
    assert main(["prove", "--quick", "-o", "p.json"]) == 0
    assert steps.left[-1] == 0 and steps.most == [None, None, None, 1]


def test_what_other_versions_found_is_not_gone_on_with(
    steps: Steps, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prove", "-o", "p.json"]) == 0
    changed = Path("p.json").read_text().replace('"python": "3', '"python": "2')
    Path("p.json").write_text(changed)
    assert main(["prove", "-o", "p.json"]) == 0
    assert steps.left == [64, 64] and "made by other versions" in capsys.readouterr().err


def test_a_red_pair_is_shown_and_ends_with_1(
    steps: Steps, capsys: pytest.CaptureFixture[str]
) -> None:
    steps.ulp = 2
    assert main(["prove", "-o", "p.json", "--md", "p.md"]) == 1
    red = "beta 1, ort-cpu, loss: red, too far off, as null"
    assert red in capsys.readouterr().out and f"- `{red}`" in Path("p.md").read_text()


def test_a_file_of_something_else_is_left_alone(
    steps: Steps, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("[]", "{}", '{"entries": [1]}', '{"entries": [{"claim": {}}]}', "\x00"):
        Path("p.json").write_text(text)
        assert main(["prove", "-o", "p.json"]) == 2
        assert "is no file of smoothl1-deploy prove" in capsys.readouterr().err
        assert Path("p.json").read_text() == text
    assert main(["prove", "--dtype", "float32"]) == 2 and not steps.left
