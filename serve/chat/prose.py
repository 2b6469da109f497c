"""One line of prose while it is written: wrapped to rows behind a prefix."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

from serve.chat.inline import Inline
from serve.chat.width import DIM, TAB, Cell, Span, cells, columns, cut, extend, fill, paint, wrapped

_NARROWEST = 8


@dataclass
class Page:
    """What rows are laid out for."""

    screen: Callable[[], int]
    has_colour: bool

    @property
    def width(self) -> int:
        """The columns of the screen now; on one that is narrower the terminal wraps."""
        return max(_NARROWEST, self.screen())

    def room(self, prefix: str) -> int:
        """The columns behind a prefix."""
        return max(2, self.width - len(prefix))

    def shortened(self, prefix: str) -> str:
        """The prefix, at most half a row of it."""
        return prefix[-(self.width // 2) :]

    def row(self, prefix: str, row: list[Cell]) -> str:
        """One finished row."""
        before = cells(Span(char, DIM if char == "│" else "") for char in (prefix if row else prefix.rstrip()))
        return paint([*before, *row], self.has_colour)

    def rows(self, lead: str, hang: str, rows: list[list[Cell]]) -> list[str]:
        """Finished rows, the first behind another prefix than the others."""
        return [self.row(hang if index else lead, row) for index, row in enumerate(rows)]

    def raw(self, line: str) -> list[str]:
        """A line as it was written, until it is known what it is."""
        return [paint(part, self.has_colour) for part in cut(cells([Span(line.expandtabs(TAB), DIM)]), self.width)]


class Prose:
    """A line of the source: its rows come as soon as the next word does not fit."""

    def __init__(self, page: Page, lead: str, hang: str, style: str = "") -> None:
        self._page = page
        self._prefix, self._hang = page.shortened(lead), page.shortened(hang)
        self._inline = Inline(page.has_colour, style, page.room(hang))
        self._row: list[Cell] = []

    def feed(self, text: str) -> list[str]:
        """The rows that are full now."""
        rows = []
        for char in text.replace("\t", " " * TAB):
            for span in self._inline.feed(char):
                extend(self._row, span)
            full, self._row = fill(self._row, self._page.room(self._hang))
            rows += [self._finished(row) for row in full]
        return rows

    def finish(self) -> list[str]:
        """The rows that are left."""
        for span in self._inline.finish():
            extend(self._row, span)
        is_empty = not columns(self._row) and self._prefix == self._hang
        return [] if is_empty else [self._finished(row) for row in wrapped(self._row, self._page.room(self._hang))]

    def live(self) -> list[str]:
        """The rows that would be left if the line ended here."""
        twin = copy.copy(self)
        twin._inline, twin._row = self._inline.twin(), [*self._row]
        return twin.finish()

    def _finished(self, row: list[Cell]) -> str:
        prefix, self._prefix = self._prefix, self._hang
        return self._page.row(prefix, row)
