"""Emphasis, code spans and links of one line, as its characters come.

The rules, simpler than CommonMark's:

- Markers are `*`, `**`, `***`, `_`, `~~` and runs of backticks. `__` is text: `__init__` is more often meant than bold.
- A marker opens where no letter stands before it, and no space or closing punctuation behind it. It closes where no
  space stands before it; `*` and `_` only where no letter follows. Chinese and other wide letters do not count here.
- A marker waits for its partner for one row of text. If that comes in time, both are hidden. If not, both are shown as
  typed, and the style holds until the partner or the end of the line: a long bold sentence is bold, and a marker that
  nobody closes is not eaten. (`_` has no style then: `_x` may be a name.) At the end of the line what waits is text.
- `[text](url)` becomes `text (url)`. Without colour only links are changed: nothing else would show the markers.
"""

import copy
import re

from serve.chat.width import BOLD, CYAN, DIM, ITALIC, STRIKE, UNDERLINE, Span, cells, columns, is_wide, styled

Item = tuple[list[Span], int]
_URL, _CODE = "(", "`"
_STYLES = {"*": ITALIC, "_": ITALIC, "**": BOLD, "***": f"{BOLD};{ITALIC}", "~~": STRIKE, _URL: DIM}
# A closing run may be longer than its marker: in `**a *b***` the first of the three belongs to what is inside.
_CLOSERS = {"*": {1, 3}, "_": {1}, "**": {2, 3}, "***": {3}, "~~": {2}}
_ESCAPED = frozenset("*_`~|#")
_NEVER_AFTER_OPENER = frozenset(".,;:!?/)|]}")
# What begins markup, or decides whether markup that has begun ends here.
_DECIDES = frozenset("\\*_`~[](")
_PLAIN = {True: re.compile(r"[^\\*_`~\[]+"), False: re.compile(r"[^`\[]+")}
_RUN = re.compile(r"\*+|_+|~+|`+|\[")
_CODE_SPAN = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)")
_INSIDE = re.compile(rf"\\[*_`~]|{_CODE_SPAN.pattern}|`+|\*+|_+|~+")
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\])*)\]")
_DEEPEST = 6  # markers inside markers; further in they are text
_FARTHEST = 200  # characters to a partner, where a whole text is at hand


class Inline:
    """Inline Markdown of one line: characters in, spans out as soon as they are decided."""

    def __init__(self, has_colour: bool, base: str = "", patience: int = 80, level: int = 0) -> None:
        self._has_colour = has_colour
        self._base = base
        self._patience = patience
        self._level = level
        self._held = ""
        self._before = ""  # the last character that was decided
        self._open: list[str] = []  # markers that are shown as typed and whose style holds
        self._parentheses = 0  # inside a url

    def feed(self, char: str) -> list[Span]:
        """What the next character decides."""
        may_decide = not self._held or char in _DECIDES or self._held[-1] in _DECIDES
        self._held += char
        spans = self._decide(is_last=False) if may_decide else []
        while columns(cells([Span(self._held)])) > self._patience:
            spans += [self._give_up(), *self._decide(is_last=False)]
        return spans

    def finish(self, text: str = "") -> list[Span]:
        """What is left at the end of the line, and the rest of the line if there is one."""
        self._held += text
        return self._decide(is_last=True)

    def twin(self) -> "Inline":
        """The same state, to try how the line would end."""
        twin = copy.copy(self)
        twin._open = [*self._open]
        return twin

    def _decide(self, is_last: bool) -> list[Span]:
        spans: list[Span] = []
        while self._held and (item := self._next(self._held, is_last)):
            spans += item[0]
            self._drop(item[1])
        return spans

    def _drop(self, count: int) -> None:
        self._before = self._held[count - 1]
        self._held = self._held[count:]

    def _give_up(self) -> Span:
        """Shows the marker that has waited for long enough."""
        match = _RUN.match(self._held)
        marker = match.group() if match else self._held[0]
        if (marker in _CLOSERS or marker[0] == _CODE) and marker not in ("_", *self._open):
            self._open.append(marker)
        self._drop(len(marker))
        return Span(marker, self._style())

    def _style(self, more: str = "") -> str:
        style = self._base
        for marker in self._open:
            style = styled(style, _STYLES.get(marker, CYAN))
        return styled(style, more) if self._has_colour else ""

    def _next(self, text: str, is_last: bool) -> Item | None:
        """The first item's spans and length; None while that depends on what comes."""
        innermost = self._open[-1] if self._open else ""
        if innermost == _URL:
            return self._url(text[0])
        if innermost.startswith(_CODE):
            return self._shown_code(text, innermost, is_last)
        if match := _PLAIN[self._has_colour].match(text):
            return [Span(match.group(), self._style())], match.end()
        match = _RUN.match(text)
        if (match.end() if match else 1) == len(text) and not is_last:
            return None
        if match is None:
            return self._backslash(text)
        if text[0] == "[":
            return self._link(text, is_last)
        if text[0] == _CODE:
            return self._code(text, match.group(), is_last)
        return self._emphasis(text, match.group(), is_last)

    def _backslash(self, text: str) -> Item:
        shown = text[1:2] if text[1:2] in _ESCAPED and len(text) > 1 else "\\"
        return [Span(shown, self._style())], 1 + (shown != "\\")

    def _code(self, text: str, marker: str, is_last: bool) -> Item | None:
        if match := _CODE_SPAN.match(text):
            if match.end() == len(text) and not is_last:
                return None  # one more backtick would make the run another
            shown = _without_padding(match.group(2)) if self._has_colour else match.group()
            return [Span(shown, self._style(CYAN))], match.end()
        return ([Span(marker, self._style())], len(marker)) if is_last else None

    def _shown_code(self, text: str, marker: str, is_last: bool) -> Item | None:
        style = self._style()
        end = len(text) - len(text.lstrip(_CODE))
        if end == 0:
            end = (text + _CODE).index(_CODE)
        elif end == len(text) and not is_last:
            return None
        elif end == len(marker):
            self._open.pop()
        return [Span(text[:end], style)], end

    def _link(self, text: str, is_last: bool) -> Item | None:
        match = _LINK.match(text)
        if not is_last and (match is None or match.end() == len(text)):
            return None
        if match is None or text[match.end() : match.end() + 1] != "(":
            return [Span("[", self._style())], 1
        shown = self._inside(match.group(1), self._style(UNDERLINE))
        self._open.append(_URL)
        return [*shown, Span(" (" if shown else "(", self._style())], match.end() + 1

    def _url(self, char: str) -> Item:
        span = Span(char, self._style())
        self._parentheses += {"(": 1, ")": -1}.get(char, 0)
        if self._parentheses < 0:
            self._parentheses = 0
            self._open.pop()
        return [span], 1

    def _emphasis(self, text: str, run: str, is_last: bool) -> Item | None:
        style, after = self._style(), text[len(run) : len(run) + 1]
        if run in self._open and _closes(run, self._before, after):
            self._open.remove(run)
            return [Span(run, style)], len(run)
        may_open = run in _CLOSERS and _opens(self._before, after) and self._level < _DEEPEST
        end = _partner(text, run, is_last) if may_open else 0
        if not end:
            return None if end is None else ([Span(run, style)], len(run))
        return self._inside(text[len(run) : end - len(run)], self._style(_STYLES[run])), end

    def _inside(self, text: str, style: str) -> list[Span]:
        return Inline(self._has_colour, style, self._patience, self._level + 1).finish(text)


def _partner(text: str, marker: str, is_last: bool) -> int | None:
    """Where the closing run of the marker at the start ends; 0 if there is none, None if that depends on what comes."""
    for match in _INSIDE.finditer(text, len(marker), len(marker) + _FARTHEST):
        run, end = match.group(), match.end()
        if not run.strip(_CODE) and not is_last:
            return None  # code may begin here, and hide what looks like a partner
        if run[0] != marker[0] or len(run) not in _CLOSERS[marker] or match.start() == len(marker):
            continue
        if end == len(text) and not is_last:
            return None
        if _closes(marker, text[match.start() - 1], text[end : end + 1]):
            return end
    return 0 if is_last else None


def _opens(before: str, after: str) -> bool:
    return not _is_letter(before) and after not in _NEVER_AFTER_OPENER and bool(after.strip())


def _closes(marker: str, before: str, after: str) -> bool:
    return bool(before.strip()) and not (len(marker) == 1 and _is_letter(after))


def _is_letter(char: str) -> bool:
    return char.isalnum() and not is_wide(char)


def _without_padding(code: str) -> str:
    return code[1:-1] if code[0] == code[-1] == " " and code.strip() else code
