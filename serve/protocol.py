"""What crosses the wire: `[magic][type][request id][body]`, and nothing outside a closed set of types.

Clients talk over two sockets: data (SUBMIT, CREDIT and the answers) and control (all else), so that a cancel never waits
behind a prompt. The engine processes speak the same messages with the daemon. The body is a msgpack map; unknown keys are
ignored, so that a newer client can say more. Every SUBMIT gets exactly one DONE or ERROR. docs/protocol.md shows each.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import msgpack

_Container = TypeVar("_Container", list[Any], dict[str, Any])

MAGIC = b"CHT1"
NUM_FRAMES = 4
VERSION = 1
NO_REQUEST = bytes(16)
MAX_MESSAGE_BYTES = 8 * 2**20
# Only TOKENIZE is long there.
MAX_CONTROL_BYTES = 2 * 2**20
MAX_LIST_ITEMS = 10_000
MAX_MAP_KEYS = 64
# Of lists and maps in one another, and of all that is in them: small on the wire, they could take long and much memory.
MAX_DEPTH = 32
MAX_VALUES = 100_000
# Deltas that a client is sent before it must grant more; a slow reader gets longer ones, never fewer words.
CREDIT_WINDOW = 256
PING_SECONDS = 2.0
MISSED_PINGS = 3
SILENCE_SECONDS = PING_SECONDS * MISSED_PINGS


class Kind(enum.Enum):
    """The type byte."""

    HELLO = b"H"  # client, control: which versions it speaks; `session` goes on with an earlier one
    WELCOME = b"W"  # daemon, control: who serves, once at HELLO and once more when loading is over
    PROGRESS = (
        b"P"  # daemon: how far loading is (control), or the place and the prompt of a request (data); also engine
    )
    READY = b"R"  # engine to daemon: what is loaded
    SUBMIT = b"S"  # client, data: a conversation to answer; also daemon to engine
    ACCEPTED = b"A"  # daemon, data: its place in the queue, its tokens, how it will be sampled; also engine to daemon
    DELTA = b"D"  # daemon, data: the next piece of text; also engine to daemon
    DONE = b"F"  # daemon, data: the answer is over; also engine to daemon
    ERROR = b"E"  # daemon, both: the request is over, or the message was refused; also engine to daemon
    CREDIT = b"C"  # client, data: that many more deltas are welcome
    CANCEL = b"X"  # client, control: end this request; also daemon to engine
    PING = b"?"  # client, control: I am alive
    PONG = b"!"  # daemon, control: so am I
    STATUS = b"T"  # client, control: what is going on; the daemon answers with the same type
    TOKENIZE = b"K"  # client, control: how many tokens a conversation has; answered with the same type; also engine
    ADAPTERS = b"L"  # client, control: what can answer; answered with the same type; also engine to daemon
    LOAD = b"+"  # admin, control: serve one more run; answered with ADAPTERS; also daemon to engine
    UNLOAD = b"-"  # admin, control: forget an adapter; answered with ADAPTERS; also daemon to engine
    DRAIN = b"G"  # admin, control: take no more requests, finish the open ones, leave; answered with STATUS
    SHUTDOWN = b"Q"  # admin, control: end the open requests and leave; answered with STATUS


class Code(enum.StrEnum):
    """Why a request failed. The detail of some carries counts, see docs/protocol.md."""

    BAD_REQUEST = "E_BAD_REQUEST"
    UNSUPPORTED = "E_UNSUPPORTED"
    AUTH = "E_AUTH"
    CONTEXT = "E_CONTEXT"  # {have, need, max} in tokens, or {num_characters, max}
    QUEUE_FULL = "E_QUEUE_FULL"  # {waiting, max, retry_after_ms}
    DEADLINE = "E_DEADLINE"  # {deadline_ms, tokens}
    CANCELLED = "E_CANCELLED"  # {tokens}
    NO_ADAPTER = "E_NO_ADAPTER"  # {adapters}
    ADAPTER_INCOMPATIBLE = "E_ADAPTER_INCOMPATIBLE"
    LOADING = "E_LOADING"
    DRAINING = "E_DRAINING"
    OOM = "E_OOM"
    ENGINE = "E_ENGINE"
    INTERNAL = "E_INTERNAL"


# The same request may succeed a little later.
RETRYABLE = frozenset({Code.QUEUE_FULL, Code.LOADING, Code.DRAINING, Code.OOM, Code.ENGINE})
ADMIN = frozenset({Kind.LOAD, Kind.UNLOAD, Kind.DRAIN, Kind.SHUTDOWN})

# The keys without which a body cannot be understood, with their types.
REQUIRED: dict[Kind, dict[str, type]] = {
    Kind.HELLO: {"proto": list},
    Kind.WELCOME: {"proto": int, "epoch": str, "session": bytes, "state": str, "info": dict, "limits": dict},
    Kind.PROGRESS: {"stage": str, "done": int, "total": int},
    Kind.READY: {"info": dict},
    Kind.SUBMIT: {"messages": list},
    Kind.ACCEPTED: {"prompt_tokens": int, "adapter": str, "max_tokens": int},
    Kind.DELTA: {"text": str, "tokens": int},
    Kind.DONE: {"reason": str, "usage": dict, "timings": dict},
    Kind.ERROR: {"code": str, "message": str, "detail": dict, "retryable": bool},
    Kind.CREDIT: {"count": int},
    Kind.CANCEL: {},
    Kind.PING: {},
    Kind.PONG: {},
    Kind.STATUS: {},
    Kind.TOKENIZE: {},
    Kind.ADAPTERS: {},
    Kind.LOAD: {"run": str},
    Kind.UNLOAD: {"adapter": str},
    Kind.DRAIN: {},
    Kind.SHUTDOWN: {},
}


@dataclass(frozen=True)
class Message:
    """One message; `request` is 16 bytes, all zero where the message belongs to no request."""

    kind: Kind
    request: bytes = NO_REQUEST
    body: dict[str, Any] = field(default_factory=dict)


class ProtocolError(Exception):
    """A message that is refused; `request` is the id it carried, as far as it could be read, `detail` the counts."""

    def __init__(self, code: Code, message: str, request: bytes = NO_REQUEST, **detail: Any) -> None:
        super().__init__(message)
        self.code = code
        self.request = request
        self.detail = detail


def encode(message: Message) -> list[bytes]:
    """The four frames of a message, without a routing id."""
    return [MAGIC, message.kind.value, message.request, msgpack.packb(message.body, use_bin_type=True)]


def decode(frames: list[bytes], max_bytes: int = MAX_MESSAGE_BYTES) -> Message:
    """The message in four frames (without a routing id); raises `ProtocolError` for anything else."""
    if len(frames) != NUM_FRAMES or frames[0] != MAGIC or len(frames[2]) != len(NO_REQUEST):
        raise ProtocolError(Code.BAD_REQUEST, "not a message: expected [CHT1][type][request id of 16 bytes][body]")
    _, type_byte, request, packed = frames
    try:
        kind = Kind(type_byte)
    except ValueError:
        raise ProtocolError(Code.UNSUPPORTED, f"unknown message type {type_byte[:8]!r}", request) from None
    body = _unpack(packed, request, max_bytes)
    for name, expected in REQUIRED[kind].items():
        # `type(...) is` and not isinstance: True is an int for isinstance.
        if type(body.get(name)) is not expected:
            raise ProtocolError(Code.BAD_REQUEST, f"{kind.name}: {name} must be a {expected.__name__}", request)
    return Message(kind, request, body)


def error(request: bytes, code: Code, message: str, **detail: Any) -> Message:
    """An ERROR message."""
    body = {"code": code.value, "message": message, "detail": detail, "retryable": code in RETRYABLE}
    return Message(Kind.ERROR, request, body)


def _unpack(packed: bytes, request: bytes, max_bytes: int) -> dict[str, Any]:
    if len(packed) > max_bytes:
        raise ProtocolError(Code.BAD_REQUEST, f"the body is larger than {max_bytes} bytes", request)
    # Fewer bytes cannot be more values.
    count = _counting(MAX_VALUES) if len(packed) > MAX_VALUES else None
    try:
        body = msgpack.unpackb(
            packed,
            raw=False,
            strict_map_key=True,
            max_array_len=MAX_LIST_ITEMS,
            max_map_len=MAX_MAP_KEYS,
            max_ext_len=0,
            list_hook=count,
            object_hook=count,
        )
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as fault:
        raise ProtocolError(Code.BAD_REQUEST, f"the body is not msgpack: {type(fault).__name__}", request) from None
    if not isinstance(body, dict):
        raise ProtocolError(Code.BAD_REQUEST, "the body is not a map", request)
    if _is_deeper(body, MAX_DEPTH):
        raise ProtocolError(Code.BAD_REQUEST, f"the body is more than {MAX_DEPTH} lists and maps deep", request)
    return body


def _counting(most: int) -> Callable[[_Container], _Container]:
    """A hook of msgpack's: gives every list and map back, raises `ValueError` when they hold more than `most` values."""
    num_values = 0

    def count(container: _Container) -> _Container:
        nonlocal num_values
        num_values += len(container)
        if num_values > most:
            raise ValueError(f"more than {most} values")
        return container

    return count


def _is_deeper(body: dict[str, Any], most: int) -> bool:
    """Whether lists and maps lie in one another more than `most` deep, the body counted."""
    level: list[Any] = [body]
    depth = 0
    while level and depth < most:
        inner = chain.from_iterable(outer.values() if type(outer) is dict else outer for outer in level)
        level = [value for value in inner if type(value) in (dict, list)]
        depth += 1
    return bool(level)
