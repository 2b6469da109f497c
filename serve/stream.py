"""Tokens to text as they come."""

from typing import Any

from tokenizers.decoders import DecodeStream


class StreamDecoder:
    """Tokens to text as they come; a character whose bytes are not all there is held back."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer._tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that became certain with this token."""
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception:
            # Some sequences confuse the decoder; it begins anew, and the answer goes on.
            self._stream = DecodeStream(skip_special_tokens=True)
            return ""

    def flush(self) -> str:
        """Nothing more: what is still held back is not a character."""
        return ""
