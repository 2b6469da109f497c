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
from serve.engines import rss_bytes
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
from tests.serve_fixtures import Box, RawClient, box, text_of, wait_until

__all__ = ["box"]
ID = bytes(range(16))
# More than both sockets and the kernel between them hold.
MANY = 5000
SHARE = 8
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


def test_a_submission_needs_an_id(box: Box) -> None:
    box.daemon()
    with RawClient(box.record()) as client:
        assert client.collect(client.submit("x", bytes(16)))[1].body["code"] == "E_BAD_REQUEST"
        assert client.is_quiet() and client.status()["waiting"] == 0


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


def beside_a_daemon(
    box: Box, monkeypatch: pytest.MonkeyPatch, talk: Callable[[], None], *words: str, delay: float = 0.0
) -> None:
    """Run a daemon in this process, and `talk` in another thread."""
    monkeypatch.setenv("AFINAR_RUNTIME_DIR", str(box.runtime))
    monkeypatch.setenv("AFINAR_ECHO_DELAY", str(delay))

    async def serve(folder: Path) -> None:
        daemon = Daemon(parse("daemon", ["HOLD=echo", *words]), folder)
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


def test_who_reads_no_endings_costs_no_memory_and_has_a_share(box: Box) -> None:
    daemon = box.daemon(0.0, f"serve.share={SHARE}")
    with RawClient(box.record()) as deaf, RawClient(box.record()) as other:
        for _ in range(MANY):
            deaf.submit("x", temperature=-1)
        requests = [deaf.submit("y" * 4 * 2**20) for _ in range(SHARE)]
        wait_until(lambda: deaf.status()["requests"].get("E_CONTEXT") == SHARE)
        before = rss_bytes(daemon.pid)
        requests += [deaf.submit("y" * 4 * 2**20) for _ in range(SHARE)]
        # The same connection for another client, which has a share of its own: what came before has been heard.
        deaf.submit("fine", session=other.session)
        wait_until(lambda: other.status()["requests"].get("stop") == 1)
        ends: dict[bytes, list[str]] = {request: [] for request in requests}
        while not all(ends.values()):
            message = deaf.receive("data")
            if message.request in ends:
                ends[message.request].append(message.body["code"])
        assert [ends[request] for request in requests] == [["E_CONTEXT"]] * SHARE + [["E_QUEUE_FULL"]] * SHARE
        assert rss_bytes(daemon.pid) - before < 2**20 * SHARE
        # All were read: there is room again.
        assert text_of(deaf.collect(deaf.submit("fine"))[0]) == "fine"


def test_what_ended_before_the_engine_read_it_has_a_share(box: Box) -> None:
    box.daemon_to_hold(f"serve.share={SHARE}", f"serve.queue={SHARE + 2}")
    with RawClient(box.record()) as client, RawClient(box.record()) as other:

        def give_up(by: RawClient) -> str:
            return str(by.collect(by.submit("y" * 2**20, deadline_ms=1))[1].body["code"])

        # The engine reads nothing while a step lasts.
        with box.held() as is_held:
            running = other.submit("x")
            wait_until(is_held)
            assert [give_up(client) for _ in range(SHARE + 2)] == ["E_DEADLINE"] * SHARE + ["E_QUEUE_FULL"] * 2
            # All clients together have the queue.
            assert [give_up(other) for _ in range(3)] == ["E_DEADLINE", "E_DEADLINE", "E_QUEUE_FULL"]
            assert other.status()["waiting"] == 0
        assert other.collect(running)[1].kind is Kind.DONE
        # The engine has read, and forgotten, them all.
        wait_until(lambda: give_up(client) != "E_QUEUE_FULL")
        assert "E_QUEUE_FULL" not in [give_up(client) for _ in range(SHARE)]
