"""`scripts/mutate`: it changes lines that there are, and tells which change no test sees."""

from pathlib import Path

import mutate
import pytest
from mutate import Mutation, mutations, survives


def test_each_line_that_is_to_be_changed_is_there_once() -> None:
    assert len(mutations()) >= 40
    for mutation in mutations():
        assert mutation.text
        assert all(
            (mutate._ROOT / test.partition("::")[0]).is_file() for test in mutation.tests.split()
        )


@pytest.mark.parametrize(("asserted", "lives"), [("2 + 2 == 4", False), ("True", True)])
def test_a_change_lives_where_no_test_turns_red(
    asserted: str, lives: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutate, "_ROOT", tmp_path)
    (tmp_path / "four.py").write_text("FOUR = 4\n")
    test = f"from four import FOUR\ndef test():\n    assert {asserted.replace('4', 'FOUR')}\n"
    (tmp_path / "test_four.py").write_text(test)
    assert survives(Mutation("four.py", "= 4", "= 5", "test_four.py"), tmp_path) is lives
    assert (tmp_path / "four.py").read_text() == "FOUR = 4\n"
