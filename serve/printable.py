"""Model output made safe for a terminal: a model may write any byte, a terminal obeys some of them."""

import re

# C0 without tab and newline, DEL, C1, and the marks that reorder or hide the text around them.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with control characters as visible escapes such as `\\x1b`."""
    return _UNSAFE.sub(lambda match: _escape(ord(match.group())), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
