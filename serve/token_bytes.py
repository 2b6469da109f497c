"""How many tokens a text has at the very least, known without tokenising it: what cannot fit is refused at once.

To tokenise megabytes takes seconds, and nobody else's words come meanwhile.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Composed, at most 3.5 bytes become one: the iota with diaeresis and accent, when each is written in its longest form.
NFC_BYTES = 4
SPLITTING = {"ByteLevel", "Metaspace", "Digits", "Punctuation", "Split"}


@dataclass(frozen=True)
class TokenBytes:
    """A token stands for `most` bytes of UTF-8 text at most, 0: not known; `lost` bytes stand in no token at all."""

    most: int = 0
    lost: bytes = b""

    def least_tokens(self, text: str) -> int:
        """How many tokens the text cannot have less than; 0 where nothing is known."""
        return -(-len(text.encode().translate(None, self.lost)) // self.most) if self.most else 0


def measure(tokenizer: Any) -> TokenBytes:
    """What is certain of a transformers tokenizer: nothing of one that may drop or shorten text, or has no fast form."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return TokenBytes()
    parts = json.loads(backend.to_str())
    model, added, vocabulary = parts["model"], parts["added_tokens"], parts["model"]["vocab"]
    steps = list(_flat(parts["normalizer"], "normalizers"))
    splits = list(_flat(parts["pre_tokenizer"], "pretokenizers"))
    is_composed = any(step["type"] == "NFC" for step in steps)
    is_bytes = any(step["type"] == "ByteLevel" for step in (*steps, *splits))
    lost = bytes(byte for character, byte in _alphabet().items() if character not in vocabulary) if is_bytes else b""
    is_whole = is_bytes or (model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)))
    is_certain = (
        model["type"] == "BPE"
        and is_whole
        and not (is_composed and lost)
        and all(_keeps(step) for step in steps)
        and all(split["type"] in SPLITTING and split.get("behavior") != "Removed" for split in splits)
        # A token that takes the spaces around it as well has no longest text.
        and not any(token["lstrip"] or token["rstrip"] for token in added)
    )
    if not is_certain:
        return TokenBytes()
    # In the alphabet of bytes, a character is one of them.
    longest = max(len(token) if is_bytes else len(token.encode()) for token in vocabulary)
    longest = max([longest, *(len(token["content"].encode()) for token in added)])
    return TokenBytes(longest * (NFC_BYTES if is_composed else 1), lost)


def _flat(part: dict[str, Any] | None, inner: str) -> Iterable[dict[str, Any]]:
    if part is not None and part["type"] == "Sequence":
        for one in part[inner]:
            yield from _flat(one, inner)
    elif part is not None:
        yield part


def _keeps(step: dict[str, Any]) -> bool:
    """Whether a normalizer leaves at least as many bytes as it finds, or composes them."""
    if step["type"] == "Replace":
        return 0 < len(step["pattern"].get("String", "").encode()) <= len(step["content"].encode())
    return step["type"] in ("Prepend", "ByteLevel", "NFC")


def _alphabet() -> dict[str, int]:
    """The character that byte-level vocabularies write for each byte: itself if it can be seen, else one above 255."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(256) if byte not in seen)
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
