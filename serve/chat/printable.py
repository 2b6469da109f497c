"""Model output made safe for a terminal: a model may write any byte, a terminal obeys some of them."""

import re

# C0 without tab and newline, DEL, C1, lone surrogates, and the marks that reorder, hide or smuggle text.
# Joiners (U+200C, U+200D) and variation selectors stay: emoji, Persian and Indian scripts are written with them.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """The text with control characters as visible escapes such as `\\x1b`."""
    return _UNSAFE.sub(lambda match: _escape(ord(match.group())), text)


def _escape(code: int) -> str:
    if code > 0xFFFF:
        return f"\\U{code:08x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
