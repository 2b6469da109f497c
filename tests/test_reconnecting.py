"""A connection over tcp that breaks under a client: it is made anew, and the answer goes on where it was."""

import asyncio
import contextlib
import dataclasses
from typing import Any

import pytest

from serve.client import connect
from serve.pieces import Delta, Done
from tests.serve_fixtures import Box, box
from tests.test_security import free_ports

__all__ = ["box"]
TEXT = "".join(chr(97 + i % 26) for i in range(200))
# The lanes that are cut: of each client others.
CUTS = (("data",), ("control",), ("data", "control"))


class Line:
    """A line between two tcp ports that can be cut: both ends then see a connection that was reset."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: list[asyncio.StreamWriter] = []
        self.num_connections = 0

    async def listen(self) -> int:
        """The port that leads there."""
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, back]
        await asyncio.gather(self._pass_on(reader, back), self._pass_on(there, writer))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(65536):
                writer.write(chunk)
                await writer.drain()
        writer.close()

    def cut(self) -> None:
        """Break what stands."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def close(self) -> None:
        """Nothing leads there any more."""
        self._server.close()
        self.cut()


def test_an_answer_survives_connections_over_tcp_that_break(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_ports()
    box.run("keys")
    box.daemon(0.02, f"LISTEN=127.0.0.1:{port}")
    monkeypatch.setenv("HOME", str(box.folder))

    async def talk(lanes: tuple[str, ...]) -> tuple[str, list[Any], dict[str, int]]:
        lines = {"data": Line(port), "control": Line(port + 1)}
        ends = {name: f"tcp://127.0.0.1:{await line.listen()}" for name, line in lines.items()}
        record = dataclasses.replace(box.record(), pid=0, **ends)
        pieces: list[Any] = []
        with await connect(record) as client:
            async for piece in client.ask([{"role": "user", "content": TEXT}]):
                pieces.append(piece)
                if isinstance(piece, Delta) and piece.tokens == 20:
                    for lane in lanes:
                        lines[lane].cut()
        counts = {name: line.num_connections for name, line in lines.items()}
        for line in lines.values():
            line.close()
        heard = "".join(piece.text for piece in pieces if isinstance(piece, Delta))
        return heard, pieces, counts

    async def talk_all() -> dict[str, Any]:
        for lanes, told in zip(CUTS, await asyncio.gather(*map(talk, CUTS)), strict=True):
            heard, pieces, counts = told
            assert heard == TEXT and [type(piece) for piece in pieces].count(Done) == 1
            # The broken connections were made anew.
            assert counts == {lane: 1 + (lane in lanes) for lane in ("data", "control")}
        with await connect(box.record()) as client:
            return await client.status()

    status = asyncio.run(talk_all())
    # Each token was made once.
    assert (status["tokens"], status["requests"]) == (len(CUTS) * len(TEXT), {"stop": len(CUTS)})
