"""Pipe tables: held until their columns are known, then drawn in rows that never change."""

import re
from dataclasses import dataclass

from serve.chat.inline import Inline
from serve.chat.width import BOLD, DIM, Cell, Span, cells, columns, wrapped

Row = list[Cell]

# So many rows decide the widths of the columns; those behind them are drawn one by one.
HELD_ROWS = 40
# With columns narrower than this a table is read more easily as a list of records.
_NARROWEST = 6
_BAR, _CROSS = " │ ", "─┼─"
_DELIMITER = re.compile(r"\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*")
# A pipe in code or behind a backslash separates nothing.
_CELL_PART = re.compile(r"\\\||`[^`]*`|\|")
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)


class Table:
    """A table as its lines come. The first line alone is not a table yet."""

    def __init__(self, header: str, has_colour: bool) -> None:
        self.lines = [header]  # as they were written, while they are held
        self.is_table = False
        self._has_colour = has_colour
        self._names = _split(header)
        self._alignments: list[str] = []
        self._rows: list[list[str]] = []
        self._widths: list[int] | None = None
        self._has_rules = False
        self._space = 0

    def add(self, line: str, width: int) -> list[Row] | None:
        """Rows to print now; None if the line shows that this is no table."""
        if not self.is_table:
            if not _DELIMITER.fullmatch(line):
                return None
            self.is_table = True
            self._start(_split(line))
            self.lines.append(line)
            return []
        row = _fitted(_split(line), len(self._names))
        if self._widths is not None:
            return self._between() + self._drawn(row)
        self._rows.append(row)
        self.lines.append(line)
        return self.flush(width) if len(self._rows) == HELD_ROWS else []

    def flush(self, width: int) -> list[Row]:
        """What is still held, drawn."""
        if self._widths is not None:
            return []
        self._space = width
        content = [[self._cell(text) for text in row] for row in (self._names, *self._rows)]
        natural = [max(1, *(_widest(row[i]) for row in content)) for i in range(len(self._names))]
        self._widths = _shrunk(natural, width - len(_BAR) * (len(natural) - 1))
        self._has_rules = natural != self._widths
        drawn = [] if self._is_records() else self._drawn(self._names, BOLD) + self._rule()
        rows = self._rows or [[""] * len(self._names)] if self._is_records() else self._rows
        for index, row in enumerate(rows):
            drawn += (self._between() if index else []) + self._drawn(row)
        self.lines, self._rows = [], []
        return drawn

    def _start(self, delimiters: list[str]) -> None:
        count = max(len(self._names), len(delimiters))
        self._names = _fitted(self._names, count)
        self._alignments = [_alignment(text) for text in _fitted(delimiters, count)]

    def _is_records(self) -> bool:
        return not self._widths

    def _between(self) -> list[Row]:
        """What separates two rows where a row may have several lines."""
        if self._is_records():
            return [[]]
        return self._rule() if self._has_rules else []

    def _rule(self) -> list[Row]:
        return [self._styled(_CROSS.join("─" * width for width in self._widths or []), DIM)]

    def _drawn(self, row: list[str], style: str = "") -> list[Row]:
        if not self._widths:
            return self._record(row)
        parts = [
            [line for text in self._cell(text, style) for line in wrapped(text, width)]
            for text, width in zip(row, self._widths, strict=True)
        ]
        height = max(len(part) for part in parts)
        return [self._line([part[i] if i < len(part) else [] for part in parts]) for i in range(height)]

    def _line(self, parts: list[Row]) -> Row:
        line: Row = []
        for index, (part, width) in enumerate(zip(parts, self._widths or [], strict=True)):
            space = width - columns(part)
            left = {"right": space, "centre": space // 2}.get(self._alignments[index], 0)
            line += self._styled(_BAR, DIM) if index else []
            line += [*cells([Span(" " * left)]), *part, *cells([Span(" " * (space - left))])]
        while line and line[-1].text == " ":
            line.pop()
        return line

    def _record(self, row: list[str]) -> list[Row]:
        drawn: list[Row] = []
        for name, text in zip(self._names, row, strict=True):
            first, *others = [*self._cell(name, BOLD), *self._cell(text)]
            lead = [*first, *cells([Span(": ")])] if first else []
            for line in others:
                drawn += wrapped([*lead, *line], self._space)
                lead = []
        return drawn

    def _cell(self, text: str, style: str = "") -> list[Row]:
        """The lines of a cell, not wrapped yet."""
        return [cells(Inline(self._has_colour, style).finish(part.strip())) for part in _BREAK.split(text)]

    def _styled(self, text: str, style: str) -> Row:
        return cells([Span(text, style)])


@dataclass
class HeldTable:
    """A table, and what stands before its rows."""

    table: Table
    lead: str
    hang: str
    is_drawn: bool = False


def _split(line: str) -> list[str]:
    parts, start = [], 0
    line = line.strip()
    for match in _CELL_PART.finditer(line):
        if match.group() == "|":
            parts.append(line[start : match.start()])
            start = match.end()
    parts = [*parts, line[start:]]
    parts = parts[1:] if not parts[0].strip() else parts
    parts = parts[:-1] if len(parts) > 1 and not parts[-1].strip() else parts
    return [part.strip().replace("\\|", "|") for part in parts]


def _fitted(row: list[str], count: int) -> list[str]:
    """Exactly so many cells; what is too much stays in the last."""
    row = row + [""] * (count - len(row))
    return [*row[: count - 1], " | ".join(row[count - 1 :])]


def _alignment(delimiter: str) -> str:
    if not delimiter.endswith(":"):
        return "left"
    return "centre" if delimiter.startswith(":") else "right"


def _widest(lines: list[Row]) -> int:
    return max(columns(line) for line in lines)


def _shrunk(natural: list[int], space: int) -> list[int]:
    """The widths that fit: the widest columns give way first. None at all where they would be too narrow."""
    cap = max(natural)
    while sum(min(width, cap) for width in natural) > space:
        cap -= 1
        if cap < _NARROWEST:
            return []
    return [min(width, cap) for width in natural]
