"""Code in colours: Pygments, line by line, with each character lexed once."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from serve.chat.width import BOLD, CYAN, DIM, GREEN, MAGENTA, RED, TAB, Span

# Only colours of the terminal's own palette: they can be read on light and dark grounds.
_STYLES = {
    "Token.Keyword": MAGENTA,
    "Token.Operator.Word": MAGENTA,
    "Token.Keyword.Constant": CYAN,
    "Token.Keyword.Type": CYAN,
    "Token.Literal.String": GREEN,
    "Token.Literal.Number": CYAN,
    "Token.Comment": DIM,
    "Token.Comment.Preproc": MAGENTA,
    "Token.Name.Builtin": CYAN,
    "Token.Name.Decorator": CYAN,
    "Token.Name.Function": BOLD,
    "Token.Name.Class": BOLD,
    "Token.Name.Tag": MAGENTA,
    "Token.Generic.Inserted": GREEN,
    "Token.Generic.Deleted": RED,
    "Token.Generic.Heading": BOLD,
    "Token.Generic.Subheading": BOLD,
    "Token.Generic.Prompt": DIM,
}
# The first word of ```python title="x", ```{.python} or ```js{1,3}.
_LANGUAGE = re.compile(r"[\w+#-]+")
# Longer lines are data, not code to be read.
_LONGEST_LINE = 1000
_RULES_PER_CHARACTER = 500


class Highlighter:
    """The lines of one code block, in order.

    The lexer's state is kept from line to line, so the cost of a line is that of its own characters, and a string of
    three hundred lines is still a string. What may be wrong: a rule that must see several lines at once (a here
    document) finds no match, and languages whose lexer keeps its state elsewhere (YAML) are lexed a line at a time.
    """

    def __init__(self, info: str) -> None:
        match = _LANGUAGE.search(info)
        self._lexer = _lexer(match.group().lower()) if match else None
        self._stack = ["root"]

    def line(self, text: str) -> list[Span]:
        """The next line, which is complete."""
        spans, self._stack = self._lex(text)
        return spans

    def guess(self, text: str) -> list[Span]:
        """The next line while it is being written; nothing changes."""
        return self._lex(text)[0]

    def _lex(self, text: str) -> tuple[list[Span], list[str]]:
        if self._lexer is None or len(text) > _LONGEST_LINE:
            return [Span(text)], self._stack
        try:
            tokens, stack = _tokens(self._lexer, text + "\n", self._stack)
        except Exception:
            # Five hundred languages by as many authors: no fault in one of them may end the chat.
            self._lexer = None
            return [Span(text)], self._stack
        spans = [Span(value.rstrip("\n"), _style(str(kind))) for kind, value in tokens]
        # A lexer may drop or change what it does not understand. The text comes first.
        return (spans if "".join(span.text for span in spans) == text else [Span(text)]), stack


@dataclass
class Fence:
    """A code block: how it was opened, and its lines."""

    marker: str
    column: int
    num_quotes: int
    prefix: str
    code: Highlighter

    def is_closed_by(self, line: str) -> bool:
        """Whether it is the fence at the block's end."""
        return re.fullmatch(rf"\s*{self.marker[0]}{{{len(self.marker)},}}\s*", line) is not None

    def stripped(self, line: str) -> str:
        """The line without the indentation of the block."""
        line = line.expandtabs(TAB)
        return line[min(self.column, len(line) - len(line.lstrip(" "))) :]


def _lexer(language: str) -> Any:
    # Imported at the first code block: it takes a while, and the client starts without.
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        return get_lexer_by_name(language)
    except ClassNotFound:
        return None


def _tokens(lexer: Any, text: str, stack: list[str]) -> tuple[list[tuple[Any, str]], list[str]]:
    """The tokens of one line, and the state behind it."""
    from pygments.lexer import ExtendedRegexLexer, LexerContext, RegexLexer

    class Budget(LexerContext):
        """Ends a lexer whose rules turn in a circle: each rule that is tried reads the position."""

        left = _RULES_PER_CHARACTER * (len(text) + 10)

        @property
        def pos(self) -> int:
            self.left -= 1
            if self.left < 0:
                raise RecursionError("the lexer does not come to an end")
            return self._pos

        @pos.setter
        def pos(self, value: int) -> None:
            self._pos = value

    found: Iterable[tuple[int, Any, str]]
    if isinstance(lexer, RegexLexer) and not isinstance(lexer, ExtendedRegexLexer):
        context = Budget(text, 0, [*stack])
        found = [*ExtendedRegexLexer.get_tokens_unprocessed(lexer, context=context)]
        stack = context.stack
    else:
        found = lexer.get_tokens_unprocessed(text)
    return [(kind, value) for _, kind, value in found], stack


def _style(kind: str) -> str:
    while kind and kind not in _STYLES:
        kind = kind.rpartition(".")[0]
    return _STYLES.get(kind, "")
