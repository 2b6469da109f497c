"""Our client where an answer is left, cancelled or read slowly, and where its daemon is busy, hangs or babbles."""

import asyncio
import dataclasses
import os
import signal
from collections.abc import AsyncIterator

import pytest
import zmq.asyncio

from serve import connection
from serve.client import Client, connect
from serve.errors import NoDaemonError, RequestError, ServeError
from serve.pieces import Delta, Done
from serve.protocol import CREDIT_WINDOW, NO_REQUEST, Code, Kind, Message, decode, encode, error
from tests.client_fixtures import LONG, TEXT, PlayedDaemon, break_connections, first_piece, quick, turn, whole
from tests.serve_fixtures import Box, box, children

__all__ = ["box", "quick"]


def count_sent(client: Client, monkeypatch: pytest.MonkeyPatch) -> list[Kind]:
    """What the client sends from now on."""
    kinds: list[Kind] = []
    send = client._connection._send

    def counting(socket: zmq.asyncio.Socket, frames: list[bytes]) -> None:
        kinds.append(decode(frames).kind)
        send(socket, frames)

    monkeypatch.setattr(client._connection, "_send", counting)
    return kinds


def test_who_breaks_an_answer_off_ends_it(box: Box) -> None:
    box.daemon(0.01)

    async def talk() -> tuple[int, dict[str, int]]:
        with await connect(box.record()) as client:
            pieces = client.ask(turn(LONG))
            assert isinstance(pieces, AsyncIterator)
            async for piece in pieces:
                if isinstance(piece, Delta):
                    break
            await pieces.aclose()
            status = await client.status()
            return status["waiting"], status["requests"]

    assert asyncio.run(talk()) == (0, {"E_CANCELLED": 1})


def test_an_answer_that_nobody_ended_takes_nothing_from_the_next(box: Box) -> None:
    box.daemon(0.01)

    async def talk() -> None:
        with await connect(box.record()) as client:
            left, next_ = client.ask(turn(LONG)), client.ask(turn(TEXT))
            await anext(left)
            await anext(next_)
            await left.aclose()
            client.cancel()
            with pytest.raises(RequestError, match="cancelled"):
                async for _ in next_:
                    pass

    asyncio.run(talk())


def test_a_cancel_is_told_also_where_the_end_has_come_already(box: Box) -> None:
    box.daemon()

    async def talk() -> str:
        heard = ""
        with await connect(box.record()) as client:
            with pytest.raises(RequestError) as caught:
                async for piece in client.ask(turn(TEXT)):
                    if isinstance(piece, Delta):
                        heard += piece.text
                        # All of the answer comes meanwhile.
                        await asyncio.sleep(0.3)
                        client.cancel()
            assert caught.value.code == Code.CANCELLED
            assert await whole(client, "next") == "next"
        return heard

    # What was left out is no part of a whole answer.
    assert asyncio.run(talk()) == "a"


def test_a_cancel_survives_a_connection_that_breaks(box: Box, quick: None) -> None:
    box.daemon(0.02)

    async def talk() -> dict[str, int]:
        with await connect(box.record()) as client:
            with pytest.raises(RequestError, match="cancelled"):
                async for piece in client.ask(turn(LONG)):
                    if isinstance(piece, Delta) and piece.tokens == 5:
                        break_connections(client, box.record(), "control")
                        client.cancel()
            return dict((await client.status())["requests"])

    assert asyncio.run(talk()) == {"E_CANCELLED": 1}


def test_a_reader_that_is_slow_is_not_sent_the_answer_again(
    box: Box, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.daemon()

    async def talk() -> tuple[str, int]:
        heard = ""
        with await connect(box.record()) as client:
            kinds = count_sent(client, monkeypatch)
            async for piece in client.ask(turn(TEXT)):
                heard += piece.text if isinstance(piece, Delta) else ""
                # Over for the daemon at once, and not for us; and so once more when all of it was read.
                if isinstance(piece, Done) or heard == "a":
                    await asyncio.sleep(1.2 * connection.SILENCE_SECONDS)
            return heard, kinds.count(Kind.SUBMIT)

    assert asyncio.run(talk()) == (TEXT, 1)


def test_an_engine_that_is_busy_is_no_daemon_that_is_silent(box: Box, quick: None) -> None:
    box.daemon_to_hold()

    async def talk() -> int:
        with await connect(box.record()) as busy, await connect(box.record()) as client:
            with box.held():
                answer = busy.ask(turn("x"))
                await anext(answer)
                # The engine is asked, and is in the middle of a step for longer than a daemon may be silent.
                asking = asyncio.create_task(client.tokenize(turn("abc")))
                await asyncio.sleep(1.5 * connection.SILENCE_SECONDS)
                assert not asking.done()
            return int((await asking)["tokens"])

    assert asyncio.run(talk()) == 4


def test_a_question_is_not_waited_for_for_ever(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = box.daemon()
    os.kill(children(daemon.pid)[0], signal.SIGSTOP)
    monkeypatch.setattr("serve.client.QUESTION_SECONDS", 1)

    async def talk() -> None:
        with await connect(box.record()) as client:
            with pytest.raises(ServeError, match="not answered for 1 s; try again"):
                await client.tokenize(turn("abc"))
            # The daemon itself is there.
            assert (await client.status())["state"] == "ready"

    asyncio.run(talk())


@pytest.mark.parametrize("has_pid", [True, False])
def test_a_daemon_that_hangs_is_told_from_one_that_works(box: Box, quick: None, has_pid: bool) -> None:
    daemon = box.daemon(0.01)

    async def talk() -> None:
        record = box.record() if has_pid else dataclasses.replace(box.record(), pid=0)
        with await connect(record) as client:
            with pytest.raises(NoDaemonError, match=f"silent; try: kill -9 {daemon.pid}" if has_pid else "silent; try"):
                async for piece in client.ask(turn(LONG)):
                    if isinstance(piece, Delta) and piece.tokens == 5:
                        daemon.send_signal(signal.SIGSTOP)
            # The next question is waited for as long as the first.
            asking = asyncio.create_task(client.status())
            await asyncio.sleep(3 * connection.POLL_SECONDS)
            daemon.send_signal(signal.SIGCONT)
            assert (await asking)["state"] == "ready"
            assert await whole(client, "next") == "next"

    asyncio.run(talk())


def test_what_is_no_message_ends_an_answer_in_one_line(box: Box, quick: None) -> None:
    async def talk() -> None:
        daemon = PlayedDaemon(box.folder)
        greeted, connected = await asyncio.gather(daemon.welcome(), connect(daemon.record))
        with connected as client, daemon.context:
            answer, _, _ = await first_piece(daemon, client)
            await daemon.say("control", greeted, b"babble")
            with pytest.raises(NoDaemonError, match="speaks another protocol"):
                await anext(answer)

    asyncio.run(talk())


def test_what_is_no_message_does_not_hide_how_an_answer_ended(box: Box, quick: None) -> None:
    async def talk() -> None:
        daemon = PlayedDaemon(box.folder)
        greeted, connected = await asyncio.gather(daemon.welcome(), connect(daemon.record))
        with connected as client, daemon.context:
            answer, sender, request = await first_piece(daemon, client)
            await daemon.say("control", greeted, b"babble")
            await asyncio.sleep(0.2)
            await daemon.say("data", sender, *encode(error(request, Code.OOM, "too much; try less")))
            while not client._connection.has_unread:
                await asyncio.sleep(0.01)
            with pytest.raises(RequestError, match="too much"):
                await anext(answer)

    asyncio.run(talk())


def test_a_daemon_that_refuses_every_greeting_is_not_greeted_for_ever(box: Box, quick: None) -> None:
    async def talk() -> None:
        daemon = PlayedDaemon(box.folder)
        with daemon.context:
            connecting = asyncio.create_task(connect(daemon.record))
            sender, _ = await daemon.take("control")
            await daemon.say("control", sender, *encode(error(NO_REQUEST, Code.BAD_REQUEST, "another greeting")))
            with pytest.raises(RequestError, match="another greeting"):
                await connecting

    asyncio.run(talk())


@pytest.mark.parametrize("window", [1, 4, CREDIT_WINDOW])
def test_credit_is_granted_in_halves_of_the_window_that_the_daemon_told(box: Box, window: int) -> None:
    lump = max(window // 2, 1)
    num_grants = 2 * window // lump

    async def talk() -> list[int]:
        daemon = PlayedDaemon(box.folder)
        _, connected = await asyncio.gather(daemon.welcome(credit=window), connect(daemon.record))
        with connected as client, daemon.context:
            answer, sender, request = await first_piece(daemon, client)
            for number in range(2 * window):
                body = {"n": number, "text": "x", "tokens": number + 1}
                await daemon.say("data", sender, *encode(Message(Kind.DELTA, request, body)))
                await anext(answer)
            grants = [(await daemon.take("data"))[1].body["count"] for _ in range(num_grants)]
            assert not await daemon.sockets["data"].poll(100)
            await answer.aclose()
            return grants

    assert asyncio.run(talk()) == [lump] * num_grants
