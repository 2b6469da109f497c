"""The client's two sockets: what goes out, what comes in, and whether the daemon is still there and still the same."""

import asyncio
import time

import zmq
import zmq.asyncio

from serve.curve import Handshake, lock_dealer
from serve.errors import NoDaemonError
from serve.protocol import (
    NO_REQUEST,
    PING_SECONDS,
    SILENCE_SECONDS,
    VERSION,
    Code,
    Kind,
    Message,
    ProtocolError,
    decode,
    encode,
)
from serve.runtime import Record
from serve.wire import send_now

POLL_SECONDS = 0.5


class Connection:
    """Sockets to the daemon of `record`; its WELCOME to our HELLO gives them a `session`.

    All methods raise `NoDaemonError`: where the daemon has gone, hangs, or another one is in its place.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.session = b""
        self._epoch = record.epoch
        self._is_replaced = False
        self._next_ping = time.monotonic() + PING_SECONDS
        self._silent_seconds = 0.0
        self._context = zmq.asyncio.Context()
        self._data, self._control = self._dealer(), self._dealer()
        # What opens one of the two doors opens the other.
        self._handshake = Handshake(self._control, record.run) if record.server_key else None
        self._data.connect(record.data)
        self._control.connect(record.control)

    def _dealer(self) -> zmq.asyncio.Socket:
        dealer = self._context.socket(zmq.DEALER)
        dealer.set(zmq.LINGER, 200)
        if self.record.server_key:
            lock_dealer(dealer, self.record)
        return dealer

    def close(self) -> None:
        """Leave; nothing may be sent or received any more."""
        self._context.destroy()

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return bool(self._context.closed)

    @property
    def is_lost(self) -> bool:
        """Whether the daemon has gone, or another one is in its place."""
        return self._is_replaced or not self.record.is_alive

    @property
    def has_unread(self) -> bool:
        """Whether something has come on data that was not received yet."""
        return bool(int(self._data.get(zmq.EVENTS)) & zmq.POLLIN)

    # Out.

    def hello(self) -> None:
        """Make us known, with the session that we have; the answer is a WELCOME."""
        session = {"session": self.session} if self.session else {}
        self.send_control(encode(Message(Kind.HELLO, body={"proto": [VERSION], **session})))

    def send_data(self, frames: list[bytes]) -> None:
        """Send SUBMIT or CREDIT."""
        self._send(self._data, frames)

    def send_control(self, frames: list[bytes]) -> None:
        """Send anything else."""
        self._send(self._control, frames)

    def _send(self, socket: zmq.asyncio.Socket, frames: list[bytes]) -> None:
        try:
            send_now(socket, frames)
        except zmq.Again:
            raise NoDaemonError(f"the daemon of {self.record.run} takes no messages; try: make serve") from None

    # In.

    async def receive(self, watch: "asyncio.Task[None]") -> Message:
        """The next message on data; as long as none comes, raises what `watch` raises."""
        coming = asyncio.ensure_future(self._data.recv_multipart())
        try:
            await asyncio.wait({coming, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                watch.result()
            return self._read(await coming)
        finally:
            coming.cancel()

    async def hear(self, request: bytes = NO_REQUEST) -> Message:
        """The next message on control. Whoever waits here keeps us in touch: PINGs for `request`, HELLO where we are strangers."""
        while True:
            if time.monotonic() >= self._next_ping:
                self._next_ping = time.monotonic() + PING_SECONDS
                self.send_control(encode(Message(Kind.PING, request)))
            if not await self._control.poll(round(POLL_SECONDS * 1e3)):
                await self._miss()
                continue
            message = self._read(await self._control.recv_multipart())
            if self.session and message.request == request and is_bad_request(message):
                # The connection was broken and made anew: to the daemon, a stranger speaks.
                self.hello()
                continue
            self._recognise(message)
            return message

    def _read(self, frames: list[bytes]) -> Message:
        self._silent_seconds = 0.0
        try:
            return decode(frames)
        except ProtocolError as fault:
            text = f"the daemon of {self.record.run} speaks another protocol ({fault}); restart it"
            raise NoDaemonError(text) from None

    def _recognise(self, message: Message) -> None:
        """Learn the session, and notice another daemon."""
        if message.kind is Kind.WELCOME:
            self._epoch = self._epoch or message.body["epoch"]
            self.session = message.body["session"]
            if self._handshake is not None:
                self._handshake.close()
                self._handshake = None
        if message.kind in (Kind.WELCOME, Kind.PONG) and message.body.get("epoch", self._epoch) != self._epoch:
            self._is_replaced = True
            raise NoDaemonError(f"the daemon of {self.record.run} was replaced; try: make chat")

    async def _miss(self) -> None:
        """Nothing has come for a while: raise if there is no reason to go on waiting."""
        run, pid = self.record.run, self.record.pid
        if self._handshake is not None:
            await self._handshake.check()
        if not self.record.is_alive and not await self._control.poll(0):
            raise NoDaemonError(f"the daemon of {run} is gone; try: make serve RUN={run}")
        # In waits, not by the clock: while this process was stopped, nobody listened.
        self._silent_seconds += POLL_SECONDS
        if self._silent_seconds >= SILENCE_SECONDS:
            self._silent_seconds = 0.0
            hint = f"kill -9 {pid}" if pid else "another host or port, and there: make status"
            raise NoDaemonError(f"the daemon of {run} is silent; try: {hint}")


def is_bad_request(message: Message) -> bool:
    """Whether it is the refusal that also meets a stranger."""
    return message.kind is Kind.ERROR and message.body["code"] == Code.BAD_REQUEST
