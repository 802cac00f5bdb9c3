"""A table of text: whole in a terminal of any width, and harmless in a page."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from smoothl1_deploy._table import Entry, Table

_NUMBERS = ("2,994,212,345", "1", "class", "4,194,304", "9,223,372,036,854,775,807", "7.7e-08")
WIDE = Table(
    "title",
    ("family", *(f"a{at} number" for at in range(len(_NUMBERS)))),
    [("inf-minus-inf", *_NUMBERS), ("normal", Entry("2,994,212,345", False), *_NUMBERS[1:])],
    "l" + "r" * len(_NUMBERS),
)


def shown(table: Table, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, soft_wrap=True)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize(("width", "parts"), [(200, 1), (80, 2), (41, 6)])
def test_one_that_is_too_wide_becomes_several_with_every_number_whole(
    width: int, parts: int
) -> None:
    text = shown(WIDE, width)
    assert max(map(len, text.splitlines())) <= width
    assert [text.split().count(number) for number in _NUMBERS] == [2] * len(_NUMBERS)
    assert text.count("inf-minus-inf") == text.count("family") == parts


def test_long_text_is_broken_between_its_words_alone() -> None:
    prose = "beta = 0.5 fits every one of the answers; the spec says 1.2345678901"
    table = Table("why", ("fault", "why"), [("wrong beta", prose)], "ll", below=(prose,))
    text = shown(table, 50)
    assert max(map(len, text.splitlines())) <= 50
    assert text.split()[-len(prose.split()) :] == prose.split()
    assert text.split().count("1.2345678901") == 2


def test_its_html_holds_all_of_it_and_no_markup() -> None:
    hostile = "<script>&\x00"
    table = Table(hostile, (hostile, "n"), [(hostile, Entry(hostile, False))], "lr", (hostile,))
    text = table.html()
    assert text.count("&lt;script&gt;&amp;\ufffd") == 5 and "<script>" not in text
    assert '<b class="bad">✕ &lt;' in text
