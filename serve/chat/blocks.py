"""The beginning of a line: which quotes and list items it is in, and what kind of block it is."""

import re
from dataclasses import dataclass, field

from serve.chat.width import TAB

# A line that is still undecided behind so many characters is prose: nobody waits longer.
LONGEST_UNDECIDED = 2000
_DEEPEST = 10  # quotes and items that begin on one line; further in they are text
_QUOTE = ">"
_ITEM = re.compile(r"([-*+]|\d{1,9}[.)])([ \t]+|$)")
_HEADING = re.compile(r"(#{1,6})(?:[ \t]+|$)")
_RULE = re.compile(r"([-*_])(?:[ \t]*\1){2,}[ \t]*")
_FENCE = re.compile(r"(`{3,}(?=[^`]*$)|~{3,})(.*)")
# Beginnings that may become several things. Tables, fences and rules are only known at the end of the line.
_UNDECIDED = re.compile(
    r"[ \t]*|[-*+]|\d{1,9}[.)]?|#{1,6}[ \t]*|`{1,2}|`{3,}[^`]*|~{1,2}|~{3,}.*|\|.*|([-*_])(?:[ \t]*\1)*[ \t]*"
)


@dataclass
class Mark:
    """A quote or a list item: its sign, and its column counted from the quote around it."""

    sign: str
    column: int


@dataclass
class Line:
    """What the beginning of a line says."""

    kind: str  # "blank", "prose", "heading", "rule", "fence" or "table"
    text: str  # what is behind the beginning
    column: int  # where that stands, counted from the quote around it
    marks: list[Mark] = field(default_factory=list)
    sign: str = ""  # the # of a heading, the ` or ~ of a fence


def read(line: str, is_whole: bool) -> Line | None:
    """The line's beginning; None while more of it must come."""
    marks: list[Mark] = []
    start = origin = 0
    while True:
        rest = line[start:].lstrip(" \t")
        at = len(line) - len(rest)
        column = len(line[:at].expandtabs(TAB)) - origin
        is_rule = _RULE.fullmatch(rest) is not None
        if _UNDECIDED.fullmatch(rest) and not is_whole and len(line) < LONGEST_UNDECIDED:
            return None
        if len(marks) == _DEEPEST:
            return _block(rest, column, marks, is_whole)
        if rest.startswith(_QUOTE):
            marks.append(Mark(_QUOTE, column))
            start = at + 1 + (line[at + 1 : at + 2] == " ")
            origin = len(line[:start].expandtabs(TAB))
        elif (match := _ITEM.match(rest)) and not is_rule:
            marks.append(Mark(match.group(1), column))
            start = at + match.end()
        else:
            return _block(rest, column, marks, is_whole)


def within_quotes(line: str, count: int) -> str | None:
    """The line without the signs of so many quotes; None if it is not inside them."""
    match = re.match(rf"(?:[ \t]*{_QUOTE} ?){{{count}}}", line)
    return line[match.end() :] if match else None


def _block(rest: str, column: int, marks: list[Mark], is_whole: bool) -> Line:
    if not rest:
        return Line("blank", "", column, marks)
    if match := _HEADING.match(rest):
        return Line("heading", rest[match.end() :], column, marks, match.group(1))
    if is_whole and _RULE.fullmatch(rest):
        return Line("rule", "", column, marks)
    if is_whole and (match := _FENCE.fullmatch(rest)):
        return Line("fence", match.group(2).strip(), column, marks, match.group(1))
    if is_whole and rest[0] == "|" and len(rest) < LONGEST_UNDECIDED:
        return Line("table", rest, column, marks)
    return Line("prose", rest, column, marks)


class Nesting:
    """The quotes and list items around the line in work."""

    def __init__(self) -> None:
        self.marks: list[Mark] = []

    def enter(self, line: Line) -> tuple[str, str]:
        """Moves to the line; what stands before its first row, and before the others."""
        depth = 0
        fresh: list[int] = []
        for mark in line.marks:
            depth = self._inside(depth, mark.column)
            is_same_quote = mark.sign == _QUOTE and [m.sign for m in self.marks[depth : depth + 1]] == [_QUOTE]
            if not is_same_quote:
                self.marks[depth:] = [mark]
                fresh.append(depth)
            depth += 1
        depth = self._inside(depth, line.column)
        del self.marks[depth:]
        has_item = bool(self.marks) and self.marks[-1].sign != _QUOTE
        indent = "" if has_item else " " * line.column
        lead = "".join(_shown(mark, index in fresh) for index, mark in enumerate(self.marks))
        return lead + indent, "".join(_shown(mark, False) for mark in self.marks) + indent

    def num_quotes(self) -> int:
        """How many quotes the line is in."""
        return sum(mark.sign == _QUOTE for mark in self.marks)

    def _inside(self, depth: int, column: int) -> int:
        """How deep in the list items that stand at this depth the column is."""
        while depth < len(self.marks) and self.marks[depth].sign != _QUOTE and column > self.marks[depth].column + 1:
            depth += 1
        return depth


def _shown(mark: Mark, is_fresh: bool) -> str:
    if mark.sign == _QUOTE:
        return "│ "
    sign = "•" if mark.sign in "-*+" else mark.sign
    return (sign if is_fresh else " " * len(sign)) + " "
