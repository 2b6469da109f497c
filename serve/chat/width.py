"""Display width: text as the cells of a terminal, rows filled with them, and the escapes that style them."""

from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

from wcwidth import iter_graphemes, wcswidth

# The parameters of SGR, the only escape that is ever written.
BOLD, DIM, ITALIC, UNDERLINE, STRIKE = "1", "2", "3", "4", "9"
RED, GREEN, MAGENTA, CYAN = "31", "32", "35", "36"

TAB = 4  # columns

# No row begins with the first or ends with the second of these, where words are written without spaces.
_CLOSING = frozenset("，。、！？：；）」』】》〉”’…—·,.!?:;)]}%")
_OPENING = frozenset("（「『【《〈“‘([{$")
# A letter under more marks than this is an attack on the renderer, and ends here.
_LONGEST_GRAPHEME = 32


class Span(NamedTuple):
    """Text in one style: parameters of SGR, or "" for none."""

    text: str
    style: str = ""


class Cell(NamedTuple):
    """One grapheme and the columns it takes."""

    text: str
    columns: int
    style: str


def styled(style: str, more: str) -> str:
    """Both styles at once."""
    return f"{style};{more}" if style and more else style or more


def extend(row: list[Cell], span: Span) -> None:
    """Append text to a row; what combines with its last grapheme becomes part of that."""
    for char in span.text:
        if row and _joins(row[-1].text, char):
            text = row[-1].text + char
            row[-1] = Cell(text, _columns(text), row[-1].style)
        else:
            row.append(Cell(char, _columns(char), span.style))


def cells(spans: Iterable[Span]) -> list[Cell]:
    """The spans as one row."""
    row: list[Cell] = []
    for span in spans:
        extend(row, span)
    return row


def columns(row: Iterable[Cell]) -> int:
    """The columns that a row takes."""
    return sum(cell.columns for cell in row)


def fill(row: list[Cell], limit: int) -> tuple[list[list[Cell]], list[Cell]]:
    """The rows that are full, and the cells that are left for the next one."""
    full = []
    while columns(row) > limit:
        end = _break(row, limit)
        full.append(_without_end(row[:end]))
        row = row[end:]
        while row and row[0].text == " ":
            row = row[1:]
    return full, row


def wrapped(row: list[Cell], limit: int) -> list[list[Cell]]:
    """All rows of a text that is complete: at least one."""
    full, rest = fill(row, limit)
    rest = _without_end(rest)
    return [*full, rest] if rest or not full else full


def cut(row: list[Cell], limit: int) -> list[list[Cell]]:
    """The rows that a terminal makes of a line that is too long: cut anywhere."""
    rows: list[list[Cell]] = [[]]
    used = 0
    for cell in row:
        if used + cell.columns > limit:
            rows.append([])
            used = 0
        rows[-1].append(cell)
        used += cell.columns
    return rows


def paint(row: Iterable[Cell], has_colour: bool) -> str:
    """The row as a string that closes each style it opens."""
    if not has_colour:
        return "".join(cell.text for cell in row)
    parts = []
    for style, group in groupby(row, key=lambda cell: cell.style):
        text = "".join(cell.text for cell in group)
        parts.append(f"\x1b[{style}m{text}\x1b[0m" if style else text)
    return "".join(parts)


def is_wide(char: str) -> bool:
    """Whether it is written without spaces around words, as Chinese is."""
    return bool(char) and _columns(char) > 1


def _joins(last: str, char: str) -> bool:
    if char < "\u0300" or len(last) >= _LONGEST_GRAPHEME:
        return False
    return len(list(iter_graphemes(last + char))) == 1


def _columns(text: str) -> int:
    # A mark without a letter takes a column too, so that a row of nothing but marks ends.
    return 1 if text.isascii() else max(1, wcswidth(text))


def _break(row: list[Cell], limit: int) -> int:
    """Where a row that is too long is cut: at the last place for it, inside a word that is longer than the row."""
    best = used = 0
    for index, cell in enumerate(row):
        if index and _may_break(row[index - 1], cell):
            best = index
        used += cell.columns
        if used > limit:
            return best or max(index, 1)
    raise ValueError("the row is not too long")


def _may_break(left: Cell, right: Cell) -> bool:
    if " " in (left.text, right.text):
        return True
    is_wide_pair = left.columns > 1 or right.columns > 1
    return is_wide_pair and right.text not in _CLOSING and left.text not in _OPENING


def _without_end(row: list[Cell]) -> list[Cell]:
    end = len(row)
    while end and row[end - 1].text == " ":
        end -= 1
    return row[:end]
