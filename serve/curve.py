"""CURVE on the sockets: who may open the door of a daemon on tcp, and what a client learns when it stays shut."""

import socket
import time
from collections.abc import Callable
from typing import Any

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.utils.monitor import recv_monitor_message

from serve import keys
from serve.arguments import split_address
from serve.errors import NoDaemonError, UserError
from serve.runtime import Record

DOMAIN = "afinar"
QUIET_SECONDS = 5.0
HEARTBEAT_MS = 20_000
# The first of these that a client sees says what became of its key.
WATCHED = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_CLOSED
)


class Guard:
    """Asked by libzmq at every handshake, over ipc as over tcp; the list is read anew each time."""

    def __init__(self, context: zmq.asyncio.Context, on_refused: Callable[[str], None]) -> None:
        self._on_refused = on_refused
        self._last_told = -QUIET_SECONDS
        self._authenticator = AsyncioAuthenticator(context)
        self._authenticator.configure_curve_callback(DOMAIN, self)

    def start(self) -> None:
        """Answer from now on; needs a running loop."""
        self._authenticator.start()

    def stop(self) -> None:
        """Answer no more: nobody new comes in."""
        self._authenticator.stop()

    def callback(self, _: str, key: bytes) -> bool:
        """Whether the holder of this public key may connect."""
        is_listed = keys.may_connect(key)
        # Whoever has the daemon's public key can knock for ever.
        if not is_listed and time.monotonic() - self._last_told >= QUIET_SECONDS:
            self._last_told = time.monotonic()
            self._on_refused(key.decode("ascii"))
        return is_listed


def guard_router(router: zmq.Socket[Any], pair: keys.Pair) -> None:
    """Let in only who shows a listed key; to be called before the socket is bound."""
    router.set(zmq.CURVE_SERVER, 1)
    router.set(zmq.CURVE_SECRETKEY, pair.secret)
    router.set(zmq.ZAP_DOMAIN, DOMAIN.encode())
    # Without this, libzmq lets everybody in while no authenticator runs.
    router.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
    # A machine that vanished never says so.
    router.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    router.set(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)


def bind(router: zmq.asyncio.Socket, listen: str, offset: int) -> None:
    """Listen on tcp, `offset` ports above the one in `host:port`; raises `UserError`."""
    host, port = split_address(listen)
    try:
        # libzmq binds to addresses and interfaces, not to names.
        is_v6 = ":" in host
        family = socket.AF_INET6 if is_v6 else socket.AF_INET
        address = socket.getaddrinfo(host, port + offset, family, socket.SOCK_STREAM)[0][4]
        router.set(zmq.IPV6, int(is_v6))
        router.bind(f"tcp://[{address[0]}]:{port + offset}" if is_v6 else f"tcp://{address[0]}:{port + offset}")
    except (OSError, zmq.ZMQError) as fault:
        why = str(fault.strerror).partition(" (")[0]
        raise UserError(f"LISTEN={listen}: port {port + offset}: {why}; try another host or port") from None


def lock_dealer(dealer: zmq.asyncio.Socket, record: Record) -> None:
    """Show this user's key, and talk only to the daemon of that record; to be called before the socket connects."""
    pair = keys.client_pair()
    dealer.set(zmq.CURVE_SERVERKEY, record.server_key.encode())
    dealer.set(zmq.CURVE_PUBLICKEY, pair.public.encode())
    dealer.set(zmq.CURVE_SECRETKEY, pair.secret)
    # A name such as localhost would mean its address of IPv6 only.
    dealer.set(zmq.IPV6, int(record.data.startswith("tcp://[")))


def remote(connect: str) -> Record:
    """What a discovery file would say of the daemon at `host:port`; raises `UserError` where no key of it is known."""
    host, port = split_address(connect)
    shown = f"[{host}]" if ":" in host else host
    data, control = f"tcp://{shown}:{port}", f"tcp://{shown}:{port + 1}"
    return Record(connect, connect, "", data, control, 0, 0, "", server_key=keys.daemon_key(host))


class Handshake:
    """Watches a dealer from before it connects: to a client, a refused key looks like silence."""

    def __init__(self, dealer: zmq.asyncio.Socket, where: str) -> None:
        self._dealer, self._where = dealer, where
        self._monitor = dealer.get_monitor_socket(WATCHED)
        self._is_over = False

    async def check(self) -> None:
        """Raise `NoDaemonError` if the daemon has shut the door, or nobody is behind it."""
        while not self._is_over and await self._monitor.poll(0):
            event = (await recv_monitor_message(self._monitor))["event"]
            self._is_over = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if not self._is_over:
                raise NoDaemonError(self._why(event))

    def close(self) -> None:
        """Stop watching: nobody would read the events any more, and at the two thousandth libzmq would wait for a reader."""
        self._dealer.disable_monitor()
        self._monitor.close()

    def _why(self, event: int) -> str:
        folder = keys.directory()
        if event == zmq.EVENT_CLOSED:
            return f"nothing listens at {self._where}; try there: make serve LISTEN={self._where}"
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return f"the daemon at {self._where} does not know your key; copy {folder}/client.key to its keys/clients/"
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            return f"what listens at {self._where} asks for no key, or is no daemon; try another CONNECT=host:port"
        return f"the daemon at {self._where} has another key than the one known here; copy its daemon.key to {folder}/daemons/"  # fmt: skip
