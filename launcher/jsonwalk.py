"""Walk a JSON document element by element, so that each is known by its line and none can take the memory.

A text is parsed through a window that grows only while the value at hand does not fit, up to a limit.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from launcher.textfile import UnreadableError

WINDOW = 2**20
SPACE = re.compile(r"[ \t\n\r]*")
# The longest piece that the decoder must see whole: an escaped surrogate pair, or -Infinity.
LONGEST_TOKEN = 16
HINT = "write a list of objects"
DECODER = json.JSONDecoder()


def told(error: json.JSONDecodeError) -> str:
    """What the decoder says, without the position."""
    return error.msg[0].lower() + error.msg[1:].removesuffix(" starting at")


class Walk:
    """A position in a JSON text. `limit` is the longest value that is read, in characters."""

    def __init__(self, text: str, limit: int) -> None:
        self._whole, self._read, self._limit = text, 0, limit
        self._window, self._at = "", 0
        self._line, self._counted = 1, 0

    @property
    def line(self) -> int:
        """The line of the position, from 1."""
        self._line += self._window.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def peek(self) -> str:
        """The next character that is not white space; nothing at the end."""
        while True:
            space = SPACE.match(self._window, self._at)
            assert space
            self._at = space.end()
            if self._at < len(self._window) or not self._more():
                return self._window[self._at : self._at + 1]

    def take(self, character: str) -> bool:
        """Step over `character` if it comes next."""
        found = self.peek() == character
        self._at += found
        return found

    def expect(self, character: str) -> None:
        """Step over `character`, which must come next."""
        if not self.take(character):
            found = repr(self.peek()) if self.peek() else "the end of the file"
            raise UnreadableError(self.line, f"not JSON ({character!r} expected, {found} found); {HINT}")

    def items(self) -> Iterator[tuple[int, Any]]:
        """The elements of the list that comes next, each with the line it begins on."""
        self.expect("[")
        if self.take("]"):
            return
        while True:
            self.peek()
            yield self.line, self.value()
            if not self.take(","):
                break
        self.expect("]")

    def names(self) -> Iterator[str]:
        """The names in the object that comes next; the caller walks each value."""
        self.expect("{")
        if self.take("}"):
            return
        while True:
            if self.peek() != '"':
                self.expect('"')
            key = self.value()
            self.expect(":")
            yield key
            if not self.take(","):
                break
        self.expect("}")

    def value(self) -> Any:
        """The value that comes next, whole."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._window, self._at)
            except json.JSONDecodeError as error:
                if not self._is_cut(error) or not self._more():
                    line = self.line + self._window.count("\n", self._at, max(error.pos, self._at))
                    raise UnreadableError(line, f"not JSON ({told(error)}); {HINT}") from None
            except RecursionError:
                raise UnreadableError(self.line, f"nested too deeply; {HINT}") from None
            except ValueError:
                raise UnreadableError(self.line, f"a number of too many digits; {HINT}") from None
            else:
                # A number at the border of the window may go on behind it.
                if end < len(self._window) or not self._more():
                    self._at = end
                    return value

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the value may only be cut off by the border of the window."""
        is_cut = error.msg.startswith("Unterminated") or error.pos > len(self._window) - LONGEST_TOKEN
        if is_cut and len(self._window) - self._at > self._limit:
            raise UnreadableError(self.line, f"a value of more than {self._limit >> 20} MiB; {HINT}")
        return is_cut

    def _more(self) -> bool:
        """Drop what is behind the position and read on; false at the end of the text."""
        if self._read == len(self._whole):
            return False
        self._line = self.line
        rest = self._window[self._at :]
        piece = self._whole[self._read : self._read + max(WINDOW, len(rest))]
        self._window, self._at, self._counted = rest + piece, 0, 0
        self._read += len(piece)
        return True
