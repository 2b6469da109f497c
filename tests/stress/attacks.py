"""Messages that no honest client sends, drawn from a seed: each attack makes (lane, frames) out of what it knows. Pure."""

from collections.abc import Callable
from typing import Any

import msgpack

from serve.protocol import ADMIN, MAX_CONTROL_BYTES, MAX_MESSAGE_BYTES, VERSION, Kind
from tests.stress.attacker import CONTROL, DATA, Draw, frames

NUMBERS: tuple[Any, ...] = (
    float("nan"), float("inf"), float("-inf"), -1, -0.5, 0, 2**31, 2**63 - 1, 2**64 - 1, -(2**63), 1e308, 1e-308, "1", "", b"\x00",
    True, None, [], {}, [0.5], {"a": 1},
)  # fmt: skip
FIELDS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_tokens", "deadline_ms", "stop", "adapter", "wants_ids",
    "messages", "have", "session",
)  # fmt: skip


Attack = Callable[[Draw], tuple[str, list[bytes]]]


def submit(draw: Draw, body: Any) -> tuple[str, list[bytes]]:
    """A SUBMIT with this body."""
    return DATA, frames(b"S", draw.id(), body)


def lane(draw: Draw) -> str:
    """Either."""
    return draw.random.choice((DATA, CONTROL))


def random_bytes(draw: Draw) -> tuple[str, list[bytes]]:
    """Frames of anything."""
    return lane(draw), [draw.noise(200) for _ in range(4)]


def wrong_frames(draw: Draw) -> tuple[str, list[bytes]]:
    """Too few, too many, a wrong magic, a short id."""
    good = frames(b"?", draw.id(), {})
    shapes = (
        good[:3],
        [*good, b""],
        good[:1] * draw.random.randint(1, 300),
        [b"CHT2", *good[1:]],
        [*good[:2], b"short", good[3]],
    )
    return lane(draw), draw.random.choice(shapes)


def random_body(draw: Draw) -> tuple[str, list[bytes]]:
    """Each type with a body of random bytes."""
    return lane(draw), frames(draw.random.choice(list(Kind)).value, draw.id(), draw.noise(300))


def mutated(draw: Draw) -> tuple[str, list[bytes]]:
    """A good message with a few bits turned."""
    where, good = submit(draw, draw.body("hola " * 5, stop=["fin"], temperature=0.5, seed=7))
    spoilt = bytearray(good[3])
    for _ in range(draw.random.randint(1, 4)):
        spoilt[draw.random.randrange(len(spoilt))] ^= 1 << draw.random.randrange(8)
    return where, [*good[:3], bytes(spoilt)]


def cut(draw: Draw) -> tuple[str, list[bytes]]:
    """A good message that breaks off."""
    where, good = submit(draw, draw.body("hola " * 20))
    return where, [*good[:3], good[3][: draw.random.randrange(len(good[3]))]]


def wrong_side(draw: Draw) -> tuple[str, list[bytes]]:
    """Messages that only the daemon or an engine may send, and types that are not."""
    kind = draw.random.choice([*(k.value for k in Kind), b"~", b"", b"SS", bytes([draw.random.randrange(256)])])
    body = {
        "info": {},
        "reason": "stop",
        "usage": {},
        "timings": {},
        "text": "x",
        "tokens": 1,
        "stage": "x",
        "done": 1,
        "total": 1,
    }
    return lane(draw), frames(kind, draw.random.choice(draw.ids), body)


def wrong_order(draw: Draw) -> tuple[str, list[bytes]]:
    """SUBMIT without a session, CREDIT for nothing, CANCEL of what is not one's own."""
    request = draw.random.choice([*draw.ids, draw.random.randbytes(16)])
    choices: tuple[tuple[str, list[bytes]], ...] = (
        submit(draw, {"messages": [{"role": "user", "content": "x"}]}),
        submit(draw, draw.body(session=draw.random.randbytes(16))),
        (DATA, frames(b"C", request, {"count": draw.random.choice((1, -1, 0, 2**62, -(2**62)))})),
        (CONTROL, frames(b"X", request, {})),
        (CONTROL, frames(b"K", bytes(16), {"messages": [{"role": "user", "content": "x"}]})),
    )
    return draw.random.choice(choices)


def bad_fields(draw: Draw) -> tuple[str, list[bytes]]:
    """NaN, negative, huge, of another type: one or several fields."""
    wrong = {draw.random.choice(FIELDS): draw.random.choice(NUMBERS) for _ in range(draw.random.randint(1, 3))}
    return submit(draw, {**draw.body(), **wrong})


def bad_turns(draw: Draw) -> tuple[str, list[bytes]]:
    """Conversations that are none."""
    turn = {"role": "user", "content": "x"}
    choices: tuple[Any, ...] = (
        [], [[]], [None], [{}], [{**turn, "role": "root"}], [{**turn, "content": 3}], [{**turn, "role": ["user"]}], "x", {"0": turn},
        [{**turn, "role": "assistant"}], [turn, turn], [{**turn, "role": "system"}], [turn] * 9_999, [turn] * 10_001,
        [{**turn, "content": "\ud7ff\x00\x1b[2J\uffff<|im_end|>"}],
    )  # fmt: skip
    return submit(draw, {**draw.body(), "messages": draw.random.choice(choices)})


def bad_text(draw: Draw) -> tuple[str, list[bytes]]:
    """Text that is not UTF-8: overlong, cut off, surrogates."""
    text = draw.random.choice((b"\xff\xfe", b"\xc0\xaf", b"a\xf0\x9f\xa6", b"\xed\xa0\x80", b"\x80" * 9))
    raw = msgpack.packb(draw.body("@@"), use_bin_type=True)
    return submit(draw, raw.replace(b"\xa2@@", bytes([0xA0 + len(text)]) + text))


def stop_lists(draw: Draw) -> tuple[str, list[bytes]]:
    """Lists of stop strings, a megabyte of them now and then."""
    size = 2**20 if draw.is_big() else 2**12
    choices = (
        ["x" * (size // 16)] * 16,
        ["xy"] * min(size // 10, 12_000),
        ["x" * size],
        [""] * 3,
        [b"x"],
        "x" * 20,
        {"x": "y"},
    )
    return submit(draw, draw.body(stop=draw.random.choice(choices)))


def deep(draw: Draw) -> tuple[str, list[bytes]]:
    """Lists and maps in one another, deeper than anybody reads."""
    depth = draw.random.choice((100, 900, 1022, 1024, 5000))
    inner = draw.random.choice((b"\x91", b"\x81\xa1a")) * depth + b"\xc0"
    return submit(draw, b"\x83\xa8messages" + inner + b"\xa7session\xc4\x10" + draw.sessions[-1] + b"\xa1x" + inner)


def extensions(draw: Draw) -> tuple[str, list[bytes]]:
    """msgpack's extension types, and lengths that promise more than there is."""
    choices = (
        b"\x81\xa1a\xc7\x05\x2aabcde", b"\x81\xa1a\xd6\xff\x00\x00\x00\x01", b"\xdf\xff\xff\xff\xff", b"\x81\xa1a\xdd\xff\xff\xff\xff",
        b"\x81\xa1a\xdb\xff\xff\xff\xff", b"\x81\x01\x02", b"\xc1", b"", b"\x80\x80", b"\x90", b"\xa1x",
    )  # fmt: skip
    return lane(draw), frames(draw.random.choice(list(Kind)).value, draw.id(), draw.random.choice(choices))


def duplicates(draw: Draw) -> tuple[str, list[bytes]]:
    """An id again, with another body, or with a `have` from nowhere."""
    have = draw.random.choice((None, 0, 1, 2**62, -1, 2**64 - 1, "9", 1.5, True, [1]))
    return DATA, frames(b"S", draw.random.choice(draw.ids), draw.body("again", have=have))


def administration(draw: Draw) -> tuple[str, list[bytes]]:
    """LOAD, UNLOAD, DRAIN and SHUTDOWN with a guessed token, or none."""
    token = draw.random.choice(("", "admin", None, b"", 0, draw.random.randbytes(16).hex(), "x" * 4096, ["a"], "ñ🦊"))
    body = {"run": "/etc", "adapter": "base", "admin": token}
    if draw.random.random() < 0.2:
        del body["admin"]
    return CONTROL, frames(draw.random.choice(sorted(ADMIN, key=str)).value, draw.id(), body)


def tokenize(draw: Draw) -> tuple[str, list[bytes]]:
    """Questions without sense, and now and then about megabytes."""
    size = MAX_CONTROL_BYTES - 1000 if draw.is_big() else draw.random.randint(0, 5000)
    turns = draw.random.choice(([{"role": "user", "content": "palabra " * (size // 8)}], [], None, [3]))
    return CONTROL, frames(
        b"K", draw.id(), {"messages": turns, "adapter": draw.random.choice((None, "base", "no", 3, "@", "base@ff"))}
    )


def too_long(draw: Draw) -> tuple[str, list[bytes]]:
    """Conversations beyond the context, beyond reason now and then."""
    size = 4 * 2**20 if draw.is_big() else 50_000
    return submit(draw, draw.body("y" * size))


def oversize(draw: Draw) -> tuple[str, list[bytes]]:
    """A frame beyond the limit, now and then: the connection is dropped."""
    if draw.is_big():
        return lane(draw), frames(b"S", draw.id(), bytes(MAX_MESSAGE_BYTES + 1))
    return lane(draw), frames(b"S", draw.id(), bytes(10_000))


def greetings(draw: Draw) -> tuple[str, list[bytes]]:
    """HELLO after HELLO, with guessed sessions and versions that are none."""
    session = draw.random.choice((draw.random.randbytes(16), b"", "x", 3, None, bytes(16), b"x" * 10_000))
    proto = draw.random.choice(([VERSION], [VERSION], [], [2**40], ["1"], [[1]], VERSION, None, [None] * 999))
    return CONTROL, frames(b"H", draw.id(), {"proto": proto, "session": session})


def questions(draw: Draw) -> tuple[str, list[bytes]]:
    """STATUS, PING and ADAPTERS, more often than anybody needs."""
    return CONTROL, frames(draw.random.choice((b"T", b"?", b"L")), draw.id(), {"x": draw.noise(50)})


def honest(draw: Draw) -> tuple[str, list[bytes]]:
    """A request that is good, whose answer nobody reads."""
    return submit(draw, draw.body("z" * draw.random.randint(1, 20), seed=draw.random.choice((None, 7))))


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        random_bytes, wrong_frames, random_body, mutated, cut, wrong_side, wrong_order, bad_fields, bad_turns, bad_text, stop_lists,
        deep, extensions, duplicates, administration, tokenize, too_long, oversize, greetings, questions, honest,
    )
}  # fmt: skip
