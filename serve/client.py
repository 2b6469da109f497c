"""The client side of the protocol: connect to a daemon, ask, cancel. One request at a time."""

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import zmq
import zmq.asyncio

from serve.curve import Handshake, lock_dealer
from serve.errors import EngineError, NoDaemonError, RequestError, ServeError, UserError
from serve.protocol import (
    CREDIT_WINDOW,
    MAX_CONTROL_BYTES,
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
# Reading an adapter takes the engine's time, and the daemon has no news meanwhile.
ADMIN_SECONDS = 120.0
ShowProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Accepted:
    """The engine has counted: `position` in the queue, the tokens of the prompt, the adapter's key, how it is sampled."""

    position: int
    prompt_tokens: int
    max_tokens: int
    adapter: str
    sampling: dict[str, Any]


@dataclass(frozen=True)
class Waiting:
    """`stage` queued: `done` others of `total` go first; prompt: `done` of `total` tokens have been read."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Delta:
    """The next piece of the answer; `tokens` counts the answer's tokens so far, `ids` are these if they were asked for."""

    text: str
    tokens: int
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Done:
    """The answer is over: `reason` is stop or length; `digest` the SHA-256 of its text, which was compared."""

    reason: str
    usage: dict[str, Any]
    timings: dict[str, Any]
    digest: str
    stop: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Speed of the answer after its first token."""
        seconds = float(self.timings["decode_ms"]) / 1e3
        return max(int(self.usage["completion_tokens"]) - 1, 0) / max(seconds, 1e-3)


Piece = Accepted | Waiting | Delta | Done


class Answer:
    """The pieces that have come of one request. `texts` are the deltas in order; a replay may repeat some of them."""

    def __init__(self, submit: Message) -> None:
        self.submit = submit
        self.texts: list[str] = []
        self.num_unattached = 0

    def again(self) -> Message:
        """The SUBMIT that goes on where the answer is."""
        return Message(Kind.SUBMIT, self.submit.request, {**self.submit.body, "have": len(self.texts)})

    def add(self, number: int, text: str) -> str:
        """The part of a delta that is new; raises `ServeError` if one is missing."""
        if number > len(self.texts):
            raise ServeError(f"part {len(self.texts)} of the answer is missing; try again")
        known = "".join(self.texts[number:])
        self.texts[number:] = [text]
        return text.removeprefix(known)

    def check(self, digest: str) -> None:
        """Raise `ServeError` if this is not the text that was sent."""
        if hashlib.sha256("".join(self.texts).encode()).hexdigest() != digest:
            raise ServeError("the answer was damaged on its way; try again")


class Client:
    """A connection to one daemon. Made by `connect`; `adapter` answers what names no other."""

    def __init__(self, record: Record, adapter: str | None = None) -> None:
        self.record = record
        self.adapter = adapter
        self.info: dict[str, Any] = {}
        self.limits: dict[str, Any] = {}
        self._context = zmq.asyncio.Context()
        self._handshake: Handshake | None = None
        self._data = self._dealer(record.data)
        self._control = self._dealer(record.control)
        self._session = b""
        self._epoch = record.epoch
        self._last_heard = time.monotonic()
        self._answer: Answer | None = None
        self._is_replaced = self._is_cancelled = False

    def _dealer(self, endpoint: str) -> zmq.asyncio.Socket:
        dealer = self._context.socket(zmq.DEALER)
        dealer.set(zmq.LINGER, 200)
        if self.record.server_key:
            lock_dealer(dealer, self.record)
            self._handshake = Handshake(dealer, self.record.run)
        dealer.connect(endpoint)
        return dealer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy()

    async def greet(self, show_progress: ShowProgress, *, until_ready: bool = True) -> None:
        """Say HELLO and wait until the run is loaded; raises `NoDaemonError`, `EngineError` or `RequestError`."""
        self._hello()
        is_loading = False
        while True:
            message = await self._receive(self._control, patience=None if is_loading else SILENCE_SECONDS)
            if message.kind is Kind.PROGRESS:
                show_progress(message.body["stage"], message.body["done"], message.body["total"])
            elif message.kind is Kind.ERROR:
                self._raise(message)
            elif message.kind is Kind.WELCOME:
                self._epoch = self._epoch or message.body["epoch"]
                if message.body["epoch"] != self._epoch:
                    raise self._replaced()
                self._session, self.limits = message.body["session"], message.body["limits"]
                if message.body["state"] == "draining" and until_ready:
                    raise RequestError(Code.DRAINING, "the daemon is stopping; try: make chat", {})
                if message.body["state"] == "ready" or not until_ready:
                    self.info = message.body["info"]
                    return
                is_loading = True

    async def ask(self, messages: list[dict[str, Any]], **options: Any) -> AsyncIterator[Piece]:
        """The answer in pieces, `Done` last; `options` are the other fields of a `Submission`.

        Raises `RequestError`, `NoDaemonError` if the daemon dies or hangs, `ServeError` if the text is not what was sent.
        """
        body = {**Submission(messages, **{"adapter": self.adapter, **options}).to_body(), "session": self._session}
        answer = Answer(Message(Kind.SUBMIT, os.urandom(len(NO_REQUEST)), body))
        self._require_size(answer.submit, self.limits.get("message_bytes", MAX_MESSAGE_BYTES))
        lump = self.limits.get("credit", CREDIT_WINDOW) // 2
        self._answer, self._is_cancelled = answer, False
        self._last_heard = time.monotonic()
        pings = asyncio.create_task(self._ping(answer))
        num_deltas = 0
        try:
            self._send(self._data, answer.submit)
            while True:
                message = await self._receive(self._data, patience=SILENCE_SECONDS)
                if message.request != answer.submit.request:
                    # The tail of an answer that was abandoned.
                    continue
                piece = self._read(answer, message)
                # Credit is granted in lumps: a message for every delta would double the traffic.
                num_deltas += message.kind is Kind.DELTA
                if message.kind is Kind.DELTA and num_deltas % lump == 0:
                    self._send(self._data, Message(Kind.CREDIT, message.request, {"count": lump}))
                if piece is not None and not (self._is_cancelled and isinstance(piece, Delta)):
                    yield piece
                if isinstance(piece, Done):
                    return
        finally:
            self._answer = None
            pings.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pings

    def _read(self, answer: Answer, message: Message) -> Piece | None:
        body = message.body
        if message.kind is Kind.ERROR:
            self._raise(message)
        elif message.kind is Kind.ACCEPTED:
            names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
            sampling = {name: body[name] for name in names if name in body}
            position = body.get("position", 0)
            return Accepted(position, body["prompt_tokens"], body["max_tokens"], body["adapter"], sampling)
        elif message.kind is Kind.PROGRESS:
            return Waiting(body["stage"], body["done"], body["total"])
        elif message.kind is Kind.DELTA:
            text = answer.add(body.get("n", len(answer.texts)), body["text"])
            return Delta(text, body["tokens"], tuple(body.get("ids", ())))
        elif message.kind is Kind.DONE:
            answer.check(body["digest"])
            return Done(body["reason"], body["usage"], body["timings"], body["digest"], body.get("stop", ""))
        return None

    def cancel(self) -> None:
        """End the answer under way; `ask` then raises `RequestError` with E_CANCELLED."""
        self._is_cancelled = True
        # The daemon remembers a CANCEL that is faster than its SUBMIT.
        if self._answer is not None:
            self._send(self._control, Message(Kind.CANCEL, self._answer.submit.request))

    # Only between answers.

    async def status(self) -> dict[str, Any]:
        """What the daemon is doing."""
        return await self._question(Kind.STATUS)

    async def tokenize(self, messages: list[dict[str, Any]], adapter: str | None = None) -> dict[str, Any]:
        """How many `tokens` a conversation has, of the `context` that the adapter holds."""
        return await self._question(Kind.TOKENIZE, messages=messages, adapter=adapter)

    async def adapters(self) -> list[dict[str, Any]]:
        """What can answer: the fields of an `AdapterInfo` and its `key` each."""
        return list((await self._question(Kind.ADAPTERS))["adapters"])

    async def load(self, run: str) -> str:
        """Serve one more run; its adapter's key. For who started the daemon."""
        return str((await self._question(Kind.LOAD, ADMIN_SECONDS, run=run, admin=self.record.admin))["loaded"])

    async def unload(self, adapter: str) -> str:
        """Forget an adapter; its key."""
        body = await self._question(Kind.UNLOAD, ADMIN_SECONDS, adapter=adapter, admin=self.record.admin)
        return str(body["unloaded"])

    async def drain(self, *, now: bool = False) -> dict[str, Any]:
        """Have the daemon leave when the open requests are over, or at once; its last status."""
        return await self._question(Kind.SHUTDOWN if now else Kind.DRAIN, admin=self.record.admin)

    async def _question(self, kind: Kind, patience: float = SILENCE_SECONDS, **body: Any) -> dict[str, Any]:
        question = Message(kind, os.urandom(len(NO_REQUEST)), body)
        self._require_size(question, self.limits.get("control_bytes", MAX_CONTROL_BYTES))
        self._last_heard = time.monotonic()
        self._send(self._control, question)
        while (message := await self._receive(self._control, patience)).request != question.request:
            pass
        if message.kind is Kind.ERROR:
            self._raise(message)
        return message.body

    def _require_size(self, message: Message, most: int) -> None:
        """Raise `UserError` for what would make the daemon drop the connection."""
        if (size := len(encode(message)[-1])) > most:
            raise UserError(f"the conversation is {size} bytes and {most} go through; try a shorter text")

    # Staying in touch.

    def _hello(self) -> None:
        body = {"proto": [VERSION], **({"session": self._session} if self._session else {})}
        self._send(self._control, Message(Kind.HELLO, body=body))

    async def _ping(self, answer: Answer) -> None:
        while True:
            self._send(self._control, Message(Kind.PING, answer.submit.request))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PING_SECONDS):
                    while True:
                        self._hear(answer, decode(await self._control.recv_multipart()))

    def _hear(self, answer: Answer, message: Message) -> None:
        """News on control while an answer is under way: whether the daemon knows us, and still reaches us with it."""
        self._last_heard = time.monotonic()
        if message.kind is Kind.ERROR and message.body["code"] == Code.BAD_REQUEST:
            # The connection was broken and made anew: to the daemon, a stranger speaks.
            self._hello()
        elif message.kind in (Kind.WELCOME, Kind.PONG) and message.body.get("epoch", self._epoch) != self._epoch:
            self._is_replaced = True
        elif message.kind is Kind.WELCOME:
            self._session = message.body["session"]
        elif message.kind is Kind.PONG and message.request == answer.submit.request:
            answer.num_unattached = 0 if message.body.get("attached", True) else answer.num_unattached + 1
            # Twice: the first PING may have overtaken the SUBMIT.
            if answer.num_unattached >= 2:
                answer.num_unattached = 0
                self._send(self._data, answer.again())

    def _send(self, socket: zmq.asyncio.Socket, message: Message) -> None:
        try:
            send_now(socket, encode(message))
        except zmq.Again:
            raise NoDaemonError(f"the daemon of {self.record.run} takes no messages; try: make serve") from None

    async def _receive(self, socket: zmq.asyncio.Socket, patience: float | None) -> Message:
        """The next message; raises `NoDaemonError` if the daemon is gone, or silent for `patience` seconds."""
        while not await socket.poll(POLL_MS):
            if self._is_replaced:
                raise self._replaced()
            if self._handshake is not None:
                await self._handshake.check()
            if not self.record.is_alive and not await socket.poll(0):
                raise NoDaemonError(f"the daemon of {self.record.run} is gone; try: make serve RUN={self.record.run}")
            if patience is not None and time.monotonic() - self._last_heard > patience:
                hint = (
                    f"kill -9 {self.record.pid}" if self.record.pid else "another host or port, and there: make status"
                )
                raise NoDaemonError(f"the daemon of {self.record.run} is silent; try: {hint}")
        self._last_heard = time.monotonic()
        try:
            return decode(await socket.recv_multipart())
        except ProtocolError as fault:
            raise NoDaemonError(
                f"the daemon of {self.record.run} speaks another protocol ({fault}); restart it"
            ) from None

    @property
    def is_lost(self) -> bool:
        """Whether the daemon has gone, or another one is in its place."""
        return self._is_replaced or not self.record.is_alive

    def _replaced(self) -> NoDaemonError:
        return NoDaemonError(f"the daemon of {self.record.run} was replaced; try: make chat")

    def _raise(self, message: Message) -> NoReturn:
        code, text = message.body["code"], message.body["message"]
        if code == Code.ENGINE and not any(message.request):
            raise EngineError(text)
        raise RequestError(code, text, message.body["detail"])


async def connect(
    record: Record,
    show_progress: ShowProgress = lambda *_: None,
    adapter: str | None = None,
    *,
    until_ready: bool = True,
) -> Client:
    """A client of a daemon that is ready to answer, unless it shall not wait for that; use it as a context manager."""
    client = Client(record, adapter)
    try:
        await client.greet(show_progress, until_ready=until_ready)
    except BaseException:
        client.__exit__()
        raise
    return client
