"""The client side of the protocol: connect to a daemon, ask, cancel. One request at a time."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import zmq
import zmq.asyncio

from serve.engine import Sampling
from serve.errors import EngineError, NoDaemonError, RequestError, UserError
from serve.protocol import (
    CREDIT_WINDOW,
    MAX_MESSAGE_BYTES,
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
from serve.submission import Submission
from serve.wire import send_now

POLL_MS = 500
# Credit is granted in lumps: a message for every delta would double the traffic.
GREEDY = Sampling()
CREDIT_LUMP = CREDIT_WINDOW // 2
ShowProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Delta:
    """The next piece of the answer; `tokens` counts the answer's tokens so far."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Done:
    """The answer is over: `reason` is stop or length."""

    reason: str
    usage: dict[str, Any]

    @property
    def tokens_per_second(self) -> float:
        """Speed of the answer after its first token."""
        seconds = float(self.usage["decode_ms"]) / 1e3
        return max(int(self.usage["completion_tokens"]) - 1, 0) / max(seconds, 1e-3)


class Client:
    """A connection to one daemon. Made by `connect`."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.info: dict[str, Any] = {}
        self._context = zmq.asyncio.Context()
        self._data = self._dealer(record.data)
        self._control = self._dealer(record.control)
        self._session = b""
        self._last_heard = time.monotonic()
        self._request: bytes | None = None
        self._is_accepted = False
        self._is_cancelled = False

    def _dealer(self, endpoint: str) -> zmq.asyncio.Socket:
        dealer = self._context.socket(zmq.DEALER)
        dealer.set(zmq.LINGER, 200)
        dealer.connect(endpoint)
        return dealer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy()

    async def greet(self, show_progress: ShowProgress) -> None:
        """Say HELLO and wait until the run is loaded; raises `NoDaemonError` or `EngineError`."""
        self._send(self._control, Message(Kind.HELLO, body={"proto": [VERSION]}))
        is_loading = False
        while True:
            message = await self._receive(self._control, patience=None if is_loading else SILENCE_SECONDS)
            if message.kind is Kind.PROGRESS:
                show_progress(message.body["stage"], message.body["done"], message.body["total"])
            elif message.kind is Kind.ERROR:
                self._raise(message)
            elif message.kind is Kind.WELCOME:
                if message.body["epoch"] != self.record.epoch:
                    raise NoDaemonError(f"the daemon of {self.record.run} was replaced; try: make chat")
                self._session = message.body["session"]
                if message.body["state"] == "ready":
                    self.info = message.body["info"]
                    return
                is_loading = True

    async def ask(
        self, messages: list[dict[str, Any]], sampling: Sampling = GREEDY, max_tokens: int | None = None
    ) -> AsyncIterator[Delta | Done]:
        """The answer in pieces, `Done` last; raises `RequestError`, or `NoDaemonError` if the daemon dies or hangs."""
        request = self._request = os.urandom(len(NO_REQUEST))
        self._is_accepted = self._is_cancelled = False
        body = {**Submission(messages, sampling, max_tokens).to_body(), "session": self._session}
        submit = Message(Kind.SUBMIT, request, body)
        if (size := len(encode(submit)[-1])) > MAX_MESSAGE_BYTES:
            raise UserError(f"the conversation is {size} bytes and {MAX_MESSAGE_BYTES} go through; try a shorter text")
        self._last_heard = time.monotonic()
        pings = asyncio.create_task(self._ping())
        num_deltas = 0
        try:
            self._send(self._data, submit)
            while True:
                message = await self._receive(self._data, patience=SILENCE_SECONDS)
                if message.request != request:
                    # The tail of an answer that was abandoned.
                    continue
                if message.kind is Kind.ERROR:
                    self._raise(message)
                elif message.kind is Kind.DONE:
                    yield Done(message.body["reason"], message.body["usage"])
                    return
                elif message.kind is Kind.ACCEPTED:
                    self._accepted()
                elif message.kind is Kind.DELTA and not self._is_cancelled:
                    yield Delta(message.body["text"], message.body["tokens"])
                    num_deltas += 1
                    if num_deltas % CREDIT_LUMP == 0:
                        self._send(self._data, Message(Kind.CREDIT, request, {"count": CREDIT_LUMP}))
        finally:
            self._request = None
            pings.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pings

    def cancel(self) -> None:
        """End the answer under way; `ask` then raises `RequestError` with E_CANCELLED."""
        self._is_cancelled = True
        # Control is the faster lane: before ACCEPTED the daemon may not know the request yet.
        if self._request is not None and self._is_accepted:
            self._send(self._control, Message(Kind.CANCEL, self._request))

    async def status(self) -> dict[str, Any]:
        """What the daemon is doing; only between answers."""
        self._last_heard = time.monotonic()
        self._send(self._control, Message(Kind.STATUS))
        while (message := await self._receive(self._control, patience=SILENCE_SECONDS)).kind is not Kind.STATUS:
            pass
        return message.body

    def _accepted(self) -> None:
        self._is_accepted = True
        if self._is_cancelled:
            self.cancel()

    async def _ping(self) -> None:
        while True:
            self._send(self._control, Message(Kind.PING))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PING_SECONDS):
                    while True:
                        await self._control.recv_multipart()
                        self._last_heard = time.monotonic()

    def _send(self, socket: zmq.asyncio.Socket, message: Message) -> None:
        try:
            send_now(socket, encode(message))
        except zmq.Again:
            raise NoDaemonError(f"the daemon of {self.record.run} takes no messages; try: make serve") from None

    async def _receive(self, socket: zmq.asyncio.Socket, patience: float | None) -> Message:
        """The next message; raises `NoDaemonError` if the daemon is gone, or silent for `patience` seconds."""
        while not await socket.poll(POLL_MS):
            if not self.record.is_alive and not await socket.poll(0):
                raise NoDaemonError(f"the daemon of {self.record.run} is gone; try: make serve RUN={self.record.run}")
            if patience is not None and time.monotonic() - self._last_heard > patience:
                raise NoDaemonError(f"the daemon of {self.record.run} is silent; try: kill -9 {self.record.pid}")
        self._last_heard = time.monotonic()
        try:
            return decode(await socket.recv_multipart())
        except ProtocolError as fault:
            raise NoDaemonError(
                f"the daemon of {self.record.run} speaks another protocol ({fault}); restart it"
            ) from None

    def _raise(self, message: Message) -> NoReturn:
        code, text = message.body["code"], message.body["message"]
        if code == Code.ENGINE and not any(message.request):
            raise EngineError(text)
        raise RequestError(code, text, message.body["detail"])


async def connect(record: Record, show_progress: ShowProgress = lambda *_: None) -> Client:
    """A client of a daemon that is ready to answer; use it as a context manager."""
    client = Client(record)
    try:
        await client.greet(show_progress)
    except BaseException:
        client.__exit__()
        raise
    return client
