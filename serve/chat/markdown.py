"""Markdown for a terminal, append-only: each screen row is finished once and never drawn again.

A character at a time goes through one state machine, so the rows cannot depend on how the text was cut. A line of prose
is decided by its first characters and then streams out row by row; emphasis has its rules in `inline.py`. Rules where
this is simpler than CommonMark, because nothing that was printed can be changed:

- A newline ends a row. Markup never spans lines, and `---` is a rule, never the underline of a heading.
- Nesting follows the indentation of the list items above: two columns more is inside.
- A table begins with a line that starts with `|`, and ends with the first that does not. There is no indented code.
- Headings, code blocks and tables get a blank row around them; several blank lines are one.
"""

from collections.abc import Callable

from serve.chat.blocks import Line, Nesting, read, within_quotes
from serve.chat.highlight import Fence, Highlighter
from serve.chat.printable import printable
from serve.chat.prose import Page, Prose
from serve.chat.table import HeldTable, Table
from serve.chat.width import BOLD, DIM, MAGENTA, UNDERLINE, Cell, Span, cells, cut, styled, wrapped

LIVE_ROWS = 6
_CODE_INDENT = "  "
_HEADINGS = {1: styled(BOLD, UNDERLINE), 2: styled(BOLD, MAGENTA)}


class Markdown:
    """Answer text in, finished screen rows out, each of them once (append-only)."""

    def __init__(self, width: Callable[[], int], *, has_colour: bool) -> None:
        self._page = Page(width, has_colour)
        self._return = ""  # a carriage return that may be half of a line's end
        self._start = ""  # a line that is not decided yet, or that counts only as a whole
        self._prose: Prose | None = None
        self._fence: Fence | None = None
        self._held: HeldTable | None = None
        self._nesting = Nesting()
        self._gap: str | None = None  # the blank row before the next one
        self._last = ""  # the kind of the line before
        self._has_output = False

    def feed(self, text: str) -> list[str]:
        """The rows that are finished now: to be printed once, never changed."""
        text = self._return + text
        self._return = "\r" if text.endswith("\r") else ""
        return self._feed(printable(text[: len(text) - len(self._return)].replace("\r\n", "\n")))

    @property
    def live(self) -> list[str]:
        """The unfinished tail as it would be drawn now, at most six rows."""
        rows = self._tail()
        if rows and self._gap is not None and self._has_output:
            rows.insert(0, self._page.row(self._gap, []))
        return rows[-LIVE_ROWS:]

    def finish(self) -> list[str]:
        """The rest: the text ends here."""
        rows = self._feed(printable(self._return) + ("\n" if self._start or self._prose or self._return else ""))
        self._return = ""
        return rows + self._flush()

    def _feed(self, text: str) -> list[str]:
        rows = []
        for char in text:
            if self._prose:
                rows += self._out(self._prose.finish() if char == "\n" else self._prose.feed(char))
                self._prose = None if char == "\n" else self._prose
            elif char == "\n":
                whole, self._start = self._start, ""
                rows += self._code(self._fence, whole) if self._fence else self._whole(whole)
            else:
                self._start += char
                if not self._fence and (line := read(self._start, is_whole=False)):
                    self._start = ""
                    rows += self._enter(line)
        return rows

    def _whole(self, text: str) -> list[str]:
        line = read(text, is_whole=True)
        rows = self._enter(line) if line else []
        if self._prose:
            rows += self._out(self._prose.finish())
            self._prose = None
        return rows

    def _enter(self, line: Line) -> list[str]:
        """Moves on to a line whose kind is known."""
        if line.kind == "blank" and not line.marks:
            rows = self._flush()
            self._gap = ""
            return rows
        lead, hang = self._nesting.enter(line)
        if line.kind == "table":
            self._last = line.kind
            return self._row_of_table(line.text, lead, hang)
        rows = self._flush()
        if line.kind == "blank" and lead == hang:
            self._gap = hang.rstrip() if self._gap is None else self._gap
            return rows
        if line.kind == "fence" or (line.kind == "heading" and self._last != "heading"):
            self._need_gap()
        self._fit_gap(hang)
        self._last = line.kind
        return rows + self._begin(line, lead, hang)

    def _begin(self, line: Line, lead: str, hang: str) -> list[str]:
        if line.kind == "fence":
            return self._begin_code(line, lead, hang)
        if line.kind == "rule":
            return self._out([self._page.row(lead, cells([Span("─" * self._page.room(lead), DIM)]))])
        style = _HEADINGS.get(len(line.sign), BOLD) if line.kind == "heading" else ""
        if style and not self._page.has_colour:
            lead, hang = f"{lead}{line.sign} ", hang + " " * (len(line.sign) + 1)
        self._prose = Prose(self._page, lead, hang, style)
        return self._out(self._prose.feed(line.text))

    def _begin_code(self, line: Line, lead: str, hang: str) -> list[str]:
        lead, hang = self._page.shortened(lead), self._page.shortened(hang)
        code = Highlighter(line.text if self._page.has_colour else "")
        self._fence = Fence(line.sign, line.column, self._nesting.num_quotes(), hang + _CODE_INDENT, code)
        if not line.text and lead == hang:
            return []
        label = cells([Span(f"── {line.text}" if line.text else "", DIM)])
        return self._out(self._page.rows(lead, hang, wrapped(label, self._page.room(hang))))

    def _code(self, fence: Fence, line: str) -> list[str]:
        inside = within_quotes(line, fence.num_quotes)
        if inside is None or fence.is_closed_by(inside):
            self._fence = None
            self._need_gap()
            return self._whole(line) if inside is None else []
        return self._out([self._page.row(fence.prefix, cells(fence.code.line(fence.stripped(inside))))])

    def _row_of_table(self, text: str, lead: str, hang: str) -> list[str]:
        held = self._held
        if held and lead.rstrip() == hang.rstrip() == held.hang.rstrip():
            drawn = held.table.add(text, self._page.room(held.hang))
            if drawn is not None:
                return self._draw(held, drawn)
        rows = self._flush()
        self._fit_gap(hang)
        lead, hang = self._page.shortened(lead), self._page.shortened(hang)
        self._held = HeldTable(Table(text, self._page.has_colour), lead, hang)
        return rows

    def _draw(self, held: HeldTable, rows: list[list[Cell]]) -> list[str]:
        if rows and not held.is_drawn:
            self._need_gap()
        drawn = self._out(self._page.rows(held.hang if held.is_drawn else held.lead, held.hang, rows))
        held.is_drawn = held.is_drawn or bool(rows)
        return drawn

    def _flush(self) -> list[str]:
        """The rows of the table that ends here, or of the line that was none."""
        held, self._held = self._held, None
        if held is None:
            return []
        if held.table.is_table:
            rows = self._draw(held, held.table.flush(self._page.room(held.hang)))
            self._need_gap()
            return rows
        prose = Prose(self._page, held.lead, held.hang)
        return self._out([*prose.feed(held.table.lines[0]), *prose.finish()])

    def _need_gap(self) -> None:
        if self._gap is None:
            self._gap = ""

    def _fit_gap(self, prefix: str) -> None:
        """A blank row goes on with the bars of a quote only if what follows is in it too."""
        if self._gap and not prefix.startswith(self._gap):
            self._gap = ""

    def _out(self, rows: list[str]) -> list[str]:
        """The rows, behind the blank one that is due."""
        if not rows:
            return []
        gap = [self._page.row(self._gap, [])] if self._gap is not None and self._has_output else []
        self._gap, self._has_output = None, True
        return gap + rows

    def _tail(self) -> list[str]:
        if self._prose:
            return self._prose.live()
        # What does not show any more is not laid out.
        num_shown = LIVE_ROWS * self._page.width
        start = self._start[-num_shown:]
        if self._fence and (inside := within_quotes(start, self._fence.num_quotes)) is not None:
            return self._line_of_code(self._fence, inside)
        lines = [*(self._held.table.lines[-LIVE_ROWS:] if self._held else []), *([start] if start else [])]
        rows: list[str] = []
        while lines and len(rows) < LIVE_ROWS:
            rows = self._page.raw(lines.pop()[-num_shown:]) + rows
        return rows

    def _line_of_code(self, fence: Fence, line: str) -> list[str]:
        if not line.strip(f"{fence.marker[0]} "):
            return []  # the end of the block, most likely
        row = cells(fence.code.guess(fence.stripped(line)))
        return self._page.rows(fence.prefix, fence.prefix, cut(row, self._page.room(fence.prefix)))
