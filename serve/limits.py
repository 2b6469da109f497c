"""What a client may send at most, so that it can know before it sends: the `limits` of WELCOME."""

from serve.administration import MAX_QUESTIONS
from serve.protocol import (
    CREDIT_WINDOW,
    MAX_CONTROL_BYTES,
    MAX_LIST_ITEMS,
    MAX_MAP_KEYS,
    MAX_MESSAGE_BYTES,
    PING_SECONDS,
    SILENCE_SECONDS,
)
from serve.settings import Settings
from serve.submission import MAX_DEADLINE_MS, MAX_STOP_CHARACTERS, MAX_STOPS, MAX_TOKENS


def limits(settings: Settings) -> dict[str, float]:
    """By name, in requests, questions, bytes, items, characters, milliseconds, tokens, DELTAs and seconds: see docs/protocol.md."""
    return {
        "queue": settings.queue,
        "share": settings.share,
        "questions": MAX_QUESTIONS,
        "message_bytes": MAX_MESSAGE_BYTES,
        "control_bytes": MAX_CONTROL_BYTES,
        "list_items": MAX_LIST_ITEMS,
        "map_keys": MAX_MAP_KEYS,
        "stops": MAX_STOPS,
        "stop_characters": MAX_STOP_CHARACTERS,
        "deadline_ms": MAX_DEADLINE_MS,
        "max_tokens": MAX_TOKENS,
        "credit": CREDIT_WINDOW,
        "ping_seconds": PING_SECONDS,
        "silence_seconds": SILENCE_SECONDS,
    }
