"""What the daemon takes at most, of one message, of one connection and of all: told before, and refused beyond."""

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from serve import clients, runtime
from serve.administration import LEAST_QUESTION_BYTES, MAX_QUESTION_BYTES, MAX_QUESTIONS, RETRY_MS
from serve.arguments import parse
from serve.client import connect
from serve.daemon import UNREAD, Daemon
from serve.engines import rss_bytes
from serve.errors import UserError
from serve.open_requests import Lane
from serve.protocol import MAX_CONTROL_BYTES, Kind, Message, encode
from tests.serve_fixtures import PATIENCE, Box, RawClient, box, wait_until
from tests.test_hostile import beside_a_daemon

__all__ = ["box"]
TURN = {"role": "user", "content": "x"}
Fields = Callable[[int], dict[str, Any]]


def filled(body: dict[str, Any], size: int) -> dict[str, Any]:
    """The body with a text so long that it is packed into `size` bytes."""

    def made(length: int) -> dict[str, Any]:
        return {**body, "messages": [{**TURN, "content": "x" * length}]}

    packed = made(size + size - len(msgpack.packb(made(size))))
    assert len(msgpack.packb(packed)) == size
    return packed


BOUNDS: dict[str, Fields] = {
    "list_items": lambda n: {"messages": [TURN] * n},
    # The conversation and the session are keys too.
    "map_keys": lambda n: {f"unknown{i}": i for i in range(n - 2)},
    "stops": lambda n: {"stop": ["x"] * n},
    "stop_characters": lambda n: {"stop": ["x" * n]},
    "deadline_ms": lambda n: {"deadline_ms": n},
    "max_tokens": lambda n: {"max_tokens": n},
}


def test_a_submission_may_have_what_welcome_tells_and_no_more(box: Box) -> None:
    box.daemon()
    with RawClient(box.record()) as client:
        for name, fields in BOUNDS.items():
            most = int(client.limits[name])
            codes = [client.collect(client.submit("x", **fields(n)))[1].body.get("code") for n in (most, most + 1)]
            # So many turns are more than the context, but they were understood.
            assert codes == [{"list_items": "E_CONTEXT"}.get(name), "E_BAD_REQUEST"], name
        body = {"session": client.session}
        request, most = os.urandom(16), int(client.limits["message_bytes"])
        client.send("data", Message(Kind.SUBMIT, request, filled(body, most)))
        assert client.collect(request)[1].body["code"] == "E_CONTEXT"
        client.send("data", Message(Kind.SUBMIT, os.urandom(16), filled(body, most + 1)))
        # The connection was dropped, and made anew by the client's socket.
        assert client.is_quiet()
        assert client.collect(client.submit("x"))[1].kind is Kind.DONE
        most = int(client.limits["control_bytes"])
        assert client.ask(Kind.TOKENIZE, **filled({}, most)).body["code"] == "E_CONTEXT"
        client.send("control", Message(Kind.TOKENIZE, os.urandom(16), filled({}, most + 1)))
        wait_until(lambda: client.ask(Kind.STATUS).body.get("message") == "say HELLO first")


@pytest.mark.parametrize("size", [2**20, 10])
def test_questions_that_wait_are_bounded_in_bytes(box: Box, size: int) -> None:
    box.daemon_to_hold()
    question = filled({}, size + 100)
    each = max(size + 100, LEAST_QUESTION_BYTES)
    number = MAX_QUESTION_BYTES // each
    with contextlib.ExitStack() as stack:
        askers = [stack.enter_context(RawClient(box.record())) for _ in range(-(-number // MAX_QUESTIONS))]
        late = stack.enter_context(RawClient(box.record()))
        # No question is answered while a step lasts.
        with box.held() as is_held:
            late.submit("x")
            wait_until(is_held)
            for asked in range(number):
                askers[asked // MAX_QUESTIONS].send("control", Message(Kind.TOKENIZE, os.urandom(16), question))
            for asker in askers:
                # The daemon has heard what was asked before.
                asker.status()
            refused = late.ask(Kind.TOKENIZE, **question)
            assert (refused.body["code"], refused.body["retryable"]) == ("E_QUEUE_FULL", True)
            counts = {"waiting": number * each, "max": MAX_QUESTION_BYTES, "retry_after_ms": RETRY_MS}
            assert refused.body["detail"] == counts
            # At once: the turn of the others comes when the step is over.
            assert not any(asker.sockets["control"].poll(0) for asker in askers)
        answers = [askers[asked // MAX_QUESTIONS].receive("control") for asked in range(number)]
        assert all(answer.body.get("code") != "E_QUEUE_FULL" for answer in answers)
        # All of them were answered: there is room again.
        assert late.ask(Kind.TOKENIZE, **question).body.get("code") != "E_QUEUE_FULL"


def test_questions_of_one_client_are_bounded_in_number(box: Box) -> None:
    box.daemon_to_hold()
    with RawClient(box.record()) as client, RawClient(box.record()) as other:
        most = int(client.limits["questions"])
        assert most == MAX_QUESTIONS
        with box.held() as is_held:
            client.submit("x")
            wait_until(is_held)
            for _ in range(most):
                client.send("control", Message(Kind.TOKENIZE, os.urandom(16), {"messages": [TURN]}))
            refused = client.ask(Kind.TOKENIZE, messages=[TURN])
            assert refused.body["code"] == "E_QUEUE_FULL"
            assert refused.body["detail"] == {"waiting": most, "max": most, "retry_after_ms": RETRY_MS}
            other.send("control", Message(Kind.TOKENIZE, os.urandom(16), {"messages": [TURN]}))
            other.send("control", Message(Kind.STATUS))
            # That of another client waits, and is not refused.
            assert other.receive("control").kind is Kind.STATUS
        assert other.receive("control").body["tokens"] == 2
        assert [client.receive("control").body["tokens"] for _ in range(most)] == [2] * most
        assert client.ask(Kind.TOKENIZE, messages=[TURN]).body["tokens"] == 2


def test_the_memory_of_large_messages_is_given_back(box: Box) -> None:
    daemon = box.daemon()
    with RawClient(box.record()) as client:
        client.collect(client.submit("x"))
        before = rss_bytes(daemon.pid)
        for size in (1, 5, 2, 7, 3, 6, 4):
            for text in ("y" * size * 2**20, "x" * 9):
                client.collect(client.submit(text))
        # By itself glibc would keep what the largest of them took.
        assert rss_bytes(daemon.pid) - before < 4 * 2**20


@pytest.mark.parametrize("lane", Lane)
def test_what_a_connection_sends_is_taken_only_as_it_is_read(box: Box, lane: Lane, monkeypatch: Any) -> None:
    monkeypatch.setenv("AFINAR_RUNTIME_DIR", str(box.runtime))

    async def flood() -> int:
        """How many messages a daemon takes that reads none."""
        folder = runtime.directory()
        daemon = Daemon(parse("daemon", ["HOLD=echo"]), folder)
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.set(zmq.LINGER, 0)
            dealer.set(zmq.SNDHWM, 1)
            dealer.connect(f"ipc://{Path(folder) / f'echo.{lane.value}'}")
            number = 0
            while dealer.poll(2000, zmq.POLLOUT):
                dealer.send_multipart(encode(Message(Kind.TOKENIZE, bytes(16), filled({}, 2**20))))
                number += 1
        daemon._context.destroy(linger=0)
        return number

    taken = asyncio.run(flood())
    # Some lie in the buffers of both sides.
    assert UNREAD[lane] <= taken <= UNREAD[lane] + 4


@pytest.mark.slow
def test_a_flood_of_greetings_does_not_cost_a_quiet_client_its_session(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "MAX_SESSIONS", 64)

    def flood() -> None:
        record = box.record()
        with RawClient(record) as quiet, zmq.Context() as context:
            assert quiet.status()["state"] == "ready"
            for _ in range(clients.MAX_SESSIONS + 10):
                with context.socket(zmq.DEALER) as dealer:
                    dealer.connect(record.control)
                    dealer.send_multipart(encode(Message(Kind.HELLO, body={"proto": [1]})))
                    assert dealer.poll(PATIENCE * 1e3)
            assert quiet.status()["state"] == "ready"
            assert quiet.collect(quiet.submit("x"))[1].kind is Kind.DONE

    beside_a_daemon(box, monkeypatch, flood)


def test_conversations_of_thousands_of_turns_wait_in_little_memory(box: Box) -> None:
    daemon = box.daemon_to_hold("serve.slots=1")
    with box.held() as is_held, RawClient(box.record()) as client:
        client.submit("x" * 9)
        wait_until(is_held)
        before = rss_bytes(daemon.pid)
        for _ in range(20):
            client.submit("", messages=[TURN] * 9_999)
        # The engine, in the middle of a step, has not heard of them.
        wait_until(lambda: client.status()["waiting"] == 20)
        # As objects they would be fifty megabytes.
        assert rss_bytes(daemon.pid) - before < 20 * 2**20


def test_our_client_keeps_what_is_too_long_to_itself(box: Box) -> None:
    box.daemon()

    async def ask() -> None:
        with await connect(box.record()) as client:
            text = [{"role": "user", "content": "x" * MAX_CONTROL_BYTES}]
            with pytest.raises(UserError, match="go through; try a shorter text"):
                await client.tokenize(text)
            # The connection is the same as before.
            assert (await client.status())["state"] == "ready"

    asyncio.run(ask())
