"""Messages made to do harm: the daemon stays, the others are answered, and memory is bounded whatever one client does."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from serve import runtime
from serve.arguments import parse
from serve.broker import Broker
from serve.daemon import Daemon
from serve.dispatch import Dispatch
from serve.open_requests import OpenRequest
from serve.protocol import (
    MAGIC,
    MAX_CONTROL_BYTES,
    MAX_DEPTH,
    MAX_LIST_ITEMS,
    MAX_MESSAGE_BYTES,
    MAX_VALUES,
    Code,
    Kind,
    Message,
    ProtocolError,
    decode,
    encode,
)
from tests.serve_fixtures import Box, RawClient, box, text_of

__all__ = ["box"]
ID = bytes(range(16))
TURNS = [{"role": "user", "content": "x"}]


def nested(depth: int) -> bytes:
    """A list in a list, so many of them, packed."""
    return b"\x91" * depth + b"\x00"


def packed(name: str, depth: int, **body: Any) -> bytes:
    """A body with one more key, whose value is so deep."""
    return bytes([0x80 + len(body) + 1]) + msgpack.packb(body)[1:] + msgpack.packb(name) + nested(depth)


def test_a_body_is_read_to_a_depth_and_to_a_number_of_values() -> None:
    whole = decode([MAGIC, Kind.PING.value, ID, packed("x", MAX_DEPTH - 1)])
    assert whole.body.keys() == {"x"}
    rows = [[0] * (MAX_LIST_ITEMS - 1)] * (MAX_VALUES // MAX_LIST_ITEMS)
    assert decode(encode(Message(Kind.PING, ID, {"x": rows[:-1]}))).body == {"x": rows[:-1]}
    for body in (packed("x", MAX_DEPTH), packed("x", 1000), msgpack.packb({"x": [*rows, rows[0]]})):
        with pytest.raises(ProtocolError) as caught:
            decode([MAGIC, Kind.PING.value, ID, body])
        assert (caught.value.code, caught.value.request) == (Code.BAD_REQUEST, ID)


def test_no_depth_of_a_message_ends_the_daemon(box: Box) -> None:
    box.daemon()
    with RawClient(box.record()) as client:
        for depth in (3, MAX_DEPTH - 2, MAX_DEPTH, 400, 600, 1000, 1022):
            for name, lane, kind in (
                ("max_tokens", "data", Kind.SUBMIT),
                ("messages", "data", Kind.SUBMIT),
                ("have", "data", Kind.SUBMIT),
                ("session", "data", Kind.SUBMIT),
                ("proto", "control", Kind.HELLO),
                ("messages", "control", Kind.TOKENIZE),
                ("run", "control", Kind.TOKENIZE),
                ("admin", "control", Kind.LOAD),
            ):
                good = {"messages": TURNS, "session": client.session, "run": "x"}
                request = os.urandom(16)
                body = packed(name, depth, **{key: value for key, value in good.items() if key != name})
                client.sockets[lane].send_multipart([MAGIC, kind.value, request, body])
                while (answer := client.receive(lane)).request != request:
                    pass
                assert answer.kind is not Kind.ERROR or answer.body["code"] != Code.INTERNAL, (name, depth, answer)
        assert text_of(client.collect(client.submit("still there"))[0]) == "still there"
    assert [e for e in box.events() if e["event"] == "mistake"] == []


def test_few_bytes_that_are_many_values_cost_little(box: Box) -> None:
    box.daemon()
    with RawClient(box.record()) as client:
        for lane, kind, size in (
            ("data", Kind.SUBMIT, MAX_MESSAGE_BYTES),
            ("control", Kind.TOKENIZE, MAX_CONTROL_BYTES),
        ):
            row = b"\xdc\x27\x10" + b"\x90" * MAX_LIST_ITEMS
            number = size // len(row) - 1
            request = os.urandom(16)
            body = b"\x81\xa1x\xdc" + number.to_bytes(2, "big") + row * number
            client.sockets[lane].send_multipart([MAGIC, kind.value, request, body])
            assert client.receive(lane).body["code"] == "E_BAD_REQUEST"


def beside_a_daemon(box: Box, monkeypatch: pytest.MonkeyPatch, talk: Callable[[], None]) -> None:
    """Run a daemon in this process, and `talk` in another thread."""
    monkeypatch.setenv("AFINAR_RUNTIME_DIR", str(box.runtime))

    async def serve(folder: Path) -> None:
        daemon = Daemon(parse("daemon", ["HOLD=echo"]), folder)
        running = asyncio.create_task(daemon.run())
        while daemon._broker.state != "ready":
            await asyncio.sleep(0.02)
        try:
            await asyncio.to_thread(talk)
        finally:
            daemon.leave(now=True)
            assert await running == 0

    folder = runtime.directory()
    with runtime.claimed(folder, "echo"):
        asyncio.run(serve(folder))


def test_a_mistake_of_ours_ends_only_the_request_that_led_to_it(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    place, on_control = Dispatch.place, Broker.on_control

    def place_or_fail(self: Dispatch, request: OpenRequest) -> None:
        place(self, request)
        if request.asked.messages[0]["content"] == "secret":
            raise RecursionError("secret")

    def control_or_fail(self: Broker, sender: bytes, message: Message) -> None:
        if message.kind is Kind.ADAPTERS:
            raise KeyError("secret")
        on_control(self, sender, message)

    monkeypatch.setattr(Dispatch, "place", place_or_fail)
    monkeypatch.setattr(Broker, "on_control", control_or_fail)

    def talk() -> None:
        with RawClient(box.record()) as client:
            _, last = client.collect(client.submit("secret"))
            assert (last.kind, last.body["code"], last.body["retryable"]) == (Kind.ERROR, "E_INTERNAL", False)
            answer = client.ask(Kind.ADAPTERS)
            assert answer.body["code"] == "E_INTERNAL" and "test_hostile.py" in answer.body["message"]
            assert text_of(client.collect(client.submit("fine"))[0]) == "fine"
            assert client.status()["waiting"] == 0 and client.is_quiet()

    beside_a_daemon(box, monkeypatch, talk)
    events = box.events()
    assert [e["what"] for e in events if e["event"] == "mistake"] == ["RecursionError", "KeyError"]
    assert "secret" not in str(events)
