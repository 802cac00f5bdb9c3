"""A table of text: for a terminal, as Markdown, and as HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.text import Text

_GAP = 2  # letters between two columns of a terminal
_PROSE = 30  # letters; a longer text may be broken between its words

# XML 1.0 has no place for these, and a browser drops or replaces them.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
# What no Markdown can be made of, nor a link: a point stands between digits alone.
_HARMLESS = re.compile(r"(?:[\w ,/%=^+–★-]|(?<=\d)\.(?=\d)|(?<=\w)'(?=\w))*")


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a table that is good or bad."""

    text: str
    ok: bool


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text, under a title.

    Attributes:
        title: what stands above.
        columns: their names.
        rows: a text or an `Entry` for each column.
        align: a letter for each column: `l`, or `r` for numbers, which are never broken.
        below: lines that stand below.
        keys: how many columns, the first, say what a row is.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Entry | str, ...]]
    align: str
    below: tuple[str, ...] = ()
    keys: int = 1

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """For a terminal: where it is too wide, in parts that begin with the keys."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        room = options.max_width
        yield Text(self.title, "bold", no_wrap=False, overflow="fold")
        widths = [self._widths(at, (room - _GAP) // 2) for at in range(len(self.columns))]
        for number, part in enumerate(_parts([least for least, _ in widths], self.keys, room)):
            if number:
                yield Text()
            table = RichTable(
                box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0)
            )
            spare = max(0, room - sum(widths[at][0] + _GAP for at in part) + _GAP)
            fits = sum(whole - least for least, whole in (widths[at] for at in part)) <= spare
            for at in part:
                least, width = widths[at]
                if not fits:  # names of numbers take two lines then, and text what is left
                    width = min(width, least + spare) if self.align[at] == "l" else least
                spare -= width - least
                justify: Literal["left", "right"] = "right" if self.align[at] == "r" else "left"
                table.add_column(
                    Text(self.columns[at]), justify=justify, width=width, overflow="fold"
                )
            for row in self.rows:
                table.add_row(*(_rich_entry(row[at]) for at in part))
            yield table
        for line in self.below:
            yield Text(line, "dim", no_wrap=False, overflow="fold")

    def _widths(self, at: int, most: int) -> tuple[int, int]:
        """The least width of a column, and that in which nothing of it is broken."""
        from rich.cells import cell_len

        lines = [line for row in self.rows for line in _text(row[at]).split("\n")]
        whole = max(map(cell_len, lines), default=0)
        if self.align[at] == "r" or whole <= _PROSE:
            least = whole
        else:
            least = min(most, max(_PROSE, *(cell_len(w) for line in lines for w in line.split())))
        name = self.columns[at]
        return max(least, *map(cell_len, name.split() or [""])), max(whole, cell_len(name))

    def markdown(self) -> list[str]:
        """The lines of GitHub-flavoured Markdown, a blank one at either end."""
        header, *rows = ([*map(_markdown_entry, row)] for row in (self.columns, *self.rows))
        below = [f"- {harmless(line)}" for line in self.below]
        return ["", *markdown_table(header, rows, self.align), "", *below, *([""] if below else [])]

    def html(self) -> str:
        """An element for a page or a notebook, all of its text escaped."""
        names = "".join(
            f'<th scope="col"{self._side(at)}>{_escaped(name)}</th>'
            for at, name in enumerate(self.columns)
        )
        rows = "".join(f"<tr>{''.join(self._html_row(row))}</tr>\n" for row in self.rows)
        below = "".join(f"<li>{_escaped(line)}</li>\n" for line in self.below)
        return (
            f'<div class="scroll"><table class="plain">\n<caption>{_escaped(self.title)}</caption>'
            f"\n<thead><tr>{names}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n"
            + (f'<ul class="below">\n{below}</ul>\n' if below else "")
        )

    def _html_row(self, row: Sequence[Entry | str]) -> Iterator[str]:
        for at, entry in enumerate(row):
            text, side = _escaped(_text(entry)), self._side(at)
            if isinstance(entry, Entry) and not entry.ok:
                yield f'<td{side}><b class="bad">✕ {text}</b></td>'
            else:
                yield f'<th scope="row"{side}>{text}</th>' if at == 0 else f"<td{side}>{text}</td>"

    def _side(self, at: int) -> str:
        """The attributes of a column: a notebook sets everything flush right by itself."""
        return ' class="n"' if self.align[at] == "r" else ' style="text-align: left"'


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> list[str]:
    r"""The lines of a table of GitHub-flavoured Markdown; `align` has `l` or `r` for each column.

    >>> print("\n".join(markdown_table(("name", "ULP"), [("a|b", "2")], "lr")))
    | name | ULP |
    | --- | ---: |
    | a\|b | 2 |
    """
    rule = ["---:" if letter == "r" else "---" for letter in align]
    # A pipe ends a cell, inside a code span too.
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (header, rule, *cells)]


def _text(entry: Entry | str) -> str:
    return entry if isinstance(entry, str) else entry.text


def _parts(widths: Sequence[int], keys: int, room: int) -> list[list[int]]:
    """Which columns stand in each part: as few parts as the room takes, and as even as can be."""
    first, rest = [*range(keys)], [*range(keys, len(widths))]
    parts = [[*first, *rest]]
    for count in range(1, len(rest) + 1):
        size = -(-len(rest) // count)
        parts = [[*first, *rest[at : at + size]] for at in range(0, len(rest), size)]
        if all(sum(widths[at] + _GAP for at in part) - _GAP <= room for part in parts):
            break
    return parts


def _rich_entry(entry: Entry | str) -> Text:
    from rich.text import Text

    if isinstance(entry, str):
        return Text(entry)
    return Text(entry.text, style="green" if entry.ok else "bold white on red")


def _markdown_entry(entry: Entry | str) -> str:
    if isinstance(entry, Entry) and not entry.ok:
        return f"❌ **{entry.text}**"
    return harmless(_text(entry))


def harmless(text: str) -> str:
    """`text` as Markdown that shows it and nothing else: as a code span, where it has to be one."""
    return text if _HARMLESS.fullmatch(text) else code(text)


def _escaped(text: str) -> str:
    return escape(clean(text))


def clean(text: str) -> str:
    """`text` with every character that XML or UTF-8 can't hold replaced by U+FFFD."""
    return _CONTROL.sub("\ufffd", text)


def code(text: str) -> str:
    """A code span of Markdown: nothing in it is markup, a mention or a link."""
    text = " ".join(clean(text).split())
    fence = "`" * (1 + longest_backticks(text))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def longest_backticks(text: str) -> int:
    """The length of the longest run of backticks: a longer one is not closed from inside."""
    return max(map(len, re.findall("`+", text)), default=0)
