"""What the tests of our own client share: a client that is quick to notice, connections that break, a daemon that is played."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

from serve import connection
from serve.client import Client
from serve.pieces import Accepted, Delta, Piece
from serve.protocol import Kind, Message, decode, encode
from serve.runtime import Record

TEXT = "".join(chr(97 + i % 26) for i in range(200))
LONG = TEXT * 4


def turn(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


async def whole(client: Client, text: str) -> str:
    """The text of an answer."""
    return "".join([piece.text async for piece in client.ask(turn(text)) if isinstance(piece, Delta)])


def break_connections(client: Client, record: Record, *lanes: str) -> None:
    """As after a broken line: new connections, and so new routing ids; to the daemon, a stranger speaks."""
    for lane in lanes or ("data", "control"):
        socket, endpoint = getattr(client._connection, f"_{lane}"), getattr(record, lane)
        socket.disconnect(endpoint)
        socket.connect(endpoint)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that asks after its daemon five times as often."""
    for name in ("POLL_SECONDS", "PING_SECONDS", "SILENCE_SECONDS"):
        monkeypatch.setattr(connection, name, getattr(connection, name) / 5)


class PlayedDaemon:
    """Two routers that say what a test wants said."""

    def __init__(self, folder: Path) -> None:
        self.context = zmq.asyncio.Context()
        self.sockets = {}
        for lane in ("data", "control"):
            self.sockets[lane] = self.context.socket(zmq.ROUTER)
            self.sockets[lane].bind(f"ipc://{folder / lane}")
        ends = {lane: f"ipc://{folder / lane}" for lane in self.sockets}
        self.record = Record("x", "runs/x", "echo", **ends, pid=0, started=0, epoch="e")

    async def take(self, lane: str) -> tuple[bytes, Message]:
        """(who sent it, the next message)."""
        sender, *frames = await self.sockets[lane].recv_multipart()
        return sender, decode(frames)

    async def say(self, lane: str, receiver: bytes, *frames: bytes) -> None:
        await self.sockets[lane].send_multipart([receiver, *frames])

    async def welcome(self, **limits: int) -> bytes:
        """Answer the next HELLO; who said it."""
        client, hello = await self.take("control")
        assert hello.kind is Kind.HELLO
        body = {"proto": 1, "epoch": "e", "session": b"s", "state": "ready", "info": {}, "limits": limits}
        await self.say("control", client, *encode(Message(Kind.WELCOME, body=body)))
        return client


async def first_piece(daemon: PlayedDaemon, client: Client) -> tuple[AsyncIterator[Piece], bytes, bytes]:
    """(an answer of which the first piece was read, who is asking, the id of its request)."""
    answer = client.ask(turn("x"))
    first = asyncio.create_task(anext(answer))
    sender, submit = await daemon.take("data")
    body = {"prompt_tokens": 1, "adapter": "base", "max_tokens": 9}
    await daemon.say("data", sender, *encode(Message(Kind.ACCEPTED, submit.request, body)))
    assert isinstance(await first, Accepted)
    return answer, sender, submit.request
