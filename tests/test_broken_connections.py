"""Our client where a connection breaks, and where the daemon behind it has forgotten the client or is another one."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from serve import connection, curve
from serve.client import Client, connect
from serve.errors import NoDaemonError, RequestError, ServeError
from serve.pieces import Delta
from serve.runtime import Record
from tests.client_fixtures import LONG, TEXT, break_connections, quick, turn, whole
from tests.serve_fixtures import PATIENCE, ROOT, Box, box, children, wait_until
from tests.test_security import free_ports

__all__ = ["box", "quick"]


@pytest.mark.parametrize("session", [b"", b"one that was forgotten"])
def test_what_is_asked_after_a_quiet_time_in_which_the_connection_broke(box: Box, session: bytes) -> None:
    box.daemon()

    async def talk() -> None:
        with await connect(box.record()) as client:
            for ask in (client.status, client.adapters, lambda: whole(client, TEXT), client.status):
                break_connections(client, box.record())
                client._connection.session = session or client._connection.session
                answer = await ask()
                assert answer == TEXT if isinstance(answer, str) else answer

    asyncio.run(talk())


def test_the_rest_of_an_answer_that_the_daemon_has_forgotten_is_lost(box: Box, quick: None) -> None:
    box.daemon(0.02)

    async def talk() -> None:
        with await connect(box.record()) as client:
            with pytest.raises(ServeError, match="the rest of the answer is lost; try again"):
                async for piece in client.ask(turn(LONG)):
                    if isinstance(piece, Delta) and piece.tokens == 5:
                        break_connections(client, box.record())
                        client._connection.session = b"one that was forgotten"
            assert await whole(client, "next") == "next"

    asyncio.run(talk())


def test_a_request_that_is_refused_is_refused_once_more_and_then_told(box: Box) -> None:
    box.daemon()

    async def talk() -> None:
        with await connect(box.record()) as client:
            with pytest.raises(RequestError, match="max_tokens must be"):
                async for _ in client.ask(turn("x"), max_tokens=-1):
                    pass
            with pytest.raises(RequestError, match="must be the user's"):
                await client.tokenize([{"role": "assistant", "content": "x"}])
            assert (await client.status())["waiting"] == 0

    asyncio.run(talk())


@pytest.mark.parametrize("is_question", [True, False])
def test_another_daemon_at_the_same_address_is_noticed(box: Box, is_question: bool) -> None:
    first = box.daemon()

    async def talk() -> None:
        # As one on another machine: nobody can see whether it lives.
        with await connect(dataclasses.replace(box.record(), pid=0, epoch="")) as client:
            first.terminate()
            first.wait()
            box.daemon()
            with pytest.raises(NoDaemonError, match="was replaced"):
                await (client.status() if is_question else whole(client, TEXT))
            assert client.is_lost

    asyncio.run(talk())


STOP = "import os, signal, sys\nif 'serve.engine_process' in sys.orig_argv: os.kill(os.getpid(), signal.SIGSTOP)\n"


@contextlib.contextmanager
def loading(box: Box) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """(a daemon that answers, the pid of its engine, which stops itself before it has loaded)."""
    (box.folder / "sitecustomize.py").write_text(STOP)
    daemon = box.start("daemon", "HOLD=echo", PYTHONPATH=f"{box.folder}:{ROOT}")

    def is_stopped(pid: int) -> bool:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("T")

    (engine,) = wait_until(lambda: [pid for pid in children(daemon.pid) if is_stopped(pid)])
    try:
        wait_until(lambda: (box.runtime / "echo.json").exists())
        yield daemon, engine
    finally:
        # Stopped so early, it would outlive its daemon.
        os.kill(engine, signal.SIGKILL)


def test_a_connection_that_breaks_while_the_daemon_loads(box: Box, quick: None) -> None:
    async def talk(engine: int) -> str:
        # Over tcp it cannot be seen that a daemon has gone.
        with Client(dataclasses.replace(box.record(), pid=0)) as client:
            greeting = asyncio.create_task(client.greet(lambda *_: None))
            # Longer than a daemon may be silent.
            await asyncio.sleep(1.5)
            assert client.limits and not greeting.done()
            break_connections(client, box.record())
            os.kill(engine, signal.SIGCONT)
            async with asyncio.timeout(PATIENCE):
                await greeting
            return await whole(client, TEXT)

    with loading(box) as (_, engine):
        assert asyncio.run(talk(engine)) == TEXT


def test_a_daemon_that_hangs_while_it_loads_is_not_waited_for(box: Box, quick: None) -> None:
    async def talk(daemon: "subprocess.Popen[str]") -> None:
        with Client(box.record()) as client:
            greeting = asyncio.create_task(client.greet(lambda *_: None))
            while not client.limits:
                await asyncio.sleep(0.02)
            daemon.send_signal(signal.SIGSTOP)
            with pytest.raises(NoDaemonError, match=f"silent; try: kill -9 {daemon.pid}"):
                async with asyncio.timeout(PATIENCE):
                    await greeting

    with loading(box) as (daemon, _):
        asyncio.run(talk(daemon))


# More events than libzmq keeps for somebody who does not read them.
NUM_KNOCKS = 3000


async def knock(port: int, number: int) -> None:
    """Find a door shut so many times; whoever hurries as much has then found it shut about as often."""
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.set(zmq.RECONNECT_IVL, 1)
        events = dealer.get_monitor_socket(zmq.EVENT_CLOSED)
        dealer.connect(f"tcp://127.0.0.1:{port}")
        for _ in range(number):
            await events.recv_multipart()
        dealer.disable_monitor()
        events.close()


def test_a_door_that_is_found_shut_thousands_of_times_can_be_opened_again(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lock_and_hurry(dealer: zmq.asyncio.Socket, record: Record) -> None:
        curve.lock_dealer(dealer, record)
        dealer.set(zmq.RECONNECT_IVL, 1)

    port = free_ports()
    box.run("keys")
    first = box.daemon(0.0, f"LISTEN=127.0.0.1:{port}")
    monkeypatch.setenv("HOME", str(box.folder))
    monkeypatch.setattr(connection, "lock_dealer", lock_and_hurry)

    async def talk() -> None:
        ends = {"data": f"tcp://127.0.0.1:{port}", "control": f"tcp://127.0.0.1:{port + 1}"}
        with await connect(dataclasses.replace(box.record(), pid=0, **ends)) as client:
            first.terminate()
            first.wait()
            await knock(port, NUM_KNOCKS)
            box.daemon(0.0, f"LISTEN=127.0.0.1:{port}")
            with pytest.raises(NoDaemonError, match="was replaced"):
                await client.status()

    asyncio.run(talk())
